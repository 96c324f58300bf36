"""What masks look like: tables for people, and how much two masks share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._masks import check_masks, count_kept
from jaxprune._ranking import Whole, count_true
from jaxprune._tree import is_array, map_leaves, map_with_path, match
from jaxprune._values import count_revived, is_concrete
from jaxprune._where import why_not
from jaxprune.typing import Masks, Params


class Row(NamedTuple):
    """One prunable leaf, or the total.

    Attributes:
      path: path of the leaf.
      shape: shape of the leaf.
      kept: weights that stay.
      total: weights that there are.
      dense_bytes: size of the leaf as it is.
      packed_bytes: size of what stays, plus one bit a weight that says where it is.
    """

    path: str
    shape: tuple[int, ...]
    kept: int
    total: int
    dense_bytes: int
    packed_bytes: int

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
      rows: one a prunable leaf.
      total: all of them together.
      left_out: the leaves that no mask covers, by what they are.
      collapsed: paths of the leaves that keep nothing at all.
      revived: by path, how many weights that the masks remove are not zero in the params.
    """

    rows: tuple[Row, ...]
    total: Row
    left_out: tuple[LeftOut, ...]
    collapsed: tuple[str, ...]
    revived: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def others(self) -> int:
        """Number of parameters that are not prunable."""
        return sum(kind.size for kind in self.left_out)

    def __str__(self) -> str:
        head = ("path", "shape", "kept / total", "sparsity", "dense", "packed")
        cells = [
            (
                row.path or "(root)",
                "x".join(map(str, row.shape)),
                f"{row.kept:,} / {row.total:,}",
                f"{row.sparsity:.2%}",
                _bytes(row.dense_bytes),
                _bytes(row.packed_bytes),
            )
            for row in (*self.rows, self.total)
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]

        def line(row: tuple[str, ...]) -> str:
            left = [row[0].ljust(widths[0]), row[1].ljust(widths[1])]
            right = [cell.rjust(w) for cell, w in zip(row[2:], widths[2:], strict=True)]
            return "  ".join(left + right).rstrip()

        rule = "-" * len(line(head))
        lines = [line(head), rule, *map(line, cells[:-1]), rule, line(cells[-1])]
        if self.others:
            lines.append(f"not prunable: {self.others:,} parameters")
            lines += map(str, self.left_out)
        lines += [
            f"warning: {path!r} keeps nothing: the layer collapsed" for path in self.collapsed
        ]
        lines += [
            f"not zero: {count:,} weights of {path!r} that the masks remove"
            for path, count in self.revived.items()
        ]
        if self.revived:
            lines.append("(`jp.apply_masks` removes them; after training, `jp.check` says more)")
        return "\n".join(lines)


def summary(params: Params, masks: Masks) -> Summary:
    """Summarize masks layer by layer.

    Args:
      params: parameters.
      masks: masks of the same tree.

    Returns:
      A ``Summary``: printed, a table with path, shape, kept and total weights, sparsity and bytes
      (dense, and packed as kept values plus one bit a weight), totals, what is left out and as
      what (embeddings and LoRA factors have a line of their own), a warning for each layer that
      keeps nothing, and where removed weights are not zero: masks that were not applied, or weights
      that came back.

    Raises:
      ValueError: ``masks`` does not mirror ``params``.
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
    rows = _rows(params, masks)
    total = Row(
        "total",
        (),
        sum(r.kept for r in rows),
        sum(r.total for r in rows),
        sum(r.dense_bytes for r in rows),
        sum(r.packed_bytes for r in rows),
    )
    collapsed = tuple(r.path for r in rows if r.total and not r.kept)
    revived = count_revived(params, masks) if is_concrete((params, masks)) else {}
    return Summary(tuple(rows), total, _left_out(params, masks), collapsed, revived)


def _rows(params: Params, masks: Masks) -> list[Row]:
    dtypes: list[Any] = []
    shapes: list[tuple[int, ...]] = []

    def visit(_: str, p: jax.Array, m: Any) -> None:
        if m is not None:
            dtypes.append(jnp.dtype(p.dtype))
            shapes.append(p.shape)

    map_with_path(visit, params, masks)
    return [
        Row(
            c.path,
            shape,
            int(c.weights),
            c.size,
            c.size * dtype.itemsize,
            c.weights * dtype.itemsize + -(-c.size // 8),
        )
        for c, shape, dtype in zip(count_kept(masks, params), shapes, dtypes, strict=True)
    ]


def _left_out(params: Params, masks: Masks) -> tuple[LeftOut, ...]:
    """The arrays without a mask, by what they are."""
    kinds: dict[str, list[tuple[str, int]]] = {}

    def visit(path: str, p: Any, m: Any) -> None:
        if m is None and is_array(p):
            kinds.setdefault(why_not(path, p) or "matrices", []).append((path, p.size))

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


def _bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")
