"""Lines evaluated: stretches of steps compiled once, and Gram matrices summed inside of loops."""

# A loop over time has the same weights in every round. What they meet is summed while it runs:
#
#     scan (carry) xs              (carry, G) = evaluate the body's line, G + what its places see
#
# The results of a loop do not change by that; loops inside of loops hand their sums out.

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jaxprune.graph._frames import Value
from jaxprune.graph._line import Line, Ref, Step, is_reference
from jaxprune.graph._linear import Part, View
from jaxprune.graph._loops import scan_sizes
from jaxprune.graph._products import places_of
from jaxprune.graph._site import Site

Measure: TypeAlias = Callable[..., jax.Array]  # (product, *data): what is summed over all rows


class Evaluated(NamedTuple):
    """What a program gave.

    Attributes:
      outs: its results.
      sums: of each of its places what was measured.
    """

    outs: list[Value]
    sums: list[jax.Array]


def read_view(view: View, part: Callable[[Part], jax.Array]) -> jax.Array:
    """What a view shows now."""
    return view.read(*map(part, view.parts))


def evaluate(line: Line, ins: Sequence[Value], measure: Measure) -> Evaluated:
    """Evaluate a line, and measure the data at each of its places.

    Args:
      line: a program whose parameters are numbered as its inputs are.
      ins: all inputs, parameters among them.
      measure: ``(product, *data) -> array``.
    """
    env: dict[Ref, Value] = dict(zip(line.ins, ins, strict=True))

    def part(p: Part) -> jax.Array:
        x = ins[p.leaf]
        for i in p.layer:
            x = x[i]
        return x

    def read(ref: Ref) -> Value:
        if ref in line.views:
            return read_view(line.views[ref], part)
        return line.known[ref] if ref in line.known else env[ref]

    at: dict[int, list[Any]] = {}
    for place in places_of(line):
        at.setdefault(place.step, []).append(place)
    sums: list[jax.Array] = []
    for number, step in enumerate(line.steps):
        if step.loops and number in at:
            outs, found = evaluate_loop(step, list(map(read, step.ins)), measure)
            sums += found
        else:
            sums += [measure(p.product, *map(read, p.data)) for p in at.get(number, ())]
            outs = list(step.run(*map(read, step.ins)))
        env.update(zip(step.outs, outs, strict=True))
    return Evaluated(list(map(read, line.outs)), sums)


def evaluate_loop(step: Step, values: Sequence[Value], measure: Measure) -> Evaluated:
    """Evaluate a loop or branches, with what its places see over all rounds."""
    by_ref, at = dict(zip(step.ins, values, strict=True)), cast(Site, step.at)
    left = iter(step.refs)
    operands = [v.val if hasattr(v, "val") else by_ref[next(left)] for v in at.eqn.invars]
    return _LOOPS[at.primitive](step, at.params, operands, measure)


def _zeros(f: Callable[..., Evaluated], *args: Value) -> list[jax.Array]:
    return [jnp.zeros(s.shape, s.dtype) for s in jax.eval_shape(f, *args).sums]


def _added(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _scan(
    step: Step, params: Mapping[str, Any], operands: Sequence[Value], measure: Measure
) -> Evaluated:
    (line,), (n, k) = step.loops, scan_sizes(params)
    consts, init, xs = operands[:n], list(operands[n : n + k]), list(operands[n + k :])
    body = lambda carry, x: evaluate(line, [*consts, *carry, *x], measure)  # noqa: E731
    first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]

    def one(state: Any, x: Any) -> Any:
        carry, sums = state
        outs, found = body(carry, x)
        return (outs[:k], _added(sums, found)), outs[k:]

    (carry, sums), ys = lax.scan(
        one,
        (init, _zeros(body, init, first)),
        xs,
        length=params["length"],
        reverse=params["reverse"],
    )
    return Evaluated([*carry, *ys], sums)


def _while(
    step: Step, params: Mapping[str, Any], operands: Sequence[Value], measure: Measure
) -> Evaluated:
    (line,), m, n = step.loops, params["cond_nconsts"], params["body_nconsts"]
    test = core.jaxpr_as_fun(params["cond_jaxpr"])
    init = list(operands[m + n :])
    body = lambda carry: evaluate(line, [*operands[m : m + n], *carry], measure)  # noqa: E731

    def one(state: Any) -> Any:
        outs, found = body(state[0])
        return outs, _added(state[1], found)

    carry, sums = lax.while_loop(
        lambda state: test(*operands[:m], *state[0])[0], one, (init, _zeros(body, init))
    )
    return Evaluated(list(carry), sums)


def _cond(
    step: Step, params: Mapping[str, Any], operands: Sequence[Value], measure: Measure
) -> Evaluated:
    del params
    index, *rest = operands
    runs = [lambda *x, line=line: evaluate(line, x, measure) for line in step.loops]
    zeros = [_zeros(run, *rest) for run in runs]

    def branch(k: int) -> Callable[..., Any]:
        def run(*x: Value) -> Any:
            outs, found = runs[k](*x)
            sums = [found if i == k else zero for i, zero in enumerate(zeros)]
            return outs, [s for each in sums for s in each]

        return run

    return Evaluated(*lax.switch(index, [branch(k) for k in range(len(runs))], *rest))


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond}


# Stretches.


def stretch(
    steps: Sequence[Step],
    ins: Sequence[Ref],
    outs: Sequence[Ref],
    compiled: dict[Hashable, Any],
    types: Sequence[Any],
) -> Callable[..., list[Value]]:
    """Compile some steps as one function, the same for all stretches of the same form.

    Args:
      steps: in order.
      ins: refs of what it takes.
      outs: refs of what it gives.
      compiled: what has been compiled before.
      types: of all values.
    """
    number: dict[Ref, int] = {}
    name = lambda refs: tuple(number.setdefault(r, len(number)) for r in refs)  # noqa: E731
    form = (name(ins), tuple((s.form, name(s.ins), name(s.outs)) for s in steps), name(outs))
    if form not in compiled:

        def run(*values: Value) -> list[Value]:
            env = dict(zip(ins, values, strict=True))
            for s in steps:
                env.update(zip(s.outs, s.run(*(env[i] for i in s.ins)), strict=True))
            return [env[o] for o in outs]

        # A compiled function may write to an array that it is handed, but not make such a one.
        mutable = any(is_reference(types[o]) for o in outs)
        compiled[form] = run if mutable else jax.jit(run)
    return compiled[form]
