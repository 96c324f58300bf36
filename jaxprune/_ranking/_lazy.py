"""Scores that a ranking computes where it reads them, instead of storing them."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import Slot, is_hole, slots
from jaxprune.typing import Lazy, Tree

Leaf = jax.Array | Lazy


def is_lazy(node: Any) -> bool:
    """True for scores that are not computed yet: for ``is_leaf``."""
    return isinstance(node, Lazy)


def named_leaves(units: Tree) -> list[Slot]:
    """The leaves of units, lazy ones as they are, each with its path."""
    found = slots(units, lambda x: is_hole(x) or is_lazy(x))
    return [slot for slot in found if not is_hole(slot.leaf)]


def read(leaf: Leaf) -> jax.Array:
    """Compute the scores, here and now."""
    if not isinstance(leaf, Lazy):
        return leaf
    return jnp.asarray(leaf.score(*leaf.operands), leaf.dtype)


def stored(leaf: Leaf) -> jax.Array:
    """An array of the same shape that lies in memory: the scores, or the weights under them."""
    return leaf.operands[0] if isinstance(leaf, Lazy) else leaf
