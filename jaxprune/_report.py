"""What masks look like: tables for people, and how much two masks share."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._html import Bar, Cell, lines, table
from jaxprune._layers import names_of
from jaxprune._layout import Layout, check_layout
from jaxprune._looks import advice_on_axes
from jaxprune._masks import check_masks
from jaxprune._ranking import Whole, count_true
from jaxprune._tree import is_array, map_leaves, map_with_path, match
from jaxprune._values import count_revived, is_concrete
from jaxprune._where import why_not
from jaxprune.typing import Masks, Params


class Row(NamedTuple):
    """One prunable leaf, one layer of a stack, or the total.

    Attributes:
      path: path of the leaf; ``path[3]`` for a layer.
      shape: shape of the leaf, or of one layer.
      kept: weights that stay.
      total: weights that there are.
      dense_bytes: size of the leaf as it is.
      packed_bytes: size of what stays, plus one bit a weight that says where it is.
      stack: path of the leaf that a layer belongs to.
    """

    path: str
    shape: tuple[int, ...]
    kept: int
    total: int
    dense_bytes: int
    packed_bytes: int
    stack: str = ""

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return (self.total - self.kept) / self.total if self.total else 0.0


class LeftOut(NamedTuple):
    """Leaves of one kind that no mask covers.

    Attributes:
      kind: what they are, such as "biases" or "embeddings"; "matrices" are what the default
        ``where`` would have taken.
      size: number of parameters.
      paths: where they are.
    """

    kind: str
    size: int
    paths: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.paths[:3]) + (", ..." if len(self.paths) > 3 else "")
        return f"  {self.kind}: {self.size:,} ({shown or 'root'})"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A per-layer table; print it.

    Attributes:
      rows: one a prunable leaf, or, with a layout, a layer.
      total: all of them together.
      left_out: the leaves that no mask covers, by what they are.
      collapsed: paths of the leaves, or layers, that keep nothing at all.
      revived: by path, how many weights that the masks remove are not zero in the params.
      advice: what to look at: leaves whose zeros are no zeros of the network, and, where no layout
        says what axes mean, leaves that look like stacks, like ``[out, in]`` or like heads.
    """

    rows: tuple[Row, ...]
    total: Row
    left_out: tuple[LeftOut, ...]
    collapsed: tuple[str, ...]
    revived: Mapping[str, int] = dataclasses.field(default_factory=dict)
    advice: tuple[str, ...] = ()

    @property
    def others(self) -> int:
        """Number of parameters that are not prunable."""
        return sum(kind.size for kind in self.left_out)

    def __str__(self) -> str:
        cells = [_cells(row) for row in self._drawn]
        widths = [max(map(len, column)) for column in zip(HEAD, *cells, strict=True)]

        def line(row: tuple[str, ...]) -> str:
            left = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
            right = [cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)]
            return "  ".join(left + right).rstrip()

        rule = "-" * len(line(HEAD))
        table = [line(HEAD), rule, *map(line, cells[:-1]), rule, line(cells[-1])]
        return "\n".join([*table, *self._notes])

    def _repr_html_(self) -> str:
        """Draw the table in notebooks, with a bar for what each leaf keeps."""
        rows: list[list[Cell]] = [[*_cells(row), Bar(1 - row.sparsity)] for row in self._drawn]
        return table((*HEAD, "kept"), rows, left=(0, 1, 6)) + f"<p>{lines(self._notes)}</p>"

    @property
    def _drawn(self) -> list[Row]:
        return [*_ranges(self.rows), self.total]

    @property
    def _notes(self) -> list[str]:
        """What stands below the table."""
        notes = []
        if self.others:
            notes.append(f"not prunable: {self.others:,} parameters")
            notes += map(str, self.left_out)
        notes += [
            f"warning: {path!r} keeps nothing: the layer collapsed" for path in self.collapsed
        ]
        notes += [
            f"not zero: {count:,} weights of {path!r} that the masks remove"
            for path, count in self.revived.items()
        ]
        if self.revived:
            notes.append("(`jp.apply_masks` removes them; after training, `jp.check` says more)")
        return notes + [f"note: {note}" for note in self.advice]


HEAD = ("path", "shape", "kept / total", "sparsity", "dense", "packed")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.path or "(root)",
        _shape(row),
        f"{row.kept:,} / {row.total:,}",
        f"{row.sparsity:.2%}",
        in_bytes(row.dense_bytes),
        in_bytes(row.packed_bytes),
    )


def _ranges(rows: Sequence[Row]) -> list[Row]:
    """Rows of neighbouring layers that keep as much, drawn together as one with their sums."""
    drawn: list[Row] = []
    first = ""
    for row in rows:
        last = drawn[-1] if drawn else None
        alike = last is not None and row.stack == last.stack != ""
        if last is not None and alike and row.kept * last.total == last.kept * row.total:
            span = f"{first.removesuffix(']')}..{row.path.removeprefix(row.stack + '[')}"
            drawn[-1] = _sum(span, row.shape, (last, row), row.stack)
        else:
            first = row.path
            drawn.append(row)
    return drawn


def _sum(path: str, shape: tuple[int, ...], rows: Sequence[Row], stack: str = "") -> Row:
    return Row(
        path,
        shape,
        sum(r.kept for r in rows),
        sum(r.total for r in rows),
        sum(r.dense_bytes for r in rows),
        sum(r.packed_bytes for r in rows),
        stack,
    )


def _shape(row: Row) -> str:
    """Shape of a leaf; of several layers their number and the shape of one."""
    shape, each = "x".join(map(str, row.shape)), math.prod(row.shape)
    many = row.stack and each and row.total > each
    return f"{row.total // each} of {shape}" if many else shape


def summary(params: Params, masks: Masks, *, layout: Layout | None = None) -> Summary:
    """Summarize masks layer by layer.

    Args:
      params: parameters.
      masks: masks of the same tree.
      layout: what each axis means: with it, each layer of a stack has a row of its own (drawn
        together where neighbours keep as much), and one that collapsed is named.

    Returns:
      A ``Summary``: printed, a table with path, shape, kept and total weights, sparsity and bytes
      (dense, and packed as kept values plus one bit a weight), totals, what is left out and as
      what (embeddings and LoRA factors have a line of their own), a warning for each layer that
      keeps nothing, and where removed weights are not zero: masks that were not applied, or weights
      that came back. Notes say which zeros are none of the network, and, without a layout, what
      looks like a stack of layers or like axes in another order than flax has.

    Raises:
      ValueError: ``masks`` or the layout does not mirror ``params``.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 4)), "bias": jnp.zeros(4)}
      >>> masks = {"kernel": jnp.array([[True, False, False, False]]), "bias": None}
      >>> print(summary(params, masks))
      path    shape  kept / total  sparsity  dense  packed
      ----------------------------------------------------
      kernel  2x4           2 / 8    75.00%   32 B     9 B
      ----------------------------------------------------
      total                 2 / 8    75.00%   32 B     9 B
      not prunable: 4 parameters
        biases: 4 (bias)
      not zero: 6 weights of 'kernel' that the masks remove
      (`jp.apply_masks` removes them; after training, `jp.check` says more)
    """
    masks = check_masks(masks, params, "masks")
    check_layout("summary", layout)
    known = None if layout is None else layout.on(params, "summary")
    rows = [row for leaf in _covered(params, masks, known) for row in _rows(*leaf)]
    total = _sum("total", (), rows)
    collapsed = tuple(r.path for r in rows if r.total and not r.kept)
    revived = count_revived(params, masks) if is_concrete((params, masks)) else {}
    left_out = _left_out(params, masks, known)
    advice = tuple(advice_on_axes(params, masks, known))
    return Summary(tuple(rows), total, left_out, collapsed, revived, advice)


Layers: TypeAlias = tuple[int, ...]  # axes


def _covered(
    params: Params, masks: Masks, layout: Layout | None
) -> list[tuple[str, jax.Array, jax.Array, Layers]]:
    """The leaves that have a mask: path, weights, mask, and which axes count layers."""
    found: list[tuple[str, jax.Array, jax.Array, Layers]] = []

    def visit(path: str, p: jax.Array, m: jax.Array | None) -> None:
        if m is not None:
            found.append((path, p, m, layout.layers(path, p.ndim) if layout else ()))

    map_with_path(visit, params, masks)
    return found


def _rows(path: str, p: jax.Array, mask: jax.Array, layers: Layers) -> list[Row]:
    """A row for each layer of a leaf, or one for the leaf."""
    shape = tuple(n for i, n in enumerate(p.shape) if i not in layers)
    entries = math.prod(n for i, n in enumerate(mask.shape) if i not in layers)
    size, width = math.prod(shape), jnp.dtype(p.dtype).itemsize
    full = [p.shape[i] for i in layers]
    words = _kept(mask, layers)
    high, low = (np.broadcast_to(np.squeeze(w, _others(w, layers)), full) for w in words)
    names = names_of(path, p.shape, layers)
    found = []
    for name, *count in zip(names, high.ravel(), low.ravel(), strict=True):
        kept = int(Whole(*count)) * (size // entries if entries else 0)
        packed = kept * width + -(-size // 8)
        found.append(Row(name, shape, kept, size, size * width, packed, path if layers else ""))
    return found


def _others(x: np.ndarray, layers: Layers) -> Layers:
    return tuple(i for i in range(x.ndim) if i not in layers)


def _kept(mask: jax.Array, layers: Layers) -> tuple[np.ndarray, np.ndarray]:
    """Count what a mask keeps along all axes but some, in the two words of ``Whole``."""
    count = _count_along(mask, layers)
    return np.asarray(count.high), np.asarray(count.low)


_count_along = functools.partial(jax.jit, static_argnames=("keep",))(count_true)


def _left_out(params: Params, masks: Masks, layout: Layout | None) -> tuple[LeftOut, ...]:
    """The arrays without a mask, by what they are."""
    kinds: dict[str, list[tuple[str, int]]] = {}

    def visit(path: str, p: Any, m: Any) -> None:
        if m is None and is_array(p):
            kinds.setdefault(why_not(path, p, layout) or "matrices", []).append((path, p.size))

    map_with_path(visit, params, masks)
    return tuple(
        LeftOut(kind, sum(n for _, n in found), tuple(path for path, _ in found))
        for kind, found in sorted(kinds.items())
    )


class Overlap(NamedTuple):
    """How much two masks share.

    Attributes:
      leaves: Jaccard index of each leaf, None where not prunable.
      total: Jaccard index over all leaves together.
    """

    leaves: Any
    total: float


def overlap(masks_a: Masks, masks_b: Masks) -> Overlap:
    """Compare which weights two masks keep: the Jaccard index, intersection over union.

    Two random masks that keep a fraction d each share d / (2 - d) on average.

    Args:
      masks_a: masks.
      masks_b: masks of the same tree; leaves broadcast against one another. Entries of the masks
        are counted: for channel masks channels, not weights.

    Returns:
      An ``Overlap``: floats in [0, 1], 1 for equal masks (also if both keep nothing).

    Raises:
      ValueError: the two trees differ.

    Example:
      >>> import jax.numpy as jnp
      >>> overlap({"w": jnp.array([True, True, False])}, {"w": jnp.array([False, True, True])})
      Overlap(leaves={'w': 0.3333333333333333}, total=0.3333333333333333)
    """
    step = "Compare masks of the same network, found with the same `where`."
    same_rank = lambda a, b: len(a) == len(b)  # noqa: E731
    mirror = match(masks_b, masks_a, "masks_b", of="`masks_a`", fits=same_rank, step=step)
    both = either = 0

    def jaccard(a: jax.Array, b: jax.Array) -> float:
        nonlocal both, either
        shared, union = map(int, _shared(a, b))
        both, either = both + shared, either + union
        return shared / union if union else 1.0

    leaves = map_leaves(jaccard, masks_a, mirror)
    return Overlap(leaves, both / either if either else 1.0)


@jax.jit
def _shared(a: jax.Array, b: jax.Array) -> tuple[Whole, Whole]:
    """Count what two masks that broadcast keep both, and what one of them keeps."""
    return count_true(a & b), count_true(a | b)


def in_bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
