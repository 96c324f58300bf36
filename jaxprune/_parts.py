"""The four parts together: checked, settled on params, and asked what else they can do."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._errors import check_key, check_parts, check_sparsity
from jaxprune._evidence import check_names
from jaxprune._numbers import is_tree
from jaxprune._tree import map_leaves, prunable
from jaxprune.typing import Criterion, Masks, Params, Pattern, Scope, Sparsity, Units, Where

SETTINGS = (  # of `find_masks`, all but the params
    "criterion",
    "sparsity",
    "pattern",
    "scope",
    "where",
    "within",
    "rounds",
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Criterion, pattern, scope and where, as ``user`` (a public function) was given them.

    Hashable where the parts are, so that they can be static arguments of a jit.
    """

    user: str
    criterion: Criterion
    pattern: Pattern
    scope: Scope
    where: Where

    def __post_init__(self) -> None:
        check_parts(
            self.user,
            criterion=self.criterion,
            pattern=self.pattern,
            scope=self.scope,
            where=self.where,
        )

    def bind(self, params: Params) -> "Parts":
        """Settle the parts on params: what they cover, and that they go with one another.

        Raises:
          ValueError: a part does not fit the params, or the scope refuses the pattern.
        """
        pattern, scope = (
            _bound(part, params, where=self.where) for part in (self.pattern, self.scope)
        )
        refuses = ability(scope, "refuses")
        if why := refuses and refuses(pattern):
            raise ValueError(why)
        where = Owned(pattern) if hasattr(pattern, "owns") else self.where
        return dataclasses.replace(self, pattern=pattern, scope=scope, where=where)

    def prunable(self, params: Params) -> Params:
        """The leaves that these parts cover, None in the place of all others."""
        return prunable(params, where=self.where)

    def check(self, sparsity: Sparsity, *, exact: bool) -> None:
        """Let the scope refuse the pattern, or a sparsity, before anything is computed."""
        refuses, check = ability(self.scope, "refuses"), ability(self.scope, "check_sparsity")
        if why := refuses and refuses(self.pattern):
            raise ValueError(why)
        if check:
            check(sparsity, exact=exact)

    @property
    def crosses_leaves(self) -> bool:
        """True for units that own parts of several leaves."""
        return hasattr(self.pattern, "owns")

    def of_units(self, sparsity: Sparsity) -> Sparsity:
        """Of a tree of sparsities those of the units, where a pattern names them."""
        named = ability(self.pattern, "of_units")
        return named(sparsity) if named and is_tree(sparsity) else sparsity

    @property
    def can_count(self) -> bool:
        """True for a scope that counts beforehand."""
        return ability(self.scope, "counts") is not None

    def counts(self, units: Units, sparsity: Sparsity) -> Any:
        """What the scope takes for a sparsity: counts, if it counts beforehand."""
        counts = ability(self.scope, "counts")
        return counts(units, sparsity) if counts else sparsity

    def alive(self, part: Params, masks: Masks) -> Units:
        """Say which units are alive: those of which at least one weight is."""
        weights = map_leaves(
            lambda w, m: jnp.broadcast_to(m is None or m, w.shape).astype(jnp.float32), part, masks
        )
        return jax.tree.map(lambda share: share > 0, self.pattern.pool(weights))

    def keep(self, units: Units, amount: Any, alive: Units | None) -> Units:
        """Let the scope choose among units, and the pattern correct how many each group keeps."""
        chosen = (
            self.scope(units, amount) if alive is None else self.scope(units, amount, within=alive)
        )
        settle = ability(self.pattern, "settle")
        return settle(units, chosen, alive) if settle else chosen


@dataclasses.dataclass(frozen=True)
class Owned:
    """The leaves that a pattern owns: a ``where`` that equals that of an equal pattern.

    Methods of two equal patterns are not equal, and as static arguments would compile anew.
    """

    pattern: Any  # a CrossLeaf

    def __call__(self, path: str, array: jax.Array) -> bool:
        return self.pattern.owns(path, array)


def check_find(parts: Parts, sparsity: Sparsity, evidence: dict[str, Any], rounds: Any) -> None:
    """Refuse settings of ``find_masks`` before anything is computed."""
    check_sparsity(sparsity)
    check_names(parts.user, parts.criterion, evidence, SETTINGS)
    check_key(parts.user, evidence.get("key"))
    parts.check(sparsity, exact=True)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        wrong = ValueError if isinstance(rounds, int) else TypeError
        raise wrong(
            f"`{parts.user}` got rounds={rounds!r}. Use an integer from 1 on; 100 for SynFlow."
        )


def _bound(part: Any, params: Params, *, where: Where) -> Any:
    """Settle a part on params, if it is one that asks for them."""
    bind = ability(part, "bind")
    return bind(params, where=where) if bind else part


def ability(part: Any, name: str) -> Callable[..., Any] | None:
    """The method of a part by its name, with what ``functools.partial`` has bound to the part."""
    if isinstance(part, functools.partial):
        inner = ability(part.func, name)
        return inner and functools.partial(inner, *part.args, **part.keywords)
    return getattr(part, name, None)


def reads_lazily(scope: Scope) -> bool:
    """True for a scope whose units may be lazy."""
    return bool(getattr(getattr(scope, "func", scope), "lazy", False))


def is_elementwise(f: Any) -> bool:
    """True for what ``jp.elementwise`` has marked: a function, or the ``__call__`` of a part."""
    return bool(getattr(f, "elementwise", getattr(type(f).__call__, "elementwise", False)))
