"""Rules for primitives that read or write at indices."""

# By an index that is data anything may be read: the axis that is indexed stays whole, and the axes
# that are read whole pass.
#
#     e = gather table tokens     table: f32[words, d]; words stay, d has the ids of e's last axis
#
# Where the index is known, ids move as in a slice: a fixed permutation of channels permutes ids.
# Small networks have other numbers for the same places, so that known indices are counted anew: the
# place 5 becomes 3 if two of the indices in front of it are gone.

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph._axes import ANYTHING, Axes, Axis, axis_of
from jaxprune.graph._shapes import part
from jaxprune.graph._site import Rule, Site
from jaxprune.graph._take import pick


def gather(at: Site) -> list[Axes]:
    """Axes that are taken whole pass through; those that are indexed stay whole.

    Indices that are known, such as a fixed permutation, move the ids along.
    """
    numbers, sizes = at.params["dimension_numbers"], at.params["slice_sizes"]
    x, indices = at.ins
    out: list[Axis | None] = [None] * len(at.out_shape())
    # Axes of a result are of two kinds: a batch axis for each axis of the indices but the last,
    # which holds an index, and an offset axis for each axis of the operand that is read by slices.
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


def cut_gather(at: Site, x: jax.Array, indices: jax.Array) -> list[jax.Array]:
    numbers, sizes = at.params["dimension_numbers"], at.params["slice_sizes"]
    moved = _known_rows(at)
    if moved is not None:
        axis = numbers.start_index_map[0]
        place = next(i for i in range(x.ndim) if i not in numbers.offset_dims)
        have: list[np.ndarray | None] = [None] * x.ndim
        source, keep = list(have), list(have)
        have[axis], source[axis] = at.kept_ins()[0][axis], moved
        keep[axis] = at.kept_outs()[0][place]
        x = pick(x, have, source, keep)
        return [jnp.moveaxis(x, axis, place)]
    # An axis that is read whole is read whole when it is smaller; of all others nothing is gone.
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


def cut_dynamic_slice(at: Site, x: jax.Array, *starts: jax.Array) -> list[jax.Array]:
    kept, sizes = at.kept_ins()[0], list(at.params["slice_sizes"])
    source: list[np.ndarray | None] = [None] * x.ndim
    for i, size in enumerate(sizes):
        if kept[i] is not None:
            start = _known_start(at, i, size)
            if size != at.shape()[i] and start is not None:
                source[i] = np.arange(start, start + size)
            sizes[i] = x.shape[i] if size == at.shape()[i] or start is not None else size
    (x,) = at.bind(x, *starts, slice_sizes=tuple(sizes))
    return [pick(x, kept, source, at.kept_outs()[0])]


def dynamic_update_slice(at: Site) -> list[Axes]:
    """Axes that are written whole are joined, and what is written of one at a known place."""
    starts = [_start(at, i) for i in range(len(at.ins[0]))]
    axes, sizes = zip(*at.ins[:2], strict=True), zip(at.shape(0), at.shape(1), strict=True)
    return [tuple(_written(at, *how) for how in zip(axes, sizes, starts, strict=True))]


def _start(at: Site, i: int) -> int | None:
    """Where an axis is written from on, if that is known."""
    n, size = at.shape(0)[i], at.shape(1)[i]
    value = at.value(2 + i) if n != size else None
    return None if value is None else int(np.clip(value, 0, n - size))


def _written(
    at: Site, axes: tuple[Axis | None, Axis | None], sizes: tuple[int, int], start: int | None
) -> Axis | None:
    """The axis of an array after some of it, from a known index on, or all of it, was written."""
    (axis, update), (n, size) = axes, sizes
    if n == size:
        return at.beside(axis, update)
    if axis is None or start is None:
        at.freeze(axis)
        at.freeze(update)
        return None
    # What is written goes with the indices that it is written to; all others keep what they had.
    piece = axis._replace(ids=axis.ids[start : start + size])
    at.join(piece, update)
    return axis_of(axis.ids, axis.values, ANYTHING if update is None else update.values)


def cut_update(at: Site, x: jax.Array, update: jax.Array, *starts: jax.Array) -> list[jax.Array]:
    """Count what is left in front of the place."""
    kept = at.kept_ins()[0]
    moved: list[jax.Array | np.ndarray] = []
    for i, (have, start) in enumerate(zip(kept, starts, strict=True)):
        known = None if have is None else _start(at, i)
        if have is None or known is None:
            moved.append(start)
        else:
            moved.append(np.asarray(np.sum(have < known), start.dtype))
    return at.bind(x, update, *moved)


def scatter(at: Site) -> list[Axes]:
    """Likewise for writing at many places."""
    numbers = at.params["dimension_numbers"]
    x, indices, updates = at.ins
    for axis in indices:
        at.freeze(axis)
    # As in a gather: updates have an axis for each that indices have, and window axes, which are
    # those of the array that are written by slices; inserted ones are written at one index.
    inserted = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    windows = iter(numbers.update_window_dims)
    rows = _known_places(at)
    out: list[Axis | None] = []
    for i, axis in enumerate(x):
        place = None if i in inserted else next(windows)
        if place is not None:
            n, size = sizes = at.shape(0)[i], at.shape(2)[place]
            start = None if rows is None or len(rows) > 1 else int(rows[0].get(i, 0))
            start = start if start is not None and 0 <= start <= n - size else None
            written = _written(at, (axis, updates[place]), sizes, start)
            out.append(None if written is None else written.mixed())
        elif axis is not None and (places := _places(at, rows, i)) is not None:
            update = updates[_free_dim(at)]
            at.join(axis._replace(ids=axis.ids[places]), update)
            values = ANYTHING if update is None else update.values
            out.append(axis_of(axis.ids, axis.values, values).mixed())
        else:
            at.freeze(axis)
            out.append(None)
    for place, axis in enumerate(updates):
        moved = rows is not None and len(rows) > 1 and place == _free_dim(at)
        if place not in numbers.update_window_dims and not moved:
            at.freeze(axis)
    return [tuple(out)]


def _known_places(at: Site) -> list[dict[int, int]] | None:
    """For each place that is written to its index along the axes of the array, if it is known."""
    numbers = at.params["dimension_numbers"]
    value = None if numbers.operand_batching_dims else at.value(1)
    if value is None or value.ndim > 2:
        return None
    rows = value.reshape(-1, value.shape[-1]).tolist()
    return [dict(zip(numbers.scatter_dims_to_operand_dims, row, strict=True)) for row in rows]


def _places(at: Site, rows: list[dict[int, int]] | None, i: int) -> np.ndarray | None:
    """The indices of one axis that several updates go to, if that axis alone is indexed."""
    if rows is None or len(rows) < 2 or list(rows[0]) != [i]:
        return None
    places = np.array([row[i] for row in rows])
    return places if (places >= 0).all() and (places < at.shape(0)[i]).all() else None


def _free_dim(at: Site) -> int:
    """The axis of the updates that runs over the places."""
    windows = at.params["dimension_numbers"].update_window_dims
    return next(i for i in range(len(at.shape(2))) if i not in windows)


def cut_scatter(at: Site, x: jax.Array, indices: jax.Array, updates: jax.Array) -> list[jax.Array]:
    """Count what is left in front of each place."""
    rows, kept = _known_places(at), at.kept_ins()[0]
    axes = at.params["dimension_numbers"].scatter_dims_to_operand_dims
    moved = [j for j, i in enumerate(axes) if kept[i] is not None]
    if rows is None or not moved:
        return at.bind(x, indices, updates)
    left = at.kept_ins()[2][_free_dim(at)] if len(rows) > 1 else None
    rows = rows if left is None else [rows[k] for k in left]
    table = np.array([[row[i] for i in axes] for row in rows], np.int64).reshape(-1, len(axes))
    for j in moved:
        table[:, j] = np.searchsorted(kept[axes[j]], table[:, j])
    shape = (len(rows), len(axes)) if len(at.shape(1)) > 1 else (len(axes),)
    return at.bind(x, table.reshape(shape).astype(indices.dtype), updates)


RULES = {
    "gather": Rule(gather, cut_gather),
    "dynamic_slice": Rule(dynamic_slice, cut_dynamic_slice),
    "dynamic_update_slice": Rule(dynamic_update_slice, cut_update),
    **{
        name: Rule(scatter, cut_scatter)
        for name in ("scatter", *(f"scatter-{how}" for how in ("add", "sub", "mul", "min", "max")))
    },
}
