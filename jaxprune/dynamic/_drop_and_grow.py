"""Drop the worst of the kept units and grow the most promising of the others."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import schedules
from jaxprune._errors import is_bool, whole
from jaxprune._parts import Parts
from jaxprune._ranking import (
    Lazy,
    Whole,
    count_none,
    count_true,
    floor,
    in_words,
    is_lazy,
    keep_largest,
    least,
    read,
    shape_of_counts,
    where,
)
from jaxprune._wrap import at_most_once
from jaxprune.typing import Masks, Params, Schedule, Scores, Units


class Moves(NamedTuple):
    """Which weights move, in trees like the masks; lazy where the scores were.

    Attributes:
      stay: of those that are kept.
      grow: of those that are not.
    """

    stay: Masks
    grow: Masks

    def of(self, masks: Masks) -> Masks:
        """What becomes of the masks that were found to move: read here and now."""
        moved = lambda old, stay, grow: (old & read(stay)) | (~old & read(grow))  # noqa: E731
        return jax.tree.map(moved, masks, self.stay, self.grow)


def drop_and_grow(
    masks: Masks,
    worth: Scores,
    promise: Scores,
    fraction: Any,
    *,
    like: Params,
    parts: Parts,
    due: jax.Array | bool = True,
) -> Moves:
    """Move a fraction of the kept units of each leaf: the worst ones to the most promising zeros.

    As many grow as are dropped, at most as many as were zero: the number kept stays the same, in
    each competition that the scope tells apart. The worst are those of the whole leaf, though: of
    two outputs with the kept units 1 2 and 3 4, half of which move, the first moves both.

    Args:
      masks: those in force; lazy ones where units are the weights.
      worth: scores of what is kept, stored or lazy.
      promise: scores of what is not.
      fraction: of the kept units of each leaf, or of each layer of a stack, `[]`.
      like: the prunable leaves.
      parts: bound to them.
      due: bool `[]`; nothing is counted or searched where it is False, and what came out means
        nothing.
    """
    due = jnp.asarray(due)
    alive = parts.alive(like, masks)
    dead = jax.tree.map(lambda a: _lazily(_removed, a), alive, is_leaf=is_lazy)
    units = parts.pool(worth)
    apart = parts.apart_of(units)
    sizes = _sizes(units, apart)
    kept = _counted(alive, apart, due)
    worst = _worst(units, alive, kept, fraction, parts=parts, due=due)
    moving = [least(m, n - k) for m, n, k in zip(worst, sizes, kept, strict=True)]
    staying = [where(due, k - m, n) for k, m, n in zip(kept, moving, sizes, strict=True)]
    growing = [where(due, m, n) for m, n in zip(moving, sizes, strict=True)]
    each = tuple((i,) for i in range(len(sizes)))
    stay = keep_largest(units, staying, each, alive)
    grow = keep_largest(parts.pool(promise), growing, each, dead)
    return Moves(parts.expand(stay, like=like), parts.expand(grow, like=like))


def _worst(
    units: Units, alive: Units, kept: list[Whole], fraction: Any, *, parts: Parts, due: jax.Array
) -> list[Whole]:
    """How many of the worst units of each leaf, or layer, are in each competition of the scope.

    A fraction of the few units of one output would round to none, for ever, at which few blocks
    of each column stay; so it is one of all units of the leaf.
    """
    apart, layers = parts.apart_of(units), parts.layers_of(units)
    if apart == layers:
        return [_floor(fraction, n) for n in kept]
    every = _counted(alive, layers, due)
    sizes = _sizes(units, layers)
    staying = [where(due, k - _floor(fraction, k), n) for k, n in zip(every, sizes, strict=True)]
    stay = keep_largest(units, staying, tuple((i,) for i in range(len(sizes))), alive)
    return _counted(jax.tree.map(_but, alive, stay, is_leaf=is_lazy), apart, due)


def _sizes(units: Units, apart: Sequence[tuple[int, ...]]) -> list[Whole]:
    """How many units each leaf has, or each of its competitions, in the shape of their counts."""
    leaves = jax.tree.leaves(units, is_leaf=is_lazy)
    return [_size(u, axes) for u, axes in zip(leaves, apart, strict=True)]


def _size(units: jax.Array | Lazy, apart: tuple[int, ...]) -> Whole:
    shape = shape_of_counts(units.shape, apart)
    if not shape:
        return in_words(units.size)
    each = in_words(units.size // max(math.prod(shape), 1))
    return Whole(np.full(shape, each.high), np.full(shape, each.low))


def _counted(some: Units, apart: Sequence[tuple[int, ...]], due: jax.Array) -> list[Whole]:
    """How many bools are True of each leaf, or of each of its competitions."""
    leaves = jax.tree.leaves(some, is_leaf=is_lazy)
    shapes = [shape_of_counts(a.shape, axes) for a, axes in zip(leaves, apart, strict=True)]

    def count(_: list[Whole]) -> list[Whole]:
        counts = [count_true(read(a), axes) for a, axes in zip(leaves, apart, strict=True)]
        flat = zip(counts, shapes, strict=True)
        return [jax.tree.map(lambda n, shape=shape: n.reshape(shape), c) for c, shape in flat]

    # What a loop carries varies over the mesh axes that the counts vary over.
    nothing = [
        in_words(count_none(jax.tree.leaves(a)[0], shape))
        for a, shape in zip(leaves, shapes, strict=True)
    ]
    return at_most_once(due, count, nothing)


def _floor(fraction: Any, n: Whole) -> Whole:
    # A little more than the product, so that half of 30 % of 100 is 15 and not 14.999999.
    # Above some ten thousand, float32 may be off by some millionth of the product either way.
    return least(floor(fraction * n.float + 1e-3), n)


def _lazily(f: Callable[..., jax.Array], mask: jax.Array | Lazy) -> jax.Array | Lazy:
    return Lazy((mask,), f, jnp.dtype(bool)) if is_lazy(mask) else f(mask)


def _removed(mask: jax.Array | Lazy) -> jax.Array:
    return ~read(mask)


def _but(mask: jax.Array | Lazy, other: jax.Array | Lazy) -> jax.Array | Lazy:
    """What is True of a mask and not of another one; lazy where the mask is."""
    lazy = Lazy((mask, other), _difference, jnp.dtype(bool))
    return lazy if is_lazy(mask) else read(lazy)


def _difference(mask: jax.Array | Lazy, other: jax.Array | Lazy) -> jax.Array:
    return read(mask) & ~read(other)


def decay(user: str, drop_fraction: float, begin: int, end: int, every: int) -> Schedule:
    """From drop_fraction to 0 along a cosine, and when."""
    number = isinstance(drop_fraction, int | float | jax.Array | np.generic)
    if not number or is_bool(drop_fraction):
        raise TypeError(
            f"`{user}(drop_fraction={drop_fraction!r})` is no number. Pass one in [0, 1], such as "
            "0.3."
        )
    if not isinstance(drop_fraction, jax.core.Tracer) and not 0.0 <= drop_fraction <= 1.0:
        raise ValueError(
            f"`{user}(drop_fraction={drop_fraction!r})` is outside [0, 1]. It is the fraction of "
            "the kept weights that moves at the first event; 0.3 is common."
        )

    def value(step: Any) -> jax.Array:
        time = jnp.clip((jnp.asarray(step) - first) / max(last - first, 1), 0.0, 1.0)
        return drop_fraction * 0.5 * (1.0 + jnp.cos(jnp.pi * time))

    # What is no step is told by `custom`, before it asks for a value.
    first, last = (whole(step) or 0 for step in (begin, end))
    return schedules.custom(value, begin, end, every)
