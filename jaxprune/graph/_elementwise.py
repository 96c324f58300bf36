"""Rules for primitives that work element by element."""

# Two things have to be told: which axes meet (those at the same place, where neither broadcasts),
# and what lies at a removed index afterwards. The second is found by trying: what may lie there is
# a number, or anything, and the primitive itself is evaluated on numbers.
#
#     y = exp x       x is zero where a unit is removed, so that y is one
#     z = mul y m     m is zero there: so is z, whatever y is
#     u = log x       minus infinity there, while the small network has nothing: a group of it is
#                     not exact, since masking makes it infinite or NaN
#
# With anything among the operands only a rule can tell: `mul` annihilates, `add` does not.

import functools
import itertools
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune.graph._axes import ANYTHING, ZERO, Axes, Axis, Entry, Values, axis_of
from jaxprune.graph._frames import dtype_of, shape_of
from jaxprune.graph._site import Rule, Site

# The result is zero where any one (or one at this place) of the operands is, whatever the others.
_ANNIHILATES = {"mul": (0, 1), "and": (0, 1), "div": (0,), "rem": (0,)}

# Finite for all finite operands, so that nothing has to be tried.
_FINITE = frozenset(
    (
        *("add", "add_any", "sub", "mul", "max", "min", "and", "or", "xor", "clamp", "complex"),
        *("eq", "ne", "lt", "le", "gt", "ge", "eq_to", "lt_to", "le_to", "atan2", "nextafter"),
    )
)


def couple(at: Site) -> list[Axes]:
    """Join axes that lie at the same place; a size of 1 broadcasts and says nothing."""
    out = at.out_shape()
    axes: list[Axis | None] = []
    shapes = [shape_of(v) for v in at.eqn.invars]
    if any(len(shape) not in (0, len(out)) for shape in shapes):  # a bitcast
        return at.freeze_all()
    for place, size in enumerate(out):
        here = [i for i, s in enumerate(shapes) if s and (s[place] == size or s[place] != 1)]
        ids = at.join(*(at.ins[i][place] for i in here)) if size != 1 else None
        if ids is None:
            axes.append(None)
            continue
        values, finite = _results(at, {i: axis.values for i in here if (axis := at.ins[i][place])})
        if not finite:
            at.blur(ids, lambda: f"{at.name()} is not finite where a unit is removed")
        axes.append(axis_of(ids, values))
    return [tuple(axes)] * len(at.eqn.outvars)


def _results(at: Site, removed: Mapping[int, Values]) -> tuple[Values, bool]:
    """What may lie at removed indices of an axis, and whether that is finite for sure.

    ``removed`` says what the operands that have the axis hold there; others are the same all over.
    """
    if all(values == ANYTHING for values in removed.values()):
        return ANYTHING, True
    numbers = range(len(at.eqn.invars))
    held = [removed[i] if i in removed else frozenset((at.scalar(i),)) for i in numbers]
    found, finite = [], True
    for values in itertools.product(*held):
        if at.primitive == "select_n":
            found += _selected(values, removed)
            continue
        value, fine = result(at, values, removed)
        found.append(value)
        finite = finite and fine
    return frozenset(found), finite


def _selected(values: Sequence[Entry], removed: Mapping[int, Values]) -> list[Entry]:
    """Cases that may be selected. A zero that kept units have as well says nothing of removed."""
    which, *cases = values
    if which is not None:
        return [cases[int(which)]]
    told = [v for i, v in enumerate(cases) if v != 0 or i + 1 in removed]
    return cases if not any(cases) and None not in cases else told


def result(at: Site, values: Sequence[Entry], removed: Mapping[int, Values]) -> tuple[Entry, bool]:
    """The result for some values of the operands, None for any number; and whether it is finite."""
    name = at.primitive
    known = [i for i in removed if values[i] is not None]
    if not known:
        return None, True
    if None not in values:
        value = evaluate_at(at, values)
        finite = (
            value is None
            or bool(np.isfinite(value))
            or not all(np.isfinite(v) for v in values if v is not None)
        )
        return (None if value is None or np.isnan(value) else value), finite
    whole = not jnp.issubdtype(dtype_of(at.eqn.outvars[0]), jnp.inexact)
    finite = whole or name in _FINITE or not any(_explodes(at, values, i) for i in known)
    zero = any(values[i] == 0 for i in _ANNIHILATES.get(name, ()))
    return (0.0 if zero and finite else None), finite


def _explodes(at: Site, values: Sequence[Entry], i: int) -> bool:
    """Tell whether an operand's value makes a result infinite that another value would not.

    Tried with numbers of both signs for the operands that may be anything.
    """
    for number in (0.7, -1.3):
        tried = [number if v is None else v for v in values]
        here = evaluate_at(at, tried)
        there = evaluate_at(at, [*tried[:i], 0.6, *tried[i + 1 :]])
        if there is not None and _is_finite(there) and not _is_finite(here):
            return True
    return False


def _is_finite(value: Entry) -> bool:
    """Tell whether a number is finite; one that is not known is taken to be."""
    return value is None or bool(np.isfinite(value))


def stays_zero(at: Site, zero: Sequence[bool]) -> bool | None:
    """Tell whether the result is zero if some of the operands are; None if it is not finite."""
    values, finite = _results(at, {i: ZERO for i, z in enumerate(zero) if z})
    return values == ZERO if finite else None


def evaluate_at(at: Site, values: Sequence[Entry]) -> Entry:
    """Compute one number from numbers; None where the primitive takes more than numbers."""
    dtypes = tuple(np.dtype(dtype_of(v)).name for v in at.eqn.invars)
    params = tuple(sorted(at.params.items()))
    try:
        return _evaluate(at.eqn.primitive, tuple(values), dtypes, params)
    except (TypeError, ValueError, NameError):  # a param that cannot be hashed, a mesh axis
        return None


@functools.cache
def _evaluate(
    primitive: core.Primitive,
    values: tuple[Entry, ...],
    dtypes: tuple[str, ...],
    params: tuple[tuple[str, Hashable], ...],
) -> Entry:
    with jax.ensure_compile_time_eval():
        scalars = [np.asarray(v, d) for v, d in zip(values, dtypes, strict=True)]
        out = primitive.bind(*scalars, **dict(params))
    return np.asarray(out).item()


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
    *(
        "mulhi",
        "real",
        "reduce_precision",
        "regularized_incomplete_beta",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
    ),
    *("shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt"),
    *("square", "stop_gradient", "sub", "tan", "tanh", "xor", "zeros_like", "zeta"),
)

RULES = {name: Rule(couple) for name in ELEMENTWISE}
RULES |= {
    name: Rule(same) for name in ("optimization_barrier", "sharding_constraint", "device_put")
}
