"""Prune once, at a given update."""

import jax
import jax.numpy as jnp

from jaxprune.schedules._schedule import Schedule, as_step
from jaxprune.typing import Sparsity


def one_shot(final: Sparsity, at: int) -> Schedule:
    """Train dense, prune once at step ``at``, and hold.

    Args:
      final: sparsity from ``at`` on: a number in [0, 1] or a tree of numbers.
      at: step of the one event.

    Returns:
      A schedule.

    Raises:
      ValueError: a sparsity is outside [0, 1], or ``at`` is no integer from 0 on.

    Example:
      >>> schedule = one_shot(0.5, at=2)
      >>> [(float(schedule(step)), bool(schedule.due(step))) for step in range(4)]
      [(0.0, False), (0.0, False), (0.5, True), (0.5, False)]
    """
    at = as_step("at", at)
    return Schedule(
        lambda step: jax.tree.map(lambda s: jnp.where(jnp.asarray(step) >= at, s, 0.0), final),
        begin=at,
        end=at,
        every=1,
        final=final,
        call=("one_shot", {"final": final, "at": at}),
    )
