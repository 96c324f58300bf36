"""Rules for primitives that call a program: jit, remat, branches."""

# What is called is walked in a frame of its own, with the axes of the operands as those of its
# inputs: ids pass through calls, so that a call is coupled as its equations would be if they stood
# in its place.

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core

from jaxprune.graph._axes import Axes
from jaxprune.graph._frames import Value
from jaxprune.graph._site import Rule, Site


def call(at: Site) -> list[Axes]:
    """A plain call of the jaxpr in a parameter."""
    names = ("jaxpr", "call_jaxpr", "call")
    jaxpr = next(at.params[name] for name in names if name in at.params)
    frame = at.walk(jaxpr, at.ins, at.known(), at.weights())
    for var, inside in zip(at.eqn.outvars, frame.jaxpr.outvars, strict=True):
        if isinstance(inside, core.Var) and inside in frame.known:
            at.frame.known[var] = frame.known[inside]
    return frame.outs


def cut_call(at: Site, *values: Value) -> list[Value]:
    return at.inner()(*values)


def cut_remat(at: Site, *values: Value) -> list[Value]:
    """Keep forgetting what the program wanted to be computed again."""
    again = jax.checkpoint(
        at.inner(), prevent_cse=at.params["prevent_cse"], policy=at.params["policy"]
    )
    return again(*values)


def either(at: Site, a: Axes, b: Axes) -> Axes:
    """Axes of what is the one value now and the other then."""
    return tuple(at.beside(i, j) for i, j in zip(a, b, strict=True))


def cond(at: Site) -> list[Axes]:
    """Walk all branches; what they give is one value or another, and is cut alike."""
    known = at.known()[1:]
    outs, *others = [at.walk(b, at.ins[1:], known).outs for b in at.params["branches"]]
    for other in others:
        outs = [either(at, a, b) for a, b in zip(outs, other, strict=True)]
    return outs


def cut_cond(at: Site, index: jax.Array, *values: Value) -> Sequence[Value]:
    branches = [at.inner(i) for i in range(len(at.params["branches"]))]
    return switch(at.params, branches, index, values)


def switch(
    params: Mapping[str, Any],
    branches: Sequence[Callable[..., Any]],
    index: jax.Array,
    values: Sequence[Value],
) -> Sequence[Value]:
    """Run one of the branches, as the params of a ``cond`` say."""
    platforms = params.get("branches_platforms")
    if platforms is not None:  # which one runs is decided when it is compiled
        named = {
            name: branch
            for names, branch in zip(platforms, branches, strict=True)
            for name in names or ("default",)
        }
        return lax.platform_dependent(*values, **named)
    return lax.switch(index, branches, *values)


RULES = {
    **{
        name: Rule(call, cut_call)
        for name in ("jit", "closed_call", "composite", "custom_vmap_call")
    },
    **{name: Rule(call, cut_remat) for name in ("remat", "remat2", "checkpoint")},
    "cond": Rule(cond, cut_cond),
}
