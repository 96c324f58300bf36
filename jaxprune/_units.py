"""Units of groups and masks of parameters: which units masks leave, and masks of given units."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxprune._group import Group, Member
from jaxprune._kept import Kept, at_layer, is_dropped, layer_axis, layers_in
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


def left_by_layer(groups: Sequence[Group], kept: Kept) -> dict[str, np.ndarray]:
    """Say of each group which units are left: `[size]` bools, or `[layers, size]`.

    Raises:
      ValueError: masks that remove an index of a group but not all that lives with it, or that
        keep other units in each layer of a group that cannot be chosen so.
    """
    every = []
    for layer in range(layers_in(kept)):
        mine = at_layer(kept, layer)
        left = {group.name: units_left(group, mine) for group in groups}
        check_units(groups, left, mine)
        every.append(left)
    found = {}
    for group in groups:
        rows = np.stack([left[group.name] for left in every])
        same = (rows == rows[:1]).all()
        if same:
            found[group.name] = rows[0]
            continue
        _check_layers(group, kept)
        stay = _layers_left(group, kept)
        found[group.name] = np.zeros((group.layers, group.size), bool)  # no layer, no units
        found[group.name][stay] = rows[: len(stay)]
    return found


def _layers_left(group: Group, kept: Kept) -> np.ndarray:
    """Which layers of a group are left, of those that it had."""
    axes = ((m, kept.get(m.path, {})) for m in group.members)
    left = [
        k[m.layer] for m, k in axes if m.layer is not None and m.layer in k and not is_dropped(k)
    ]
    return left[0] if left else np.arange(group.layers)


def _check_layers(group: Group, kept: Kept) -> None:
    """Refuse masks that keep other units in each layer, where the group does not allow that."""
    for m in group.members:
        k = kept.get(m.path, {}).get(m.axis)
        along = None if k is None else layer_axis(k, m.axis)
        if along is not None and (not group.layers or along != m.layer):
            why = (
                f"whose layers lie along axis {m.layer}"
                if group.layers
                else "of which all layers have to keep the same"
            )
            raise ValueError(
                f"The masks keep other indices of axis {m.axis} of {m.path!r} in each place along "
                f"axis {along}, but it belongs to the group {group.name!r}, {why}. Find masks with "
                "`pattern=jp.patterns.Coupled(groups)` for groups of this very function."
            )


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
    """The group in the small network, counted anew; none if nothing of it is left.

    Where layers keep units of their own the first layer tells: whichever they are, as many of them
    lie at the same places.
    """
    first = at_layer(kept, 0)
    units = units_left(group, first)
    members = []
    for m in group.members:
        axes = first.get(m.path, {})
        if is_dropped(axes):
            continue
        indices = m.indices[units]
        if m.axis in axes and indices.size:
            left = axes[m.axis]
            stay = np.isin(indices, left)  # another group may have taken some of each unit
            indices = np.searchsorted(left, indices[stay]).reshape(len(indices), -1)
        members.append(dataclasses.replace(m, indices=indices))
    size = int(units.sum())
    if not (size and members):
        return []
    layers = len(_layers_left(group, kept)) if group.layers else 0
    if group.layers and layers < 2:  # one layer is no stack
        layers, members = 0, [dataclasses.replace(m, layer=None) for m in members]
    return [dataclasses.replace(group, members=tuple(members), size=size, layers=layers)]


# From units to masks.


def expand(groups: Sequence[Group], keep: Mapping[str, ArrayLike], like: Params) -> Masks:
    """Masks that keep the given units: an axis full where a group cuts it, 1 elsewhere.

    Works on traced ``keep``, bools `[size]` for each group, or `[layers, size]` for one that is
    chosen in each layer: then the axis of layers is full as well. Leaves without a member are None.
    """
    leaves = leaves_by_path(like, "Coupled")
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    parts: dict[str, dict[tuple[int, ...], jax.Array]] = {}
    for group in groups:
        units = jnp.asarray(keep[group.name])
        if units.ndim > 1:
            check_layers(group, shapes)
        for m in group.members:
            check_member(group, m, shapes)
            place, part = _part(units, m, shapes[m.path])
            mine = parts.setdefault(m.path, {})
            mine[place] = mine[place] & part if place in mine else part

    def mask(path: str, _: jax.Array) -> jax.Array | None:
        mine = [part for _, part in sorted(parts.get(path, {}).items())]
        return functools.reduce(operator.and_, mine) if mine else None

    return map_with_path(mask, like)


def _part(
    units: jax.Array, member: Member, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], jax.Array]:
    """The axes that units `[size]` or `[layers, size]` cut of a member, and its mask along them."""
    along = functools.partial(_along_axis, indices=member.indices, size=shape[member.axis])
    if units.ndim == 1 or member.layer is None:
        others = [j for j in range(len(shape)) if j != member.axis]
        return (member.axis,), jnp.expand_dims(along(units), others)
    rows = jax.vmap(along)(units)
    others = [j for j in range(len(shape)) if j not in (member.axis, member.layer)]
    part = rows if member.layer < member.axis else rows.T
    return (member.axis, member.layer), jnp.expand_dims(part, others)


def check_member(group: Group, member: Member, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse groups of other params than those that masks are made for."""
    path, axis, indices = member.path, member.axis, member.indices
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


def check_layers(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a stack of more or fewer layers than the group was found for."""
    for m in group.members:
        check_member(group, m, shapes)
        if m.layer is not None and shapes[m.path][m.layer] != group.layers:
            raise ValueError(
                f"The group {group.name!r} has {group.layers} layers along axis {m.layer} of "
                f"{m.path!r}, but its shape is {shapes[m.path]}. Find the groups of these params, "
                "or move groups along with `groups.cut(masks)`."
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
