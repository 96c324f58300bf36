"""The order of units: by an integer key of their score, among equals by their position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._ranking._shards import Shard


class Rank(NamedTuple):
    """What units are ranked by: first the key of the score, then precedence. No two are equal.

    Attributes:
      key: order-preserving key of the score, unsigned, `[...]` as the leaf.
      precedence: uint32 `[...]`, from 1, higher for earlier leaves and positions.
    """

    key: jax.Array
    precedence: jax.Array


def order_key(x: jax.Array, alive: jax.Array | None = None) -> jax.Array:
    """Map floats to unsigned integers in the same order: 0 for dead, 1 for NaN, then -inf up.

    The bits of a positive float, read as an integer, grow with it; those of a negative one shrink.
    So the sign bit is set for the first and all bits are flipped for the second. In float32:

        -inf 0x007fffff < -1.0 0x407fffff < 0.0 0x80000000 < 1.0 0xbf800000 < inf 0xff800000

    Args:
      x: floats `[...]`; -0.0 equals 0.0, and all NaNs are one.
      alive: bools `[...]`; the dead come below everything.

    Returns:
      Unsigned integers `[...]` of as many bits as ``x`` has.
    """
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    x = jnp.where(x == 0, jnp.zeros_like(x), x)
    code = lax.bitcast_convert_type(x, unsigned)
    sign = np.asarray(1 << (bits - 1), unsigned)
    code = jnp.where(code >= sign, ~code, code | sign)
    code = jnp.where(jnp.isnan(x), np.asarray(1, unsigned), code)
    return code if alive is None else jnp.where(alive, code, np.asarray(0, unsigned))


def count_down(like: jax.Array, start: jax.Array, shard: Shard) -> jax.Array:
    """Number the units of a leaf, or of the device's shard of it, downwards from ``start``.

    Made from the leaf, so that the numbers lie where the leaf does, and without reshaping it.

    Args:
      like: the leaf `[...]`.
      start: uint32 `[]`.
      shard: which part of a leaf this is.

    Returns:
      uint32 `[...]`.
    """
    return shard.count_down(jnp.zeros_like(like, jnp.uint32) + start)


def count_down_within(like: jax.Array, start: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Number the units of each competition of a leaf downwards from ``start``.

    Args:
      like: the leaf `[...]`.
      start: uint32 `[]`.
      shape: of the leaf's counts, each axis full or 1: units compete along the axes of size 1.

    Returns:
      uint32 `[...]`.
    """
    number = jnp.zeros_like(like, jnp.uint32) + start
    stride = 1
    for axis in reversed(range(like.ndim)):
        if shape[axis] == 1:
            place = lax.broadcasted_iota(jnp.uint32, like.shape, axis)
            number -= place * np.uint32(stride)
            stride *= like.shape[axis]
    return number
