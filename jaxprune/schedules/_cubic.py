"""Fast at first, slow at the end."""

from jaxprune.schedules._schedule import Schedule, ramp
from jaxprune.typing import Sparsity


def cubic(final: Sparsity, begin: int, end: int, every: int, initial: float = 0.0) -> Schedule:
    r"""Prune fast while there is much to spare and ever slower towards the end.

    With :math:`t` from 0 at ``begin`` to 1 at ``end``, the sparsity is
    :math:`s_f + (s_i - s_f)(1 - t)^3`.

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
      >>> schedule = cubic(0.8, begin=0, end=4, every=3)
      >>> [round(float(schedule(step)), 4) for step in range(5)]
      [0.0, 0.4625, 0.7, 0.7875, 0.8]
      >>> [bool(schedule.due(step)) for step in range(6)]  # the last event lands on the end
      [True, False, False, True, True, False]

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
    """
    return ramp(
        "cubic",
        lambda t: (1.0 - t) ** 3,
        final=final,
        initial=initial,
        begin=begin,
        end=end,
        every=every,
    )
