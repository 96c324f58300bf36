"""Tests of the check that everything with a sparsity shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

W = {"layer": {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)}}


@pytest.mark.parametrize("bad", [-0.1, 1.1, 90, float("nan"), float("inf")])
def test_what_is_no_fraction_is_refused_with_its_value(bad):
    with pytest.raises(ValueError, match=rf"got {bad:g}, outside \[0, 1\].*0.9 keeps a tenth"):
        jp.find_masks(W, bad)
    with pytest.raises(ValueError, match=rf"got {bad:g}, outside \[0, 1\]"):
        jp.make_masks(W, bad)


def test_all_bad_leaves_of_a_tree_are_named_together():
    with pytest.raises(ValueError, match=r"got 1.5 at 'a/b', -2 at 'c', outside"):
        jp.find_masks(W, {"a": {"b": 1.5}, "c": -2.0, "d": 0.5})


@pytest.mark.parametrize("bad", ["0.9", jnp.array([0.5, 0.5]), np.ones(3), 1j])
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(TypeError, match=r"`sparsity` got .*Pass the fraction to remove"):
        jp.find_masks(W, bad)


@pytest.mark.parametrize("good", [0, 1, 0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5)])
def test_numbers_of_any_make_will_do(good):
    assert jp.sparsity(jp.find_masks(W, good), W) == float(good)


def test_traced_sparsities_pass_unseen():
    masks = jax.jit(lambda s: jp.find_masks(W, s))(0.5)
    assert jp.sparsity(masks, W) == 0.5
