"""Values that depend on no input, computed only where somebody asks for them."""

# A program computes much that no input has a say in: the length of an axis as a divisor, a causal
# mask, the rows that a fixed permutation gathers. Rules ask for such values to tell a zero from
# anything, or where a slice begins.
#
#     a = iota[size=4]          known: a thunk that binds `iota`
#     b = rev[dimensions=(0,)] a    known: a thunk that asks the one of `a` and binds `rev`
#     c = mul x 2.0             not known, as `x` is an input
#
# Nothing is computed while a program is walked; a thunk computes once, with all results of its
# equation at a time.

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune.graph._frames import Atom, Frame, Known, Value, shape_of

_LARGEST = 65_536  # entries of a value that is worth computing to ask one question about it
_SAME_EVERYWHERE = ("pvary", "pcast")  # the same number on every device
_NO_CONSTANTS = ("random_bits", "random_seed", "ppermute")  # nothing that a rule may rely on


def is_reference(value: Value) -> bool:
    """True for a reference to an array that lives outside, false for an array or number."""
    return hasattr(jax.typeof(value), "inner_aval")


def is_known(value: Value) -> bool:
    """True for a number or array that can be looked at: no tracer, no key and no reference."""
    key = jnp.issubdtype(getattr(value, "dtype", np.dtype(float)), jax.dtypes.extended)
    return not isinstance(value, jax.core.Tracer) and not key and not is_reference(value)


def known_constants(consts: Sequence[Value]) -> list[Known | None]:
    """For each constant of a program what gives it, if it can be looked at."""
    return [functools.partial(np.asarray, c) if is_known(c) else None for c in consts]


def known_operands(frame: Frame, atoms: Sequence[Atom]) -> list[Known | None]:
    """For each operand what computes it, if it depends on no input."""
    return [
        frame.known.get(v) if isinstance(v, core.Var) else known_constants([v.val])[0]
        for v in atoms
    ]


def remember(frame: Frame, number: int) -> None:
    """Let small results of an equation be computed later, if they depend on no input."""
    eqn = frame.jaxpr.eqns[number]
    known = known_operands(frame, eqn.invars)
    if any(k is None for k in known) or number in frame.inner or not _are_small(eqn.outvars):
        return
    if eqn.primitive.name in _SAME_EVERYWHERE:
        frame.known[eqn.outvars[0]] = known[0]  # type: ignore[assignment]  # none of them is None
    elif not eqn.effects and eqn.primitive.name not in _NO_CONSTANTS:
        compute = _computed(eqn, [k for k in known if k is not None])
        for i, var in enumerate(eqn.outvars):
            frame.known[var] = functools.partial(lambda compute, i: compute()[i], compute, i)


def _are_small(outs: Sequence[Atom]) -> bool:
    shapes = [shape_of(v) for v in outs]
    fixed = all(isinstance(n, int) for shape in shapes for n in shape)  # or symbolic
    return fixed and all(math.prod(shape) <= _LARGEST for shape in shapes)


def _computed(eqn: core.JaxprEqn, known: Sequence[Known]) -> Callable[[], list[np.ndarray]]:
    """What computes all results of an equation, once."""

    @functools.cache
    def compute() -> list[np.ndarray]:
        with jax.ensure_compile_time_eval(), eqn.ctx.manager:
            out = eqn.primitive.bind(*(k() for k in known), **eqn.params)
        return [np.asarray(x) for x in (out if eqn.primitive.multiple_results else [out])]

    return compute
