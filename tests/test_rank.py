"""Tests of _ranking: the exact top-k against a slow loop that anyone can read."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune._ranking import Lazy, keep_largest, order_key, read
from jaxprune._ranking._shards import Shard
from jaxprune._ranking._tally import _count_in_bytes
from tests.helpers import equations_of, slow_keep

# Few shapes, so that few programs are compiled; together they hold 18 units.
SHAPES = ((3, 4), (4,), (), (0,), (1,))
SIZES = [int(np.prod(shape)) for shape in SHAPES]
WHOLE = tuple(range(len(SHAPES)))
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1.5, np.inf, -np.inf, np.nan)


def flush(x):
    """XLA on CPU takes subnormal numbers for zero, in every comparison."""
    return 0.0 if abs(x) < 2.0**-14 else x


some_float = st.one_of(
    st.sampled_from(SPECIAL),
    st.floats(width=16).map(flush),
    st.floats(-4.0, 4.0, width=16).map(flush),
)
many_floats = st.lists(some_float, min_size=sum(SIZES), max_size=sum(SIZES))
many_bools = st.lists(st.booleans(), min_size=sum(SIZES), max_size=sum(SIZES))


def split(flat, dtype):
    """Cut a flat list into leaves of SHAPES."""
    parts = np.split(np.asarray(flat), np.cumsum(SIZES)[:-1])
    return [jnp.asarray(p.reshape(s), dtype) for p, s in zip(parts, SHAPES, strict=True)]


def join(leaves):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])


def check(flat, ks, rankings, dtype, alive=None):
    leaves = split(flat, dtype)
    living = None if alive is None else split(alive, bool)
    keep = keep_largest(leaves, ks, rankings, living)
    for k, ranking in zip(ks, rankings, strict=True):
        scores = join([np.asarray(leaves[i], np.float64) for i in ranking])
        among = None if alive is None else join([living[i] for i in ranking])
        want = slow_keep(scores, k, among)
        np.testing.assert_array_equal(join([keep[i] for i in ranking]), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@settings(max_examples=50, deadline=None)
@given(flat=many_floats, k=st.integers(0, sum(SIZES)))
def test_one_ranking_over_many_leaves_keeps_what_the_slow_loop_keeps(dtype, flat, k):
    check(flat, [k], (tuple(range(len(SHAPES))),), dtype)


@settings(max_examples=50, deadline=None)
@given(flat=many_floats, k=st.integers(0, sum(SIZES)))
def test_float64_is_ranked_under_x64(flat, k):
    nudged = [x * (1 + i * 2.0**-50) for i, x in enumerate(flat)]  # apart in float64 only
    with jax.enable_x64(True):
        check(nudged, [k], (tuple(range(len(SHAPES))),), jnp.float64)


@settings(max_examples=50, deadline=None)
@given(flat=many_floats, alive=many_bools, k=st.integers(0, sum(SIZES)))
def test_the_dead_rank_below_nan_and_are_never_kept(flat, alive, k):
    check(flat, [k], (tuple(range(len(SHAPES))),), jnp.float32, alive)


SEVERAL = ((0, 2, 3), (1,), (4,))


@settings(max_examples=50, deadline=None)
@given(
    flat=many_floats,
    alive=many_bools,
    ks=st.tuples(*(st.integers(0, sum(SIZES[i] for i in ranking)) for ranking in SEVERAL)),
)
def test_several_rankings_at_once_do_not_see_one_another(flat, alive, ks):
    check(flat, list(ks), SEVERAL, jnp.float32, alive)


@pytest.mark.parametrize("ks", [(0, 20_000), (1, 1), (4999, 12_345), (5000, 0), (5000, 20_000)])
def test_several_large_rankings_at_once_do_not_see_one_another(ks):
    rng = np.random.default_rng(1)
    # One of many ties, one of many scales: they finish their searches at different times.
    scores = [rng.integers(0, 4, 5000), np.exp(20 * rng.normal(size=20_000))]
    scores = [s.astype(np.float32) for s in scores]
    keep = keep_largest([jnp.asarray(s) for s in scores], list(ks), ((0,), (1,)))
    for k, s, kept in zip(ks, scores, keep, strict=True):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-s, kind="stable")[:k])


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("value", [2.0, np.nan, -np.inf])
def test_all_or_nothing_of_a_tiny_leaf(size, value):
    scores = [jnp.full(size, value)]
    assert not keep_largest(scores, [0], ((0,),))[0].any()
    assert keep_largest(scores, [size], ((0,),))[0].all()


def test_a_scalar_is_a_leaf_like_any_other():
    kept = keep_largest([jnp.float32(1.0), jnp.float32(2.0)], [1], ((0, 1),))
    assert [bool(k) for k in kept] == [False, True]


@pytest.mark.parametrize("k", range(7))
def test_ties_stay_in_the_order_of_their_positions(k):
    (keep,) = keep_largest([jnp.zeros((2, 3))], [k], ((0,),))
    assert keep.ravel().tolist() == [True] * k + [False] * (6 - k)


def test_minus_zero_ties_with_zero():
    (keep,) = keep_largest([jnp.array([-0.0, 0.0, -0.0, 0.0])], [2], ((0,),))
    assert keep.tolist() == [True, True, False, False]


def test_nan_of_either_sign_ranks_below_minus_infinity():
    scores = jnp.array([np.nan, -np.inf, -np.nan, 1.0])
    for k, want in enumerate(([], [3], [1, 3], [0, 1, 3], [0, 1, 2, 3])):
        (keep,) = keep_largest([scores], [k], ((0,),))
        assert np.flatnonzero(keep).tolist() == want


@pytest.mark.parametrize("tiny", [jnp.float16, jnp.bfloat16])
def test_leaves_of_several_dtypes_compare_as_the_numbers_they_are(tiny):
    leaves = [jnp.array([1.0, 3.0], tiny), jnp.array([2.0, 1.0 + 2.0**-20])]
    keep = keep_largest(leaves, [3], ((0, 1),))
    assert [k.tolist() for k in keep] == [[False, True], [True, True]]


def test_a_traced_k_keeps_the_same_as_a_static_one():
    scores = jnp.array([3.0, 1.0, 2.0, 1.0, np.nan])
    traced = jax.jit(lambda k: keep_largest([scores], [k], ((0,),))[0])
    for k in range(6):
        np.testing.assert_array_equal(traced(k), keep_largest([scores], [k], ((0,),))[0])


def test_under_vmap_each_replicate_has_its_own_k(key):
    scores = jax.random.normal(key, (8, 3, 4)).round(1)
    ks = jnp.array([0, 1, 5, 12, 3, 7, 11, 2])
    alive = jax.random.bernoulli(key, 0.7, scores.shape)
    f = jax.vmap(lambda s, k, a: keep_largest([s], [k], ((0,),), [a])[0])
    for got, s, k, a in zip(f(scores, ks, alive), scores, ks, alive, strict=True):
        np.testing.assert_array_equal(got, slow_keep(s, int(k), a))


def test_under_vmap_one_leaf_may_serve_many_ks():
    scores = jnp.array([3.0, 1.0, 2.0])
    kept = jax.vmap(lambda k: keep_largest([scores], [k], ((0,),))[0])(jnp.arange(4))
    assert kept.sum(axis=1).tolist() == [0, 1, 2, 3]


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "constant": lambda rng, n: np.ones(n),
    "ties": lambda rng, n: rng.integers(0, 5, n),
    "mostly zero": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.1),
    "many scales": lambda rng, n: np.exp(20 * rng.normal(size=n)),
    "ascending": lambda rng, n: np.arange(n),
}


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_large_leaves_keep_the_first_k_of_a_stable_sort(name, fraction):
    n = 20_011
    scores = DISTRIBUTIONS[name](np.random.default_rng(0), n).astype(np.float32)
    k = round(fraction * n)
    (keep,) = keep_largest([jnp.asarray(scores)], [k], ((0,),))
    want = np.zeros(n, bool)
    want[np.argsort(-scores, kind="stable")[:k]] = True
    np.testing.assert_array_equal(keep, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_images_have_the_order_of_the_numbers(dtype):
    numbers = jnp.array([np.nan, -np.inf, -2.0, -1.0, 0.0, 1.0, 2.0, np.inf], dtype)
    images = np.asarray(order_key(numbers)).astype(np.int64)
    assert (np.diff(images) > 0).all() and images[0] > 0
    dead = order_key(numbers, jnp.zeros(8, bool))
    assert not dead.any()


def test_nothing_is_sorted_gathered_or_concatenated():
    leaves = [jnp.ones((30, 20)), jnp.ones(500)]
    program = jax.make_jaxpr(lambda s: keep_largest(s, [9, 9], ((0,), (1,))))(leaves)
    equations = list(equations_of(program.jaxpr))
    names = {equation.primitive.name for equation in equations}
    assert "while" in names
    assert not names & {"sort", "gather", "top_k", "approx_top_k", "cumsum", "scatter"}
    joined = [e.outvars[0].aval.size for e in equations if e.primitive.name == "concatenate"]
    assert all(size <= len(leaves) for size in joined)  # counts, one a ranking


@pytest.mark.parametrize("shape", [(), (0,), (7,), (300,), (65, 3), (64, 64), (2, 131), (3, 0, 4)])
def test_counting_in_bytes_counts_the_same(shape):
    mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.9)
    count = lambda m: _count_in_bytes(m, axes=tuple(range(m.ndim))).item()
    assert count(mask) == int(np.asarray(mask).sum())
    assert count(jnp.ones(shape, bool)) == int(np.prod(shape))


def test_many_small_vectors_are_ranked_as_if_they_were_counted():
    rng = np.random.default_rng(3)
    sizes = (3, 1, 5, 2, 4, 6)
    draw = lambda n: rng.choice([0.0, 1.0, 2.0, np.nan, -np.inf], n).astype(np.float32)
    leaves = [jnp.asarray(draw(n)) for n in sizes]
    alive = [jnp.asarray(rng.random(n) < 0.8) for n in sizes]
    rankings = ((0, 2, 5), (1, 3), (4,))
    for counts in ([7, 1, 2], [0, 3, 4], [14, 2, 0]):
        small = keep_largest(leaves, counts, rankings, alive)
        large = keep_largest([x[None] for x in leaves], counts, rankings, [a[None] for a in alive])
        for a, b in zip(small, large, strict=True):
            np.testing.assert_array_equal(a, b[0])


# Counts that broadcast over a leaf of this shape give each of their entries a competition.
STACK = (3, 4, 5)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 1, 5), (1, 4, 5), (3, 1, 5), (1, 1, 1)])
@pytest.mark.parametrize("with_dead", [False, True])
def test_counts_that_broadcast_over_a_leaf_rank_each_of_its_parts_alone(shape, with_dead):
    rng = np.random.default_rng(sum(shape) + with_dead)
    scores = rng.choice([0.0, -0.0, 1.0, 1.5, -2.0, np.inf, np.nan], STACK).astype(np.float32)
    alive = rng.random(STACK) < 0.7 if with_dead else None
    size = int(np.prod(STACK) // np.prod(shape))
    counts = rng.integers(0, size + 1, shape)
    beside = jnp.asarray(rng.normal(size=7), jnp.float32)  # another ranking, of the plain kind
    keep, other = jax.jit(
        lambda c: keep_largest(
            [jnp.asarray(scores), beside],
            [c, 3],
            ((0,), (1,)),
            None if alive is None else [jnp.asarray(alive), None],
        )
    )(jnp.asarray(counts))
    for place in np.ndindex(*shape):
        part = tuple(slice(None) if n == 1 else i for i, n in zip(place, shape, strict=True))
        want = slow_keep(scores[part], counts[place], None if alive is None else alive[part])
        np.testing.assert_array_equal(np.asarray(keep)[part], want)
    np.testing.assert_array_equal(other, slow_keep(beside, 3))


def test_layers_of_a_stack_rank_as_each_of_them_does_alone():
    scores = jax.random.normal(jax.random.key(0), (6, 30, 20)).astype(jnp.bfloat16)  # many ties
    counts = jnp.array([0, 1, 60, 300, 599, 600]).reshape(6, 1, 1)
    together = keep_largest([scores], [counts], ((0,),))[0]
    alone = [
        keep_largest([s], [int(n)], ((0,),))[0] for s, n in zip(scores, counts.ravel(), strict=True)
    ]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_parts_of_a_leaf_that_devices_share_are_refused():
    shards, counts = [Shard(("x",), (("x",), ()))], [jnp.ones((1, 4), jnp.int32)]
    with pytest.raises(NotImplementedError, match="not ranked over its devices"):
        keep_largest([jnp.ones((8, 4))], counts, ((0,),), shards=shards)


@settings(max_examples=20, deadline=None)
@given(flat=many_floats, k=st.integers(0, sum(SIZES)))
def test_lazy_scores_rank_as_if_they_were_stored(flat, k):
    weights = split(flat, jnp.float32)
    signs = [jnp.where(jnp.arange(w.size).reshape(w.shape) % 2 == 0, 1.0, -1.0) for w in weights]
    stored = keep_largest([w * s for w, s in zip(weights, signs, strict=True)], [k], (WHOLE,))
    lazy = [
        Lazy((w, s), operator.mul, jnp.dtype(jnp.float32))
        for w, s in zip(weights, signs, strict=True)
    ]
    for a, b in zip(keep_largest(lazy, [k], (WHOLE,)), stored, strict=True):
        np.testing.assert_array_equal(read(a), b)


def test_lazy_scores_are_never_stored():
    w = jnp.ones((1000, 1000))
    lazy = [Lazy((w, w), operator.mul, jnp.dtype(jnp.float32))]
    search = jax.jit(lambda leaves: list(map(read, keep_largest(leaves, [9], ((0,),)))))
    memory = search.lower(lazy).compile().memory_analysis()
    assert memory.temp_size_in_bytes < w.nbytes / 2  # bytes of digits, not scores of four
