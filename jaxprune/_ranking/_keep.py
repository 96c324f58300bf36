"""Keep the largest units of each competition; only many small vectors are sorted."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._ranking._competitions import Competitions, Ranking
from jaxprune._ranking._lazy import Leaf, is_lazy, read, stored
from jaxprune._ranking._order import Rank, count_down, count_down_within, order_key
from jaxprune._ranking._search import Data, last_kept
from jaxprune._ranking._shards import Shard


def keep_largest(
    leaves: Sequence[Leaf],
    counts: Sequence[int | jax.Array],
    rankings: tuple[Ranking, ...],
    alive: Sequence[jax.Array | None] | None = None,
    shards: Sequence[Shard] | None = None,
) -> list[jax.Array]:
    """Keep the largest units of each competition, exactly as many as are asked for.

    The k-th largest score is a threshold such that k scores reach it. Counting is a sum, a sum
    over several leaves or devices is a sum of sums, and so nothing but counts ever leaves its
    leaf. NaN ranks below every number, units that are not ``alive`` below NaN. Among equals the
    earlier leaf, then the earlier position stays. The dead are never kept.

    Args:
      leaves: scores, any floating dtypes and shapes, stored or lazy.
      counts: units to keep in each ranking, static or traced: `[]` for all of its leaves
        together; or, in a ranking of one leaf `[a, b, c]`, of its rank with each axis full or 1,
        which gives each entry a competition of its own: `[a, 1, 1]` for layers in a stack,
        `[1, 1, c]` for outputs.
      rankings: which leaves compete with one another; every leaf in exactly one ranking.
      alive: for each leaf a bool array like it, or None where all are.
      shards: for each leaf how it lies on mesh axes, inside of shard_map; None if not sharded.

    Returns:
      For each leaf a bool array of its shape.
    """
    competitions = Competitions(rankings, tuple(jnp.shape(count) for count in counts))
    shards = tuple(shards or [Shard()] * len(leaves))
    if any(shape for shape in competitions.shapes) and any(shard.names for shard in shards):
        raise NotImplementedError(
            "Competitions inside of a leaf that `shard_map` splits are not ranked over its devices "
            "(each sees a shard). Rank it under `jit`, which sees the leaf whole."
        )
    wanted = [jnp.asarray(count, jnp.int32) for count in counts]
    living = list(alive) if alive else [None] * len(leaves)
    return _keep_largest(list(leaves), wanted, living, competitions=competitions, shards=shards)


@functools.partial(jax.jit, static_argnames=("competitions", "shards"))
def _keep_largest(
    leaves: list[Leaf],
    counts: list[jax.Array],
    living: list[jax.Array | None],
    *,
    competitions: Competitions,
    shards: tuple[Shard, ...],
) -> list[jax.Array]:
    # Upcasting is exact, so that leaves of several dtypes compare as the numbers they are; those
    # of eight bits promote to nothing by themselves.
    kinds = {x.dtype if jnp.finfo(x.dtype).bits > 8 else jnp.dtype(jnp.float32) for x in leaves}
    dtype = jnp.result_type(*kinds)

    def keys(leaves: list[Leaf]) -> list[jax.Array]:
        scores = [read(x).astype(dtype) for x in leaves]
        return [order_key(x, a) for x, a in zip(scores, living, strict=True)]

    def ranks(data: Data) -> list[Rank]:
        return list(map(Rank, keys(data.leaves), _precedence(data, competitions, shards)))

    wanted = competitions.flat(counts)
    if _many_and_small(leaves, competitions, shards):
        return _keep_sorted(keys(leaves), wanted, competitions.rankings)
    data = Data(leaves, jnp.uint32(0))
    last = last_kept(ranks, data, wanted, competitions, shards)

    def stays(i: int, unit: Rank) -> jax.Array:
        key, precedence = (competitions.over(x, i) for x in last)
        # The dead, of key 0, can at most fill up the count: out with them.
        reaches = (unit.key > key) | ((unit.key == key) & (unit.precedence >= precedence))
        return (unit.key > 0) & reaches

    return [stays(i, unit) for i, unit in enumerate(ranks(data))]


def _precedence(data: Data, competitions: Competitions, shards: Sequence[Shard]) -> list[jax.Array]:
    """Number the units of each competition downwards to 1: uint32, for each leaf as it is."""
    leaves = [stored(leaf) for leaf in data.leaves]
    numbers: dict[int, jax.Array] = {}
    for ranking, shape in zip(competitions.rankings, competitions.shapes, strict=True):
        left = sum(shards[i].whole(leaves[i]) for i in ranking)
        for i in ranking:
            if shape:
                size = left // max(1, math.prod(shape))
                numbers[i] = count_down_within(leaves[i], data.zero + np.uint32(size), shape)
            else:
                numbers[i] = count_down(leaves[i], data.zero + np.uint32(left), shards[i])
            left -= shards[i].whole(leaves[i])
    return [numbers[i] for i in range(len(numbers))]


def _many_and_small(
    leaves: Sequence[Leaf], competitions: Competitions, shards: Sequence[Shard]
) -> bool:
    """True for the units of many coupled groups: vectors of some thousand scores each.

    A search loop with a body for each of them takes long to compile, and sorting them no time.
    """
    if len(leaves) <= 4 or sum(x.size for x in leaves) > 2**20:
        return False
    if any(competitions.shapes) or any(shard.names for shard in shards):
        return False
    return all(
        x.ndim == 1 and not is_lazy(x) and not any(jax.typeof(x).sharding.spec) for x in leaves
    )


def _keep_sorted(
    keys: Sequence[jax.Array], wanted: jax.Array, rankings: Sequence[Ranking]
) -> list[jax.Array]:
    """Keep the largest of each ranking by sorting: one row a ranking, filled up with the dead."""
    rows = [jnp.concatenate([keys[i] for i in ranking]) for ranking in rankings]
    longest = max(row.size for row in rows)
    table = jnp.stack([jnp.pad(row, (0, longest - row.size)) for row in rows])
    place = jnp.argsort(jnp.argsort(~table, axis=1, stable=True), axis=1)
    keep = (place < wanted[:, None]) & (table > 0)
    kept: dict[int, jax.Array] = {}
    for row, ranking in zip(keep, rankings, strict=True):
        start = 0
        for i in ranking:
            kept[i] = row[start : start + keys[i].size]
            start += keys[i].size
    return [kept[i] for i in range(len(kept))]
