"""Groups: which indices of which parameters live and die together, as plain data."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._errors import check_living
from jaxprune._tree import leaves_by_path, leaves_with_path, list_paths, map_with_path
from jaxprune.typing import Masks, Params

Cut = dict[str, dict[int, list[int]]]  # path: axis: indices that stay
Kept = dict[str, list[np.ndarray | None]]  # path: for each axis indices that stay, None for all


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """What a group owns of one axis of one parameter.

    Attributes:
      path: path of the parameter.
      axis: axis of the parameter.
      indices: integers `[size, k]`: unit ``u`` of the group owns ``indices[u]`` of the axis.

    Example:
      >>> Member("hidden/kernel", 1, np.arange(6).reshape(3, 2)).indices[1]  # the second of 3 heads
      array([2, 3])
    """

    path: str
    axis: int
    indices: np.ndarray

    def __post_init__(self) -> None:
        indices = np.array(self.indices)
        indices.setflags(write=False)
        object.__setattr__(self, "indices", indices)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """What tells members apart."""
        digest = hashlib.sha256(np.ascontiguousarray(self.indices, np.int64).tobytes()).digest()
        return self.path, self.axis, self.indices.shape, digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each with everything that it owns.

    Attributes:
      name: path and axis of the member that makes the units, unique among groups.
      members: what the group owns of each parameter axis.
      size: number of units.
      exact: whether the network without a unit computes what it computes with the unit's
        parameters set to zero.
      reason: if not, which operation makes the difference.
      kind: ``"units"``, or ``"block"`` for a part of the network that can be left out as a whole.
    """

    name: str
    members: tuple[Member, ...]
    size: int
    exact: bool = True
    reason: str = ""
    kind: str = "units"

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.members, self.size, self.exact, self.reason, self.kind))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        what = "a block" if self.kind == "block" else f"{self.size} units"
        exact = "" if self.exact else f", not exact: {self.reason}"
        lines = [f"{self.name}: {what}{exact}"]
        for member in self.members[:12]:
            each = member.indices.shape[1]
            if self.kind != "block":
                more = "" if each == 1 else f", {each} a unit"
                lines.append(f"  {member.path} axis {member.axis}{more}")
            elif each == 1:
                index = member.indices[0, 0]
                lines.append(f"  {member.path} axis {member.axis}, index {index}")
            else:
                lines.append(f"  {member.path}")
        left = len(self.members) - 12
        return "\n".join([*lines, f"  and {left} more"] if left > 0 else lines)


class Groups(tuple[Group, ...]):
    """The groups of a network, as ``find_groups`` and ``find_blocks`` give them.

    Attributes:
      frozen: for each parameter axis of which some index cannot be removed: path, axis, how many
        indices (0 stands for all of them), and the operation that is the reason.

    Example:
      >>> member = Member("hidden/kernel", 1, np.arange(3)[:, None])
      >>> print(Groups([Group("hidden/kernel:1", (member,), 3)]))
      hidden/kernel:1: 3 units
        hidden/kernel axis 1
    """

    frozen: tuple[tuple[str, int, int, str], ...]

    def __new__(cls, groups: Iterable[Group] = (), frozen: Iterable[Any] = ()) -> "Groups":
        """Make the tuple, with what is frozen beside it."""
        made = super().__new__(cls, groups)
        made.frozen = tuple(frozen)
        return made

    def __hash__(self) -> int:
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Groups) and super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __str__(self) -> str:
        frozen = [
            f"  {path} axis {axis}: {f'{n} indices, ' if n else ''}{why}"
            for path, axis, n, why in self.frozen
        ]
        groups = [str(group) for group in self] or ["no groups"]
        return "\n".join([*groups, *(["frozen:", *frozen] if frozen else [])])

    def __repr__(self) -> str:
        return f"Groups({', '.join(f'{group.name} x {group.size}' for group in self)})"

    def at(self, part: str | Params) -> "Groups":
        """Give the groups as an optimizer sees them that gets only a part of the whole tree.

        Members outside of the part are left out, and groups that have none left.

        Args:
          part: the prefix of a subtree, which is taken off the paths: ``groups.at("params")`` of
            flax variables. Or a tree with the same paths but fewer leaves:
            ``groups.at(nnx.state(model, nnx.Param))``, which leaves the statistics out.

        Raises:
          ValueError: no member is in that part.

        Example:
          >>> units = np.arange(3)[:, None]
          >>> members = Member("a/kernel", 1, units), Member("a/mean", 0, units)
          >>> groups = Groups([Group("a/kernel:1", members, 3)])
          >>> [member.path for member in groups.at({"a": {"kernel": jnp.ones((2, 3))}})[0].members]
          ['a/kernel']
        """
        start = f"{part.rstrip('/')}/" if isinstance(part, str) and part else ""
        leaves = None if isinstance(part, str) else {path for path, _ in leaves_with_path(part)}
        inside = lambda path: path.startswith(start) if leaves is None else path in leaves  # noqa: E731

        def strip(group: Group) -> Group:
            members = [
                dataclasses.replace(m, path=m.path.removeprefix(start))
                for m in group.members
                if inside(m.path)
            ]
            name = group.name.removeprefix(start)
            return dataclasses.replace(group, name=name, members=tuple(members))

        stripped = [strip(group) for group in self]
        frozen = [(p.removeprefix(start), *rest) for p, *rest in self.frozen if inside(p)]
        found = Groups([group for group in stripped if group.members], frozen)
        if self and not found:
            paths = sorted({m.path for group in self for m in group.members})
            where = f"{part!r}" if leaves is None else "a tree of " + list_paths(sorted(leaves), 6)
            raise ValueError(
                f"`groups.at({where})` finds no member below it. The paths are {list_paths(paths)}."
            )
        return found

    def cut(self, masks: Masks) -> "Groups":
        """Give the same groups in the small network that ``masks`` leave.

        Units that are gone are left out, indices are those in the small parameters.
        """
        kept = kept_indices(masks)
        return Groups([g for group in self for g in _shrunk(group, kept)], self.frozen)

    def keep(self, masks: Masks) -> dict[str, np.ndarray]:
        """Tell for each group which of its units are left: `[size]` bools by its name.

        Raises:
          ValueError: masks that remove an index of a group but not all that lives with it.
        """
        kept = kept_indices(masks)
        alive = {group.name: _alive(group, kept) for group in self}
        self._check(alive, kept)
        return alive

    def spread(self, masks: Masks, params: Params) -> Masks:
        """Carry masks of some members over to all others.

        Args:
          masks: masks of members, by the paths of ``params``; subtrees may be left out.
          params: the whole tree, such as params and running statistics.

        Returns:
          Masks like ``params``, None for what belongs to no group and has no mask.
        """
        given = leaves_by_path(masks, "groups.spread")
        paths = set(leaves_by_path(params, "groups.spread"))
        _check_known(given, paths)
        full = expand(self, self.keep(masks), params)
        return map_with_path(lambda path, w, mine: given.get(path, mine), params, full)

    def without(self, names: Iterable[str], params: Params) -> Masks:
        """Masks that remove the groups of the given names whole: blocks in an order of your own."""
        names = list(names)
        unknown = [name for name in names if name not in {group.name for group in self}]
        if unknown:
            raise ValueError(
                f"There is no group {list_paths(unknown)}; the names are "
                f"{list_paths([group.name for group in self])}."
            )
        keep = {group.name: np.full(group.size, group.name not in names) for group in self}
        return expand(self, keep, params)

    def isomorphic(self) -> dict[str, str]:
        """Name for each group the first group that has the same kind of members.

        Numbers in paths are left out of account, so that the layers of a stack are one class.
        """
        classes: dict[Any, str] = {}
        return {group.name: classes.setdefault(_shape_of(group), group.name) for group in self}

    def _check(
        self, alive: dict[str, np.ndarray], kept: dict[str, list[np.ndarray | None]]
    ) -> None:
        """Refuse masks that remove what no unit that is gone owns."""
        owned = _removed(self, alive)
        for group in self:
            for m in group.members if group.kind != "block" else ():  # may lose channels, too
                axes = kept.get(m.path)
                if axes is None or is_dropped(axes):
                    continue
                every, left = m.indices.ravel(), axes[m.axis]
                gone = np.isin(every, owned.get((m.path, m.axis), []))
                removed = np.zeros(every.shape, bool) if left is None else ~np.isin(every, left)
                wrong = every[removed & ~gone]
                if len(wrong):
                    raise ValueError(
                        f"The masks remove index {wrong[0]} of axis {m.axis} of {m.path!r}, which "
                        f"contradicts the rest of its group {group.name!r}: "
                        f"{list_paths(sorted({n.path for n in group.members}), 6)}. Make them with "
                        "`pattern=jp.patterns.Coupled(groups)`, or carry them over with "
                        "`groups.spread(masks, params)`."
                    )


def _removed(groups: Sequence[Group], alive: dict[str, Any]) -> dict[tuple[str, int], np.ndarray]:
    """Indices of each axis that go with units that are gone."""
    gone: dict[tuple[str, int], list[np.ndarray]] = {}
    for group in groups:
        dead = ~np.asarray(alive[group.name])
        for m in group.members if dead.any() else ():
            gone.setdefault((m.path, m.axis), []).append(m.indices[dead].ravel())
    return {place: np.concatenate(indices) for place, indices in gone.items()}


def _alive(group: Group, kept: Kept) -> np.ndarray:
    """A unit is gone where every index that it owns is gone from every member with a mask."""
    alive = np.zeros(group.size, bool)
    seen = False
    for m in group.members:
        axes = kept.get(m.path)
        if axes is None or (group.kind != "block" and is_dropped(axes)):
            continue
        seen = True
        indices = axes[m.axis]
        alive |= True if indices is None else np.isin(m.indices, indices).any(1)
    whole = not seen and any(m.path not in kept for m in group.members)
    return alive | whole


def _shrunk(group: Group, kept: Kept) -> list[Group]:
    alive = _alive(group, kept)
    members = []
    for m in group.members:
        axes = kept.get(m.path)
        if axes is not None and is_dropped(axes):
            continue
        left = None if axes is None else axes[m.axis]
        indices = m.indices[alive]
        if left is not None and indices.size:
            stay = np.isin(indices, left)  # another group may have taken some of each unit
            indices = np.searchsorted(left, indices[stay]).reshape(len(indices), -1)
        members.append(dataclasses.replace(m, indices=indices))
    size = int(alive.sum())
    return [dataclasses.replace(group, members=tuple(members), size=size)] * bool(size and members)


def is_dropped(axes: Sequence[np.ndarray | None]) -> bool:
    """True for a leaf of which nothing stays: it belongs to a block that is left out."""
    return any(indices is not None and len(indices) == 0 for indices in axes)


def _shape_of(group: Group) -> tuple[Any, ...]:
    """What a group looks like: members with the numbers taken out of their paths."""
    bare = [re.sub(r"\d+", "#", m.path) for m in group.members]
    sizes = [(m.axis, m.indices.shape[1]) for m in group.members]
    return group.kind, *zip(bare, sizes, strict=True)


def expand(groups: Sequence[Group], keep: dict[str, Any], like: Params) -> Masks:
    """Masks that keep the given units: an axis full where a group cuts it, 1 elsewhere.

    Works on traced ``keep``. Leaves without a member are None.
    """
    vectors: dict[tuple[str, int], jax.Array] = {}
    leaves = leaves_by_path(like, "Coupled")
    shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
    for group in groups:
        units = jnp.asarray(keep[group.name])
        for m in group.members:
            if m.path not in shapes:
                raise ValueError(
                    f"The group {group.name!r} has a member {m.path!r} that `params` lack; their "
                    f"paths are {list_paths(list(shapes))}. Use the groups of this tree: "
                    "`groups.at(params)`, or `groups.at(prefix)` for a subtree of flax variables."
                )
            size = shapes[m.path][m.axis] if m.axis < len(shapes[m.path]) else -1
            if size <= int(m.indices.max(initial=-1)):
                raise ValueError(
                    f"The group {group.name!r} owns index {m.indices.max()} of axis {m.axis} of "
                    f"{m.path!r}, but its shape is {shapes[m.path]}. Find the groups of these "
                    "params, or move groups along with `groups.cut(masks)`."
                )
            vector = _along_axis(units, m.indices, size)
            here = (m.path, m.axis)
            vectors[here] = vectors[here] & vector if here in vectors else vector

    def mask(path: str, _: Any) -> Any:
        rank = len(shapes[path])
        axes = [i for i in range(rank) if (path, i) in vectors]
        if not axes:
            return None
        parts = [
            jnp.expand_dims(vectors[path, i], [j for j in range(rank) if j != i]) for i in axes
        ]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole & part
        return whole

    return map_with_path(mask, like)


def _along_axis(units: jax.Array, indices: np.ndarray, size: int) -> jax.Array:
    """Say of each index of an axis whether all units that own it are kept."""
    order, each = indices.ravel(), indices.shape[1]
    if np.array_equal(order, np.arange(size)) and each == 1:
        return units
    if len(np.unique(order)) < len(order):  # an index may belong to two units of a group
        return jnp.ones(size, bool).at[order].min(jnp.repeat(units, each))
    owner = np.full(size, len(indices))  # what nobody owns stays
    owner[indices] = np.arange(len(indices))[:, None]
    return jnp.append(units, True)[owner]


def kept_indices(masks: Masks) -> Kept:
    """Read from each mask which indices of each axis stay; None for an axis that is not cut.

    Raises:
      ValueError: a mask removes single weights rather than whole indices of its axes.
    """
    check_living(masks)
    kept: Kept = {}
    for path, leaf in leaves_by_path(masks, "shrink").items():
        mask = np.asarray(leaf)
        if not mask.any():  # everything goes: a block that is dropped
            kept[path] = [np.arange(0)] * mask.ndim
            continue
        axes = [tuple(j for j in range(mask.ndim) if j != i) for i in range(mask.ndim)]
        vectors = [mask.any(axis=others) for others in axes]
        whole = np.ones(mask.shape, bool)
        for i, vector in enumerate(vectors):
            whole &= np.expand_dims(vector, axes[i])
        if not np.array_equal(whole, mask):
            raise ValueError(
                f"The mask of {path!r} removes {int(whole.sum() - mask.sum())} single weights of "
                "rows and columns that stay; only whole indices of an axis can be cut out. Find "
                "masks with `pattern=jp.patterns.Coupled(groups)`."
            )
        kept[path] = [None if v.all() else np.nonzero(v)[0] for v in vectors]
    return kept


def _check_known(given: dict[str, Any], paths: set[str]) -> None:
    unknown = [path for path in given if path not in paths]
    if unknown:
        raise ValueError(
            f"The masks name {list_paths(unknown)}, which the params lack; their paths are "
            f"{list_paths(sorted(paths))}. Nest the masks as the params are."
        )
