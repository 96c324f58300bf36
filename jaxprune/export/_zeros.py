"""A look at files of others: are the weights that masks remove still zero?"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune._masks import check_masks, unpack
from jaxprune._tree import is_hole, leaves_with_path, list_paths
from jaxprune.export._report import Report
from jaxprune.export._stored import Arrays, read_weights
from jaxprune.typing import Masks, Params

SAMPLE = 4096  # entries that two arrays are compared by, to tell which is which
FEWEST = 16  # entries that can tell
ALIKE = 0.5  # correlation; that of arrays that have nothing to do with one another is about 0
NEAR = 0.02  # of the best correlation, where zeros tell which of several leaves an array is


class Kept(NamedTuple):
    """What became of the zeros of one leaf.

    Attributes:
      path: where it is in the params.
      removed: how many weights the mask removes.
      lost: how many of them are not zero in the file.
      largest: the largest of those, as a fraction of the largest weight.
      zeroed: how many kept weights are zero in the file, and are not in the params.
    """

    path: str
    removed: int
    lost: int
    largest: float
    zeroed: int


@dataclasses.dataclass(frozen=True)
class Zeros:
    """What ``check_zeros`` found; false when no zero is lost. Print it.

    Attributes:
      leaves: a row for each leaf with a mask.
    """

    leaves: tuple[Kept, ...]

    @property
    def kept(self) -> float:
        """The share of removed weights that are exactly 0 in the file."""
        removed = sum(leaf.removed for leaf in self.leaves)
        return 1.0 - sum(leaf.lost for leaf in self.leaves) / max(removed, 1)

    @property
    def zeroed(self) -> int:
        """How many kept weights became 0."""
        return sum(leaf.zeroed for leaf in self.leaves)

    def in_report(self, report: Report) -> Report:
        """A report that says so."""
        return dataclasses.replace(report, zeros_kept=self.kept, zeroed=self.zeroed)

    def __bool__(self) -> bool:
        return any(leaf.lost for leaf in self.leaves)

    def __str__(self) -> str:
        rows = [("", "removed", "not zero", "largest", "kept, now 0")]
        for path, removed, lost, largest, zeroed in self.leaves:
            rows.append((path, f"{removed:,}", f"{lost:,}", f"{largest:.1e}", f"{zeroed:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )


def check_zeros(path_or_arrays: Any, params: Params, masks: Masks) -> Zeros:
    """Look whether what a tool has made of a network still holds the zeros of its masks.

    Quantizers that have no exact zero, or that push the errors of some weights into others, bring
    pruned weights back without a word; ``docs/guides/zeros.md`` says which do. This reads back
    what integers stand for and compares it with the masks.

    A leaf is looked for by its path and by its values: files hold kernels transposed or reversed,
    under other names, layers one by one, scaled by a batch normalisation behind them, and some
    twice, of which the worse is told. Leaves with fewer than 16 kept weights are found by their
    path alone.

    Args:
      path_or_arrays: an ONNX file (with weights in float, ``DequantizeLinear``, products of
        integers, ``MatMulNBits``, ``GatherBlockQuantized``), a safetensors or GGUF file, or a tree
        of arrays, dequantized.
      params: what was handed to the tool, before or after its masks were applied.
      masks: masks like them; None for what was not pruned.

    Returns:
      ``Zeros``: by path how many removed weights are not zero and how large they are, and how
      many kept weights became zero. It is false when no zero is lost.

    Raises:
      ValueError: masks do not mirror the params; a leaf with a mask is not in the file; the file
        is none of these, or damaged.
      TypeError: params are shapes without values.
      FileNotFoundError: there is no such file.
      ImportError: a package that reads the file is missing.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([[3.0, 0.0], [1.0, 2.0]])
      >>> found = check_zeros({"w": w + 0.25}, {"w": w}, {"w": w != 0})
      >>> bool(found), found.kept
      (True, 0.0)
      >>> print(found)
         removed  not zero  largest  kept, now 0
      w        1         1  7.7e-02            0
    """
    masks = check_masks(unpack(masks), params, "check_zeros(masks)")
    where = path_or_arrays
    if isinstance(where, str | Path):
        arrays, place = read_weights(where, "check_zeros"), repr(str(where))
    else:
        leaves = leaves_with_path(where)
        arrays, place = {path: np.asarray(x) for path, x in leaves if not is_hole(x)}, "the arrays"
    rows, missing = judge(_masked(params, masks), arrays)
    if missing:
        raise ValueError(
            f"`check_zeros` finds no weights like {list_paths(missing)} in {place}, which holds "
            f"{list_paths(list(arrays)) or 'none'}. Pass the params that were written (the small "
            "ones of `shrink`), and masks with None for what a tool has merged with something else."
        )
    return Zeros(tuple(rows))


class Part(NamedTuple):
    """A leaf, or a layer of one: its weights, zero where they are removed, and its mask."""

    path: str
    w: np.ndarray
    mask: np.ndarray


class Match(NamedTuple):
    """An array of a file with its axes in the order of a part, and how alike they are."""

    name: str
    x: np.ndarray
    likeness: float


def _masked(params: Params, masks: Masks) -> list[Part]:
    """The leaves that have a mask."""
    known = {path: mask for path, mask in leaves_with_path(masks) if not is_hole(mask)}
    leaves = {path: w for path, w in leaves_with_path(params) if path in known}
    shapes = [path for path, w in leaves.items() if isinstance(w, jax.ShapeDtypeStruct)]
    if shapes:
        raise TypeError(
            f"`check_zeros` got params without values at {list_paths(shapes)}. Pass arrays."
        )
    found = []
    for path, w in leaves.items():
        mask = np.broadcast_to(np.asarray(known[path]), w.shape)
        values = np.asarray(w).astype(np.float32)
        found.append(Part(path, np.where(mask, values, np.float32(0)), mask))
    return found


def judge(wanted: Iterable[Part], arrays: Mapping[str, np.ndarray]) -> tuple[list[Kept], list[str]]:
    """Count zeros part by part, and list the paths of those that are not there.

    Twice the same values are two arrays of one leaf, or those of leaves that began as copies: an
    array belongs to the leaf that it is most like, and of several to the one whose zeros it has.
    """
    parts = [pair for each in wanted for pair in _apart(each, arrays)]
    owners: dict[str, int] = {}
    for name in arrays:
        claims = {i: m for i, (_, found) in enumerate(parts) for m in found if m.name == name}
        best = max((m.likeness for m in claims.values()), default=0.0)
        near = [i for i, m in claims.items() if m.likeness >= best - NEAR]
        if near:
            owners[name] = min(near, key=lambda i: _other_zeros(parts[i][0], claims[i].x))
    rows: dict[str, Kept] = {}
    missing = []
    for i, (part, found) in enumerate(parts):
        mine = [m for m in found if owners[m.name] == i]
        mine = mine or sorted(found, key=lambda m: -m.likeness)[:1]
        if not mine:
            missing.append(part.path)
            continue
        worst = max((count(part, m.x) for m in mine), key=lambda row: (row.lost, row.zeroed))
        rows[part.path] = _joined_rows(rows.get(part.path), worst)
    return [row for path, row in rows.items() if path not in missing], list(dict.fromkeys(missing))


def count(part: Part, x: np.ndarray) -> Kept:
    """Compare a part with what a file holds of it."""
    lost = ~part.mask & (x != 0)  # NaN is not zero
    size = np.max(np.abs(x), initial=0.0, where=np.isfinite(x)) or 1.0
    largest = float(np.max(np.abs(x), initial=0.0, where=lost) / size)
    zeroed = part.mask & (part.w != 0) & (x == 0)
    return Kept(part.path, int((~part.mask).sum()), int(lost.sum()), largest, int(zeroed.sum()))


def _other_zeros(part: Part, x: np.ndarray) -> int:
    return int(np.sum((part.w == 0) != (x == 0)))


def _joined_rows(first: Kept | None, second: Kept) -> Kept:
    """Add the rows of layers."""
    if first is None:
        return second
    sums = (first.removed + second.removed, first.lost + second.lost)
    largest = max(first.largest, second.largest)
    return Kept(first.path, *sums, largest, first.zeroed + second.zeroed)


def _apart(part: Part, arrays: Mapping[str, np.ndarray]) -> list[tuple[Part, list[Match]]]:
    """A leaf as it is where the file holds it, else its layers, if the file holds those."""
    whole = part, _matches(part, arrays)
    if part.w.ndim < 3 or whole[1]:
        return [whole]
    layers = [Part(part.path, w, m) for w, m in zip(part.w, part.mask, strict=True)]
    pairs = [pair for layer in layers for pair in _apart(layer, arrays)]
    return pairs if all(found for _, found in pairs) else [whole]


def _matches(part: Part, arrays: Mapping[str, np.ndarray]) -> list[Match]:
    """The arrays that may be a part, each in the order that is most like it."""
    return _found(part, arrays) or _found(part, arrays, by_channel=True)


def _found(part: Part, arrays: Mapping[str, np.ndarray], by_channel: bool = False) -> list[Match]:
    places = np.flatnonzero(part.w)
    kept = places.size
    if kept > SAMPLE:
        places = np.random.default_rng(0).choice(places, SAMPLE)
    least = min(ALIKE + 3 / np.sqrt(max(kept, 1)), 0.95)
    chosen = np.unravel_index(places, part.w.shape)
    even = _even if by_channel else lambda y: [y]
    mine = [y[chosen].astype(np.float64) for y in even(part.w)]

    def alike(x: np.ndarray) -> float:
        theirs = [np.nan_to_num(y[chosen].astype(np.float64)) for y in even(x)]
        return max(map(_likeness, mine, theirs))

    found = []
    for name, x in arrays.items():
        if x.size != part.w.size:
            continue
        orders = list(_orders(x, part.w.shape))
        named = name == part.path and x.shape == part.w.shape
        if not kept and not np.any(x) and orders:  # nothing is left to tell it by
            found.append(Match(name, orders[0], 1.0))
            continue
        orders += [y for turned in orders for y in _reversed(turned)]
        scores = [alike(y) for y in orders] if kept >= FEWEST else []
        if scores and max(scores) >= least:
            best = int(np.argmax(scores))
            found.append(Match(name, orders[best], max(scores) + named))
        elif named:
            found.append(Match(name, x, 2.0))
    return found


def _orders(x: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """All ways in which an array is one of that shape with its axes in another order."""
    if x.shape == shape:
        yield x
    tight, wanted = x.reshape([n for n in x.shape if n > 1]), [n for n in shape if n > 1]
    if sorted(tight.shape) == sorted(wanted):
        for axes in itertools.permutations(range(tight.ndim)):
            if [tight.shape[i] for i in axes] == wanted:
                yield tight.transpose(axes).reshape(shape)
    yield from _joined(tight, shape)


def _joined(x: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Axes that a file holds as one: a kernel `[in, heads, size]` as `[in, heads * size]`."""
    if x.ndim == 1 and len(shape) > 1 and x.size == np.prod(shape):  # biases of heads
        yield x.reshape(shape)
    if x.ndim != 2 or len(shape) < 3:
        return
    for at in range(1, len(shape)):
        rows, columns = shape[:at], shape[at:]
        if x.shape == (np.prod(rows), np.prod(columns)):
            yield x.reshape(shape)
        if x.shape == (np.prod(columns), np.prod(rows)):
            yield x.T.reshape(shape)


def _reversed(x: np.ndarray) -> Iterator[np.ndarray]:
    """A kernel reversed along its windows, as converters write transposed convolutions."""
    if x.ndim > 2:
        yield np.flip(x, tuple(range(x.ndim - 2)))


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlate weights, and their sizes: a scale of channels may turn signs."""
    if np.array_equal(a, b):
        return 1.0
    left = b != 0  # a channel that is gone as a whole says nothing
    if left.sum() < FEWEST:
        return 0.0
    a, b = a[left], b[left]
    return max(_correlation(a, b), _correlation(np.abs(a), np.abs(b)))


def _even(x: np.ndarray) -> list[np.ndarray]:
    """Bring all outputs to one size, first or last, that norms behind a product have scaled."""
    sizes = [np.sqrt(np.mean(np.square(x), axis=_but(x, i), keepdims=True)) for i in (0, -1)]
    return [np.abs(x) / np.where(size > 0, size, 1) for size in sizes]


def _but(x: np.ndarray, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else 0.0


def compare_zeros(source: Arrays, arrays: Arrays) -> tuple[Zeros | None, list[str]]:
    """Look what became of the zeros of the weights of a file; None where they had none.

    Those of some name are looked for under that name, and only then elsewhere. And the names of
    those that are not found.
    """
    rows: list[Kept] = []
    missing: list[str] = []
    for name, w in source.items():
        if w.all():
            continue
        own = {name: arrays[name]} if name in arrays else arrays
        found, gone = judge([Part(name, w, w != 0)], own)
        rows, missing = rows + found, missing + gone
    return Zeros(tuple(rows)) if rows else None, missing
