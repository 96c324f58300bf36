"""Small rectangles of weights."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxprune._axes import axes_of, check_named, check_role
from jaxprune._layout import Layout
from jaxprune._tree import leaves_with_path, map_with_path, prunable
from jaxprune.patterns._reduce import check_reduce, reduce_scores
from jaxprune.typing import Masks, Params, Scores, Units, Where


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rectangles of weights over the last axes live or die together.

    ``Blocks((4, 4))`` tiles the last two axes. Where a block does not divide the axis, the last
    one is smaller and is scored by the weights that it has.

    Attributes:
      shape: size of a block along the last ``len(shape)`` axes, or along ``axes``.
      reduce: how a block is scored from its weights: ``"mean"``, ``"sum"`` or ``"norm"``.
      axes: which axes the sizes belong to, by number or by role, as in ``("in", "out")``: blocks of
        a convolution then lie inside of each place of its window. Roles take a ``layout=`` where
        the pattern is used; with one, numbers count the axes of one layer of a stack.
      layout: what each axis means; filled in by whoever uses the pattern.

    Raises:
      TypeError: ``shape`` is not a tuple of integers, or ``axes`` no tuple of as many axes.
      ValueError: a size below 1, an axis twice, or ``reduce`` or a role is unknown; when used, a
        leaf has fewer axes, no such axis, or several of a role.

    Example:
      >>> import jax.numpy as jnp
      >>> Blocks((1, 2)).pool({"w": jnp.array([[1.0, 3.0, 5.0]])})  # the last block is ragged
      {'w': Array([[2., 5.]], dtype=float32)}
    """

    shape: tuple[int, ...]
    reduce: str = "mean"
    axes: tuple[int | str, ...] | None = None
    layout: Layout | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        sizes = tuple(self.shape) if isinstance(self.shape, (tuple, list)) else ()
        if not sizes or not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
            raise TypeError(
                f"`Blocks(shape={self.shape!r})` needs a tuple of integers, one for each of the "
                "last axes, such as (4, 4)."
            )
        if min(sizes) < 1:
            raise ValueError(
                f"`Blocks(shape={self.shape!r})` has a size below 1. Use 1 for an axis that is "
                "not blocked."
            )
        check_reduce(self.reduce, "Blocks")
        object.__setattr__(self, "shape", sizes)  # a list would not be hashable
        if self.axes is not None:
            object.__setattr__(self, "axes", _checked_axes(self.axes, sizes))

    def __repr__(self) -> str:
        axes = "" if self.axes is None else f", axes={self.axes}"
        return f"Blocks(shape={self.shape}, reduce={self.reduce!r}{axes})"

    def bind(self, params: Params, *, where: Where, layout: Layout | None = None) -> "Blocks":
        """Settle it on params: along which axes of each leaf the blocks lie."""
        part = leaves_with_path(prunable(params, where=where))
        shapes = {path: leaf.shape for path, leaf in part}
        check_named(layout, shapes, self.axes or (), repr(self), single=True)
        return self if layout == self.layout else dataclasses.replace(self, layout=layout)

    def pool(self, scores: Scores) -> Units:
        """Score each block: of an axis of ``a`` there are ``ceil(a / size)``."""
        self._check(scores)
        return map_with_path(self._pool_leaf, scores)

    def expand(self, keep: Units, *, like: Params) -> Masks:
        """Repeat each block over its weights: full masks."""
        return map_with_path(lambda path, w, k: self._expand_leaf(path, k, w.shape), like, keep)

    def tile(self, path: str, rank: int) -> tuple[int, ...]:
        """Give the size of a block along each axis of a leaf; () if its axes do not suffice."""
        names = self.axes or tuple(range(-len(self.shape), 0))
        found = [axes_of(self.layout, path, rank, name) for name in names]
        places = [axes[0] for axes in found if axes]
        if len(set(places)) < len(names):
            return ()
        at = dict(zip(places, self.shape, strict=True))
        return tuple(at.get(i, 1) for i in range(rank))

    def _pool_leaf(self, path: str, scores: jax.Array) -> jax.Array:
        sizes = self.tile(path, scores.ndim)
        inside, tiled = _tiling(scores.shape, sizes)
        pooled = reduce_scores(self.reduce, _split(scores, sizes, tiled), inside)
        if self.reduce == "mean":  # the padding took part as zeros; divide by what is really there
            blocked = [n if size > 1 else 1 for n, size in zip(scores.shape, sizes, strict=True)]
            there = _split(jnp.ones(blocked, jnp.float32), sizes, _tiling(blocked, sizes)[1])
            pooled = pooled / reduce_scores("mean", there, inside)
        return jnp.squeeze(pooled, axis=inside)

    def _expand_leaf(self, path: str, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        sizes = self.tile(path, len(shape))
        inside, tiled = _tiling(shape, sizes)
        full = jnp.broadcast_to(jnp.expand_dims(keep, inside), tiled)
        full = full.reshape([n * size for n, size in zip(keep.shape, sizes, strict=True)])
        return full[tuple(slice(n) for n in shape)]

    def _check(self, scores: Scores) -> None:
        check_named(self.layout, {}, self.axes or (), repr(self), single=True)
        bad: list[str] = []

        def visit(path: str, s: jax.Array) -> None:
            if not self.tile(path, s.ndim):
                twice = self.axes is not None and s.ndim >= len(self.shape)
                why = ", of which it names an axis twice or one that is not there" * twice
                bad.append(f"{path!r} of shape {s.shape}{why}")

        map_with_path(visit, scores)
        if bad:
            raise ValueError(
                f"`Blocks({self.shape})` needs at least {len(self.shape)} axes, but has "
                f"{', '.join(bad)}. Choose a shorter `shape`, or exclude them with `where`."
            )


def _checked_axes(axes: object, sizes: tuple[int, ...]) -> tuple[int | str, ...]:
    """Refuse axes that are not as many as the sizes, or name one twice."""
    given = tuple(axes) if isinstance(axes, tuple | list) else ()
    if len(given) != len(sizes) or not all(type(axis) in (int, str) for axis in given):
        raise TypeError(
            f"`Blocks({sizes}, axes={axes!r})` needs an axis for each of the {len(sizes)} sizes, "
            'such as ("in", "out").'
        )
    for axis in given:
        check_role(axis, f"Blocks({sizes}, axes={axes!r})")
    if len(set(given)) < len(given):
        raise ValueError(
            f"`Blocks({sizes}, axes={axes!r})` names an axis twice. Name each once, with one size."
        )
    return given


def _tiling(shape: Sequence[int], sizes: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes inside a block, and the shape with every blocked axis split into (blocks, size)."""
    tiled: list[int] = []
    inside: list[int] = []
    for n, size in zip(shape, sizes, strict=True):
        tiled.append(-(-n // size))
        if size > 1:
            inside.append(len(tiled))
            tiled.append(size)
    return tuple(inside), tuple(tiled)


def _split(x: jax.Array, sizes: Sequence[int], tiled: tuple[int, ...]) -> jax.Array:
    """Pad with zeros to whole blocks and split the axes."""
    short = [(0, -n % size) for n, size in zip(x.shape, sizes, strict=True)]
    return jnp.pad(x, short).reshape(tiled)
