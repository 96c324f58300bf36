"""Rules for primitives that read or write at indices."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.graph._analysis import Axes, Axis, Rule, Site
from jaxprune.graph._shapes import beside, part
from jaxprune.graph._take import pick


def gather(at: Site) -> list[Axes]:
    """Axes that are taken whole pass through; those that are indexed stay whole.

    Indices that are known, such as a fixed permutation, move the ids along.
    """
    numbers, sizes = at.params["dimension_numbers"], at.params["slice_sizes"]
    x, indices = at.ins
    out: list[Axis | None] = [None] * len(at.out_shape())
    batch = [i for i in range(len(out)) if i not in numbers.offset_dims]
    for place, axis in zip(batch, indices[:-1], strict=True):
        out[place] = None if axis is None else Axis(axis.ids, False)
    at.freeze(indices[-1])
    moved = _known_rows(at)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    offsets = iter(numbers.offset_dims)
    for i, axis in enumerate(x):
        if i in numbers.operand_batching_dims:
            k = numbers.operand_batching_dims.index(i)
            place = batch[numbers.start_indices_batching_dims[k]]
            ids = at.join(axis, out[place])
            out[place] = axis if ids is None or axis is None else axis._replace(ids=ids)
        elif i in gone:
            if moved is not None and axis is not None:
                out[batch[0]] = axis._replace(ids=axis.ids[moved])
            else:
                at.freeze(axis)
        else:
            place = next(offsets)
            if sizes[i] == at.shape()[i]:
                out[place] = axis
            else:
                at.freeze(axis)
    return [tuple(out)]


def _known_rows(at: Site) -> np.ndarray | None:
    """Indices of one axis, known and more than one of them, each inside of the axis."""
    numbers, shape = at.params["dimension_numbers"], at.shape(1)
    sizes = at.params["slice_sizes"]
    if len(numbers.start_index_map) != 1 or len(shape) != 2 or shape[0] < 2:
        return None
    (axis,) = numbers.start_index_map
    whole = all(
        n == size for i, (n, size) in enumerate(zip(at.shape(), sizes, strict=True)) if i != axis
    )
    if numbers.collapsed_slice_dims != (axis,) or not whole or at.ins[0][axis] is None:
        return None
    rows = at.value(1)
    if rows is None:
        return None
    rows = rows.reshape(-1).astype(np.int64)
    inside = (rows >= 0).all() and (rows < at.shape()[axis]).all()
    return rows if inside else None


def cut_gather(at: Any, x: Any, indices: Any) -> list[Any]:
    numbers, sizes = at.params["dimension_numbers"], at.params["slice_sizes"]
    moved = _known_rows(at)
    if moved is not None:
        axis = numbers.start_index_map[0]
        place = next(i for i in range(x.ndim) if i not in numbers.offset_dims)
        have: list[Any] = [None] * x.ndim
        source, keep = list(have), list(have)
        have[axis], source[axis] = at.kept_ins()[0][axis], moved
        keep[axis] = at.kept_outs()[0][place]
        x = pick(x, have, source, keep)
        return [jnp.moveaxis(x, axis, place)]
    small = [n if s == whole else s for n, s, whole in zip(x.shape, sizes, at.shape(), strict=True)]
    return at.bind(x, indices, slice_sizes=tuple(small))


def dynamic_slice(at: Site) -> list[Axes]:
    """A slice at a known place is a slice; at an unknown place its axis stays whole."""
    out: list[Axis | None] = []
    sizes = at.params["slice_sizes"]
    for i, (axis, size) in enumerate(zip(at.ins[0], sizes, strict=True)):
        start = _known_start(at, i, size)
        if axis is None or size == at.shape()[i]:
            out.append(axis)
        elif start is None:
            at.freeze(axis)
            out.append(None)
        else:
            out.append(part(at, axis, slice(start, start + size)))
    return [tuple(out)]


def _known_start(at: Site, i: int, size: int) -> int | None:
    if at.ins[0][i] is None:
        return None
    value = at.value(1 + i)
    return None if value is None else int(np.clip(value, 0, at.shape()[i] - size))


def cut_dynamic_slice(at: Any, x: Any, *starts: Any) -> list[Any]:
    kept, sizes = at.kept_ins()[0], list(at.params["slice_sizes"])
    source: list[Any] = [None] * x.ndim
    for i, size in enumerate(sizes):
        if kept[i] is not None:
            start = _known_start(at, i, size)
            if size != at.shape()[i] and start is not None:
                source[i] = np.arange(start, start + size)
            sizes[i] = x.shape[i] if size == at.shape()[i] or start is not None else size
    (x,) = at.bind(x, *starts, slice_sizes=tuple(sizes))
    return [pick(x, kept, source, at.kept_outs()[0])]


def dynamic_update_slice(at: Site) -> list[Axes]:
    """Axes that are written whole are joined; one that is written in part stays whole."""
    x, update = at.ins[:2]
    out: list[Axis | None] = []
    for i, (a, b) in enumerate(zip(x, update, strict=True)):
        if at.shape(0)[i] == at.shape(1)[i]:
            out.append(beside(at, a, b))
        else:
            at.freeze(a)
            at.freeze(b)
            out.append(None)
    return [tuple(out)]


def scatter(at: Site) -> list[Axes]:
    """Likewise for writing at many places."""
    numbers = at.params["dimension_numbers"]
    x, indices, updates = at.ins
    for axis in indices:
        at.freeze(axis)
    inserted = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = iter(numbers.update_window_dims)
    out: list[Axis | None] = []
    for i, axis in enumerate(x):
        place = None if i in inserted else next(windows)
        if place is not None and at.shape(0)[i] == at.shape(2)[place]:
            both = beside(at, axis, updates[place])
            out.append(None if both is None else both.mixed())
            continue
        at.freeze(axis)
        if place is not None:
            at.freeze(updates[place])
        out.append(None)
    for place, axis in enumerate(updates):
        if place not in numbers.update_window_dims:
            at.freeze(axis)
    return [tuple(out)]


RULES = {
    "gather": Rule(gather, cut_gather),
    "dynamic_slice": Rule(dynamic_slice, cut_dynamic_slice),
    "dynamic_update_slice": Rule(dynamic_update_slice),
    **{
        name: Rule(scatter)
        for name in ("scatter", *(f"scatter-{how}" for how in ("add", "sub", "mul", "min", "max")))
    },
}
