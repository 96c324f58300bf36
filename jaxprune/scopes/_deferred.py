"""Scores that a ranking computes where it reads them, instead of storing them."""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Deferred:
    """Scores of a leaf, as its weights and what to make of them.

    It is a leaf, not a node: whoever maps over a tree of scores does not look inside.
    """

    weights: jax.Array
    score: Callable[[jax.Array], jax.Array]  # elementwise, and keeps the dtype

    shape = property(lambda self: self.weights.shape)
    dtype = property(lambda self: self.weights.dtype)
    size = property(lambda self: self.weights.size)
    ndim = property(lambda self: self.weights.ndim)


def stored(leaf: jax.Array | Deferred) -> jax.Array:
    """What lies in memory: the scores, or the weights that they are computed from."""
    return leaf.weights if isinstance(leaf, Deferred) else leaf


def on_weights(leaf: jax.Array | Deferred, again: jax.Array) -> jax.Array | Deferred:
    """Put back what is stored, after it has been somewhere without the rest."""
    return dataclasses.replace(leaf, weights=again) if isinstance(leaf, Deferred) else again


def score_of(leaf: jax.Array | Deferred) -> Callable[[jax.Array], jax.Array]:
    """What makes scores from what is stored."""
    return leaf.score if isinstance(leaf, Deferred) else _as_it_is


def _as_it_is(x: jax.Array) -> jax.Array:
    return x
