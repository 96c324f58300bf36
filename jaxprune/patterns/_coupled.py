"""Coupled channels, heads and layers: whole groups of parameter slices."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._errors import check_sparsity
from jaxprune._group import Group
from jaxprune._groups import Groups
from jaxprune._layout import Layout
from jaxprune._ranking import keep_largest
from jaxprune._tree import leaves_by_path, list_paths, wide
from jaxprune._units import check_layers, expand
from jaxprune._use import Entry, Use
from jaxprune._where import compile_regex, refuses
from jaxprune.patterns._reduce import check_reduce
from jaxprune.typing import Masks, Params, Scores, Sparsity, Units, Where


@dataclasses.dataclass(frozen=True)
class Coupled:
    """Slices of several parameters that ``find_groups`` found coupled live or die together.

    A unit is one channel, head or block with everything that it owns: weights on both sides,
    biases, norm scales, running statistics. So all members of a group are masked, whatever
    ``is_matrix`` says of them; an explicit ``where`` that refuses a member protects its group. The
    last unit of a group never goes: a group keeps one more than the sparsity says if it has to.

    With a layout each layer of a stack chooses for itself, in groups whose ``layers`` say that it
    can: its units are `[layers, size]`, and all layers keep as many.

    Attributes:
      groups: what is coupled, as ``find_groups`` or ``find_blocks`` gives it.
      reduce: how a unit is scored from its weights: ``"mean"``, ``"sum"`` or ``"norm"``.
      round_to: groups keep a multiple of so many units, or all that they have; for friendly widths.
      max_sparsity: no group loses a larger fraction of its units.
      normalize: divide the scores of a group by their mean, so that groups compare as equals; in
        each layer that chooses for itself.
      per_layer: names of the groups that each layer chooses for itself, which ``bind`` finds out.

    Raises:
      TypeError: ``groups`` are no groups, or ``round_to`` is no integer.
      ValueError: there are no groups, ``reduce`` is unknown, ``round_to`` is below 1 or
        ``max_sparsity`` outside [0, 1]; when used, params that the groups do not belong to.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.array([[1.0, 3.0, 2.0]]), "v": jnp.ones((3, 1))}
      >>> groups = jp.find_groups(mlp, params, jnp.ones((1, 1)))
      >>> jp.find_masks(params, 0.3, pattern=Coupled(groups))
      {'v': Array([[False],
             [ True],
             [ True]], dtype=bool), 'w': Array([[False,  True,  True]], dtype=bool)}
    """

    groups: Groups
    reduce: str = "mean"
    round_to: int = 1
    max_sparsity: float = 1.0
    normalize: bool = False
    per_layer: tuple[str, ...] = ()
    neighbours: ClassVar[bool] = False

    def __post_init__(self) -> None:
        groups = self.groups
        if not isinstance(groups, tuple | list) or not all(isinstance(g, Group) for g in groups):
            raise TypeError(
                f"`Coupled(groups={groups!r})` needs groups. Find them with "
                "`jp.find_groups(fn, params, *inputs)`."
            )
        object.__setattr__(self, "groups", Groups(groups, getattr(groups, "frozen", ())))
        if not groups:
            raise ValueError(
                "`Coupled` got no groups, so that nothing could be removed. Print what "
                "`jp.find_groups` gives: it says what is frozen, and by which operation."
            )
        check_reduce(self.reduce, "Coupled")
        if not isinstance(self.round_to, int) or isinstance(self.round_to, bool):
            raise TypeError(f"`Coupled(round_to={self.round_to!r})` needs an integer, such as 8.")
        if self.round_to < 1:
            raise ValueError(f"`Coupled(round_to={self.round_to})` is below 1. Use 8, or 1.")
        stacks = {group.name for group in self.groups if group.layers}
        if unknown := [name for name in self.per_layer if name not in stacks]:
            raise ValueError(
                f"`Coupled(per_layer=...)` names {list_paths(unknown, 6)}, which layers cannot "
                f"choose for themselves; those that can are {list_paths(sorted(stacks), 6)}. Pass "
                "a layout instead, which finds them."
            )
        if not 0 <= self.max_sparsity <= 1:
            raise ValueError(
                f"`Coupled(max_sparsity={self.max_sparsity})` is outside [0, 1]. It is the largest "
                "fraction that a group may lose: 0.9 keeps a tenth."
            )

    def pool(self, scores: Scores) -> Units:
        """Score each unit over all its members: by name `[size]`, or `[layers, size]`."""
        leaves = leaves_by_path(scores, "Coupled")
        return {group.name: self._pool(group, leaves) for group in self.groups}

    def bind(self, params: Params, *, where: Where, layout: Layout | None = None) -> "Coupled":
        """Keep the groups that may go: those of which ``where`` refuses no member.

        The default ``where`` lets all of them go, biases and scales too. With a layout, settled on
        the params, layers choose for themselves where it and the groups say that they can.
        """
        leaves = leaves_by_path(params, "Coupled")
        for group in self.groups:
            missing = [m.path for m in group.members if m.path not in leaves]
            if missing:
                raise ValueError(
                    f"The params have nothing at {list_paths(missing)}, which the group "
                    f"{group.name!r} owns a part of; their paths are {list_paths(list(leaves))}. "
                    "Use the groups of these params: `groups.at(params)`, or `groups.at(prefix)` "
                    "for a subtree of flax variables."
                )
        free = [
            group
            for group in self.groups
            if not any(refuses(where, m.path, leaves[m.path]) for m in group.members)
        ]
        if not free:
            raise ValueError(
                f"`where` refuses a member of each of the {len(self.groups)} groups, so that "
                "nothing could be removed. Let it take all members of a group, biases and scales "
                "too."
            )
        shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in leaves.items()}
        stacks = tuple(group.name for group in free if _in_layers(group, shapes, layout))
        return dataclasses.replace(self, groups=Groups(free, self.groups.frozen), per_layer=stacks)

    @property
    def units_layout(self) -> Layout | None:
        """What the axes of the units mean, of groups that layers choose; None without any."""
        if not self.per_layer:
            return None
        entries = []
        for group in self.groups:
            stack = self._stack(group)
            use = Use("unknown", (*stack, None), (*[""] * len(stack), "it counts units"))
            shape = (group.layers, group.size) if stack else (group.size,)
            entries.append(Entry(group.name, (use,), shape=shape))
        return Layout(tuple(entries))

    def settle(self, units: Units, keep: Units, alive: Units) -> Units:
        """Let each group keep as many units as it needs, the best of those alive.

        A group keeps its last unit, ``max_sparsity`` and a multiple of ``round_to``. What the
        scope kept is a number for each group; which units make up that number is ranked again. Of
        layers that choose for themselves the largest number counts for all.

        Args:
          units: scores by group, `[units]` or `[layers, units]` each.
          keep: bools like ``units``.
          alive: bools like ``units``, or None where all are.

        Returns:
          Bools like ``units``.
        """
        names = sorted(units)
        groups = {group.name: group for group in self.groups}
        living = [None if alive is None else alive[name] for name in names]
        counts = []
        for name, here in zip(names, living, strict=True):
            kept = jnp.max(jnp.sum(keep[name], axis=-1, dtype=jnp.int32))
            wanted = jnp.maximum(kept, self.least(groups[name]))
            rounded = -(-wanted // self.round_to) * self.round_to
            n = units[name].shape[-1]
            most = n if here is None else jnp.min(jnp.sum(here, axis=-1, dtype=jnp.int32))
            count = jnp.minimum(rounded, most)
            # A count of the rank of the units lets each layer compete alone.
            layers = units[name].shape[:-1]
            counts.append(jnp.broadcast_to(count, (*layers, 1)) if layers else count)
        each = tuple((i,) for i in range(len(names)))
        best = keep_largest([units[name] for name in names], counts, each, living)
        return dict(zip(names, best, strict=True))

    def expand(self, keep: Units, *, like: Params) -> Masks:
        """Masks that keep the given units; None for leaves that belong to no group."""
        return expand(self.groups, keep, like)

    def share(self, rules: Mapping[str, float], *, default: float = 0.0) -> dict[str, float]:
        """Give groups their sparsity by rules over their names, in the place of one number.

        Args:
          rules: from regex (matching the whole name) to sparsity; the first that matches counts.
          default: sparsity of the groups that no rule matches.

        Returns:
          A sparsity for each group by name: for ``find_masks``, or as what a schedule ends with.

        Raises:
          ValueError: a sparsity is outside [0, 1], or a regex matches no group.
        """
        check_sparsity(dict(rules), "share", layers=False)
        check_sparsity(default, "share(default)")
        compiled = {regex: compile_regex(regex, "share") for regex in rules}
        names = [group.name for group in self.groups]
        unused = [r for r, regex in compiled.items() if not any(map(regex.fullmatch, names))]
        if unused:
            raise ValueError(
                f"`share` got {list_paths(unused)}, which matches no group (a regex has to match "
                f"the whole name). The groups are {list_paths(names)}."
            )
        first = lambda name: (rules[r] for r, regex in compiled.items() if regex.fullmatch(name))  # noqa: E731
        return {name: next(first(name), default) for name in names}

    def of_units(self, sparsity: Sparsity) -> dict[str, Any]:
        """The sparsity of each group out of a tree by the names of groups."""
        missing = [
            g.name for g in self.groups if not isinstance(sparsity, dict) or g.name not in sparsity
        ]
        if missing:
            raise ValueError(
                "`Coupled` ranks units that own parts of many leaves, but got a tree of sparsities "
                f"with nothing for the groups {list_paths(missing)}. Pass one number, or one for "
                "each group by its name: `jp.patterns.Coupled(groups).share({regex: sparsity})`; "
                "`max_sparsity` bounds what a group may lose."
            )
        uneven = [name for name in self.per_layer if jnp.ndim(sparsity[name])]
        if uneven:
            raise ValueError(
                f"`Coupled` got a sparsity for each layer of {list_paths(uneven, 6)}, but all "
                "layers of a stack have one width. Pass one number for the group."
            )
        return {group.name: sparsity[group.name] for group in self.groups}

    def owns(self, path: str, array: Any) -> bool:
        """Say whether a leaf is a member of a group: a ``where`` for ``hold`` and the like."""
        del array
        return path in self._paths

    @functools.cached_property
    def _paths(self) -> frozenset[str]:
        return frozenset(member.path for group in self.groups for member in group.members)

    def least(self, group: Group) -> int:
        """How many units a group keeps at any sparsity."""
        allowed = math.ceil(round((1 - self.max_sparsity) * group.size, 9))
        return max(allowed, 0 if group.kind == "block" else 1)

    def _stack(self, group: Group) -> tuple[str, ...]:
        """The roles of the axes that the units of a group have before their own."""
        return ("layer",) if group.name in self.per_layer else ()

    def _pool(self, group: Group, leaves: dict[str, jax.Array]) -> jax.Array:
        stack = self._stack(group)
        total, n = jnp.zeros((*[group.layers] * len(stack), group.size), jnp.float32), 0
        for m in group.members:
            if m.path not in leaves:
                raise ValueError(
                    f"There are no scores at {m.path!r}, a member of the group {group.name!r}. "
                    "Score all members, or use the groups of this tree: `groups.at(params)`, or "
                    "`groups.at(prefix)` for a subtree of flax variables."
                )
            s = wide(leaves[m.path])
            s = s * s if self.reduce == "norm" else s
            held = (m.axis,) if not stack else (m.layer, m.axis)
            others = tuple(i for i in range(s.ndim) if i not in held)
            each = jnp.sum(s, axis=others)
            if stack and m.layer is not None and m.layer > m.axis:
                each = each.T
            if np.array_equal(m.indices.ravel(), np.arange(each.shape[-1])):  # no gather
                each = each.reshape(*each.shape[:-1], *m.indices.shape)
            else:
                each = each[..., m.indices]
            total = total + jnp.sum(each, axis=-1)
            n += m.indices.shape[1] * math.prod(s.shape[i] for i in others)
        if self.reduce == "mean":
            total = total / n
        elif self.reduce == "norm":
            total = jnp.sqrt(total)
        if self.normalize:
            mean = jnp.mean(jnp.abs(total), axis=-1, keepdims=True)
            total = total / jnp.maximum(mean, jnp.finfo(total.dtype).tiny)
        return total


def _in_layers(group: Group, shapes: Mapping[str, tuple[int, ...]], layout: Layout | None) -> bool:
    """Say whether each layer chooses for itself: groups and layout name the same axes for it.

    The groups know it of all members; the layout has to know it of one, and say nothing of others.
    """
    if layout is None or not group.layers:
        return False
    check_layers(group, shapes)
    roles = [(m, layout.roles(m.path, len(shapes[m.path]))) for m in group.members]
    told = [(m, r) for m, r in roles if any(r)]
    layers = [[i for i, role in enumerate(r) if role == "layer"] == [m.layer] for m, r in told]
    return bool(layers) and all(layers)
