"""Rules for loops: what is carried round, and the layers that a scan runs along."""

# A loop has one frame for all of its steps. Two things follow.
#
# What is carried is the start in the first step and what the body made in all others, so that both
# are cut alike: their axes are joined. What lies at a removed index may differ (zero at first, one
# after `exp`), so that the body is walked again with what may lie there now, until that is what it
# started with. Sets of such values only grow, and there are few: it takes two or three walks.
#
# The axis that a scan runs along counts its steps: one id is a step, for all arrays that are
# stacked along it.
#
#     c, ys = scan[length=4] k c xs     k: constants, the same in each step
#                                       c: carried, xs: f32[4,8,8], one slice a step
#
# If every step applies a layer to what is carried, that axis holds layers, and removing the index
# 2 of `xs` leaves out layer 2. So its ids are no channels: `find_blocks` asks for them.

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxprune.graph._axes import Axes, Axis, Values, axis_of
from jaxprune.graph._calls import either
from jaxprune.graph._evaluate import evaluate
from jaxprune.graph._frames import Atom, Frame, Value, dtype_of
from jaxprune.graph._site import Rule, Site
from jaxprune.graph._take import take


def _until_stable(
    at: Site,
    jaxpr: core.ClosedJaxpr,
    consts: Sequence[Axes],
    carry: list[Axes],
    xs: Sequence[Axes] = (),
) -> Frame:
    """Walk the body of a loop until what it carries is what it started with.

    ``carry`` is replaced by axes of what is carried in any step.
    """
    while True:
        at.forget()
        frame = at.walk(jaxpr, [*consts, *carry, *xs])
        after = [either(at, a, b) for a, b in zip(carry, frame.outs, strict=False)]
        if [_values(a) for a in after] == [_values(a) for a in carry]:
            return frame
        carry[:] = after


def _values(axes: Axes) -> list[Values | None]:
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
        _run(at, [axis for axis in lead if axis is not None])
    else:  # a scan over nothing is a loop: a step that is left out would be one of the same
        ids = None
    if ids is None:
        return [*carry, *((None, *y) for y in ys)]
    at.analysis.layers.append(ids)
    at.analysis.scans.append(at)
    return [*carry, *((Axis(ids, False), *y) for y in ys)]


def _run(at: Site, lead: Sequence[Axis]) -> None:
    """Note which index of what is scanned is which step, also where no step can be left out."""
    for axis in lead[1:]:  # those of a scan over inputs were held, and not joined
        at.analysis.coupling.join(lead[0].ids, axis.ids)
    if lead:
        at.analysis.runs.append(lead[0].ids)


def clocks(at: Site) -> list[int]:
    """Numbers of what a scan carries that only counts steps: layer numbers, keys to draw by.

    They are no floats, and depend on nothing but constants and one another. With layer 2 left out
    layer 3 still has to be given the number 3, so that clocks run through all steps.
    """
    (body,) = at.frame.inner[at.number]
    n, k = scan_sizes(at.params)
    inputs, outs = body.inputs, body.jaxpr.outvars[:k]
    found = [i for i in range(k) if not are_inexact([outs[i]])[0]]
    while True:  # the largest set that depends on nothing outside of it
        other = {v for i, v in enumerate(inputs) if i >= n and i - n not in found}
        left = [i for i in found if not other & _origins(body.jaxpr, outs[i])]
        if left == found:
            return found
        found = left


def _origins(jaxpr: core.Jaxpr, out: Atom) -> set[core.Var]:
    """All variables that a result is computed from."""
    needed = {out} if isinstance(out, core.Var) else set()
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(v for v in eqn.invars if isinstance(v, core.Var))
    return needed


def are_inexact(atoms: Sequence[Atom]) -> list[bool]:
    """Say which of some values have floating or complex entries."""
    return [bool(jnp.issubdtype(dtype_of(v), jnp.inexact)) for v in atoms]


def _times(
    at: Site, consts: Sequence[Value], init: Sequence[Value], clock: Sequence[int]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Run the clocks through all layers: their last values, and what each layer is given.

    ``init`` are all values carried at the start, ``clock`` the numbers of the clocks among them;
    what each layer is given has the whole length of the scan as its first axis.
    """
    (body,) = at.frame.inner[at.number]
    wanted = dataclasses.replace(
        body, drop={i for i in range(len(body.jaxpr.outvars)) if i not in clock}
    )
    rest = len(body.inputs) - len(consts)

    def tick(now: list[jax.Array], _: None) -> tuple[list[jax.Array], list[jax.Array]]:
        given: list[Value] = [None] * rest
        for i, value in zip(clock, now, strict=True):
            given[i] = value
        outs = evaluate(at.analysis, wanted, at.kept_roots(), [*consts, *given])
        return [outs[i] for i in clock], now

    start, length = [init[i] for i in clock], at.params["length"]
    return lax.scan(tick, start, None, length=length, reverse=at.params["reverse"])


def cut_scan(at: Site, *values: Value) -> list[Value]:
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

    def step(carry: Sequence[Value], given: Stacked) -> tuple[list[Value], list[Value]]:
        x, now = given
        outs = body(*consts, *_filled(carry, clock, now), *x)
        return [out for i, out in enumerate(outs[:k]) if i not in clock], outs[k:]

    moving = [x for i, x in enumerate(init) if i not in clock]
    carry, ys = lax.scan(step, moving, (xs, times), length=length, reverse=reverse, unroll=unroll)
    return [*_filled(carry, clock, last), *ys]


Stacked: TypeAlias = tuple[Sequence[Value], Sequence[Value]]  # slices of what is scanned, clocks


def _filled(others: Sequence[Value], places: Sequence[int], values: Sequence[Value]) -> list[Value]:
    """Put values at their places among others."""
    left, own = iter(others), dict(zip(places, values, strict=True))
    return [own[i] if i in own else next(left) for i in range(len(others) + len(own))]


def while_(at: Site) -> list[Axes]:
    """Join what is carried round; nothing runs along an axis."""
    m, n = at.params["cond_nconsts"], at.params["body_nconsts"]
    carry = list(at.ins[m + n :])
    _until_stable(at, at.params["body_jaxpr"], at.ins[m : m + n], carry)
    at.walk(at.params["cond_jaxpr"], [*at.ins[:m], *carry])
    return carry


def cut_while(at: Site, *values: Value) -> Sequence[Value]:
    m, n = at.params["cond_nconsts"], at.params["body_nconsts"]
    body, cond = at.inner(0), at.inner(1)
    return lax.while_loop(
        lambda carry: cond(*values[:m], *carry)[0],
        lambda carry: body(*values[m : m + n], *carry),
        list(values[m + n :]),
    )


RULES = {"scan": Rule(scan, cut_scan), "while": Rule(while_, cut_while)}
