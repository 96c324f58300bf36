"""The product with the blocks that are left of a matrix as a kernel for NVIDIA GPUs."""

# A program works on a tile of rows and a column of blocks: it goes through what the column has
# kept, 64 inputs a step, and reads those of x where the index says. Nothing that is gathered is
# ever written. Narrow blocks go four a step.
#
#     blocks of 128 inputs   two steps each
#     blocks of 16 inputs    a step reads x at [rows, 4, 16], and folds it to [rows, 64]

import functools

import jax
import jax.numpy as jnp
from jax import lax

_STEP = 64  # inputs; tiles of three steps are below the 96 KiB that every GPU has
_STAGES = 3


def takes(x: jax.Array, blocks: jax.Array) -> bool:
    """Whether the kernel is made for such sizes and numbers.

    Args:
      x: `[rows, inputs]`.
      blocks: `[columns, kept, bi, bo]`.
    """
    _, kept, bi, bo = blocks.shape
    rows = x.shape[0]
    if x.dtype != jnp.bfloat16 or blocks.dtype != jnp.bfloat16 or not isinstance(rows, int):
        return False
    inside = bi % _STEP == 0 or bi == 32 or (bi == 16 and kept % 4 == 0)
    return inside and bo in (64, 128) and rows % 64 == 0 and rows * kept > 0


def kernel_product(
    x: jax.Array,
    blocks: jax.Array,
    index: jax.Array,
    dtype: jax.typing.DTypeLike | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply data with the blocks that are left of a matrix; sums are float32.

    Args:
      x: `[rows, inputs]`, bfloat16.
      blocks: `[columns, kept, bi, bo]`, bfloat16, of sizes that the kernel takes.
      index: integers `[columns, kept]`, each below ``inputs / bi``.
      dtype: of the results; bfloat16 if None.
      interpret: run it step by step on any device.

    Returns:
      `[rows, columns * bo]`.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    columns, kept, bi, bo = blocks.shape
    rows = x.shape[0]
    tile = 128 if rows % 128 == 0 and bi > 16 else 64
    params = triton.CompilerParams(num_warps=tile // 16, num_stages=_STAGES)
    return pl.pallas_call(
        functools.partial(_column, tile=tile, kept=kept, bi=bi, bo=bo),
        grid=(columns, rows // tile),
        out_shape=jax.ShapeDtypeStruct((rows, columns * bo), dtype or x.dtype),
        interpret=interpret,
        compiler_params=None if interpret else params,
    )(index.astype(jnp.int32), x, blocks.reshape(columns, kept * bi, bo))


def _column(index, x, blocks, y, *, tile: int, kept: int, bi: int, bo: int) -> None:  # type: ignore[no-untyped-def]
    """Rows of a tile times a column of blocks."""
    from jax.experimental import pallas as pl

    column, first = pl.program_id(0), pl.program_id(1) * tile
    step = _STEP if bi == 16 else min(bi, _STEP)
    steps = jnp.int32(max(1, bi // step))  # of a block
    rows, lanes = first + jnp.arange(tile), jnp.arange(16)

    def gathered(s: jax.Array) -> jax.Array:
        if bi > 16:
            start = index[column, lax.div(s, steps)] * bi + lax.rem(s, steps) * step
            return x[pl.ds(first, tile), pl.ds(start, step)]
        which = index[column, pl.ds(s * 4, 4)]
        at = which[:, None] * 16 + lanes[None, :]
        return x[rows[:, None, None], at[None]].reshape(tile, step)

    def add(s: jax.Array, total: jax.Array) -> jax.Array:
        block = blocks[column, pl.ds(s * step, step), :]
        return total + jnp.dot(gathered(s), block, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, kept * bi // step, add, jnp.zeros((tile, bo), jnp.float32))
    y[pl.ds(first, tile), pl.ds(column * bo, bo)] = total.astype(y.dtype)
