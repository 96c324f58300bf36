"""Tests of scopes/_count.py: how many units go, against Python's round."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.scopes._count import MOST_UNITS, Fixed, fix, removed, settle

SIZES = (0, 1, 2, 3, 4, 7, 10, 300, 1000, 235_200, 16_777_217, 25_000_000, 2**30, MOST_UNITS)


def stack(sparsities):
    """One batched Fixed of many numbers."""
    return jax.tree.map(lambda *words: np.stack(words), *(fix(s) for s in sparsities))


def ties(n, low=0.01, high=1.0):
    """Numbers whose product with n is half a unit, and their neighbours."""
    rng = np.random.default_rng(n)
    half = (rng.integers(int(low * n), int(high * n) + 1, 200) + 0.5) / max(n, 1)
    near = [half, np.nextafter(half, 0.0), np.nextafter(half, 1.0)]
    return np.clip(np.concatenate(near), 0.0, 1.0)


def assert_counted_as_python_counts(sparsities, n, counts):
    want = [round(s * n) for s in sparsities.tolist()]
    wrong = [(s, n, int(c), w) for s, c, w in zip(sparsities, counts, want, strict=True) if c != w]
    assert not wrong


@pytest.mark.parametrize("n", SIZES)
def test_a_number_known_outside_of_the_jit_is_counted_as_python_counts(n):
    rng = np.random.default_rng(0)
    sparsities = np.concatenate([ties(n), rng.random(200), np.arange(101) / 100, [1e-9, 1 / 3]])
    counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(stack(sparsities.tolist()))
    assert_counted_as_python_counts(sparsities, n, counts)


@pytest.mark.parametrize("n", [1000, 235_200, 25_000_000, MOST_UNITS])
def test_ties_of_a_sparsity_near_zero_are_counted_as_python_counts(n):
    sparsities = ties(n, 0.0, 20 / n)
    counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(stack(sparsities.tolist()))
    assert_counted_as_python_counts(sparsities, n, counts)


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 1_000_000])
def test_a_traced_float32_is_counted_as_python_counts_except_at_ties(n):
    sparsities = np.concatenate([np.arange(1001) / 1000, np.arange(0, 10_001, 7) / 10_000])
    counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(jnp.asarray(sparsities, jnp.float32))
    want = np.array([round(s * n) for s in sparsities.tolist()])
    apart = np.abs(sparsities * n % 1 - 0.5) > 2.0**-24 * n  # half a step of float32
    np.testing.assert_array_equal(np.asarray(counts)[apart], want[apart])
    assert np.abs(np.asarray(counts) - want).max() <= 1


@pytest.mark.parametrize("n", [n for n in SIZES if n > 1_000_000])
def test_a_traced_float32_is_off_by_no_more_than_its_own_precision(n):
    sparsities = np.random.default_rng(0).random(500)
    counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(jnp.asarray(sparsities, jnp.float32))
    want = np.array([round(s * n) for s in sparsities.astype(np.float32).tolist()])
    assert np.abs(np.asarray(counts, np.int64) - want).max() <= 1


@pytest.mark.parametrize("n", [10, 1000, 235_200, MOST_UNITS])
def test_a_traced_float64_is_counted_as_python_counts(n):
    sparsities = ties(n)
    with jax.enable_x64(True):
        counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(jnp.asarray(sparsities, jnp.float64))
    assert_counted_as_python_counts(sparsities, n, counts)


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0.0, 1.0), n=st.integers(0, MOST_UNITS))
def test_a_plain_number_gives_a_plain_count(sparsity, n):
    count = removed(sparsity, n)
    assert isinstance(count, int) and count == round(sparsity * n)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_nothing_and_everything_are_exact(sparsity, n):
    assert removed(fix(sparsity), n) == sparsity * n
    assert jax.jit(lambda s: removed(s, n))(jnp.float32(sparsity)) == sparsity * n


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_traced_half_precision_sparsity_is_counted(dtype):
    counts = jax.jit(jax.vmap(lambda s: removed(s, 1000)))(jnp.array([0.0, 0.5, 0.9, 1.0], dtype))
    assert counts.tolist() == [0, 500, round(1000 * float(jnp.asarray(0.9, dtype))), 1000]


def test_settle_takes_the_number_that_was_asked_for_once_it_is_reached():
    n = 235_200
    count = jax.jit(lambda s: removed(settle(s, 0.7), n))
    assert count(0.7) == round(0.7 * n)
    assert count(0.3) == round(0.3 * n)


def test_a_fixed_number_passes_for_the_float_that_it_stands_for():
    fixed = jax.tree.map(jnp.asarray, fix(0.25))
    assert isinstance(fixed, Fixed)
    assert float(fixed * 8) == 2.0 and float(8 * fixed) == 2.0 and float(1 - fixed) == 0.75
    assert float(jnp.asarray(fixed)) == 0.25


@pytest.mark.parametrize("sparsity", [0, 1])
def test_all_and_nothing_may_be_written_as_traced_integers(sparsity):
    assert int(jax.jit(removed, static_argnums=1)(jnp.int32(sparsity), 7)) == 7 * sparsity
