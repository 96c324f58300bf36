"""A look at files of others: are the weights that masks remove still zero?"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune._masks import check_masks, unpack
from jaxprune._tree import is_hole, leaves_with_path, list_paths
from jaxprune.export._report import Report
from jaxprune.export._stored import Arrays, read_weights
from jaxprune.typing import Masks, Params

SAMPLE = 4096  # entries that two arrays are compared by, to tell which is which
ALIKE = 0.5  # correlation; that of arrays that have nothing to do with one another is below 0.1


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
    pruned weights back without a word; see ``docs/zeros.md`` for which do. This reads back what
    integers stand for and compares it with the masks.

    A leaf is looked for by its path and then by its values: files hold kernels transposed, under
    other names, layers one by one, scaled by a batch normalisation behind them.

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
      ValueError: masks do not mirror the params; a leaf with a mask is not in the file.
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
    wanted = _masked(params, masks)
    found = {path: locate(path, *pair, arrays) for path, pair in wanted.items()}
    missing = [path for path, array in found.items() if array is None]
    if missing:
        raise ValueError(
            f"`check_zeros` finds no weights like {list_paths(missing)} in {place}, which holds "
            f"{list_paths(list(arrays))}. Pass the params that were written (the small ones of "
            "`shrink`), and masks with None for what a tool has merged with something else."
        )
    return Zeros(tuple(count(path, *wanted[path], x) for path, x in found.items() if x is not None))


def _masked(params: Params, masks: Masks) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weights and masks of the leaves that have one."""
    known = {path: mask for path, mask in leaves_with_path(masks) if not is_hole(mask)}
    leaves = {path: w for path, w in leaves_with_path(params) if path in known}
    found = {}
    for path, w in leaves.items():
        mask = np.broadcast_to(np.asarray(known[path]), w.shape)
        values = np.asarray(w).astype(np.float32)
        found[path] = np.where(mask, values, np.float32(0)), mask
    return found


def count(path: str, w: np.ndarray, mask: np.ndarray, array: np.ndarray) -> Kept:
    """Compare one leaf with what a file holds of it, in the order of the leaf's axes."""
    lost = ~mask & (array != 0)  # NaN is not zero
    size = np.max(np.abs(array), initial=0.0, where=np.isfinite(array)) or 1.0
    largest = float(np.max(np.abs(array), initial=0.0, where=lost) / size)
    zeroed = mask & (w != 0) & (array == 0)
    return Kept(path, int((~mask).sum()), int(lost.sum()), largest, int(zeroed.sum()))


def locate(
    path: str, w: np.ndarray, mask: np.ndarray, arrays: Mapping[str, np.ndarray]
) -> np.ndarray | None:
    """Find a leaf among the arrays of a file, and bring its axes in order; None if it is not there.

    By name where name and shape are those of the leaf, else by the values of the weights.
    """
    named = arrays.get(path)
    if named is not None and named.shape == w.shape:
        return named
    alike = [x for x in ([named] if named is not None else arrays.values()) if x.size == w.size]
    turned = [y for x in alike for y in _orders(x, w.shape)]
    scores = [_likeness(w, mask, y) for y in turned]
    if scores and max(scores) >= min(ALIKE + 3 / np.sqrt(w.size), 0.95):
        return turned[int(np.argmax(scores))]
    layers = [locate(f"{path}/{i}", w[i], mask[i], arrays) for i in range(_layers(w))]
    if not layers or any(layer is None for layer in layers):
        return None
    return np.stack([layer for layer in layers if layer is not None])


def _layers(w: np.ndarray) -> int:
    return len(w) if w.ndim > 2 else 0


def _orders(x: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """All ways in which an array is one of that shape with its axes in another order."""
    tight, wanted = x.reshape([n for n in x.shape if n > 1]), [n for n in shape if n > 1]
    if sorted(tight.shape) == sorted(wanted):
        for axes in itertools.permutations(range(tight.ndim)):
            if [tight.shape[i] for i in axes] == wanted:
                yield tight.transpose(axes).reshape(shape)
    yield from _joined(tight, shape)


def _joined(x: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Axes that a file holds as one: a kernel `[in, heads, size]` as `[in, heads * size]`."""
    if x.ndim != 2 or len(shape) < 3:
        return
    for at in range(1, len(shape)):
        rows, columns = shape[:at], shape[at:]
        if x.shape == (np.prod(rows), np.prod(columns)):
            yield x.reshape(shape)
        if x.shape == (np.prod(columns), np.prod(rows)):
            yield x.T.reshape(shape)


def _likeness(w: np.ndarray, mask: np.ndarray, x: np.ndarray) -> float:
    """Correlate some entries, and their sizes, whose signs a scale of channels may turn."""
    places = np.unravel_index(_sample(mask), w.shape)
    a, b, m = w[places], np.nan_to_num(x[places].astype(np.float64)), mask[places]
    if np.array_equal(a, b):
        return 1.0
    return max(_correlation(a, b), _correlation(np.abs(a) * m, np.abs(b)))


def _sample(mask: np.ndarray) -> np.ndarray:
    """Some entries, half of them kept, or of a thousandth that is kept none would be among them."""
    if mask.size <= SAMPLE:
        return np.arange(mask.size)
    rng, kept = np.random.default_rng(0), np.flatnonzero(mask)
    places = rng.integers(0, mask.size, SAMPLE)
    return places if not kept.size else np.concatenate([places, rng.choice(kept, SAMPLE)])


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 0 else 0.0


def compare_zeros(source: Arrays, arrays: Arrays) -> Zeros | None:
    """Look what became of the zeros of the weights of a file; None where they had none."""
    pruned = {name: (w, w != 0) for name, w in source.items() if not w.all()}
    found = {name: locate(name, *pair, arrays) for name, pair in pruned.items()}
    rows = [count(name, *pruned[name], x) for name, x in found.items() if x is not None]
    return Zeros(tuple(rows)) if rows else None
