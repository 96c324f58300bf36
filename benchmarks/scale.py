"""Measure how a global ranking grows: with the weights, with the leaves, and over devices.

    python -m benchmarks.scale

Every tree is bfloat16 and is ranked by ``find_masks(params, 0.9, scope=jp.scopes.across)``. Each
tree has a process of its own, whose peak of resident memory is compared with the bytes of the
params. One tree is ranked on one device and cut over eight virtual ones, in turns, on the same
cores.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from benchmarks.common import interleave, machine, paired_ratio, print_table, write_json

DEVICES = 8
WIDTH = 4096  # of every leaf, so that all have windows to count in
SPARSITY = 0.9


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      weights: sizes of trees of ``leaves`` leaves.
      leaves: how many leaves those trees have.
      splits: numbers of leaves that a tree of ``split_weights`` is split into.
      split_weights: its size.
      sharded_weights: size of the tree that is cut over devices; of eight leaves.
      repeats: turns of every measurement.
      out: JSON file to write.
    """

    weights: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9)
    leaves: int = 200
    splits: tuple[int, ...] = (1, 10, 50, 200)
    split_weights: int = 10**8
    sharded_weights: int = 25 * 2**20
    repeats: int = 5
    out: Path = Path("results/benchmarks/scale.json")


@jax.jit
def find(params: Any) -> Any:
    """Rank all leaves together."""
    return jp.find_masks(params, SPARSITY, scope=jp.scopes.across)


def tree(weights: int, leaves: int) -> dict[str, jax.Array]:
    """Draw normal weights, in leaves of equal size."""
    shape = (max(weights // leaves // WIDTH, 1), min(WIDTH, weights // leaves))
    draw = jax.jit(lambda i: jax.random.normal(jax.random.key(i), shape, jnp.bfloat16))
    return {f"leaf_{i:03d}": draw(i) for i in range(leaves)}


def resident_bytes(what: str) -> int:
    """Read from Linux the resident memory of this process, now (VmRSS) or at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(what))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Let the peak of resident memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def grown(weights: int, leaves: int, repeats: int) -> dict[str, Any]:
    """Rank one tree in this process."""
    params = jax.block_until_ready(tree(weights, leaves))
    bytes_ = sum(leaf.nbytes for leaf in params.values())
    start = time.process_time()
    compiled = find.lower(params).compile()
    compile_seconds = time.process_time() - start
    forget_peak()
    before = resident_bytes("VmRSS")
    masks = jax.block_until_ready(compiled(params))
    extra = resident_bytes("VmHWM") - before
    kept = sum(int(jnp.sum(mask, dtype=jnp.int32)) for mask in masks.values())
    n = sum(leaf.size for leaf in params.values())
    if kept != n - round(SPARSITY * n):
        raise RuntimeError(f"{kept} of {n} weights were kept, not {n - round(SPARSITY * n)}.")
    del masks
    seconds = interleave(
        {"find": lambda: jax.block_until_ready(compiled(params))},
        {"find": repeats},
        clock=time.process_time,
    )["find"]
    analysis = compiled.memory_analysis()
    return {
        "weights": n,
        "leaves": leaves,
        "compile_cpu_seconds": compile_seconds,
        "cpu_seconds": float(np.median(seconds)),
        "peak_over_params": extra / bytes_,
        "buffers_over_params": (analysis.temp_size_in_bytes + analysis.output_size_in_bytes)
        / bytes_,
    }


def sharded(weights: int, repeats: int) -> dict[str, Any]:
    """Rank one tree on one device and cut over eight, in turns; wall seconds."""
    alone = tree(weights, DEVICES)
    mesh = jax.make_mesh((DEVICES,), ("shards",), axis_types=(AxisType.Auto,))
    places = {"rows": P("shards"), "columns": P(None, "shards")}
    trees = {"one device": alone} | {
        name: jax.device_put(alone, NamedSharding(mesh, spec)) for name, spec in places.items()
    }
    want = jax.tree.map(np.asarray, find(alone))
    for name, params in trees.items():
        same = jax.tree.map(np.array_equal, find(params), want)
        if not all(same.values()):
            raise RuntimeError(f"The masks of the tree cut by {name} are not those of one device.")
    tasks = {
        name: lambda params=params: jax.block_until_ready(find(params))
        for name, params in trees.items()
    }
    seconds = interleave(tasks, dict.fromkeys(tasks, max(repeats, 9)))
    return {
        "weights": weights,
        "over_one_device": {
            name: paired_ratio(seconds[name], seconds["one device"], seed=0) for name in places
        },
    }


def in_process(function: str, *numbers: int, devices: int = 1) -> dict[str, Any]:
    """Call a function of this module in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale", function, *map(str, numbers)],
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(config: Config) -> dict[str, Any]:
    trees = [(n, config.leaves) for n in config.weights]
    trees += [(config.split_weights, leaves) for leaves in config.splits]
    rows = []
    for weights, leaves in dict.fromkeys(trees):
        rows.append(in_process("grown", weights, leaves, config.repeats))
        print(json.dumps(rows[-1]), flush=True)
    over = in_process("sharded", config.sharded_weights, config.repeats, devices=DEVICES)
    print_table(
        f"`find_masks(params, {SPARSITY}, scope=across)` of bfloat16 weights",
        ["weights", "leaves", "ns a weight (CPU)", "compile, s a leaf (CPU)", "peak over params"],
        [
            [
                f"{row['weights']:,}",
                str(row["leaves"]),
                f"{1e9 * row['cpu_seconds'] / row['weights']:.2f}",
                f"{row['compile_cpu_seconds'] / row['leaves']:.3f}",
                f"{row['peak_over_params']:.2f} (buffers {row['buffers_over_params']:.2f})",
            ]
            for row in rows
        ],
    )
    print_table(
        f"Eight virtual devices over one, {over['weights']:,} weights",
        ["cut by", "time over one device", "95 % interval"],
        [
            [name, f"{r['median']:.2f}", f"[{r['low']:.2f}, {r['high']:.2f}]"]
            for name, r in over["over_one_device"].items()
        ],
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, "trees": rows, "sharded": over}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    measurements = {"grown": grown, "sharded": sharded}
    if sys.argv[1:] and sys.argv[1] in measurements:  # a process started by the one below
        print(json.dumps(measurements[sys.argv[1]](*map(int, sys.argv[2:]))))
    else:
        main(tyro.cli(Config))
