"""A product of data and a weight, as matrices: rows of inputs times [inputs, outputs]."""

# Whatever the spelling, what a product makes of its inputs is a matrix for each group:
#
#     dot_general, einsum      x [..., rows, inputs]  times  w [groups, inputs, outputs]
#     a convolution            x: patches; inputs are (place in the window, channel)
#     ragged_dot               rows sorted by group, which sizes tell apart
#
# Groups (experts, heads, members, groups of channels) are left out where there is one product. All
# that methods need of the data is the Gram matrix of the inputs.

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.graph._form import form_of
from jaxprune.graph._site import Site

_HALVES = 1024  # columns from which on a Gram matrix is put together from those of halves


class Product(NamedTuple):
    """How the operands of a product are laid out as matrices.

    Attributes:
      kind: ``"dot"``, ``"ragged"`` or ``"conv"``.
      shape: of the weight.
      groups, inputs, outputs: axes of the weight; of a convolution outputs may hold the groups.
      data: of the other operand the axes that are groups, and those that are inputs.
      params: of the primitive, for what runs over windows.
      form: the same, as something that compares.
    """

    kind: str
    shape: tuple[int, ...]
    groups: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    data: tuple[tuple[int, ...], tuple[int, ...]]
    params: "Params"

    @property
    def of_data(self) -> Hashable:
        """What of it the Gram matrix depends on, beside the data."""
        inputs = tuple(self.shape[i] for i in self.inputs)  # of a convolution its window, too
        return self.kind, self.data, self.params, inputs

    @property
    def features(self) -> int:
        """How many groups of channels a convolution has."""
        return self.params.value["feature_group_count"] if self.kind == "conv" else 1

    @property
    def of_matrix(self) -> tuple[int, ...]:
        """The shape of the weight as a matrix, or as one for each group."""
        like = jax.ShapeDtypeStruct(self.shape, jnp.float32)
        return jax.eval_shape(self.matrix, like).shape

    def matrix(self, w: jax.Array) -> jax.Array:
        """The weight as `[inputs, outputs]`, or `[groups, inputs, outputs]`."""
        lead = [w.shape[i] for i in self.groups]
        w = w.transpose(*self.groups, *self.inputs, *self.outputs)
        n = math.prod(self.shape[i] for i in self.inputs)
        if self.features > 1:
            return jnp.moveaxis(w.reshape(n, self.features, -1), 1, 0)
        return w.reshape(*([math.prod(lead)] if lead else []), n, -1)

    def weight(self, matrix: jax.Array) -> jax.Array:
        """The inverse of ``matrix``."""
        order = (*self.groups, *self.inputs, *self.outputs)
        if self.features > 1:
            matrix = jnp.moveaxis(matrix, 0, 1)
        laid = matrix.reshape([self.shape[i] for i in order])
        return laid.transpose([order.index(i) for i in range(len(order))])

    def rows(self, x: jax.Array) -> jax.Array:
        """The data as `[rows, inputs]`, or `[groups, rows, inputs]`."""
        if self.kind == "conv":
            return self._patches(x)
        groups, inputs = self.data
        others = [i for i in range(x.ndim) if i not in (*groups, *inputs)]
        lead = [x.shape[i] for i in groups]
        n = math.prod(x.shape[i] for i in inputs)
        x = x.transpose(*groups, *others, *inputs)
        return x.reshape(*([math.prod(lead)] if lead else []), -1, n)

    def _patches(self, x: jax.Array) -> jax.Array:
        params = self.params.value
        numbers = params["dimension_numbers"]
        window = [self.shape[i] for i in numbers.rhs_spec[2:]]
        patches = lax.conv_general_dilated_patches(
            x,
            window,
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            dimension_numbers=numbers,
            precision=lax.Precision.HIGHEST,
        )
        patches = jnp.moveaxis(patches, numbers.out_spec[1], -1)
        # jax has the places of the window innermost; here channels are, as in `[h, w, in, out]`.
        laid = patches.reshape(-1, self.features, self.shape[self.inputs[-1]], math.prod(window))
        laid = laid.transpose(1, 0, 3, 2)
        laid = laid.reshape(self.features, laid.shape[1], -1)
        return laid if self.features > 1 else laid[0]

    def gram(self, x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """Sum of the outer products of all rows, float32 `[groups?, inputs, inputs]`."""
        rows = self.rows(x)
        if self.kind != "ragged":
            return gram_of(rows)
        ends = jnp.cumsum(jnp.asarray(sizes))
        mine = jnp.searchsorted(ends, jnp.arange(rows.shape[-2]), side="right")
        one = lambda g: gram_of(jnp.where((mine == g)[:, None], rows, 0))  # noqa: E731
        return lax.map(one, jnp.arange(len(ends)))

    def squares(self, x: jax.Array, sizes: jax.Array | None = None) -> jax.Array:
        """The diagonal of the Gram matrix alone, `[groups?, inputs]`."""
        rows = self.rows(x).astype(jnp.float32)
        if self.kind != "ragged":
            return jnp.sum(rows * rows, axis=-2)
        ends = jnp.cumsum(jnp.asarray(sizes))
        mine = jnp.searchsorted(ends, jnp.arange(rows.shape[-2]), side="right")
        return jax.ops.segment_sum(rows * rows, mine, len(ends))


class Params(NamedTuple):
    """Params of a primitive that compare by what they are."""

    form: Hashable
    value: Any

    def __hash__(self) -> int:
        return hash(self.form)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Params) and self.form == other.form

    def __ne__(self, other: object) -> bool:
        return not self == other


def gram_of(rows: jax.Array) -> jax.Array:
    """The Gram matrix of rows `[..., rows, inputs]`, float32 whatever they are.

    It is symmetric: that of two halves of the inputs takes three products of four.
    """
    rows = rows.astype(jnp.float32)
    n = rows.shape[-1]
    if n < _HALVES:
        return _product(rows, rows)
    a, b = rows[..., : n // 2], rows[..., n // 2 :]
    across = _product(a, b)
    upper = jnp.concatenate([gram_of(a), across], axis=-1)
    lower = jnp.concatenate([jnp.swapaxes(across, -1, -2), gram_of(b)], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("...ni,...nj->...ij", a, b, precision=lax.Precision.HIGHEST)


def product_at(at: Site, side: int) -> Product | None:
    """The product of an equation of which the operand ``side`` is a weight; None for another."""
    name, params, shape = at.primitive, at.params, at.shape(side)
    if name == "conv_general_dilated":
        if side == 0 or params["batch_group_count"] != 1:
            return None
        outputs, inputs, *window = params["dimension_numbers"].rhs_spec
        names = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")
        kept = {n: params[n] for n in (*names, "feature_group_count", "dimension_numbers")}
        return Product(
            "conv",
            shape,
            (),
            (*window, inputs),
            (outputs,),
            ((), ()),
            Params(form_of(kept), kept),
        )
    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        return _dot("dot", shape, contract, batch, side)
    if name == "ragged_dot_general":
        return _ragged(at, side)
    return None


def _ragged(at: Site, side: int) -> Product | None:
    """Rows of a group times the matrix of that group; not what sums over ragged axes."""
    numbers = at.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    ragged = numbers.lhs_ragged_dimensions
    plain = not batch[0] and not set(ragged) & set(contract[0]) and len(at.shape(0)) == 2
    if side == 0 or not plain or len(numbers.rhs_group_dimensions) != 1:
        return None
    groups = ((), tuple(numbers.rhs_group_dimensions))
    return _dot("ragged", at.shape(1), contract, groups, side)


def _dot(
    kind: str,
    shape: tuple[int, ...],
    contract: Sequence[Sequence[int]],
    batch: Sequence[Sequence[int]],
    side: int,
) -> Product:
    """Inputs are contracted, batch axes are groups, and all else are outputs.

    Inputs and groups come in the order in which they lie in the weight.
    """
    pairs = sorted(zip(contract[side], contract[1 - side], strict=True))
    inputs, theirs = tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
    pairs = sorted(zip(batch[side], batch[1 - side], strict=False))
    groups = tuple(sorted(batch[side]))
    outputs = tuple(i for i in range(len(shape)) if i not in (*inputs, *groups))
    data = tuple(p[1] for p in pairs), theirs
    return Product(kind, shape, groups, inputs, outputs, data, Params((), {}))
