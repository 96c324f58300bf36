"""Slow at both ends."""

import jax.numpy as jnp

from jaxprune.schedules._schedule import Schedule, ramp
from jaxprune.typing import Sparsity


def cosine(final: Sparsity, begin: int, end: int, every: int, initial: float = 0.0) -> Schedule:
    r"""Start and end gently, prune fastest half-way.

    With :math:`t` from 0 at ``begin`` to 1 at ``end``, the sparsity is
    :math:`s_f + (s_i - s_f)(1 + \cos \pi t)/2`.

    Args:
      final: sparsity from ``end`` on: a number in [0, 1] or a tree of numbers, one a prunable leaf.
      begin: step of the first event.
      end: step of the last event, which brings ``final``.
      every: steps between events.
      initial: sparsity at ``begin``; before ``begin`` nothing is pruned.

    Returns:
      A schedule.

    Raises:
      ValueError: a sparsity is outside [0, 1], ``end`` is before ``begin``, or a step is no
        integer from 0 on.

    Example:
      >>> schedule = cosine(0.8, begin=0, end=4, every=1)
      >>> [round(float(schedule(step)), 3) for step in range(5)]
      [0.0, 0.117, 0.4, 0.683, 0.8]
    """
    return ramp(
        "cosine",
        lambda t: 0.5 * (1.0 + jnp.cos(jnp.pi * t)),
        final=final,
        initial=initial,
        begin=begin,
        end=end,
        every=every,
    )
