"""How many bools are True: fast on every backend, whole leaves or along some axes."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._mesh import names_of
from jaxprune._ranking._whole import Whole, in_words

MOST = 2**31 - 1  # that an int32 counts to


def count_true(mask: jax.Array, keep: Sequence[int] = ()) -> Whole:
    """Count what is True, exactly, however much it is.

    Args:
      mask: bools `[...]`.
      keep: the axes that stay; along all others is counted.

    Returns:
      Numbers, of size 1 along the axes that are gone.

    Raises:
      NotImplementedError: the axes are too long for two words.
    """
    first, then = _turns(mask.shape, keep)
    some = lax.platform_dependent(
        mask,
        cpu=functools.partial(_count_in_bytes, axes=first),
        default=functools.partial(_count_plain, axes=first),
    )
    number = in_words(some)
    if not then:
        return number
    # Less than 2**16 words of 16 bits: a sum without a sign holds them.
    high = jnp.sum(number.high, axis=then, keepdims=True, dtype=jnp.int32)
    low = jnp.sum(number.low, axis=then, keepdims=True, dtype=jnp.uint32)
    lower = in_words(low)
    return Whole(high + lower.high.astype(jnp.int32), lower.low.astype(jnp.int32))


def _turns(shape: Sequence[int], keep: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes to count along: as many, the longest first, as an int32 holds, and the rest."""
    first: list[int] = []
    then = sorted((i for i in range(len(shape)) if i not in keep), key=lambda i: -shape[i])
    while then and math.prod(shape[i] for i in [*first, then[0]]) <= MOST:
        first.append(then.pop(0))
    if math.prod(shape[i] for i in then) >= 2**16:
        raise NotImplementedError(
            f"Units of shape {tuple(shape)} are too many along single axes to be counted in two "
            "words of 32 bits. Split the leaf along one of them, or leave it out with `where`."
        )
    return tuple(sorted(first)), tuple(sorted(then))


def count_none(leaf: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Count no units of a leaf: zeros that vary over the mesh axes that its counts vary over."""
    none = lax.slice_in_dim(leaf, 0, 0, axis=0) if leaf.ndim else leaf[None][:0]
    return jnp.broadcast_to(jnp.sum(none, dtype=jnp.int32), shape)


def _count_plain(mask: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)


def _count_in_bytes(mask: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    # XLA on CPU writes out what it sums, four bytes a unit in int32. Windows of at most 255 units
    # can be summed in bytes first, which is some ten times faster.
    window = _window(mask, axes)
    if window is None:
        return _count_plain(mask, axes=axes)
    ones = mask.astype(jnp.uint8)
    sums = lax.reduce_window(ones, np.uint8(0), lax.add, window, window, "SAME")
    return _count_plain(sums, axes=axes)


def _window(mask: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """Choose windows of 64 to 255 units along one of some axes, the last that is long enough.

    None if there is no such axis. A window that crossed the border of a shard would move data, so
    it fits into the smallest shard that there can be.
    """
    if not mask.size:
        return None
    for axis in reversed(axes):
        parts, n = most_shards(mask, axis), mask.shape[axis]
        fits = [d for d in range(64, 256) if n % (parts * d) == 0]
        if n >= 64 and (fits or parts == 1):
            return tuple(max(fits, default=128) if i == axis else 1 for i in range(mask.ndim))
    return None


def most_shards(x: jax.Array, *axes: int) -> int:
    """Into how many equal shards jit may split some axes of an array, or all.

    Explicit mesh axes are in its type. What automatic ones will split nobody knows yet, but no axis
    into more shards than they have devices.
    """
    sharding = jax.typeof(x).sharding
    sizes = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_sizes, strict=True))
    seen = [name for i in axes or range(x.ndim) for name in names_of(sharding.spec[i])]
    return math.prod(sizes[name] for name in (*sharding.mesh.auto_axes, *seen))
