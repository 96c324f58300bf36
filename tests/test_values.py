"""Tests of what is counted: exact however large the mask is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune._ranking import Whole, _tally
from jaxprune._values import count_revived, count_true, number

WORD = 64  # in the place of 2**31, so that small trees are large
SHAPES = [
    (),
    (0,),
    (5,),
    (64,),
    (1000,),
    (0, 200),
    (3, 40),
    (40, 3),
    (63, 65),
    (7, 90, 8),
    (2, 31, 50),
]


def random_mask(shape, kept=0.7):
    return jnp.asarray(np.random.default_rng(0).random(shape) < kept)


@pytest.fixture
def low_word(monkeypatch):
    """Let all counts of the library stay below a small word before they are added up."""
    monkeypatch.setattr(_tally, "MOST", WORD - 1)
    jax.clear_caches()
    yield
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize("kept", [0.7, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_beyond_a_word_are_those_of_numpy(low_word, shape, kept):
    mask = random_mask(shape, kept)
    assert count_true(mask) == int(np.sum(mask))
    inside = jax.jit(count_true)(mask)
    assert inside.dtype == jnp.float32 and inside == np.sum(mask)


def test_seventy_billion_weights_are_counted_in_an_abstract_trace():
    shape = (80, 8192, 28672)  # a scanned leaf of a Llama
    masks = {"w": jax.ShapeDtypeStruct(shape, bool)}
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    assert jax.eval_shape(jp.sparsity, masks, params).dtype == jnp.float32


def test_a_count_beyond_an_int32_is_an_exact_int():
    assert number(Whole(jnp.int32(9 * 2**15 - 1), jnp.int32(2**16 - 9))) == 9 * (2**31 - 1)
    assert number(Whole(jnp.int32(2**30), jnp.int32(7))) == 2**46 + 7


def test_sparsity_and_summary_of_a_tree_beyond_the_word(low_word):
    params = {"a": jnp.ones((63, 65)), "b": {"kernel": jnp.ones((7, 90, 8)), "bias": jnp.ones(3)}}
    masks = {
        "a": random_mask((63, 65)),
        "b": {"kernel": random_mask((7, 90, 8), 0.4), "bias": None},
    }
    a, b = (np.asarray(m).sum() for m in jax.tree.leaves(masks))
    gone = 63 * 65 + 7 * 90 * 8 - a - b
    assert jp.sparsity(masks, params) == gone / (63 * 65 + 7 * 90 * 8)
    table = jp.summary(params, masks)
    assert [row.kept for row in table.rows] == [a, b] and table.total.kept == a + b
    assert table.revived == {"a": 63 * 65 - a, "b/kernel": 7 * 90 * 8 - b}
    inside = jax.jit(jp.sparsity)(masks, params)
    assert float(inside) == pytest.approx(jp.sparsity(masks, params), rel=1e-6)


def test_what_came_back_is_counted_beyond_the_word(low_word):
    params = {"w": jnp.arange(63 * 65.0).reshape(63, 65)}
    assert count_revived(params, {"w": jnp.zeros((1, 65), bool)}) == {"w": 63 * 65 - 1}
    assert count_revived(params, {"w": jnp.ones((1, 65), bool)}) == {}
