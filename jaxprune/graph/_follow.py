"""What every value of a program is made of, followed through the frames of its walk."""

# Each variable is of the program alone, counts rounds of a loop, depends on data, or shows
# parameters: `Value`. From equation to equation:
#
#     c = convert_element_type w     shows `w`, as `w` itself does
#     d = dot_general x c            meets data: noted as a use of `w`; `d` is data
#     e = exp s                      shows `s`, of which a removed weight is one
#     f = mul d e                    meets data, too: a gain, whose zeros become one
#
# What a loop carries is followed until it is what it started with, and notes of rounds that took it
# for something else are thrown away.

import dataclasses
import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax.extend import core

from jaxprune.graph._calls import RULES as CALLS
from jaxprune.graph._frames import Atom, Frame, dtype_of, shape_of
from jaxprune.graph._loops import are_inexact, scan_sizes
from jaxprune.graph._meetings import Meeting, everywhere, meet
from jaxprune.graph._places import Log, at_equation, either, plain
from jaxprune.graph._site import Site
from jaxprune.graph._sources import (
    CONSTANT,
    COUNT,
    DATA,
    Factor,
    Gone,
    Note,
    Value,
    axes_in,
    blended,
    repeated,
    weights,
    without,
)

_PLAIN_CALLS = ({*CALLS} - {"cond"}) | {"custom_jvp_call", "custom_vjp_call"}
_ROUNDS = 8  # of a loop, until what it carries is given up


def follow(log: Log, frame: Frame, ins: Sequence[Value]) -> list[Value]:
    """Follow all equations of a frame; give what its results are made of."""
    env: dict[core.Var, Value] = dict.fromkeys(frame.jaxpr.invars[: len(frame.consts)], CONSTANT)
    env.update(zip(frame.inputs, ins, strict=True))
    read = lambda v: env[v] if isinstance(v, core.Var) else CONSTANT  # noqa: E731
    for number, eqn in enumerate(frame.jaxpr.eqns):
        given = [read(v) for v in eqn.invars]
        if any(value.sources for value in given):
            outs = _results(log, Site(log.analysis, frame, number, eqn), given)
        else:
            outs = [plain(given)] * len(eqn.outvars)
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in frame.jaxpr.outvars]


def _results(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """What the results of one equation are made of, if parameters go in."""
    name = at.primitive
    if at.number in at.frame.inner and name in _PLAIN_CALLS:
        return follow(log, at.frame.inner[at.number][0], ins)
    if name in _RULES:
        return _RULES[name](log, at, ins)
    return at_equation(log, at, ins)


# Calls and loops.


def _scan(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """Follow the body on slices of what is scanned; what only moves through is laid in a row."""
    n, k = scan_sizes(at.params)
    xs = [
        _slice(log, at, v, value)
        for v, value in zip(at.eqn.invars[n + k :], ins[n + k :], strict=True)
    ]
    outs = _looped(log, at, (ins[:n], ins[n : n + k], xs))
    ys = [_stacked(log, at, value) for value in outs[k:]]
    return [*outs[:k], *ys]


def _slice(log: Log, at: Site, atom: Atom, value: Value) -> Value:
    """What a round is given of what a scan runs over."""
    if value.kind == "weights":
        role, why = _run_over(at)
        gone = [Gone(axes_in(s.axes[0]), role, why, _number(at)) for s in value.sources]
        pairs = zip(value.sources, gone, strict=True)
        return weights([without(s, [0], [g]) for s, g in pairs])
    if value.kind == "constant" and jnp.issubdtype(dtype_of(atom), jnp.integer):
        return COUNT
    return log.settle(at, value)


def _number(at: Site) -> tuple[int, int]:
    """What tells a scan from all others."""
    return id(at.frame), at.number


def _run_over(at: Site) -> tuple[str | None, Note]:
    """The role of an axis that a scan runs over: layers, if what one makes goes on to the next."""
    _, k = scan_sizes(at.params)
    if any(are_inexact(at.eqn.outvars[:k])):
        return "layer", Note("")
    return None, Note("{} maps over it, and lays what it makes side by side", at)


def _stacked(log: Log, at: Site, value: Value) -> Value:
    """What a scan gives for all rounds. Slices of a parameter that went in are its layers again."""
    if value.kind != "weights":
        return log.settle(at, value)
    length, sources = at.params["length"], []
    for source in value.sources:
        own = [gone for gone in source.gone if gone.scan == _number(at)]
        rest = tuple(gone for gone in source.gone if gone.scan != _number(at))
        axes = frozenset[int]().union(*(gone.axes for gone in own))
        lead = (Factor(axes, length),)
        sources.append(dataclasses.replace(source, axes=(lead, *source.axes), gone=rest))
    return weights(sources)


def _while(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    _, test = at.frame.inner[at.number]
    m, n = at.params["cond_nconsts"], at.params["body_nconsts"]
    outs = _looped(log, at, (ins[m : m + n], ins[m + n :], ()))
    follow(log, test, [*ins[:m], *outs])
    return outs


def _looped(log: Log, at: Site, given: tuple[Sequence[Value], ...]) -> list[Value]:
    """Follow a body until it hands on what it was given; give that, and its other results.

    ``given`` are what is the same in each round, what is carried at first, and slices.
    """
    (body, *_), (consts, start, xs) = at.frame.inner[at.number], given
    counts = _counters(body, len(consts), start)
    carry = [COUNT if i in counts else log.settle(at, value) for i, value in enumerate(start)]
    before = len(log.meetings)
    begun: list[Meeting] = []
    for n in itertools.count():
        outs = follow(log, body, [*consts, *carry, *xs])
        after = [either(log, at, c, o) for c, o in zip(carry, outs, strict=False)]
        if after == carry:
            break
        if n > _ROUNDS:  # it would be something else in every round
            after = [c if c == a else DATA for c, a in zip(carry, after, strict=True)]
        fresh = log.meetings[before:]
        del log.meetings[before:]
        for old, new in zip(carry, after, strict=True):
            if old.kind == "weights" and new.kind == "data":
                begun += _beginnings(log, at, old, fresh)
        carry = after
    log.meetings += begun
    return [*carry, *outs[len(start) :]]


def _beginnings(log: Log, at: Site, value: Value, fresh: Sequence[Meeting]) -> list[Meeting]:
    """Uses of what a loop starts with and replaces by what it makes of data.

    What the first round contracts with data is a weight all the same, as in training inside of a
    loop; else it is something that data is added to, as the first state of a recurrence.
    """
    found = []
    for source in value.sources:
        used = [m for m in fresh if m.leaf == source.leaf and m.kind in ("matmul", "conv")]
        placed = everywhere(source, None, Note("a loop starts with it, in {}", at))
        found += used or [meet(at, source, "bias", placed, log.ranks[source.leaf])]
    return found


def _counters(body: Frame, lead: int, start: Sequence[Value]) -> set[int]:
    """Numbers of what a loop carries that only counts its rounds.

    They are whole, begin as a constant and change, or begin anywhere and grow by a constant. What
    data has a say in will be found to be data.
    """
    made = {v: eqn for eqn in body.jaxpr.eqns for v in eqn.outvars}
    carried = zip(body.inputs[lead:], body.jaxpr.outvars, start, strict=False)
    found = set()
    for i, (v, out, value) in enumerate(carried):
        if value.sources or out is v or not jnp.issubdtype(dtype_of(v), jnp.integer):
            continue
        eqn = made.get(out) if isinstance(out, core.Var) else None
        if value.kind != "data" or (eqn is not None and _grows(body, eqn, v)):
            found.add(i)
    return found


def _grows(body: Frame, eqn: core.JaxprEqn, v: core.Var) -> bool:
    """Tell whether an equation adds a constant to a variable."""
    if eqn.primitive.name not in ("add", "sub"):
        return False
    a, b = eqn.invars
    return a is v and (isinstance(b, core.Literal) or b in body.known)


def _cond(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """Follow all branches; a result is what it is in any of them."""
    log.settle(at, ins[0])
    if ins[0].kind == "weights":
        log.note_all(at, ins[0], "{} takes it for the number of a branch", "derived")
    branches = [follow(log, frame, ins[1:]) for frame in at.frame.inner[at.number]]
    outs = [log.settle(at, value) for value in branches[0]]
    for other in branches[1:]:
        outs = [either(log, at, a, b) for a, b in zip(outs, other, strict=True)]
    return outs


def _shard_map(log: Log, at: Site, ins: Sequence[Value]) -> Sequence[Value]:
    """Follow what one device does, on its shards."""
    (body,) = at.frame.inner[at.number]
    pairs = zip(ins, at.eqn.invars, body.inputs, strict=True)
    outs = follow(log, body, [_resized(at, *each) for each in pairs])
    results = zip(outs, body.jaxpr.outvars, at.eqn.outvars, strict=True)
    return [_resized(at, *each) for each in results]


def _resized(at: Site, value: Value, old: Atom, new: Atom) -> Value:
    """A value as one device sees it, or all of them."""
    sources = []
    for source in value.sources:
        axes, gone = [], list(source.gone)
        for factors, n, m in zip(source.axes, shape_of(old), shape_of(new), strict=True):
            axes.append(factors if n == m else blended(factors, m) if m > 1 else repeated(1))
            if m == 1 < n and axes_in(factors):
                note = Note("{} leaves one index to a device", at)
                gone.append(Gone(axes_in(factors), None, note))
        sources.append(dataclasses.replace(source, axes=tuple(axes), gone=tuple(gone)))
    return dataclasses.replace(value, sources=tuple(sources))


_RULES = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}
