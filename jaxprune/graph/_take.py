"""Indices taken out of arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._kept import count, layer_axis
from jaxprune._mesh import is_explicit, sharding_for
from jaxprune._tree import is_array


def take(x: jax.Array, indices: Sequence[np.ndarray | None]) -> jax.Array:
    """Take the given indices of each axis, all of them where there is None.

    They are a vector, or an array of the rank of ``x`` with a row for each layer of a stack, of the
    layers that are left (see ``_kept``).

    Indices in a row become a slice, which needs no gather. Explicit mesh axes stay where they
    divide what is left.
    """
    if not is_explicit(x):
        return _taken(x, indices)
    shape = _small_shape(x.shape, {i: k for i, k in enumerate(indices) if k is not None})
    if shape == list(x.shape) and all(k is None or (np.diff(k) == 1).all() for k in indices):
        return x
    out = sharding_for(jax.typeof(x).sharding, shape)
    return jax.sharding.auto_axes(lambda x: _taken(x, indices), out_sharding=out)(x)


def take_kept(leaf: Any, axes: Mapping[int, np.ndarray]) -> Any:
    """Take the kept indices of some axes out of an array or a shape; nothing of what is neither."""
    if not is_array(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(_small_shape(leaf.shape, axes), leaf.dtype)
    if not axes:
        return jnp.copy(leaf)  # so that donating the small ones leaves the whole ones alone
    return take(jnp.asarray(leaf), [axes.get(i) for i in range(leaf.ndim)])


def _small_shape(shape: Sequence[int], axes: Mapping[int, np.ndarray]) -> list[int]:
    """Shape of what is taken; a leaf that is the same in all layers has an axis of layers then."""
    small = [count(axes[i], i) if i in axes else n for i, n in enumerate(shape)]
    for i, k in axes.items():
        if (layer := layer_axis(k, i)) is not None:
            small[layer] = k.shape[layer]
    return small


def _taken(x: jax.Array, indices: Sequence[np.ndarray | None]) -> jax.Array:
    for i, wanted in enumerate(indices):
        if wanted is None or wanted.ndim > 1 or np.array_equal(wanted, np.arange(x.shape[i])):
            continue
        first, n = (int(wanted[0]), len(wanted)) if len(wanted) else (0, 0)
        if np.array_equal(wanted, np.arange(first, first + n)):
            x = lax.slice_in_dim(x, first, first + n, axis=i)
        else:
            once = len(np.unique(wanted)) == len(wanted)
            x = jnp.take(x, wanted, axis=i, unique_indices=once)
    for i, wanted in enumerate(indices):  # now that only the layers are left that have a row
        if wanted is not None and wanted.ndim > 1:
            x = jnp.take_along_axis(x, jnp.asarray(wanted), axis=i)
    return x


def pick(
    x: jax.Array,
    have: Sequence[np.ndarray | None],
    source: Sequence[np.ndarray | None],
    keep: Sequence[np.ndarray | None],
) -> jax.Array:
    """Take what the kept results come from out of an operand that has been cut.

    For each axis: the indices that the operand still has, where each index of the whole result
    comes from, and the results to keep. None for axes to leave alone. If the operand has indices
    0, 2 and 5, and the results 0 to 3 are its indices 5, 4, 2 and 0, of which 0 and 2 are kept,
    then they are 5 and 2 of the whole, 2 and 1 of what there is.
    """
    return take(
        x,
        [
            None if h is None or s is None else np.searchsorted(h, s if k is None else s[k])
            for h, s, k in zip(have, source, keep, strict=True)
        ],
    )
