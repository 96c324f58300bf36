"""Size and time of a sparse model on disk, against what one would write instead.

    python -m benchmarks.checkpoint

A pruned network of float32 is saved and loaded by ``jp.checkpoint`` (kept values, bits, checksums),
by ``np.savez_compressed``, and dense by safetensors and by orbax. All get the same JAX arrays, and
all give JAX arrays back; the masks of ours come on top. Contestants take turns in one process, on
a warm file system.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jaxprune as jp
from benchmarks.common import Task, interleave, machine, paired_ratio, print_table, write_json
from experiments import need

Save = Callable[[Path, dict[str, jax.Array]], None]
Load = Callable[[Path, dict[str, jax.Array]], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      sparsities: fractions of the weights that are zero.
      weights: of all layers together.
      layers: square kernels that share the weights.
      turns: of every contestant.
      seed: of weights and masks.
      out: JSON file to write.
    """

    sparsities: tuple[float, ...] = (0.5, 0.9, 0.99)
    weights: int = 4_000_000
    layers: int = 4
    turns: int = 7
    seed: int = 0
    out: Path = Path("results/benchmarks/checkpoint.json")


def contestants(masks: dict[str, jax.Array]) -> dict[str, tuple[Save, Load]]:
    """Ways to save params under a path, and to load params like some."""
    need("checkpoint", "orbax", "safetensors")
    import orbax.checkpoint as ocp
    import safetensors.numpy

    orbax = ocp.StandardCheckpointer()

    def save_orbax(path: Path, params: dict[str, jax.Array]) -> None:
        orbax.save(path, params, force=True)
        orbax.wait_until_finished()

    def load_npz(path: Path, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with np.load(f"{path}.npz") as file:
            return {name: jnp.array(file[name]) for name in like}

    return {
        "jp.checkpoint": (
            lambda path, params: jp.checkpoint.save(path, params, masks),
            lambda path, like: jp.checkpoint.load(path, like)[0],
        ),
        "np.savez_compressed": (
            lambda path, params: np.savez_compressed(path, **params),
            load_npz,
        ),
        "safetensors, dense": (
            lambda path, params: safetensors.numpy.save_file(
                {name: np.asarray(p) for name, p in params.items()}, path
            ),
            lambda path, like: jax.tree.map(jnp.array, safetensors.numpy.load_file(path)),
        ),
        "orbax, dense": (save_orbax, orbax.restore),
    }


def sparse(config: Config, sparsity: float) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Params of which a fraction is zero, and their masks."""
    size = round((config.weights / config.layers) ** 0.5)
    rng = np.random.default_rng(config.seed)
    params = {
        f"layer_{i}": jnp.asarray(rng.normal(size=(size, size)), jnp.float32)
        for i in range(config.layers)
    }
    masks = jp.find_masks(params, sparsity)
    return jp.apply_masks(params, masks), masks


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(config: Config, sparsity: float, folder: Path) -> dict[str, Any]:
    """Compare sizes and times of all contestants at one sparsity with those of ours."""
    params, masks = sparse(config, sparsity)
    ways = contestants(masks)
    paths = {name: folder / f"{sparsity}" / str(i) / "model" for i, name in enumerate(ways)}
    for name, (save, load) in ways.items():
        paths[name].parent.mkdir(parents=True)
        save(paths[name], params)
        loaded = load(paths[name], params)
        if not all(np.array_equal(loaded[key], params[key]) for key in params):
            raise RuntimeError(f"`{name}` does not give back what it got.")
    sizes = {name: size_of(path.parent) for name, path in paths.items()}
    times = {
        kind: interleave(_tasks(kind, ways, paths, params), dict.fromkeys(ways, config.turns))
        for kind in ("save", "load")
    }
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.size for mask in masks.values())
    return {
        "sparsity": sparsity,
        "bytes over kept * 4 + n / 8": sizes["jp.checkpoint"] / (4 * kept + total / 8),
        "size_over_ours": {name: size / sizes["jp.checkpoint"] for name, size in sizes.items()},
        **{
            f"{kind}_over_ours": {
                name: paired_ratio(turns[name], turns["jp.checkpoint"], seed=config.seed)
                for name in ways
            }
            for kind, turns in times.items()
        },
    }


def _tasks(
    kind: str,
    ways: dict[str, tuple[Save, Load]],
    paths: dict[str, Path],
    params: dict[str, jax.Array],
) -> dict[str, Task]:
    """One save or load of every contestant."""

    def task(name: str) -> Task:
        save, load = ways[name]
        if kind == "save":
            return lambda: save(paths[name], params)
        return lambda: jax.block_until_ready(load(paths[name], params))

    return {name: task(name) for name in ways}


def main(config: Config) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cases = [measure(config, s, Path(folder)) for s in config.sparsities]
    rows = [
        [
            f"{case['sparsity']:.0%}",
            name,
            f"{case['size_over_ours'][name]:.2f}",
            *(
                f"{r['median']:.2f} [{r['low']:.2f}, {r['high']:.2f}]"
                for r in (case["save_over_ours"][name], case["load_over_ours"][name])
            ),
        ]
        for case in cases
        for name in case["size_over_ours"]
    ]
    print_table(
        f"{config.weights:,} weights in {config.layers} layers, over jp.checkpoint: median of "
        f"{config.turns} turns [95 % interval]",
        ["sparsity", "written by", "size", "time to save", "time to load"],
        rows,
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, "cases": cases}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
