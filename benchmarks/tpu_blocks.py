"""Ask the TPU compiler what a product with kept blocks costs, without a TPU.

    pip install -e '.[experiments,tpu-aot]'
    python -m benchmarks.tpu_blocks

Nothing runs: `libtpu` compiles the dense product, the product with blocks in plain XLA and the
kernel for one chip of a v5e, in bfloat16, and the figures are cycles by its own estimates. Of a
kernel there is no estimate, but a schedule: bundles of instructions, a cycle each, counted as often
as their loops run, and the first tile of x, which nothing hides, at the speed of the memory. Of the
gather in plain XLA there is neither, so that its figure is too low.
"""

import dataclasses
import functools
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh

from benchmarks import hlo
from benchmarks.common import machine, print_table, write_json
from benchmarks.tpu import ENVIRONMENT, cut, libtpu_version, topology_mesh
from jaxprune.graph import _block_product
from jaxprune.graph._block_kernel_tpu import LANES, columns_at_once, row_tile

TOPOLOGY = "v5e:2x2"
BYTES_A_CYCLE = 819 / 1.5  # GB/s of the memory, and GHz, of a v5e
LABEL = "final_bundles"  # the pass after which a schedule is written


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile.

    Attributes:
      rows: of the data.
      size: inputs of the matrix, which has as many outputs.
      sparsity: fraction of the blocks that is removed.
      blocks: inputs x outputs of a block.
      out: JSON file to write.
    """

    rows: tuple[int, ...] = (512, 256)
    size: int = 4096
    sparsity: float = 0.875
    blocks: tuple[str, ...] = ("128x128", "16x128", "64x64")
    out: Path = Path("results/benchmarks/tpu_blocks.json")


def measure(config: Config, rows: int, block: str, mesh: Mesh, dump: Path) -> dict[str, Any]:
    """Cycles of the dense product, of the plain one and of the kernel."""
    bi, bo = map(int, block.split("x"))
    size, columns = config.size, config.size // bo
    kept = round((1 - config.sparsity) * size / bi)
    x = cut((rows, size), jnp.bfloat16, mesh)
    blocks = cut((columns, kept, bi, bo), jnp.bfloat16, mesh)
    index = cut((columns, kept), jnp.int32, mesh)
    dense = cycles(compiled(jnp.matmul, x, cut((size, size), jnp.bfloat16, mesh)))
    plain = cycles(compiled(_block_product.block_product, x, blocks, index))
    with mock.patch.object(_block_product, "kernel_platform", lambda: "tpu"):
        # Another function than before, or jit gives what it has compiled.
        text = compiled(functools.partial(_block_product.block_product), x, blocks, index)
    tiles = rows // row_tile(rows, size)
    steps = tiles * (columns // columns_at_once(columns, bi, bo))
    found = schedule(text, dump)
    kernel = found[0] + found[1] * (steps + 1) + found[2] * tiles * (size // LANES)
    kernel += cycles(text) + 2 * row_tile(rows, size) * size / BYTES_A_CYCLE
    return {
        **{"rows": rows, "blocks": block, "dense": dense, "plain": plain, "kernel": kernel},
        "plain_over_dense": plain / dense,
        "kernel_over_dense": kernel / dense,
    }


def compiled(fn: Any, *args: jax.ShapeDtypeStruct) -> str:
    text = jax.jit(fn).lower(*args).compile().as_text()
    assert text is not None
    return text


def cycles(text: str) -> int:
    return hlo.cycles(hlo.parse(text))


def schedule(text: str, dump: Path) -> Counter[int]:
    """Bundles of the one kernel of a program, by the depth of their loops."""
    names = re.findall(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', text)
    if len(names) != 1:
        raise ValueError(f"The program has {len(names)} kernels, wanted one.")
    (*_, latest) = sorted(dump.glob(f"*-{names[0]}-*-{LABEL}.txt"))
    return hlo.bundles(latest.read_text())


def compile_all(config: Config, dump: Path) -> list[dict[str, Any]]:
    """Compile every case."""
    mesh = Mesh(topology_mesh(TOPOLOGY).devices[:1], ("data",))
    return [
        measure(config, rows, block, mesh, dump) for rows in config.rows for block in config.blocks
    ]


def main(config: Config) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT)  # before the first array, with which jax looks for devices
    jax.config.update("jax_platforms", "cpu")
    compiler = {"jax": jax.__version__, "libtpu": libtpu_version()}
    result: dict[str, Any] = {"machine": machine(), **compiler, "topology": TOPOLOGY}
    with tempfile.TemporaryDirectory() as folder:
        flags = {"dump_to": folder, "dump_llo_text": "true", "dump_llo_pass_label_regex": LABEL}
        given = " ".join(f"--xla_jf_{name}={value}" for name, value in flags.items())
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {given}"
        try:
            result["cases"] = compile_all(config, Path(folder))
        except RuntimeError as error:
            print(error)
            result["error"] = str(error)
        else:
            show(config, result["cases"])
    write_json(config.out, result)
    return result


def show(config: Config, cases: list[dict[str, Any]]) -> None:
    print_table(
        f"{config.size} x {config.size}, {config.sparsity:.2%} of the blocks removed, bfloat16",
        ["rows, blocks", "dense, cycles", "plain", "kernel", "plain / dense", "kernel / dense"],
        [
            [
                f"{case['rows']}, {case['blocks']}",
                *(f"{case[name]:,.0f}" for name in ("dense", "plain", "kernel")),
                f"{case['plain_over_dense']:.3f}",
                f"{case['kernel_over_dense']:.3f}",
            ]
            for case in cases
        ],
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
