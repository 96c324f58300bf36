"""The four parts together: checked, settled on params, and asked what else they can do."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._errors import check_key, check_parts, check_sparsity
from jaxprune._evidence import asks_for_layout, check_names
from jaxprune._layers import apart, apart_layout, beside, together
from jaxprune._layout import Layout, check_layout
from jaxprune._mesh import shapes_of
from jaxprune._numbers import is_tree
from jaxprune._ranking import is_lazy, named_leaves
from jaxprune._tree import Slot, align, map_leaves, prunable
from jaxprune._where import everything, with_layout
from jaxprune.typing import (
    Criterion,
    Masks,
    Params,
    Pattern,
    Scope,
    Scores,
    Sparsity,
    Tree,
    Units,
    Where,
)

SETTINGS = (  # of `find_masks`, all but the params
    "criterion",
    "sparsity",
    "pattern",
    "scope",
    "where",
    "within",
    "rounds",
    "layout",
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Criterion, pattern, scope and where, as ``user`` (a public function) was given them.

    Hashable where the parts are, so that they can be static arguments of a jit. With a layout the
    layers of a stack are layers: parts that know of layouts are bound to it, all others are shown
    the layers as leaves of their own.
    """

    user: str
    criterion: Criterion
    pattern: Pattern
    scope: Scope
    where: Where
    layout: Layout | None = None
    is_bound: bool = False
    apart_by: Layout | None = None  # once bound: pattern or scope know no layout, and see layers

    def __post_init__(self) -> None:
        check_layout(self.user, self.layout)
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
          ValueError: a part does not fit the params, the scope refuses the pattern, or the layout
            is that of another tree.
        """
        if self.is_bound:
            return self
        layout = None if self.layout is None else self.layout.on(params, self.user)
        where = with_layout(self.where, layout)
        seen, what, known = params, where, layout
        apart_by = None if self._knows_layouts else layout
        if apart_by is not None:
            part = shapes_of(prunable(params, where=where))
            seen, what, known = apart(part, apart_by), everything, apart_layout(apart_by, part)
        pattern = _bound(self.pattern, seen, where=what, layout=known)
        known = declared(pattern, "units_layout") or known  # of units that are no leaves
        scope = _bound(self.scope, seen, where=what, layout=known)
        refuses = declared(scope, "refuses")
        if why := refuses and refuses(pattern):
            raise ValueError(why)
        where = Owned(pattern) if declared(pattern, "owns") else where
        return dataclasses.replace(
            self,
            pattern=pattern,
            scope=scope,
            where=where,
            layout=layout,
            is_bound=True,
            apart_by=apart_by,
        )

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

    # The four questions, as they are put to parts that may not know of layers.

    def shown(self, tree: Tree, part: Params) -> Tree:
        """What a criterion sees of a tree beside ``part``: layers, unless it minds stacks itself.

        One that is elementwise has no use for them, one that names ``layout`` is given it.
        """
        return beside(tree, part, self.layout) if self.layout and self.shows_layers else tree

    @property
    def shows_layers(self) -> bool:
        """True if the criterion is shown the list of layers, since it may look at whole leaves."""
        inner = self.criterion
        while isinstance(inner, functools.partial):  # evidence that is bound to it stays stacked
            inner = inner.func
        minds_stacks = is_elementwise(inner) or asks_for_layout(self.criterion)
        return self.layout is not None and not minds_stacks

    def as_shown(self, tree: Tree, part: Params) -> Tree:
        """Put together again what a criterion made of the layers that it was shown."""
        if self.layout is None or not self.shows_layers:
            return tree
        of_layers = align(tree, self.shown(part, part)) is not None
        return together(tree, part, self.layout) if of_layers else tree

    @property
    def _knows_layouts(self) -> bool:
        """True if pattern and scope can rank the layers of a stack where they lie."""
        pattern = self.crosses_leaves or self.of_weights or knows_layouts(self.pattern)
        return pattern and (self.crosses_leaves or knows_layouts(self.scope))

    def pool(self, scores: Scores) -> Units:
        """Let the pattern make units of scores."""
        return self.pattern.pool(scores if self.apart_by is None else apart(scores, self.apart_by))

    def expand(self, keep: Units, *, like: Params) -> Masks:
        """Let the pattern make masks of what is kept."""
        if self.apart_by is None:
            return self.pattern.expand(keep, like=like)
        masks = self.pattern.expand(keep, like=apart(like, self.apart_by))
        return together(masks, like, self.apart_by)

    def block_of(self, slot: Slot) -> tuple[int, ...]:
        """How many weights are a unit along each axis of a leaf; () where each is one."""
        tile = declared(self.pattern, "tile")
        # A pattern that was shown layers knows their paths, not those of stacks.
        known = tile is not None and self.apart_by is None
        return tuple(tile(slot.path, len(slot.leaf.shape))) if known else ()

    @property
    def crosses_leaves(self) -> bool:
        """True for units that own parts of several leaves."""
        return declared(self.pattern, "owns") is not None

    def of_units(self, sparsity: Sparsity, part: Params) -> Sparsity:
        """Of a tree of sparsities those of the units, where a pattern names them."""
        if not is_tree(sparsity):
            return sparsity
        if self.apart_by is not None:
            return beside(sparsity, part, self.apart_by)
        named = declared(self.pattern, "of_units")
        return named(sparsity) if named else sparsity

    @property
    def can_count(self) -> bool:
        """True for a scope that counts beforehand."""
        return declared(self.scope, "counts") is not None

    def layers_of(self, units: Units) -> list[tuple[int, ...]]:
        """For each leaf of the units the axes that count layers."""
        layout = self.layout if self.apart_by is None else None
        return [layout.layers(s.path, s.leaf.ndim) if layout else () for s in named_leaves(units)]

    def apart_of(self, units: Units) -> list[tuple[int, ...]]:
        """For each leaf of the units the axes at each index of which they compete by themselves."""
        shapes = jax.tree.map(
            lambda u: jax.ShapeDtypeStruct(u.shape, u.dtype), units, is_leaf=is_lazy
        )
        return declared(self.scope, "apart")(shapes)

    def counts(self, units: Units, sparsity: Sparsity) -> Any:
        """What the scope takes for a sparsity: counts, if it counts beforehand."""
        counts = declared(self.scope, "counts")
        bound = _named(counts, getattr(self.scope, "keywords", {})) if counts else {}
        return counts(units, sparsity, **bound) if counts else sparsity

    def alive(self, part: Params, masks: Masks) -> Units:
        """Say which units are alive: those of which at least one weight is.

        Masks may be lazy where units are the weights, and so is then what is alive.
        """
        if is_elementwise(self.pattern.pool) and self.apart_by is None:
            whole = lambda w, m: m if is_lazy(m) else jnp.broadcast_to(m is None or m, w.shape)  # noqa: E731
            return map_leaves(whole, part, masks)
        weights = map_leaves(
            lambda w, m: jnp.broadcast_to(m is None or m, w.shape).astype(jnp.float32), part, masks
        )
        return jax.tree.map(lambda share: share > 0, self.pool(weights))

    @property
    def of_weights(self) -> bool:
        """True for a pattern whose units are the weights, scores and masks alike."""
        pattern = self.pattern
        return is_elementwise(pattern.pool) and is_elementwise(pattern.expand)

    @property
    def keeps_lazily(self) -> bool:
        """True if masks can be compared where they are stored, which needs a scope that says so."""
        lazily = declared(self.scope, "lazily") is not None
        return self.of_weights and self.can_count and lazily and self.apart_by is None

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


def _bound(part: Any, params: Params, *, where: Where, layout: Layout | None) -> Any:
    """Settle a part on params, if it is one that asks for them."""
    if isinstance(part, functools.partial):
        inner = _bound(part.func, params, where=where, layout=layout)
        # Partials equal only themselves: a new one would compile anew.
        new = functools.partial(inner, *part.args, **part.keywords)
        return part if inner is part.func else new
    bind = declared(part, "bind")
    known = {} if layout is None or not knows_layouts(part) else {"layout": layout}
    return bind(params, where=where, **known) if bind else part


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


def knows_layouts(part: Any) -> bool:
    """True for a part that takes a layout when it is bound; any other is shown layers as leaves."""
    bind = declared(part, "bind")
    return bind is not None and "layout" in inspect.signature(bind).parameters


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
