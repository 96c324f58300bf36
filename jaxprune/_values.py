"""What concrete arrays hold, read where they lie: nothing is gathered."""

# Checks at the door ask questions of whole trees, which may lie on many devices. Each answer is a
# number for each leaf, made by a reduction where the leaf lies, so that numbers travel and weights
# do not.

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._tree import leaves_with_path, map_with_path
from jaxprune.typing import Masks, Params


def is_concrete(tree: Params) -> bool:
    """True if all leaves are arrays with values: none is traced, none a shape."""
    leaves = jax.tree.leaves(tree)
    abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
    return bool(leaves) and not any(isinstance(leaf, abstract) for leaf in leaves)


def count_parts(mask: jax.Array, word: int = 2**31) -> jax.Array:
    """Count what is True in parts that an int32 holds, however large the mask is.

    Nothing is gathered: the counts along the longest axis are made where the mask lies, and added
    up by stretches of it that are short enough, mostly one. ``whole_count`` adds those.

    Args:
      mask: bools, of which an index along the longest axis has fewer than ``word``.
      word: what a part stays below.

    Returns:
      int32 `[parts]`.
    """
    if mask.size < word:
        return jnp.sum(mask, dtype=jnp.int32)[None]
    axis = int(np.argmax(mask.shape))
    others = tuple(i for i in range(mask.ndim) if i != axis)
    each = jnp.sum(mask, axis=others, dtype=jnp.int32)
    length = (word - 1) // math.prod(mask.shape[i] for i in others)
    part = lax.iota(np.uint32, each.size) // np.uint32(length)
    parts = range(-(-each.size // length))
    return jnp.stack([jnp.sum(jnp.where(part == i, each, 0)) for i in parts])


def whole_count(parts: jax.Array) -> int | jax.Array:
    """Add up what ``count_parts`` gave: an exact int, or inside of a trace a float `[]`."""
    if isinstance(parts, jax.core.Tracer):
        return jnp.sum(parts.astype(float))
    return sum(np.asarray(parts).tolist())


def count_true(mask: jax.Array) -> int | jax.Array:
    """Count what is True: exactly outside of a trace, as a float inside."""
    return whole_count(_count(mask))


def count_revived(params: Params, masks: Masks) -> dict[str, int]:
    """For each path, how many weights that masks remove are not zero; NaN is not zero."""
    counts: dict[str, int] = {}

    def visit(path: str, p: jax.Array, m: jax.Array | None) -> None:
        if m is not None:
            counts[path] = int(whole_count(_revived(p, m)))

    map_with_path(visit, params, masks)
    return {path: count for path, count in counts.items() if count}


def zero_shares(params: Params) -> dict[str, float]:
    """For each path of some zeros, their share; a leaf that is zero as a whole starts so."""
    shares = {path: float(_zero_share(leaf)) for path, leaf in leaves_with_path(params)}
    # Some zeros come by chance where eight bits hold a weight; pruning removes more than those.
    return {path: share for path, share in shares.items() if 0.05 <= share < 1.0}


def constant_of(leaf: jax.Array | np.ndarray) -> float | None:
    """The one number that a leaf holds, if it is one.

    A corner of one shard tells for nearly all leaves; only if it is constant all of them are
    read, by a reduction. Where other processes hold parts, all have to ask for the same.
    """
    if leaf.size < 2:
        return None
    if getattr(leaf, "is_fully_addressable", True):
        first = _corner(leaf)
        if not first.size or (first != first.flat[0]).any():
            return None
    low, high = (float(x) for x in _range(leaf))
    return low if low == high else None


def _corner(leaf: jax.Array | np.ndarray, most: int = 8) -> np.ndarray:
    """A few values of the first shard: at most ``most`` along each axis of a large one."""
    shard = leaf.addressable_shards[0].data if isinstance(leaf, jax.Array) else leaf
    part = shard if shard.size <= 4096 else shard[tuple(slice(0, most) for _ in shard.shape)]
    return np.asarray(part).astype(np.float32)


@jax.jit
def _range(leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The smallest and the largest entry."""
    wide = leaf.astype(jnp.float32)  # narrow formats have no minimum; two numbers may fall together
    return jnp.min(wide), jnp.max(wide)


@jax.jit
def _zero_share(leaf: jax.Array) -> jax.Array:
    """The share of entries that are zero."""
    return jnp.mean(leaf == 0, dtype=jnp.float32) if leaf.size else jnp.float32(0)


@jax.jit
def _revived(param: jax.Array, mask: jax.Array) -> jax.Array:
    """Count in parts what is not zero where the mask, which broadcasts, is False."""
    return count_parts(~mask & (param != 0))


_count = jax.jit(count_parts, static_argnames="word")
