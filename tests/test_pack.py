"""Tests of pack and unpack: one bit a weight, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import Packed
from tests.helpers import assert_trees_equal

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 16), (3, 5), (2, 3, 11), (4, 0), (0, 4), (1, 300)]


def random_mask(shape):
    return jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_gives_back_every_bit_of_every_shape(shape):
    masks = {"w": random_mask(shape), "bias": None}
    packed = jp.pack(masks)
    assert packed["w"].shape == shape and packed["bias"] is None
    assert packed["w"].bits.dtype == jnp.uint8
    assert packed["w"].bits.size == int(np.prod(shape[:-1])) * -(-(shape or (1,))[-1] // 8)
    assert_trees_equal(jp.unpack(packed), masks)
    assert_trees_equal(jax.jit(lambda m: jp.unpack(jp.pack(m)))(masks), masks)


def test_the_first_weight_is_the_highest_bit():
    bits = jp.pack({"w": jnp.array([True, False, False, False, False, False, False, True, True])})
    assert bits["w"].bits.tolist() == [0b10000001, 0b10000000]


def test_what_is_packed_stays_packed_and_what_is_not_stays_unpacked():
    packed = jp.pack({"w": random_mask((3, 5))})
    assert_trees_equal(jp.pack(packed), packed)
    masks = {"w": random_mask((3, 5))}
    assert_trees_equal(jp.unpack(masks), masks)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 5)])
def test_a_batch_of_packed_masks_unpacks_to_a_batch_of_masks(shape):
    batch = {"w": random_mask((4, *shape))}
    packed = jax.vmap(jp.pack)(batch)
    assert packed["w"].shape == shape
    assert_trees_equal(jp.unpack(packed), batch)
    assert_trees_equal(jax.vmap(jp.unpack)(packed), batch)


def test_packed_masks_survive_a_scan():
    packed = jp.pack({"w": random_mask((3, 5))})

    def flip(packed, _):
        flipped = jp.pack(jax.tree.map(jnp.logical_not, jp.unpack(packed)))
        return flipped, packed

    last, history = jax.lax.scan(flip, packed, None, length=4)
    assert_trees_equal(last, packed)
    assert jp.unpack(history)["w"].shape == (4, 3, 5)


def test_packed_is_a_node_that_knows_its_shape():
    packed = jp.pack({"w": random_mask((3, 5))})["w"]
    assert isinstance(packed, Packed)
    assert isinstance(jax.tree.map(np.asarray, packed), Packed)
    assert len(jax.tree.leaves(packed)) == 1
