"""The order of units: by an integer key of their score, among equals by their position."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._ranking._shards import Shard

# What units are ranked by, unsigned words of which the first counts most: the order-preserving key
# of the score, then one word or two of precedence, from 1, which is higher for earlier leaves and
# positions. No two units of a competition have the same.
Rank: TypeAlias = tuple[jax.Array, ...]


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


def count_down(like: jax.Array, start: Rank, shape: tuple[int, ...], shard: Shard) -> Rank:
    """Number the units of each competition of a leaf downwards from ``start``.

    Made from the leaf, so that the numbers lie where the leaf does, and without reshaping it. With
    two words the first numbers slabs, the second the units inside of one:

        start (3, 4), leaf [2, 2, 2] of two slabs: 3.4 3.3 3.2 3.1, 2.4 2.3 2.2 2.1

    Args:
      like: the leaf `[...]`, or the device's shard of it.
      start: one word or two, uint32 `[]` each.
      shape: of the leaf's counts, each axis full or 1: units compete along the axes of size 1;
        `()` where all compete.
      shard: which part of a leaf this is.

    Returns:
      As many words, uint32 `[...]`.
    """
    compete = shard.order([i for i in range(like.ndim) if not shape or shape[i] == 1])
    slabs = shard.slabs(like.shape, compete) if len(start) > 1 else []
    inside = [i for i in compete if i not in slabs]
    zero = jnp.zeros_like(like, jnp.uint32)
    place = shard.count_down(zero + start[-1], inside, apart=len(start) == 1)
    if len(start) == 1:
        return (place,)
    return shard.count_down(zero + start[0], slabs, apart=True), place
