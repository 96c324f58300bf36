"""Products of data with a matrix of which some blocks are left, in plain XLA."""

# Of a matrix `[inputs, outputs]` in blocks `[bi, bo]` each column of blocks has kept as many:
#
#     blocks [columns, kept, bi, bo]    index [columns, kept]: the row of blocks that each one is of
#     x [rows, inputs]  ->  gathered [columns, rows, kept * bi]  times  [columns, kept * bi, bo]
#
# A gather of input blocks and one batched product: the arithmetic of what is left and no more. What
# is gathered is `columns * kept * bi` numbers a row, and a CPU slows down once that is more than
# its caches hold, so that there a few columns at a time are done. Derivatives are those that JAX
# finds: with respect to the blocks one more batched product, with respect to x a scatter.
#
# On one TPU or NVIDIA GPU the way forward is a kernel where it takes such sizes; derivatives are
# those above, but that a GPU, to which a scatter is dear, multiplies with the whole transpose.

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxprune._tree import wide, wide_dtype
from jaxprune.graph import _block_kernel_gpu, _block_kernel_tpu

Precision: TypeAlias = lax.PrecisionLike

# Gathered numbers above which parts of half a million to a million are faster on a CPU.
_AT_ONCE = 1 << 20
_AS_IT_IS = (None, lax.Precision.DEFAULT)


class Numerics(NamedTuple):
    """How a product of matrices is computed.

    Attributes:
      precision: as `lax.dot_general` takes it.
      dtype: of the results; None where the operands say it.
    """

    precision: Precision = None
    dtype: jax.typing.DTypeLike | None = None


def block_product(
    x: jax.Array, blocks: jax.Array, index: jax.Array, numerics: Numerics = Numerics()
) -> jax.Array:
    """Multiply data with the blocks that are left of a matrix.

    Args:
      x: `[*groups, rows, inputs]`.
      blocks: `[*groups, columns, kept, bi, bo]`, where ``bi`` divides the inputs.
      index: integers `[*groups, columns, kept]`, each below ``inputs / bi``.
      numerics: precision and dtype of the product.

    Returns:
      `[*groups, rows, columns * bo]`: what ``x`` times the whole matrix is, with zeros for the
      blocks that are gone.
    """
    if x.ndim > 2:
        one = lambda x, b, i: block_product(x, b, i, numerics)  # noqa: E731
        return jax.vmap(one)(x, blocks, index)
    parts = _parts(x.shape[0], blocks.shape)
    whole = functools.partial(_plain, numerics=numerics)
    ways: dict[str, Callable[..., jax.Array]] = {}
    if parts > 1:
        ways["cpu"] = functools.partial(_plain, numerics=numerics, parts=parts)
    platform = None if _varies(x, blocks) else kernel_platform()
    if platform and numerics.precision in _AS_IT_IS and _takes(platform, x, blocks):
        ways[platform] = lambda x, b, i: _in_kernel(x, b, i, _Kernel(platform, numerics.dtype))
    if not ways:
        return whole(x, blocks, index)
    return lax.platform_dependent(x, blocks, index, default=whole, **ways)


def kernel_platform() -> str | None:
    """The platform for which the program that is traced may hold kernels.

    It runs on one device, or is written for one inside of ``shard_map``, with ``check_vma=False``:
    no compiler cuts a kernel over several.
    """
    mesh = jax.sharding.get_abstract_mesh()
    by_hand = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    alone = by_hand or jax.device_count() == 1
    return {"tpu": "tpu", "gpu": "cuda"}.get(jax.default_backend()) if alone else None


def _varies(*arrays: jax.Array) -> bool:
    """Whether a ``shard_map`` checks where arrays differ, which nothing says of a kernel's."""
    types = [getattr(jax.typeof(a), "manual_axis_type", None) for a in arrays]
    return any(t is not None and t.varying for t in types)


def _takes(platform: str, x: jax.Array, blocks: jax.Array) -> bool:
    of = _block_kernel_tpu if platform == "tpu" else _block_kernel_gpu
    return of.takes(x, blocks)


class _Kernel(NamedTuple):
    """Which kernel, the dtype of its results, and whether it only runs step by step."""

    platform: str
    dtype: jax.typing.DTypeLike | None = None
    interpret: bool = False


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _in_kernel(x: jax.Array, blocks: jax.Array, index: jax.Array, kernel: _Kernel) -> jax.Array:
    """The kernel, whose derivatives are products in plain XLA."""
    of = _block_kernel_tpu if kernel.platform == "tpu" else _block_kernel_gpu
    return of.kernel_product(x, blocks, index, kernel.dtype, interpret=kernel.interpret)


@functools.partial(_in_kernel.defjvp, symbolic_zeros=True)
def _tangent(
    kernel: _Kernel,
    primals: tuple[jax.Array, jax.Array, jax.Array],
    tangents: tuple[jax.Array | SymbolicZero, ...],
) -> tuple[jax.Array, jax.Array]:
    x, blocks, index = primals
    of_x, of_blocks, _ = tangents
    numerics = Numerics(dtype=kernel.dtype)
    y = _in_kernel(x, blocks, index, kernel)
    moved = jnp.zeros_like(y)
    # Linear in x and in the blocks; what does not move is not multiplied.
    if not isinstance(of_x, SymbolicZero):
        product = _whole if kernel.platform == "cuda" else _plain
        moved += product(of_x, blocks, index, numerics=numerics)
    if not isinstance(of_blocks, SymbolicZero):
        moved += _plain(x, of_blocks, index, numerics=numerics)
    return y, moved


def _whole(x: jax.Array, blocks: jax.Array, index: jax.Array, *, numerics: Numerics) -> jax.Array:
    """A product with the whole matrix, zeros and all; ``x`` is `[rows, inputs]`."""
    columns, _, bi, bo = blocks.shape
    inputs = x.shape[1]
    whole = jnp.zeros((inputs // bi, columns, bi, bo), blocks.dtype)
    whole = whole.at[index, jnp.arange(columns)[:, None]].set(blocks, unique_indices=True)
    whole = whole.transpose(0, 2, 1, 3).reshape(inputs, columns * bo)
    return jnp.matmul(x, whole, preferred_element_type=numerics.dtype)


def _parts(rows: int, blocks: tuple[int, ...]) -> int:
    """In how many parts the columns are done on a CPU."""
    columns, kept, bi, _ = blocks
    if not isinstance(rows, int):  # an exported program for any number of rows
        return 1
    wanted = max(-(-rows * columns * kept * bi // _AT_ONCE), 1)
    return next((n for n in range(wanted, columns) if columns % n == 0), columns)


def _split(x: jax.Array, parts: int) -> jax.Array:
    """The first axis in parts: `[parts, n / parts, ...]`."""
    return x.reshape(parts, -1, *x.shape[1:])


def _plain(
    x: jax.Array, blocks: jax.Array, index: jax.Array, *, numerics: Numerics, parts: int = 1
) -> jax.Array:
    """A batched product, or one for each of some parts of the columns; ``x`` is `[rows, inputs]`.

    What is gathered is gathered again on the way back, rather than kept for all parts.
    """
    columns, kept, bi, bo = blocks.shape
    rows = x.shape[0]
    laid = x.reshape(rows, x.shape[1] // bi, bi).transpose(1, 0, 2)  # once, and not in each part
    laid = wide(laid) if parts > 1 else laid  # derivatives of all parts are added up

    def product(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        blocks, index = part
        gathered = _gathered(laid, index.reshape(-1)).astype(x.dtype)
        gathered = gathered.reshape(*index.shape, rows, bi).transpose(0, 2, 1, 3)
        gathered = gathered.reshape(len(index), rows, kept * bi)
        return _dot(gathered, blocks.reshape(len(index), kept * bi, bo), numerics)

    if parts == 1:
        y = product((blocks, index))
    else:
        y = lax.map(jax.checkpoint(product), (_split(blocks, parts), _split(index, parts)))
    return y.reshape(columns, rows, bo).transpose(1, 0, 2).reshape(rows, columns * bo)


@jax.custom_jvp
def _gathered(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of blocks `[blocks, rows, bi]` by their numbers."""
    return jnp.take(x, index, axis=0, mode="clip")  # they are in bounds


@_gathered.defjvp
def _gathered_tangent(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # On the way back this adds up what all columns say of an input: in float32, as products do, not
    # in the eight bits of bfloat16, where 256 + 1 is 256.
    (x, index), (moved, _) = primals, tangents
    return _gathered(x, index), _gathered(wide(moved), index).astype(x.dtype)


def transposed_product(
    x: jax.Array, blocks: jax.Array, index: jax.Array, inputs: int, numerics: Numerics = Numerics()
) -> jax.Array:
    """Multiply data with the transpose of such a matrix: blocks scatter what others gather.

    Args:
      x: `[*groups, rows, columns * bo]`.
      blocks: `[*groups, columns, kept, bi, bo]`.
      index: integers `[*groups, columns, kept]`.
      inputs: of the matrix.
      numerics: precision and dtype of the product.

    Returns:
      `[*groups, rows, inputs]`.
    """
    if x.ndim > 2:
        one = lambda x, b, i: transposed_product(x, b, i, inputs, numerics)  # noqa: E731
        return jax.vmap(one)(x, blocks, index)
    columns, kept, bi, bo = blocks.shape
    rows, parts = x.shape[0], _parts(x.shape[0], blocks.shape)
    laid = x.reshape(rows, columns, bo).transpose(1, 0, 2)

    def add(y: jax.Array, part: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, blocks, index = part
        wide = blocks.transpose(0, 3, 1, 2).reshape(len(x), bo, kept * bi)
        found = _dot(x, wide, numerics).reshape(len(x), rows, kept, bi)
        found = found.transpose(0, 2, 1, 3).reshape(len(x) * kept, rows, bi)
        return y.at[index.reshape(-1)].add(found, mode="promise_in_bounds"), None

    dtype = jnp.dtype(numerics.dtype or jnp.result_type(x, blocks))
    numerics = numerics._replace(dtype=wide_dtype(dtype))  # columns are added up, too
    nothing = jnp.zeros((inputs // bi, rows, bi), numerics.dtype)
    whole = lambda *each: add(nothing, each)[0]  # noqa: E731
    if parts == 1:
        y = whole(laid, blocks, index)
    else:

        def in_parts(*each: jax.Array) -> jax.Array:
            split = tuple(_split(a, parts) for a in each)
            # The first sum varies over the devices of a shard_map as all others do; zeros do not.
            first = whole(*(a[0] for a in split))
            return lax.scan(jax.checkpoint(add), first, tuple(a[1:] for a in split))[0]

        y = lax.platform_dependent(laid, blocks, index, cpu=in_parts, default=whole)
    return y.transpose(1, 0, 2).reshape(rows, inputs).astype(dtype)


def _dot(a: jax.Array, b: jax.Array, numerics: Numerics) -> jax.Array:
    """`[groups, rows, inputs]` times `[groups, inputs, outputs]`."""
    return lax.dot_general(
        a,
        b,
        (((2,), (1,)), ((0,), (0,))),
        precision=numerics.precision,
        preferred_element_type=numerics.dtype,
    )
