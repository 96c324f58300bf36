"""Rules for sums and products of axes: dots, convolutions, reductions."""

# In a sum over an axis, an index is a term, made of an entry of each operand:
#
#     y[b, o] = sum over i of x[b, i] * w[i, o]
#
# Index i of `x` and of `w` go together (`contract` joins them), and if either is zero where a unit
# is removed, the term that goes was zero. Axes that are not summed over are axes of the result,
# with the same ids. Batch axes, such as heads in attention, are both: joined, and in the result.
#
# A maximum, a sort or a running sum has no terms that could be left out, but for those that change
# nothing: minus infinity in a maximum, one in a product.

import jax
import numpy as np

from jaxprune.graph._axes import ANYTHING, Axes, Axis, axis_of, mixed, unknown
from jaxprune.graph._frames import dtype_of
from jaxprune.graph._site import Rule, Site


def dot_general(at: Site) -> list[Axes]:
    """Contract pairs of axes; batch axes pass through together, free ones alone."""
    (left, right), (left_batch, right_batch) = at.params["dimension_numbers"]
    a, b = at.ins
    for i, j in zip(left, right, strict=True):
        at.contract(a[i], b[j])
    out: list[Axis | None] = []
    for i, j in zip(left_batch, right_batch, strict=True):
        out.append(_multiplied(at, a[i], b[j]))
    out += [axis for i, axis in enumerate(a) if i not in (*left, *left_batch)]
    out += [axis for j, axis in enumerate(b) if j not in (*right, *right_batch)]
    return [mixed(out)]


def ragged_dot(at: Site) -> list[Axes]:
    """A product for each group of rows: what is grouped stays whole, all else as in a product."""
    numbers = at.params["ragged_dot_dimension_numbers"]
    (left, right), (left_batch, right_batch) = numbers.dot_dimension_numbers
    a, b, *others = at.ins
    ragged, groups = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    held = [a[i] for i in ragged] + [b[i] for i in groups]
    for axis in [*held, *(axis for axes in others for axis in axes)]:
        at.freeze(axis)
    for i, j in zip(left, right, strict=True):
        at.contract(a[i], b[j])
    out = [_multiplied(at, a[i], b[j]) for i, j in zip(left_batch, right_batch, strict=True)]
    gone = (*left, *left_batch)
    out += [None if i in ragged else axis for i, axis in enumerate(a) if i not in gone]
    gone = (*right, *right_batch, *groups)
    out += [axis for j, axis in enumerate(b) if j not in gone]
    lead = len(at.out_shape()) - len(out)  # one of the groups, where rows were summed over
    return [(*[None] * lead, *mixed(out))]


def reduce_any(at: Site) -> list[Axes]:
    """Reduce by a function of the user's, of one array or of several side by side."""
    arrays = at.ins[: len(at.ins) // 2]
    gone = at.params["dimensions"]
    out: list[Axis | None] = []
    for i in range(len(arrays[0])):
        ids = at.join(*(axes[i] for axes in arrays))
        if i in gone:
            at.freeze(None if ids is None else Axis(ids, False))
        else:
            out.append(None if ids is None else Axis(ids, False))
    return [tuple(out)] * len(at.eqn.outvars)


def _multiplied(at: Site, a: Axis | None, b: Axis | None) -> Axis | None:
    ids = at.join(a, b)
    if a is None or b is None or ids is None:
        return None
    return Axis(ids, True) if a.zero or b.zero else axis_of(ids, a.values, b.values)


def conv(at: Site) -> list[Axes]:
    """Contract input channels, in groups if there are any; positions stay whole."""
    numbers, groups = at.params["dimension_numbers"], at.params["feature_group_count"]
    x, kernel = at.ins
    batch, channels, *space = numbers.lhs_spec
    outputs, inputs, *window = numbers.rhs_spec
    for axis in [x[i] for i in space] + [kernel[i] for i in window]:
        at.freeze(axis)
    if at.params["batch_group_count"] != 1:
        for axis in (x[batch], kernel[outputs]):
            at.freeze(axis)
    if groups == 1:
        at.contract(x[channels], kernel[inputs])
    else:
        _grouped(at, x[channels], kernel[inputs], kernel[outputs], groups)
    out: list[Axis | None] = [None] * len(x)
    out[numbers.out_spec[0]] = x[batch] if at.params["batch_group_count"] == 1 else None
    out[numbers.out_spec[1]] = kernel[outputs]
    return [mixed(out)]


def _grouped(
    at: Site, x: Axis | None, inputs: Axis | None, outputs: Axis | None, groups: int
) -> None:
    """Lay channels out as (group, channel of the group) on both sides.

    With 2 groups and 6 channels on each side, channel 4 of the input is (1, 1). A group of the
    input goes with that of the output; the kernel has an axis for channels of a group alone.
    """
    if x is None or outputs is None:
        for axis in (x, inputs, outputs):
            at.freeze(axis)
        return
    coupling = at.analysis.coupling
    coupling.read(x.ids)
    group = coupling.fresh(groups)
    sides: tuple[tuple[Axis, Axis | None], ...] = ((x, inputs), (outputs, None))
    for axis, inside in sides:
        size = len(axis.ids) // groups
        if size == 1:
            coupling.join(axis.ids, group)
        elif axis is x and inside is None:
            at.freeze(axis)
        else:
            ids = coupling.fresh(size) if inside is None else inside.ids
            coupling.product(axis.ids, group, ids)
    if not any(axis is not None and axis.zero for axis in (x, inputs)):
        at.blur(x.ids, lambda: f"{at.name()} sums what is not zero where a unit is removed")


def cut_conv(at: Site, x: jax.Array, kernel: jax.Array) -> list[jax.Array]:
    """Count the groups that are left."""
    numbers, groups = at.params["dimension_numbers"], at.params["feature_group_count"]
    if groups > 1:
        inputs = kernel.shape[numbers.rhs_spec[1]]
        groups = x.shape[numbers.lhs_spec[1]] // inputs
    return at.bind(x, kernel, feature_group_count=groups)


def reduce_sum(at: Site) -> list[Axes]:
    """Sum over axes: exact if what is removed was zero."""
    for i in at.params["axes"]:
        at.contract(at.ins[0][i])
    return [mixed(axis for i, axis in enumerate(at.ins[0]) if i not in at.params["axes"])]


# What changes nothing: a unit that leaves it behind may go.
_NEUTRAL = {
    "reduce_or": 0,
    "reduce_xor": 0,
    "reduce_and": -1,
    "reduce_prod": 1,
    "reduce_max": -np.inf,
    "reduce_min": np.inf,
}


def reduce_whole(at: Site) -> list[Axes]:
    """Reduce axes to which every index matters, but for those where removed ones are neutral."""
    neutral = _NEUTRAL.get(at.primitive)
    if neutral == -1 and dtype_of(at.eqn.invars[0]).kind == "b":
        neutral = 1
    for i in at.params["axes"]:
        axis = at.ins[0][i]
        if axis is not None and neutral is not None and axis.values == {neutral}:
            at.contract(Axis(axis.ids, True))
        else:
            at.freeze(axis)
    return [mixed(a for i, a in enumerate(at.ins[0]) if i not in at.params["axes"])] * len(
        at.eqn.outvars
    )


def reduce_max(at: Site) -> list[Axes]:
    """The largest magnitude is the same without zeros: scales of quantization may lose channels."""
    made = (eqn for eqn in at.frame.jaxpr.eqns[: at.number] if at.eqn.invars[0] in eqn.outvars)
    if any(eqn.primitive.name == "abs" for eqn in made):
        return reduce_sum(at)
    return reduce_whole(at)


def along(param: str) -> Rule:
    """Rule of a primitive that runs along one axis and leaves the others as they are."""

    def couple(at: Site) -> list[Axes]:
        rank = len(at.ins[0])
        name, place = at.primitive, at.params[param] % rank
        out: list[Axis | None] = []
        for i in range(rank):
            ids = at.join(*(axes[i] for axes in at.ins))
            if i == place and ids is not None:
                at.freeze(Axis(ids, False))
            values = [axis.values for axes in at.ins if (axis := axes[i]) is not None]
            values = [ANYTHING] if name == "cumlogsumexp" else values
            out.append(None if i == place or ids is None else axis_of(ids, *values).mixed())
        return [tuple(out)] * len(at.eqn.outvars)

    return Rule(couple)


def top_k(at: Site) -> list[Axes]:
    """Hold the axis along which the largest are looked for."""
    along = at.params.get("axis", at.params.get("reduction_dimension", -1)) % len(at.ins[0])
    at.freeze(at.ins[0][along])
    best = tuple(None if i == along else axis for i, axis in enumerate(at.ins[0]))
    return [best, unknown(best)]


def windows(at: Site) -> list[Axes]:
    """Pass axes on that no window runs over."""
    params, (x, *others) = at.params, at.ins
    size = params["window_dimensions"]
    rank = len(x)
    strides = params.get("window_strides") or (1,) * rank
    padding = params.get("padding") or ((0, 0),) * rank
    dilation = [params.get(n) or (1,) * rank for n in ("base_dilation", "window_dilation")]
    out: list[Axis | None] = []
    for i in range(rank):
        plain = size[i] == strides[i] == dilation[0][i] == 1 and tuple(padding[i]) == (0, 0)
        if not plain:
            at.freeze(x[i])
        out.append(x[i] if plain else None)
    for other in others:  # initial values are scalars; a source of select-and-scatter is not
        for i, axis in enumerate(other):
            if out[i] is None:
                at.freeze(axis)
            else:
                at.join(out[i], axis)
    if at.primitive == "reduce_window":  # any function, from any start
        return [unknown(out)] * len(at.eqn.outvars)
    return [mixed(out)] * len(at.eqn.outvars)


RULES: dict[str, Rule] = {
    "dot_general": Rule(dot_general),
    "conv_general_dilated": Rule(conv, cut_conv),
    "ragged_dot_general": Rule(ragged_dot),
    "reduce_sum": Rule(reduce_sum),
    "reduce": Rule(reduce_any),
    "reduce_max": Rule(reduce_max),
    **{f"reduce_{name}": Rule(reduce_whole) for name in ("min", "prod", "and", "or", "xor")},
    "argmax": Rule(reduce_whole),
    "argmin": Rule(reduce_whole),
    **{f"cum{name}": along("axis") for name in ("sum", "prod", "max", "min", "logsumexp")},
    "sort": along("dimension"),
    "top_k": Rule(top_k),
    "approx_top_k": Rule(top_k),
    **{f"reduce_window_{name}": Rule(windows) for name in ("max", "min", "sum")},
    "reduce_window": Rule(windows),
    "select_and_scatter_add": Rule(windows),
    "select_and_gather_add": Rule(windows),
}
