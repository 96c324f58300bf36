"""All groups of a network: printed, seen from a part of it, moved along when it is cut."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np

from jaxprune._group import Group
from jaxprune._html import Bar, lines, table
from jaxprune._kept import check_known, kept_by, layers_in, name_part, path_in
from jaxprune._tree import leaves_by_path, list_paths, map_with_path
from jaxprune._units import expand, left_by_layer, shrunk
from jaxprune.typing import Masks, Params

Frozen: TypeAlias = tuple[str, int, int, str]  # path, axis, how many indices, why
# What kind of members a group has: of each its path without numbers, its axis, indices of a unit.
Kind: TypeAlias = tuple[str, tuple[tuple[str, tuple[int, int]], ...]]


class Groups(tuple[Group, ...]):
    """The groups of a network, as ``find_groups`` and ``find_blocks`` give them.

    Attributes:
      frozen: for each parameter axis of which some index cannot be removed: path, axis, how many
        indices (0 stands for all of them), and the operation that is the reason.

    Example:
      >>> import jaxprune as jp
      >>> member = jp.Member("hidden/kernel", 1, np.arange(3)[:, None])
      >>> print(Groups([Group("hidden/kernel:1", (member,), 3)]))
      hidden/kernel:1: 3 units
        hidden/kernel axis 1
    """

    frozen: tuple[Frozen, ...]

    def __new__(cls, groups: Iterable[Group] = (), frozen: Iterable[Frozen] = ()) -> "Groups":
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
        groups = [str(group) for group in self] or ["no groups"]
        frozen = [f"  {line}" for line in self._frozen]
        return "\n".join([*groups, *(["frozen:", *frozen] if frozen else [])])

    @property
    def _frozen(self) -> list[str]:
        return [
            f"{path} axis {axis}: {f'{n} indices, ' if n else ''}{why}"
            for path, axis, n, why in self.frozen
        ]

    def _repr_html_(self) -> str:
        """Draw the groups in notebooks, with a bar for how many units each has."""
        most = max((group.size for group in self), default=1)
        rows = []
        for group in self:
            head, *members = str(group).split("\n")
            what = head.removeprefix(f"{group.name}: ")
            rows.append(
                (
                    group.name,
                    Bar(group.size / most),
                    what,
                    "\n".join(line.strip() for line in members),
                )
            )
        drawn = table(("group", "units", "", "owns"), rows, left=range(4)) if rows else "no groups"
        frozen = f"<details><summary>frozen</summary>{lines(self._frozen)}</details>"
        return drawn + frozen * bool(self.frozen)

    def __repr__(self) -> str:
        return f"Groups({', '.join(f'{group.name} x {group.size}' for group in self)})"

    @property
    def stacked(self) -> dict[str, int]:
        """The axis that counts layers, of the members of groups that may be chosen in each."""
        members = (m for group in self for m in group.members)
        return {m.path: m.layer for m in members if m.layer is not None}

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
          >>> import jax.numpy as jnp
          >>> import jaxprune as jp
          >>> units = np.arange(3)[:, None]
          >>> members = jp.Member("a/kernel", 1, units), jp.Member("a/mean", 0, units)
          >>> groups = Groups([Group("a/kernel:1", members, 3)])
          >>> [member.path for member in groups.at({"a": {"kernel": jnp.ones((2, 3))}})[0].members]
          ['a/kernel']
        """
        inside = path_in(part)
        found = Groups(
            [inner for group in self for inner in _inside(group, inside)],
            [(path, i, n, why) for p, i, n, why in self.frozen if (path := inside(p)) is not None],
        )
        if self and not found:
            paths = sorted({m.path for group in self for m in group.members})
            raise ValueError(
                f"`groups.at({name_part(part)})` finds no member below it. The paths are "
                f"{list_paths(paths)}."
            )
        return found

    def cut(self, masks: Masks) -> "Groups":
        """Give the same groups in the small network that ``masks`` leave.

        Units that are gone are left out, indices are those in the small parameters.
        """
        kept = kept_by(masks, layers=self.stacked)
        if layers_in(kept) > 1:
            left_by_layer(self, kept)  # refuses what contradicts the groups
        return Groups([g for group in self for g in shrunk(group, kept)], self.frozen)

    def keep(self, masks: Masks) -> dict[str, np.ndarray]:
        """Tell for each group which of its units are left: `[size]` bools by its name.

        Where layers of a stack keep units of their own they are `[layers, size]`, none of a layer
        that is gone.

        Raises:
          ValueError: masks that remove an index of a group but not all that lives with it, or that
            keep other units in each layer of a group that cannot be chosen so.
        """
        return left_by_layer(self, kept_by(masks, layers=self.stacked))

    def complete(self, masks: Masks, params: Params) -> Masks:
        """Carry masks of some members over to all others.

        Args:
          masks: masks of members, by the paths of ``params``; subtrees may be left out.
          params: the whole tree, such as params and running statistics.

        Returns:
          Masks like ``params``, None for what belongs to no group and has no mask.

        Raises:
          ValueError: masks of paths that ``params`` lack, or that contradict a group.

        Example:
          >>> import jax.numpy as jnp
          >>> import jaxprune as jp
          >>> units = np.arange(3)[:, None]
          >>> members = jp.Member("a", 1, units), jp.Member("b", 0, units)
          >>> groups = Groups([Group("a:1", members, 3)])
          >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
          >>> groups.complete({"a": jnp.array([[True, False, True]])}, params)["b"]
          Array([ True, False,  True], dtype=bool)
        """
        given = leaves_by_path(masks, "groups.complete")
        check_known(given, leaves_by_path(params, "groups.complete"))
        full = expand(self, self.keep(masks), params)
        return map_with_path(lambda path, w, mine: given.get(path, mine), params, full)

    def spread(self, masks: Masks, params: Params) -> Masks:
        """Carry masks over, as ``complete`` does: its old name, deprecated in 0.2."""
        warnings.warn(
            "`groups.spread` is called `groups.complete` and goes with 0.3: write that instead.",
            DeprecationWarning,
            stacklevel=2,
        )
        return self.complete(masks, params)

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
        classes: dict[Kind, str] = {}
        return {group.name: classes.setdefault(_shape_of(group), group.name) for group in self}


def _inside(group: Group, inside: Callable[[str], str | None]) -> list[Group]:
    """The group with the members that lie in a part of the tree; none if there are none."""
    renamed = [(m, inside(m.path)) for m in group.members]
    members = tuple(dataclasses.replace(m, path=path) for m, path in renamed if path is not None)
    name = inside(group.name) or group.name
    return [dataclasses.replace(group, name=name, members=members)] * bool(members)


def _shape_of(group: Group) -> Kind:
    """What a group looks like: members with the numbers taken out of their paths."""
    bare = [re.sub(r"\d+", "#", m.path) for m in group.members]
    sizes = [(m.axis, m.indices.shape[1]) for m in group.members]
    return group.kind, tuple(zip(bare, sizes, strict=True))
