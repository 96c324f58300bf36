"""Keep the largest units of each competition; only many small vectors are sorted."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._ranking._competitions import Competitions, Ranking
from jaxprune._ranking._lazy import Leaf, is_lazy, read
from jaxprune._ranking._order import Rank, count_down, order_key
from jaxprune._ranking._search import last_kept
from jaxprune._ranking._shards import Shard
from jaxprune._ranking._whole import WORD, Whole, in_words
from jaxprune.typing import DType, Lazy, Tree

LARGE = 2**26  # units of a leaf that a search stores nothing beside

Unit = tuple[Leaf, Leaf | None]  # scores, and which units are alive: None if all


def keep_largest(
    units: Tree,
    counts: Sequence[int | jax.Array | Whole],
    rankings: tuple[Ranking, ...],
    alive: Tree = None,
    shards: Sequence[Shard] | None = None,
) -> Tree:
    """Keep the largest units of each competition, exactly as many as are asked for.

    The k-th largest score is a threshold such that k scores reach it. Counting is a sum, a sum
    over several leaves or devices is a sum of sums, and so nothing but counts ever leaves its
    leaf. NaN ranks below every number, units that are not ``alive`` below NaN. Among equals the
    earlier leaf, then the earlier position stays. The dead are never kept.

    Where all units are asked for, nothing is searched. What lazy leaves keep is lazy as well: the
    comparison with the threshold is made where the mask is stored.

    Args:
      units: scores, any floating dtypes and shapes; a tree of arrays, stored or lazy.
      counts: units to keep in each ranking, static or traced: `[]` for all of its leaves
        together; or, in a ranking of one leaf `[a, b, c]`, of its rank with each axis full or 1,
        which gives each entry a competition of its own: `[a, 1, 1]` for layers in a stack,
        `[1, 1, c]` for outputs.
      rankings: which leaves compete with one another, by their position; every leaf in exactly one.
      alive: a tree like ``units`` of bools `[...]`, stored or lazy, or None where all are.
      shards: for each leaf how it lies on mesh axes, inside of shard_map; None if not sharded.

    Returns:
      A tree like ``units`` of bools `[...]`.
    """
    named, structure = jax.tree_util.tree_flatten_with_path(units, is_leaf=is_lazy)
    treedef: Any = structure
    names, leaves = [jax.tree_util.keystr(path) for path, _ in named], [leaf for _, leaf in named]
    if not leaves:
        raise ValueError("There are no units to rank: the tree has no leaf but None.")
    living = [None] * len(leaves) if alive is None else treedef.flatten_up_to(alive)
    pairs = list(zip(leaves, living, strict=True))
    shards = tuple(shards or [Shard()] * len(leaves))
    wanted = _alike(counts)
    shapes = [jnp.shape(jax.tree.leaves(count)[0]) for count in wanted]
    if any(shapes) and any(shard.names for shard in shards):
        raise NotImplementedError(
            "Competitions inside of a leaf that `shard_map` splits are not ranked over its devices "
            "(each sees a shard). Rank it under `jit`, which sees the leaf whole."
        )
    if not any(shapes) and not any(shard.names for shard in shards) and _many_and_small(leaves):
        keys = [_key(pair, _dtype(leaves)) for pair in pairs]
        return jax.tree.unflatten(
            treedef, _keep_sorted(keys, list(map(in_words, wanted)), rankings)
        )
    keep: list[Any] = [x if x.size else jnp.ones(x.shape, bool) for x in leaves]
    # Nothing is looked for where nothing lies: a ranking without units would have no size.
    full = [(tuple(i for i in ranking if leaves[i].size), r) for r, ranking in enumerate(rankings)]
    full = [(ranking, r) for ranking, r in full if ranking]
    rankings = tuple(ranking for ranking, _ in full)
    wanted, shapes = [wanted[r] for _, r in full], [shapes[r] for _, r in full]
    for some in _searches(rankings, leaves):
        mine = [i for r in some for i in rankings[r]]
        competitions = Competitions.of_some(
            [pairs[i] for i in mine],
            [names[i] for i in mine],
            [shards[i] for i in mine],
            tuple(tuple(map(mine.index, rankings[r])) for r in some),
            tuple(shapes[r] for r in some),
        )
        found = _kept([pairs[i] for i in mine], [wanted[r] for r in some], competitions)
        for i, kept in zip(mine, found, strict=True):
            keep[i] = kept
    return jax.tree.unflatten(treedef, keep)


def shape_of_counts(shape: Sequence[int], apart: Sequence[int]) -> tuple[int, ...]:
    """The shape of the counts of a leaf whose units compete at each index of some axes apart.

    `[8, 1, 1]` for a stack of eight layers; `()` where all units of the leaf compete.
    """
    return tuple(n if i in apart else 1 for i, n in enumerate(shape)) if apart else ()


def _alike(counts: Sequence[int | jax.Array | Whole]) -> list[Any]:
    """Counts that are all int32, or all in two words if one of them needs that."""
    if any(isinstance(n, Whole) or (isinstance(n, int) and n >= 2**31) for n in counts):
        return list(map(in_words, counts))
    return [_as_int32(n) for n in counts]


def _as_int32(count: Any) -> jax.Array:
    """An array of counts; equal ones that are known are no constant of their own in a program."""
    if isinstance(count, np.ndarray) and count.size > 1 and (count == count.flat[0]).all():
        return jnp.full(count.shape, count.flat[0], jnp.int32)
    return jnp.asarray(count, jnp.int32)


def _searches(rankings: tuple[Ranking, ...], leaves: Sequence[Leaf]) -> list[list[int]]:
    """Split rankings, by number, into those that are searched together.

    Large leaves that rank for themselves are searched one after another, so that the byte a unit
    that a search stores is there for one of them at a time; all others share a loop, since each
    loop takes time to compile.
    """
    large = [r for r, (i, *more) in enumerate(rankings) if not more and leaves[i].size >= LARGE]
    together = [r for r in range(len(rankings)) if r not in large]
    return [some for some in [together, *([r] for r in large)] if some]


def _kept(pairs: list[Unit], wanted: list[Any], competitions: Competitions) -> list[Leaf]:
    """Search, and say for each leaf what is kept: now, or lazily where its scores are lazy."""
    dtype = _dtype([scores for scores, _ in pairs])
    keep: list[Leaf] = []
    found = _found(pairs, wanted, competitions=competitions, dtype=dtype)
    for i, ((leaf, living), threshold) in enumerate(zip(pairs, found, strict=True)):
        score = getattr(leaf, "score", None)
        stays = _Stays(competitions.shape(i), competitions.shards[i], dtype, score)
        operands = leaf.operands if isinstance(leaf, Lazy) else (leaf,)
        lazy = Lazy((*operands, threshold), stays, jnp.dtype(bool))
        keep.append(lazy if is_lazy(leaf) else _among(read(lazy), living))
    return keep


class _Threshold(NamedTuple):
    """What the units of a leaf are compared with.

    Attributes:
      last: the last rank that stays: of all `m` leaves, `[m]`, or, in a leaf of several
        competitions, of those, in the shape of its counts.
      start: where the precedence of all leaves starts, `[m]`.
      number: of the leaf, int32 `[]`.
    """

    last: Rank
    start: Rank
    number: jax.Array


@dataclasses.dataclass(frozen=True)
class _Stays:
    """From what a leaf's scores are made from, and its threshold, to what reaches that."""

    shape: tuple[int, ...]  # of the counts
    shard: Shard
    dtype: DType
    score: Any  # of a lazy leaf

    def __call__(self, *operands: Any) -> jax.Array:
        *scored, threshold = operands
        scores = scored[0] if self.score is None else self.score(*scored)
        return _reaches(scores.astype(self.dtype), threshold, shape=self.shape, shard=self.shard)


# One trace for all leaves of a shape.
@functools.partial(jax.jit, static_argnames=("shape", "shard"))
def _reaches(
    scores: jax.Array, threshold: _Threshold, *, shape: tuple[int, ...], shard: Shard
) -> jax.Array:
    """Compare the ranks of a leaf's units with the last one that stays, word by word."""
    last, start, number = threshold
    key = order_key(scores)
    unit = (key, *count_down(key, tuple(x[number] for x in start), shape, shard))
    last = last if shape else tuple(x[number] for x in last)
    reaches = unit[-1] >= last[-1]
    for mine, least in zip(unit[-2::-1], last[-2::-1], strict=True):
        reaches = (mine > least) | ((mine == least) & reaches)
    return reaches


@functools.partial(jax.jit, static_argnames=("competitions", "dtype"))
def _found(
    pairs: list[Unit], counts: list[Any], *, competitions: Competitions, dtype: DType
) -> list[_Threshold]:
    """Find for each leaf what its units are compared with."""

    def rank(unit: Unit, start: Rank, leaf: int) -> Rank:
        key = _key(unit, dtype)
        return key, *count_down(key, start, competitions.shape(leaf), competitions.shards[leaf])

    last, numbers = last_kept(rank, pairs, in_words(competitions.flat(counts)), competitions)
    shared = tuple(map(competitions.of_leaves, last))
    start = tuple(map(jnp.asarray, competitions.starts))
    return [
        _Threshold(
            tuple(competitions.over(x, (i,))[0] for x in last) if competitions.shape(i) else shared,
            start,
            number,
        )
        for i, number in enumerate(numbers)
    ]


def _key(unit: Unit, dtype: DType) -> jax.Array:
    scores, alive = unit
    # Upcasting is exact, so that leaves of several dtypes compare as the numbers they are.
    return order_key(read(scores).astype(dtype), None if alive is None else read(alive))


def _dtype(leaves: Sequence[Leaf]) -> DType:
    """The type that the scores of all leaves are compared in; eight bits promote to nothing."""
    kinds = {x.dtype if jnp.finfo(x.dtype).bits > 8 else jnp.dtype(jnp.float32) for x in leaves}
    return jnp.result_type(*kinds)


def _among(keep: jax.Array, alive: Leaf | None) -> jax.Array:
    return keep if alive is None else keep & read(alive)


def _many_and_small(leaves: Sequence[Leaf]) -> bool:
    """True for the units of many coupled groups: vectors of some thousand scores each.

    A search loop with a body for each of them takes long to compile, and sorting them no time.
    """
    if len(leaves) <= 4 or sum(x.size for x in leaves) > 2**20:
        return False
    return all(
        x.ndim == 1 and not is_lazy(x) and not any(jax.typeof(x).sharding.spec) for x in leaves
    )


def _keep_sorted(
    keys: Sequence[jax.Array], wanted: Sequence[Whole], rankings: Sequence[Ranking]
) -> list[jax.Array]:
    """Keep the largest of each ranking by sorting: one row a ranking, filled up with the dead."""
    most = jnp.stack([jnp.asarray(count.low + (count.high << WORD)) for count in wanted])
    rows = [jnp.concatenate([keys[i] for i in ranking]) for ranking in rankings]
    longest = max(row.size for row in rows)
    table = jnp.stack([jnp.pad(row, (0, longest - row.size)) for row in rows])
    place = jnp.argsort(jnp.argsort(~table, axis=1, stable=True), axis=1)
    keep = (place < most[:, None]) & (table > 0)
    kept: dict[int, jax.Array] = {}
    for row, ranking in zip(keep, rankings, strict=True):
        start = 0
        for i in ranking:
            kept[i] = row[start : start + keys[i].size]
            start += keys[i].size
    return [kept[i] for i in range(len(kept))]
