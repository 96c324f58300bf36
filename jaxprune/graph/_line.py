"""A program as one straight line of steps: calls inlined, layers of a scan one after another."""

# The walk over calibration data stops at every product of a weight, changes the weight and goes on.
# For that a program has to lie in one line:
#
#     y = jit[jaxpr=layer] x w            the steps of `layer`, on refs of the caller
#     h = scan[length=12] x up            a dozen times the steps of the body, each on its own row
#                                         of `up`, which is a view
#     s = scan[length=100] state w x      one step: a loop over time, with the products inside of it
#
# It is read off the frames of the walk that is there. A ref is the number of a value. Of each it is
# known what it is: a view of parameters, a constant that is computed now (rounds of a loop, and
# what is made of them), made of data, or what the program makes of none. What no data has a say in
# is the same step once, however many layers make it.

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune.graph._calls import RULES as CALLS
from jaxprune.graph._form import form_of
from jaxprune.graph._frames import Frame, Known, Value, dtype_of
from jaxprune.graph._linear import Part, View, joined
from jaxprune.graph._loops import clocks, scan_sizes
from jaxprune.graph._site import Site
from jaxprune.graph._walk import Analysis

Ref: TypeAlias = int

_PLAIN_CALLS = ({*CALLS} - {"cond"}) | {"custom_jvp_call", "custom_vjp_call"}
_MOVES = (  # linear in their first operand; others say how, and show no entry twice or say so
    *("reshape", "transpose", "squeeze", "slice", "rev", "copy", "copy_p", "broadcast_in_dim"),
    *("convert_element_type", "dynamic_slice", "gather", "name", "sharding_constraint"),
)
_NEVER_COMPUTED = ("random_bits", "random_seed", "random_wrap", "random_fold_in", "random_split")
_SMALL = 64  # entries of what is computed while a program is laid out: rounds and the like


class Step(NamedTuple):
    """One operation.

    Attributes:
      form: equal for steps that do the same.
      run: ``(*operands) -> results``.
      ins: what it takes, each once.
      outs: what it gives.
      at: the equation, for whoever wants to name it or has to know what is inside; None for what
        the layout of the line itself needs.
      loops: lines of the programs inside of it, if weights go into them.
      refs: of the equation the operands that are variables, as often as they come.
    """

    form: Hashable
    run: Callable[..., Sequence[Value]]
    ins: tuple[Ref, ...]
    outs: tuple[Ref, ...]
    at: Site | None = None
    loops: tuple["Line", ...] = ()
    refs: tuple[Ref, ...] = ()


@dataclasses.dataclass
class Line:
    """A program without calls, as it is being laid out.

    Attributes:
      analysis: the walk whose frames it is read off.
      steps: in order.
      types: shape and dtype of each value.
      views: of the values that show parameters.
      known: the values that are computed already.
      later: what computes constants of the program.
      data: what depends on data.
      counted: what depends on the round of a loop, and is known.
      made: results of steps without data, by form and operands.
      ins, outs: of the program.
      reads_rows: whether a parameter is read at an index that is counted.
    """

    analysis: Analysis
    steps: list[Step] = dataclasses.field(default_factory=list)
    types: list[Any] = dataclasses.field(default_factory=list)
    views: dict[Ref, View] = dataclasses.field(default_factory=dict)
    known: dict[Ref, Value] = dataclasses.field(default_factory=dict)
    later: dict[Ref, Known] = dataclasses.field(default_factory=dict)
    data: set[Ref] = dataclasses.field(default_factory=set)
    counted: set[Ref] = dataclasses.field(default_factory=set)
    made: dict[Hashable, tuple[Ref, ...]] = dataclasses.field(default_factory=dict)
    ins: list[Ref] = dataclasses.field(default_factory=list)
    outs: list[Ref] = dataclasses.field(default_factory=list)
    reads_rows: bool = False

    def new(self, like: Any) -> Ref:
        """A ref of a value that has not been there."""
        self.types.append(like)
        return len(self.types) - 1

    def constant(self, value: Value, *, counted: bool = False) -> Ref:
        """A ref of a value that is known; the same one for the same array."""
        key = ("constant", counted, form_of(value))
        if key not in self.made:
            ref = self.new(jax.typeof(value))
            self.known[ref] = value
            self.made[key] = (ref,)
            if counted:
                self.counted.add(ref)
        return self.made[key][0]

    def value(self, ref: Ref) -> np.ndarray | None:
        """A value that depends on nothing but the program and the rounds of its loops."""
        if ref not in self.known:
            return self.later[ref]() if ref in self.later else None
        found, kind = self.known[ref], jax.typeof(self.known[ref])
        if isinstance(found, jax.core.Tracer) or not isinstance(kind.dtype, np.dtype):
            return None  # keys of random numbers are no numbers
        return np.asarray(found, kind.dtype)

    def add(self, step: Step, types: Sequence[Any]) -> tuple[Ref, ...]:
        """Append a step, whose results are given refs here; one without data only once."""
        moving = any(i in self.data for i in step.ins) or any(map(is_reference, types))
        key = (step.form, step.ins)
        if not moving and key in self.made:
            return self.made[key]
        outs = tuple(map(self.new, types))
        self.steps.append(step._replace(outs=outs))
        if moving or (step.at is not None and step.at.eqn.effects):
            self.data.update(outs)
        else:
            self.made[key] = outs
        return outs


def is_reference(kind: Any) -> bool:
    """Tell the type of an array that is written to."""
    return hasattr(kind, "inner_aval")


def line_of(analysis: Analysis, frame: Frame, views: Sequence[View | None]) -> Line:
    """Lay a program out; its inputs are views where there are any, and else data."""
    line = Line(analysis)
    for var, view in zip(frame.inputs, views, strict=True):
        ref = line.new(var.aval)
        line.ins.append(ref)
        if view is None:
            line.data.add(ref)
        else:
            line.views[ref] = view
    line.outs = inline(line, frame, line.ins)
    return line


def inline(line: Line, frame: Frame, ins: Sequence[Ref]) -> list[Ref]:
    """Append the steps of a frame to a line; give the refs of its results."""
    consts = frame.jaxpr.invars[: len(frame.consts)]
    env: dict[core.Var, Ref] = {
        v: line.constant(c) for v, c in zip(consts, frame.consts, strict=True)
    }
    env.update(zip(frame.inputs, ins, strict=True))

    def read(atom: Any) -> Ref:
        return env[atom] if isinstance(atom, core.Var) else line.constant(atom.val)

    for number, eqn in enumerate(frame.jaxpr.eqns):
        at = Site(line.analysis, frame, number, eqn)
        for var, ref in zip(eqn.outvars, _equation(line, at, read), strict=True):
            env[var] = ref
            if var in frame.known and ref not in line.views and ref not in line.known:
                line.later[ref] = frame.known[var]
    return [read(v) for v in frame.jaxpr.outvars]


def _equation(line: Line, at: Site, read: Callable[[Any], Ref]) -> Sequence[Ref]:
    """Append what one equation does; give the refs of its results."""
    name, eqn = at.primitive, at.eqn
    if name in _PLAIN_CALLS and at.number in at.frame.inner:
        return inline(line, at.frame.inner[at.number][0], list(map(read, eqn.invars)))
    if name == "optimization_barrier":
        return list(map(read, eqn.invars))
    if name in _LOOPS and at.number in at.frame.inner:
        return _LOOPS[name](line, at, list(map(read, eqn.invars)))
    if any(isinstance(v, core.Var) and read(v) in line.views for v in eqn.invars):
        shown = _moved(line, at, list(map(read, eqn.invars)))
        if shown is not None:
            return shown
    return _computed(line, at, [read(v) for v in eqn.invars if isinstance(v, core.Var)])


# What is computed.


def bind(eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    """The results of an equation, on the mesh that there was."""
    with eqn.ctx.manager:
        return _result(eqn, *values)


def _result(eqn: core.JaxprEqn, *values: Value) -> list[Value]:
    params = eqn.primitive.get_bind_params(eqn.params)
    out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _computed(
    line: Line, at: Site, refs: Sequence[Ref], loops: Sequence[Line] = ()
) -> Sequence[Ref]:
    """Append an equation as it is, or compute it now if rounds of loops alone have a say in it."""
    eqn, ins = at.eqn, tuple(dict.fromkeys(refs))
    left = iter(refs)
    places = [ins.index(next(left)) if isinstance(v, core.Var) else v.val for v in eqn.invars]
    literal = [not isinstance(v, core.Var) for v in eqn.invars]

    def run(*values: Value) -> list[Value]:
        pairs = zip(places, literal, strict=True)
        return bind(eqn, *(p if given else values[p] for p, given in pairs))

    form = (at.primitive, form_of(eqn.params), form_of(places), tuple(literal))
    types = [v.aval for v in eqn.outvars]
    known = _now(line, at, ins)
    if known is None:
        return line.add(Step(form, run, ins, (), at, tuple(loops), tuple(refs)), types)
    with jax.ensure_compile_time_eval():
        return [line.constant(np.asarray(x), counted=True) for x in run(*known)]


def _now(line: Line, at: Site, ins: Sequence[Ref]) -> list[Value] | None:
    """The operands of what is made of the rounds of loops: those are known, and it is small."""
    if not any(i in line.counted for i in ins) or at.eqn.effects:
        return None
    small = all(math.prod(shape) <= _SMALL for shape in at.out_shapes())
    values = [line.value(i) for i in ins] if small else [None]
    if at.primitive in _NEVER_COMPUTED or any(v is None for v in values):
        return None
    return values


# What only moves parameters.


def _moved(line: Line, at: Site, ins: Sequence[Ref]) -> list[Ref] | None:
    """Views of what an equation makes of views; None if it does more than to move them."""
    name, types = at.primitive, [v.aval for v in at.eqn.outvars]
    if name in ("concatenate", "stack") and all(i in line.views for i in ins):
        run = lambda *x: _result(at.eqn, *x)[0]  # noqa: E731
        return [_view(line, joined([line.views[i] for i in ins], _move(at), run), types[0])]
    if name in ("mul", "div"):
        return _scaled(line, at, ins)
    if ins[0] not in line.views or not _is_move(at):
        return None
    view, others = line.views[ins[0]], [line.value(i) for i in ins[1:]]
    if any(x is None for x in others):
        return None
    if any(i in line.counted for i in ins[1:]):
        line.reads_rows = True
    if (layer := _layer(at, view, others)) is not None:
        return [_view(line, layer, types[0])]
    found = []
    for k, kind in enumerate(types):
        run = functools.partial(lambda k, x: _result(at.eqn, x, *others)[k], k)
        found.append(_view(line, view.then((*_move(at), form_of(others), k), run), kind))
    return found


def _view(line: Line, view: View, kind: Any) -> Ref:
    ref = line.new(kind)
    line.views[ref] = view
    return ref


def _move(at: Site) -> tuple[Hashable, ...]:
    return at.primitive, form_of(at.params)


def _is_move(at: Site) -> bool:
    """Tell whether a primitive shows entries of its first operand as they are."""
    if at.primitive in ("split", "unstack"):
        return True
    if at.primitive == "broadcast_in_dim":
        return math.prod(at.shape()) == math.prod(at.out_shape())
    if at.primitive == "convert_element_type":  # rounding to whole numbers is not linear
        both = dtype_of(at.eqn.invars[0]), dtype_of(at.eqn.outvars[0])
        return all(jnp.issubdtype(t, jnp.floating) for t in both)
    return at.primitive in _MOVES


def _layer(at: Site, view: View, starts: Sequence[Any]) -> View | None:
    """A slice of one index of the first axis of a parameter as it is: a layer, kept as one."""
    shape, out = at.shape(), at.out_shape()
    plain = not view.moves and len(view.parts) == 1 and len(shape) > 1
    if not plain or out[:1] != (1,) or out[1:] != shape[1:]:
        return None
    if at.primitive == "slice":
        i = at.params["start_indices"][0]
    elif at.primitive == "dynamic_slice":
        i = min(max(int(starts[0]), 0), shape[0] - 1)
    else:
        return None
    return view.row(i).then(("layer",), lambda x: x[None])


def _scaled(line: Line, at: Site, ins: Sequence[Ref]) -> list[Ref] | None:
    """A parameter times a number, which is not zero, is a view of it."""
    side = 0 if ins[0] in line.views else 1
    number = line.value(ins[1 - side])
    if number is None or number.size != 1 or (at.primitive == "div" and side == 1):
        return None
    if not np.isfinite(number).all() or not number.any() or at.shape(side) != at.out_shape():
        return None
    run = lambda w: _result(at.eqn, *((w, number) if side == 0 else (number, w)))[0]  # noqa: E731
    move = (*_move(at), side, form_of(number))
    return [_view(line, line.views[ins[side]].then(move, run), at.eqn.outvars[0].aval)]


# Loops.


def _scan(line: Line, at: Site, ins: Sequence[Ref]) -> Sequence[Ref]:
    """Lay layers out one after another; a loop with the same weights in each round is a step."""
    n, k = scan_sizes(at.params)
    (body,) = at.frame.inner[at.number]
    rows = any(x in line.views for x in ins[n + k :])
    if at.params["length"] == 0:
        return _computed(line, at, _read(at, ins))
    if rows or (any(c in line.views for c in ins[:n]) and _counts_rows(line, at, body, ins)):
        return _unrolled(line, at, body, ins)
    own = [i in line.views and number < n for number, i in enumerate(ins)]
    loops = [_inside(line, body, own)] if any(own) else []
    return _computed(line, at, _read(at, ins), loops)


def _read(at: Site, ins: Sequence[Ref]) -> list[Ref]:
    """The refs of those operands that are variables."""
    return [i for i, v in zip(ins, at.eqn.invars, strict=True) if isinstance(v, core.Var)]


def _inside(line: Line, body: Frame, own: Sequence[bool]) -> Line:
    """The line of a body, of which some inputs are parameters."""
    views = [View((Part(i),)) if shown else None for i, shown in enumerate(own)]
    return line_of(line.analysis, body, views)


def _counts_rows(line: Line, at: Site, body: Frame, ins: Sequence[Ref]) -> bool:
    """Tell whether rounds read rows of a parameter at the number of the round."""
    n, k = scan_sizes(at.params)
    trial = Line(line.analysis)
    clock = set(clocks(at))
    refs = []
    for number, (var, i) in enumerate(zip(body.inputs, ins, strict=True)):
        value = None if i in line.views else line.value(i)
        if value is not None and n <= number < n + k and number - n in clock:
            refs.append(trial.constant(value, counted=True))
        elif value is not None and number >= n + k and value.dtype.kind in "iu" and len(value):
            refs.append(trial.constant(value[0], counted=True))
        elif i in line.views and number < n:
            refs.append(_view(trial, View((Part(number),)), var.aval))
        else:
            refs.append(trial.new(var.aval))
            trial.data.add(refs[-1])
    inline(trial, body, refs)
    return trial.reads_rows


def _unrolled(line: Line, at: Site, body: Frame, ins: Sequence[Ref]) -> list[Ref]:
    """Append every round of a scan, on its own rows of what is scanned."""
    n, k = scan_sizes(at.params)
    consts, carry, xs = list(ins[:n]), list(ins[n : n + k]), ins[n + k :]
    for i in clocks(at):
        if carry[i] not in line.views and (value := line.value(carry[i])) is not None:
            carry[i] = line.constant(value, counted=True)
    rounds = range(at.params["length"])
    order = rounds[::-1] if at.params["reverse"] else rounds
    made: list[Sequence[Ref]] = []
    kinds = [v.aval for v in body.inputs[n + k :]]
    for i in order:
        slices = [_row(line, x, i, kind) for x, kind in zip(xs, kinds, strict=True)]
        outs = inline(line, body, [*consts, *carry, *slices])
        carry = outs[:k]
        made.append(outs[k:])
    made = made[::-1] if at.params["reverse"] else made
    types = [v.aval for v in at.eqn.outvars[k:]]
    ys = [_stacked(line, rows, t) for rows, t in zip(zip(*made, strict=True), types, strict=True)]
    return [*carry, *ys]


def _row(line: Line, x: Ref, i: int, kind: Any) -> Ref:
    """What a round is given of what a scan runs over."""
    if x in line.views:
        return _view(line, line.views[x].row(i), kind)
    value = line.value(x)
    if value is not None:
        return line.constant(value[i], counted=True)
    run = lambda x, i: [lax.dynamic_index_in_dim(x, i, 0, keepdims=False)]  # noqa: E731
    number = line.constant(np.int32(i))
    return line.add(Step(("row",), run, (x, number), ()), [kind])[0]


def _stacked(line: Line, rows: Sequence[Ref], kind: Any) -> Ref:
    """What a scan gives for all its rounds."""
    ins = tuple(dict.fromkeys(rows))
    places = [ins.index(r) for r in rows]
    run = lambda *values: [jnp.stack([values[p] for p in places])]  # noqa: E731
    return line.add(Step(("stacked", tuple(places)), run, ins, ()), [kind])[0]


def _while(line: Line, at: Site, ins: Sequence[Ref]) -> Sequence[Ref]:
    """A loop of unknown length: the same weights in each round, if any."""
    m, n = at.params["cond_nconsts"], at.params["body_nconsts"]
    own = [i in line.views and m <= number < m + n for number, i in enumerate(ins)]
    loops = [_inside(line, at.frame.inner[at.number][0], own[m:])] if any(own) else []
    return _computed(line, at, _read(at, ins), loops)


def _cond(line: Line, at: Site, ins: Sequence[Ref]) -> Sequence[Ref]:
    """The branch that is taken, where that is known; else all of them, as one step."""
    branches = at.frame.inner[at.number]
    index = None if at.params.get("branches_platforms") else line.value(ins[0])
    if index is not None and any(i in line.views for i in ins[1:]):
        number = min(max(int(index), 0), len(branches) - 1)
        return inline(line, branches[number], ins[1:])
    own = [i in line.views for i in ins[1:]]
    loops = [_inside(line, b, own) for b in branches] if any(own) else []
    return _computed(line, at, _read(at, ins), loops)


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}
