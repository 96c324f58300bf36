"""Masks as bits: what shares one, along which axis they lie, how bools become bytes and back."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._mesh import even_shards, is_explicit

Shape = tuple[int, ...]
Block = tuple[int, ...]  # how many weights share a bit along each axis; () where none do


def shape_of_units(shape: Shape, block: Block) -> Shape:
    """How many bits a mask has along each axis: `[10, 24]` in blocks of ``(4, 8)`` has `[3, 3]`."""
    if not block:
        return shape
    return tuple(-(-n // size) for n, size in zip(shape, block, strict=True))


def packed_axis(shape: Shape) -> int:
    """Choose the axis along which bits of a shape are packed, counted from the end.

    It is the longest axis but the last, the one nearest to the last among equals. Another one, the
    last too, is taken only where the bytes are fewer by more than a ninth: ``[784, 300]`` is packed
    along -2, ``[4096, 32, 128]`` along -3, ``[1, 300]`` and ``[3, 3, 1, 32]`` along -1.
    """
    # On a TPU the last axis are the lanes, along which XLA writes repeated bytes out: 16 temporary
    # bytes a weight and 4 times the cycles of an Adam step, where another axis costs nothing. And
    # the longer an axis, the more shards it has of whole bytes.
    axes = range(-len(shape), -1)
    order = *sorted(axes, key=lambda axis: (-shape[axis], -axis)), -1
    sizes = [math.prod(packed_shape(shape, axis)) for axis in order]
    return next(a for a, size in zip(order, sizes, strict=True) if 8 * size <= 9 * min(sizes))


def packed_shape(shape: Shape, axis: int) -> Shape:
    """The shape of the bits of a mask; those of a scalar are `[1]`."""
    sizes = list(shape or (1,))
    sizes[axis] = -(-sizes[axis] // 8)
    return tuple(sizes)


def axis_of(bits: Shape, shape: Shape, block: Block = ()) -> int:
    """Say along which axis bits are packed: that of today, or the last, as all were once.

    Where the shapes of both are the same their bits are too: either it is one axis, or both have
    size 1 (or 0), and the one bit of a byte is the highest.

    Args:
      bits: shape of the bits `[..., packed]`, with the axes of a stack in front.
      shape: shape of the mask.
      block: how many weights share a bit along each axis.

    Raises:
      ValueError: bits of this shape hold no mask of that shape.
    """
    mine, units = bits[len(stack_of(bits, shape)) :], shape_of_units(shape, block)
    for axis in (packed_axis(units), -1):
        if mine == packed_shape(units, axis):
            return axis
    want = packed_shape(units, packed_axis(units))
    shared = f" in blocks of {block}" if block else ""
    raise ValueError(
        f"A packed mask of shape {shape}{shared} has bits of shape {bits}, want {want}. Pack the "
        "mask anew with `jp.pack`, on the arrays as they are where it is used."
    )


def stack_of(bits: Shape, shape: Shape) -> Shape:
    """Leading axes of the bits of a stack of masks, each of one shape."""
    return bits[: len(bits) - max(len(shape), 1)]


@functools.partial(jax.jit, static_argnames="block")
def first_of_blocks(mask: jax.Array, block: Block) -> jax.Array:
    """Take the first weight of each block, which speaks for all of them.

    Args:
      mask: bool `[...]`, constant within blocks; the last block of an axis may be smaller.
      block: sizes along all axes.

    Returns:
      bool, of the shape that ``shape_of_units`` says.
    """
    # Split and indexed, not sliced in steps: so shards stay where they are, and XLA reads units
    # that were repeated to a mask just before without writing the mask.
    for axis, size in enumerate(block):
        if size == 1:
            continue
        mask = even_shards(mask, size, axis)
        missing = [(0, -n % size if i == axis else 0) for i, n in enumerate(mask.shape)]
        whole = jnp.pad(mask, missing) if missing[axis][1] else mask
        shape = whole.shape
        split = whole.reshape(*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
        mask = lax.index_in_dim(split, 0, axis + 1, keepdims=False)
    return mask


@functools.partial(jax.jit, static_argnames="axis")
def pack_bits(mask: jax.Array, axis: int) -> jax.Array:
    """Pack eight neighbours along an axis into a byte; the first is the highest bit.

    ``[T, F, F, F, F, F, F, T, T]`` becomes ``[0b10000001, 0b10000000]``.

    Args:
      mask: bool `[...]`.
      axis: counted from the end.

    Returns:
      uint8, as ``np.packbits`` gives it.
    """
    # Of the programs that do this (``jnp.packbits``, eight strided slices, windows), XLA fuses this
    # one with what makes the mask, on TPU and CPU alike: bools are not written out.
    mask = even_shards(jnp.atleast_1d(mask), 8, axis)
    at = mask.ndim + axis
    missing = [(0, -n % 8 if i == at else 0) for i, n in enumerate(mask.shape)]
    whole = jnp.pad(mask, missing) if missing[at][1] else mask
    n = whole.shape[at]
    eight = whole.reshape(*whole.shape[:at], n // 8, 8, *whole.shape[at + 1 :])
    bits = jnp.where(eight, _places(8, axis, eight.ndim), np.uint8(0))
    return jnp.sum(bits, axis=at + 1, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnames=("shape", "block"))
def unpack_bits(bits: jax.Array, shape: Shape, block: Block = ()) -> jax.Array:
    """Give back a mask, or a stack of them for a stack of bits.

    Args:
      bits: uint8 `[..., packed]`.
      shape: that of the mask.
      block: how many weights share a bit along each axis.

    Returns:
      bool `[..., shape]`.
    """
    axis = axis_of(bits.shape, shape, block)
    rank = len(shape or (1,))
    sizes = dict(zip(range(-rank, 0), block or (1,) * rank, strict=True))
    # A byte beside its bit, elementwise: XLA fuses it into whatever uses the mask, which it does
    # not with jnp.unpackbits. The last step repeats eight times, as without blocks: what a TPU
    # writes out is at most what comes before it, a byte for eight weights.
    for other in reversed(range(-rank, 0)):
        if other != axis and sizes[other] > 1:
            bits = _repeated(bits, sizes[other], other, shape[other])
    n = (shape or (1,))[axis]
    if sizes[axis] > 1:
        bits = _repeated(bits, sizes[axis], axis, -(-n // 8))
    eight = _repeated(bits, 8, axis, n)
    mask = (eight & _places(n, axis, eight.ndim, sizes[axis])) != 0
    return mask.reshape(*stack_of(bits.shape, shape), *shape)


def _repeated(bits: jax.Array, times: int, axis: int, n: int) -> jax.Array:
    """Repeat each byte along an axis, of which ``n`` are then wanted."""
    sharding = jax.typeof(bits).sharding if is_explicit(bits) else None
    wide = jnp.repeat(bits, times, axis=axis, out_sharding=sharding)
    return wide if wide.shape[axis] == n else lax.slice_in_dim(wide, 0, n, axis=axis)


def _places(n: int, axis: int, ndim: int, size: int = 1) -> np.ndarray:
    """The bit of each of ``n`` neighbours along one of ``ndim`` axes; ``size`` share one."""
    sizes = [1] * ndim
    sizes[axis] = n
    return (128 >> np.arange(n) // size % 8).astype(np.uint8).reshape(sizes)
