"""Matrix products and convolutions of all kinds, in the forms that jax2onnx writes right."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune.export._operations import Value, pad

WHOLE = ("int32", "int64", "uint32", "uint64")  # integers that ONNX multiplies
FLOATS = ("float16", "float32", "float64")


def common_type(eqn: core.JaxprEqn) -> np.dtype | None:
    """The one type that a product may be computed in; None if that is how it is."""
    out, *ins = (np.dtype(aval_of(v).dtype) for v in (*eqn.outvars, *eqn.invars))
    if out.kind == "c":
        return None
    if out.kind in "iub":
        wanted: np.dtype = out if out.name in WHOLE else np.dtype("int32")
    else:
        half = out.name == "float16" and all(x == out for x in ins)
        wanted = out if half or out.name == "float64" else np.dtype("float32")
    return None if all(x == wanted for x in (out, *ins)) else wanted


def dot(eqn: core.JaxprEqn, x: Value, y: Value) -> Value | None:
    """Multiply matrices; None where the operation may stay as it is."""
    (left, right), (many, others) = eqn.params["dimension_numbers"]
    if not left:
        return _outer(eqn, x, y)
    rows = [i for i in range(np.ndim(x)) if i not in (*left, *many)]
    columns = [i for i in range(np.ndim(y)) if i not in (*right, *others)]
    groups = [[x.shape[i] for i in rows], [y.shape[i] for i in columns], [x.shape[i] for i in left]]
    if not all(map(_joins, [group for group in groups if group])):
        return None
    if not rows or not columns:
        return None if many or x.dtype.kind != "f" else _vector(eqn, x, y, rows, columns)
    one = len(left) == len(rows) == len(columns) == 1
    if one and not many and (left, right) == ((1,), (0,)) and x.dtype.kind == "f":
        return None  # a Gemm, which takes a bias in
    return _matmul(eqn, x, y, rows, columns)


def behind_data(
    eqn: core.JaxprEqn, values: Sequence[Value]
) -> tuple[core.JaxprEqn, Sequence[Value], tuple[int, ...]]:
    """Turn a product so that weights come second, where tools look for them.

    ``w @ x`` is ``(x.T @ w.T).T``. Gives the product, its operands, and the order in which its axes
    are those of the result.
    """
    (left, right), (many, others) = eqn.params["dimension_numbers"]
    out, (w, x) = aval_of(eqn.outvars[0]), eqn.invars
    first = aval_of(w).ndim - len(left)  # axes of the result that are of a batch or of the weights
    lead, rows, columns = range(len(many)), range(len(many), first), range(first, out.ndim)
    shape = [out.shape[i] for i in (*lead, *columns, *rows)]
    params = {**eqn.params, "dimension_numbers": ((right, left), (others, many))}
    var = core.Var(out.update(shape=tuple(shape)))
    turned = eqn.replace(invars=[x, w], outvars=[var], params=params)
    end = len(lead) + len(columns)
    order = (*lead, *range(end, out.ndim), *range(len(lead), end))
    return turned, values[::-1], order


def _joins(sizes: Sequence[Any]) -> bool:
    """Tell axes that become one whose size a file can compute: no two of them are of any size."""
    return len(sizes) == 1 or sum(not isinstance(n, int) for n in sizes) < 2


def _vector(
    eqn: core.JaxprEqn, x: Value, y: Value, rows: Sequence[int], columns: Sequence[int]
) -> Value:
    """Multiply a vector as a matrix of one row or column, where jax2onnx would write ``Einsum``."""
    (left, right), _ = eqn.params["dimension_numbers"]
    x = _as_matrices(permuted(x, (*rows, *left)), 0, len(rows))
    y = _as_matrices(permuted(y, (*right, *columns)), 0, len(right))
    z = jnp.matmul(x, y, precision=eqn.params["precision"])
    if len(rows) < 2 and len(columns) < 2:
        return jnp.squeeze(z, tuple(i for i, axes in enumerate((rows, columns)) if not axes))
    return lax.reshape(z, aval_of(eqn.outvars[0]).shape)


def _matmul(
    eqn: core.JaxprEqn, x: Value, y: Value, rows: Sequence[int], columns: Sequence[int]
) -> Value:
    """Bring the axes into the order of ``MatMul``: ``Einsum`` takes some ten times as long."""
    (left, right), (many, others) = eqn.params["dimension_numbers"]
    out = (
        *(x.shape[i] for i in many),
        *(x.shape[i] for i in rows),
        *(y.shape[i] for i in columns),
    )
    x = _as_matrices(permuted(x, (*many, *rows, *left)), len(many), len(rows))
    y = _as_matrices(permuted(y, (*others, *right, *columns)), len(others), len(right))
    if not many and x.dtype.kind != "f":  # of two matrices it would make a Gemm
        z = jnp.matmul(x[None], y[None], precision=eqn.params["precision"])[0]
    else:
        z = jnp.matmul(x, y, precision=eqn.params["precision"])
    return z if np.ndim(z) == len(out) else lax.reshape(z, out)


def _as_matrices(x: Value, many: int, rows: int) -> Value:
    """Join axes to one of rows and one of columns, behind those that count matrices."""
    lead, high, wide = x.shape[:many], x.shape[many : many + rows], x.shape[many + rows :]
    if len(high) == len(wide) == 1:
        return x
    shape = (*lead, math.prod(high), math.prod(wide))
    return np.reshape(np.asarray(x), shape) if is_known(x) else lax.reshape(x, shape)


def permuted(x: Value, axes: tuple[int, ...]) -> Value:
    """Transpose, a constant at once; what is in order already stays without an operation."""
    if axes == tuple(range(np.ndim(x))):
        return x
    return np.transpose(np.asarray(x), axes) if is_known(x) else jnp.transpose(x, axes)


def _outer(eqn: core.JaxprEqn, x: Value, y: Value) -> Value:
    """All products of two entries, by broadcasting."""
    _, (left, right) = eqn.params["dimension_numbers"]
    rows = [i for i in range(np.ndim(x)) if i not in left]
    columns = [i for i in range(np.ndim(y)) if i not in right]
    x, y = jnp.transpose(x, (*left, *rows)), jnp.transpose(y, (*right, *columns))
    first = len(left) + len(rows)
    x = jnp.expand_dims(x, tuple(range(first, first + len(columns))))
    y = jnp.expand_dims(y, tuple(range(len(left), first)))
    return x * y


def convolve(eqn: core.JaxprEqn, x: Value, weights: Value) -> Value | None:
    """Convolve over three axes, or with axes in any order; None where it may stay as it is."""
    spec = eqn.params["dimension_numbers"]
    known = {"rhs": ((0, 1, 2), (2, 1, 0), (0, 1, 2, 3), (3, 2, 0, 1))}
    known["lhs"] = ((0, 1, 2), (0, 2, 1), (0, 1, 2, 3), (0, 3, 1, 2))
    plain = spec.lhs_spec in known["lhs"] and spec.out_spec in known["lhs"]
    if eqn.params["batch_group_count"] > 1 or (plain and spec.rhs_spec in known["rhs"]):
        return None
    names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count")
    settings = {name: eqn.params[name] for name in (*names, "precision")}
    x, weights = permuted(x, tuple(spec.lhs_spec)), permuted(weights, tuple(spec.rhs_spec))
    volume = np.ndim(x) == 5
    out = _by_slices(x, weights, settings) if volume else _plain(x, weights, settings)
    return jnp.transpose(out, [int(i) for i in np.argsort(spec.out_spec)])


def _plain(x: Value, weights: Value, settings: dict[str, Any]) -> Value:
    return lax.conv_general_dilated(x, weights, **settings)


def _by_slices(x: Value, weights: Value, settings: dict[str, Any]) -> Value:
    """Add up what each slice of the kernel makes of the images, which jax2onnx can convolve."""
    lists = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
    first = {name: settings[name][0] for name in lists}
    rest = {**settings, **{name: settings[name][1:] for name in lists}}
    zero, other = np.zeros((), x.dtype), (0, 0, 0)
    depth = (*first["padding"], first["lhs_dilation"] - 1)
    x = pad(x, zero, (other, other, depth, other, other))
    span = (weights.shape[2] - 1) * first["rhs_dilation"]
    count = (x.shape[2] - span - 1) // first["window_strides"] + 1
    total: Value = 0
    for k in range(weights.shape[2]):
        start = k * first["rhs_dilation"]
        stop = start + (count - 1) * first["window_strides"] + 1
        part = lax.slice_in_dim(x, start, stop, first["window_strides"], axis=2)
        images = jnp.moveaxis(part, 2, 1)
        images = lax.reshape(images, (x.shape[0] * count, *images.shape[2:]))
        out = _plain(images, weights[:, :, k], rest)
        total = total + lax.reshape(out, (x.shape[0], count, *out.shape[1:]))
    return jnp.moveaxis(total, 1, 2)


# How products are computed whose own form jax2onnx does not write, or as a slower operation.
PRODUCTS = {"dot_general": dot, "conv_general_dilated": convolve}


def bind(eqn: core.JaxprEqn, values: Sequence[Value]) -> list[Value]:
    """Evaluate an equation."""
    out = eqn.primitive.bind(*values, **eqn.params)
    return list(out) if eqn.primitive.multiple_results else [out]


def is_known(value: Value) -> bool:
    """True for what depends on no input."""
    return not isinstance(value, jax.core.Tracer)


def aval_of(var: core.Var | core.Literal) -> jax.core.ShapedArray:
    """Shape and dtype of an operand or a result."""
    aval: Any = var.aval  # all are arrays, but for tokens, which no export takes
    return aval


def cast(x: Value, dtype: np.dtype) -> Value:
    """Convert; a constant at once."""
    if x.dtype == dtype:
        return x
    return (x if isinstance(x, jax.core.Tracer) else np.asarray(x)).astype(dtype)


def is_narrow(dtype: Any) -> bool:
    """True for floats that onnxruntime stores but does not compute with: bfloat16 for one."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and np.dtype(dtype).name not in FLOATS
