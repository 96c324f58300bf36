"""Rules for functions with a derivative of their own: it is analysed, and cut, beside them."""

# `jax.custom_jvp` and `custom_vjp` hide a derivative that autodiff does not see in the jaxpr:
#
#     y = custom_jvp_call[call_jaxpr=f, jvp_jaxpr_fun=...] x
#
# The small function should have it as well, cut as the function is. So it is traced here, at the
# large shapes, and walked: a tangent has the axes of its primal, and what comes out is cut as the
# value whose derivative it is. Frame 0 of the equation is the function, frame 1 the derivative.

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune.graph._axes import Axes
from jaxprune.graph._calls import either
from jaxprune.graph._collectives import on_devices
from jaxprune.graph._frames import Value, callers
from jaxprune.graph._lean import lean
from jaxprune.graph._loops import are_inexact
from jaxprune.graph._site import Rule, Site

T = TypeVar("T")


def custom_jvp(at: Site) -> list[Axes]:
    """A function with a derivative of its own: both are analysed, and cut together."""
    outs = at.walk(at.params["call_jaxpr"], at.ins, at.known()).outs
    inexact, results = are_inexact(at.eqn.invars), are_inexact(at.eqn.outvars)
    function = _alone(at)

    def derivative(primals: Sequence[Value], tangents: Sequence[Value]) -> list[Value]:
        # Tangents are of what is inexact alone: whole numbers stay at their point.
        moved = lambda *x: _where(inexact, x, primals)  # noqa: E731
        at_point = only(inexact, primals)
        outs = jax.jvp(lambda *x: only(results, function(*moved(*x))), at_point, tangents)
        return outs[1]

    _walk_derivative(at, derivative, only(inexact, at.ins), only(results, outs))
    return outs


def cut_custom_jvp(at: Site, *values: Value) -> list[Value]:
    if len(at.frame.inner[at.number]) == 1:
        return at.inner(0)(*values)
    inexact, results = are_inexact(at.eqn.invars), are_inexact(at.eqn.outvars)
    function = jax.custom_jvp(at.inner(0))

    @function.defjvp
    def derivative(
        primals: Sequence[Value], tangents: Sequence[Value]
    ) -> tuple[list[Value], list[Value]]:
        outs = function(*primals)
        moved = iter(at.inner(1)(*primals, *only(inexact, tangents)))
        # jax wants a tangent for whole numbers, too, which has the type float0 and no entries.
        still = [np.zeros(jnp.shape(out), jax.dtypes.float0) for out in outs]
        return outs, [next(moved) if i else s for i, s in zip(results, still, strict=True)]

    return function(*values)


def custom_vjp(at: Site) -> list[Axes]:
    """Likewise for a derivative that runs backwards: cotangents of results come in."""
    outs = at.walk(at.params["call_jaxpr"], at.ins, at.known()).outs
    inexact, results = are_inexact(at.eqn.invars), are_inexact(at.eqn.outvars)
    function = _alone(at)

    def derivative(primals: Sequence[Value], cotangents: Sequence[Value]) -> list[Value]:
        at_point = only(inexact, primals)
        pulled = jax.vjp(
            lambda *x: only(results, function(*_where(inexact, x, primals))), *at_point
        )[1]
        return list(pulled(cotangents))

    _walk_derivative(at, derivative, only(results, outs), only(inexact, at.ins))
    return outs


def cut_custom_vjp(at: Site, *values: Value) -> list[Value]:
    inexact, results = are_inexact(at.eqn.invars), are_inexact(at.eqn.outvars)
    inner = at.inner(0)
    if len(at.frame.inner[at.number]) == 1:
        return inner(*values)
    function = jax.custom_vjp(inner)

    def forward(*primals: Value) -> tuple[list[Value], tuple[Value, ...]]:
        return inner(*primals), primals

    def backward(primals: Sequence[Value], cotangents: Sequence[Value]) -> tuple[Value, ...]:
        pulled = iter(at.inner(1)(*primals, *only(results, cotangents)))
        return tuple(next(pulled) if i else None for i in inexact)

    function.defvjp(forward, backward)
    return function(*values)


Derivative = Callable[[Sequence[Value], Sequence[Value]], list[Value]]


def _walk_derivative(
    at: Site, derivative: Derivative, seeds: Sequence[Axes], wanted: Sequence[Axes]
) -> None:
    """Trace a derivative at the full shapes, and let its results be cut as what they belong to.

    ``seeds`` are the axes of the tangents (or cotangents) that go in, ``wanted`` those of the
    values whose tangents come out. The derivative may call the function again, so that rules are
    kept for second derivatives; in the second derivative a function is taken as it is written.
    """
    if at.analysis.deriving == 2:
        return
    primals = [v.aval for v in at.eqn.invars]
    forward = at.primitive.startswith("custom_jvp")
    given = at.eqn.invars if forward else at.eqn.outvars
    tangents = only(are_inexact(given), [v.aval for v in given])
    traced = lean(_trace_in_place(at, derivative, primals, tangents))
    exact, at.analysis.exact = at.analysis.exact, False  # masks are of the function, not of this
    at.analysis.deriving += 1
    frame = at.walk(traced, [*at.ins, *seeds])
    at.analysis.exact = exact
    at.analysis.deriving -= 1
    for a, b in zip(frame.outs, wanted, strict=True):
        either(at, a, b)


def _trace_in_place(
    at: Site, f: Derivative, *specs: Sequence[jax.core.AbstractValue]
) -> core.ClosedJaxpr:
    """Trace a function where the equation stands: what maps over devices has names for axes."""
    traced: list[core.ClosedJaxpr] = []

    def trace() -> tuple[()]:
        traced.append(jax.make_jaxpr(f)(*specs))
        return ()

    run: Callable[[], Any] = trace
    for call in callers(at.frame):
        if call.eqn.primitive.name == "shard_map":
            run = functools.partial(jax.eval_shape, on_devices(call.eqn, run, (), ()))
    run()
    return traced[0]


def _alone(at: Site) -> Callable[..., list[Value]]:
    """The function of one equation, with its derivative: the equation bound again."""
    return lambda *values: at.eqn.primitive.bind(
        *values, **at.eqn.primitive.get_bind_params(at.params)
    )


def only(which: Sequence[bool], values: Iterable[T]) -> list[T]:
    """Those of some values that are asked for."""
    return [x for x, w in zip(values, which, strict=True) if w]


def _where(which: Sequence[bool], new: Sequence[Value], old: Sequence[Value]) -> list[Value]:
    left = iter(new)
    return [next(left) if w else x for x, w in zip(old, which, strict=True)]


RULES = {
    "custom_jvp_call": Rule(custom_jvp, cut_custom_jvp),
    "custom_vjp_call": Rule(custom_vjp, cut_custom_vjp),
}
