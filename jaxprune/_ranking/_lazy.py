"""Scores that a ranking computes where it reads them, instead of storing them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lazy:
    """Scores of a leaf, as what they are made from.

    Stored scores are a buffer of the size of the params for as long as a search lasts. Made anew
    at every pass they cost some arithmetic, which a search that waits for memory has time for.

    Attributes:
      operands: the weights `[...]` first, then evidence: arrays like them, or anything else.
      score: from the operands to scores `[...]`.
      dtype: of the scores.
    """

    operands: tuple[Any, ...]
    score: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    shape = property(lambda self: self.operands[0].shape)
    size = property(lambda self: self.operands[0].size)
    ndim = property(lambda self: self.operands[0].ndim)


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
