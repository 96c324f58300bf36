"""Kept indices: which indices of each axis stay, as masks or a file say it."""

# The indices that stay of an axis are a vector. Where the layers of a stack keep others each, they
# are a row for each layer, equally long, that lie as the leaf does, with ones for all other axes:
#
#     up: [4, 32, 128]      {1: [30 indices]}                     the same in all layers
#                           {2: [4, 1, 64], a row a layer}        x[l, :, k[l, 0]]
#
# That is how `take_along_axis` wants them, and the axis that counts layers can be told from them.
# Where layers go, too, there are rows for those that stay. Rows that are all equal are a vector.

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxprune._errors import check_living, short, whole
from jaxprune._tree import is_array, leaves_by_path, leaves_with_path, list_paths
from jaxprune.typing import Masks, Params

Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = Mapping[int, np.ndarray]  # axis: indices that stay, increasing
Kept: TypeAlias = Mapping[str, Axes]  # an axis that is not named stays whole

# The indices of one axis.


def count(indices: np.ndarray, axis: int) -> int:
    """How many indices stay: of the axis, or of the axis in each layer."""
    return indices.shape[axis if indices.ndim > 1 else 0]


def layer_axis(indices: np.ndarray, axis: int) -> int | None:
    """The axis of the leaf along which rows of indices lie, None for a vector."""
    if indices.ndim == 1:
        return None
    return next((i for i, n in enumerate(indices.shape) if i != axis and n > 1), None)


def laid(rows: np.ndarray, axis: int, layer: int, rank: int) -> np.ndarray:
    """Lay rows `[layers, kept]` out as in a leaf; a vector if they are all equal."""
    if (rows == rows[:1]).all():
        return rows[0]
    shape = [1] * rank
    shape[layer], shape[axis] = rows.shape
    return (rows if axis > layer else rows.T).reshape(shape)


def at_layer(kept: Kept, layer: int) -> dict[str, dict[int, np.ndarray]]:
    """What one layer keeps: vectors alone. Of shorter stacks it is the last one."""
    return {path: {i: _row(k, i, layer) for i, k in axes.items()} for path, axes in kept.items()}


def _row(indices: np.ndarray, axis: int, layer: int) -> np.ndarray:
    along = layer_axis(indices, axis)
    if along is None:
        return indices
    return indices.take(min(layer, indices.shape[along] - 1), axis=along).ravel()


def layers_in(kept: Kept) -> int:
    """How many layers there are that keep indices of their own; 1 where none do."""
    sizes = [
        k.shape[along]
        for axes in kept.values()
        for i, k in axes.items()
        if (along := layer_axis(k, i)) is not None
    ]
    return max(sizes, default=1)


# From masks.


def kept_by(
    masks: Masks,
    *,
    shapes: Mapping[str, Shape] = MappingProxyType({}),
    layers: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, dict[int, np.ndarray]]:
    """Read from each mask which indices of each axis stay: the way from masks to what is cut.

    A mask can be cut out if it says of each axis which indices stay, and nothing more: it is the
    product of one vector an axis. ``[[1, 0, 1], [0, 0, 0]]`` keeps row 0 and columns 0 and 2,
    ``{0: [0], 1: [0, 2]}``; without its last 1 it is no such product. A mask that keeps nothing
    drops its leaf, ``{0: []}``; one that keeps everything has a path and no axes. A stack may be
    such a product in each of its layers, which keep as many indices each.

    Args:
      masks: bools by path.
      shapes: of the params, where they are known.
      layers: the axis that counts layers, of the leaves of which it is known.

    Raises:
      ValueError: a mask removes single weights rather than whole indices of its axes, or layers
        keep more and fewer of them.
    """
    check_living(masks)
    given = {path: np.asarray(leaf) for path, leaf in leaves_by_path(masks, "shrink").items()}
    kept = {path: _as_product(mask) for path, mask in given.items()}
    mixed = {path: given[path] for path, axes in kept.items() if axes is None}
    if mixed:
        kept |= _by_layers(mixed, shapes, layers)
    return {path: axes for path, axes in kept.items() if axes is not None}


def _as_product(mask: np.ndarray) -> dict[int, np.ndarray] | None:
    """Indices of each axis that a mask cuts; None if it is no product of vectors."""
    if not mask.size or not mask.ndim:  # nothing that could go
        return {}
    if not mask.any():
        return {0: np.arange(0)}
    vectors = _vectors(mask)
    if not np.array_equal(product(vectors, mask.ndim), mask):
        return None
    return {i: np.nonzero(v)[0] for i, v in vectors.items() if not v.all()}


def _vectors(mask: np.ndarray) -> dict[int, np.ndarray]:
    """For each axis which indices have anything left."""
    others = [tuple(j for j in range(mask.ndim) if j != i) for i in range(mask.ndim)]
    return {i: np.asarray(mask.any(axis=axes)) for i, axes in enumerate(others)}


class _Stack(NamedTuple):
    """A mask read as one product a layer.

    Attributes:
      axes: indices that stay of each axis that is cut.
      layers: how many layers there are.
      unequal: an axis of which layers keep more and fewer, and how many each; nothing if none.
    """

    axes: dict[int, np.ndarray]
    layers: int
    unequal: tuple[int, list[int]] | None


def _as_stack(mask: np.ndarray, layer: int) -> _Stack | None:
    """Read each layer as a product, the layers lying along an axis; None if they are none."""
    others = tuple(i for i in range(mask.ndim) if i != layer)
    living = np.nonzero(mask.any(axis=others))[0]
    vectors = []
    for n in living:  # an axis of no layers fails at once
        one = mask.take([n], axis=layer)
        vectors.append(_vectors(one))
        if not np.array_equal(product(vectors[-1], mask.ndim), one):
            return None
    axes = {} if len(living) == mask.shape[layer] else {layer: living}
    for i in range(mask.ndim):
        bools = np.stack([v[i] for v in vectors])
        if i == layer or bools.all():
            continue
        counts = bools.sum(1)
        if (counts != counts[0]).any():
            return _Stack(axes, len(bools), (i, counts.tolist()))
        axes[i] = laid(np.nonzero(bools)[1].reshape(len(bools), -1), i, layer, mask.ndim)
    return _Stack(axes, mask.shape[layer], None)


def _by_layers(
    masks: Mapping[str, np.ndarray], shapes: Mapping[str, Shape], layers: Mapping[str, int]
) -> dict[str, dict[int, np.ndarray]]:
    """Read masks that are no products as stacks of layers.

    Any mask of a matrix that keeps as many weights of each column, as N:M does, could be taken for
    one. So where nobody says which axis counts layers, a leaf of three axes has to have that shape
    first, as any kernel in a stack has, and a matrix follows with as many layers.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    sizes: set[int] = set()

    def axes_of(path: str, mask: np.ndarray) -> int:
        return sum(n > 1 for n in shapes[path]) if path in shapes else mask.ndim

    for path, mask in sorted(masks.items(), key=lambda one: -axes_of(*one)):
        known = path in layers or axes_of(path, mask) > 2
        uneven: list[tuple[int, _Stack]] = []
        for i in [layers[path]] if path in layers else range(mask.ndim):
            stack = _as_stack(mask, i) if mask.shape[i] > 1 else None
            if stack is None or not (known or stack.layers in sizes):
                continue
            if stack.unequal is None:
                found[path] = stack.axes
                sizes.add(stack.layers)
                break
            uneven.append((i, stack))
        else:
            raise ValueError(_why_uneven(path, uneven) or _why_single(path, mask))
    return found


def _why_uneven(path: str, stacks: Sequence[tuple[int, _Stack]]) -> str:
    """Which layers keep more and fewer; nothing where a mask is no stack at all."""
    if not stacks:
        return ""
    layer, stack = stacks[0]
    axis, counts = stack.unequal or (0, [])
    return (
        f"The mask of {path!r} keeps {short(counts)} indices of axis {axis} in the layers along "
        f"axis {layer}, but all layers of a stack have one width. Find masks with "
        "`pattern=jp.patterns.Coupled(groups)`, `scope=jp.scopes.per_leaf` and a layout, which "
        "lets layers keep as many each."
    )


def _why_single(path: str, mask: np.ndarray) -> str:
    """How many weights go of what stays."""
    removed = int(product(_vectors(mask), mask.ndim).sum() - mask.sum())
    return (
        f"The mask of {path!r} removes {removed} single weights of rows and columns that stay; "
        "only whole indices of an axis can be cut out. Find masks with "
        "`pattern=jp.patterns.Coupled(groups)`."
    )


# From plain numbers.


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
            i = _axis(path, axis)
            k = _indices(indices, i)
            if k is None or not (shapes is None or _inside(i, k, shapes.get(path, ()), axes)):
                wrong.append(f"{short(_plain(indices))} of axis {i} of {path!r}{has}")
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


def _plain(indices: Any) -> Any:
    return indices.tolist() if hasattr(indices, "tolist") else indices


def _indices(indices: Any, axis: int) -> np.ndarray | None:
    """Indices as an array that nobody writes to; None if they are none, or do not increase."""
    try:
        given = np.asarray(indices)
    except ValueError:  # rows of unequal lengths
        return None
    if given.ndim < 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        return None
    k = np.array(given, np.int64)
    if k.ndim > 1:
        if axis >= k.ndim or sum(n != 1 for i, n in enumerate(k.shape) if i != axis) > 1:
            return None
        layer = layer_axis(k, axis)
        if layer is None:
            return None
        k = laid(np.moveaxis(k, axis, -1).reshape(-1, k.shape[axis]), axis, layer, k.ndim)
    k = np.ascontiguousarray(k)
    k.setflags(write=False)
    rising = (np.diff(k, axis=axis if k.ndim > 1 else 0) > 0).all()
    return k if k.min(initial=0) >= 0 and rising else None


def _inside(axis: int, indices: np.ndarray, shape: Shape, axes: Mapping[Any, Any]) -> bool:
    """Say whether a leaf has the indices, and as many layers as there are rows."""
    if axis >= len(shape) or indices.max(initial=-1) >= shape[axis]:
        return False
    layer = layer_axis(indices, axis)
    if layer is None:
        return True
    stay = axes.get(layer, axes.get(str(layer)))
    want = shape[layer] if layer < len(shape) and stay is None else np.size(stay)
    return indices.ndim == len(shape) and indices.shape[layer] == want


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
        for i, k in before.items():  # rows of layers that go now
            layer = layer_axis(k, i)
            if layer is not None and layer in axes:
                left = k.take(axes[layer], axis=layer)
                before[i] = left if left.shape[layer] > 1 else left.ravel()
        for i, k in axes.items():
            if i in before and k.max(initial=-1) >= count(before[i], i):
                raise ValueError(
                    f"The second cut keeps index {k.max()} of axis {i} of {path!r}, of which the "
                    f"first leaves {count(before[i], i)}. Its indices count those that the first "
                    "kept."
                )
            before[i] = _counted(before[i], k, i) if i in before else k
    return kept


def _counted(before: np.ndarray, k: np.ndarray, axis: int) -> np.ndarray:
    """Of indices those that are kept by others, which count them."""
    if k.ndim == 1:
        return before.take(k, axis=axis if before.ndim > 1 else 0)
    return before[k] if before.ndim == 1 else np.take_along_axis(before, k, axis)


def product(vectors: Mapping[int, np.ndarray], rank: int) -> np.ndarray:
    """Combine bools of some axes, `[n]` each: `[n or 1, ...]`, True where all of them are."""
    mask = np.ones((1,) * rank, bool)
    for i, vector in vectors.items():
        mask = mask & np.expand_dims(vector, [j for j in range(rank) if j != i])
    return mask


def as_mask(axes: Axes, shape: Shape) -> np.ndarray:
    """The mask that keeps some indices of a leaf: an axis full where it is cut, 1 elsewhere."""
    mask = product({i: np.isin(np.arange(shape[i]), k) for i, k in axes.items()}, len(shape))
    for i, k in axes.items():
        if (layer := layer_axis(k, i)) is None:
            continue
        stay = axes.get(layer, np.arange(shape[layer]))
        rows = np.zeros([n if j in (i, layer) else 1 for j, n in enumerate(shape)], bool)
        left = np.zeros([len(stay) if j == layer else n for j, n in enumerate(rows.shape)], bool)
        np.put_along_axis(left, k, True, axis=i)
        rows[(slice(None),) * layer + (stay,)] = left
        mask = mask & rows
    return mask


def is_dropped(axes: Mapping[int, np.ndarray]) -> bool:
    """True for a leaf of which nothing stays: it belongs to a block that is left out."""
    return any(indices.size == 0 for indices in axes.values())


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
