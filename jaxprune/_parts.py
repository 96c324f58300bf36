"""The four parts together: checked, settled on params, and asked what else they can do."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._errors import check_key, check_parts, check_sparsity
from jaxprune._evidence import check_names
from jaxprune._numbers import is_tree
from jaxprune._ranking import is_lazy
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
    is_bound: bool = False

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
        if self.is_bound:
            return self
        pattern, scope = (
            _bound(part, params, where=self.where) for part in (self.pattern, self.scope)
        )
        refuses = declared(scope, "refuses")
        if why := refuses and refuses(pattern):
            raise ValueError(why)
        where = Owned(pattern) if declared(pattern, "owns") else self.where
        return dataclasses.replace(self, pattern=pattern, scope=scope, where=where, is_bound=True)

    def prunable(self, params: Params) -> Params:
        """The leaves that these parts cover, None in the place of all others."""
        return prunable(params, where=self.where)

    def check(self, sparsity: Sparsity, *, exact: bool) -> None:
        """Let the scope refuse the pattern, or a sparsity, before anything is computed."""
        refuses, check = (declared(self.scope, name) for name in ("refuses", "check_sparsity"))
        if why := refuses and refuses(self.pattern):
            raise ValueError(why)
        if check:
            check(sparsity, exact=exact)

    @property
    def crosses_leaves(self) -> bool:
        """True for units that own parts of several leaves."""
        return declared(self.pattern, "owns") is not None

    def of_units(self, sparsity: Sparsity) -> Sparsity:
        """Of a tree of sparsities those of the units, where a pattern names them."""
        named = declared(self.pattern, "of_units")
        return named(sparsity) if named and is_tree(sparsity) else sparsity

    @property
    def can_count(self) -> bool:
        """True for a scope that counts beforehand."""
        return declared(self.scope, "counts") is not None

    def counts(self, units: Units, sparsity: Sparsity) -> Any:
        """What the scope takes for a sparsity: counts, if it counts beforehand."""
        counts = declared(self.scope, "counts")
        bound = _named(counts, getattr(self.scope, "keywords", {})) if counts else {}
        return counts(units, sparsity, **bound) if counts else sparsity

    def alive(self, part: Params, masks: Masks) -> Units:
        """Say which units are alive: those of which at least one weight is.

        Masks may be lazy where units are the weights, and so is then what is alive.
        """
        if is_elementwise(self.pattern.pool):
            whole = lambda w, m: m if is_lazy(m) else jnp.broadcast_to(m is None or m, w.shape)  # noqa: E731
            return map_leaves(whole, part, masks)
        weights = map_leaves(
            lambda w, m: jnp.broadcast_to(m is None or m, w.shape).astype(jnp.float32), part, masks
        )
        return jax.tree.map(lambda share: share > 0, self.pattern.pool(weights))

    @property
    def of_weights(self) -> bool:
        """True for a pattern whose units are the weights, scores and masks alike."""
        pattern = self.pattern
        return is_elementwise(pattern.pool) and is_elementwise(pattern.expand)

    @property
    def keeps_lazily(self) -> bool:
        """True if masks can be compared where they are stored, which needs a scope that says so."""
        return self.of_weights and self.can_count and declared(self.scope, "lazily") is not None

    def keep(self, units: Units, amount: Any, alive: Units | None) -> Units:
        """Let the scope choose among units, and the pattern correct how many each group keeps."""
        if self.keeps_lazily:
            lazily = declared(self.scope, "lazily")
            return lazily(units, amount, within=alive, **getattr(self.scope, "keywords", {}))
        chosen = (
            self.scope(units, amount) if alive is None else self.scope(units, amount, within=alive)
        )
        settle = declared(self.pattern, "settle")
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
    if isinstance(part, functools.partial):
        inner = _bound(part.func, params, where=where)
        # Partials equal only themselves: a new one would compile anew.
        new = functools.partial(inner, *part.args, **part.keywords)
        return part if inner is part.func else new
    bind = declared(part, "bind")
    return bind(params, where=where) if bind else part


def declared(part: Any, name: str) -> Any:
    """What a part declares by a name, or None: a method, or a mark.

    ``functools.partial`` declares what is inside of it. What ``functools.wraps`` has copied to a
    wrapper counts for nothing: the wrapper may do anything.
    """
    if isinstance(part, functools.partial):
        return declared(part.func, name)
    mine = getattr(part, name, None)
    copied = getattr(getattr(part, "__wrapped__", None), name, None)
    return None if mine is copied else mine


def _named(f: Callable[..., Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """Those of some keywords that a function takes."""
    return {k: v for k, v in keywords.items() if k in inspect.signature(f).parameters}


def reads_lazily(scope: Scope) -> bool:
    """True for a scope whose units may be lazy."""
    return bool(declared(scope, "lazy"))


def is_elementwise(f: Any) -> bool:
    """True for what ``jp.elementwise`` has marked: a function, or the ``__call__`` of a part.

    Not for a partial: evidence that is bound to it is not taken apart by leaves.
    """
    if isinstance(f, functools.partial):
        return False
    return bool(declared(f, "elementwise") or declared(type(f).__call__, "elementwise"))
