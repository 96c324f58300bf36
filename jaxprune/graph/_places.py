"""One equation: parameters move on, meet data, or become something else."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from jaxprune.graph._elementwise import ELEMENTWISE
from jaxprune.graph._meetings import (
    ELEMENT,
    Meeting,
    Placed,
    as_kernel,
    as_weight,
    everywhere,
    in_conv,
    in_dot,
    in_ragged_dot,
    meet,
    settled,
)
from jaxprune.graph._mixtures import elementwise, in_product, mixed, multiplied, reduced
from jaxprune.graph._site import Site
from jaxprune.graph._sources import (
    CONSTANT,
    COUNT,
    DATA,
    Gone,
    Kind,
    Note,
    Source,
    Value,
    weights,
)
from jaxprune.graph._views import VIEWS, dynamic_slice, gather, stretched
from jaxprune.graph._walk import Analysis

_LAID_BESIDE = ("concatenate", "stack", "pad", "dynamic_update_slice")
_PLACES = {
    "dot_general": in_dot,
    "ragged_dot_general": in_ragged_dot,
    "conv_general_dilated": in_conv,
}


@dataclasses.dataclass
class Log:
    """What is noted on the way.

    Attributes:
      analysis: the walk whose frames are followed.
      ranks: how many axes each parameter has.
      meetings: where parameters meet data.
      numbers: of products and look-ups.
    """

    analysis: Analysis
    ranks: Sequence[int]
    meetings: list[Meeting] = dataclasses.field(default_factory=list)
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def note(self, at: Site, source: Source, kind: str, placed: Placed) -> None:
        """Note that a parameter is used."""
        self.meetings.append(meet(at, source, kind, placed, self.ranks[source.leaf]))

    def note_all(self, at: Site, value: Value, text: str, kind: str = "bias") -> None:
        """Note that parameters are used in a way that tells nothing of their axes."""
        for source in value.sources:
            if kind == "derived" and source.stays_zero:  # an index: zero is one like any other
                source = dataclasses.replace(source, one=None, all=None, through=Note("{}", at))  # noqa: PLW2901
            self.note(at, source, kind, everywhere(source, None, Note(text, at)))

    def settle(self, at: Site, value: Value) -> Value:
        """Note what products and looked-up rows are used for, once it is known."""
        if value.kind != "data":
            return value
        for source in value.sources:
            self.meetings.append(settled(at, source, self.ranks[source.leaf]))
        return DATA

    def finish(self, value: Value) -> None:
        """Note what a result shows: products, rows that were looked up, or a table as it is."""
        for source in value.sources:
            rank = self.ranks[source.leaf]
            if value.kind == "data":
                self.meetings.append(settled(None, source, rank))
            else:
                placed = everywhere(source, None, Note("it meets no data"))
                self.meetings.append(meet(None, source, "table", placed, rank))


def plain(values: Sequence[Value]) -> Value:
    """What is made of values, none of which shows a parameter."""
    kinds = {value.kind for value in values}
    return DATA if kinds & {"data", "weights"} else COUNT if "count" in kinds else CONSTANT


def either(log: Log, at: Site, a: Value, b: Value) -> Value:
    """What is the one value now and the other then."""
    b = log.settle(at, b)
    if a == b:
        return a
    shown = [value for value in (a, b) if value.kind == "weights"]
    if not shown:
        return plain([a, b])
    if "data" in (a.kind, b.kind):
        for value in shown:
            log.note_all(at, value, "{} puts data in its place")
        return DATA
    return weights([source for value in shown for source in value.sources])


def at_equation(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """What the results of an equation without programs of its own are made of."""
    name = at.primitive
    if name in ("gather", "dynamic_slice"):
        return _picked(log, at, ins)
    if name in _PLACES and len(ins) > 1:
        return _product(log, at, ins)
    if name in VIEWS and (view := _view(at, ins)):
        return view
    if any(value.kind == "data" for value in ins):
        return _met(log, at, ins)
    return _of_weights(at, ins)


def _view(at: Site, ins: Sequence[Value]) -> list[Value] | None:
    """The results of a primitive that only moves; None where parameters and data come together."""
    if at.primitive == "optimization_barrier":
        return list(ins)
    kinds = {value.kind for value in ins}
    if "data" in kinds and len(ins) > 1:
        return None
    view = VIEWS[at.primitive]
    shown: list[list[Source]] = [[] for _ in at.eqn.outvars]
    for i, value in enumerate(ins):
        for source in value.sources:
            for out, one in zip(shown, view(at, i, source), strict=True):
                out.extend([] if one is None else [one])
    if "data" in kinds:
        return [Value("data", tuple(sources)) for sources in shown]
    return [weights(sources) for sources in shown]


def _picked(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """Rows of a parameter. Where data says which, it is looked up."""
    table, *index = ins
    for value in index:
        if value.kind == "weights":
            log.note_all(at, value, "{} takes it for an index", "derived")
        log.settle(at, value)
    if table.kind != "weights":
        log.settle(at, table)
        return [DATA]
    starts = [DATA if value.kind == "weights" else value for value in index]
    if at.primitive == "gather":
        sources = [gather(at, source, starts[0]) for source in table.sources]
        by_data = starts[0].kind == "data"
    else:
        sources = [dynamic_slice(at, source, starts) for source in table.sources]
        cut = zip(at.shape(), at.params["slice_sizes"], starts, strict=True)
        by_data = any(n != m and start.kind == "data" for n, m, start in cut)
    return [_pending(log, at, sources, "embedding") if by_data else weights(sources)]


def _pending(log: Log, at: Site, sources: Sequence[Source], kind: Kind) -> Value:
    """Data that shows parameters still: what is done with it says what they are."""
    number, where = next(log.numbers), Note(ELEMENT.text, at)
    shown = [
        dataclasses.replace(source, kind=kind, number=(number, k), where=where)
        for k, source in enumerate(sources)
    ]
    return Value("data", tuple(shown))


def _product(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """Dots and convolutions: here parameters meet data, or one another."""
    pair = ins[:2]
    for value in ins[2:]:
        log.settle(at, value)
        if value.kind == "weights":
            log.note_all(at, value, "{} takes it for the sizes of groups", "derived")
    if all(value.kind == "weights" for value in pair):
        return [multiplied(at, [value.sources for value in pair])]
    if at.primitive == "dot_general" and not any(value.kind == "data" for value in pair):
        return [_with_constant(log, at, pair)]
    met = any(value.kind == "weights" for value in pair)
    name = "conv" if at.primitive == "conv_general_dilated" else "matmul"
    for i, value in enumerate(pair):
        for source in value.sources:
            placed = _PLACES[at.primitive](at, i, source)
            kernel = None if met else as_kernel(source, placed)
            if kernel is not None:
                log.note(at, kernel, name, placed)
            elif value.kind == "weights" or (source.kind in ("embedding", "linear") and not met):
                kind = "embedding" if source.kind == "embedding" else name
                log.note(at, as_weight(source), kind, placed)
            else:
                log.settle(at, Value("data", (source,)))
    return [DATA]


def _with_constant(log: Log, at: Site, pair: Sequence[Value]) -> Value:
    """A product with what the program makes: that is data, or a part of how a weight is made.

    ``captured @ w`` goes on as data does, and ``w @ basis`` meets data in a product of its own.
    """
    (i,) = [i for i, value in enumerate(pair) if value.kind == "weights"]
    shown = []
    for source in pair[i].sources:
        axes, summed = in_product(at, i, source)
        batch = len(at.params["dimension_numbers"][1][i])
        both = [tuple(f._replace(met=True) for f in factors) for factors in axes[:batch]]
        gone = Gone(summed, "in", Note("{} sums over it with a constant", at))
        laid = (*both, *axes[batch:])
        shown.append(dataclasses.replace(source, axes=laid, gone=(*source.gone, gone)))
    return _pending(log, at, shown, "linear")


def _met(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """Parameters meet data element by element, or data goes on that has met them before."""
    name, n = at.primitive, len(at.eqn.outvars)
    shown = [i for i, value in enumerate(ins) if value.sources]
    if name == "reduce_sum" and (summed := _summed(at, ins[0])) is not None:
        return [summed]
    if name in ("mul", "div") and len(shown) == 1 and (scaled := _scaled(log, at, ins, shown[0])):
        return [scaled]
    kind = "gain" if name in ("mul", "div") else "bias"
    if name not in (*ELEMENTWISE, *_LAID_BESIDE) and not name.startswith("scatter"):
        kind = "unknown"
    for value in ins:
        log.settle(at, value)
        if value.kind == "weights":
            text = "nobody knows what {} does with it" if kind == "unknown" else ELEMENT.text
            log.note_all(at, value, text, kind)
    return [DATA] * n


def _scaled(log: Log, at: Site, ins: Sequence[Value], i: int) -> Value | None:
    """A product that may turn out to be a contraction; None if it cannot.

    Times a constant, what has met data before is still what it was.
    """
    value, other = ins[i], ins[1 - i].kind
    fits = len(at.shape(i)) == len(at.out_shape())
    if not fits or (at.primitive == "div" and (i == 1 or other == "data")):
        return None
    if other != "data":
        return Value("data", tuple(_along(at, i, source) for source in value.sources))
    sources = [_along(at, i, source, met=True) for source in value.sources]
    if value.kind == "weights":
        return _pending(log, at, sources, "product")
    looked_up = all(source.kind == "embedding" for source in sources)
    return Value("data", tuple(sources)) if looked_up else None


def _along(at: Site, i: int, source: Source, met: bool = False) -> Source:
    """A source in a product: repeated where it has one index, met where the other has several."""
    axes = []
    for k, (factors, size) in enumerate(zip(source.axes, at.out_shape(), strict=True)):
        theirs = at.shape(1 - i)
        runs = met and len(theirs) == len(source.axes) and theirs[k] != 1
        wide = stretched(factors, at.shape(i)[k], size)
        axes.append(tuple(f._replace(met=True) for f in wide) if runs else wide)
    return dataclasses.replace(source, axes=tuple(axes))


def _summed(at: Site, value: Value) -> Value | None:
    """A sum of products, if it runs over axes of parameters and data alike, or over neither."""
    places = at.params["axes"]
    sources = []
    for source in value.sources:
        factors = [f for k in places for f in source.axes[k] if f.axes]
        if any(not factor.met for factor in factors):
            return None
        gone = [Gone(factor.axes, "in") for factor in factors]
        axes = tuple(f for k, f in enumerate(source.axes) if k not in places)
        sources.append(dataclasses.replace(source, axes=axes, gone=(*source.gone, *gone)))
    return Value("data", tuple(sources))


def _of_weights(at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """What is made of parameters and numbers alone."""
    if at.primitive in ELEMENTWISE:
        return [elementwise(at, ins)] * len(at.eqn.outvars)
    if at.primitive.startswith(("reduce_", "argm")) and "axes" in at.params:
        return [reduced(at, ins[0])] * len(at.eqn.outvars)
    return mixed(at, ins)
