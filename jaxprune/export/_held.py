"""Products with constant weights, held back until it is known what scales and shifts follow."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune.export._operations import Value
from jaxprune.export._products import PRODUCTS, aval_of, behind_data, bind, is_known, permuted


class Product(NamedTuple):
    """A convolution or matrix product with constant weights, still open to scales and shifts.

    Batch normalisation behind it is a scale and a shift of each feature. Inside of the weights it
    costs nothing, and what comes next, such as a ReLU, can be fused with the product.

    Attributes:
      make: computes the product from weights and a shift.
      weights: the weights.
      shift: what is added to the product, of its rank; None for nothing.
      place: for each axis of the product the axis of the weights that it comes from, or None.
      order: the axes of the product in the order of the result.
    """

    make: Callable[[Value, Value], Value]
    weights: Value
    shift: Value
    place: tuple[int | None, ...]
    order: tuple[int, ...]

    def value(self) -> Value:
        """Compute the result."""
        return permuted(self.make(self.weights, self.shift), self.order)


def hold_back(eqn: core.JaxprEqn, values: Sequence[Value]) -> Product | None:
    """Hold a product with constant weights back, to see what follows it."""
    if eqn.primitive.name == "dot_general" and is_known(values[0]) and not is_known(values[1]):
        eqn, values, order = behind_data(eqn, values)
        held = hold_back(eqn, values)
        return None if held is None else held._replace(order=order)
    out = aval_of(eqn.outvars[0])
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
    return Product(make, values[1], None, tuple(place), tuple(range(out.ndim)))


def _product_of(eqn: core.JaxprEqn, x: Value, weights: Value, shift: Value) -> Value:
    out = PRODUCTS[eqn.primitive.name](eqn, x, weights)
    out = bind(eqn, [x, weights])[0] if out is None else out
    return out if shift is None else out + shift


def _is_matrix_product(eqn: core.JaxprEqn, values: Sequence[Value]) -> bool:
    """Tell whether the last axes of the input are summed with the first ones of the weights."""
    (left, right), _ = eqn.params["dimension_numbers"]
    ranks = [np.ndim(x) for x in values]
    last = tuple(range(ranks[0] - len(left), ranks[0]))
    ordered = tuple(left) == last and tuple(right) == tuple(range(len(right)))
    return ordered and max(ranks) > 2


def _matrix_product(eqn: core.JaxprEqn, x: Value, weights: Value, shift: Value) -> Value:
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
    return jnp.reshape(out, aval_of(eqn.outvars[0]).shape)


def merge(eqn: core.JaxprEqn, operands: Sequence[Value]) -> Product | None:
    """Take a constant that varies along features alone into a product, and a transposition.

    ``(x @ w + 1) * [2, 3]`` becomes ``x @ (w * [2, 3]) + [2, 3]``.
    """
    name = eqn.primitive.name
    if name == "transpose" and isinstance(operands[0], Product):
        held, axes = operands[0], eqn.params["permutation"]
        return held._replace(order=tuple(held.order[axis] for axis in axes))
    if name not in ("add", "mul", "sub"):
        return None
    a, b = operands
    if isinstance(b, Product) and name != "sub":
        a, b = b, a
    if not isinstance(a, Product) or isinstance(b, Product) or not is_known(b):
        return None
    c = np.asarray(b)
    c = c.reshape(c.shape or (1,) * len(a.place)).transpose(np.argsort(a.order))
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
