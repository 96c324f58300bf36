"""Shards of a leaf on several devices: what a ranking inside of shard_map has to know."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxprune._mesh import names_of
from jaxprune._ranking._lazy import is_lazy, named_leaves, stored

MOST_PLACES = 2**32 - 1  # that a uint32 numbers

AxisName: TypeAlias = str | tuple[str, ...]  # of a mesh, of pmap or of vmap


@dataclasses.dataclass(frozen=True)
class Shard:
    """How a leaf is sharded over the mesh axes that a ranking goes over; as it stands, not at all.

    Attributes:
      names: mesh axes; devices along them hold different shards of the leaf.
      dims: for each axis of the leaf the mesh axes that shard it. None if nobody said: then one
        shard counts as coming after the other.
      first: axes whose index comes before all others in the order of the units: those of layers,
        each of which comes whole before the next wherever its axis is.
    """

    names: tuple[str, ...] = ()
    dims: tuple[tuple[str, ...], ...] | None = None
    first: tuple[int, ...] = ()

    def order(self, axes: Sequence[int]) -> list[int]:
        """Some axes in the order in which they count, the outermost first."""
        return sorted(axes, key=lambda i: (i not in self.first, i))

    def whole(self, leaf: Any) -> int:
        """Count the units of the whole leaf."""
        return int(leaf.size * _devices(self.names))

    def slabs(self, shape: Sequence[int], axes: Sequence[int]) -> list[int]:
        """The first of some axes, so many that a uint32 numbers the units inside of each slab."""
        whole, axes = self._whole(shape), list(axes)
        inside = 1
        while axes and inside * whole[axes[-1]] <= MOST_PLACES:
            inside *= whole[axes.pop()]
        return axes

    def sizes(self, shape: Sequence[int], axes: Sequence[int]) -> tuple[int, int]:
        """How many slabs the whole leaf has along some axes of its shards, and units in each."""
        whole, slabs = self._whole(shape), self.slabs(shape, axes)
        apart = 1 if self.dims is not None else _devices(self.names)
        inside = math.prod(whole[i] for i in axes if i not in slabs)
        return apart * math.prod(whole[i] for i in slabs), inside

    def count_down(self, number: jax.Array, axes: Sequence[int], *, apart: bool) -> jax.Array:
        """Take from each unit's number its position, along some axes, in the whole leaf.

        One axis after another: their sum, which is the same in every round of a search, XLA would
        compute once and keep, four bytes a unit.

        Args:
          number: uint32, as the shard is.
          axes: the others do not count.
          apart: also number shards one after another where nobody said how they lie.

        Returns:
          uint32, as the shard is.
        """
        shape, stride = number.shape, 1
        whole = self._whole(shape)
        for axis in reversed(axes):
            first = _index(self.dims[axis] if self.dims else ()) * np.uint32(shape[axis])
            number -= lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(stride)
            number -= first * np.uint32(stride)
            stride *= whole[axis]
        if apart and self.dims is None:
            number -= _index(self.names) * np.uint32(stride)
        return number

    def _whole(self, shape: Sequence[int]) -> list[int]:
        dims = self.dims or ((),) * len(shape)
        return [n * _devices(names) for n, names in zip(shape, dims, strict=True)]


def shards(
    units: Any, axis_name: AxisName | None = None, specs: Any = None, *, user: str
) -> list[Shard]:
    """Say for each leaf how it is sharded over ``axis_name``."""
    if axis_name is None:
        if specs is not None:
            raise ValueError(
                f"`{user}` got specs without an `axis_name`. Pass `axis_name=`, the mesh axes to "
                "rank over, as well."
            )
        return [Shard()] * len(jax.tree.leaves(units, is_leaf=is_lazy))
    leaves = [(slot.path, slot.leaf) for slot in named_leaves(units)]
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    _check_names(names, user)
    if specs is None:
        return [Shard(_varying(stored(leaf), names)) for _, leaf in leaves]
    given = _specs(units, specs, user)
    return [
        _shard(path, leaf, spec, names, user)
        for (path, leaf), spec in zip(leaves, given, strict=True)
    ]


def _shard(path: str, leaf: Any, spec: Any, names: tuple[str, ...], user: str) -> Shard:
    if not isinstance(spec, PartitionSpec) or len(spec) > leaf.ndim:
        raise ValueError(
            f"`{user}` got {spec!r} as the spec of {path!r}, whose part has shape {leaf.shape}. "
            "Pass what `in_specs` has for it: a PartitionSpec with at most one entry for each axis."
        )
    entries = [*spec, *[None] * (leaf.ndim - len(spec))]
    dims = tuple(tuple(name for name in names_of(entry) if name in names) for entry in entries)
    return Shard(tuple(name for dim in dims for name in dim), dims)


def _specs(units: Any, specs: Any, user: str) -> list[Any]:
    try:
        one_each = jax.tree.map(lambda _: 0, units, is_leaf=is_lazy)
        return jax.tree.leaves(jax.tree.broadcast(specs, one_each))
    except ValueError as error:
        raise ValueError(
            f"`{user}` got specs that are no tree like the units: {error}. Pass one PartitionSpec "
            "for all, or a tree of them like the params."
        ) from error


def _check_names(names: tuple[str, ...], user: str) -> None:
    for name in names:
        try:
            lax.axis_size(name)
        except NameError as error:
            raise ValueError(
                f"`{user}` got axis_name={name!r}, which names no axis here. It is for the inside "
                "of `jax.shard_map` or `pmap`; arrays that jit sees whole need none."
            ) from error


def _varying(leaf: Any, names: tuple[str, ...]) -> tuple[str, ...]:
    """The axes over which a leaf differs as far as jax knows, else all of them."""
    if not _varies_over(lax.axis_index(names)):  # nobody keeps track: check_vma=False, pmap, vmap
        return names
    over = _varies_over(leaf)
    return tuple(name for name in names if name in over)


def _varies_over(x: Any) -> frozenset[str]:
    """What `check_vma=True` knows of a value."""
    kind: Any = jax.typeof(x)
    known = getattr(kind, "manual_axis_type", None)  # from jax 0.10 on
    return frozenset(getattr(kind, "vma", ()) if known is None else known.varying)


def _devices(names: tuple[str, ...]) -> int:
    return math.prod(int(lax.axis_size(name)) for name in names)


def _index(names: tuple[str, ...]) -> Any:
    return lax.axis_index(names).astype(jnp.uint32) if names else np.uint32(0)
