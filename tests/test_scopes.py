"""Tests of per_leaf and across: who competes with whom."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import scopes
from jaxprune._ranking import in_words
from jaxprune.scopes._count import MOST_UNITS, kept
from tests.helpers import assert_trees_equal, slow_keep

UNITS = {
    "a": jnp.array([1.0, 4.0]),
    "b": jnp.array([[2.0], [3.0]]),
    "c": None,
    "d": jnp.array([0.5, 9.0, 0.1, 7.0]),
}


def test_per_leaf_removes_the_smallest_units_of_each_leaf():
    scores = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([2.0, 3.0])}
    keep = scopes.per_leaf(scores, 0.5)
    assert_trees_equal(keep, {"a": np.array([False, True]), "b": np.array([False, True])})


def test_across_removes_the_smallest_units_of_the_whole_tree():
    scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    keep = scopes.across(scores, 0.5)
    assert_trees_equal(keep, {"a": np.array([False, False]), "b": np.array([True, True])})


def test_across_breaks_ties_by_the_order_of_the_leaves():
    keep = scopes.across({"a": jnp.ones(2), "b": jnp.ones(3)}, 0.6)
    assert_trees_equal(keep, {"a": np.array([True, True]), "b": np.zeros(3, bool)})


@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across])
def test_holes_stay_holes(scope):
    assert scope(UNITS, 0.5)["c"] is None


def test_per_leaf_takes_one_sparsity_a_leaf():
    keep = scopes.per_leaf(UNITS, {"a": 0.0, "b": 1.0, "c": None, "d": 0.25})
    assert [int(keep[name].sum()) for name in "abd"] == [2, 0, 3]


def test_per_leaf_refuses_sparsities_that_do_not_mirror_the_units():
    with pytest.raises(ValueError, match=r"per_leaf.*does not mirror.*none for 'd'.*uniform"):
        scopes.per_leaf(UNITS, {"a": 0.0, "b": 1.0})
    with pytest.raises(ValueError, match="not prunable 'c'"):
        scopes.per_leaf(UNITS, {"a": 0.0, "b": 1.0, "c": 0.5, "d": 0.5})


def test_across_refuses_a_tree_of_sparsities_by_name():
    with pytest.raises(ValueError, match=r"`across`.*one sparsity.*got a tree.*per_leaf"):
        scopes.across(UNITS, {"a": 0.0, "b": 1.0, "c": None, "d": 0.25})


@settings(max_examples=40, deadline=None)
@given(
    sparsity=st.floats(0.0, 1.0),
    scores=st.lists(st.integers(-3, 3), min_size=17, max_size=17),
    dead=st.lists(st.booleans(), min_size=17, max_size=17),
)
def test_counts_are_exact_with_and_without_dead_units(sparsity, scores, dead):
    units = {"x": jnp.array(scores[:12], float).reshape(3, 4), "y": jnp.array(scores[12:], float)}
    alive = {"x": ~np.array(dead[:12]).reshape(3, 4), "y": ~np.array(dead[12:])}
    for within in (None, alive):
        leaves = scopes.per_leaf(units, sparsity, within=within)
        for name, u in units.items():
            k = u.size - round(sparsity * u.size)
            np.testing.assert_array_equal(
                leaves[name], slow_keep(u, k, None if within is None else within[name])
            )
        tree = scopes.across(units, sparsity, within=within)
        kept = np.concatenate([tree["x"].ravel(), tree["y"]])
        among = None if within is None else ~np.array(dead)
        k = 17 - round(sparsity * 17)
        np.testing.assert_array_equal(kept, slow_keep(np.array(scores, float), k, among))


@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across, scopes.windows(2, axis=0)])
def test_a_traced_sparsity_under_vmap_gives_each_replicate_its_own(scope):
    units = {"u": jnp.arange(8.0), "v": jnp.arange(4.0)}
    kept = jax.vmap(lambda s: scope(units, s))(jnp.array([0.0, 0.5, 1.0]))
    for i, s in enumerate((0.0, 0.5, 1.0)):
        assert_trees_equal(jax.tree.map(lambda k: k[i], kept), scope(units, s))  # noqa: B023


@pytest.mark.parametrize("traced", [False, True])
def test_rankings_beyond_an_int32_are_counted_in_two_words(traced):
    sizes = [2 * MOST_UNITS, 80 * 8192 * 28672, 7]
    for s in (0.0, 0.25, 0.9, 1.0):
        given = jnp.float32(s) if traced else s
        counts = kept(sizes, [given] * 3).kept
        exact = [n - round(float(np.float32(s) if traced else s) * n) for n in sizes]
        got = [int(c.high) * 2**16 + int(c.low) for c in map(in_words, counts)]
        slack = [n / 2**23 + 1 if traced and 0 < s < 1 else 0 for n in sizes]
        assert all(abs(a - b) <= d for a, b, d in zip(got, exact, slack, strict=True))
