"""What masks do to gradients and updates: removed weights go to exactly zero and stay there."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import map_leaves, wide_dtype
from jaxprune.typing import DType, Masks, Params, Tree


def live(grads: Params, masks: Masks) -> Params:
    """Zero the gradients of removed weights: what the inner optimizer gets to see."""
    return map_leaves(
        lambda g, m: g if m is None else jnp.where(m, g, jnp.zeros((), g.dtype)), grads, masks
    )


def enforce(update: jax.Array, param: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Make the update take removed weights to exactly zero."""
    if mask is None:
        return update
    # A narrow update cannot hold `-param` exactly, and then the sum would not be zero.
    dtype = common(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))


def common(a: Tree, b: Tree) -> Any:
    """A type that holds the numbers of both; eight bits promote to nothing by themselves."""
    if a == b:
        return a
    return jnp.promote_types(*(wide_dtype(d) if _is_eight(d) else d for d in (a, b)))


def _is_eight(dtype: DType) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 8
