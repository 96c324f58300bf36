"""Prune once, at the first update."""

import jax
import jax.numpy as jnp

from jaxprune._types import Sparsity
from jaxprune.schedules._schedule import Schedule


def constant(final: Sparsity) -> Schedule:
    """Prune at the first update and hold.

    Args:
      final: sparsity: a number in [0, 1] or a tree of numbers, one a prunable leaf.

    Returns:
      A schedule.

    Raises:
      ValueError: a sparsity is outside [0, 1].

    Example:
      >>> schedule = constant(0.5)
      >>> [(float(schedule(step)), bool(schedule.due(step))) for step in range(2)]
      [(0.5, True), (0.5, False)]
    """
    return Schedule(
        lambda step: jax.tree.map(jnp.asarray, final), begin=0, end=0, every=1, final=final
    )
