"""What becomes of zeros: whether a block whose parameters are zero passes on what it is given."""

# Leaving a block out is exact if masking all of it comes to the same: with its parameters zero,
#
#     a = dot_general x w0      zero, as w0 is
#     b = tanh a                zero, as tanh(0) is
#     y = add x b               x
#
# So each variable is followed as one of three: zero, a variable that was given (the same value), or
# anything. Only what is sure to be zero counts, so that a block that is called exact is.

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

from jax.extend import core

from jaxprune.graph._collectives import MOVES, SUMS
from jaxprune.graph._elementwise import ELEMENTWISE, stays_zero
from jaxprune.graph._frames import Atom, Frame
from jaxprune.graph._site import Site
from jaxprune.graph._walk import Analysis

# What is known of a variable: it is zero, it is a variable that was given, or it is anything.
Outcome: TypeAlias = core.Var | Literal["zero"] | None
ZERO: Literal["zero"] = "zero"

PLAIN_CALLS = ("jit", "closed_call", "composite", "remat", "remat2", "checkpoint", "shard_map")

# Zero where their first operand is.
_PASSING = (
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "rev", "reduce_sum"),
    *("reduce_max", "reduce_min", "cumsum", "gather", "dynamic_slice", "split", "copy", "name"),
    *("reduce_window_sum", "reduce_window_max", "convert_element_type", "reduce_precision"),
    *SUMS,
)
_SAME = ("copy", "name", "optimization_barrier", *MOVES)  # they give what they get


def outcomes(
    analysis: Analysis,
    frame: Frame,
    given: Mapping[core.Var, Outcome],
    numbers: Iterable[int] | None = None,
) -> dict[core.Var, Outcome]:
    """Follow through equations what is zero and what is a value that was given.

    ``given`` says it of some variables of the frame, ``numbers`` are those of the equations, all
    of them by default.
    """
    states = dict(given)
    for number in range(len(frame.jaxpr.eqns)) if numbers is None else numbers:
        eqn = frame.jaxpr.eqns[number]
        outs = _outcome(Site(analysis, frame, number, eqn), _read(states, eqn.invars))
        states.update(zip(eqn.outvars, outs, strict=True))
    return states


def _read(states: Mapping[core.Var, Outcome], atoms: Sequence[Atom]) -> list[Outcome]:
    return [states.get(v) if isinstance(v, core.Var) else None for v in atoms]


def _outcome(at: Site, ins: list[Outcome]) -> Sequence[Outcome]:
    """What is known of the results of one equation, from what is known of its operands."""
    name, n = at.primitive, len(at.eqn.outvars)
    zero = [s == ZERO or at.is_zero(i) for i, s in enumerate(ins)]
    inner = at.frame.inner.get(at.number, ())[:1]
    if name in ("add", "add_any") and any(zero) and not all(zero):
        return [ins[1] if zero[0] else ins[0]]
    if _is_zero(at, zero):
        return [ZERO] * n
    if name in _SAME:
        return ins
    if inner and name in (*PLAIN_CALLS, "custom_jvp_call", "custom_vjp_call"):
        (body,) = inner
        given = dict(zip(body.inputs, ins, strict=True))
        return _read(outcomes(at.analysis, body, given), body.jaxpr.outvars)
    return [None] * n


def _is_zero(at: Site, zero: Sequence[bool]) -> bool:
    """Tell whether all results of an equation are zero, of whose operands some are."""
    name = at.primitive
    if name in ELEMENTWISE:
        return any(zero) and (bool(stays_zero(at, zero)) or (name in _PASSING and zero[0]))
    if name in ("dot_general", "conv_general_dilated"):
        return any(zero)
    if name in ("concatenate", "pad"):
        return all(zero)
    return name in _PASSING and zero[0]
