"""Time the exact top-k of the library against sorting, ``lax.top_k`` and ``np.partition``.

    python -m benchmarks.selection --sizes 1000000 25000000 --sparsity 0.9

Every contestant makes the same thing from ready float32 scores, the bool mask of what stays; the
bare thresholds of the peers are timed beside it. All take turns in one process, and masks are
compared before any clock runs.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

import jaxprune as jp
from benchmarks.common import interleave, machine, print_table, write_json


def normal(key: jax.Array, n: int) -> jax.Array:
    """Magnitudes of normal weights: what pruning a fresh network sees."""
    return jnp.abs(jax.random.normal(key, (n,)))


def uniform(key: jax.Array, n: int) -> jax.Array:
    return jax.random.uniform(key, (n,))


def heavy_tailed(key: jax.Array, n: int) -> jax.Array:
    """Magnitudes of Cauchy numbers: over ten decades."""
    return jnp.abs(jax.random.cauchy(key, (n,)))


def half_zeros(key: jax.Array, n: int) -> jax.Array:
    """Normal magnitudes, of which every second is zero: what an earlier pruning leaves."""
    return normal(key, n) * (jnp.arange(n) % 2)


def constant(key: jax.Array, n: int) -> jax.Array:
    """Nothing but ties."""
    del key
    return jnp.ones(n)


def bfloat16(key: jax.Array, n: int) -> jax.Array:
    """Normal magnitudes rounded to bfloat16: a few thousand values, each a thousandfold."""
    return lax.reduce_precision(normal(key, n), exponent_bits=8, mantissa_bits=7)


DISTRIBUTIONS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "normal": normal,
    "uniform": uniform,
    "heavy tails": heavy_tailed,
    "half zeros": half_zeros,
    "constant": constant,
    "bfloat16": bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      sizes: scores to rank.
      sparsity: fraction to remove.
      distributions: names of what the scores are drawn from.
      repeats: turns of every contestant.
      slow_repeats: turns of those that need longer than ``slow_seconds`` for one.
      slow_seconds: where slow begins.
      seed: of the scores.
      out: JSON file to write.
    """

    sizes: tuple[int, ...] = (1_000_000, 25_000_000)
    sparsity: float = 0.9
    distributions: tuple[str, ...] = tuple(DISTRIBUTIONS)
    repeats: int = 15
    slow_repeats: int = 1
    slow_seconds: float = 1.0
    seed: int = 0
    out: Path = Path("results/benchmarks/selection.json")


def ours(sparsity: float) -> dict[str, Any]:
    """The library's ways to a mask."""

    def per_leaf(x: jax.Array) -> jax.Array:
        return jp.scopes.per_leaf({"w": x}, sparsity)["w"]

    def find_masks(x: jax.Array) -> jax.Array:
        return jp.find_masks({"w": x[None]}, sparsity)["w"][0]

    return {"per_leaf": jax.jit(per_leaf), "find_masks": jax.jit(find_masks)}


def peers(n: int, sparsity: float) -> dict[str, Any]:
    """What else finds the threshold, and the mask that a user would make from it."""
    cut = round(sparsity * n)  # position of the threshold in ascending order
    keep = n - cut

    def mark(kept: jax.Array) -> jax.Array:
        return jnp.zeros(n, bool).at[kept].set(True, unique_indices=True)

    def argsort_threshold(x: jax.Array) -> jax.Array:
        return x[jnp.argsort(x)[cut]]

    def sort_threshold(x: jax.Array) -> jax.Array:
        return jnp.sort(x)[cut]

    def top_k_threshold(x: jax.Array) -> jax.Array:
        return lax.top_k(x, keep)[0][-1]

    def partition_threshold(x: jax.Array) -> np.ndarray:
        return np.partition(np.asarray(x), cut)[cut]

    return {
        "argsort, threshold": jax.jit(argsort_threshold),
        "argsort": jax.jit(lambda x: mark(jnp.argsort(x, descending=True)[:keep])),
        "sort, threshold": jax.jit(sort_threshold),
        "sort": jax.jit(lambda x: x >= sort_threshold(x)),
        "top_k, threshold": jax.jit(top_k_threshold),
        "top_k": jax.jit(lambda x: mark(lax.top_k(x, keep)[1])),
        "np.partition, threshold": partition_threshold,
        "np.partition": lambda x: np.asarray(x) >= partition_threshold(x),
    }


EXACT = ("per_leaf", "find_masks", "argsort", "top_k")  # as many as asked for, even among ties


def check(scores: np.ndarray, results: dict[str, np.ndarray], sparsity: float) -> None:
    """Refuse to time contestants that do not agree.

    The exact ones have to give one and the same mask; those by threshold may keep all ties; every
    threshold has to be that of NumPy, which the lowest kept score is, too.
    """
    keep = len(scores) - round(sparsity * len(scores))
    threshold = results["np.partition, threshold"]
    reached = scores >= threshold
    for name, result in results.items():
        if name in EXACT:
            right = result.sum() == keep and scores[result].min() == threshold
            right = right and np.array_equal(result, results["per_leaf"])
        elif name.endswith("threshold"):
            right = result == threshold
        else:
            right = np.array_equal(result, reached)
        if not right:
            raise RuntimeError(
                f"`{name}` does not agree with `np.partition` on the {keep} largest of "
                f"{len(scores)} scores; timing it would compare different things."
            )


def measure(config: Config, n: int, distribution: str) -> dict[str, Any]:
    """Compare all contestants on one array of scores."""
    scores = jax.block_until_ready(DISTRIBUTIONS[distribution](jax.random.key(config.seed), n))
    contestants = {
        name: select if name.startswith("np.") else select.lower(scores).compile()
        for name, select in (ours(config.sparsity) | peers(n, config.sparsity)).items()
    }
    results, repeats = {}, {}
    for name, select in contestants.items():
        start = time.perf_counter()
        results[name] = np.asarray(select(scores))
        slow = time.perf_counter() - start > config.slow_seconds
        repeats[name] = config.slow_repeats if slow else config.repeats
    check(np.asarray(scores), results, config.sparsity)
    del results
    memory = {
        name: select.memory_analysis().temp_size_in_bytes / scores.nbytes
        for name, select in contestants.items()
        if not name.startswith("np.")
    }
    tasks = {
        name: lambda select=select: jax.block_until_ready(select(scores))
        for name, select in contestants.items()
    }
    seconds = interleave(tasks, repeats)
    base = float(np.median(seconds["per_leaf"]))
    return {
        "size": n,
        "distribution": distribution,
        "seconds": {
            name: {"median": float(np.median(s)), "minimum": min(s), "turns": len(s)}
            for name, s in seconds.items()
        },
        "time_over_ours": {name: float(np.median(s)) / base for name, s in seconds.items()},
        "minimum_over_ours": {
            name: min(s) / min(seconds["per_leaf"]) for name, s in seconds.items()
        },
        "temporary_memory_in_scores": memory,
    }


def main(config: Config) -> dict[str, Any]:
    cases = []
    for n in config.sizes:
        for distribution in config.distributions:
            cases.append(measure(config, n, distribution))
            ratios = cases[-1]["time_over_ours"].items()
            print(f"{n:,} {distribution}:", *(f"{k} {v:.2f};" for k, v in ratios), flush=True)
    for n in config.sizes:
        mine = [case for case in cases if case["size"] == n]
        names = list(mine[0]["time_over_ours"])
        rows = [
            [
                name,
                *(f"{case['time_over_ours'][name]:.2f}" for case in mine),
                _memory(mine[0]["temporary_memory_in_scores"].get(name)),
            ]
            for name in names
        ]
        milliseconds = [f"{1e3 * c['seconds']['per_leaf']['median']:.1f}" for c in mine]
        rows.append(["per_leaf, milliseconds", *milliseconds, ""])
        print_table(
            f"Time over ours (`per_leaf`), {n:,} float32 scores, sparsity {config.sparsity}",
            ["contestant", *(case["distribution"] for case in mine), "extra memory"],
            rows,
        )
    print("Extra memory is the compiled program's temporary buffer, in units of the scores.")
    result = {"machine": machine(), "config": _plain(config), "cases": cases}
    write_json(config.out, result)
    return result


def _memory(scores: float | None) -> str:
    return "" if scores is None else f"{scores:.2f}"


def _plain(config: Config) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    return settings


if __name__ == "__main__":
    main(tyro.cli(Config))
