"""A group: which indices of which parameters live and die together, as plain data."""

import dataclasses
import hashlib
from functools import cached_property
from typing import TypeAlias

import numpy as np

Key: TypeAlias = tuple[str, int, int | None, tuple[int, ...], bytes]


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """What a group owns of one axis of one parameter.

    Attributes:
      path: path of the parameter.
      axis: axis of the parameter.
      indices: integers `[size, k]`: unit ``u`` of the group owns ``indices[u]`` of the axis.
      layer: axis of the parameter that counts layers, if units can be chosen in each of them.

    Example:
      >>> Member("hidden/kernel", 1, np.arange(6).reshape(3, 2)).indices[1]  # the second of 3 heads
      array([2, 3])
    """

    path: str
    axis: int
    indices: np.ndarray
    layer: int | None = None

    def __post_init__(self) -> None:
        indices = np.array(self.indices)
        indices.setflags(write=False)
        object.__setattr__(self, "indices", indices)

    @cached_property
    def key(self) -> Key:
        """What tells members apart: their indices by digest, since a large layer has many."""
        digest = hashlib.sha256(np.ascontiguousarray(self.indices, np.int64).tobytes()).digest()
        return self.path, self.axis, self.layer, self.indices.shape, digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Member) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclasses.dataclass(frozen=True)
class Group:
    """Units that can be removed one by one, each with everything that it owns.

    A hidden unit is a column of the kernel before it, an entry of a bias and a row of the kernel
    behind it. None of them can go alone, for the shapes would not fit any more: they are coupled.
    A group lists, for each axis that such units cut, which indices the unit ``u`` owns. Here three
    hidden units between ``a`` and ``b``; in a convolution, that is flattened to 2x2 pixels before
    ``b``, each would own four rows of ``b``.

    Where a scan runs along the leading axis of stacked layers, each layer has all of the units, and
    mostly they mean something else in each. If nothing in the program tells one unit from another,
    and all members are in the stack, then each layer may keep other units, as many as the others:
    ``layers`` says of how many. ``Coupled`` does so where it is given a layout.

    An index may be owned in two groups, a column of fused heads by its head and by its place in the
    head, and goes with either owner.

    Attributes:
      name: path and axis of the member that makes the units, unique among groups.
      members: what the group owns of each parameter axis.
      size: number of units.
      exact: whether the network without a unit computes what it computes with the unit's
        parameters set to zero.
      reason: if not, which operation makes the difference.
      kind: ``"units"``, or ``"block"`` for a part of the network that can be left out as a whole.
      layers: how many layers may keep units of their own; 0 where all have to keep the same.

    Example:
      >>> units = np.arange(3)[:, None]
      >>> members = Member("a", 1, units), Member("bias", 0, units), Member("b", 0, units)
      >>> print(Group("a:1", members, 3))
      a:1: 3 units
        a axis 1
        bias axis 0
        b axis 0
    """

    name: str
    members: tuple[Member, ...]
    size: int
    exact: bool = True
    reason: str = ""
    kind: str = "units"
    layers: int = 0

    @cached_property
    def _hash(self) -> int:
        said = (self.exact, self.reason, self.kind, self.layers)
        return hash((self.name, self.members, self.size, *said))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        what = "a block" if self.kind == "block" else f"{self.size} units"
        what += f" in each of {self.layers} layers" if self.layers else ""
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
