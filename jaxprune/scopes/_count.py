"""How many units go: ``round(sparsity * n)``, counted by Python where the number is known."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._layout import Layout
from jaxprune._numbers import is_number, is_tree
from jaxprune._ranking import (
    AxisName,
    Shard,
    Whole,
    floor,
    in_words,
    is_lazy,
    named_leaves,
    read,
    shape_of_counts,
    where,
)
from jaxprune._tree import Keys, leaves_by_keys, list_paths
from jaxprune.typing import Params, Pattern, Sparsity, Units, Where

MOST_UNITS = 2**31 - 1  # that an int32 counts; beyond it counts are ``Whole``


class Counts(NamedTuple):
    """What our scopes take in the place of a sparsity: how many units each ranking keeps.

    Attributes:
      kept: integers, or ``Whole``, known or traced, in an order that the scope knows.
    """

    kept: tuple[Any, ...]


F = TypeVar("F", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class WithLayout:
    """A scope that is a plain function, settled on the params of a layout."""

    scope: Any
    layout: Layout
    lazy: ClassVar[bool] = True

    def __call__(self, units: Units, sparsity: Sparsity, **settings: Any) -> Units:
        return self.scope(units, sparsity, layout=self.layout, **settings)

    def counts(
        self,
        units: Units,
        sparsity: Sparsity,
        *,
        axis_name: AxisName | None = None,
        specs: Any = None,
    ) -> Counts:
        """How many units stay, as the function counts."""
        mesh = {} if axis_name is None else {"axis_name": axis_name, "specs": specs}
        return self.scope.counts(units, sparsity, layout=self.layout, **mesh)

    def lazily(self, units: Units, sparsity: Sparsity, **settings: Any) -> Units:
        """What stays, lazily where units are lazy."""
        return self.scope.lazily(units, sparsity, layout=self.layout, **settings)

    def apart(self, units: Units) -> list[tuple[int, ...]]:
        """The axes that the function tells apart."""
        return self.scope.apart(units, self.layout)

    def refuses(self, pattern: Pattern) -> str | None:
        """Refuse what the function refuses."""
        return self.scope.refuses(pattern)


def _refuses_none(pattern: Pattern) -> str | None:
    del pattern
    return None


def _fits(params: Params, where: Where, layout: Layout | None) -> None:
    """Let a scope that asks for no axis by its role take any params."""
    del params, where, layout


def counted_by(
    counts: Callable[..., Any],
    lazily: Callable[..., Units],
    *,
    refuses: Callable[[Pattern], str | None] = _refuses_none,
    fits: Callable[[Params, Where, Layout | None], None] = _fits,
    apart: Callable[..., list[tuple[int, ...]]] | None = None,
) -> Callable[[F], F]:
    """Let a scope that is a plain function declare what it can do beside ranking.

    Args:
      counts: how it counts.
      lazily: how it keeps lazily.
      refuses: why it does not go with a pattern.
      fits: raises for params whose axes are not known as it needs them.
      apart: from units and a layout to the axes that tell the competitions of each leaf apart; None
        where leaves compete with one another.
    """

    def declare(scope: Any) -> Any:
        def bind(params: Params, *, where: Where, layout: Layout | None = None) -> Any:
            fits(params, where, layout)
            return scope if layout is None else WithLayout(scope, layout)

        scope.counts, scope.lazily, scope.lazy = counts, lazily, True
        scope.refuses, scope.bind = refuses, bind
        if apart is not None:
            scope.apart = apart
        return scope

    return declare


def read_kept(keep: Units, within: Units) -> Units:
    """Bools of what a scope keeps lazily, without what is gone already."""
    if within is None:
        return jax.tree.map(read, keep, is_leaf=is_lazy)
    return jax.tree.map(lambda k, alive: read(k) & read(alive), keep, within, is_leaf=is_lazy)


def removed(sparsity: Any, n: int) -> Any:
    """Count the units to remove out of ``n``: ``round(sparsity * n)``, ties to even.

    Of an array of sparsities each for itself.

    A number that is known now is multiplied in float64. A traced one is the float32 that it is,
    and so is the product: within 1 + n / 2**23 of the count for the number that was meant, which
    is exact but for ties up to some hundred thousand units. Where the number is known, ask here
    outside of the trace, and let the count be what is traced.

    Args:
      sparsity: a number in [0, 1] or an array of them `[...]`, known or traced.
      n: units.

    Returns:
      An integer of Python, or an array `[...]`: int32, or ``Whole`` from 2**31 units on.
    """
    if is_number(sparsity):
        if np.ndim(sparsity) == 0:
            return round(float(sparsity) * n)
        each = [round(float(s) * n) for s in np.ravel(sparsity)]
        high = stack(each) if n > MOST_UNITS else np.array(each, np.int32)
        return jax.tree.map(lambda x: x.reshape(np.shape(sparsity)), high)
    share = jnp.asarray(sparsity)
    wide = share.astype(jnp.promote_types(share.dtype, jnp.float32))  # an integer is 0 or 1
    # Above 2**24 a float32 may round up to more than there are.
    most = np.nextafter(wide.dtype.type(n), 0) if wide.dtype.type(n) > n else wide.dtype.type(n)
    count = jnp.round(jnp.minimum(wide * float(n), most))
    if n <= MOST_UNITS:
        return jnp.where(wide >= 1, n, count.astype(jnp.int32))
    return where(wide >= 1, in_words(n), floor(count))


def leaves_of(units: Units) -> list[Any]:
    """The units of each leaf, lazy ones as they are."""
    return jax.tree.leaves(units, is_leaf=is_lazy)


def one_each(units: Units, sparsity: Sparsity, user: str) -> list[Any]:
    """List the sparsity of each leaf of ``units``, in order, from a number or a tree of them."""
    if not is_tree(sparsity):
        return [sparsity] * len(leaves_of(units))
    wanted = [slot.keys for slot in named_leaves(units)]
    given: dict[Keys, Any] = leaves_by_keys(sparsity)
    missing = ["/".join(keys) for keys in wanted if keys not in given]
    extra = ["/".join(keys) for keys in given if keys not in wanted]
    if missing or extra:
        inside = any(name.startswith(f"{path}/") for path in missing for name in extra)
        layers = " Numbers for the layers of a stack are one array, `np.array([...])`." * inside
        raise ValueError(
            f"`{user}` got a tree of sparsities that does not mirror the prunable leaves: none "
            f"for {list_paths(missing)}; not prunable {list_paths(extra)}. Make it with "
            f"`jp.scopes.uniform`, `erk` or `custom` and the same `where`.{layers}"
        )
    return [given[keys] for keys in wanted]


def each_layer(
    units: Units, sparsities: Sequence[Any], layout: Layout | None, user: str
) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Say for each leaf how its layers lie, and the sparsity of each of them.

    Returns:
      The shape of its counts, `()` for a leaf that is no stack, and a number or an array of that
      shape for each leaf.

    Raises:
      ValueError: an array of sparsities of another length than there are layers.
    """
    shapes, numbers, wrong = [], [], []
    for slot, s in zip(named_leaves(units), sparsities, strict=True):
        rank = slot.leaf.ndim
        layers = () if layout is None else layout.layers(slot.path, rank)
        shapes.append(shape_of_counts(slot.leaf.shape, layers))
        lengths = tuple(slot.leaf.shape[i] for i in layers)
        if np.ndim(s) == 0:
            numbers.append(s)
        elif layers and np.shape(s) == lengths:
            numbers.append(s.reshape(shapes[-1]))
        else:
            has = f"{lengths} layers" if layers else "no layers" if layout else "no layout"
            wrong.append(f"{np.shape(s)} at {slot.path!r}, which has {has}")
    if wrong:
        raise ValueError(
            f"`{user}` got sparsities of shape {'; '.join(wrong)}. Pass one number for the leaf, "
            "or one for each layer and `layout=`, which says what counts layers."
        )
    return shapes, numbers


def kept_in_layers(
    units: Units,
    sizes: Sequence[int],
    sparsities: Sequence[Any],
    layout: Layout | None,
    user: str,
) -> Counts:
    """Count what stays of each leaf, or of each layer of a stack."""
    shapes, numbers = each_layer(units, sparsities, layout, user)
    inside = [n // max(math.prod(s), 1) for n, s in zip(sizes, shapes, strict=True)]
    counts = kept(inside, numbers).kept
    return Counts(tuple(over(n, shape) for n, shape in zip(counts, shapes, strict=True)))


def over(count: Any, shape: tuple[int, ...]) -> Any:
    """The same count, or one each, for all competitions of a leaf."""
    if not shape or jnp.shape(jax.tree.leaves(count)[0]) == shape:
        return count
    known = not any(isinstance(x, jax.Array) for x in jax.tree.leaves(count))
    broadcast: Any = np.broadcast_to if known else jnp.broadcast_to
    return jax.tree.map(lambda x: broadcast(np.int32(x) if known else x, shape), count)


def in_order(parts: Sequence[Shard], units: Units, layout: Layout | None) -> list[Shard]:
    """Let each layer of a stack come whole before the next, wherever its axis is."""
    if layout is None:
        return list(parts)
    found = []
    for part, slot in zip(parts, named_leaves(units), strict=True):
        first = layout.layers(slot.path, slot.leaf.ndim)
        lie_so = first == tuple(range(len(first)))
        found.append(part if lie_so else dataclasses.replace(part, first=first))
    return found


def kept(sizes: Sequence[int], sparsities: Sequence[Any]) -> Counts:
    """Count what stays of each ranking."""
    # Once for all rankings of a size: as traced operations they are the most of a trace.
    pairs = [(id(s), n) for s, n in zip(sparsities, sizes, strict=True)]
    distinct = {(id(s), n): (s, n) for s, n in zip(sparsities, sizes, strict=True)}
    counts = {pair: _kept(*given) for pair, given in distinct.items()}
    return Counts(tuple(counts[pair] for pair in pairs))


def _kept(sparsity: Any, n: int) -> Any:
    out = removed(sparsity, n)
    if n <= MOST_UNITS:
        return n - out
    return in_words(n - out) if isinstance(out, int) else in_words(n) - out


def stack(numbers: Sequence[int]) -> Whole:
    """Large integers as one array of two words."""
    words = list(map(in_words, numbers))
    return Whole(np.stack([w.high for w in words]), np.stack([w.low for w in words]))
