"""The same sparsity all along."""

import jax
import jax.numpy as jnp

from jaxprune.schedules._schedule import Schedule, as_step
from jaxprune.typing import Sparsity


def constant(final: Sparsity, begin: int = 0, end: int | None = None, every: int = 1) -> Schedule:
    """Prune at the first update and hold; with ``end``, look again every so many steps.

    Under ``prune`` one look is enough, since weights that are gone stay gone. Under
    ``straight_through`` further looks find other masks.

    Args:
      final: sparsity: a number in [0, 1] or a tree of numbers, one a prunable leaf.
      begin: step of the first event; before it nothing is pruned.
      end: step of the last event; ``begin`` if left out.
      every: steps between events.

    Returns:
      A schedule.

    Raises:
      ValueError: a sparsity is outside [0, 1], ``end`` is before ``begin``, or a step is no
        integer from 0 on.

    Example:
      >>> schedule = constant(0.5)
      >>> [(float(schedule(step)), bool(schedule.due(step))) for step in range(2)]
      [(0.5, True), (0.5, False)]
      >>> schedule = constant(0.5, end=4, every=2)
      >>> [step for step in range(6) if schedule.due(step)]
      [0, 2, 4]
    """
    begin = as_step("begin", begin)
    last = begin if end is None else as_step("end", end)
    settings = {"final": final, "begin": begin} if begin or last > begin else {"final": final}
    if last > begin:
        settings |= {"end": last, "every": as_step("every", every)}
    return Schedule(
        lambda step: jax.tree.map(lambda s: jnp.where(jnp.asarray(step) >= begin, s, 0.0), final),
        begin=begin,
        end=last,
        every=every,
        final=final,
        call=("constant", settings),
    )
