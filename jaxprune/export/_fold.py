"""A jaxpr evaluated as inference needs it: constants computed, norms taken into the weights."""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune.export._held import Product, hold_back, merge
from jaxprune.export._operations import Value, rewrite
from jaxprune.export._products import (
    PRODUCTS,
    aval_of,
    behind_data,
    bind,
    cast,
    common_type,
    dot,
    is_known,
    is_narrow,
    permuted,
)
from jaxprune.graph._loops import scan_sizes
from jaxprune.graph._source import source_line

# Calls of one jaxpr, and the parameter that holds it. Derivatives have no use in a file.
CALLS = {
    **dict.fromkeys(("jit", "closed_call", "composite", "remat", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}
SMALL = 65536  # entries; a larger constant is only kept if it is no larger than what made it
LAYERS = 128  # that are written one by one


class Empty(NamedTuple):
    """A value without entries, made only if somebody asks for it.

    A ``Reshape`` of ONNX takes a size of 0 for something else, and jax2onnx reads the batch from
    whatever value came last.
    """

    shape: tuple[Any, ...]
    dtype: Any


def fold(closed: core.ClosedJaxpr, *inputs: Value) -> list[Value]:
    """Evaluate a closed jaxpr on traced inputs, and all that depends on no input right away."""
    return _run(closed.jaxpr, closed.consts, inputs)


def _run(jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[Value]) -> list[Value]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    read = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    uses = collections.Counter(v for v in read if isinstance(v, core.Var))

    def value(atom: Any) -> Value:
        return env[atom] if isinstance(atom, core.Var) else atom.val

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            outs = _evaluate(eqn, [value(v) for v in eqn.invars])
            # A product that is read twice is computed once, as it is: taking what follows into
            # its weights would make two of it.
            outs = [
                x if uses[v] == 1 or isinstance(x, Empty) else _value(x)
                for v, x in zip(eqn.outvars, outs, strict=True)
            ]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [_value(value(v)) for v in jaxpr.outvars]


def _evaluate(eqn: core.JaxprEqn, operands: Sequence[Value]) -> list[Value]:
    name = eqn.primitive.name
    if not eqn.effects and all(_is_empty(v.aval) for v in eqn.outvars):
        return [Empty(aval_of(v).shape, aval_of(v).dtype) for v in eqn.outvars]
    if name == "concatenate":
        operands = [x for x in operands if not isinstance(x, Empty)]
    merged = merge(eqn, operands)
    return _compute(eqn, [_value(x) for x in operands]) if merged is None else [merged]


def _compute(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    name = eqn.primitive.name
    if name in CALLS:
        inner = eqn.params[CALLS[name]]
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
    if not eqn.effects and all(map(is_known, values)) and _is_small(eqn):
        with jax.ensure_compile_time_eval():
            return bind(eqn, values)
    if name in LOOPS:
        return LOOPS[name](eqn.params, values)
    if any(is_narrow(aval_of(v).dtype) for v in (*eqn.invars, *eqn.outvars)):
        return _widened(eqn, values)
    return _apply(eqn, values)


def _is_empty(aval: Any) -> bool:
    return any(isinstance(n, int) and n == 0 for n in getattr(aval, "shape", ()))


def _apply(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Evaluate an operation by the one that does best in a file."""
    wanted = common_type(eqn) if eqn.primitive.name in PRODUCTS else None
    if wanted is None:
        other = _simpler(eqn, values)
        return bind(eqn, values) if other is None else [other]
    values = [cast(x, wanted) for x in values]
    eqn = eqn.replace(params={**eqn.params, "preferred_element_type": wanted})
    other = _simpler(eqn, values)
    (out,) = bind(eqn, values) if other is None else [_value(other)]
    return [cast(out, aval_of(eqn.outvars[0]).dtype)]


def _widened(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Compute in float32 what onnxruntime cannot compute, and round where JAX does."""
    wide = np.dtype("float32")
    values = [cast(x, wide) if is_narrow(x.dtype) else x for x in values]
    params = {k: wide if _is_narrow_type(v) else v for k, v in eqn.params.items()}
    outs = [_value(x) for x in _apply(eqn.replace(params=params), values)]
    return [cast(x, aval_of(v).dtype) for x, v in zip(outs, eqn.outvars, strict=True)]


def _is_narrow_type(value: Value) -> bool:
    return isinstance(value, np.dtype) and is_narrow(value)


def _scan(params: Any, values: Sequence[Value]) -> list[Value]:
    body, (n, k) = params["jaxpr"], scan_sizes(params)
    fixed, start, rows = values[:n], values[n : n + k], values[n + k :]
    if _are_layers(rows, params["length"]):
        return _one_by_one(params, fixed, start, [np.asarray(row) for row in rows])

    def step(carry: Any, row: Any) -> Value:
        outs = _run(body.jaxpr, body.consts, [*fixed, *carry, *row])
        return outs[:k], outs[k:]

    turn = (lambda x: lax.rev(x, (0,))) if params["reverse"] else (lambda x: x)
    length = None if rows else params["length"]  # which may be any
    carry, stacked = lax.scan(
        step, list(map(jnp.asarray, start)), list(map(turn, rows)), length=length
    )
    return [*carry, *map(turn, stacked)]


def _are_layers(rows: Sequence[Value], length: Any) -> bool:
    """Tell constants, one for each turn of a loop, from data."""
    plain = all(is_known(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in rows)
    return bool(rows) and plain and 0 < length <= LAYERS


def _one_by_one(
    params: Any, fixed: Sequence[Value], carry: Sequence[Value], rows: Sequence[np.ndarray]
) -> list[Value]:
    """Write layers out: runtimes prepare constant weights for products, not slices of a stack."""
    body, steps, outs = params["jaxpr"], range(params["length"]), []
    for i in reversed(steps) if params["reverse"] else steps:
        results = _run(body.jaxpr, body.consts, [*fixed, *carry, *(row[i] for row in rows)])
        carry, out = results[: len(carry)], results[len(carry) :]
        outs.append(out)
    order = outs[::-1] if params["reverse"] else outs
    return [*carry, *(jnp.stack(each) for each in zip(*order, strict=True))]


def _while(params: Any, values: Sequence[Value]) -> list[Value]:
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    first = params["cond_nconsts"]
    second = first + params["body_nconsts"]
    return list(
        lax.while_loop(
            lambda carry: _run(test.jaxpr, test.consts, [*values[:first], *carry])[0],
            lambda carry: _run(body.jaxpr, body.consts, [*values[first:second], *carry]),
            list(map(jnp.asarray, values[second:])),
        )
    )


def _cond(params: Any, values: Sequence[Value]) -> list[Value]:
    """Compute a known branch, or all and choose: jax2onnx loses the constants of branches.

    Of branches for platforms a file takes the one for all others.
    """
    index, *operands = values
    branches, platforms = params["branches"], params.get("branches_platforms") or ()
    if None in platforms:
        index = platforms.index(None)
    if is_known(index):
        branches = [branches[int(np.clip(index, 0, len(branches) - 1))]]
    results = [_run(b.jaxpr, b.consts, operands) for b in branches]
    return [_chosen(index, outs) for outs in zip(*results, strict=True)]


def _chosen(index: Any, outs: Sequence[Value]) -> Value:
    first, *others = outs
    for i, other in enumerate(others, 1):
        first = jnp.where(index == i, other, first)
    return first


# What runs a jaxpr more than once, or not at all.
LOOPS: dict[str, Callable[[Any, Sequence[Any]], list[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def _simpler(eqn: core.JaxprEqn, values: Sequence[Value]) -> Value | None:
    """What goes into a file where the operation as it is does not, or is slower."""
    name = eqn.primitive.name
    if name == "max" and is_known(values[1]) and np.ndim(values[1]) == 0 and not values[1]:
        return jax.nn.relu(values[0])
    if name == "integer_pow" and eqn.params["y"] in (2, 3):
        x = values[0]
        return x * x if eqn.params["y"] == 2 else x * x * x
    if name not in PRODUCTS:
        return rewrite(eqn, values)
    product = hold_back(eqn, values)
    if product is not None:
        return product
    if name == "dot_general" and is_known(values[0]) and not is_known(values[1]):
        eqn, values, order = behind_data(eqn, values)
        (out,) = bind(eqn, values) if (other := dot(eqn, *values)) is None else [other]
        return permuted(out, order)
    return PRODUCTS[name](eqn, *values)


def equations(jaxpr: core.Jaxpr, caller: str | None = None) -> Iterator[tuple[Any, str | None]]:
    """All equations and the lines they are from, those inside of a call in place of the call."""
    for eqn in jaxpr.eqns:
        line = source_line(eqn) or caller  # what jax caches has lost who called it
        if eqn.primitive.name in CALLS:
            inner = eqn.params[CALLS[eqn.primitive.name]]
            yield from equations(getattr(inner, "jaxpr", inner), line)
        else:
            yield eqn, line


def _is_small(eqn: core.JaxprEqn) -> bool:
    """Tell whether results are small enough to be kept in place of what computes them."""
    shapes = [getattr(v.aval, "shape", ()) for v in (*eqn.invars, *eqn.outvars)]
    if eqn.primitive.name == "dim_as_value":  # an axis of any size, as a number
        return False
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return False
    sizes = [math.prod(shape) for shape in shapes]
    made = sum(sizes[len(eqn.invars) :])
    return made <= max(SMALL, sum(sizes[: len(eqn.invars)]))


def _value(x: Value) -> Value:
    """Compute a product that was held back."""
    if isinstance(x, Empty):
        return jnp.zeros(x.shape, x.dtype)
    if not isinstance(x, Product):
        return x
    return x.value()
