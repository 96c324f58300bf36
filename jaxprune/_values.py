"""What concrete arrays hold, read where they lie: nothing is gathered."""

# Checks at the door ask questions of whole trees, which may lie on many devices. Each answer is a
# number for each leaf, made by a reduction where the leaf lies, so that numbers travel and weights
# do not.

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import _ranking
from jaxprune._ranking import Whole
from jaxprune._tree import leaves_with_path, map_with_path
from jaxprune.typing import Masks, Params


def is_concrete(tree: Params) -> bool:
    """True if all leaves are arrays with values: none is traced, none a shape."""
    leaves = jax.tree.leaves(tree)
    abstract = (jax.core.Tracer, jax.ShapeDtypeStruct)
    return bool(leaves) and not any(isinstance(leaf, abstract) for leaf in leaves)


def count_true(mask: jax.Array) -> int | jax.Array:
    """Count what is True: exactly outside of a trace, as a float32 `[]` inside."""
    return number(_count(mask))


def number(words: Whole) -> int | jax.Array:
    """One count, made on the device in two words: an exact int, or a float32 `[]` in a trace."""
    if isinstance(words.low, jax.core.Tracer):
        return words.float.reshape(())
    return int(words)


def count_revived(params: Params, masks: Masks) -> dict[str, int]:
    """For each path, how many weights that masks remove are not zero; NaN is not zero."""
    counts: dict[str, int] = {}

    def visit(path: str, p: jax.Array, m: jax.Array | None) -> None:
        if m is not None:
            counts[path] = int(_revived(p, m))

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
def _revived(param: jax.Array, mask: jax.Array) -> Whole:
    """Count what is not zero where the mask, which broadcasts, is False."""
    return _ranking.count_true(~mask & (param != 0))


_count = jax.jit(_ranking.count_true)
