"""Parameters that functions are applied to before they meet data: what becomes of their zeros."""

# A weight is removed by making it zero, and the network sees what a function makes of that:
#
#     s = softplus r         a removed entry is 0.69: its zero is none of the network
#     u = w / norm(w)        one removed weight is zero, but of a row without any, 0 / 0 is NaN
#     v = round(w / s) * s   stays zero, whatever `s` is: the same as `w` for who prunes
#
# Two numbers are followed: what a removed weight becomes if the others stay (`one`), and if all
# beside it go, too (`all`). A number that depends on other weights is None.

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax.numpy as jnp

from jaxprune.graph._axes import Values
from jaxprune.graph._elementwise import evaluate_at, result
from jaxprune.graph._frames import dtype_of
from jaxprune.graph._site import Site
from jaxprune.graph._sources import (
    Factors,
    Gone,
    Note,
    Number,
    Source,
    Value,
    axes_in,
    repeated,
    weights,
)
from jaxprune.graph._views import stretched

Own: TypeAlias = Sequence[
    Sequence[tuple[Source, Source]]
]  # of each operand, in the result and as is

_OTHER = Source(-1, (), one=None, all=None)  # entries that do not go with those that are removed
_ZERO_OF_ZEROS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")


def elementwise(at: Site, ins: Sequence[Value]) -> Value:
    """Parameters and numbers, element by element; each parameter is looked at by itself."""
    pairs = [(i, source) for i, value in enumerate(ins) for source in value.sources]
    told = {source.leaf for _, source in pairs if not _is_blank(source)}
    by_leaf: dict[int, list[list[Source]]] = {leaf: [[] for _ in ins] for leaf in told}
    for i, source in pairs:
        if source.leaf in told:
            by_leaf[source.leaf][i].append(source)
    found = [source for own in by_leaf.values() for source in _of_leaf(at, ins, own)]
    axes = tuple(map(repeated, at.out_shape()))
    rest = [source for _, source in pairs if source.leaf not in told]
    return weights([*found, *(dataclasses.replace(s, axes=axes) if axes else s for s in rest)])


def _is_blank(source: Source) -> bool:
    """Tell whether a number was made of a whole parameter, as in a penalty: it stays that."""
    return source.axes == () and source.is_mixed and source.one is source.all is None


def _of_leaf(at: Site, ins: Sequence[Value], given: Sequence[Sequence[Source]]) -> list[Source]:
    """The sources of one parameter in a result, with what its zeros become.

    Where a parameter meets what it was reduced to, as in a norm of itself, its axes are those of
    what was not reduced.
    """
    own = [[(_placed(at, i, s), s) for s in sources] for i, sources in enumerate(given)]
    every = [placed for pairs in own for placed, _ in pairs]
    kept = [s for s in every if not s.is_mixed] or every
    scales = at.primitive in ("mul", "div") and _is_smaller(kept, ins, every[0].leaf)
    return [_changed(at, source, ins, own, scales) for source in kept]


def _changed(at: Site, source: Source, ins: Sequence[Value], own: Own, scales: bool) -> Source:
    """A source in a result. Of ``w + w.T`` an entry does not go with one of ``w``."""
    together = [
        [s if s.is_mixed or _lies_alike(placed, source) else _OTHER for placed, s in pairs]
        for pairs in own
    ]
    one = _becomes(at, ins, [[s.one for s in sources] for sources in together])
    every = _becomes(at, ins, [[s.all for s in sources] for sources in together])
    through = source.through
    if source.stays_zero and not (one == 0 and every == 0):
        through = Note("{}", at)
    kind = "gain" if scales else source.kind
    return dataclasses.replace(source, one=one, all=every, through=through, kind=kind)


def _lies_alike(a: Source, b: Source) -> bool:
    return a.axes == b.axes and a.gone == b.gone


def _is_smaller(kept: Sequence[Source], ins: Sequence[Value], leaf: int) -> bool:
    """Tell whether a parameter only scales a larger one."""
    others = [s for value in ins for s in value.sources if s.leaf != leaf and not s.is_mixed]
    return max(map(_entries, kept)) < max(map(_entries, others), default=0)


def _entries(source: Source) -> int:
    return math.prod(f.size for factors in source.axes for f in factors if f.axes)


def _placed(at: Site, i: int, source: Source) -> Source:
    """A source in a result, repeated where it has one index and the result has several."""
    shape, out = at.shape(i), at.out_shape()
    if len(shape) != len(out):  # a number beside an array, as a predicate may be
        return dataclasses.replace(source, axes=tuple(repeated(n) for n in out))
    sizes = zip(source.axes, shape, out, strict=True)
    return dataclasses.replace(source, axes=tuple(stretched(*each) for each in sizes))


def _becomes(at: Site, ins: Sequence[Value], own: Sequence[Sequence[Number]]) -> Number:
    """What a removed weight becomes. ``own`` says what each operand makes of it, if anything."""
    told = [_agreed(numbers) for numbers in own]
    shown = [i for i, numbers in enumerate(own) if numbers]
    if at.primitive in ("mul", "and") and any(told[i] == 0 for i in shown):
        rest = [told[i] for i in shown]
        return 0.0 if all(v is None or math.isfinite(v) for v in rest) else math.nan
    values = [
        told[i] if i in shown else None if ins[i].sources else _number(at, i)
        for i in range(len(ins))
    ]
    if at.primitive == "select_n":
        return _selected(values, shown)
    known = any(told[i] is not None for i in shown)
    if not known or any(_does_not_fit(at, i, v) for i, v in enumerate(values)):
        return None
    return _computed(at, values, {i: frozenset((told[i],)) for i in shown})


def _computed(at: Site, values: Sequence[Number], shown: Mapping[int, Values]) -> Number:
    """What a function makes of some numbers, of which None may be any."""
    if None in values:
        number, finite = result(at, values, shown)
        return number if finite else math.nan
    found = evaluate_at(at, values)
    if found is None or isinstance(found, complex):
        return 0.0 if found == 0 else None
    return math.nan if math.isnan(found) else float(found)


def _does_not_fit(at: Site, i: int, value: Number) -> bool:
    """Tell whether a number cannot be written in the type of an operand."""
    whole = not jnp.issubdtype(dtype_of(at.eqn.invars[i]), jnp.inexact)
    return whole and value is not None and not math.isfinite(value)


def _agreed(numbers: Sequence[Number]) -> Number:
    """The number, if there is one that all say."""
    same = len(set(map(str, numbers))) == 1  # NaN equals NaN here
    return numbers[0] if same else None


def _number(at: Site, i: int) -> Number:
    """The number that a constant is everywhere, if it is one."""
    value = at.value(i)
    if value is None or not value.size or value.dtype.kind not in "fiub":
        return None
    first = value.reshape(-1)[0]
    return float(first) if (value == first).all() else None


def _selected(values: Sequence[Number], shown: Sequence[int]) -> Number:
    """What is there where the one or the other is selected; a mask that is constant hides some."""
    which, *cases = values
    if which is not None:
        return cases[int(which)]
    if 0 not in shown:
        cases = [case for i, case in enumerate(cases) if i + 1 in shown]
    return _agreed(cases)


def reduced(at: Site, value: Value) -> Value:
    """Parameters summed over some axes, or the largest of them."""
    return weights([_reduced(at, source) for source in value.sources])


def _reduced(at: Site, source: Source) -> Source:
    places = at.params["axes"]
    axes = tuple(factors for k, factors in enumerate(source.axes) if k not in places)
    own = frozenset[int]().union(*(axes_in(source.axes[k]) for k in places))
    left = dataclasses.replace(source, axes=axes)
    if not own and at.primitive == "reduce_sum" and source.stays_zero:
        return left  # as often as it was repeated
    gone = Gone(own, None, Note("{} runs over it without data", at), reduced=True)
    # Of a leaf reduced to one number other slices are left, whichever goes.
    zeros = at.primitive in _ZERO_OF_ZEROS and source.all == 0 and not left.is_reduced
    return dataclasses.replace(
        left,
        gone=(*source.gone, gone) if own else source.gone,
        one=None,
        all=0.0 if zeros else None,
        through=source.through or Note("{}", at),
    )


def multiplied(at: Site, pair: Sequence[Sequence[Source]]) -> Value:
    """A product of parameters alone: what is summed over meets no data."""
    if at.primitive != "dot_general":
        return mixed(at, [weights(sources) for sources in pair])[0]
    found = []
    for i, source in [(i, s) for i, sources in enumerate(pair) for s in sources]:
        axes, own = in_product(at, i, source)
        gone = Gone(own, None, Note("{} sums over it with another parameter", at), reduced=True)
        found.append(
            dataclasses.replace(
                source,
                axes=axes,
                gone=(*source.gone, gone),
                one=None,
                all=0.0 if source.all == 0 else None,
                through=source.through or Note("{}", at),
            )
        )
    return weights(found)


def in_product(at: Site, i: int, source: Source) -> tuple[tuple[Factors, ...], frozenset[int]]:
    """What lies along the axes of a dot: of batch axes, free ones; and what was summed over."""
    contract, batch = at.params["dimension_numbers"]
    free = [
        [k for k in range(len(at.shape(j))) if k not in (*contract[j], *batch[j])] for j in (0, 1)
    ]
    blank = [repeated(at.shape(1 - i)[k]) for k in free[1 - i]]
    kept = [source.axes[k] for k in free[i]]
    lead = [source.axes[k] for k in batch[i]]
    summed = frozenset[int]().union(*(axes_in(source.axes[k]) for k in contract[i]))
    return (*lead, *(kept + blank if i == 0 else blank + kept)), summed


def mixed(at: Site, ins: Sequence[Value]) -> list[Value]:
    """What some other function makes of parameters: nobody knows where their axes are."""
    outs = []
    for shape in at.out_shapes():
        found = []
        for source in (source for value in ins for source in value.sources):
            own = frozenset[int]().union(*map(axes_in, source.axes))
            gone = Gone(own, None, Note("{} mixes its entries", at), reduced=True)
            found.append(
                dataclasses.replace(
                    source,
                    axes=tuple(map(repeated, shape)),
                    gone=(*source.gone, gone),
                    one=None,
                    all=None,
                    through=source.through or Note("{}", at),
                )
            )
        outs.append(weights(found))
    return outs
