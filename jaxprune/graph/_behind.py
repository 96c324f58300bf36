"""What comes behind a product: a bias of its own, or the residual stream that it is added to."""

from typing import NamedTuple

import numpy as np

from jaxprune.graph._line import Line, Ref, Step
from jaxprune.graph._linear import View
from jaxprune.graph._products import Place


class Bias(NamedTuple):
    """A bias that is added to a product.

    Attributes:
      ref: of the parameter.
      view: what it shows of the parameters.
      step: what repeats it over the rows, if it is a step of its own.
    """

    ref: Ref
    view: View
    step: Step | None


def bias_of(line: Line, place: Place) -> Bias | None:
    """The bias of a product: a parameter that is added to its outputs, and read nowhere else.

    A residual stream may be added first.
    """
    product = place.product
    if place.order is not None or place.side != 1 or product.groups or product.kind == "ragged":
        return None
    outputs = np.prod([product.shape[i] for i in product.outputs])
    out = line.steps[place.step].outs[0]
    while (added := _added(line, out)) is not None:
        bias = _bias(line, added)
        if bias is not None:
            fits = np.prod(line.types[bias.ref].shape) == outputs
            return bias if fits else None
        if added not in line.data:
            return None
        out = _next(line, out)
    return None


def _bias(line: Line, added: Ref) -> Bias | None:
    """What is added as a bias: a parameter, repeated over rows, that nothing else reads."""
    maker = next((s for s in line.steps if added in s.outs), None)
    shown = added if maker is None else _repeated(line, maker)
    if shown is None or shown not in line.views:
        return None
    view = line.views[shown]
    readers = [i for s in line.steps for i in s.ins if _meets(line, i, view)]
    once = maker is None or sum(maker.outs[0] in s.ins for s in line.steps) == 1
    return Bias(shown, view, maker) if len(readers) == 1 and once else None


def _added(line: Line, out: Ref) -> Ref | None:
    """What is added to a value, if that is all that is done with it."""
    add = _user(line, out)
    if add is None or add.at is None or add.at.primitive not in ("add", "add_any"):
        return None
    return next((i for i in add.ins if i != out), None)


def _user(line: Line, out: Ref) -> Step | None:
    """The one step that reads a value; None if there are several."""
    users = [s for s in line.steps if out in s.ins]
    return users[0] if len(users) == 1 and out not in line.outs else None


def _next(line: Line, out: Ref) -> Ref:
    return next(s for s in line.steps if out in s.ins).outs[0]


def _repeated(line: Line, maker: Step) -> Ref | None:
    """What a step repeats over all axes but the last."""
    at = maker.at
    if at is None or at.primitive != "broadcast_in_dim":
        return None
    pairs = zip(at.params["broadcast_dimensions"], at.shape(), strict=True)
    last = len(at.out_shape()) - 1
    return maker.ins[0] if [axis for axis, n in pairs if n != 1] == [last] else None


def _meets(line: Line, ref: Ref, view: View) -> bool:
    return ref in line.views and not set(view.parts).isdisjoint(line.views[ref].parts)


def residual(line: Line, place: Place) -> Ref | None:
    """The stream that a product is added to, if that is all that is done with it.

    A bias may come between.
    """
    if place.side != 1 or place.product.kind != "dot" or place.product.groups:
        return None
    out = line.steps[place.step].outs[0]
    while (other := _added(line, out)) is not None:
        if other in line.data:
            same = line.types[other].shape == line.types[out].shape
            return other if same else None
        out = _next(line, out)
    return None
