"""Where weights multiply data in a line, and why some parameters cannot be changed there."""

# A parameter is changed where it multiplies data, so that it has to do that and nothing else:
#
#     q = dot_general x view(w)      a place; w may be pruned, if all its places are of one kind
#     e = gather w tokens            w is read otherwise, too: a new value would be wrong here
#
# Places that show the same entries in the same way are one weight, seen several times: shared
# layers, rounds of a loop. Places that show the same entries in two ways (a matrix and its
# transpose) have no matrix in common, and are left alone.

import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph._line import Line, Ref, Step
from jaxprune.graph._linear import Part, View
from jaxprune.graph._product import Product, product_at

_MAY_REPEAT = ("gather", "broadcast_in_dim", "mul", "div")


class Place(NamedTuple):
    """A product of a weight and data.

    Attributes:
      step: its number.
      weight: the operand that is the weight; None inside of a loop.
      data: the other one, and sizes of groups where there are.
      view: what the weight shows of the parameters.
      product: its operands as matrices.
      side: which operand the weight is.
      order: inside of a loop the number of the place among all in there; None outside.
    """

    step: int
    weight: Ref | None
    data: tuple[Ref, ...]
    view: View
    product: Product
    side: int = 1
    order: int | None = None


class Weight(NamedTuple):
    """One matrix, at all places where it multiplies data.

    Attributes:
      view: what it shows of the parameters.
      product: how it is laid out.
      places: where it is used.
    """

    view: View
    product: Product
    places: tuple[Place, ...]

    @property
    def leaves(self) -> set[int]:
        """The parameters that it shows."""
        return {part.leaf for part in self.view.parts}

    @property
    def steps(self) -> tuple[int, ...]:
        """Where it is used, in order."""
        return tuple(sorted({place.step for place in self.places}))


class Found(NamedTuple):
    """What a line does with its parameters.

    Attributes:
      weights: those that can be changed where they multiply data, in order.
      reasons: why a parameter cannot be, by its number.
    """

    weights: list[Weight]
    reasons: dict[int, str]


def find_products(line: Line, shapes: Sequence[tuple[int, ...]]) -> Found:
    """Find what can be changed, and say why the rest cannot.

    Args:
      line: a program.
      shapes: of its parameters.
    """
    places = list(places_of(line))
    reasons: dict[int, list[str]] = collections.defaultdict(list)
    for leaf, why in _read_otherwise(line, places):
        reasons[leaf].append(why)
    ones = [_Ones(shape, line.types[i].dtype) for shape, i in zip(shapes, line.ins, strict=False)]
    grouped: dict[View, list[Place]] = collections.defaultdict(list)
    for place in places:
        grouped[place.view].append(place)
    weights = []
    for view, mine in grouped.items():
        one = Weight(view, mine[0].product, tuple(mine))
        why = _unlike(mine) or _not_one_to_one(view, ones) or _twice_with_effects(line, one)
        for leaf in one.leaves if why else ():
            reasons[leaf].append(why)
        weights.append(one)
    for leaf in _clashes(weights, ones):
        reasons[leaf].append("several products see its entries in different ways")
    for leaf in set(range(len(shapes))) - {leaf for w in weights for leaf in w.leaves}:
        reasons[leaf].insert(0, "it multiplies no data in a product")
    told = {leaf: "; ".join(dict.fromkeys(whys)) for leaf, whys in reasons.items() if whys}
    free = [w for w in weights if not w.leaves & told.keys()]
    return Found(sorted(free, key=lambda w: w.steps[0]), told)


def places_of(line: Line) -> Iterator[Place]:
    """All products of weights and data, those in loops too."""
    for number, step in enumerate(line.steps):
        if step.loops and _of_data(line, step):
            yield from _in_loops(line, number, step)
        elif step.at is not None and not step.loops:
            yield from _of_step(line, number, step)


def _of_data(line: Line, step: Step) -> bool:
    return any(out in line.data for out in step.outs)


def operands(line: Line, step: Step) -> Iterator[tuple[int, Ref]]:
    """The operands of an equation that are variables, by their places."""
    if step.at is None:
        return
    read = iter(step.refs)
    for i, v in enumerate(step.at.eqn.invars):
        if not hasattr(v, "val"):
            yield i, next(read)


def _of_step(line: Line, number: int, step: Step) -> Iterator[Place]:
    refs = dict(operands(line, step))
    for side in (0, 1):
        w, x = refs.get(side), refs.get(1 - side)
        if w not in line.views or x is None or x in line.views or x not in line.data:
            continue
        if jnp.issubdtype(line.types[x].dtype, jnp.complexfloating):  # Gram matrices are real
            continue
        if step.at is not None and (product := product_at(step.at, side)) is not None:
            others = [refs[i] for i in sorted(refs) if i > 1]
            yield Place(number, w, (x, *others), line.views[w], product, side)


def _in_loops(line: Line, number: int, step: Step) -> Iterator[Place]:
    """Places inside of a loop, whose parameters are operands of the loop."""
    order = itertools.count()
    outer = _of_loop(line, step)
    for loop in step.loops:
        for place in places_of(loop):
            seen = [outer[part.leaf] for part in place.view.parts]
            rows = [_layers(v, part) for v, part in zip(seen, place.view.parts, strict=True)]
            view = place.view.through(rows)
            yield Place(number, None, (), view, place.product, place.side, next(order))


def _layers(view: View, part: Part) -> View:
    for i in part.layer:
        view = view.row(i)
    return view


def _of_loop(line: Line, step: Step) -> dict[int, View]:
    """The views that go into the lines inside of a step, by the number of the input."""
    refs = dict(operands(line, step))
    lead = _inputs_before(step)
    return {i - lead: line.views[r] for i, r in refs.items() if i >= lead and r in line.views}


def _inputs_before(step: Step) -> int:
    """How many operands of a step come before those of the lines inside of it."""
    if step.at is None or step.at.primitive == "scan":
        return 0
    return 1 if step.at.primitive == "cond" else step.at.params["cond_nconsts"]


# Why not.


def _read_otherwise(line: Line, places: Sequence[Place]) -> Iterator[tuple[int, str]]:
    """Parameters that are read by anything but a product with data."""
    fine = {(place.step, place.weight) for place in places}
    for number, step in enumerate(line.steps):
        inside = _inside(line, step) if step.loops and _of_data(line, step) else {}
        for i, ref in operands(line, step) if step.at else enumerate(step.ins):
            if ref not in line.views or (number, ref) in fine or inside.get(i) == "":
                continue
            why = inside.get(i) or f"{step.at.name() if step.at else 'a scan'} reads it"
            for part in line.views[ref].parts:
                yield part.leaf, why
    for ref in line.outs:
        for part in line.views[ref].parts if ref in line.views else ():
            yield part.leaf, "it is given back as it is"


def _inside(line: Line, step: Step) -> dict[int, str]:
    """Why operands of a loop cannot be changed; nothing for those that can."""
    found: dict[int, list[str]] = collections.defaultdict(list)
    lead = _inputs_before(step)
    for loop in step.loops:
        read = {ref for s in loop.steps for ref in s.ins} | set(loop.outs)
        own = {p.leaf for ref in read if ref in loop.views for p in loop.views[ref].parts}
        shapes = {i: tuple(loop.types[loop.ins[i]].shape) for i in own}
        reasons = find_products(loop, [shapes.get(i, ()) for i in range(len(loop.ins))]).reasons
        for i in own:
            found[i + lead].append(reasons.get(i, ""))
    return {i: "; ".join(filter(None, whys)) for i, whys in found.items()}


def _unlike(places: Sequence[Place]) -> str:
    layouts = {(*p.product[:1], *p.product[2:5], p.product.features) for p in places}
    return "" if len(layouts) == 1 else "products contract different axes of it"


class _Ones(NamedTuple):
    """What is laid out to see which entries a view shows; of the dtype that the program expects.

    Attributes:
      shape, dtype: of a parameter.
    """

    shape: tuple[int, ...]
    dtype: Any

    def layer(self, part: Part) -> jax.Array:
        """Ones like the parameter, or a layer of it."""
        return jnp.ones(self.shape[len(part.layer) :], self.dtype)


def _not_one_to_one(view: View, ones: Sequence[_Ones]) -> str:
    """Say that a view repeats entries, or has others among them."""
    names = str(view.moves)
    if not any(name in names for name in _MAY_REPEAT):
        return ""
    parts = [ones[part.leaf].layer(part) for part in view.parts]
    seen = view.read(*parts)
    shown = sum(int(jnp.sum(each.shown)) for each in view.scatter(parts, [seen]))
    return "" if shown == seen.size else "it is shown with entries repeated or put between"


def _twice_with_effects(line: Line, weight: Weight) -> str:
    """Say that what lies between the places of a weight must not run a second time."""
    first, last = weight.steps[0], weight.steps[-1]
    looped = [line.steps[p.step] for p in weight.places if p.order is not None]
    between = line.steps[first : last + 1] if first != last else looped
    for step in between:
        if step.at is not None and step.at.eqn.effects:
            return f"{step.at.name()} has effects, and lies where it is used several times"
    return ""


def _clashes(weights: Sequence[Weight], ones: Sequence[_Ones]) -> set[int]:
    """Parameters of which two views show the same entries, in different ways."""
    by_leaf: dict[int, list[View]] = collections.defaultdict(list)
    for weight in weights:
        for leaf in weight.leaves:
            by_leaf[leaf].append(weight.view)
    return {leaf for leaf, views in by_leaf.items() if _overlap(leaf, views, ones)}


def _overlap(leaf: int, views: Sequence[View], ones: Sequence[_Ones]) -> bool:
    by_index: dict[tuple[int, ...], list[View]] = collections.defaultdict(list)
    for view in views:
        for part in view.parts:
            if part.leaf == leaf:
                by_index[part.layer].append(view)
    if len({len(index) for index in by_index}) > 1:
        return True
    for index, mine in by_index.items():
        total = np.zeros(ones[leaf].shape[len(index) :], int) if len(mine) > 1 else None
        for view in mine if total is not None else ():
            total = total + _shown(view, Part(leaf, index), ones)
        if total is not None and (total > 1).any():
            return True
    return False


def _shown(view: View, part: Part, ones: Sequence[_Ones]) -> np.ndarray:
    parts = [ones[p.leaf].layer(p) for p in view.parts]
    each = view.scatter(parts, [view.read(*parts)])
    counts = [np.asarray(e.shown) for e, p in zip(each, view.parts, strict=True) if p == part]
    return np.sum(counts, axis=0)


# Where a walk stops.


class Stop(NamedTuple):
    """What is done before a step.

    Attributes:
      step: everything before it has been computed.
      end: where what has to be seen whole ends; the same where nothing has.
      weights: what is changed here.
    """

    step: int
    end: int
    weights: tuple[Weight, ...]


def stops_of(weights: Sequence[Weight]) -> list[Stop]:
    """Say where a walk stops to change some weights.

    Weights that meet the same data are changed together. What several steps use is seen whole
    first: all that lies between its first and its last place is one stop.
    """
    regions = _regions([(w.steps[0], w.steps[-1] + 1) for w in weights if len(w.steps) > 1])
    inside = {a: [w for w in weights if a <= w.steps[0] < b] for a, b in regions}
    held = {id(w) for group in inside.values() for w in group}
    alone: dict[object, list[Weight]] = collections.defaultdict(list)
    for w in weights:
        if id(w) not in held:
            place = w.places[0]
            alone[place.data or ("loop", place.step)].append(w)
    stops = [Stop(group[0].steps[0], group[0].steps[0], tuple(group)) for group in alone.values()]
    stops += [Stop(a, b, tuple(inside[a])) for a, b in regions]
    return sorted(stops, key=lambda stop: stop.step)


def _regions(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that overlap as one."""
    merged: list[tuple[int, int]] = []
    for a, b in sorted(spans):
        if merged and a < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return merged
