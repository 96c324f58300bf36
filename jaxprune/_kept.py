"""Kept indices: which indices of each axis stay, as masks or a file say it."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxprune._errors import check_living, short, whole
from jaxprune._tree import is_array, leaves_by_path, leaves_with_path, list_paths
from jaxprune.typing import Masks, Params

Shape: TypeAlias = tuple[int, ...]
# Path: axis: indices that stay, increasing. An axis that is not named stays whole.
Kept: TypeAlias = Mapping[str, Mapping[int, np.ndarray]]


def kept_by(masks: Masks) -> dict[str, dict[int, np.ndarray]]:
    """Read from each mask which indices of each axis stay: the way from masks to what is cut.

    A mask can be cut out if it says of each axis which indices stay, and nothing more: it is the
    product of one vector an axis. ``[[1, 0, 1], [0, 0, 0]]`` keeps row 0 and columns 0 and 2,
    ``{0: [0], 1: [0, 2]}``; without its last 1 it is no such product. A mask that keeps nothing
    drops its leaf, ``{0: []}``; one that keeps everything has a path and no axes.

    Raises:
      ValueError: a mask removes single weights rather than whole indices of its axes.
    """
    check_living(masks)
    kept: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in leaves_by_path(masks, "shrink").items():
        mask = np.asarray(leaf)
        others = [tuple(j for j in range(mask.ndim) if j != i) for i in range(mask.ndim)]
        vectors = {i: np.asarray(mask.any(axis=axes)) for i, axes in enumerate(others)}
        if not mask.size or not mask.ndim:  # nothing that could go
            kept[path] = {}
        elif not mask.any():
            kept[path] = {0: np.arange(0)}
        else:
            outer = product(vectors, mask.ndim)
            if not np.array_equal(outer, mask):
                raise ValueError(
                    f"The mask of {path!r} removes {int(outer.sum() - mask.sum())} single weights "
                    "of rows and columns that stay; only whole indices of an axis can be cut out. "
                    "Find masks with `pattern=jp.patterns.Coupled(groups)`."
                )
            kept[path] = {i: np.nonzero(v)[0] for i, v in vectors.items() if not v.all()}
    return kept


def read(
    kept: Mapping[str, Mapping[Any, Any]], shapes: Mapping[str, Shape] | None = None
) -> dict[str, Mapping[int, np.ndarray]]:
    """Read kept indices as JSON gives them; ``shapes`` are those of the params, if known.

    Indices become read-only arrays, axes numbers. Where no axis is named there is no path.

    Raises:
      TypeError: it is no such mapping.
      ValueError: indices do not increase from 0, or the params lack them.
    """
    if not isinstance(kept, Mapping) or not all(isinstance(a, Mapping) for a in kept.values()):
        raise TypeError(
            f"A cut is a mapping from paths to axes to indices, but got {short(kept)}. Pass what "
            "`jp.cut_list` gives, such as {'w': {1: [0, 2]}}, or make it of masks: "
            "`jp.Cut.from_masks(masks, params)`."
        )
    found: dict[str, dict[int, np.ndarray]] = {}
    wrong = []
    for path, axes in kept.items():
        has = "" if shapes is None else f", but the params have {shapes.get(path, 'no such path')}"
        for axis, indices in axes.items():
            i, k = _axis(path, axis), _indices(indices)
            if k is None or not (shapes is None or _inside(i, k, shapes.get(path, ()))):
                wrong.append(f"{short(np.asarray(indices).tolist())} of axis {i} of {path!r}{has}")
            else:
                found.setdefault(path, {})[i] = k
    if wrong:
        raise ValueError(
            f"The cut keeps {'; '.join(wrong[:6])}. Pass increasing indices, as `jp.cut_list` "
            "gives them for these params."
        )
    return {path: MappingProxyType(axes) for path, axes in found.items()}


def _axis(path: str, axis: Any) -> int:
    """A number, also where JSON has turned it into a string."""
    number = int(axis) if isinstance(axis, str) and axis.isdecimal() else whole(axis)
    if number is None or number < 0:
        raise ValueError(f"The cut names axis {axis!r} of {path!r}. Count axes from 0.")
    return number


def _indices(indices: Any) -> np.ndarray | None:
    """Indices as an array that nobody writes to; None if they are none, or do not increase."""
    given = np.asarray(indices)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        return None
    k = np.array(given, np.int64)
    k.setflags(write=False)
    return k if k.min(initial=0) >= 0 and (np.diff(k) > 0).all() else None


def _inside(axis: int, indices: np.ndarray, shape: Shape) -> bool:
    return axis < len(shape) and bool(indices.max(initial=-1) < shape[axis])


def fitting(
    kept: Kept, shapes: Mapping[str, Shape], dense: Mapping[str, Shape]
) -> dict[str, dict[int, np.ndarray]]:
    """Say what to take out of arrays of these shapes; ``dense`` are those of the params, if known.

    An axis of size 1 that stands for a longer one, as masks have it, is left alone.
    """
    found: dict[str, dict[int, np.ndarray]] = {path: {} for path in shapes}
    wrong = []
    for path, shape in shapes.items():
        for i, k in kept[path].items():
            size = shape[i] if i < len(shape) else -1
            want = dense[path][i] if path in dense else max(size, k.max(initial=-1) + 1)
            if size == want:
                found[path][i] = k
            elif size != 1:
                wrong.append(f"{path!r} has shape {shape}, but {want} along axis {i} is wanted")
    if wrong:
        raise ValueError(
            f"The cut does not fit the tree: {'; '.join(wrong[:6])}. Pass a tree of the whole "
            "network that it was made for."
        )
    return found


def composed(second: Kept, first: Kept) -> dict[str, dict[int, np.ndarray]]:
    """Kept indices of the whole network, from those of two rounds.

    ``second`` counts what ``first`` kept: of ``[0, 2, 5]`` it keeps ``[0, 5]`` by ``[0, 2]``.
    """
    kept = {path: dict(axes) for path, axes in first.items()}
    for path, axes in second.items():
        before = kept.setdefault(path, {})
        for i, k in axes.items():
            if i in before and k.max(initial=-1) >= len(before[i]):
                raise ValueError(
                    f"The second cut keeps index {k.max()} of axis {i} of {path!r}, of which the "
                    f"first leaves {len(before[i])}. Its indices count those that the first kept."
                )
            before[i] = before[i][k] if i in before else k
    return kept


def product(vectors: Mapping[int, np.ndarray], rank: int) -> np.ndarray:
    """Combine bools of some axes, `[n]` each: `[n or 1, ...]`, True where all of them are."""
    mask = np.ones((1,) * rank, bool)
    for i, vector in vectors.items():
        mask = mask & np.expand_dims(vector, [j for j in range(rank) if j != i])
    return mask


def is_dropped(axes: Mapping[int, np.ndarray]) -> bool:
    """True for a leaf of which nothing stays: it belongs to a block that is left out."""
    return any(len(indices) == 0 for indices in axes.values())


def path_in(part: str | Params) -> Callable[[str], str | None]:
    """Say what paths are called in a part of their tree; None for those outside.

    The part is the prefix of a subtree, which is taken off, or a tree of fewer leaves.
    """
    if isinstance(part, str):
        start = f"{part.rstrip('/')}/" if part else ""
        return lambda path: path.removeprefix(start) if path.startswith(start) else None
    leaves = {path for path, _ in leaves_with_path(part)}
    return lambda path: path if path in leaves else None


def name_part(part: str | Params) -> str:
    """The part for a message."""
    if isinstance(part, str):
        return repr(part)
    return "a tree of " + list_paths(sorted(path for path, _ in leaves_with_path(part)), 6)


def shapes_of(params: Params, user: str) -> dict[str, Shape]:
    """Shapes of the arrays of a tree by path; what is no array is left out."""
    leaves = leaves_by_path(params, user)
    return {path: tuple(leaf.shape) for path, leaf in leaves.items() if is_array(leaf)}


def check_known(masks: Collection[str], params: Collection[str]) -> None:
    """Refuse paths of masks that the params lack."""
    unknown = [path for path in masks if path not in params]
    if unknown:
        raise ValueError(
            f"The masks name {list_paths(unknown)}, which the params lack; their paths are "
            f"{list_paths(list(params))}. Nest the masks as the params are."
        )


def check_fit(masks: Masks, shapes: Mapping[str, Shape], user: str) -> None:
    """Refuse masks of unknown paths and what is no mask of these shapes."""
    given = leaves_by_path(masks, user)
    check_known(given, shapes)
    for path, mask in given.items():
        fits = jnp.ndim(mask) == len(shapes[path]) and all(
            m in (1, n) for m, n in zip(jnp.shape(mask), shapes[path], strict=True)
        )
        if not fits or np.asarray(mask).dtype != bool:
            raise ValueError(
                f"The mask of {path!r} is {np.asarray(mask).dtype}{list(jnp.shape(mask))}, which "
                f"does not fit its shape {list(shapes[path])}. Masks are bool, of the same rank, "
                "each axis full or 1."
            )
