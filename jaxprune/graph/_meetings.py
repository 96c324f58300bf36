"""Where parameters meet data, and what the place makes of each of their axes."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeAlias

from jaxprune.graph._frames import callers
from jaxprune.graph._site import Site
from jaxprune.graph._sources import LOOKED_UP, Factors, Note, Number, Source, axes_in

Role: TypeAlias = str | None
Placed: TypeAlias = Sequence[tuple[Factors, Role, Note]]  # what lies where, as what, or why not

NOBODY = Note("")
ELEMENT = Note("it meets data element by element, in {}")


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A place where a parameter meets data, or where a program gives it back.

    Attributes:
      leaf: number of the parameter.
      kind: of the use.
      roles: of each axis of the parameter.
      why: for each axis the reason, if it has no role.
      zero: what a removed weight is there.
      through: the function that made that of it.
      number: of the product or the look-up whose outcome this is, else nothing.
      aside: whether it is only a number made of the parameter, such as a penalty.
      mapped: whether ``vmap`` maps over the operation.
      product: whether it is the outcome of a product element by element.
      summed: whether that product was summed, so that it was a contraction.
    """

    leaf: int
    kind: str
    roles: tuple[Role, ...]
    why: tuple[Note, ...]
    zero: Number = 0.0
    through: Note | None = None
    number: tuple[int, int] | None = None
    aside: bool = False
    mapped: bool = False
    product: bool = False
    summed: bool = False


def meet(at: Site | None, source: Source, kind: str, placed: Placed, rank: int) -> Meeting:
    """What a parameter is used for where axes of a value lie at some places.

    An axis has the role that all of its parts have. What a function has made something else than
    zero of is `derived`, whatever it meets then.
    """
    told: list[list[tuple[Role, Note]]] = [[] for _ in range(rank)]
    for factors, role, why in placed:
        for axis in axes_in(factors):
            told[axis].append((role, why))
    for gone in source.gone:
        for axis in gone.axes:
            told[axis].append((gone.role, gone.why))
    both = [_agreed(each) for each in told]
    zero: Number = 0.0
    if not source.stays_zero and kind != "table":
        kind, zero = "derived", source.all if source.one == 0 else source.one
    elif source.kind == "gain" and kind in ("matmul", "conv"):
        kind = "gain"
    return Meeting(
        source.leaf,
        kind,
        tuple(role for role, _ in both),
        tuple(why for _, why in both),
        zero,
        source.through if kind == "derived" else None,
        source.number,
        source.is_reduced and source.is_mixed,
        is_mapped(at),
        source.kind == "product",
        any(gone.role == "in" for gone in source.gone),
    )


def _agreed(told: Sequence[tuple[Role, Note]]) -> tuple[Role, Note]:
    """The role that all parts of an axis have; none, with the reason, where they differ."""
    roles = list(dict.fromkeys(role for role, _ in told))
    if not roles:
        return None, Note("none of its indices is read")
    if roles == [None]:
        return None, told[0][1]
    if len(roles) == 1:
        return roles[0], NOBODY
    reasons = [why for role, why in told if role is None]
    if reasons:
        return None, reasons[0]
    return None, Note(f"parts of it are {' and '.join(map(repr, roles))}")


def is_mapped(at: Site | None) -> bool:
    """Tell whether ``vmap`` maps over an operation or over one that calls it."""
    if at is None:
        return False
    stacks = [at.eqn, *(call.eqn for call in callers(at.frame))]
    return any("vmap(" in str(eqn.source_info.name_stack) for eqn in stacks)


def everywhere(source: Source, role: Role, why: Note = NOBODY) -> Placed:
    """The same role for whatever lies along any axis."""
    return [(factors, role, why) for factors in source.axes]


# Products.


def in_dot(at: Site, i: int, source: Source) -> Placed:
    """Contracted axes are inputs, batch axes are groups, free ones are outputs."""
    contract, batch = (sides[i] for sides in at.params["dimension_numbers"])
    return _placed(source, contract, batch)


def in_ragged_dot(at: Site, i: int, source: Source) -> Placed:
    numbers = at.params["ragged_dot_dimension_numbers"]
    contract, batch = (sides[i] for sides in numbers.dot_dimension_numbers)
    return _placed(source, contract, (*batch, *(numbers.rhs_group_dimensions if i == 1 else ())))


def _placed(source: Source, contract: Sequence[int], batch: Sequence[int]) -> Placed:
    role = lambda k: "in" if k in contract else "group" if k in batch else "out"  # noqa: E731
    return [(factors, role(k), NOBODY) for k, factors in enumerate(source.axes)]


def in_conv(at: Site, i: int, source: Source) -> Placed:
    """Axes of a kernel. ``vmap`` lays members and outputs along one, members outermost."""
    if i == 0:
        return everywhere(source, None, Note("{} takes it for an image", at))
    outputs, inputs, *window = at.params["dimension_numbers"].rhs_spec
    groups = at.params["feature_group_count"] * at.params["batch_group_count"]
    placed = [(source.axes[k], "window", NOBODY) for k in window]
    placed.append((source.axes[inputs], "in", NOBODY))
    return [*placed, *_outputs(at, source.axes[outputs], groups)]


def _outputs(at: Site, factors: Factors, groups: int) -> Placed:
    """The innermost axis is one of outputs. Those around it are groups if there are as many.

    Of 5 members with 6 outputs each that all see the same image, nobody can tell in a convolution
    with 30 outputs which is which: 5 heads of 6 outputs are laid out alike.
    """
    real = [factor for factor in factors if factor.axes]
    if len({factor.axes for factor in real}) < 2:
        return [(factors, "out", NOBODY)]
    single = at.shape(1)[at.params["dimension_numbers"].rhs_spec[1]] == 1  # input of each group
    if is_mapped(at) and single and groups < math.prod(factor.size for factor in real):
        # A depthwise kernel that `vmap` maps over has its members inside of its groups, where one
        # of several outputs a group has outputs; members with one input have them outside.
        why = Note("members that `vmap` maps over, or outputs of the groups of {}", at)
        return [((factor,), None, why) for factor in real]
    placed: list[tuple[Factors, Role, Note]] = [((real[-1],), "out", NOBODY)]
    for factor in real[:-1]:
        grouped = groups > 1 and groups % factor.size == 0
        groups = groups // factor.size if grouped else 0
        why = NOBODY if grouped else Note("{} lays it beside others along its outputs", at)
        placed.append(((factor,), "group" if grouped else None, why))
    return placed


def as_weight(source: Source) -> Source:
    """A source of which a constant has summed over axes, before it meets data in a product."""
    if source.kind != "linear":
        return source
    gone = tuple(
        dataclasses.replace(g, role=None if g.role == "in" else g.role) for g in source.gone
    )
    return dataclasses.replace(source, gone=gone, kind="", number=None)


def as_kernel(source: Source, placed: Placed) -> Source | None:
    """A kernel that data has chosen among others, or gated, before a product; None if it is none.

    One that is looked up is one of a group, as experts are. One that is gated (dropped weights, a
    mask or a temperature among the inputs) lies as it did. Both have inputs and outputs in the
    product: keys that are looked up, or scaled, and meet queries have not.
    """
    told = {role for factors, role, _ in placed if any(factor.axes for factor in factors)}
    if not {"in", "out"} <= told or any(gone.role == "in" for gone in source.gone):
        return None
    if source.kind == "embedding":
        gone = tuple(
            dataclasses.replace(g, role="group") if g.why.text == LOOKED_UP else g
            for g in source.gone
        )
        return dataclasses.replace(source, gone=gone, kind="", number=None)
    # Repeated along an axis of data it is another kernel for each example, and a gain of that.
    whole = all(f.axes or f.size == 1 for factors in source.axes for f in factors)
    if source.kind == "product" and whole:
        return dataclasses.replace(source, kind="", number=None)
    return None


# What data has been multiplied with element by element, or looked up in, and what came then.


def settled(at: Site | None, source: Source, rank: int) -> Meeting:
    """The use that a product, or rows that were looked up, turn out to be.

    A product that is summed along an axis that both have is a contraction; else it is a gain. Rows
    that are looked up are what the network goes on with, unless they are contracted, too.
    """
    summed = any(gone.role == "in" for gone in source.gone)
    at = at or (None if source.where is None else source.where.at)
    if source.kind == "product" and not summed:
        return meet(
            at,
            source,
            "gain",
            everywhere(source, None, source.where or ELEMENT),
            rank,
        )
    placed: list[tuple[Factors, Role, Note]] = [
        ((factor,), "group" if factor.met and summed else "out", NOBODY)
        for factors in source.axes
        for factor in factors
    ]
    if source.kind in ("product", "linear"):
        return meet(at, source, "matmul", placed, rank)
    matrices = len({axis for f in source.axes for axis in axes_in(f)}) > 1
    if matrices and not summed:  # kernels that were looked up: who knows what sums over them
        why = Note("rows of several axes are looked up")
        placed = [(f, None, why) for f, _, _ in placed]
    return meet(at, source, "embedding", placed, rank)
