"""Tests of scopes/_count.py: how many units go, against Python's round."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import scopes
from jaxprune._amount import resolved
from jaxprune._parts import Parts
from jaxprune._pruner import Bound
from jaxprune.scopes._count import MOST_UNITS, removed

SIZES = (0, 1, 2, 3, 4, 7, 10, 300, 1000, 235_200, 16_777_217, 25_000_000, 2**30, MOST_UNITS)


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
def test_a_number_that_is_known_is_counted_as_python_counts(n):
    rng = np.random.default_rng(0)
    sparsities = np.concatenate([ties(n), rng.random(200), np.arange(101) / 100, [1e-9, 1 / 3]])
    assert_counted_as_python_counts(sparsities, n, [removed(s, n) for s in sparsities.tolist()])


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0.0, 1.0), n=st.integers(0, MOST_UNITS))
def test_a_plain_number_gives_a_plain_count(sparsity, n):
    count = removed(sparsity, n)
    assert isinstance(count, int) and count == round(sparsity * n)


@pytest.mark.parametrize("n", [n for n in SIZES if n <= 1_000_000])
def test_a_traced_float32_is_counted_as_python_counts_except_at_ties(n):
    sparsities = np.concatenate([np.arange(1001) / 1000, np.arange(0, 10_001, 7) / 10_000])
    counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(jnp.asarray(sparsities, jnp.float32))
    want = np.array([round(s * n) for s in sparsities.tolist()])
    apart = np.abs(sparsities * n % 1 - 0.5) > 2.0**-23 * n  # a step of float32
    np.testing.assert_array_equal(np.asarray(counts)[apart], want[apart])
    assert np.abs(np.asarray(counts) - want).max() <= 1


@pytest.mark.parametrize("n", SIZES)
def test_a_traced_float32_is_off_by_no_more_than_the_bound_that_is_stated(n):
    sparsities = np.concatenate([np.random.default_rng(0).random(500), np.linspace(0.9999, 1, 50)])
    counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(jnp.asarray(sparsities, jnp.float32))
    want = np.array([round(s * n) for s in sparsities.tolist()])
    assert np.abs(np.asarray(counts, np.int64) - want).max() <= 1 + n / 2**23
    assert int(counts.min()) >= 0 and int(counts.max()) <= n


@pytest.mark.parametrize("n", [10, 1000, 235_200, MOST_UNITS])
def test_a_traced_float64_is_counted_as_python_counts(n):
    sparsities = ties(n)
    with jax.enable_x64(True):
        counts = jax.jit(jax.vmap(lambda s: removed(s, n)))(jnp.asarray(sparsities, jnp.float64))
    assert_counted_as_python_counts(sparsities, n, counts)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("n", SIZES)
def test_nothing_and_everything_are_exact(sparsity, n):
    assert removed(sparsity, n) == sparsity * n
    assert jax.jit(lambda s: removed(s, n))(jnp.float32(sparsity)) == sparsity * n


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_traced_half_precision_sparsity_is_counted(dtype):
    counts = jax.jit(jax.vmap(lambda s: removed(s, 1000)))(jnp.array([0.0, 0.5, 0.9, 1.0], dtype))
    assert counts.tolist() == [0, 500, round(1000 * float(jnp.asarray(0.9, dtype))), 1000]


@pytest.mark.parametrize("sparsity", [0, 1])
def test_all_and_nothing_may_be_written_as_traced_integers(sparsity):
    assert int(jax.jit(removed, static_argnums=1)(jnp.int32(sparsity), 7)) == 7 * sparsity


# A number whose count float32 cannot tell: 0.7 of 25,000,001 units is 17,500,000.7.
N, SPARSITY = 25_000_001, 0.7


@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across])
def test_one_program_serves_every_sparsity_and_each_count_is_exact(scope):
    params, traces = {"kernel": jnp.ones((3, 7))}, []

    def counting(params, **_):
        traces.append(None)
        return params

    for sparsity in (0.1, 0.5, 1 / 3):
        masks = jp.find_masks(params, sparsity, scope=scope, criterion=counting)
        assert int(masks["kernel"].sum()) == 21 - round(sparsity * 21)
    assert len(traces) == 1


def test_counts_of_a_known_number_are_those_of_python_where_float32_is_off():
    units = {"kernel": jax.ShapeDtypeStruct((1, N), jnp.float32)}
    traced = jax.jit(lambda s: removed(s, N))(SPARSITY)
    assert scopes.per_leaf.counts(units, SPARSITY).kept == (N - round(SPARSITY * N),)
    assert int(traced) != round(SPARSITY * N)  # or this proves nothing


def test_a_schedule_that_has_arrived_counts_as_python_does():
    units = {"kernel": jax.ShapeDtypeStruct((1, N), jnp.float32)}
    parts = Parts(
        "prune", jp.criteria.magnitude, jp.patterns.Weights(), scopes.across, jp.is_matrix
    )
    params = {"kernel": jax.ShapeDtypeStruct((1, N), jnp.float32)}
    schedule = jp.schedules.cubic(SPARSITY, begin=0, end=10, every=1)
    bound = Bound(parts, schedule, params, params)
    kept = jax.jit(lambda step: resolved(parts, bound.amount(step), units).kept[0])
    assert N - int(kept(10)) == N - int(kept(99)) == round(SPARSITY * N)
    on_the_way = N - int(kept(5))
    assert abs(on_the_way - round(float(schedule(5)) * N)) <= 1 + N / 2**23


@pytest.mark.parametrize("sparsity", [0.5, np.float64(0.5), 0, 1])
def test_a_scope_of_ones_own_gets_the_number_of_python_that_was_given(sparsity):
    got = []

    def halving(units, s):
        got.append(s)
        return jax.tree.map(lambda u: u >= (s / 2 if s > 0.5 else 1 + s), units)

    jp.find_masks({"kernel": jnp.ones((2, 2))}, sparsity, scope=halving)
    assert [type(s) for s in got] == [float] and got == [sparsity]


def test_a_scope_of_ones_own_gets_a_float32_inside_of_prune():
    got = []

    def threshold(units, sparsity, *, within=None):
        got.append(sparsity)
        assert sparsity.dtype == jnp.float32 and sparsity.shape == ()
        del within
        return jax.tree.map(lambda u: u > 1 + sparsity / 2, units)

    params = {"kernel": jnp.array([[1.0, 2.0]])}
    tx = jp.prune(optax.sgd(0.0), schedule=jp.schedules.constant(0.5), scope=threshold)
    _, state = tx.update(params, tx.init(params), params)
    assert jp.get_masks(state)["kernel"].tolist() == [[False, True]]
    assert got
