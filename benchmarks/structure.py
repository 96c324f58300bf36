"""Time the analysis of a ResNet-50 and of a decoder, and what cutting channels gains in latency.

    python -m benchmarks.structure

The analysis of the ResNet is over Torch-Pruning's dependency graph of the same network where torch
and torch-pruning are at hand. ``latency`` is that of a network whose channels are cut, over the
whole one, beside the ratio of their FLOPs.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxprune as jp
from benchmarks.common import Task, interleave, machine, paired_ratio, print_table, write_json


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      blocks: bottleneck blocks of each stage of the ResNet; ResNet-50 has (3, 4, 6, 3).
      layers: layers of the decoder, which is Llama's with 4096 channels.
      turns: of every contestant.
      removed: fraction of the channels that is cut, for the latency.
      batch: images of a batch, for the latency.
      size: height and width of these images.
      seed: of weights and images.
      out: JSON file to write.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    layers: int = 32
    turns: int = 9
    removed: float = 0.5
    batch: int = 64
    size: int = 32
    seed: int = 0
    out: Path = Path("results/benchmarks/structure.json")


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map feature maps to feature maps, smaller by the stride."""

        def conv(features: int, size: int, stride: int, x: jax.Array) -> jax.Array:
            x = nn.Conv(features, (size, size), strides=(stride, stride), use_bias=False)(x)
            return nn.BatchNorm(use_running_average=True)(x)

        y = nn.relu(conv(self.features, 1, 1, x))
        y = nn.relu(conv(self.features, 3, self.stride, y))
        y = conv(4 * self.features, 1, 1, y)
        if y.shape != x.shape:
            x = conv(4 * self.features, 1, self.stride, x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50, or another number of blocks, or another width."""

    blocks: tuple[int, ...]
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images to logits."""
        x = nn.Conv(self.width, (7, 7), strides=(2, 2), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                x = Bottleneck(self.width * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def decoder(params: Any, tokens: jax.Array) -> jax.Array:
    """Llama's decoder: grouped queries, rotary embeddings, SwiGLU."""
    heads, size = 32, 128

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]

    def turn(x: jax.Array) -> jax.Array:
        steps = jnp.outer(jnp.arange(x.shape[1]), 10_000 ** -(jnp.arange(0, size, 2) / size))
        cos, sin = (f(steps)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = params["embedding"][tokens]
    batch, length = tokens.shape
    past = jnp.tril(jnp.ones((length, length), bool))
    for p in params["layers"]:
        y = norm(x, p["norm_0"])
        q, k, v = ((y @ p[name]).reshape(batch, length, -1, size) for name in "qkv")
        k, v = (jnp.repeat(z, heads // z.shape[2], 2) for z in (turn(k), v))
        scores = jnp.einsum("bthd,bshd->bhts", turn(q), k) / size**0.5
        weights = jax.nn.softmax(jnp.where(past[None, None], scores, -1e9))
        x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, -1) @ p["o"]
        y = norm(x, p["norm_1"])
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    return norm(x, params["norm"]) @ params["out"]


def decoder_shapes(layers: int) -> Any:
    """Its parameters as shapes."""

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    d, inner, words = 4096, 14_336, 128_256
    layer = {
        **{"q": shape(d, d), "k": shape(d, 1024), "v": shape(d, 1024), "o": shape(d, d)},
        **{"gate": shape(d, inner), "up": shape(d, inner), "down": shape(inner, d)},
        **{"norm_0": shape(d), "norm_1": shape(d)},
    }
    ends = {"embedding": shape(words, d), "norm": shape(d), "out": shape(d, words)}
    return {**ends, "layers": [layer] * layers}


def torch_analysis(blocks: tuple[int, ...], width: int) -> Task | None:
    """Torch-Pruning's dependency graph of the same ResNet, if it is installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "torch_pruning")):
        return None
    import torch
    import torch_pruning
    from torch import nn as tnn

    class Block(tnn.Module):
        def __init__(self, inputs: int, features: int, stride: int) -> None:
            super().__init__()
            sizes = ((inputs, features, 1, 1), (features, features, 3, stride))
            convs = [*sizes, (features, 4 * features, 1, 1)]
            self.convs = tnn.ModuleList(
                tnn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in convs
            )
            self.norms = tnn.ModuleList(tnn.BatchNorm2d(o) for _, o, _, _ in convs)
            same = inputs == 4 * features and stride == 1
            self.short = None if same else tnn.Conv2d(inputs, 4 * features, 1, stride, bias=False)

        def forward(self, x: Any) -> Any:
            y = x
            for i in range(3):
                y = self.norms[i](self.convs[i](y))
                y = y if i == 2 else torch.relu(y)
            return torch.relu(y + (x if self.short is None else self.short(x)))

    class Net(tnn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = tnn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.norm, self.pool = tnn.BatchNorm2d(width), tnn.MaxPool2d(3, 2, 1)
            inputs, parts = width, []
            for stage, count in enumerate(blocks):
                for block in range(count):
                    features = width * 2**stage
                    parts.append(Block(inputs, features, 2 if stage and not block else 1))
                    inputs = 4 * features
            self.parts, self.head = tnn.Sequential(*parts), tnn.Linear(inputs, 1000)

        def forward(self, x: Any) -> Any:
            x = self.parts(self.pool(torch.relu(self.norm(self.stem(x)))))
            return self.head(x.mean((2, 3)))

    net, images = Net().eval(), torch.zeros(1, 3, 224, 224)

    def task() -> None:
        graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=images)
        list(graph.get_all_groups(root_module_types=[tnn.Conv2d, tnn.Linear]))

    return task


def analysis(config: Config) -> dict[str, Any]:
    """Time ``find_groups``, over Torch-Pruning if it is there; the seconds tell the order only."""
    net = ResNet(config.blocks)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    shapes = decoder_shapes(config.layers)
    tasks: dict[str, Task] = {
        "resnet": lambda: jp.find_groups(net.apply, variables, images),
        "decoder": lambda: jp.find_groups(decoder, shapes, tokens),
    }
    theirs = torch_analysis(config.blocks, 64)
    if theirs is not None:
        tasks["resnet, torch_pruning"] = theirs
    times = interleave(tasks, dict.fromkeys(tasks, config.turns))
    result: dict[str, Any] = {"seconds": {name: float(np.median(t)) for name, t in times.items()}}
    if theirs is not None:
        ours, base = times["resnet"], times["resnet, torch_pruning"]
        result["resnet / torch_pruning"] = paired_ratio(ours, base, seed=config.seed)
    return result


def latency(config: Config) -> dict[str, Any]:
    """Time a ResNet with channels cut at random over the whole one, and count both."""
    net = ResNet(config.blocks, width=16)
    rng = np.random.default_rng(config.seed)
    images = jnp.asarray(rng.normal(size=(config.batch, config.size, config.size, 3)), jnp.float32)
    variables = net.init(jax.random.key(config.seed), images)
    pattern = jp.patterns.Coupled(jp.find_groups(net.apply, variables, images))
    masks = jp.find_masks(
        variables,
        config.removed,
        pattern=pattern,
        criterion=jp.criteria.random,
        key=jax.random.key(config.seed),
    )
    small_fn, small = jp.shrink(net.apply, variables, masks)
    runs = {
        "whole": jax.jit(net.apply).lower(variables, images).compile(),
        "small": jax.jit(small_fn).lower(small, images).compile(),
    }
    tasks: dict[str, Task] = {
        "whole": lambda: jax.block_until_ready(runs["whole"](variables, images)),
        "small": lambda: jax.block_until_ready(runs["small"](small, images)),
    }
    for task in tasks.values():
        task()
    times = interleave(tasks, dict.fromkeys(tasks, 4 * config.turns))
    flops = [
        jp.count_flops(small_fn, small, images),
        jp.count_flops(net.apply, variables, images),
    ]
    return {
        "small / whole": paired_ratio(times["small"], times["whole"], seed=config.seed),
        "flops": flops[0] / flops[1],
    }


def main(config: Config) -> dict[str, Any]:
    found, gained = analysis(config), latency(config)
    ratios = {name: r for name, r in found.items() if name != "seconds"}
    ratios["small / whole, latency"] = gained["small / whole"]
    rows = [[f"analysis of the {name}", f"{s:.2f} s"] for name, s in found["seconds"].items()]
    rows += [
        [name, f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"] for name, r in ratios.items()
    ]
    rows.append(["small / whole, FLOPs", f"{gained['flops']:.3f}"])
    print_table(
        f"Structure, {config.removed:.0%} of the channels removed: median of {config.turns} turns "
        "[95 % interval]",
        ["", ""],
        rows,
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, "analysis": found, "latency": gained}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
