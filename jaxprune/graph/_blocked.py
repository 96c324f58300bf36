"""A weight of which some blocks are left, and what moves it about before it meets data."""

# Of a weight only its kept blocks are there, and where they are from. What its axes mean is known,
# so that a program may transpose it, reshape it or take a layer of it without that the whole weight
# is ever made:
#
#     w  [layers, in, heads, dim]    lead 0, in, out (64 apart), out (1 apart)
#     w[3].reshape(in, -1)           in, out: the same blocks, of one layer
#
# The number of an input is the sum over axes "in" of index times step, and so is that of an output.
# What mixes these, or reads single weights, needs the whole weight: `expand`.

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import auto_axes

from jaxprune._mesh import is_explicit, shapes_of

Start: TypeAlias = int | jax.Array


class Axis(NamedTuple):
    """What an axis of a weight is.

    Attributes:
      kind: ``"lead"`` (layers, experts, heads: a matrix for each), ``"in"``, ``"out"``, or
        ``"one"`` for any of a single index.
      size: how long it is.
      step: how far apart its indices are among inputs or outputs; of a leading axis which one it is
        of the blocks.
    """

    kind: str
    size: int
    step: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocked:
    """A weight by its kept blocks.

    Attributes:
      blocks: `[*lead, columns, kept, bi, bo]`.
      index: integers `[*lead, columns, kept]`: which of the blocks of its column each one is.
      axes: what each axis of the whole weight is.
      leaves: numbers of the parameters that it is of.
    """

    blocks: jax.Array
    index: jax.Array
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    leaves: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole weight."""
        return tuple(axis.size for axis in self.axes)

    def size(self, kind: str) -> int:
        """How many inputs or outputs there are."""
        return size_of(self.axes, kind)

    def each(self, run: Callable[[jax.Array], jax.Array]) -> "Blocked":
        """Do something elementwise that leaves zeros zero."""
        return dataclasses.replace(self, blocks=run(self.blocks))

    def transpose(self, order: Sequence[int]) -> "Blocked":
        """With its axes in another order."""
        return dataclasses.replace(self, axes=tuple(self.axes[i] for i in order))

    def reshape(self, shape: Sequence[int]) -> "Blocked | None":
        """With its axes split and merged; None where that mixes what they mean."""
        axes = _reshaped(self.axes, shape)
        return None if axes is None else dataclasses.replace(self, axes=axes)

    def layers_first(self) -> "Blocked | None":
        """With its first axis as the first of its blocks, if that is a leading one."""
        first = self.axes[0] if self.axes else Axis("in", 0)
        if first.kind == "one":  # a stack of one layer
            leads = [a._replace(step=a.step + 1) if a.kind == "lead" else a for a in self.axes[1:]]
            axes = (Axis("lead", 1, 0), *leads)
            return Blocked(self.blocks[None], self.index[None], axes, self.leaves)
        if first.kind != "lead":
            return None
        move = lambda x: jnp.moveaxis(x, first.step, 0)  # noqa: E731
        moved = [
            a._replace(step=0 if a == first else a.step + (a.step < first.step))
            if a.kind == "lead"
            else a
            for a in self.axes
        ]
        return Blocked(move(self.blocks), move(self.index), tuple(moved), self.leaves)

    def row(self) -> "Blocked":
        """What its arrays are, once they have been taken a row of, as a scan does."""
        left = [a._replace(step=a.step - 1) if a.kind == "lead" else a for a in self.axes[1:]]
        return dataclasses.replace(self, axes=tuple(left))

    def slice(self, i: int, start: Start, size: int) -> "Blocked | None":
        """A part of an axis: of leading ones any, of outputs whole columns of blocks."""
        axis = self.axes[i]
        if axis.kind == "lead":
            cut = self._cut(axis.step, start, size)
            axes = (*self.axes[:i], axis._replace(size=size), *self.axes[i + 1 :])
            whole = dataclasses.replace(cut, axes=axes)
            return whole._without(i) if size == 1 else whole
        if self._has_columns(axis) and isinstance(start, int) and self._fits(start, size):
            bo = self.blocks.shape[-1]
            cut = self._cut(self.index.ndim - 2, start // bo, size // bo)
            axes = (*self.axes[:i], axis._replace(size=size), *self.axes[i + 1 :])
            return dataclasses.replace(cut, axes=axes)
        return None

    def _cut(self, at: int, start: Start, n: int) -> "Blocked":
        # As the primitive does: what is out of bounds is clamped, and -1 is not the last.
        cut = lambda x: lax.dynamic_slice_in_dim(  # noqa: E731
            x, start, n, at, allow_negative_indices=False
        )
        return dataclasses.replace(self, blocks=cut(self.blocks), index=cut(self.index))

    def _without(self, i: int) -> "Blocked":
        """With a leading axis of a single index left out of the blocks."""
        at = self.axes[i].step
        left = [
            a._replace(step=a.step - (a.step > at)) if a.kind == "lead" else a for a in self.axes
        ]
        left[i] = Axis("one", 1)
        drop = lambda x: lax.squeeze(x, (at,))  # noqa: E731
        return Blocked(drop(self.blocks), drop(self.index), tuple(left), self.leaves)

    def _has_columns(self, axis: Axis) -> bool:
        return axis.kind == "out" and axis.size == self.size("out")

    def _fits(self, *numbers: int) -> bool:
        return all(n % self.blocks.shape[-1] == 0 for n in numbers)

    def expand(self) -> jax.Array:
        """The whole weight, with zeros for the blocks that are gone."""
        return put_blocks(self.blocks, self.index, self.axes)


def size_of(axes: Sequence[Axis], kind: str) -> int:
    """The product of the sizes of all axes of a kind."""
    return math.prod(axis.size for axis in axes if axis.kind == kind)


def order_of(axes: Sequence[Axis]) -> list[int]:
    """The axes in the order in which blocks have them: leading, inputs, outputs; then single."""
    rank = {"lead": 0, "in": 1, "out": 2, "one": 3}

    def key(i: int) -> tuple[int, int]:
        kind, _, step = axes[i]  # leads count up, and of inputs the one that counts fastest is last
        return rank[kind], step if kind == "lead" else -step

    return sorted(range(len(axes)), key=key)


def take_blocks(
    w: jax.Array, index: np.ndarray, axes: Sequence[Axis], block: tuple[int, int]
) -> jax.Array:
    """Take the blocks that are left out of a whole weight.

    Args:
      w: the weight, with ``axes``.
      index: integers `[*lead, columns, kept]`.
      axes: what each axis is.
      block: inputs and outputs of a block.

    Returns:
      `[*lead, columns, kept, bi, bo]`.
    """
    if is_explicit(w):
        return _replicated(lambda w: take_blocks(w, index, axes, block), w)
    bi, bo = block
    lead = [axes[i].size for i in order_of(axes) if axes[i].kind == "lead"]
    grid = w.transpose(order_of(axes)).reshape(*lead, -1, bi, size_of(axes, "out") // bo, bo)
    k = len(lead)
    by_column = grid.transpose(*range(k), k + 2, k, k + 1, k + 3)
    return jnp.take_along_axis(by_column, index[..., None, None], axis=k + 1)


def put_blocks(blocks: jax.Array, index: jax.Array, axes: Sequence[Axis]) -> jax.Array:
    """Put blocks where they are from, in a weight that is zero elsewhere.

    Args:
      blocks: `[*lead, columns, kept, bi, bo]`.
      index: integers `[*lead, columns, kept]`.
      axes: what each axis of the weight is.

    Returns:
      The weight, with ``axes``.
    """
    if is_explicit((blocks, index)):
        return _replicated(lambda b, i: put_blocks(b, i, axes), blocks, index)
    k, (bi, bo) = index.ndim - 2, blocks.shape[-2:]
    shape = (*index.shape[: k + 1], size_of(axes, "in") // bi, bi, bo)
    numbers = np.ix_(*(np.arange(n) for n in index.shape))[:-1]
    at = (*map(jnp.asarray, numbers), index)
    grid = (
        jnp.zeros(shape, blocks.dtype)
        .at[at]
        .set(blocks, unique_indices=True, mode="promise_in_bounds")
    )
    laid = grid.transpose(*range(k), k + 1, k + 2, k, k + 3)
    order = order_of(axes)
    back = [order.index(i) for i in range(len(axes))]
    return laid.reshape([axes[i].size for i in order]).transpose(back)


def _replicated(run: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """What is made of arrays on explicit mesh axes, which refuse to be cut into blocks: whole."""
    shape = jax.eval_shape(run, *shapes_of(arrays)).shape
    return auto_axes(run, out_sharding=jax.P(*[None] * len(shape)))(*arrays)


def _reshaped(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """What the axes are after a reshape, which splits them and merges neighbours of a kind."""
    left = [axis for axis in axes if axis.size != 1][::-1]
    found = []
    for n in shape:
        axis = Axis("one", 1)
        while axis.size < n:
            head = _head(left, n // axis.size) if left and n % axis.size == 0 else None
            joined = None if head is None else _joined(axis, head)
            if joined is None:
                return None
            axis = joined
        found.append(axis)
    return None if left else tuple(found)


def _head(left: list[Axis], most: int) -> Axis | None:
    """Take the next axis off a list, or the first part of it if it is longer than ``most``."""
    axis = left.pop()
    if axis.size <= most:
        return axis
    if axis.size % most or axis.kind == "lead":
        return None
    rest = axis.size // most
    left.append(axis._replace(size=rest))
    return axis._replace(size=most, step=axis.step * rest)


def _joined(a: Axis, b: Axis) -> Axis | None:
    """Two neighbours as one axis, if they count the same."""
    if a.kind == "one":
        return b
    if a.kind != b.kind or a.kind == "lead" or a.step != b.step * b.size:
        return None
    return Axis(a.kind, a.size * b.size, b.step)
