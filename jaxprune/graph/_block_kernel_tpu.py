"""The product with the blocks that are left of a matrix as a kernel for TPUs."""

# A grid of row tiles and columns of blocks. A tile of x stays in fast memory for all columns; the
# rows of blocks that a column has kept are read from it by their indices, which come ahead of the
# kernel as scalars:
#
#     128 inputs a block: slices of whole lanes, a product each
#     fewer:              x is turned once a tile, so that a block is whole sublanes of x^T;
#                         those of a column are laid one below the other, for one product
#
# A step gives 128 lanes of results or more: columns of 64 go two or four a step.

import functools

import jax
import jax.numpy as jnp
from jax import lax

LANES = 128
_SUBLANES = 16  # of a tile of bfloat16
_BYTES = 1 << 22  # of a tile of x; of the blocks of a step a quarter: of both there are two
_UNROLLED = 256  # blocks that a step reads one after the other


def row_tile(rows: int, inputs: int) -> int:
    """Rows of x that a step works on, 0 if no tile fits."""
    fits = (n for n in (512, 256, 128) if rows % n == 0 and 2 * n * inputs <= _BYTES)
    return next(fits, 0) if rows else 0


def takes(x: jax.Array, blocks: jax.Array) -> bool:
    """Whether the kernel is made for such sizes and numbers.

    Args:
      x: `[rows, inputs]`.
      blocks: `[columns, kept, bi, bo]`.
    """
    columns, kept, bi, bo = blocks.shape
    rows, inputs = x.shape
    if x.dtype != jnp.bfloat16 or blocks.dtype != jnp.bfloat16 or not isinstance(rows, int):
        return False
    at_once = columns_at_once(columns, bi, bo)
    # Columns narrower than lanes are laid anew for each call if their blocks are taller than wide.
    lanes = bo % LANES == 0 or (bo == LANES // 2 and bi <= bo and at_once > 1)
    inside = bi % LANES == 0 or (LANES % bi == 0 and bi % _SUBLANES == 0)
    small = at_once * kept <= _UNROLLED and 8 * at_once * kept * bi * bo <= _BYTES
    whole = inputs % LANES == 0 and row_tile(rows, inputs) * kept > 0
    return lanes and inside and small and whole


def columns_at_once(columns: int, bi: int, bo: int) -> int:
    """Columns of blocks that a step works on."""
    widths = (LANES,) if bi % LANES == 0 else (2 * LANES, LANES)
    return next((n // bo for n in widths if n >= bo and columns % (n // bo) == 0), 1)


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
    from jax.experimental.pallas import tpu as pltpu

    columns, kept, bi, bo = blocks.shape
    rows, inputs = x.shape
    tile, at_once = row_tile(rows, inputs), columns_at_once(columns, bi, bo)
    straight = bi % LANES == 0 and at_once == 1
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(rows // tile, columns // at_once),
        in_specs=[
            pl.BlockSpec((tile, inputs), lambda r, c, _: (r, 0)),
            pl.BlockSpec((at_once, kept * bi, bo), lambda r, c, _: (c, 0, 0)),
        ],
        out_specs=pl.BlockSpec((tile, at_once * bo), lambda r, c, _: (r, c)),
        scratch_shapes=[] if straight else [pltpu.VMEM((inputs, tile), x.dtype)],
    )
    return pl.pallas_call(
        functools.partial(_straight if straight else _turned, kept=kept, bi=bi),
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct((rows, columns * bo), dtype or x.dtype),
        interpret=interpret,
    )(index.reshape(-1).astype(jnp.int32), x, blocks.reshape(columns, kept * bi, bo))


def _straight(index, x, blocks, y, *, kept: int, bi: int) -> None:  # type: ignore[no-untyped-def]
    """A column: one product a kept block."""
    from jax.experimental import pallas as pl

    first = pl.program_id(1) * kept
    total = jnp.zeros(y.shape, jnp.float32)
    for k in range(kept):
        start = pl.multiple_of(index[first + k] * bi, bi)
        block = blocks[0, k * bi : (k + 1) * bi, :]
        total += jnp.dot(x[:, pl.ds(start, bi)], block, preferred_element_type=jnp.float32)
    y[...] = total.astype(y.dtype)


def _turned(index, x, blocks, y, x_t, *, kept: int, bi: int) -> None:  # type: ignore[no-untyped-def]
    """Columns: one product each with all that it has kept of x^T."""
    from jax.experimental import pallas as pl

    at_once = blocks.shape[0]
    first = pl.program_id(1) * at_once * kept

    @pl.when(pl.program_id(1) == 0)
    def turn() -> None:
        def part(i: jax.Array, _: None) -> None:
            start = pl.multiple_of(i * LANES, LANES)
            x_t[pl.ds(start, LANES), :] = x[:, pl.ds(start, LANES)].T

        lax.fori_loop(0, x.shape[1] // LANES, part, None)

    def column(c: int) -> jax.Array:
        starts = (index[first + c * kept + k] * bi for k in range(kept))
        slabs = [x_t[pl.ds(pl.multiple_of(start, bi), bi), :] for start in starts]
        # Inputs lie on the first axis of both: y^T, which is turned once it is small.
        return lax.dot_general(
            blocks[c],
            jnp.concatenate(slabs),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    y[...] = jnp.concatenate([column(c) for c in range(at_once)]).T.astype(y.dtype)
