"""The rule for reshapes: axes that are merged into one, and one that is split into several."""

# Where a reshape moves nothing but the ones of a shape, ids pass. Where it merges or splits, an
# index of the one side is a pair of indices of the other, outermost first:
#
#     y: f32[1,12] = x @ w
#     z: f32[1,3,4] = reshape y     channel 7 of `y` is (head 1, part 3), as 7 = 1 * 4 + 3
#
# Neither head nor part alone can be told from the other in `y`: a channel stays where its head and
# its part both do. That is a product (`Coupling.product`): cells `[heads, parts]` are the ids of
# `y`, rows and columns get ids of their own. A head dies with all of its channels.
#
# Not every merge is a product: an axis of a broadcast repeats the ids of the other, and a split of
# what had been repeated gives back what it was made of.

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from jaxprune.graph._axes import Axes, Axis
from jaxprune.graph._site import Rule, Site


def reshape(at: Site) -> list[Axes]:
    """Merge and split axes, one run of axes with a common product at a time."""
    order = at.params["dimensions"] or range(len(at.shape()))  # it may transpose before
    source, target = [at.shape()[i] for i in order], at.out_shape()
    given = [at.ins[0][i] for i in order]
    if 0 in source:  # nothing to cut
        return at.freeze_all()
    out: list[Axis | None] = []
    for old, new in runs(source, target):
        axes = [given[i] for i in old]
        sizes, wanted = [source[i] for i in old], [target[i] for i in new]
        if [s for s in sizes if s != 1] == [s for s in wanted if s != 1]:
            moved = iter([axis for axis, s in zip(axes, sizes, strict=True) if s != 1])
            out += [None if s == 1 else next(moved) for s in wanted]
        elif all(axis is None for axis in axes):
            out += [None] * len(wanted)
        else:
            out += _split(at, _merge(at, axes, sizes), wanted)
    return [tuple(out)]


def runs(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes into the shortest runs of equal product, as numbers of axes on both sides.

    ``(2, 12, 5)`` and ``(2, 3, 4, 5)`` are three runs: 2 and 2, 12 and (3, 4), 5 and 5.
    """
    runs, i, j = [], 0, 0
    while i < len(source) or j < len(target):
        old, new = [i] if i < len(source) else [], [j] if j < len(target) else []
        i, j = i + len(old), j + len(new)
        left, right = math.prod(source[a] for a in old), math.prod(target[b] for b in new)
        while left != right:
            if (i < len(source)) and (j >= len(target) or left < right):
                old, left, i = [*old, i], left * source[i], i + 1
            else:
                new, right, j = [*new, j], right * target[j], j + 1
        runs.append((old, new))
    return runs


def _merge(at: Site, axes: Sequence[Axis | None], sizes: Sequence[int]) -> Axis:
    """Lay several axes out along one; an axis that is never cut repeats the others."""
    parts = [(a, s) for a, s in zip(axes, sizes, strict=True) if s != 1]
    axis, size = parts[-1]
    for outer, n in reversed(parts[:-1]):
        if axis is None and outer is not None:
            axis = outer._replace(ids=np.repeat(outer.ids, size))
        elif axis is not None and outer is None:
            axis = axis._replace(ids=np.tile(axis.ids, n))
        elif axis is not None and outer is not None:
            axis = at.product(outer, axis)
        size *= n
    return axis  # type: ignore[return-value]  # one of them is an axis


def _split(at: Site, axis: Axis, sizes: Sequence[int]) -> list[Axis | None]:
    """Give an axis several factors, the first of them peeled off first.

    Of 24 channels as (2, 3, 4) the product is (2, 12), and that of the 12 is (3, 4).
    """
    whole = [s for s in sizes if s != 1]
    if len(whole) == 1:
        return [axis if s != 1 else None for s in sizes]
    if sizes[0] == 1:
        return [None, *_split(at, axis, sizes[1:])]
    rest = len(axis.ids) // sizes[0]
    table = axis.ids.reshape(sizes[0], rest)
    if (table == table[0]).all():  # it had been tiled: the outer factor decides nothing
        return [None, *_split(at, axis._replace(ids=table[0]), sizes[1:])]
    if (table == table[:, :1]).all():  # each of its ids had been repeated: nor does the inner one
        return [axis._replace(ids=table[:, 0]), *([None] * (len(sizes) - 1))]
    rows, columns = at.fresh((sizes[0], rest), values=axis.values)
    at.analysis.coupling.product(axis.ids, rows.ids, columns.ids)  # type: ignore[union-attr]
    return [rows, *_split(at, columns, sizes[1:])]  # type: ignore[arg-type]


def cut_reshape(at: Site, x: jax.Array) -> list[jax.Array]:
    shape = at.small_shape()
    return [lax.reshape(x, shape, at.params["dimensions"], out_sharding=at.layout())]


RULES = {"reshape": Rule(reshape, cut_reshape)}
