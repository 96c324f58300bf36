"""Tests of the search: leaves that share a body, counts in two words, nothing done for nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune._ranking import (
    Lazy,
    _shards,
    _tally,
    _whole,
    in_words,
    keep_largest,
    least,
    read,
)
from jaxprune._ranking._alike import stacks
from tests.helpers import FULL, equations_of, slow_keep


def join(leaves):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])


def alike(n, shape=(6, 5)):
    """Layers of one shape, with ties and NaN in them."""
    rng = np.random.default_rng(n)
    draw = lambda: rng.choice([0.0, 0.5, 1.0, 2.0, np.nan], shape).astype(np.float32)
    return {f"layer_{i}": {"kernel": jnp.asarray(draw())} for i in range(n)}


@pytest.mark.parametrize("n", [3, 4, 9])
@pytest.mark.parametrize("together", [True, False])
def test_layers_that_share_a_body_keep_what_they_keep_apart(n, together):
    tree = alike(n)
    other = {f"{'abcdefghi'[i]}": leaf["kernel"] for i, leaf in enumerate(tree.values())}
    rankings = (tuple(range(n)),) if together else tuple((i,) for i in range(n))
    counts = [11 * n] if together else [3 * i for i in range(n)]
    alive = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) % 3 > 0, tree)
    shared = keep_largest(tree, counts, rankings, alive)
    apart = keep_largest(
        other, counts, rankings, dict(zip(other, jax.tree.leaves(alive), strict=True))
    )
    for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(apart), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_body_is_shared_by_leaves_of_one_shape_and_name_but_for_numbers():
    kinds = [()] * 10
    leaf, long = jnp.ones((2, 3)), jnp.ones((2, 4))
    leaves = [*[leaf] * 4, long, *[leaf] * 3, *[leaf.astype(jnp.bfloat16)] * 2]
    names = [*[f"l{i}/q" for i in range(4)], "l4/q", *[f"l{i}/o" for i in range(3)], "l8/q", "l9/q"]
    assert stacks(leaves, names, kinds) == [(0, 1, 2, 3), (4,), (5,), (6,), (7,), (8,), (9,)]


def test_a_program_grows_with_the_shapes_of_leaves_not_with_their_number():
    def bodies(n):
        program = jax.make_jaxpr(lambda t: keep_largest(t, [9] * n, tuple((i,) for i in range(n))))
        names = [e.primitive.name for e in equations_of(program(alike(n)).jaxpr)]
        return names.count("reduce_window") + names.count("bitcast_convert_type")

    assert bodies(24) - bodies(12) == 12  # the last comparison, one for each leaf, and no search


def test_where_all_units_are_wanted_nothing_is_searched():
    weights, seen = jnp.arange(64.0).reshape(8, 8), []

    def score(w):
        jax.debug.callback(lambda: seen.append(1))
        return w

    @jax.jit
    def keep(count):
        lazy = Lazy((weights,), score, jnp.dtype(jnp.float32))
        return read(keep_largest({"w": lazy}, [count], ((0,),))["w"])

    passes = {}
    for count in (64, 63, 0):
        seen.clear()
        assert int(keep(count).sum()) == count
        jax.effects_barrier()
        passes[count] = len(seen)
    assert passes[64] == 1 < passes[63]  # the comparison, and no byte before it


@pytest.fixture
def small_words(monkeypatch):
    """Counts and positions in words so small that a tree of some hundred units needs two."""
    monkeypatch.setattr(_whole, "WORD", 4)
    monkeypatch.setattr(_tally, "MOST", 40)
    monkeypatch.setattr(_shards, "MOST_PLACES", 31)
    jax.clear_caches()
    yield
    monkeypatch.undo()
    jax.clear_caches()


SHAPES = ((7, 5, 4), (30, 6), (9,), (3, 11, 2))


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("k", [0.0, 0.1, 0.5, 0.93, 1.0])
def test_counts_and_positions_in_two_words_keep_what_one_word_keeps(small_words, together, k):
    rng = np.random.default_rng(7)
    leaves = [
        jnp.asarray(rng.choice([0.0, 1.0, np.nan, -2.0], shape).astype(np.float32))
        for shape in SHAPES
    ]
    sizes = [x.size for x in leaves]
    alive = [jnp.asarray(rng.random(shape) < 0.9) for shape in SHAPES]
    rankings = (tuple(range(4)),) if together else tuple((i,) for i in range(4))
    counts = [round(k * sum(sizes))] if together else [round(k * n) for n in sizes]
    got = keep_largest(leaves, counts, rankings, alive)
    for n, ranking in zip(counts, rankings, strict=True):
        scores, living, kept = (join([tree[i] for i in ranking]) for tree in (leaves, alive, got))
        np.testing.assert_array_equal(kept, slow_keep(scores, n, living))


def test_competitions_inside_of_a_leaf_count_in_two_words(small_words):
    scores = jnp.asarray(np.random.default_rng(1).random((4, 9, 6)).astype(np.float32))
    counts = jnp.array([0, 17, 40, 54]).reshape(4, 1, 1)
    kept = keep_largest([scores], [counts], ((0,),))[0]
    assert kept.sum((1, 2)).tolist() == [0, 17, 40, 54]


@given(a=st.integers(0, 2**45), b=st.integers(0, 2**45))
def test_numbers_in_two_words_are_added_and_compared_exactly(a, b):
    x, y = in_words(a), in_words(b)
    number = lambda n: int(n.high) * 2**16 + int(n.low)
    assert number(x + y) == a + b and number(x - y) == a - b
    assert bool(x >= y) == (a >= b) and bool(x.differs(y)) == (a != b)
    assert number(least(x, y)) == min(a, b)
    assert 0 <= int((x - y).low) < 2**16


def test_a_leaf_beyond_an_int32_is_counted_and_ranked_in_an_abstract_trace():
    huge = jax.ShapeDtypeStruct((80, 8192, 28672), jnp.bfloat16)  # 18.8 billion
    keep = jax.eval_shape(lambda x: keep_largest([x], [2**34], ((0,),)), huge)
    assert keep[0].shape == huge.shape and keep[0].dtype == bool


def test_axes_too_long_for_two_words_are_refused_by_shape():
    with pytest.raises(NotImplementedError, match=r"3000000000\) are too many along single"):
        flat = jax.ShapeDtypeStruct((3 * 10**9,), jnp.float32)
        jax.eval_shape(lambda x: keep_largest([x], [9], ((0,),)), flat)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scope", [jp.scopes.per_leaf, jp.scopes.across])
@pytest.mark.parametrize("layers", [1, 40])
def test_inside_of_a_jit_of_ones_own_masks_take_no_more_than_the_params(dtype, scope, layers):
    shape = (256, 512) if layers > 1 else (40, 256, 512)
    params = {f"l{i}": {"kernel": jax.ShapeDtypeStruct(shape, dtype)} for i in range(layers)}
    program = jax.jit(lambda p: jp.find_masks(p, 0.5, scope=scope)).lower(params).compile(FULL)
    memory = program.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert peak <= 1.1 * memory.argument_size_in_bytes
