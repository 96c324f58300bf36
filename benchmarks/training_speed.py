"""Time the training of LeNet-300-100 against a PyTorch loop, in CPU seconds.

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false python -m benchmarks.training_speed

Ours is one compiled scan with masks held by ``jp.hold``; PyTorch's is the loop that a user writes,
with all data in memory, no loader, and one thread. CPU seconds count every thread of the process,
so nobody wins by using more cores; the flag above keeps XLA to one thread like PyTorch.
"""

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import lax

import jaxprune as jp
from benchmarks.common import Task, interleave, machine, paired_ratio, print_table, write_json

WIDTHS = (784, 300, 100, 10)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      iterations: training iterations in a block.
      blocks: turns of every contestant.
      examples: images in memory.
      batch_size: images in a batch.
      learning_rate: of Adam.
      sparsity: of the masks.
      seed: of weights, data and batches.
      out: JSON file to write.
    """

    iterations: int = 500
    blocks: int = 15
    examples: int = 55_000
    batch_size: int = 60
    learning_rate: float = 1.2e-3
    sparsity: float = 0.9
    seed: int = 0
    out: Path = Path("results/benchmarks/training_speed.json")


def draw(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw images and labels of MNIST's shape, and the examples of each batch."""
    rng = np.random.default_rng(config.seed)
    images = rng.standard_normal((config.examples, WIDTHS[0]), np.float32)
    labels = rng.integers(0, WIDTHS[-1], config.examples)
    order = rng.integers(0, config.examples, (config.iterations, config.batch_size))
    return images, labels, order


def in_jax(config: Config, data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Task]:
    """Build scans with a bare optimizer and with masks held."""
    images, labels, order = (jnp.asarray(array) for array in data)
    keys = jax.random.split(jax.random.key(config.seed), len(WIDTHS) - 1)
    init = jax.nn.initializers.glorot_normal()
    params = {
        f"layer_{i}": {"kernel": init(key, (m, n)), "bias": jnp.zeros(n)}
        for i, (key, (m, n)) in enumerate(zip(keys, itertools.pairwise(WIDTHS), strict=True))
    }

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for i in range(len(params)):
            x = (jax.nn.relu(x) if i else x) @ params[f"layer_{i}"]["kernel"]
            x += params[f"layer_{i}"]["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    def task(tx: optax.GradientTransformation, state: Any) -> Task:
        def train(carry: Any, images: jax.Array, labels: jax.Array, order: jax.Array) -> Any:
            def step(carry: Any, batch: jax.Array) -> tuple[Any, None]:
                params, state = carry
                grads = jax.grad(loss)(params, images[batch], labels[batch])
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return lax.scan(step, carry, order)[0]

        carry = jax.tree.map(jnp.copy, (params, state))
        run = jax.jit(train, donate_argnums=0)

        def block() -> None:
            nonlocal carry
            carry = jax.block_until_ready(run(carry, images, labels, order))

        return block

    adam = optax.adam(config.learning_rate)
    hold = jp.hold(adam)
    masks = jp.find_masks(params, config.sparsity)
    return {
        "jaxprune": task(hold, jp.with_masks(hold.init(params), masks)),
        "jax, dense": task(adam, adam.init(params)),
    }


def in_torch(config: Config, data: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, Task]:
    """Build PyTorch loops: dense, with Adam fused, and with masks multiplied in at every step."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    images, labels, order = (torch.from_numpy(array) for array in data)

    def task(*, fused: bool, masked: bool) -> Task:
        layers: list[nn.Module] = []
        for m, n in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(m, n), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        loss = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=fused)
        masks = [
            (p, (torch.rand_like(p) >= config.sparsity).to(p.dtype))
            for p in model.parameters()
            if masked and p.ndim > 1
        ]

        def block() -> None:
            for batch in order:
                for p, mask in masks:
                    p.data *= mask
                optimizer.zero_grad()
                loss(model(images[batch]), labels[batch]).backward()
                optimizer.step()

        return block

    return {
        "torch": task(fused=False, masked=False),
        "torch, fused Adam": task(fused=True, masked=False),
        "torch, masks": task(fused=False, masked=True),
        "torch, masks, fused Adam": task(fused=True, masked=True),
    }


def main(config: Config) -> dict[str, Any] | None:
    data = draw(config)
    try:
        tasks = in_torch(config, data)
    except ImportError as error:
        print(
            f"Skipped: there is no PyTorch to compare with ({error}). Install the optional peer "
            "with `pip install torch==2.13.0` and run this again."
        )
        return None
    tasks = in_jax(config, data) | tasks
    for task in tasks.values():  # compiles, allocates
        task()
    repeats = dict.fromkeys(tasks, config.blocks)
    seconds = interleave(tasks, repeats, clock=time.process_time)
    ratios = {
        name: paired_ratio(seconds[name], seconds["jaxprune"], seed=config.seed)
        for name in tasks
        if name != "jaxprune"
    }
    per_iteration = {
        name: 1e3 * float(np.median(s)) / config.iterations for name, s in seconds.items()
    }
    print_table(
        f"LeNet-300-100, Adam, batch {config.batch_size}: CPU time of a training iteration",
        ["contestant", "milliseconds", "over jaxprune [95 % interval]"],
        [
            [
                name,
                f"{per_iteration[name]:.3f}",
                "1.00"
                if name == "jaxprune"
                else "{median:.2f} [{low:.2f}, {high:.2f}]".format(**ratios[name]),
            ]
            for name in tasks
        ],
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {
        "machine": machine() | {"torch": _torch_version()},
        "config": settings,
        "cpu_milliseconds_per_iteration": per_iteration,
        "time_over_ours": ratios,
    }
    write_json(config.out, result)
    return result


def _torch_version() -> str:
    import torch

    return torch.__version__


if __name__ == "__main__":
    main(tyro.cli(Config))
