"""The blocks that a mask has left of a weight, read off the mask alone."""

# A mask says where its blocks are: along each axis they begin where something changes. It says
# also which axes are inputs and which outputs, for a column of blocks is what has kept as many
# blocks as the others:
#
#     [[T, T, F, F],      changes along axis 0 at 2, along axis 1 at 2: blocks [2, 2], a grid
#      [T, T, F, F],          [[T, F],
#      [F, F, T, T],           [F, T]]
#      [F, F, T, T]]      in which each column keeps one
#
# What axis is which does not matter to the result: of a weight that a program uses the other way
# round products are slower, and as right. So where a mask fits in several ways the largest blocks
# win, then the one with more leading axes (layers, experts, heads, places of a window), then the
# order of the axes, `[..., in, out]`.

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.graph._blocked import Axis, size_of


@dataclasses.dataclass(frozen=True, eq=False)
class Form:
    """A weight as matrices of blocks.

    Attributes:
      axes: what each axis of the weight is.
      block: inputs and outputs of a block.
      index: integers `[*lead, columns, kept]`: which blocks of each column are left, increasing.
    """

    axes: tuple[Axis, ...]
    block: tuple[int, int]
    index: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the blocks that are left."""
        return (*self.index.shape, *self.block)

    @property
    def matrix(self) -> tuple[int, int]:
        """Inputs and outputs of a matrix."""
        return size_of(self.axes, "in"), size_of(self.axes, "out")

    @property
    def kept(self) -> tuple[int, int]:
        """How many blocks of a column are left, and of how many."""
        return self.index.shape[-1], self.matrix[0] // self.block[0]


class Grid(NamedTuple):
    """A mask as a grid of blocks, in one way to read its axes.

    Attributes:
      axes: what each axis of the weight is.
      block: inputs and outputs of a block.
      kept: bools `[*lead, blocks of a column, columns]`.
    """

    axes: tuple[Axis, ...]
    block: tuple[int, int]
    kept: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """How many blocks each column keeps, `[*lead, columns]`."""
        return self.kept.sum(axis=-2)

    @property
    def balanced(self) -> bool:
        """Whether all columns keep as many."""
        return self.counts.size > 0 and int(self.counts.min()) == int(self.counts.max())

    @property
    def area(self) -> int:
        """Weights of a block."""
        return math.prod(self.block)


def form_of(mask: np.ndarray, path: str) -> Form | None:
    """Read a mask as blocks; None where it removes nothing.

    Args:
      mask: bools of the shape of the weight, of two axes or more that are longer than 1.
      path: of the weight, for messages.

    Raises:
      ValueError: single weights, blocks that do not divide an axis, columns that keep different
        numbers of blocks or none.
    """
    if mask.all():
        return None
    if 1 in mask.shape:
        return _with_single(form_of(mask.squeeze(), path), mask.shape)
    changes = [_changes(mask, axis) for axis in range(mask.ndim)]
    sizes = [math.gcd(n, *found) for n, found in zip(mask.shape, changes, strict=True)]
    if max(sizes) == 1:
        raise ValueError(_ragged(mask.shape, changes, path) or _single(path))
    units = mask[tuple(slice(None, None, s) for s in sizes)]
    # Of ways with blocks as large the first one comes first.
    ways = sorted(_ways(sizes, mask.shape), key=lambda way: -_area(sizes, mask.shape, *way))
    grids = (_grid(units, sizes, mask.shape, *way) for way in ways)
    found = next((grid for grid in grids if grid.balanced and grid.area > 1), None)
    if found is None:
        first = _grid(units, sizes, mask.shape, *ways[0])
        raise ValueError(_ragged(mask.shape, changes, path) or _why(first, path))
    if not found.kept.any():
        raise ValueError(
            f"The mask of {path!r} keeps nothing of any column, so that its outputs are constant. "
            "Prune it less, or leave it out with `only`."
        )
    by_column = np.swapaxes(found.kept, -1, -2)
    index = np.nonzero(by_column)[-1].reshape(*by_column.shape[:-1], -1)
    return Form(found.axes, found.block, index.astype(np.int32))


def _with_single(form: Form | None, shape: Sequence[int]) -> Form | None:
    """The form of a weight that has axes of a single index besides."""
    if form is None:
        return None
    left = iter(form.axes)
    axes = tuple(Axis("one", 1) if n == 1 else next(left) for n in shape)
    return dataclasses.replace(form, axes=axes)


def _changes(mask: np.ndarray, axis: int) -> list[int]:
    """Where along an axis a mask changes."""
    rows = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
    return [int(i) + 1 for i in np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1))]


def _ragged(shape: Sequence[int], changes: Sequence[Sequence[int]], path: str) -> str:
    """Say that blocks do not divide an axis; nothing if all do."""
    for axis, (n, found) in enumerate(zip(shape, changes, strict=True)):
        size = math.gcd(*found)
        if size > 1 and n % size and len(found) > 1:
            return (
                f"The mask of {path!r}, of shape {tuple(shape)}, has blocks of {size} along axis "
                f"{axis}, which do not divide its {n}. Choose blocks that do, such as of "
                f"{math.gcd(size, n)}, or leave it out with `only`."
            )
    return ""


def _ways(
    sizes: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ways to read axes: some are inputs, some outputs, the rest leads.

    Of several inputs (the places of a window, heads) one counts fastest, the one that blocks lie
    along, and so of several outputs; one along which nothing changes only if it is the last. Ways
    with more leading axes come first, then inputs before outputs, then those whose outputs come
    last and whose last axis counts fastest.
    """
    rank = len(shape)
    some = [s for n in range(1, rank) for s in itertools.combinations(range(rank), n)]
    pairs = [(i, o) for i, o in itertools.permutations(some, 2) if not set(i) & set(o)]
    pairs.sort(key=lambda p: (len(p[0]) + len(p[1]), p[0] > p[1], -p[1][-1], -p[0][-1]))
    fast = lambda axes: [i for i in axes[::-1] if i == axes[-1] or sizes[i] < shape[i]]  # noqa: E731
    for inputs, outputs in pairs:
        for i, o in itertools.product(fast(inputs), fast(outputs)):
            yield _fastest(inputs, i), _fastest(outputs, o)


def _area(
    sizes: Sequence[int], shape: Sequence[int], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> int:
    """How large blocks are if these axes are the inputs and the outputs."""
    return _block(sizes, shape, inputs)[0] * _block(sizes, shape, outputs)[0]


def _fastest(axes: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*(i for i in axes if i != axis), axis)


def _grid(
    units: np.ndarray,
    sizes: Sequence[int],
    shape: Sequence[int],
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
) -> Grid:
    """The grid of a mask if these axes are its inputs and its outputs."""
    lead = tuple(i for i in range(len(shape)) if i not in (*inputs, *outputs))
    bi, own = _block(sizes, shape, inputs)
    bo, mine = _block(sizes, shape, outputs)
    for i in range(len(shape)):
        if i not in (*own, *mine) and sizes[i] > 1:
            units = np.repeat(units, sizes[i], axis=i)
    laid = units.transpose(*lead, *inputs, *outputs)
    kept = laid.reshape(
        *(shape[i] for i in lead),
        math.prod(shape[i] for i in inputs) // bi,
        math.prod(shape[i] for i in outputs) // bo,
    )
    axes = [Axis("one", 1)] * len(shape)
    for kind, run in (("in", inputs), ("out", outputs)):
        for place, i in enumerate(run):
            axes[i] = Axis(kind, shape[i], math.prod(shape[j] for j in run[place + 1 :]))
    for place, i in enumerate(lead):
        axes[i] = Axis("lead", shape[i], place)
    return Grid(tuple(axes), (bi, bo), kept)


def _block(
    sizes: Sequence[int], shape: Sequence[int], run: Sequence[int]
) -> tuple[int, tuple[int, ...]]:
    """How long blocks are along merged axes, and which of the axes have a part in that.

    The last axis does; one before it only if blocks span all axes behind it, and if something
    changes along it: layers that have all lost the same blocks are layers still.
    """
    *others, last = run
    size, own = sizes[last], [last]
    for i in reversed(others):
        if sizes[own[-1]] != shape[own[-1]] or sizes[i] == shape[i]:
            break
        own.append(i)
        size *= sizes[i]
    return size, tuple(own)


def _single(path: str) -> str:
    return (
        f"The mask of {path!r} removes single weights, of which no product gets faster. Find "
        'masks with `pattern=jp.patterns.Blocks((128, 128), axes=("in", "out")), '
        "scope=jp.scopes.per_output`, or leave it out with `only`."
    )


def _why(grid: Grid, path: str) -> str:
    """Why a mask cannot be read as balanced blocks."""
    if grid.area == 1:
        return _single(path)
    counts, (bi, bo) = grid.counts, grid.block
    usual = int(np.bincount(counts.reshape(-1)).argmax())
    other = [tuple(map(int, at)) for at in np.argwhere(counts != usual)]
    named = ", ".join(
        f"{at[0] if len(at) == 1 else list(at)} keeps {counts[at]}" for at in other[:4]
    )
    more = f" and {len(other) - 4} more differ" if len(other) > 4 else ""
    return (
        f"The mask of {path!r} is not balanced: of {grid.kept.shape[-2]} blocks of {bi} x {bo} in "
        f"each column of blocks most keep {usual}, but column {named}{more}. Find masks with "
        f'`pattern=jp.patterns.Blocks(({bi}, {bo}), axes=("in", "out")), '
        "scope=jp.scopes.per_output` and the same sparsity for all layers of a stack, or leave it "
        "out with `only`."
    )
