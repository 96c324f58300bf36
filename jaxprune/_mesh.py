"""Where arrays lie on a mesh: masks with their weights, and explicit axes let go to rank."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune._tree import map_leaves
from jaxprune.typing import Leaf, Masks, Tree


def in_auto_mode(f: Callable[..., Any], *args: Tree, like: Tree) -> Tree:
    """Call ``f`` with automatic mesh axes in the place of explicit ones.

    Ranking reshapes, gathers and compares arrays of different shardings, which explicit axes
    refuse. Where there are none this is ``f(*args)``.

    Args:
      f: gives a tree like ``like``, of arrays that broadcast over its leaves.
      *args: trees of arrays.
      like: arrays that say how the result is sharded.
    """
    if not is_explicit(like):
        return f(*args)
    shapes = jax.eval_shape(f, *shapes_of(args))
    out = map_leaves(lambda shape, x: _sharding(shape.shape, x), shapes, like)
    return jax.sharding.auto_axes(f, out_sharding=out)(*args)


def reshard_like(masks: Masks, like: Tree) -> Masks:
    """Shard masks as the arrays they belong to, which explicit mesh axes ask for.

    A mask of size 1 along an axis is not sharded there: `[1, 300]` beside `[784@x, 300@y]` gets
    `[1, 300@y]`.
    """
    if not is_explicit(like):
        return masks

    def reshard(x: Leaf, mask: Leaf) -> Leaf:
        if mask is None:
            return None
        layout = _sharding(mask.shape, x)
        if isinstance(mask, jax.core.Tracer) or isinstance(x, jax.core.Tracer):
            return jax.sharding.reshard(mask, layout)
        mesh = x.sharding.mesh  # the devices themselves: nobody has to have called `set_mesh`
        return jax.device_put(mask, NamedSharding(mesh, layout.spec))

    return map_leaves(reshard, like, masks)


def shapes_of(tree: Tree) -> Tree:
    """The shapes of arrays without their shardings: for ``jax.eval_shape``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@functools.partial(jax.jit, static_argnames="shape")
def all_true(param: jax.Array, shape: tuple[int, ...] | None = None) -> jax.Array:
    """Make an array that is all True and lies where a parameter does.

    Made from values, though they do not matter: inside of jit a constant lies on one device.

    Args:
      param: floating.
      shape: that of ``param``, or with some axes of size 1.
    """
    axes = tuple(i for i, n in enumerate(shape or ()) if n != param.shape[i])
    true = jnp.isnan(param) | ~jnp.isnan(param)
    return true.all(axis=axes, keepdims=True) if axes else true


def even_shards(x: jax.Array, size: int, axis: int) -> jax.Array:
    """Gather an axis where its shards on an explicit axis are no multiple of ``size``."""
    if not is_explicit(x):
        return x
    known = jax.typeof(x).sharding
    sizes = dict(zip(known.mesh.axis_names, known.mesh.axis_sizes, strict=True))
    parts = math.prod(sizes[name] for name in names_of(known.spec[axis]))
    if x.shape[axis] % (parts * size) == 0:
        return x
    spec = list(known.spec)
    spec[axis] = None
    return jax.sharding.reshard(x, NamedSharding(known.mesh, PartitionSpec(*spec)))


def sharding_for(sharding: Any, shape: Sequence[int]) -> Any:
    """The same layout for another shape: mesh axes that do not divide an axis are left out."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    sizes = dict(sharding.mesh.shape)

    def divides(n: int, entry: Any) -> bool:
        free = entry is PartitionSpec.UNCONSTRAINED
        return free or n % math.prod(sizes[name] for name in names_of(entry)) == 0

    entries = zip(shape, sharding.spec, strict=False)
    spec = PartitionSpec(*(entry if divides(n, entry) else None for n, entry in entries))
    return NamedSharding(sharding.mesh, spec)


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def is_explicit(tree: Tree) -> bool:
    """True if an array of the tree has a type with explicit mesh axes."""
    return any(
        isinstance(x, jax.Array) and jax.typeof(x).sharding.mesh.explicit_axes
        for x in jax.tree.leaves(tree)
    )


def _sharding(shape: tuple[int, ...], like: jax.Array) -> NamedSharding:
    """Shard the axes that are as long as those of ``like`` in the same way, and no others."""
    known = jax.typeof(like).sharding
    axes = zip(shape, like.shape, known.spec, strict=True)
    return NamedSharding(known.mesh, PartitionSpec(*(s if n == m else None for n, m, s in axes)))
