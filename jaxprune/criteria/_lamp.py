"""Scores that make the magnitudes of different layers comparable."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._layout import Layout
from jaxprune._tree import map_with_path
from jaxprune.typing import Params, Scores


def lamp(params: Params, *, layout: Layout | None = None, **_: Any) -> Scores:
    r"""Score a weight by its share of what is left once all smaller ones are gone (LAMP).

    Inside a leaf, :math:`w_u^2 / \sum_{|w_v| \ge |w_u|} w_v^2`, where among equal weights the
    earlier one counts as the larger. The order inside a leaf is that of magnitude; the point is to
    rank with ``scope=jp.scopes.across``, which then finds the sparsity of each layer by itself.
    The largest weight of every leaf scores 1, so that no layer collapses as long as there is one
    weight for each to keep.

    More than one pass: each leaf is sorted, some twenty bytes a weight, and one that is sharded is
    gathered for it to every device.

    Args:
      params: prunable parameters; any shapes of less than 2**31 weights.
      layout: what each axis means; each layer of a stack is then a leaf. ``find_masks`` and the
        like hand in their own.

    Returns:
      Float32 scores in [0, 1] like ``params``. Higher means keep.

    Raises:
      NotImplementedError: a leaf has 2**31 weights or more, whose places no int32 holds.

    Example:
      >>> import jax.numpy as jnp
      >>> lamp({"w": jnp.array([1.0, 0.0, -1.0])})
      {'w': Array([1. , 0. , 0.5], dtype=float32)}

    References:
      Lee et al., `Layer-adaptive sparsity for the Magnitude-based Pruning
      <https://arxiv.org/abs/2010.07611>`_, 2021.
    """

    def score(path: str, w: jax.Array) -> jax.Array:
        layers = () if layout is None else layout.layers(path, w.ndim)
        return _lamp_layers(w, layers) if layers else _lamp_leaf(w)

    return map_with_path(score, params)


def _lamp_layers(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Score each layer of a stack by itself.

    XLA sorts one long row on a GPU by another, faster way than many of them, so that there one
    layer comes after the other; elsewhere they are sorted together, also over devices.
    """
    front = tuple(range(len(axes)))
    stack = jnp.moveaxis(w, axes, front)
    rows = stack.reshape(-1, *stack.shape[len(axes) :])
    one_by_one = functools.partial(lax.map, _lamp_leaf)
    together = jax.vmap(_lamp_leaf)
    scores = lax.platform_dependent(rows, cuda=one_by_one, rocm=one_by_one, default=together)
    return jnp.moveaxis(scores.reshape(stack.shape), front, axes)


def _lamp_leaf(w: jax.Array) -> jax.Array:
    if not w.size:
        return jnp.zeros(w.shape, jnp.float32)
    if w.size >= 2**31:
        raise NotImplementedError(
            f"`lamp` got a leaf of shape {w.shape}: places of {w.size} weights are no int32. "
            "Split it, or rank by `jp.criteria.magnitude` with sparsities of `jp.scopes.erk`."
        )
    size = jnp.abs(w).astype(jnp.float32).ravel()
    counted = jnp.where(jnp.isnan(size), 0.0, size)
    largest = jnp.max(counted)
    # Relative to the largest weight: squares of small numbers would underflow.
    share = jnp.square(counted / jnp.where(largest > 0, largest, 1.0))
    # Backwards and stable: among equals the earlier one comes later, and so scores higher.
    place = jnp.arange(share.size, dtype=jnp.int32)[::-1]
    share, place = lax.sort_key_val(share[::-1], place)
    left = lax.cumsum(share, reverse=True)
    scores = jnp.where(left > 0, share / jnp.where(left > 0, left, 1.0), 0.0)
    scores = jnp.zeros_like(scores).at[place].set(scores, unique_indices=True)
    return jnp.where(jnp.isnan(size), jnp.nan, scores).reshape(w.shape)
