"""A jaxpr evaluated as inference needs it: constants computed, norms taken into the weights."""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune.export._operations import rewrite
from jaxprune.export._products import cast, common_type, convolve, dot, is_narrow
from jaxprune.graph._loops import scan_sizes
from jaxprune.graph._source import source_line

# Calls of one jaxpr, and the parameter that holds it. Derivatives have no use in a file.
CALLS = {
    **dict.fromkeys(("jit", "closed_call", "composite", "remat", "remat2", "checkpoint"), "jaxpr"),
    **dict.fromkeys(("core_call", "custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}
SMALL = 65536  # entries; a larger constant is only kept if it is no larger than what made it


class Product(NamedTuple):
    """A convolution or matrix product with constant weights, still open to scales and shifts.

    Batch normalisation behind it is a scale and a shift of each feature. Inside of the weights it
    costs nothing, and what comes next, such as a ReLU, can be fused with the product.

    Attributes:
      make: computes the product from weights and a shift.
      weights: the weights.
      shift: what is added to the product, of its rank; None for nothing.
      place: for each axis of the result the axis of the weights that it comes from, or None.
    """

    make: Callable[[Any, Any], Any]
    weights: Any
    shift: Any
    place: tuple[int | None, ...]


class Empty(NamedTuple):
    """A value without entries, made only if somebody asks for it.

    A ``Reshape`` of ONNX takes a size of 0 for something else, and jax2onnx reads the batch from
    whatever value came last.
    """

    shape: tuple[Any, ...]
    dtype: Any


def fold(closed: Any, *inputs: Any) -> list[Any]:
    """Evaluate a closed jaxpr on traced inputs, and all that depends on no input right away."""
    return _run(closed.jaxpr, closed.consts, inputs)


def _run(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    read = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    uses = collections.Counter(v for v in read if isinstance(v, core.Var))

    def value(atom: Any) -> Any:
        return env[atom] if isinstance(atom, core.Var) else atom.val

    for eqn in jaxpr.eqns:
        with eqn.ctx.manager:
            outs = _evaluate(eqn, [value(v) for v in eqn.invars])
            # What is read twice is computed once, as it is.
            outs = [
                x if uses[v] == 1 or isinstance(x, Empty) else _value(x)
                for v, x in zip(eqn.outvars, outs, strict=True)
            ]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [_value(value(v)) for v in jaxpr.outvars]


def _evaluate(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    name = eqn.primitive.name
    if not eqn.effects and all(_is_empty(v.aval) for v in eqn.outvars):
        return [Empty(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
    if name == "concatenate":
        operands = [x for x in operands if not isinstance(x, Empty)]
    merged = _merge(name, operands)
    return _compute(eqn, [_value(x) for x in operands]) if merged is None else [merged]


def _compute(eqn: Any, values: Sequence[Any]) -> list[Any]:
    name = eqn.primitive.name
    if name in CALLS:
        inner = eqn.params[CALLS[name]]
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
    if not eqn.effects and all(map(is_known, values)) and _is_small(eqn):
        with jax.ensure_compile_time_eval():
            return bind(eqn, values)
    if name in LOOPS:
        return LOOPS[name](eqn.params, values)
    if any(is_narrow(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars)):
        return _widened(eqn, values)
    return _apply(eqn, values)


def _is_empty(aval: Any) -> bool:
    return any(isinstance(n, int) and n == 0 for n in getattr(aval, "shape", ()))


def _apply(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate an operation by the one that does best in a file."""
    wanted = common_type(eqn) if eqn.primitive.name in PRODUCTS else None
    if wanted is None:
        other = _simpler(eqn, values)
        return bind(eqn, values) if other is None else [other]
    values = [cast(x, wanted) for x in values]
    eqn = eqn.replace(params={**eqn.params, "preferred_element_type": wanted})
    other = _simpler(eqn, values)
    (out,) = bind(eqn, values) if other is None else [_value(other)]
    return [cast(out, eqn.outvars[0].aval.dtype)]


def _widened(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Compute in float32 what onnxruntime cannot compute, and round where JAX does."""
    wide = np.dtype("float32")
    values = [cast(x, wide) if is_narrow(x.dtype) else x for x in values]
    params = {k: wide if _is_narrow_type(v) else v for k, v in eqn.params.items()}
    outs = [_value(x) for x in _apply(eqn.replace(params=params), values)]
    return [cast(x, v.aval.dtype) for x, v in zip(outs, eqn.outvars, strict=True)]


def _is_narrow_type(value: Any) -> bool:
    return isinstance(value, np.dtype) and is_narrow(value)


def _scan(params: Any, values: Sequence[Any]) -> list[Any]:
    body, (n, k) = params["jaxpr"], scan_sizes(params)
    fixed, start, rows = values[:n], values[n : n + k], values[n + k :]

    def step(carry: Any, row: Any) -> Any:
        outs = _run(body.jaxpr, body.consts, [*fixed, *carry, *row])
        return outs[:k], outs[k:]

    turn = (lambda x: lax.rev(x, (0,))) if params["reverse"] else (lambda x: x)
    length = None if rows else params["length"]  # which may be any
    carry, stacked = lax.scan(
        step, list(map(jnp.asarray, start)), list(map(turn, rows)), length=length
    )
    return [*carry, *map(turn, stacked)]


def _while(params: Any, values: Sequence[Any]) -> list[Any]:
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


def _cond(params: Any, values: Sequence[Any]) -> list[Any]:
    """Compute all branches and choose: jax2onnx loses the constants of branches."""
    index, *operands = values
    results = [_run(b.jaxpr, b.consts, operands) for b in params["branches"]]
    return [_chosen(index, outs) for outs in zip(*results, strict=True)]


def _chosen(index: Any, outs: Sequence[Any]) -> Any:
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


def _simpler(eqn: Any, values: Sequence[Any]) -> Any | None:
    """What goes into a file where the operation as it is does not, or is slower."""
    name = eqn.primitive.name
    if name == "max" and is_known(values[1]) and np.ndim(values[1]) == 0 and not values[1]:
        return jax.nn.relu(values[0])
    if name == "integer_pow" and eqn.params["y"] in (2, 3):
        x = values[0]
        return x * x if eqn.params["y"] == 2 else x * x * x
    product = _product(eqn, values) if name in PRODUCTS else None
    if product is not None:
        return product
    if name in PRODUCTS:
        return PRODUCTS[name](eqn, *values)
    return rewrite(eqn, values)


# How products are computed whose own form jax2onnx does not write, or as a slower operation.
PRODUCTS = {"dot_general": dot, "conv_general_dilated": convolve}


def equations(jaxpr: Any, caller: str | None = None) -> Iterator[tuple[Any, str | None]]:
    """All equations and the lines they are from, those inside of a call in place of the call."""
    for eqn in jaxpr.eqns:
        line = source_line(eqn) or caller  # what jax caches has lost who called it
        if eqn.primitive.name in CALLS:
            inner = eqn.params[CALLS[eqn.primitive.name]]
            yield from equations(getattr(inner, "jaxpr", inner), line)
        else:
            yield eqn, line


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate an equation."""
    out = eqn.primitive.bind(*values, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def is_known(value: Any) -> bool:
    """True for what depends on no input."""
    return not isinstance(value, jax.core.Tracer)


def _is_small(eqn: Any) -> bool:
    """Tell whether results are small enough to be kept in place of what computes them."""
    shapes = [getattr(v.aval, "shape", ()) for v in (*eqn.invars, *eqn.outvars)]
    if eqn.primitive.name == "dim_as_value":  # an axis of any size, as a number
        return False
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return False
    sizes = [math.prod(shape) for shape in shapes]
    made = sum(sizes[len(eqn.invars) :])
    return made <= max(SMALL, sum(sizes[: len(eqn.invars)]))


def _product(eqn: Any, values: Sequence[Any]) -> Product | None:
    """Hold a product with constant weights back, to see what follows it."""
    out = eqn.outvars[0].aval
    if is_known(values[0]) or not is_known(values[1]):
        return None
    if any(x.dtype != values[1].dtype or x.dtype not in (np.float32, np.float64) for x in values):
        return None
    make = functools.partial(_product_of, eqn, values[0])
    place: list[int | None] = [None] * out.ndim
    if eqn.primitive.name == "conv_general_dilated" and eqn.params["batch_group_count"] == 1:
        spec = eqn.params["dimension_numbers"]
        place[spec.out_spec[1]] = spec.rhs_spec[0]
    elif eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][1][1]:
        summed = eqn.params["dimension_numbers"][0][1]
        free = [i for i in range(values[1].ndim) if i not in summed]
        place[out.ndim - len(free) :] = free
        if _is_matrix_product(eqn, values):
            make = functools.partial(_matrix_product, eqn, values[0])
    else:
        return None
    return Product(make, values[1], None, tuple(place))


def _product_of(eqn: Any, x: Any, weights: Any, shift: Any) -> Any:
    out = PRODUCTS[eqn.primitive.name](eqn, x, weights)
    out = bind(eqn, [x, weights])[0] if out is None else out
    return out if shift is None else out + shift


def _is_matrix_product(eqn: Any, values: Sequence[Any]) -> bool:
    """Tell whether the last axes of the input are summed with the first ones of the weights."""
    (left, right), _ = eqn.params["dimension_numbers"]
    ranks = [np.ndim(x) for x in values]
    last = tuple(range(ranks[0] - len(left), ranks[0]))
    ordered = tuple(left) == last and tuple(right) == tuple(range(len(right)))
    return ordered and max(ranks) > 2


def _matrix_product(eqn: Any, x: Any, weights: Any, shift: Any) -> Any:
    """Multiply with a matrix: quantizers look for ``MatMul``, jax2onnx would write ``Einsum``."""
    summed = len(eqn.params["dimension_numbers"][0][1])
    rows, features = math.prod(weights.shape[:summed]), weights.shape[summed:]
    out = jnp.matmul(
        jnp.reshape(x, (*x.shape[: x.ndim - summed], rows)),
        np.reshape(np.asarray(weights), (rows, -1)),
        precision=eqn.params["precision"],
    )
    if shift is not None:
        whole = np.broadcast_to(shift, (*np.shape(shift)[: out.ndim - 1], *features))
        out = out + whole.reshape((1,) * (out.ndim - 1) + (-1,))
    return jnp.reshape(out, eqn.outvars[0].aval.shape)


def _merge(name: str, operands: Sequence[Any]) -> Product | None:
    """Take a constant that varies along features alone into a product."""
    if name not in ("add", "mul", "sub"):
        return None
    a, b = operands
    if isinstance(b, Product) and name != "sub":
        a, b = b, a
    if not isinstance(a, Product) or isinstance(b, Product) or not is_known(b):
        return None
    c = np.asarray(b)
    c = c.reshape(c.shape or (1,) * len(a.place))
    if any(n > 1 and p is None for n, p in zip(c.shape, a.place, strict=True)):
        return None
    if name == "mul":
        return _scaled(a, c)
    c = -c if name == "sub" else c
    return a._replace(shift=c if a.shift is None else a.shift + c)


def _scaled(product: Product, c: np.ndarray) -> Product:
    shape = [1] * np.ndim(product.weights)
    for n, p in zip(c.shape, product.place, strict=True):
        if p is not None:
            shape[p] = n
    weights = np.asarray(product.weights) * c.reshape(shape)
    return product._replace(
        weights=weights, shift=None if product.shift is None else product.shift * c
    )


def _value(x: Any) -> Any:
    """Compute a product that was held back."""
    if isinstance(x, Empty):
        return jnp.zeros(x.shape, x.dtype)
    if not isinstance(x, Product):
        return x
    return x.make(x.weights, x.shift)
