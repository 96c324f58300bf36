"""Scores that a ranking computes where it reads them, instead of storing them."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.typing import Lazy

Leaf = jax.Array | Lazy


def is_lazy(node: Any) -> bool:
    """True for scores that are not computed yet: for ``is_leaf``."""
    return isinstance(node, Lazy)


def read(leaf: Leaf) -> jax.Array:
    """Compute the scores, here and now."""
    if not isinstance(leaf, Lazy):
        return leaf
    return jnp.asarray(leaf.score(*leaf.operands), leaf.dtype)


def stored(leaf: Leaf) -> jax.Array:
    """An array of the same shape that lies in memory: the scores, or the weights under them."""
    return leaf.operands[0] if isinstance(leaf, Lazy) else leaf
