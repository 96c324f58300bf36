"""What looks wrong with a pruner and its params, in words: for `check`, and once at `init`."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._errors import whole
from jaxprune._masks import is_packed
from jaxprune._state import PruneState, without_variables
from jaxprune._states import pruners
from jaxprune._tree import leaves_with_path, list_paths
from jaxprune._values import constant_of, is_concrete, zero_shares
from jaxprune._where import name_of
from jaxprune.typing import Params, Schedule

# A schedule of somebody else's is asked about so many updates.
_PROBE = 100_000
# Kernels of flax, Keras and haiku are called like this, and nothing else is.
_KERNELS = ("kernel", "w")


class PruneWarning(UserWarning):
    """Says at an ``init`` on concrete arrays what looks like a mistake; ``jp.check`` tells more.

    One warning lists all: pruners around pruners, dense masks of ``hold`` over params that were
    pruned before, a schedule that is never due, and leaves that the default ``where`` takes for
    weights although they hold one number all over, as gains and bit widths do at the start.
    """


def warn(
    user: str,
    state: Any,
    params: Params,
    *,
    schedule: Schedule | None = None,
    by_default: bool = False,
    dense: bool = False,
) -> None:
    """Give one warning for all that looks wrong at ``init``; abstract values are passed over.

    Args:
      user: the public function that made the optimizer.
      state: the new state.
      params: what it was made for.
      schedule: the schedule, if there is one.
      by_default: leaves were chosen by the default ``where``.
      dense: masks keep all and may be meant to be replaced.
    """
    if not is_concrete((params, jax.tree.leaves(state))):
        return
    part = covered(params, state)
    problems = [*overlaps(state), *never_due(schedule)]
    problems += zeros_under_dense_masks(part) if dense else []
    problems += constants(part) if by_default else []
    if problems:
        listed = "".join(f"\n- {problem}" for problem in problems)
        warnings.warn(f"`{user}` at `init`:{listed}", PruneWarning, stacklevel=4)


def covered(params: Params, state: Any) -> Params:
    """The params with None where no pruner has a mask."""
    paths = {path for pruner in pruners(state) for path in _paths(pruner)}
    chosen = [leaf if path in paths else None for path, leaf in leaves_with_path(params)]
    return jax.tree.unflatten(jax.tree.structure(params), chosen)


def overlaps(state: Any) -> list[str]:
    """Leaves that two pruners act on."""
    seen: set[str] = set()
    both: dict[str, None] = {}
    for pruner in pruners(state):
        paths = _paths(pruner)
        both |= dict.fromkeys(path for path in paths if path in seen)
        seen |= set(paths)
    if not both:
        return []
    return [
        f"There are nested pruners: two act on {list_paths(list(both), 4)}, each with masks of its "
        "own, and only the outermost can keep its zeros. Keep one: a schedule says how the "
        "sparsity grows, and `jp.with_masks` puts in masks that were found elsewhere."
    ]


def never_due(schedule: Schedule | None) -> list[str]:
    """A schedule without an event; one that says where its last is has one there."""
    if schedule is None:
        return []
    end = whole(getattr(schedule, "end", None))
    if (end is not None and bool(schedule.due(end))) or becomes_due(schedule, _PROBE):
        return []
    return [
        f"The schedule {schedule!r} is due at none of the first {_PROBE:,} updates, so that "
        "nothing is pruned. Its `due(step)` is to be true at the updates that prune; "
        "`jp.schedules.custom(fn, begin, end, every)` says so for any function."
    ]


def becomes_due(schedule: Schedule, steps: int) -> bool:
    """Say whether a schedule is due at one of the first updates; True if it cannot be asked."""
    try:
        return bool(np.any(jax.vmap(schedule.due)(jnp.arange(steps)))) if steps else False
    except Exception:  # `due` of somebody else's may want one step at a time
        return any(bool(schedule.due(step)) for step in range(min(steps, 1000))) or steps > 1000


def zeros_under_dense_masks(part: Params) -> list[str]:
    """Zeros of a network that was pruned before, which dense masks would train away."""
    shares = zero_shares(part)
    if not shares:
        return []
    shown = ", ".join(f"{path!r} ({share:.0%})" for path, share in list(shares.items())[:4])
    more = f" and {len(shares) - 4} more" if len(shares) > 4 else ""
    return [
        f"The masks keep all weights, but the params hold zeros at {shown}{more}, which training "
        "would fill. If they were pruned before, hold them: "
        "`jp.hold(inner, masks=jp.masks_from_zeros)`, or put masks in with `jp.with_masks`. "
        "Kernels that start as an identity are fine."
    ]


def constants(part: Params) -> list[str]:
    """Leaves that hold one number, which a matrix of weights does not at the start."""
    found = {
        path: number
        for path, leaf in leaves_with_path(part)
        if name_of(path) not in _KERNELS
        and (number := constant_of(leaf)) is not None
        # Layers may start from zero, and then have a name; in trees without names biases do.
        and (number or name_of(path).isdigit())
    }
    if not found:
        return []
    shown = ", ".join(f"{path!r} ({number:g})" for path, number in list(found.items())[:4])
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return [
        f"All entries are equal at {shown}{more}: a gain, a bias or a bit width rather than "
        "weights? The default `where` takes them. Leave them out with "
        "`where=jp.exclude(...)`, or name what to prune with `where=jp.by_path(...)`."
    ]


def _paths(pruner: PruneState) -> list[str]:
    marks = jax.tree.map(lambda _: True, without_variables(pruner.masks), is_leaf=is_packed)
    return [path for path, _ in leaves_with_path(marks)]
