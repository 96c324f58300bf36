"""Rules for primitives that work element by element."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxprune.graph._analysis import Axes, Axis, Rule, Site

# The result is zero where any one (or one at this place) of the operands is, whatever the others.
_ANNIHILATES = {"mul": (0, 1), "and": (0, 1), "div": (0,), "rem": (0,)}


def couple(at: Site) -> list[Axes]:
    """Join axes that lie at the same place; a size of 1 broadcasts and says nothing."""
    out = at.out_shape()
    axes: list[Axis | None] = []
    if any(len(v.aval.shape) not in (0, len(out)) for v in at.eqn.invars):  # a bitcast
        for axis in (axis for operand in at.ins for axis in operand):
            at.freeze(axis)
        return [(None,) * len(out)]
    for place, size in enumerate(out):
        here = [
            i
            for i, v in enumerate(at.eqn.invars)
            if len(v.aval.shape) and (v.aval.shape[place] == size or v.aval.shape[place] != 1)
        ]
        ids = at.join(*(at.ins[i][place] for i in here)) if size != 1 else None
        zero = ids is not None and _is_zero(at, here, place)
        if ids is not None and zero is None:
            at.blur(ids, lambda: f"{at.name()} is not finite where a unit is removed")
        axes.append(None if ids is None else Axis(ids, bool(zero)))
    return [tuple(axes)] * len(at.eqn.outvars)


def _is_zero(at: Site, here: Sequence[int], place: int) -> bool | None:
    """Tell whether the result is zero at removed indices of an axis."""
    if not at.analysis.exact:
        return False
    axes = [at.ins[i][place] if i in here else None for i in range(len(at.eqn.invars))]
    return stays_zero(at, [axis is not None and axis.zero for axis in axes])


def stays_zero(at: Site, zero: Sequence[bool]) -> bool | None:
    """Tell whether the result is zero if some of the operands are; None if it is not finite."""
    name = at.eqn.primitive.name
    known = [z or at.is_zero(i) for i, z in enumerate(zero)]
    if any(zero):  # such as `tanh(0)`, `max(0, 0.0)`, `min(0, 6.0)` or `0 / 0`
        values = [0.0 if k else _scalar(at, i) for i, k in enumerate(known)]
        if None not in values:
            return _maps_to_zero(at, values)
    if name == "select_n":
        return all(known[1:])
    return any(zero[i] for i in _ANNIHILATES.get(name, ()))


def _scalar(at: Site, i: int) -> float | None:
    """The operand's value if it is one known number."""
    value = at.value(i) if at.eqn.invars[i].aval.size == 1 else None
    return None if value is None or np.iscomplexobj(value) else float(value.reshape(()))


def _maps_to_zero(at: Site, values: Sequence[Any]) -> bool | None:
    dtypes = tuple(np.dtype(v.aval.dtype).name for v in at.eqn.invars)
    params = at.params
    try:
        return _evaluate(at.eqn.primitive, tuple(values), dtypes, tuple(sorted(params.items())))
    except TypeError:  # a param that cannot be hashed, or is made for arrays
        return False


@functools.cache
def _evaluate(
    primitive: Any, values: tuple[float, ...], dtypes: tuple[str, ...], params: tuple[Any, ...]
) -> bool | None:
    with jax.ensure_compile_time_eval():
        scalars = [np.asarray(v, d) for v, d in zip(values, dtypes, strict=True)]
        out = primitive.bind(*scalars, **dict(params))
    out = np.asarray(out)
    return not np.any(out) if np.all(np.isfinite(out)) else None


def same(at: Site) -> list[Axes]:
    """Pass every operand on as the result of the same place."""
    return at.ins


ELEMENTWISE = (
    *("abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2"),
    *("atanh", "bessel_i0e", "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil"),
    *("clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p", "cos"),
    *("cosh", "digamma", "div", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2"),
    *("expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "imag"),
    *("integer_pow", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2"),
    *("logistic", "lt", "lt_to", "max", "min", "mul", "name", "ne", "neg", "nextafter"),
    *("not", "one_minus_square", "or", "polygamma", "population_count", "pow"),
    *("real", "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left"),
    *("shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt"),
    *("square", "stop_gradient", "sub", "tan", "tanh", "xor", "zeros_like", "zeta"),
)

RULES = {name: Rule(couple) for name in ELEMENTWISE}
RULES |= {
    name: Rule(same) for name in ("optimization_barrier", "sharding_constraint", "device_put")
}
