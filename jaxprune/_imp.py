"""Iterative pruning with rewinding: the search for lottery tickets, as a generator."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxprune._errors import check_parts, check_sparsity
from jaxprune._evidence import check_evidence, check_names, required_evidence
from jaxprune._find import SETTINGS, find_compiled, fit_parts, rank
from jaxprune._help import readable
from jaxprune._masks import apply_masks, check_masks
from jaxprune._serial import serialize_tuple
from jaxprune._tree import (
    align,
    check_regexes_match,
    copy_arrays,
    is_matrix,
    map_with_path,
    prunable,
)
from jaxprune._where import compile_regex, matches
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Criterion, Masks, Params, Pattern, Scope, Where


class Level(NamedTuple):
    """One level of iterative pruning.

    Attributes:
      index: number of rounds so far; 0 is the dense network.
      masks: masks of this level.
      ticket: masked params that this level started from.
      trained: what ``fit`` made of the ticket.
    """

    index: int  # type: ignore[assignment]  # tuple.index, which nobody calls here
    masks: Masks
    ticket: Params
    trained: Params


serialize_tuple(Level)


def rewind_to_init(init: Params, trained: Params) -> Params:
    """Start every level from the initial params."""
    del trained
    return init


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
    evidence: Callable[[Level], dict[str, Any]] | None = None,
    restart: Callable[[Params, Params], Params] = rewind_to_init,
    start: tuple[int, Masks, Params] | None = None,
) -> Iterator[Level]:
    """Train, prune, rewind, and again: iterative magnitude pruning.

    After n rounds a leaf of N weights has lost exactly ``round((1 - (1 - rate)**n) * N)`` of
    them, and what is gone stays gone. Three ways to go on after a round:

    - weight rewinding (default): every level starts from ``params_init``. Rewinding to step k is
      the same with the params of step k as ``params_init``, in a ``fit`` that goes on from k.
    - fine-tuning: ``restart=lambda init, trained: trained`` with a short ``fit``.
    - learning-rate rewinding: the same ``restart`` with a ``fit`` that runs the full schedule.

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
      start: ``(index, masks, trained)`` of a finished level: goes on with the next one.

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
    check_parts("imp", criterion=criterion, pattern=pattern, scope=scope, where=where)
    check_sparsity(rate, "imp(rate)")
    check_sparsity(dict(rates or {}), "imp(rates)")
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"`imp` got rounds={rounds!r}. Use an integer from 0 on, such as 16.")
    asks_for_start = "params_init" in required_evidence(criterion)
    if evidence is None:
        check_evidence(criterion, {"params_init": params_init} if asks_for_start else {})
    pattern, where = fit_parts(pattern, where, params_init)
    part = prunable(params_init, where=where)
    rules = dict(rates or {})
    for regex in rules:
        compile_regex(regex, "imp(rates)")
    check_regexes_match(tuple(rules), part, "imp(rates)")

    def sparsity(index: int) -> Any:
        """The ladder: what is gone after ``index`` rounds, as a number or one a leaf."""

        def of_leaf(path: str, _: Any) -> float:
            chosen = next((r for regex, r in rules.items() if matches(regex, path)), rate)
            return 1.0 - (1.0 - chosen) ** index

        return map_with_path(of_leaf, part) if rules else 1.0 - (1.0 - rate) ** index

    def first_masks(p: Params) -> Masks:
        return rank(p, sparsity(0), pattern=pattern, scope=scope, within=None)

    jax.eval_shape(first_masks, part)  # what does not fit is told before anything trains
    if start is not None:
        _check_start(start, params_init)
    init = copy_arrays(params_init)
    own = {"params_init": init} if asks_for_start else {}

    def levels() -> Iterator[Level]:
        if start is None:
            level = train(0, find(init, 0, None, {}), init)
            yield level
        else:
            index, masks, trained = start
            level = Level(index, masks, trained, trained)
        while level.index < rounds:
            found = own | (_read_evidence(evidence(level), criterion) if evidence else {})
            masks = find(level.trained, level.index + 1, level.masks, found)
            begin = restart(copy_arrays(init), level.trained)
            level = train(level.index + 1, masks, begin)
            yield level

    def find(params: Params, index: int, within: Masks | None, found: dict[str, Any]) -> Masks:
        return find_compiled(
            params,
            sparsity(index),
            found,
            # Nothing is removed at level 0, whatever the scores: no evidence needed.
            criterion=criterion if index else magnitude,
            pattern=pattern,
            scope=scope,
            where=where,
            within=within,
        )

    def train(index: int, masks: Masks, begin: Params) -> Level:
        ticket = apply_masks(begin, masks)
        # `fit` gets a copy of its own: it may donate it.
        trained = fit(copy_arrays(ticket), masks)
        _check_trained(trained, ticket)
        return Level(index, masks, ticket, trained)

    return levels()


def _read_evidence(found: Any, criterion: Criterion) -> dict[str, Any]:
    """What the user's function found for the criterion, by name."""
    if not isinstance(found, Mapping):
        raise TypeError(
            f"`imp(evidence=...)` returned {type(found).__name__}. Return a dict of what the "
            "criterion asks for, such as `{'grads': grads}`."
        )
    check_names("imp(evidence=...)", criterion, found, SETTINGS[-1:])
    return dict(found)


def _check_trained(trained: Any, ticket: Params) -> None:
    """Refuse what ``fit`` returned if it is not the params, as soon as it has."""
    if align(trained, ticket) is None:
        what = "None" if trained is None else f"{type(trained).__name__} {_shape_of(trained)}"
        raise TypeError(
            f"`imp` got {what} from `fit`, wanted trained params like the ticket. Let "
            "`fit(ticket, masks)` return the params alone; keep metrics outside, by a closure."
        )


def _shape_of(tree: Any) -> str:
    shown = str(jax.tree.structure(tree))
    return shown if len(shown) <= 120 else f"of {len(jax.tree.leaves(tree))} leaves"


def _check_start(start: tuple[int, Masks, Params], params: Params) -> None:
    if len(start) != 3:
        raise ValueError(
            f"`imp(start=...)` got {len(start)} values. Pass the `(index, masks, trained)` of the "
            "last finished level."
        )
    index, masks, trained = start
    if not isinstance(index, int) or index < 0:
        raise ValueError(
            f"`imp(start=...)` got level {index!r}. Pass the index of the last finished level."
        )
    check_masks(masks, params, "start masks")
    if align(trained, params) is None:
        raise ValueError(
            f"`imp(start=...)` got trained params {jax.tree.structure(trained)}, but the initial "
            f"ones are {jax.tree.structure(params)}. Pass those of the same network."
        )
