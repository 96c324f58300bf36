"""Rearranged parameters: what of which parameter lies where, behind primitives that only move."""

# Each rule gives, for one operand and one of its sources, the source of each result; None where a
# result shows nothing of it.

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

from jaxprune.graph._collectives import MOVES
from jaxprune.graph._reshape import runs
from jaxprune.graph._site import Site
from jaxprune.graph._sources import (
    LOOKED_UP,
    Factor,
    Factors,
    Gone,
    Note,
    Source,
    Value,
    axes_in,
    blended,
    dropped,
    repeated,
    resized,
    split,
    without,
)

View: TypeAlias = Callable[[Site, int, Source], Sequence[Source | None]]

ONE_BY_ONE = "its indices are read one by one, in {}"


def _with(source: Source, axes: Sequence[Factors], gone: Sequence[Gone] = ()) -> Source:
    gone = [one for one in gone if one.axes]
    return dataclasses.replace(source, axes=tuple(axes), gone=(*source.gone, *gone))


def same(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    """Each operand is the result of the same place."""
    return [source if i == k else None for k in range(len(at.eqn.outvars))]


def alone(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    """The first operand is the result; others say how."""
    del at
    return [source if i == 0 else None]


def transpose(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    return [_with(source, [source.axes[k] for k in at.params["permutation"]])]


def squeeze(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    places = at.params["dimensions"]
    gone = dropped(source, places, at)
    return [dataclasses.replace(without(source, places, ()), gone=gone)]


def broadcast(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    shape, axes = at.out_shape(), [repeated(n) for n in at.out_shape()]
    for k, place in enumerate(at.params["broadcast_dimensions"]):
        axes[place] = stretched(source.axes[k], at.shape()[k], shape[place])
    return [_with(source, axes)]


def stretched(factors: Factors, old: int, new: int) -> Factors:
    """The factors of an axis that is repeated if it had a single index."""
    return factors if old == new else (*factors, Factor(frozenset(), new))


def tile(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    pairs = zip(source.axes, at.params["reps"], strict=True)
    return [_with(source, [f if n == 1 else (Factor(frozenset(), n), *f) for f, n in pairs])]


def reshape(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    """Lay the factors of merged axes in a row, and cut the row where the new axes end."""
    order = at.params["dimensions"] or range(len(source.axes))
    old, new = [at.shape()[k] for k in order], at.out_shape()
    moved = [source.axes[k] for k in order]
    if 0 in old:
        return [_with(source, [blended(tuple(f for a in moved for f in a), n) for n in new])]
    axes: list[Factors] = []
    single: list[int] = []
    for places, targets in runs(old, new):
        sizes = [new[k] for k in targets]
        if [old[k] for k in places] == sizes:
            axes += [moved[k] for k in places]
            continue
        single += [order[k] for k in places if old[k] == 1]
        axes += split(tuple(f for k in places for f in moved[k]), sizes)
    return [dataclasses.replace(_with(source, axes), gone=dropped(source, single, at))]


def slice_(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    return [_with(source, *_parts(at, source, at.shape(), at.out_shape()))]


def _parts(
    at: Site, source: Source, old: Sequence[int], new: Sequence[int]
) -> tuple[list[Factors], list[Gone]]:
    """Some indices of axes. A single one of many says nothing of the axis that it is from."""
    axes, gone = [], []
    for factors, n, m in zip(source.axes, old, new, strict=True):
        if m == 1 < n:
            gone.append(Gone(axes_in(factors), None, Note(ONE_BY_ONE, at)))
            axes.append(repeated(1))
        else:
            axes.append(resized(factors, n, m))
    return axes, gone


def split_(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    return [_with(source, *_parts(at, source, at.shape(), shape)) for shape in at.out_shapes()]


def unstack(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    place = at.params["axis"]
    gone = Gone(axes_in(source.axes[place]), None, Note(ONE_BY_ONE, at))
    return [without(source, [place], [gone])] * len(at.eqn.outvars)


def concatenate(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    place = at.params["dimension"]
    axes = list(source.axes)
    axes[place] = resized(axes[place], at.shape(i)[place], at.out_shape()[place])
    return [_with(source, axes)]


def stack(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    place, n = at.params["axis"], len(at.eqn.invars)
    return [_with(source, [*source.axes[:place], repeated(n), *source.axes[place:]])]


def pad(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    sizes = zip(source.axes, at.shape(), at.out_shape(), strict=True)
    return [_with(source, [resized(*each) for each in sizes])] if i == 0 else [None]


def updated(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    """What is written over, and what is written there."""
    if i > 1:
        return [None]
    sizes = zip(source.axes, at.shape(i), at.out_shape(), strict=True)
    return [_with(source, [resized(*each) for each in sizes])]


def all_gather(at: Site, i: int, source: Source) -> Sequence[Source | None]:
    place, n = at.params["all_gather_dimension"], at.params["axis_size"]
    axes = list(source.axes)
    if at.params["tiled"]:
        axes[place] = blended(axes[place], at.out_shape()[place])
    else:
        axes.insert(place, repeated(n))
    return [_with(source, axes)]


# Slices whose place is counted, known, or data.


def dynamic_slice(at: Site, source: Source, starts: Sequence[Value]) -> Source:
    """A slice of a parameter: of an axis that rounds of a loop count, that round's layer."""
    sizes = at.params["slice_sizes"]
    axes, gone = [], []
    for factors, n, m, start in zip(source.axes, at.shape(), sizes, starts, strict=True):
        if n == m:
            axes.append(factors)
            continue
        axes.append(_left(factors, m, start))
        gone += [taken(at, factors, start)] if m == 1 or start.kind != "constant" else []
    return _with(source, axes, gone)


def _left(factors: Factors, size: int, index: Value) -> Factors:
    """What is left along an axis of which some indices are picked."""
    return repeated(size) if size == 1 or index.kind == "data" else blended(factors, size)


def taken(at: Site, factors: Factors, index: Value) -> Gone:
    """What has become of an axis of which an index is picked."""
    if index.kind == "count":
        return Gone(axes_in(factors), "layer")
    text = ONE_BY_ONE if index.kind == "constant" else LOOKED_UP
    return Gone(axes_in(factors), None, Note(text, at))


def gather(at: Site, source: Source, index: Value) -> Source:
    """Rows of a parameter: those of a layer, those at places that are known, or by data.

    Batch axes of the result are those of the indices; what is picked lies along them if the places
    are known.
    """
    numbers, sizes = at.params["dimension_numbers"], at.params["slice_sizes"]
    shape, out = at.shape(), at.out_shape()
    batch = [k for k in range(len(out)) if k not in numbers.offset_dims]
    axes = [repeated(n) for n in out]
    offsets = iter(numbers.offset_dims)
    gone: list[Gone] = []
    collapsed = numbers.collapsed_slice_dims
    many = any(out[k] != 1 for k in batch)
    for i, factors in enumerate(source.axes):
        if i in numbers.operand_batching_dims:
            k = numbers.operand_batching_dims.index(i)
            axes[batch[numbers.start_indices_batching_dims[k]]] = factors
        elif i in collapsed:
            if shape[i] == 1:
                note = Note("its single index is read by {}", at)
                gone.append(Gone(axes_in(factors), None, note))
            elif index.kind == "constant" and many and len(collapsed) == 1:
                for k in batch:
                    axes[k] = blended(factors, out[k])
            elif index.kind == "count" and (many or len(collapsed) > 1):
                note = Note("{} reads several of its indices in each round of a loop", at)
                gone.append(Gone(axes_in(factors), None, note))
            else:
                gone.append(taken(at, factors, index))
        else:
            place = next(offsets)
            axes[place] = factors
            if sizes[i] != shape[i]:
                axes[place] = _left(factors, sizes[i], index)
                gone.append(_moving(at, factors, index, i, sizes[i]))
    return _with(source, axes, gone)


def _moving(at: Site, factors: Factors, index: Value, i: int, size: int) -> Gone:
    """A window of an axis, at places that an index says."""
    alone = at.params["dimension_numbers"].start_index_map == (i,)
    if index.kind == "count" and size == 1 and alone:
        return Gone(axes_in(factors), "layer")
    return Gone(axes_in(factors), None, Note("windows of it are read, in {}", at))


VIEWS: dict[str, View] = {
    "reshape": reshape,
    "transpose": transpose,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast,
    "tile": tile,
    "slice": slice_,
    "split": split_,
    "unstack": unstack,
    "concatenate": concatenate,
    "stack": stack,
    "pad": pad,
    "dynamic_update_slice": updated,
    **dict.fromkeys(("all_gather", "all_gather_invariant"), all_gather),
    **dict.fromkeys(("rev", "copy", "copy_p", "name", "convert_element_type"), alone),
    **dict.fromkeys(("reduce_precision", "stop_gradient", *MOVES), alone),
    **dict.fromkeys(("optimization_barrier", "sharding_constraint", "device_put"), same),
    **dict.fromkeys(("mesh_cast",), same),
}
