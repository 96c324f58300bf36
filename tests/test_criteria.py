"""Tests of the criteria against one line of NumPy each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import criteria

RNG = np.random.default_rng(0)
W = {"a": RNG.normal(size=(3, 4)).astype(np.float32), "b": RNG.normal(size=5).astype(np.float32)}
G = {"a": RNG.normal(size=(3, 4)).astype(np.float32), "b": RNG.normal(size=5).astype(np.float32)}


def test_magnitude_is_the_absolute_value():
    scores = criteria.magnitude(W)
    for name, w in W.items():
        np.testing.assert_array_equal(scores[name], np.abs(w))


def test_taylor_is_the_absolute_product_with_the_gradient():
    scores = criteria.taylor(W, grads=G)
    for name, w in W.items():
        np.testing.assert_array_equal(scores[name], np.abs(w * G[name]))


def test_random_draws_each_leaf_from_the_key_folded_with_its_place(key):
    scores = criteria.random(W, key=key)
    for i, name in enumerate(W):
        want = jax.random.uniform(jax.random.fold_in(key, i), W[name].shape)
        np.testing.assert_array_equal(scores[name], want)


def test_random_scores_of_equal_leaves_differ(key):
    scores = criteria.random({"a": jnp.ones(50), "b": jnp.ones(50)}, key=key)
    assert (scores["a"] != scores["b"]).all()


def test_random_scores_of_half_precision_weights_do_not_tie(key):
    scores = criteria.random({"w": jnp.ones(1000, jnp.bfloat16)}, key=key)["w"]
    assert len(np.unique(scores)) > 990


@pytest.mark.parametrize("name", criteria.__all__)
def test_a_criterion_swallows_evidence_that_it_does_not_ask_for(key, name):
    criterion = getattr(criteria, name)
    scores = criterion(W, grads=G, key=key, value=1.0, whatever=None)
    assert jax.tree.map(jnp.shape, scores) == jax.tree.map(jnp.shape, W)


@pytest.mark.parametrize("name", criteria.__all__)
def test_a_criterion_keeps_holes(key, name):
    holed, grads = {"w": jnp.ones(2), "b": None}, {"w": jnp.ones(2), "b": None}
    assert getattr(criteria, name)(holed, grads=grads, key=key)["b"] is None


@pytest.mark.parametrize(
    "criterion, missing", [(criteria.taylor, "grads"), (criteria.random, "key")]
)
def test_missing_evidence_is_named(criterion, missing):
    words = rf"criterion `{criterion.__name__}` needs `{missing}`.*not given.*`{missing}=...`"
    with pytest.raises(TypeError, match=words):
        jp.find_masks({"kernel": jnp.ones((2, 2))}, 0.5, criterion=criterion)
