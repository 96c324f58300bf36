"""Rules for primitives that move, repeat or make values without computing with them."""

# Ids move with the values that they stand for: a transpose permutes axes, `rev` turns ids round, a
# slice takes some of them, `concatenate` lays them in a row. Cutting undoes nothing of that, as the
# same indices are gone on both sides; only params that name sizes or places have to be made anew.
#
#     a, b = split[sizes=(4, 4)] x      a has ids 0..3, b has ids 4..7
#     y = mul a b                       joins 0 with 4, ...: halves of a gated unit lose the same
#
# What appears from nowhere (broadcasts, iota) gets fresh ids, since it can be made in any size.

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax

from jaxprune.graph._axes import Axes, Axis, axis_of
from jaxprune.graph._frames import Value
from jaxprune.graph._site import Rule, Site
from jaxprune.graph._take import pick, take


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
    "transpose": Rule(transpose),
    "squeeze": Rule(squeeze),
    "broadcast_in_dim": Rule(broadcast_in_dim, cut_broadcast),
    "tile": Rule(tile, cut_tile),
    **{name: Rule(make, cut_made) for name in ("iota", "iota_2x32_shape", "empty", "empty2")},
    **{name: Rule(opaque) for name in ("axis_index", "platform_index")},
    "concatenate": Rule(concatenate),
    "stack": Rule(stack),
    "unstack": Rule(unstack),
    "split": Rule(split, cut_split),
    "slice": Rule(slice_, cut_slice),
    "rev": Rule(rev),
    "pad": Rule(pad, cut_pad),
}
