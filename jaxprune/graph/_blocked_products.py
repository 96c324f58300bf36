"""Products of data with a weight by blocks, however a program spells them."""

# Whatever the axes are called, a product contracts all inputs of the weight (or all outputs, of a
# weight that is used transposed). Leading axes are one of three things:
#
#     batched       [experts, in, out] with data [experts, rows, in]: a product for each
#     free          [heads, in, dim] with data [rows, in]: heads are more columns
#     contracted    [heads, dim, out] with data [rows, heads, dim]: heads are more inputs
#
# Anything else is told apart by None, and wants the whole weight.

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune.graph._block_product import Numerics, block_product, transposed_product
from jaxprune.graph._blocked import Blocked, order_of
from jaxprune.graph._frames import Value, shape_of


class Met(NamedTuple):
    """What a weight by blocks met.

    Attributes:
      kind: ``"dot"``, ``"transposed"`` or ``"conv"``.
      rows: of the data, for each matrix; an exported program may have any number.
      matrices: how many products it is at once.
      shape: inputs and outputs of a matrix.
      kept: how many blocks of a column are left, and of how many.
    """

    kind: str
    rows: Any
    matrices: int
    shape: tuple[int, int]
    kept: tuple[int, int]

    def __str__(self) -> str:
        many = "" if self.matrices == 1 else f"{self.matrices} of "
        return f"{self.kind}, {many}{self.rows} x {self.shape[0]} x {self.shape[1]}"


class Found(NamedTuple):
    """A product.

    Attributes:
      value: of the shape that the program expects.
      met: what it was.
    """

    value: jax.Array
    met: Met


class Split(NamedTuple):
    """Axes of a weight in one product, by what happens to them; single ones left out.

    Attributes:
      batched, contracted, free: their numbers, in the order that blocks have.
    """

    batched: list[int]
    contracted: list[int]
    free: list[int]


def blocked_dot(eqn: core.JaxprEqn, a: Value, b: Value) -> Found | None:
    """A `dot_general` of which one operand is a weight by blocks."""
    if (isinstance(a, Blocked) and isinstance(b, Blocked)) or eqn.params.get("out_sharding"):
        return None
    side = 0 if isinstance(a, Blocked) else 1
    w, x = (a, b) if side == 0 else (b, a)
    contract, batch = eqn.params["dimension_numbers"]
    numerics = Numerics(eqn.params["precision"], eqn.params["preferred_element_type"])
    split = _split(w, contract[side], batch[side])
    kind = _kind(w, split)
    if kind is None or jnp.ndim(x) == 0:
        return None
    theirs = dict(
        zip((*contract[side], *batch[side]), (*contract[1 - side], *batch[1 - side]), strict=True)
    )
    rows = [i for i in range(x.ndim) if i not in theirs.values()]
    laid = _laid(x, [theirs[i] for i in split.batched], rows, [theirs[i] for i in split.contracted])
    y, met = _multiplied(kind, laid, _matrices(w, split), numerics)
    sizes = lambda axes: [w.shape[i] for i in axes]  # noqa: E731
    y = y.reshape(*sizes(split.batched), *(x.shape[i] for i in rows), *sizes(split.free))
    # As `dot_general` has it: batch axes, what is left of the first operand and of the second.
    n, end = len(split.batched), len(split.batched) + len(rows)
    lead = [split.batched.index(i) for i in batch[side] if i in split.batched]
    own, others = [end + split.free.index(i) for i in sorted(split.free)], range(n, end)
    y = y.transpose(*lead, *((*own, *others) if side == 0 else (*others, *own)))
    return Found(y.reshape(shape_of(eqn.outvars[0])), met)


def _split(w: Blocked, contract: Sequence[int], batch: Sequence[int]) -> Split:
    order = [i for i in order_of(w.axes) if w.axes[i].kind != "one"]
    others = [i for i in order if i not in contract and i not in batch]
    return Split([i for i in order if i in batch], [i for i in order if i in contract], others)


def _kind(w: Blocked, split: Split) -> str | None:
    """How a product uses a weight; None where blocks do not help."""
    kinds = lambda axes: {w.axes[i].kind for i in axes} - {"lead"}  # noqa: E731
    if kinds(split.batched):
        return None
    if kinds(split.contracted) == {"in"} and kinds(split.free) <= {"out"}:
        return "dot"
    heads = any(w.axes[i].kind == "lead" for i in split.free)
    if kinds(split.contracted) == {"out"} and kinds(split.free) <= {"in"} and not heads:
        return "transposed"
    return None


def _laid(x: jax.Array, batched: list[int], rows: list[int], contracted: list[int]) -> jax.Array:
    """Data as `[*batched, rows, contracted]`; single axes go among the rows, which they leave."""
    single = [i for i in range(x.ndim) if i not in (*batched, *rows, *contracted)]
    x = x.transpose(*batched, *single, *rows, *contracted)
    lead = x.shape[: len(batched)]
    n = math.prod(x.shape[x.ndim - len(contracted) :])
    count = math.prod(x.shape[len(batched) : x.ndim - len(contracted)])
    return x.reshape(*lead, count, n)


class Matrices(NamedTuple):
    """A weight as a product wants it.

    Attributes:
      blocks: `[*groups, heads, parts, columns, kept, bi, bo]`; heads are free and parts contracted.
      places: `[*groups, heads, parts, columns, kept]`: which blocks of their columns they are.
      inputs: of each part.
    """

    blocks: jax.Array
    places: jax.Array
    inputs: int


def _matrices(w: Blocked, split: Split) -> Matrices:
    """Sort leading axes by what happens to them; all heads are one axis then, and all parts."""
    steps = lambda axes: [w.axes[i].step for i in axes if w.axes[i].kind == "lead"]  # noqa: E731
    batched, free, summed = steps(split.batched), steps(split.free), steps(split.contracted)
    order = (*batched, *free, *summed)
    sizes = lambda axes: [w.index.shape[i] for i in axes]  # noqa: E731
    lead = (*sizes(batched), math.prod(sizes(free)), math.prod(sizes(summed)))

    def sort(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        laid = x.transpose(*order, *range(len(order), x.ndim))
        return laid.reshape(*lead, *laid.shape[len(order) :])

    return Matrices(sort(w.blocks), sort(w.index), w.size("in"))


def _multiplied(kind: str, x: jax.Array, w: Matrices, numerics: Numerics) -> tuple[jax.Array, Met]:
    """Data `[*groups, rows, contracted]` times a weight: `[*groups, rows, free]`."""
    y = (_forwards if kind == "dot" else _backwards)(x, w, numerics)
    *groups, _, _, _, kept, bi, _ = w.blocks.shape
    shape = (x.shape[-1], y.shape[-1]) if kind == "dot" else (y.shape[-1], x.shape[-1])
    return y, Met(kind, x.shape[-2], math.prod(groups), shape, (kept, w.inputs // bi))


def _forwards(x: jax.Array, w: Matrices, numerics: Numerics) -> jax.Array:
    """Heads are more columns, and parts are more inputs."""
    *groups, heads, parts, columns, kept, bi, bo = w.blocks.shape
    first = np.arange(parts, dtype=w.places.dtype) * (w.inputs // bi)  # of the inputs of each part
    index = w.places + first.reshape(*[1] * (len(groups) + 1), parts, 1, 1)
    index = jnp.moveaxis(index, -3, -2).reshape(*groups, heads * columns, parts * kept)
    blocks = jnp.moveaxis(w.blocks, -5, -4)
    blocks = blocks.reshape(*groups, heads * columns, parts * kept, bi, bo)
    return block_product(x, blocks, index, numerics)


def _backwards(x: jax.Array, w: Matrices, numerics: Numerics) -> jax.Array:
    """Parts are more columns; there are no heads."""
    *groups, _, parts, columns, kept, bi, bo = w.blocks.shape
    blocks = w.blocks.reshape(*groups, parts * columns, kept, bi, bo)
    index = w.places.reshape(*groups, parts * columns, kept)
    return transposed_product(x, blocks, index, w.inputs, numerics)


# Convolutions.


def blocked_conv(eqn: core.JaxprEqn, x: Value, w: Value) -> Found | None:
    """A convolution with a kernel by blocks, of patches of the data."""
    params = eqn.params
    numbers = params["dimension_numbers"]
    if isinstance(x, Blocked) or params["feature_group_count"] != 1:
        return None
    if params["batch_group_count"] != 1:
        return None
    out, inside, *window = numbers.rhs_spec
    kinds = {w.axes[i].kind for i in (inside, *window)} - {"one"}
    if w.axes[out].kind != "out" or not kinds <= {"in", "lead"} or w.axes[inside].kind != "in":
        return None
    if w.size("out") != w.shape[out]:
        return None
    w = w.transpose((*window, inside, out))
    patches = _patches(x, [w.shape[i] for i in range(len(window))], params)
    places = len(window)
    order = order_of(w.axes)
    contracted = [i for i in order if i <= places]
    plain = [i for i in contracted if w.axes[i].kind != "one"]
    split = Split([], plain, [i for i in order if i > places])
    lead = patches.shape[: 1 + places]
    laid = patches.transpose(*range(1 + places), *(1 + places + i for i in contracted))
    rows = laid.reshape(math.prod(lead), math.prod(laid.shape[1 + places :]))
    numerics = Numerics(params["precision"], params["preferred_element_type"])
    y, met = _multiplied("dot", rows, _matrices(w, split), numerics)
    y = y.reshape(*lead, w.shape[-1])  # [batch, *places, out]
    spec = numbers.out_spec  # where batch, features and places are in the result
    to = [0] * y.ndim
    for place, source in zip(spec, (0, y.ndim - 1, *range(1, y.ndim - 1)), strict=True):
        to[place] = source
    return Found(y.transpose(to), met._replace(kind="conv"))


def _patches(x: jax.Array, window: Sequence[int], params: Any) -> jax.Array:
    """What each place of a convolution sees: `[batch, *places, *window, channels]`."""
    numbers = params["dimension_numbers"]
    batch, channels, *spatial = numbers.lhs_spec
    x = x.transpose(batch, *spatial, channels)
    pads = zip(params["padding"], params["lhs_dilation"], strict=True)
    config = [(0, 0, 0), *((low, high, d - 1) for (low, high), d in pads), (0, 0, 0)]
    if any(any(c) for c in config):
        x = lax.pad(x, jnp.zeros((), x.dtype), config)
    strides, steps = params["window_strides"], params["rhs_dilation"]
    sizes = [
        (x.shape[1 + i] - (window[i] - 1) * steps[i] - 1) // strides[i] + 1
        for i in range(len(window))
    ]
    seen = []
    for place in np.ndindex(*window):
        start = [0, *(p * s for p, s in zip(place, steps, strict=True)), 0]
        end = [
            x.shape[0],
            *(a + (n - 1) * s + 1 for a, n, s in zip(start[1:-1], sizes, strides, strict=True)),
            x.shape[-1],
        ]
        seen.append(lax.slice(x, start, end, (1, *strides, 1)))
    both = jnp.stack(seen, axis=1 + len(window)) if len(seen) > 1 else seen[0][..., None, :]
    return both.reshape(x.shape[0], *sizes, *window, x.shape[-1])
