"""Tests of pack and unpack: one bit a weight, and back."""

import functools
import math
import pickle
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import Packed
from jaxprune._bits import axis_of, packed_axis, packed_shape
from tests.helpers import assert_trees_equal, with_old_bits

SHAPES = [(), (0,), (1,), (7,), (8,), (9,), (3, 16), (3, 5), (2, 3, 11), (4, 0), (0, 4), (1, 300)]
SHAPES += [(300, 1), (16, 3), (20, 24), (17, 300), (3, 3, 1, 32), (24, 4, 10), (16, 2, 3, 3)]


def random_mask(shape):
    return jnp.asarray(np.random.default_rng(0).random(shape) < 0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_gives_back_every_bit_of_every_shape(shape):
    masks = {"w": random_mask(shape), "bias": None}
    packed = jp.pack(masks)
    assert packed["w"].shape == shape and packed["bias"] is None
    assert packed["w"].bits.dtype == jnp.uint8
    assert packed["w"].bits.shape == jax.eval_shape(jp.pack, masks)["w"].bits.shape
    assert_trees_equal(jp.unpack(packed), masks)
    assert_trees_equal(jax.jit(lambda m: jp.unpack(jp.pack(m)))(masks), masks)
    anew = jax.jit(lambda packed: jp.pack(jp.unpack(packed)), donate_argnums=0)
    assert_trees_equal(anew(jax.tree.map(jnp.copy, packed)), packed)
    axis = packed_axis(shape)
    np.testing.assert_array_equal(
        packed["w"].bits, np.packbits(np.atleast_1d(masks["w"]), axis=axis)
    )


def test_the_first_weight_is_the_highest_bit():
    nine = jnp.array([True, False, False, False, False, False, False, True, True])
    assert jp.pack({"w": nine})["w"].bits.tolist() == [0b10000001, 0b10000000]
    rows = jp.pack({"w": jnp.broadcast_to(nine[:8, None], (8, 3))})
    assert rows["w"].bits.tolist() == [[0b10000001] * 3]


@pytest.mark.parametrize(
    "shape, bits",
    [
        ((784, 300), (98, 300)),  # the longest axis but the last
        ((768, 50257), (96, 50257)),
        ((50257, 768), (6283, 768)),  # a few bits more are no reason to pack the last axis
        ((24, 4096, 16384), (24, 512, 16384)),
        ((4096, 32, 128), (512, 32, 128)),  # shards of 32 heads would be no whole bytes
        ((32, 128, 4096), (32, 16, 4096)),
        ((512, 512, 3, 3), (512, 64, 3, 3)),  # the one nearest to the last among equals
        ((300, 1), (38, 1)),
        ((1, 300), (1, 38)),
        ((300,), (38,)),
        ((3, 3, 1, 32), (3, 3, 1, 4)),
        ((3, 3, 3, 64), (3, 3, 3, 8)),
        ((), (1,)),
    ],
)
def test_the_axis_is_long_and_the_last_only_where_that_saves(shape, bits):
    packed = jax.eval_shape(jp.pack, {"w": jax.ShapeDtypeStruct(shape, bool)})["w"]
    assert packed.bits.shape == bits
    if math.prod(shape) >= 64:
        assert math.prod(bits) * 8 <= 1.02 * math.prod(shape)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_mask_takes_at_most_an_eighth_more_than_the_fewest_bytes(rank):
    for shape in product((0, 1, 3, 7, 8, 9, 24, 65), repeat=rank):
        sizes = [math.prod(packed_shape(shape, axis)) for axis in range(-rank, 0)]
        assert min(sizes) <= sizes[packed_axis(shape)] <= min(sizes) * 9 / 8


def test_what_is_packed_stays_packed_and_what_is_not_stays_unpacked():
    packed = jp.pack({"w": random_mask((3, 5))})
    assert_trees_equal(jp.pack(packed), packed)
    masks = {"w": random_mask((3, 5))}
    assert_trees_equal(jp.unpack(masks), masks)


@pytest.mark.parametrize("shape", [(), (1,), (9,), (3, 5), (16, 3), (16, 2, 3, 3)])
def test_a_batch_of_packed_masks_unpacks_to_a_batch_of_masks(shape):
    batch = {"w": random_mask((4, *shape))}
    packed = jax.vmap(jp.pack)(batch)
    assert packed["w"].shape == shape
    assert_trees_equal(jp.unpack(packed), batch)
    assert_trees_equal(jax.vmap(jp.unpack)(packed), batch)
    assert_trees_equal(jax.vmap(jax.vmap(jp.unpack))(jax.tree.map(lambda x: x[None], packed)),
                       jax.tree.map(lambda x: x[None], batch))  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5), (16, 3)])
def test_packed_masks_survive_a_scan(shape):
    packed = jp.pack({"w": random_mask(shape)})

    def flip(packed, _):
        flipped = jp.pack(jax.tree.map(jnp.logical_not, jp.unpack(packed)))
        return flipped, packed

    last, history = jax.lax.scan(flip, packed, None, length=4)
    assert_trees_equal(last, packed)
    assert jp.unpack(history)["w"].shape == (4, *shape)


def test_packed_is_a_node_that_knows_its_shape():
    packed = jp.pack({"w": random_mask((3, 5))})["w"]
    assert isinstance(packed, Packed)
    assert isinstance(jax.tree.map(np.asarray, packed), Packed)
    assert len(jax.tree.leaves(packed)) == 1


# Bits along the last axis, which earlier versions wrote.


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4])
def test_the_shape_of_bits_tells_old_ones_from_new_ones(rank):
    rng, same, other = np.random.default_rng(0), 0, 0
    for shape in product((0, 1, 2, 7, 8, 9, 16), repeat=rank):
        new, old = (packed_shape(shape, axis) for axis in (packed_axis(shape), -1))
        assert axis_of((5, *new), shape) == packed_axis(shape)
        if new != old:
            assert axis_of((5, *old), shape) == -1
            other += 1
            continue
        same += 1  # one shape: then the bits are the same as well
        mask = np.atleast_1d(rng.random(shape) < 0.5)
        np.testing.assert_array_equal(
            np.packbits(mask, axis=packed_axis(shape)), np.packbits(mask, axis=-1)
        )
    assert same and (other or rank < 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_of_earlier_versions_are_read_and_packed_anew(shape):
    masks = {"w": random_mask(shape), "bias": None}
    packed = jp.pack(masks)
    old = with_old_bits(packed)
    assert_trees_equal(jp.unpack(old), masks)
    assert_trees_equal(jax.jit(jp.unpack)(old), masks)
    assert_trees_equal(jp.pack(old), packed)
    batch = {"w": random_mask((4, *shape))}
    stack = jax.vmap(jp.pack)(batch)
    assert_trees_equal(jp.unpack(with_old_bits(stack)), batch)
    assert_trees_equal(jax.vmap(jp.unpack)(with_old_bits(stack)), batch)
    assert_trees_equal(jp.pack(with_old_bits(stack)), stack)


PARAMS = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(16, 24)), jnp.float32)}
RAMP = jp.schedules.linear(0.75, begin=0, end=4, every=2)
PRUNERS = {
    "prune": functools.partial(jp.prune, schedule=RAMP),
    "hold": jp.hold,
    "rigl": functools.partial(jp.dynamic.rigl, sparsity=0.5, begin=0, end=9, every=2),
    "straight_through": functools.partial(jp.straight_through, schedule=RAMP),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_training_goes_on_from_a_state_of_an_earlier_version(name):
    tx = PRUNERS[name](optax.adam(0.1), packed=True)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    def train(params, state):
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    state = jp.with_masks(tx.init(PARAMS), jp.find_masks(PARAMS, 0.5))
    params, state = train(PARAMS, state)
    want = train(params, state)
    old = pickle.loads(pickle.dumps(with_old_bits(state)))
    got = train(params, old)
    assert_trees_equal((got[0], jp.get_masks(got[1])), (want[0], jp.get_masks(want[1])))
    anew = jp.with_masks(old, jp.get_masks(old))
    assert_trees_equal(anew, state)
    scanned = jax.lax.scan(lambda carry, _: (step(*carry), None), (params, anew), length=3)[0]
    assert_trees_equal(jp.get_masks(scanned[1]), jp.get_masks(want[1]))


def test_bits_that_hold_no_mask_of_their_shape_are_refused():
    wrong = {"w": Packed(jnp.zeros((4, 5), jnp.uint8), (16, 24))}
    words = r"mask of shape \(16, 24\) has bits of shape \(4, 5\), want \(2, 24\). Pack the mask"
    for use in (jp.unpack, jp.pack, jax.jit(jp.unpack)):
        with pytest.raises(ValueError, match=words):
            use(wrong)
