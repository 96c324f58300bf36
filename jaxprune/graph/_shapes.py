"""Rules for primitives that move, repeat or make values without computing with them."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from jaxprune.graph._axes import Axes, Axis, axis_of
from jaxprune.graph._frames import Value
from jaxprune.graph._site import Rule, Site
from jaxprune.graph._take import pick, take


def reshape(at: Site) -> list[Axes]:
    """Merge and split axes, one run of axes with a common product at a time."""
    source, target = at.shape(), at.out_shape()
    if 0 in source:  # nothing to cut
        return opaque(at)
    out: list[Axis | None] = []
    for old, new in _runs(source, target):
        axes = [at.ins[0][i] for i in old]
        sizes, wanted = [source[i] for i in old], [target[i] for i in new]
        if [s for s in sizes if s != 1] == [s for s in wanted if s != 1]:
            moved = iter([axis for axis, s in zip(axes, sizes, strict=True) if s != 1])
            out += [None if s == 1 else next(moved) for s in wanted]
        elif all(axis is None for axis in axes):
            out += [None] * len(wanted)
        else:
            out += _split(at, _merge(at, axes, sizes), wanted)
    return [tuple(out)]


def _runs(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes into the shortest runs of equal product."""
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
    """Give an axis several factors, the first of them peeled off first."""
    whole = [s for s in sizes if s != 1]
    if len(whole) == 1:
        return [axis if s != 1 else None for s in sizes]
    if sizes[0] == 1:
        return [None, *_split(at, axis, sizes[1:])]
    rest = len(axis.ids) // sizes[0]
    table = axis.ids.reshape(sizes[0], rest)
    if (table == table[0]).all():  # it had been repeated
        return [None, *_split(at, axis._replace(ids=table[0]), sizes[1:])]
    if (table == table[:, :1]).all():
        return [axis._replace(ids=table[:, 0]), *([None] * (len(sizes) - 1))]
    rows, columns = at.fresh((sizes[0], rest), values=axis.values)
    at.analysis.coupling.product(axis.ids, rows.ids, columns.ids)  # type: ignore[union-attr]
    return [rows, *_split(at, columns, sizes[1:])]  # type: ignore[arg-type]


def cut_reshape(at: Site, x: jax.Array) -> list[jax.Array]:
    shape = at.small_shape()
    return [lax.reshape(x, shape, at.params["dimensions"], out_sharding=at.layout())]


def transpose(at: Site) -> list[Axes]:
    return [tuple(at.ins[0][i] for i in at.params["permutation"])]


def squeeze(at: Site) -> list[Axes]:
    return [tuple(a for i, a in enumerate(at.ins[0]) if i not in at.params["dimensions"])]


def broadcast_in_dim(at: Site) -> list[Axes]:
    """Pass axes on; those that appear get ids of their own, so that they can be made smaller."""
    shape = at.out_shape()
    out = list(at.fresh(shape, values=frozenset((at.scalar(0),))))
    for i, place in enumerate(at.params["broadcast_dimensions"]):
        if at.shape()[i] == shape[place]:
            out[place] = at.ins[0][i]
    return [tuple(out)]


def cut_broadcast(at: Site, x: jax.Array, *_: jax.Array) -> list[jax.Array]:
    places = at.params["broadcast_dimensions"]
    return [lax.broadcast_in_dim(x, at.small_shape(), places, out_sharding=at.layout())]


def tile(at: Site) -> list[Axes]:
    """Repeat ids with what they stand for; a size of 1 is broadcast."""
    out: list[Axis | None] = []
    fresh = at.fresh(at.out_shape(), values=frozenset((at.scalar(0),)))
    for i, (axis, n) in enumerate(zip(at.ins[0], at.params["reps"], strict=True)):
        repeated = None if axis is None else axis._replace(ids=np.tile(axis.ids, n))
        out.append(fresh[i] if at.shape()[i] == 1 else repeated)
    return [tuple(out)]


def cut_tile(at: Site, x: jax.Array) -> list[jax.Array]:
    return at.bind(x, reps=tuple(n // m for n, m in zip(at.small_shape(), x.shape, strict=True)))


def make(at: Site) -> list[Axes]:
    """Values that the program makes: any index can be left out of them."""
    at.freeze_all()
    return [at.fresh(shape) for shape in at.out_shapes()]


def cut_made(at: Site, *values: Value) -> list[Value]:
    """Make them whole and cut them then, so that the numbers stay the same."""
    outs = at.bind(*values)
    return [take(x, kept) for x, kept in zip(outs, at.kept_outs(), strict=True)]


def opaque(at: Site) -> list[Axes]:
    """Keys and their like: nothing in them is ever cut."""
    return at.freeze_all()


def concatenate(at: Site) -> list[Axes]:
    place = at.params["dimension"]
    out: list[Axis | None] = []
    for i in range(len(at.out_shape())):
        axes = [operand[i] for operand in at.ins]
        if i != place:
            out.append(at.beside(*axes))
        elif all(axis is None for axis in axes):
            out.append(None)
        else:
            out.append(_in_a_row(at, axes, [at.shape(k)[i] for k in range(len(axes))]))
    return [tuple(out)]


def _in_a_row(at: Site, axes: Sequence[Axis | None], sizes: Sequence[int]) -> Axis:
    """One axis after another; where one cannot be cut its indices stay."""
    parts = []
    for axis, size in zip(axes, sizes, strict=True):
        ids = at.analysis.coupling.fresh(size) if axis is None else axis.ids
        if axis is None:
            at.freeze(Axis(ids, False), lambda: f"{at.name()} lays it beside what stays whole")
        parts.append(ids)
    return axis_of(np.concatenate(parts), *(axis.values for axis in axes if axis is not None))


def stack(at: Site) -> list[Axes]:
    """Join the operands; the axis along which they lie stays whole."""
    place = at.params["axis"]
    joined = [at.beside(*axes) for axes in zip(*at.ins, strict=True)]
    return [(*joined[:place], None, *joined[place:])]


def unstack(at: Site) -> list[Axes]:
    """Likewise backwards: every index of the axis becomes a result of its own."""
    place = at.params["axis"]
    at.freeze(at.ins[0][place])
    return [tuple(a for i, a in enumerate(at.ins[0]) if i != place)] * len(at.eqn.outvars)


def split(at: Site) -> list[Axes]:
    place, start, outs = at.params["axis"], 0, []
    for size in at.params["sizes"]:
        out = list(at.ins[0])
        out[place] = part(at, out[place], slice(start, start + size))
        outs.append(tuple(out))
        start += size
    return outs


def cut_split(at: Site, x: jax.Array) -> list[jax.Array]:
    place = at.params["axis"]
    return at.bind(x, sizes=tuple(at.small_shape(i)[place] for i in range(len(at.params["sizes"]))))


def part(at: Site, axis: Axis | None, piece: slice) -> Axis | None:
    """Some indices of an axis. A single one has to stay: without it the slice would be empty."""
    if axis is None:
        return None
    ids = axis.ids[piece]
    if len(ids) == 1 and len(axis.ids) > 1:
        at.freeze(Axis(ids, False), lambda: f"{at.name()} picks this index alone")
        return None
    return axis._replace(ids=ids) if len(ids) > 1 else None


def slice_(at: Site) -> list[Axes]:
    start, limit = at.params["start_indices"], at.params["limit_indices"]
    strides = at.params["strides"] or (1,) * len(start)
    pieces = map(slice, start, limit, strides)
    return [tuple(part(at, axis, piece) for axis, piece in zip(at.ins[0], pieces, strict=True))]


def cut_slice(at: Site, x: jax.Array) -> list[jax.Array]:
    start, limit = at.params["start_indices"], at.params["limit_indices"]
    strides = at.params["strides"] or (1,) * len(start)
    whole = [kept is None for kept in at.kept_ins()[0]]
    x = lax.slice(
        x,
        [s if w else 0 for s, w in zip(start, whole, strict=True)],
        [m if w else n for m, w, n in zip(limit, whole, x.shape, strict=True)],
        [t if w else 1 for t, w in zip(strides, whole, strict=True)],
    )
    wanted = [
        None if w else np.arange(*piece)
        for piece, w in zip(zip(start, limit, strides, strict=True), whole, strict=True)
    ]
    return [pick(x, at.kept_ins()[0], wanted, at.kept_outs()[0])]


def rev(at: Site) -> list[Axes]:
    return [
        tuple(
            axis._replace(ids=axis.ids[::-1]) if i in at.params["dimensions"] and axis else axis
            for i, axis in enumerate(at.ins[0])
        )
    ]


def pad(at: Site) -> list[Axes]:
    """What pads an axis that can be cut is cut or stays by itself."""
    out: list[Axis | None] = []
    for axis, (low, high, inside) in zip(at.ins[0], at.params["padding_config"], strict=True):
        if axis is None or (low, high, inside) == (0, 0, 0):
            out.append(axis)
        elif low < 0 or high < 0 or inside:
            at.freeze(axis)
            out.append(None)
        else:
            fresh = at.analysis.coupling.fresh
            ids = np.concatenate([fresh(low), axis.ids, fresh(high)])
            out.append(axis_of(ids, axis.values, frozenset((at.scalar(1),))))
    return [tuple(out)]


def cut_pad(at: Site, x: jax.Array, value: jax.Array) -> list[jax.Array]:
    config = []
    sides = zip(at.params["padding_config"], at.kept_outs()[0], at.shape(0), strict=True)
    for (low, high, inside), kept, size in sides:
        if kept is not None:
            low, high = int(np.sum(kept < low)), int(np.sum(kept >= low + size))  # noqa: PLW2901
        config.append((low, high, inside))
    return [lax.pad(x, value, config)]


RULES = {
    "reshape": Rule(reshape, cut_reshape),
    "transpose": Rule(transpose),
    "squeeze": Rule(squeeze),
    "broadcast_in_dim": Rule(broadcast_in_dim, cut_broadcast),
    "tile": Rule(tile, cut_tile),
    "iota": Rule(make, cut_made),
    "random_bits": Rule(make, cut_made),
    "rng_bit_generator": Rule(opaque),
    "rng_uniform": Rule(make, cut_made),
    "empty": Rule(make, cut_made),
    "empty2": Rule(make, cut_made),
    "iota_2x32_shape": Rule(make, cut_made),
    **{
        name: Rule(opaque)
        for name in (
            *("random_wrap", "random_unwrap", "random_seed", "random_fold_in", "random_split"),
            *(
                "random_clone",
                "random_gamma",
                "threefry2x32",
                "threefry4x32",
                "axis_index",
                "platform_index",
            ),
        )
    },
    "concatenate": Rule(concatenate),
    "stack": Rule(stack),
    "unstack": Rule(unstack),
    "split": Rule(split, cut_split),
    "slice": Rule(slice_, cut_slice),
    "rev": Rule(rev),
    "pad": Rule(pad, cut_pad),
}
