"""One level of iterative pruning, and the pure step to the next."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxprune._errors import check_sparsity, short, whole
from jaxprune._evidence import check_names, required_evidence
from jaxprune._find import find, select
from jaxprune._help import readable
from jaxprune._layers import by_rules, check_rules
from jaxprune._layout import Layout
from jaxprune._masks import apply_masks, check_masks
from jaxprune._parts import Parts
from jaxprune._serial import serialize_tuple
from jaxprune._tree import (
    copy_arrays,
    is_matrix,
    map_with_path,
    match,
)
from jaxprune._where import compile_regex
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Criterion, Masks, Params, Pattern, Scope, Sparsity, Where


class Level(NamedTuple):
    """One level of iterative pruning.

    Attributes:
      index: number of rounds so far; 0 is the dense network.
      masks: masks of this level.
      ticket: masked params that this level starts from; None where nobody knows them any more.
      trained: what training made of the ticket; None as long as it has not.
    """

    index: int  # type: ignore[assignment]  # tuple.index, which nobody calls here
    masks: Masks
    ticket: Params | None
    trained: Params | None


serialize_tuple(Level)

Evidence = Callable[[Level], dict[str, Any]]
Restart = Callable[[Params, Params], Params]


def rewind_to_init(init: Params, trained: Params) -> Params:
    """Start every level from the initial params."""
    del trained
    return init


@readable
def next_level(
    level: Level | None,
    params_init: Params,
    *,
    rate: float = 0.2,
    rates: Mapping[str, float] | None = None,
    criterion: Criterion = magnitude,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    where: Where = is_matrix,
    evidence: Evidence | None = None,
    restart: Restart = rewind_to_init,
    layout: Layout | None = None,
) -> Level:
    """Prune and rewind: one step of ``imp``, for a loop of your own.

    Nothing trains here and nothing is remembered. Train ``level.ticket`` under ``level.masks``,
    put the result into the level, and ask for the next one, now or from a file in a year. The
    settings are those of ``imp`` and mean the same; give them alike at every step.

    Args:
      level: the level before, with its trained params; its ticket is not looked at unless
        ``evidence`` does, so ``Level(index, masks, None, trained)`` goes on from a file. None
        gives level 0, which is dense.
      params_init: where every level starts, like the trained params.
      rate: fraction of the remaining weights to remove.
      rates: exceptions to ``rate``, from regex (matching the whole path) to rate; first match.
      criterion: ranks the trained weights.
      pattern: what is removed together.
      scope: ``per_leaf`` ranks layer by layer, ``across`` globally (with one rate for all).
      where: which leaves are prunable.
      evidence: from the level before to what the criterion asks for, such as ``grads``.
        ``params_init`` is offered without it.
      restart: from initial and trained params to what the next level starts from.
      layout: what each axis means, from ``jp.find_layout`` or declared: layers of a stack are then
        ranked one by one, and parts may name axes by their roles; see ``find_masks``.

    Returns:
      The next ``Level``. Its masks are found from ``level.trained`` within ``level.masks``, its
      ticket is the masked start, a copy of its own where it is ``params_init``, and ``trained`` is
      None.

    Raises:
      ValueError: a rate is outside [0, 1], a regex matches no parameter, the parts do not fit the
        params, or ``level`` is not trained, or its masks or params are those of another network.
      TypeError: the criterion needs evidence and there is no ``evidence``, or ``level`` is none.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> init = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
      >>> level = None
      >>> for _ in range(3):
      ...     level = jp.next_level(level, init, rate=0.5)
      ...     level = level._replace(trained=level.ticket)  # your training run
      >>> level.index, jp.sparsity(level.masks, init)
      (2, 0.8)

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_,
      2019.
    """
    parts = Parts("next_level", criterion, pattern, scope, where, layout)
    rules = Rules(parts, rate, dict(rates or {}), evidence, restart).on(params_init)
    before = None if level is None else check_level(level, params_init, "next_level", "level")
    return after(before, params_init, rules)


@dataclasses.dataclass(frozen=True)
class Rules:
    """The settings of a search, the same at every level; ``parts.user`` was given them."""

    parts: Parts
    rate: float
    rates: Mapping[str, float]
    evidence: Evidence | None
    restart: Restart

    def on(self, params: Params) -> "Rules":
        """Check the settings; give them with the parts bound to these params."""
        user = self.parts.user
        check_sparsity(self.rate, f"{user}(rate)")
        check_sparsity(self.rates, f"{user}(rates)", layers=False)
        parts = self.parts.bind(params)
        for regex in self.rates:
            compile_regex(regex, f"{user}(rates)")
        check_rules(self.rates, parts.prunable(params), parts.layout, f"{user}(rates)")
        return dataclasses.replace(self, parts=parts)

    def check_fit(self, params: Params) -> None:
        """Let pattern and scope say what does not fit, from shapes alone."""
        part = self.parts.prunable(params)
        dense = self.parts.of_units(self.sparsity(0, params), part)
        jax.eval_shape(lambda p: select(self.parts, p, dense, None, like=p), part)

    def sparsity(self, index: int, params: Params) -> Sparsity:
        """The ladder: what is gone after ``index`` rounds, as a number or one a leaf.

        Counted from the dense network, not from the level before: 0.2 of what is left each time
        would be rounded each time.
        """

        def of_leaf(path: str, leaf: Any) -> Any:
            rate = by_rules(self.rates, self.rate, path, leaf, self.parts.layout)
            return 1.0 - (1.0 - rate) ** index

        if not self.rates:
            return 1.0 - (1.0 - self.rate) ** index
        return map_with_path(of_leaf, self.parts.prunable(params))

    def own_evidence(self, init: Params) -> dict[str, Any]:
        """What a criterion gets without asking the user."""
        asked = "params_init" in required_evidence(self.parts.criterion)
        return {"params_init": init} if asked else {}

    def evidence_of(self, level: Level) -> dict[str, Any]:
        """What the user's function found for the criterion, by name."""
        found = {} if self.evidence is None else self.evidence(level)
        if not isinstance(found, Mapping):
            raise TypeError(
                f"`{self.parts.user}(evidence=...)` returned {type(found).__name__}. Return a "
                "dict of what the criterion asks for, such as `{'grads': grads}`."
            )
        check_names(f"{self.parts.user}(evidence=...)", self.parts.criterion, found, ("rounds",))
        return dict(found)

    def find(
        self, params: Params, index: int, within: Masks | None, found: dict[str, Any]
    ) -> Masks:
        """Masks of level ``index``; the parts are settled."""
        # Nothing is removed at level 0, whatever the scores: no evidence needed.
        criterion = self.parts.criterion if index else magnitude
        parts = dataclasses.replace(self.parts, criterion=criterion)
        return find(parts, params, self.sparsity(index, params), found, within=within)


def after(level: Level | None, init: Params, rules: Rules) -> Level:
    """The level after one that was trained, not trained yet; all has been checked."""
    # The start is copied: `restart` may donate it, and the ticket, which shares the leaves that no
    # mask covers with what it is made from, may be donated to a training step.
    if level is None:
        masks = rules.find(init, 0, None, {})
        return Level(0, masks, apply_masks(copy_arrays(init), masks), None)
    evidence = rules.own_evidence(init) | rules.evidence_of(level)
    masks = rules.find(level.trained, level.index + 1, level.masks, evidence)
    begin = rules.restart(copy_arrays(init), level.trained)
    return Level(level.index + 1, masks, apply_masks(begin, masks), None)


def check_level(level: Any, params: Params, user: str, name: str) -> Level:
    """Refuse what is no trained level of these params; give its index as a Python int."""
    if not isinstance(level, Level):
        raise TypeError(
            f"`{user}` got level={short(level)}. Pass the `Level` before with its trained params, "
            "`jp.Level(index, masks, None, trained)`, or None for level 0."
        )
    index = whole(level.index)
    if index is None or index < 0:
        raise ValueError(
            f"`{user}` got level {level.index!r}. Pass the index of the last finished level."
        )
    if level.trained is None:
        raise ValueError(
            f"`{user}` got level {index} without trained params, by which weights are ranked. "
            "Train its ticket, and pass `level._replace(trained=...)`."
        )
    check_masks(level.masks, params, f"{name} masks")
    step = "Pass those of the same network."
    match(level.trained, params, f"{name} trained params", gaps="holes", step=step)
    return level._replace(index=index)
