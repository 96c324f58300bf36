"""Units of groups and masks of parameters: which units masks leave, and masks of given units."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune._group import Group
from jaxprune._kept import Kept, is_dropped
from jaxprune._tree import leaves_by_path, list_paths, map_with_path
from jaxprune.typing import Masks, Params

Place: TypeAlias = tuple[str, int]  # an axis of a parameter

# From kept indices to units.


def units_left(group: Group, kept: Kept) -> np.ndarray:
    """Say of each unit whether it is left: `[size]` bools.

    A unit is gone where every index that it owns is gone from every member with a mask: one mask
    is enough to tell. Of two heads with columns 0-2 and 3-5, masks that keep columns 0 and 2 leave
    the first; that its column 1 is gone is the matter of another group. A leaf that is dropped
    with a block around it says something of that block alone.
    """
    left = np.zeros(group.size, bool)
    seen = False
    for m in group.members:
        axes = kept.get(m.path)
        if axes is None or (group.kind != "block" and is_dropped(axes)):
            continue
        seen = True
        if not is_dropped(axes):
            left |= np.isin(m.indices, axes[m.axis]).any(1) if m.axis in axes else True
    unmasked = not seen and any(m.path not in kept for m in group.members)
    return left | unmasked


def check_units(groups: Sequence[Group], left: Mapping[str, np.ndarray], kept: Kept) -> None:
    """Refuse masks that remove what no unit that is gone owns; ``left`` is `[size]` for each."""
    owned = _owned_by_gone(groups, left)
    for group in groups:
        for m in group.members if group.kind != "block" else ():  # may lose channels, too
            axes = kept.get(m.path, {})
            if m.axis not in axes or is_dropped(axes):
                continue
            every = m.indices.ravel()
            gone = np.isin(every, owned.get((m.path, m.axis), []))
            wrong = every[~np.isin(every, axes[m.axis]) & ~gone]
            if len(wrong):
                raise ValueError(
                    f"The masks remove index {wrong[0]} of axis {m.axis} of {m.path!r}, which "
                    f"contradicts the rest of its group {group.name!r}: "
                    f"{list_paths(sorted({n.path for n in group.members}), 6)}. Make them with "
                    "`pattern=jp.patterns.Coupled(groups)`, or carry them over with "
                    "`groups.complete(masks, params)`."
                )


def _owned_by_gone(
    groups: Sequence[Group], left: Mapping[str, np.ndarray]
) -> dict[Place, np.ndarray]:
    """Indices of each axis that go with units that are gone."""
    gone: dict[Place, list[np.ndarray]] = {}
    for group in groups:
        dead = ~left[group.name]
        for m in group.members if dead.any() else ():
            gone.setdefault((m.path, m.axis), []).append(m.indices[dead].ravel())
    return {place: np.concatenate(indices) for place, indices in gone.items()}


def shrunk(group: Group, kept: Kept) -> list[Group]:
    """The group in the small network, counted anew; none if nothing of it is left."""
    units = units_left(group, kept)
    members = []
    for m in group.members:
        axes = kept.get(m.path, {})
        if is_dropped(axes):
            continue
        indices = m.indices[units]
        if m.axis in axes and indices.size:
            left = axes[m.axis]
            stay = np.isin(indices, left)  # another group may have taken some of each unit
            indices = np.searchsorted(left, indices[stay]).reshape(len(indices), -1)
        members.append(dataclasses.replace(m, indices=indices))
    size = int(units.sum())
    return [dataclasses.replace(group, members=tuple(members), size=size)] * bool(size and members)


# From units to masks.


def expand(groups: Sequence[Group], keep: Mapping[str, ArrayLike], like: Params) -> Masks:
    """Masks that keep the given units: an axis full where a group cuts it, 1 elsewhere.

    Works on traced ``keep``, bools `[size]` for each group. Leaves without a member are None.
    """
    leaves = leaves_by_path(like, "Coupled")
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    vectors: dict[str, dict[int, jax.Array]] = {}
    for group in groups:
        units = jnp.asarray(keep[group.name])
        for m in group.members:
            _check_member(group, m.path, m.axis, m.indices, shapes)
            vector = _along_axis(units, m.indices, shapes[m.path][m.axis])
            axes = vectors.setdefault(m.path, {})
            axes[m.axis] = axes[m.axis] & vector if m.axis in axes else vector

    def mask(path: str, _: jax.Array) -> jax.Array | None:
        whole = None
        for i, vector in sorted(vectors.get(path, {}).items()):
            others = [j for j in range(len(shapes[path])) if j != i]
            part = jnp.expand_dims(vector, others)
            whole = part if whole is None else whole & part
        return whole

    return map_with_path(mask, like)


def _check_member(
    group: Group, path: str, axis: int, indices: np.ndarray, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse groups of other params than those that masks are made for."""
    if path not in shapes:
        raise ValueError(
            f"The group {group.name!r} has a member {path!r} that `params` lack; their "
            f"paths are {list_paths(list(shapes))}. Use the groups of this tree: "
            "`groups.at(params)`, or `groups.at(prefix)` for a subtree of flax variables."
        )
    size = shapes[path][axis] if axis < len(shapes[path]) else -1
    if size <= int(indices.max(initial=-1)):
        raise ValueError(
            f"The group {group.name!r} owns index {indices.max()} of axis {axis} of "
            f"{path!r}, but its shape is {shapes[path]}. Find the groups of these "
            "params, or move groups along with `groups.cut(masks)`."
        )


def _along_axis(units: jax.Array, indices: np.ndarray, size: int) -> jax.Array:
    """Say of each index of an axis, `[size]`, whether all units that own it are kept.

    ``units`` are bools `[u]`, ``indices`` `[u, k]` what each owns. What nobody owns is kept.
    """
    order, each = indices.ravel(), indices.shape[1]
    if np.array_equal(order, np.arange(size)) and each == 1:
        return units
    if len(np.unique(order)) < len(order):  # an index may belong to two units of a group
        return jnp.ones(size, bool).at[order].min(jnp.repeat(units, each))
    owner = np.full(size, len(indices))  # of what nobody owns: one more unit, which is kept
    owner[indices] = np.arange(len(indices))[:, None]
    return jnp.append(units, True)[owner]
