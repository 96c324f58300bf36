"""CPU seconds that compiling takes: masks and pruned steps of many leaves, on a CPU.

    python -m benchmarks.compile
    python -m benchmarks.compile --against ../jaxprune-of-before

Compared with sorting the leaves, with the bare optimizer, and with another checkout of the library,
which a process of its own imports. Tracing counts, and so does the one run of `find_masks`, which
is short.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro

import jaxprune as jp
from benchmarks.common import machine, print_table, write_json

HERE = Path(__file__).parent.parent
# The library is imported from one checkout, then this file from its own.
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import jaxprune
sys.path[0] = sys.argv[2]
from benchmarks import compile
compile.report(*sys.argv[3:])
"""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      trees: ``one`` has kernels of one shape, ``twelve`` twice as many of twelve shapes.
      against: another checkout of the library, to be compared with.
      turns: of every contestant; the quickest counts.
      kernels: of the tree of one shape; a multiple of 6.
      size: of these along each axis; the others are of a quarter, a half ... of it.
      out: JSON file to write.
    """

    trees: tuple[str, ...] = ("one", "twelve")
    against: Path | None = None
    turns: int = 2
    kernels: int = 72
    size: int = 256
    out: Path = Path("results/benchmarks/compile.json")


def shapes(tree: str, kernels: int, size: int) -> dict[str, tuple[int, int]]:
    """Shapes of the kernels of a tree, by name."""
    if tree == "one":
        return {f"layer_{i}": (size, size) for i in range(kernels)}
    sides = [size * part // 4 for part in (1, 2, 3, 4)]
    twelve = [(a, b) for a in sides for b in sides[:3]]
    blocks = 2 * kernels // len(twelve)
    return {f"block_{j}_{i}": shape for j in range(blocks) for i, shape in enumerate(twelve)}


def tasks(params: dict[str, jax.Array]) -> dict[str, Callable[[], Any]]:
    """What is compiled, by name."""

    def middle(x: jax.Array) -> jax.Array:
        return jnp.sort(x.ravel())[x.size // 2]

    def step(tx: optax.GradientTransformation) -> Callable[[], Any]:
        def update(params: Any, state: Any) -> Any:
            updates, state = tx.update(params, state, params)  # as if they were gradients
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        return lambda: jax.jit(update, donate_argnums=(0, 1)).lower(params, state).compile()

    adam = optax.adam(1e-3)
    rising = jp.schedules.cubic(0.9, begin=100, end=1000, every=100)
    return {
        "sort": lambda: jax.jit(lambda p: jax.tree.map(middle, p))(params),
        "find_masks": lambda: jp.find_masks(params, 0.5),
        "find_masks, across": lambda: jp.find_masks(params, 0.5, scope=jp.scopes.across),
        "adam": step(adam),
        "prune": step(jp.prune(adam, schedule=rising)),
    }


def report(tree: str, kernels: str, size: str, turns: str) -> None:
    """Print the least CPU seconds of each task, each from empty caches, as JSON."""
    jax.config.update("jax_enable_compilation_cache", False)
    each = shapes(tree, int(kernels), int(size))
    keys = jax.random.split(jax.random.key(0), len(each))
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, each.items(), strict=True)}
    jax.block_until_ready(params)
    seconds: dict[str, float] = {}
    for _ in range(int(turns)):
        for name, task in tasks(params).items():
            jax.clear_caches()
            start = time.process_time()
            jax.block_until_ready(task())
            taken = time.process_time() - start
            seconds[name] = min(taken, seconds.get(name, taken))
    print(json.dumps(seconds))


def measure(checkout: Path, tree: str, config: Config) -> dict[str, float]:
    """Seconds by task, of the library of a checkout, in a process of its own."""
    settings = (config.kernels, config.size, config.turns)
    words = map(str, (checkout.resolve(), HERE, tree, *settings))
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, *words], stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def compare(tree: str, config: Config) -> dict[str, Any]:
    """Compare compiling of a tree with the peers, and with the other checkout."""
    ours = measure(HERE, tree, config)
    theirs = measure(config.against, tree, config) if config.against else None
    over = {
        "find_masks": ours["find_masks"] / ours["sort"],
        "find_masks, across": ours["find_masks, across"] / ours["sort"],
        "prune, above adam": above(ours) / ours["adam"],
    }
    result = {"tree": tree, "seconds": ours, "over_peer": over}
    if theirs is None:
        return result
    over_other = {name: ours[name] / theirs[name] for name in over if name in theirs}
    over_other["prune, above adam"] = above(ours) / above(theirs)
    return result | {"other_seconds": theirs, "over_other": over_other}


def above(seconds: dict[str, float]) -> float:
    """What pruning adds to compiling a step."""
    return seconds["prune"] - seconds["adam"]


def main(config: Config) -> dict[str, Any]:
    if config.against and not (config.against / "jaxprune/__init__.py").exists():
        raise ValueError(  # else the installed library would be compared with itself
            f"There is no jaxprune in {config.against}. Clone the repository, check out what to "
            "compare with, and give the path of the clone."
        )
    cases = [compare(tree, config) for tree in config.trees]
    for case in cases:
        seconds = case["seconds"] | {"prune, above adam": above(case["seconds"])}
        sizes = list(shapes(case["tree"], config.kernels, config.size).values())
        peers = dict.fromkeys(case["over_peer"], "sort") | {"prune, above adam": "adam"}
        print_table(
            f"Compiling for {len(sizes)} kernels of {len(set(sizes))} shapes (CPU seconds)",
            ["", "seconds", "over", "ratio", f"over {config.against or 'another checkout'}"],
            [
                [
                    name,
                    f"{seconds[name]:.2f}",
                    f"{peers[name]}, {seconds[peers[name]]:.2f}",
                    f"{ratio:.2f}",
                    f"{case['over_other'][name]:.3f}" if "over_other" in case else "",
                ]
                for name, ratio in case["over_peer"].items()
            ],
        )
    settings = {name: getattr(config, name) for name in ("kernels", "size", "turns")}
    result = {"machine": machine(), "config": settings, "cases": cases}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
