"""Programs without what no result depends on."""

# What is computed for nothing would still couple axes, and hold those that it holds. jax leaves it
# out when it compiles, so that we leave it out before we look:
#
#     a = dot_general x w       read by nobody: gone
#     b, c = optimization_barrier x y    if nobody reads c, y should go as well, which jax's own
#                                        elimination does not see: the barrier becomes b = ... x
#
# Elimination and leaner loops take turns, as each finds more to leave out behind the other.

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from jax.extend import core
from jax.interpreters import partial_eval

Param: TypeAlias = Any  # of an equation: a program, a tuple of them, a number, whatever it wants


def lean(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """Leave out of a program what no result and no effect depends on, at any depth.

    jax does so for all primitives but ``while`` and barriers, whose dead values keep alive what
    they are made from: those are made lean in between.
    """
    jaxpr = _alive(closed.jaxpr)
    while _has_more(jaxpr):
        leaner = _leaner(jaxpr)
        if leaner is jaxpr:
            break
        jaxpr = _alive(leaner)
    return closed.replace(jaxpr=jaxpr)


def _alive(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Keep what results need; all inputs stay."""
    return partial_eval.dce_jaxpr(jaxpr, True, True)[0]


def _has_more(jaxpr: core.Jaxpr) -> bool:
    """Tell whether a loop or barrier is anywhere in a program."""
    return any(
        eqn.primitive.name in _LEAN or any(map(_has_more, core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )


def _leaner(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Let loops and barriers at any depth hand on only what is read. The same object if all do."""
    read = {v for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, core.Var)}
    read |= {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    eqns = []
    for eqn in jaxpr.eqns:
        inside = _map_programs(_leaner, eqn)
        less = _LEAN.get(eqn.primitive.name)
        eqns.append(less(inside, [v in read for v in eqn.outvars]) if less else inside)
    same = all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True))
    return jaxpr if same else jaxpr.replace(eqns=eqns)


def _map_programs(change: Callable[[core.Jaxpr], core.Jaxpr], eqn: core.JaxprEqn) -> core.JaxprEqn:
    """Change the programs in the params of an equation, whose inputs and results stay."""

    def visit(value: Param) -> Param:
        if isinstance(value, tuple):
            items = list(map(visit, value))
            if all(a is b for a, b in zip(items, value, strict=True)):
                return value
            return value._make(items) if hasattr(value, "_make") else tuple(items)
        if isinstance(value, core.ClosedJaxpr):
            new = change(value.jaxpr)
            return value if new is value.jaxpr else value.replace(jaxpr=new)
        return change(value) if isinstance(value, core.Jaxpr) else value

    if not any(map(_has_more, core.jaxprs_in_params(eqn.params))):
        return eqn
    params = {name: visit(value) for name, value in eqn.params.items()}
    same = all(params[name] is value for name, value in eqn.params.items())
    return eqn if same else eqn.replace(params=params)


def _lean_while(eqn: core.JaxprEqn, read: Sequence[bool]) -> core.JaxprEqn:
    """Take out of a loop what is neither read behind it, nor decides when it ends."""
    cond, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    m, n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test, asked = partial_eval.dce_jaxpr(cond.jaxpr, True, [True] * m + list(read))
    wanted = list(asked[m:])
    while True:
        step, needs = partial_eval.dce_jaxpr(body.jaxpr, wanted, [True] * n + wanted)
        if needs[n:] == wanted:
            break
        wanted = needs[n:]
    if all(wanted) and len(step.eqns) == len(body.jaxpr.eqns):
        return eqn
    test = partial_eval.dce_jaxpr(cond.jaxpr, True, [True] * m + wanted)[0]
    params = {"cond_jaxpr": cond.replace(jaxpr=test), "body_jaxpr": body.replace(jaxpr=step)}
    carry = [v for v, w in zip(eqn.invars[m + n :], wanted, strict=True) if w]
    return eqn.replace(
        invars=[*eqn.invars[: m + n], *carry],
        outvars=[v for v, w in zip(eqn.outvars, wanted, strict=True) if w],
        params={**eqn.params, **params},
    )


def _lean_barrier(eqn: core.JaxprEqn, read: Sequence[bool]) -> core.JaxprEqn:
    """Take out of a barrier what is not read behind it."""
    if all(read):
        return eqn
    kept = [
        pair for pair, r in zip(zip(eqn.invars, eqn.outvars, strict=True), read, strict=True) if r
    ]
    return eqn.replace(invars=[i for i, _ in kept], outvars=[o for _, o in kept])


_LEAN = {"while": _lean_while, "optimization_barrier": _lean_barrier}
