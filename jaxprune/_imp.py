"""Iterative pruning with rewinding: the search for lottery tickets, as a generator."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxprune._evidence import check_evidence
from jaxprune._help import readable
from jaxprune._layout import Layout
from jaxprune._level import Evidence, Level, Restart, Rules, after, check_level, rewind_to_init
from jaxprune._parts import Parts
from jaxprune._tree import copy_arrays, is_matrix, match
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Criterion, Masks, Params, Pattern, Scope, Where


@readable
def imp(
    params_init: Params,
    fit: Callable[[Params, Masks], Params],
    *,
    rounds: int = 16,
    rate: float = 0.2,
    rates: Mapping[str, float] | None = None,
    criterion: Criterion = magnitude,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    where: Where = is_matrix,
    evidence: Evidence | None = None,
    restart: Restart = rewind_to_init,
    start: Level | tuple[int, Masks, Params] | None = None,
    layout: Layout | None = None,
) -> Iterator[Level]:
    """Train, prune, rewind, and again: iterative magnitude pruning.

    After n rounds a leaf of N weights has lost exactly ``round((1 - (1 - rate)**n) * N)`` of
    them, and what is gone stays gone. Three ways to go on after a round:

    - weight rewinding (default): every level starts from ``params_init``. Rewinding to step k is
      the same with the params of step k as ``params_init``, in a ``fit`` that goes on from k.
    - fine-tuning: ``restart=lambda init, trained: trained`` with a short ``fit``.
    - learning-rate rewinding: the same ``restart`` with a ``fit`` that runs the full schedule.

    This is a loop around ``next_level``, for who wants to write it.

    Args:
      params_init: where every level starts. Copied: donating it does no harm.
      fit: from a ticket and its masks to trained params. It owns the ticket and may donate it.
      rounds: last level; levels 0 (dense) to ``rounds`` are yielded.
      rate: fraction of the remaining weights that a round removes.
      rates: exceptions to ``rate``, from regex (matching the whole path) to rate; first match.
      criterion: ranks the trained weights.
      pattern: what is removed together.
      scope: ``per_leaf`` ranks layer by layer, ``across`` globally (with one rate for all).
      where: which leaves are prunable.
      evidence: from the level just trained to what the criterion asks for, such as ``grads``.
        ``params_init`` is offered without it.
      restart: from initial and trained params to what the next level starts from.
      start: a finished ``Level``, or its ``(index, masks, trained)`` if ``evidence`` can do
        without the ticket: goes on with the next one.
      layout: what each axis means, from ``jp.find_layout`` or declared: layers of a stack are then
        ranked one by one, and parts may name axes by their roles; see ``find_masks``.

    Returns:
      An iterator of ``Level``. Keep ``trained`` intact until the next level has been asked for:
      its masks are found from it.

    Raises:
      ValueError: a rate is outside [0, 1], ``rounds`` is negative, a regex matches no parameter,
        the parts do not fit the params, or the masks of ``start`` do not mirror them.
      TypeError: the criterion needs evidence and there is no ``evidence``.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> init = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> levels = jp.imp(init, lambda ticket, masks: ticket, rounds=2, rate=0.5)
      >>> [jp.sparsity(level.masks, init) for level in levels]
      [0.0, 0.5, 0.8]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_,
      2019. Renda et al., `Comparing Rewinding and Fine-tuning
      <https://arxiv.org/abs/2003.02389>`_, 2020.
    """
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"`imp` got rounds={rounds!r}. Use an integer from 0 on, such as 16.")
    parts = Parts("imp", criterion, pattern, scope, where, layout)
    rules = Rules(parts, rate, dict(rates or {}), evidence, restart).on(params_init)
    if evidence is None:
        check_evidence(criterion, rules.own_evidence(params_init))
    rules.check_fit(params_init)  # before anything trains
    level = None if start is None else _started(start, params_init)
    init = copy_arrays(params_init)

    def levels(level: Level | None) -> Iterator[Level]:
        while level is None or level.index < rounds:
            level = _train(after(level, init, rules), fit)
            yield level

    return levels(level)


def _train(level: Level, fit: Callable[[Params, Masks], Params]) -> Level:
    # `fit` gets a copy of its own: it may donate it.
    trained = fit(copy_arrays(level.ticket), level.masks)
    step = (
        "Let `fit(ticket, masks)` return the trained params alone; keep metrics outside, by a "
        "closure."
    )
    match(trained, level.ticket, "fit(ticket, masks)", of="the ticket", gaps="holes", step=step)
    return level._replace(trained=trained)


def _started(start: Any, params: Params) -> Level:
    """The level that a resumed search goes on from."""
    if not isinstance(start, Level):
        if len(start) != 3:
            raise ValueError(
                f"`imp(start=...)` got {len(start)} values. Pass the last finished level, or its "
                "`(index, masks, trained)`."
            )
        index, masks, trained = start
        start = Level(index, masks, None, trained)
    return check_level(start, params, "imp(start=...)", "start")
