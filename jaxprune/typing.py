"""The words of the library: what params, scores, masks and their parts are."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
from jax.typing import ArrayLike

__all__ = (
    "Criterion",
    "Masks",
    "Params",
    "Pattern",
    "Schedule",
    "Scope",
    "Scores",
    "Sparsity",
    "Units",
    "Where",
)

Params: TypeAlias = Any  # pytree of float arrays
Scores: TypeAlias = Any  # like Params; higher = keep; None where not prunable
Units: TypeAlias = Any  # like Scores; one entry for what lives or dies together, the leaf's rank
Masks: TypeAlias = Any  # like Scores; bool, broadcastable; True = kept
Sparsity: TypeAlias = Any  # fraction removed in [0, 1]: one number, or one per prunable leaf
Where: TypeAlias = Callable[[str, jax.Array], bool]  # ("Dense_0/kernel", array) -> prunable?

# Says how much each weight is worth. Takes params and, by keyword, the evidence that it names;
# swallows the rest. One with memory also has `init(params)` and `update(state, params, grads)`.
Criterion: TypeAlias = Callable[..., Scores]


class Pattern(Protocol):
    """Says what is removed together. Frozen, hashable, holds no arrays."""

    def pool(self, scores: Scores) -> Units:
        """Make one score for each unit; leaves keep their rank, with axes of size 1."""

    def expand(self, keep: Any, *, like: Params) -> Masks:
        """Turn bools of units into masks that broadcast over the weights."""


class Scope(Protocol):
    """Says who competes with whom. Units outside ``within`` rank below every other."""

    def __call__(self, units: Units, sparsity: Sparsity, *, within: Any = None) -> Any:
        """Say which units stay: bools like ``units``."""


class Schedule(Protocol):
    """Says how much and when, in one object, so that the two cannot disagree."""

    def __call__(self, step: ArrayLike) -> Any:
        """Give the sparsity at a step, counted from 0."""

    def due(self, step: ArrayLike) -> Any:
        """Say whether masks are found again at this update."""
