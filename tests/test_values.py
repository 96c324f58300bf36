"""Tests of what is counted: exact however large the mask is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import _values
from jaxprune._values import count_parts, count_revived, count_true, whole_count

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
    """Let all counts of the library stay below a small word."""
    small = lambda mask: count_parts(mask, WORD)
    monkeypatch.setattr(_values, "_count", jax.jit(small))
    monkeypatch.setattr(_values, "_revived", jax.jit(lambda p, m: small(~m & (p != 0))))


@pytest.mark.parametrize("kept", [0.7, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_stay_below_a_word_and_add_up_to_the_count(shape, kept):
    mask = random_mask(shape, kept)
    parts = count_parts(mask, WORD)
    assert parts.dtype == jnp.int32 and int(parts.max(initial=0)) < WORD
    assert (parts.size == 1) == (mask.size < WORD)
    assert whole_count(parts) == int(np.sum(mask)) == count_true(mask)
    inside = jax.jit(lambda mask: whole_count(count_parts(mask, WORD)))(mask)
    assert inside.dtype == jnp.float32 and inside == np.sum(mask)


def test_a_count_of_seventy_billion_weights_is_made_in_parts_of_a_word():
    shape = (80, 8192, 28672)  # a scanned leaf of a Llama
    parts = jax.eval_shape(count_parts, jax.ShapeDtypeStruct(shape, bool))
    assert parts.shape == (9,) and -(-28672 // 9) * 80 * 8192 < 2**31
    masks = {"w": jax.ShapeDtypeStruct(shape, bool)}
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.bfloat16)}
    assert jax.eval_shape(jp.sparsity, masks, params).dtype == jnp.float32


def test_parts_beyond_an_int32_are_added_up_in_python():
    assert whole_count(jnp.full(9, 2**31 - 1, jnp.int32)) == 9 * (2**31 - 1)


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
