"""The same fraction of what is left, again and again."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune._errors import check_sparsity
from jaxprune.schedules._schedule import Schedule, as_step
from jaxprune.typing import Sparsity


def geometric(rate: Sparsity, begin: int, end: int, every: int) -> Schedule:
    r"""Remove the same fraction of the remaining weights at every event.

    The n-th event, counted from 1, brings the sparsity :math:`1 - (1 - r)^n`: the ladder of
    iterative magnitude pruning, inside one training run.

    Args:
      rate: fraction of what is left that goes at each event: a number in [0, 1] or a tree.
      begin: step of the first event.
      end: step of the last event.
      every: steps between events.

    Returns:
      A schedule.

    Raises:
      ValueError: a rate is outside [0, 1], ``end`` is before ``begin``, or a step is no integer
        from 0 on.

    Example:
      >>> schedule = geometric(0.2, begin=1, end=3, every=1)
      >>> [round(float(schedule(step)), 3) for step in range(5)]
      [0.0, 0.2, 0.36, 0.488, 0.488]
    """
    check_sparsity(rate, "geometric")
    begin, end, every = as_step("begin", begin), as_step("end", end), as_step("every", every)
    settings = {"rate": rate, "begin": begin, "end": end, "every": every}

    def value(step: ArrayLike) -> Sparsity:
        inside = jnp.clip(jnp.asarray(step), begin, end) - begin
        # A last event that falls between two beats is one more.
        extra = (jnp.asarray(step) >= end) & ((end - begin) % every != 0)
        events = jnp.where(jnp.asarray(step) < begin, 0, inside // every + 1 + extra)
        return jax.tree.map(lambda r: 1.0 - (1.0 - r) ** events.astype(float), rate)

    events = -(-(end - begin) // max(every, 1)) + 1 if end >= begin else 0
    final = jax.tree.map(lambda r: 1.0 - (1.0 - r) ** events, rate)
    return Schedule(value, begin, end, every, final, ("geometric", settings))
