"""What a layout costs: to find it, at an event over a stack, and at a step between events.

    python -m benchmarks.layout

Ratios in one run, contestants in turns. ``find_layout`` against ``find_groups`` on a decoder that
is shapes alone. An event over a stack of layers with a layout against the same layers as leaves of
their own. An update of ``prune`` between events with a layout against one without. And how the
seconds of tracing and compiling an event grow with the number of layers.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks.common import Task, interleave, machine, paired_ratio, print_table, write_json
from benchmarks.events import updater

SPARSITY = 0.75
LAYOUT = jp.Layout({"h/.*": ("layer", "in", "out")})
ALONE = jp.Layout({"h/.*": ("in", "out")})
EVENTS: dict[str, dict[str, Any]] = {
    "per_leaf": {},
    "across": {"scope": jp.scopes.across},
    "per_output": {"scope": jp.scopes.per_output},
    "windows": {"scope": jp.scopes.windows(4, axis="in")},
    "channels": {"pattern": jp.patterns.Channels("out")},
    "lamp across": {"criterion": jp.criteria.lamp, "scope": jp.scopes.across},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      decoder_layers: of the decoder whose layout is found.
      decoder_width: its width; heads are 128 wide, the MLP four times as wide.
      layers: of the stack that is pruned.
      width: of its layers.
      deep: layers of a deeper stack, for what compiling costs.
      turns: of every contestant.
      clock: ``cpu`` seconds of all threads, which other people's work disturbs least, or ``wall``.
      seed: of weights.
      out: JSON file to write.
    """

    decoder_layers: int = 32
    decoder_width: int = 4096
    layers: int = 12
    width: int = 256
    deep: int = 48
    turns: int = 15
    clock: Literal["wall", "cpu"] = "cpu"
    seed: int = 0
    out: Path = Path("results/benchmarks/layout.json")


def decoder(params: dict[str, Any], tokens: jax.Array, *, scanned: bool) -> jax.Array:
    """A decoder of attention and MLP blocks, its layers scanned over or one after another."""

    def block(x: jax.Array, p: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True)) * p["norm"]
        q, k, v = (jnp.einsum("btd,dhk->bthk", y, p[name]) for name in ("q", "k", "v"))
        x = x + jnp.einsum("bthk,hkd->btd", jax.nn.dot_product_attention(q, k, v), p["o"])
        return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None

    x = params["embedding"][tokens]
    if scanned:
        x, _ = jax.lax.scan(block, x, params["h"])
    else:
        for p in params["h"]:
            x, _ = block(x, p)
    return x @ params["embedding"].T


def decoder_shapes(config: Config, *, scanned: bool) -> dict[str, Any]:
    """Shapes of its params."""
    d, heads = config.decoder_width, config.decoder_width // 128
    shapes = {
        "norm": (d,),
        **dict.fromkeys("qkv", (d, heads, 128)),
        "o": (heads, 128, d),
        "up": (d, 4 * d),
        "down": (4 * d, d),
    }

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    n = config.decoder_layers
    layer = {name: of(*shape) for name, shape in shapes.items()}
    stack = {name: of(n, *shape) for name, shape in shapes.items()}
    return {"embedding": of(32_000, d), "h": stack if scanned else [layer] * n}


def searches(config: Config) -> dict[str, Task]:
    """What finds layouts and groups, scanned and unrolled."""
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    tasks: dict[str, Task] = {}
    for scanned, name in ((False, "unrolled"), (True, "scanned")):
        fn = functools.partial(decoder, scanned=scanned)
        params = decoder_shapes(config, scanned=scanned)
        tasks[f"{name} layout"] = functools.partial(jp.find_layout, fn, params, tokens)
        tasks[f"{name} groups"] = functools.partial(jp.find_groups, fn, params, tokens)
    return tasks


def stack_of(layers: int, width: int, seed: int) -> dict[str, Any]:
    """A stack of random kernels."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {"h": {"up": draw(layers, width, 4 * width), "down": draw(layers, 4 * width, width)}}


def leaves_of(stack: dict[str, Any]) -> dict[str, Any]:
    """The same with each layer a leaf."""
    return {"h": {name: list(x) for name, x in stack["h"].items()}}


def events(config: Config) -> dict[str, Task]:
    """Masks of stacks and of leaves, each compiled and called once."""
    stack = stack_of(config.layers, config.width, config.seed)
    contestants = {"stack": (stack, LAYOUT), "leaves": (leaves_of(stack), ALONE)}
    tasks: dict[str, Task] = {}
    for event, settings in EVENTS.items():
        for name, (params, layout) in contestants.items():
            find = functools.partial(jp.find_masks, params, SPARSITY, layout=layout, **settings)
            tasks[f"{event} {name}"] = _waiting(find)
            tasks[f"{event} {name}"]()
    return tasks


def _waiting(find: Callable[[], Any]) -> Task:
    return lambda: jax.block_until_ready(find())


def steps(config: Config) -> dict[str, Task]:
    """Updates of `prune` between events, with a layout and without."""
    stack = stack_of(config.layers, config.width, config.seed)
    rare = jp.schedules.linear(SPARSITY, begin=0, end=1000, every=500)
    return {
        name: updater(jp.prune(optax.adam(1e-3), schedule=rare, layout=layout), stack, stack)
        for name, layout in (("with", LAYOUT), ("without", None))
    }


def compiling(config: Config) -> dict[str, dict[str, float]]:
    """CPU seconds that an event takes to be traced and compiled, over those for a quarter of it."""
    found: dict[str, dict[str, float]] = {}
    for event, settings in EVENTS.items():
        seconds = []
        for layers in (config.deep // 4, config.deep):
            stack = jax.eval_shape(lambda n=layers: stack_of_zeros(n, config.width))
            find = functools.partial(jp.find_masks, sparsity=SPARSITY, layout=LAYOUT, **settings)
            start = time.process_time()
            jax.jit(find).lower(stack).compile()
            seconds.append(time.process_time() - start)
        found[event] = {"deep over shallow": seconds[1] / seconds[0]}
    return found


def stack_of_zeros(layers: int, width: int) -> dict[str, Any]:
    """The shapes of a stack."""
    return {
        "h": {
            "up": jnp.zeros((layers, width, 4 * width)),
            "down": jnp.zeros((layers, 4 * width, width)),
        }
    }


def measure(config: Config) -> dict[str, Any]:
    """All ratios, in turns."""
    clock = time.perf_counter if config.clock == "wall" else time.process_time

    def ratio(tasks: dict[str, Task], over: list[tuple[str, str, str]], turns: int) -> Any:
        times = interleave(tasks, dict.fromkeys(tasks, turns), clock)
        return {n: paired_ratio(times[a], times[b], seed=config.seed) for n, a, b in over}

    pairs = [(name, f"{name} layout", f"{name} groups") for name in ("unrolled", "scanned")]
    found = {"find_layout / find_groups": ratio(searches(config), pairs, 3)}
    pairs = [(name, f"{name} stack", f"{name} leaves") for name in EVENTS]
    found["event, stack / leaves"] = ratio(events(config), pairs, config.turns)
    between = ratio(steps(config), [("prune", "with", "without")], 4 * config.turns)
    found["step, with / without"] = between
    return {"ratios": found, "compiling": compiling(config)}


def main(config: Config) -> dict[str, Any]:
    result = measure(config)
    rows = [
        [f"{what}: {name}", f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"]
        for what, ratios in result["ratios"].items()
        for name, r in ratios.items()
    ]
    rows += [
        [
            f"compiling an event, {config.deep} / {config.deep // 4} layers: {name}",
            f"{r['deep over shallow']:.2f}",
        ]
        for name, r in result["compiling"].items()
    ]
    print_table(f"What a layout costs ({config.clock} seconds)", ["ratio", "median [95 %]"], rows)
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, **result}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
