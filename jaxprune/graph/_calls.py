"""Rules for primitives that call other programs: jit, loops, branches, custom derivatives."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune.graph._analysis import Axes, Axis, Frame, Rule, Site, Values, axis_of, evaluate
from jaxprune.graph._lean import lean
from jaxprune.graph._take import take


def call(at: Site) -> list[Axes]:
    """A plain call of the jaxpr in a parameter."""
    names = ("jaxpr", "call_jaxpr", "call")
    jaxpr = next(at.params[name] for name in names if name in at.params)
    frame = at.walk(jaxpr, at.ins, at.known(), at.weights())
    for var, inside in zip(at.eqn.outvars, frame.jaxpr.outvars, strict=True):
        if isinstance(inside, core.Var) and inside in frame.known:
            at.frame.known[var] = frame.known[inside]
    return frame.outs


def cut_call(at: Site, *values: Any) -> list[Any]:
    return at.inner()(*values)


def cut_remat(at: Site, *values: Any) -> list[Any]:
    """Keep forgetting what the program wanted to be computed again."""
    again = jax.checkpoint(
        at.inner(), prevent_cse=at.params["prevent_cse"], policy=at.params["policy"]
    )
    return again(*values)


def _both(at: Site, a: Axes, b: Axes) -> Axes:
    """Axes of what is the one value now and the other then."""
    joined = []
    for i, j in zip(a, b, strict=True):
        ids = at.join(i, j)
        both = None if i is None or j is None else (i.values, j.values)
        joined.append(None if ids is None or both is None else axis_of(ids, *both))
    return tuple(joined)


def _until_stable(at: Site, jaxpr: Any, consts: Any, carry: list[Axes], xs: Any) -> Frame:
    """Walk the body of a loop until what it carries is what it started with."""
    while True:
        at.forget()
        frame = at.walk(jaxpr, [*consts, *carry, *xs])
        after = [_both(at, a, b) for a, b in zip(carry, frame.outs, strict=False)]
        if [_pattern(a) for a in after] == [_pattern(a) for a in carry]:
            return frame
        carry[:] = after


def _pattern(axes: Axes) -> list[Values | None]:
    return [None if axis is None else axis.values for axis in axes]


def _valued(axes: Axes, by: Axes) -> Axes:
    """The first axes, with what lies at removed indices of the others."""
    pairs = zip(axes, by, strict=True)
    return tuple(a if a is None or b is None else axis_of(a.ids, b.values) for a, b in pairs)


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # since jax 0.12
    return len(consts), len(carry)


def scan(at: Site) -> list[Axes]:
    """Join what is carried round; the axis that the scan runs along can lose layers."""
    n, k = scan_sizes(at.params)
    consts, carry, xs = at.ins[:n], list(at.ins[n : n + k]), at.ins[n + k :]
    frame = _until_stable(at, at.params["jaxpr"], consts, carry, [x[1:] for x in xs])
    ys = frame.outs[k:]
    if at.params["length"]:  # what is carried out is what the last step made, not the start
        carry = [_valued(a, b) for a, b in zip(carry, frame.outs[:k], strict=True)]
    lead = [x[0] for x in xs]
    if xs and at.params["length"] > 1:
        lead += [axes[0] for _ in ys for axes in [at.fresh((at.params["length"],))]]
        ids = at.join(*lead)
    else:
        ids = None
    if ids is None:
        return [*carry, *((None, *y) for y in ys)]
    at.analysis.layers.append(ids)
    at.analysis.scans.append(at)
    return [*carry, *((Axis(ids, False), *y) for y in ys)]


def clocks(at: Site) -> list[int]:
    """Numbers of what a scan carries that only counts steps: layer numbers, keys to draw by.

    They are no floats, and depend on nothing but constants and one another.
    """
    (body,) = at.frame.inner[at.number]
    n, k = scan_sizes(at.params)
    inputs, outs = body.jaxpr.invars[len(body.consts) :], body.jaxpr.outvars[:k]
    found = [i for i in range(k) if not _inexact([outs[i]])[0]]
    while True:
        other = {v for i, v in enumerate(inputs) if i >= n and i - n not in found}
        left = [i for i in found if not other & _origins(body.jaxpr, outs[i])]
        if left == found:
            return found
        found = left


def _origins(jaxpr: Any, out: Any) -> set[Any]:
    """All variables that a result is computed from."""
    needed = {out} if isinstance(out, core.Var) else set()
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, core.Var))
    return needed


def _times(at: Site, consts: Sequence[Any], init: Sequence[Any], clock: Sequence[int]) -> Any:
    """Run the clocks through all layers: their last values, and what each layer is given."""
    (body,) = at.frame.inner[at.number]
    wanted = dataclasses.replace(
        body, drop={i for i in range(len(body.jaxpr.outvars)) if i not in clock}
    )
    rest = len(body.jaxpr.invars) - len(body.consts) - len(consts)

    def tick(now: list[Any], _: None) -> tuple[list[Any], list[Any]]:
        given: list[Any] = [None] * rest
        for i, value in zip(clock, now, strict=True):
            given[i] = value
        outs = evaluate(at.analysis, wanted, at.kept_roots(), [*consts, *given])
        return [outs[i] for i in clock], now

    start, length = [init[i] for i in clock], at.params["length"]
    return lax.scan(tick, start, None, length=length, reverse=at.params["reverse"])


def cut_scan(at: Site, *values: Any) -> list[Any]:
    """Scan the layers that are left, each with the number and the keys that it had."""
    n, k = scan_sizes(at.params)
    consts, init, xs = values[:n], list(values[n : n + k]), list(values[n + k :])
    body = at.inner()
    length = xs[0].shape[0] if xs else at.params["length"]
    reverse, unroll = at.params["reverse"], min(at.params["unroll"], max(length, 1))
    clock = clocks(at) if length < at.params["length"] else []
    last, times = _times(at, consts, init, clock) if clock else ([], [])
    if clock:
        kept = at.kept_ins()[n + k][0]
        times = [take(t, [kept, *[None] * (t.ndim - 1)]) for t in times]

    def step(carry: list[Any], given: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        x, now = given
        outs = body(*consts, *_filled(carry, clock, now), *x)
        return [out for i, out in enumerate(outs[:k]) if i not in clock], outs[k:]

    moving = [x for i, x in enumerate(init) if i not in clock]
    carry, ys = lax.scan(step, moving, (xs, times), length=length, reverse=reverse, unroll=unroll)
    return [*_filled(carry, clock, last), *ys]


def _filled(others: Sequence[Any], places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Put values at their places among others."""
    left, own = iter(others), dict(zip(places, values, strict=True))
    return [own[i] if i in own else next(left) for i in range(len(others) + len(own))]


def while_(at: Site) -> list[Axes]:
    m, n = at.params["cond_nconsts"], at.params["body_nconsts"]
    carry = list(at.ins[m + n :])
    _until_stable(at, at.params["body_jaxpr"], at.ins[m : m + n], carry, [])
    at.walk(at.params["cond_jaxpr"], [*at.ins[:m], *carry])
    return carry


def cut_while(at: Site, *values: Any) -> list[Any]:
    m, n = at.params["cond_nconsts"], at.params["body_nconsts"]
    body, cond = at.inner(0), at.inner(1)
    return lax.while_loop(
        lambda carry: cond(*values[:m], *carry)[0],
        lambda carry: body(*values[m : m + n], *carry),
        list(values[m + n :]),
    )


def cond(at: Site) -> list[Axes]:
    known = at.known()[1:]
    outs, *others = [at.walk(b, at.ins[1:], known).outs for b in at.params["branches"]]
    for other in others:
        outs = [_both(at, a, b) for a, b in zip(outs, other, strict=True)]
    return outs


def cut_cond(at: Site, index: Any, *values: Any) -> list[Any]:
    branches = [at.inner(i) for i in range(len(at.params["branches"]))]
    platforms = at.params.get("branches_platforms")
    if platforms is not None:  # which one runs is decided when it is compiled
        named = {
            name: branch
            for names, branch in zip(platforms, branches, strict=True)
            for name in names or ("default",)
        }
        return lax.platform_dependent(*values, **named)
    return lax.switch(index, branches, *values)


def custom_jvp(at: Site) -> list[Axes]:
    """A function with a derivative of its own: both are analysed, and cut together."""
    outs = at.walk(at.params["call_jaxpr"], at.ins, at.known()).outs
    inexact, results = _inexact(at.eqn.invars), _inexact(at.eqn.outvars)
    function = _alone(at)

    def derivative(primals: list[Any], tangents: list[Any]) -> list[Any]:
        moved = lambda *x: _where(inexact, x, primals)  # noqa: E731
        at_point = [p for p, i in zip(primals, inexact, strict=True) if i]
        outs = jax.jvp(lambda *x: _only(results, function(*moved(*x))), at_point, tangents)
        return outs[1]

    _walk_derivative(at, derivative, _only(inexact, at.ins), _only(results, outs))
    return outs


def cut_custom_jvp(at: Site, *values: Any) -> list[Any]:
    if len(at.frame.inner[at.number]) == 1:
        return at.inner(0)(*values)
    inexact, results = _inexact(at.eqn.invars), _inexact(at.eqn.outvars)
    function = jax.custom_jvp(at.inner(0))

    @function.defjvp
    def derivative(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
        outs = function(*primals)
        moved = iter(at.inner(1)(*primals, *_only(inexact, tangents)))
        still = [np.zeros(jnp.shape(out), jax.dtypes.float0) for out in outs]
        return outs, [next(moved) if i else s for i, s in zip(results, still, strict=True)]

    return function(*values)


def custom_vjp(at: Site) -> list[Axes]:
    """Likewise for a derivative that runs backwards."""
    outs = at.walk(at.params["call_jaxpr"], at.ins, at.known()).outs
    inexact, results = _inexact(at.eqn.invars), _inexact(at.eqn.outvars)
    function = _alone(at)

    def derivative(primals: list[Any], cotangents: list[Any]) -> list[Any]:
        at_point = [p for p, i in zip(primals, inexact, strict=True) if i]
        pulled = jax.vjp(
            lambda *x: _only(results, function(*_where(inexact, x, primals))), *at_point
        )[1]
        return list(pulled(cotangents))

    _walk_derivative(at, derivative, _only(results, outs), _only(inexact, at.ins))
    return outs


def cut_custom_vjp(at: Site, *values: Any) -> list[Any]:
    inexact, results = _inexact(at.eqn.invars), _inexact(at.eqn.outvars)
    inner = at.inner(0)
    if len(at.frame.inner[at.number]) == 1:
        return inner(*values)
    function = jax.custom_vjp(inner)

    def forward(*primals: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return inner(*primals), primals

    def backward(primals: tuple[Any, ...], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        pulled = iter(at.inner(1)(*primals, *_only(results, cotangents)))
        return tuple(next(pulled) if i else None for i in inexact)

    function.defvjp(forward, backward)
    return function(*values)


def _walk_derivative(
    at: Site, derivative: Any, seeds: Sequence[Axes], wanted: Sequence[Axes]
) -> None:
    """Trace a derivative at the full shapes, and let its results be cut as what they belong to.

    The derivative may call the function again, so that rules are kept for second derivatives; in
    the second derivative a function is taken as it is written.
    """
    if at.analysis.deriving == 2:
        return
    primals = [v.aval for v in at.eqn.invars]
    forward = at.eqn.primitive.name.startswith("custom_jvp")
    given = at.eqn.invars if forward else at.eqn.outvars
    tangents = _only(_inexact(given), [v.aval for v in given])
    traced = lean(_trace_in_place(at, derivative, primals, tangents))
    exact, at.analysis.exact = at.analysis.exact, False
    at.analysis.deriving += 1
    frame = at.walk(traced, [*at.ins, *seeds])
    at.analysis.exact = exact
    at.analysis.deriving -= 1
    for a, b in zip(frame.outs, wanted, strict=True):
        _both(at, a, b)


def _trace_in_place(at: Site, f: Any, *specs: Any) -> Any:
    """Trace a function where the equation stands: what maps over devices has names for axes."""
    traced: list[Any] = []

    def trace() -> tuple[()]:
        traced.append(jax.make_jaxpr(f)(*specs))
        return ()

    run, site = trace, at.frame.caller
    while site is not None:
        if site.eqn.primitive.name == "shard_map":
            run = functools.partial(jax.eval_shape, on_devices(site, run, (), ()))
        site = site.frame.caller
    run()
    return traced[0]


def on_devices(at: Site, f: Any, in_specs: Any, out_specs: Any) -> Any:
    """Map a function over devices as a ``shard_map`` equation does."""
    return jax.shard_map(
        f,
        mesh=at.params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(at.params["newly_manual_axes"]),
        check_vma=at.params["check_vma"],
    )


def _alone(at: Site) -> Any:
    """The function of one equation, with its derivative."""
    return lambda *values: at.eqn.primitive.bind(
        *values, **at.eqn.primitive.get_bind_params(at.params)
    )


def _inexact(atoms: Sequence[Any]) -> list[bool]:
    return [bool(jnp.issubdtype(v.aval.dtype, jnp.inexact)) for v in atoms]


def _only(which: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [x for x, w in zip(values, which, strict=True) if w]


def _where(which: Sequence[bool], new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    left = iter(new)
    return [next(left) if w else x for x, w in zip(old, which, strict=True)]


RULES = {
    **{
        name: Rule(call, cut_call)
        for name in ("jit", "closed_call", "composite", "custom_vmap_call")
    },
    **{name: Rule(call, cut_remat) for name in ("remat", "remat2", "checkpoint")},
    "scan": Rule(scan, cut_scan),
    "while": Rule(while_, cut_while),
    "cond": Rule(cond, cut_cond),
    "custom_jvp_call": Rule(custom_jvp, cut_custom_jvp),
    "custom_vjp_call": Rule(custom_vjp, cut_custom_vjp),
}
