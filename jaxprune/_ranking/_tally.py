"""How many bools are True: fast on every backend, whole leaves or along some axes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._mesh import names_of


def count_true(mask: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Count what is True, in int32.

    Args:
      mask: bools `[...]`.
      shape: of the counts: `[]` for all of the mask, or each axis full or 1.

    Returns:
      int32 of that shape.
    """
    if shape:
        axes = tuple(i for i, n in enumerate(shape) if n == 1)
        return jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)
    return lax.platform_dependent(mask, cpu=_count_in_bytes, default=_count_plain)


def count_none(leaf: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
    """Count no units of a leaf: zeros that vary over the mesh axes that its counts vary over."""
    none = lax.slice_in_dim(leaf, 0, 0, axis=0) if leaf.ndim else leaf[None][:0]
    return jnp.broadcast_to(jnp.sum(none, dtype=jnp.int32), shape)


def _count_plain(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _count_in_bytes(mask: jax.Array) -> jax.Array:
    # XLA on CPU writes out what it sums, four bytes a unit in int32. Windows of at most 255 units
    # can be summed in bytes first, which is some ten times faster.
    window = _window(mask)
    if window is None:
        return _count_plain(mask)
    ones = mask.astype(jnp.uint8)
    return _count_plain(lax.reduce_window(ones, np.uint8(0), lax.add, window, window, "SAME"))


def _window(mask: jax.Array) -> tuple[int, ...] | None:
    """Choose windows of 64 to 255 units along one axis, the last that is long enough.

    None if there is no such axis. A window that crossed the border of a shard would move data, so
    it fits into the smallest shard that there can be.
    """
    if not mask.size:
        return None
    for axis in reversed(range(mask.ndim)):
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
