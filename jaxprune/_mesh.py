"""Explicit mesh axes: left to jit while units are ranked, and put back on what comes out."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune._tree import map_leaves


def in_auto_mode(f: Callable[..., Any], *args: Any, like: Any) -> Any:
    """Call ``f`` with automatic mesh axes in the place of explicit ones.

    Ranking reshapes, gathers and compares arrays that are cut in different ways, which explicit
    axes refuse. Where there are none this is ``f(*args)``.

    Args:
      f: gives a tree like ``like``, of arrays that broadcast over its leaves.
      *args: trees of arrays.
      like: arrays that say how the axes of the result are cut.
    """
    if not is_explicit(like):
        return f(*args)
    shapes = jax.eval_shape(f, *bare(args))
    out = map_leaves(lambda shape, x: _sharding(shape.shape, x), shapes, like)
    return jax.sharding.auto_axes(f, out_sharding=out)(*args)


def lay_out(masks: Any, like: Any) -> Any:
    """Cut masks as the arrays they belong to, which explicit mesh axes ask for."""
    if not is_explicit(like):
        return masks

    def cut(x: Any, mask: Any) -> Any:
        return None if mask is None else jax.sharding.reshard(mask, _sharding(mask.shape, x))

    return map_leaves(cut, like, masks)


def bare(tree: Any) -> Any:
    """The shapes of arrays without how they are cut: for ``jax.eval_shape``."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def is_explicit(tree: Any) -> bool:
    """True if an array of the tree has a type with explicit mesh axes."""
    return any(
        isinstance(x, jax.Array) and jax.typeof(x).sharding.mesh.explicit_axes
        for x in jax.tree.leaves(tree)
    )


def _sharding(shape: tuple[int, ...], like: jax.Array) -> NamedSharding:
    """Cut the axes that are as long as those of ``like`` in the same way, and no others."""
    known = jax.typeof(like).sharding
    cut = zip(shape, like.shape, known.spec, strict=True)
    return NamedSharding(known.mesh, PartitionSpec(*(s if n == m else None for n, m, s in cut)))
