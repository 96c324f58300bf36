"""Any function of the step."""

from collections.abc import Callable

from jax.typing import ArrayLike

from jaxprune._errors import check_sparsity
from jaxprune.schedules._schedule import Schedule, as_step
from jaxprune.typing import Sparsity


def custom(fn: Callable[[ArrayLike], Sparsity], begin: int, end: int, every: int) -> Schedule:
    """Take the sparsity from a function of the step, such as any optax schedule.

    Where the function falls, pruned weights may come back: masks are then found anew from all
    weights (a pruned weight is zero until it is trained again).

    Args:
      fn: from step to sparsity in [0, 1], a number or a tree; called while tracing.
      begin: step of the first event.
      end: step of the last event.
      every: steps between events.

    Returns:
      A schedule.

    Raises:
      TypeError: ``fn`` cannot be called.
      ValueError: ``end`` is before ``begin``, a step is no integer from 0 on, or ``fn`` leaves
        [0, 1] at ``begin`` or ``end``.

    Example:
      >>> import optax
      >>> schedule = custom(optax.linear_schedule(0.0, 0.5, 10), begin=0, end=10, every=5)
      >>> float(schedule(5)), bool(schedule.due(5))
      (0.25, True)
    """
    if not callable(fn):
        raise TypeError(
            f"`custom(fn={fn!r})` needs a function from step to sparsity, such as "
            "`optax.linear_schedule(0.0, 0.9, 1000)`."
        )
    begin, end, every = as_step("begin", begin), as_step("end", end), as_step("every", every)
    settings = {"fn": fn, "begin": begin, "end": end, "every": every}
    schedule = Schedule(fn, begin, end, every, call=("custom", settings))
    for step in (begin, end):  # a look at both ends: percents are caught here
        check_sparsity(schedule(step), "custom")
    return schedule
