"""Where arrays lie on a mesh: masks with their weights, and explicit axes let go to rank."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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


def plain_axes(x: Leaf) -> Leaf:
    """The same array on a mesh whose axes are left to the compiler; its shards stay where they are.

    What is computed of it then needs no word on how results are sharded.
    """
    if isinstance(x, jax.core.Tracer) or not is_explicit(x):
        return x
    return jax.device_put(x, NamedSharding(_auto(x.sharding.mesh), x.sharding.spec))


@contextlib.contextmanager
def plain_mesh() -> Iterator[None]:
    """Leave the axes of a mesh that somebody has set to the compiler, as ``plain_axes`` does."""
    mesh = jax.sharding.get_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        yield
        return
    with jax.set_mesh(_auto(mesh)):
        yield


def on_its_mesh(x: Leaf) -> contextlib.AbstractContextManager[Any]:
    """Set the mesh of an array whose axes are explicit, as its operations ask for."""
    return jax.set_mesh(x.sharding.mesh) if is_explicit(x) else contextlib.nullcontext()


def _auto(mesh: Mesh) -> Mesh:
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def laid_as(x: jax.Array, like: Leaf) -> jax.Array:
    """Shard an array as another one of its shape is.

    One that is nowhere in particular stays so: it may meet what lies on any devices.
    """
    sharding = getattr(like, "sharding", None)
    if sharding is None or isinstance(x, jax.core.Tracer) or x.sharding == sharding:
        return x
    if not like.committed:
        return jnp.asarray(jax.device_get(x))
    return jax.device_put(x, sharding)


def over_last_axis(x: jax.Array) -> jax.Array:
    """Shard an array along its last axis alone, over all devices that it is sharded over.

    Each device then has whole columns of a matrix. Shards change places for it, and nothing is
    gathered; an axis that cannot be divided evenly leaves the array as it is.
    """
    sharding = getattr(x, "sharding", None)
    if isinstance(x, jax.core.Tracer) or not isinstance(sharding, NamedSharding):
        return x
    names = [name for entry in sharding.spec for name in names_of(entry)]
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    if devices == 1 or x.shape[-1] % devices:
        return x
    spec = PartitionSpec(*[None] * (x.ndim - 1), tuple(names))
    return jax.device_put(x, NamedSharding(sharding.mesh, spec))


def _sharding(shape: tuple[int, ...], like: jax.Array) -> NamedSharding:
    """Shard the axes that are as long as those of ``like`` in the same way, and no others."""
    known = jax.typeof(like).sharding
    axes = zip(shape, like.shape, known.spec, strict=True)
    return NamedSharding(known.mesh, PartitionSpec(*(s if n == m else None for n, m, s in axes)))
