"""A look at params and masks from outside: are the zeros there, has the schedule arrived?"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._advice import becomes_due, overlaps, zeros_under_dense_masks
from jaxprune._errors import whole
from jaxprune._masks import check_masks, unpack
from jaxprune._state import PruneState, without_variables
from jaxprune._states import pruners
from jaxprune._straight_through import StraightThroughState
from jaxprune._tree import narrow
from jaxprune._values import count_revived, is_concrete
from jaxprune.typing import Masks, Params, Schedule


@dataclasses.dataclass(frozen=True)
class Check:
    """What ``check`` found; false when all is well. Print it.

    Attributes:
      revived: by path, how many weights that masks remove are not zero.
      problems: all else that is wrong, in words.
    """

    revived: Mapping[str, int]
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.revived or self.problems)

    def __str__(self) -> str:
        lines = [
            f"{path!r}: {count:,} weights that the masks remove are not zero"
            for path, count in self.revived.items()
        ]
        if self.revived:
            lines.append(
                "They came back: something stands after `jp.prune` in a chain, or these params "
                "are a copy (an average, the best seen, those of before). Let the pruner be the "
                "outermost, or `jp.apply_masks(params, masks)`."
            )
        return "\n".join([*lines, *self.problems]) or "all is well"


def check(
    params: Params,
    masks_or_opt_state: Masks | optax.OptState,
    *,
    schedule: Schedule | None = None,
    step: int | None = None,
) -> Check:
    """Look whether params hold the zeros that masks promise, and whether pruning has arrived.

    Updates never look at what they leave behind. This does, on the host: call it at the end of a
    training run, or now and then. It reads all prunable weights once and gathers none.

    Args:
      params: the parameters that will be used.
      masks_or_opt_state: masks like them, or an optimizer state with a pruner in it, however
        deep. The weights of ``straight_through`` are dense by design and not looked at.
      schedule: the schedule that the pruner was made with, to tell whether it has arrived.
      step: updates so far; without it, what the state counted.

    Returns:
      A ``Check``: ``revived`` counts by path the weights that masks remove and params have;
      ``problems`` names pruners around pruners, dense masks over params that were pruned before,
      and a schedule that is not due yet, never will be, or has not arrived.

    Raises:
      TypeError: called inside a trace, or on shapes; or ``step`` is no integer.
      ValueError: masks do not mirror the params, or a schedule comes without a step.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> tx = optax.chain(
      ...     jp.prune(optax.sgd(0.5), schedule=jp.schedules.constant(0.5)), optax.scale(0.1))
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> report = jp.check(optax.apply_updates(params, updates), state)
      >>> bool(report), report.revived  # `scale` after `prune` brought them back
      (True, {'kernel': 2})
    """
    states = pruners(masks_or_opt_state)
    if not is_concrete((params, jax.tree.leaves(masks_or_opt_state))):
        raise TypeError(
            "`check` reads values, which are not known inside of `jit` or from shapes. Call it "
            "outside, on the params and the state that a step returns."
        )
    dense = set(map(id, _inside_straight_through(masks_or_opt_state)))
    trees = [state.masks for state in states if id(state) not in dense]
    trees = trees if states else [masks_or_opt_state]
    masks = [check_masks(unpack(without_variables(tree)), params, "masks") for tree in trees]
    problems = overlaps(masks_or_opt_state)
    for each in masks:
        problems += zeros_under_dense_masks(narrow(params, each)) if _keeps_all(each) else []
    if schedule is not None:
        problems += _arrived(schedule, _step(step, states), masks)
    return Check(_most(count_revived(params, each) for each in masks), tuple(problems))


def _most(counts: Any) -> dict[str, int]:
    most: dict[str, int] = {}
    for each in counts:
        most |= {path: max(n, most.get(path, 0)) for path, n in each.items()}
    return most


def _step(step: Any, states: list[PruneState]) -> int:
    """How many updates there were."""
    if step is None and states:
        return int(np.min(np.asarray(without_variables(states[0].count))))
    if step is None:
        raise ValueError(
            "`check` got masks and a schedule, but masks do not count updates. Pass `step=`, the "
            "number of updates so far, or the optimizer state instead of the masks."
        )
    number = whole(step)
    if number is None:
        raise TypeError(
            f"`check` got step={step!r}, which is no integer. Pass the number of updates so far."
        )
    return number


def _arrived(schedule: Schedule, step: int, masks: list[Masks]) -> list[str]:
    """Say what of a schedule is still to come after so many updates."""
    end = whole(getattr(schedule, "end", None))
    if not becomes_due(schedule, step):
        late = "" if end is None else f", and the last event is update {end}"
        return [
            f"{schedule!r} was not due at any of the {step} updates so far (counted from 0){late}: "
            "nothing is pruned yet. Did the loop stop early, or do steps mean something else?"
        ]
    if end is not None and step <= end:
        return [
            f"{schedule!r} has not arrived: {step} updates so far, and the last event is update "
            f"{end} (counted from 0). Train on, or let `end` be sooner than the loop may stop."
        ]
    asked = max(
        (float(np.max(s)) for s in jax.tree.leaves(schedule(max(step - 1, 0)))), default=0.0
    )
    if asked > 0.0 and masks and all(map(_keeps_all, masks)):
        return [
            f"{schedule!r} asks for {asked:.0%} at update {step - 1}, but the masks keep all "
            "weights: the pruner has seen fewer updates than that, or these are other masks."
        ]
    return []


def _keeps_all(masks: Masks) -> bool:
    return all(bool(jnp.all(mask)) for mask in jax.tree.leaves(masks))


def _inside_straight_through(state: Any) -> list[PruneState]:
    is_one = lambda node: isinstance(node, StraightThroughState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    return [node.masked for node in found]
