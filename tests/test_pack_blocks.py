"""Tests of masks of blocks as bits: one bit a block, in every state and on every way out of it."""

import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import scopes
from jaxprune.patterns import Blocks
from tests.helpers import FULL, assert_trees_equal, fast_if


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mask_of_blocks(shape, block, seed=0):
    """A random mask that is constant within blocks, the slow way."""
    counts = [-(-n // size) for n, size in zip(shape, block, strict=True)]
    units, at = np.random.default_rng(seed).random(counts) < 0.5, np.indices(shape)
    return units[tuple(at[i] // b for i, b in enumerate(block))]


# Packing by hand.

CASES = [
    ((8, 8), (8, 8), (1, 1)),
    ((1024, 1024), (8, 8), (16, 128)),
    ((10, 24), (4, 8), (1, 3)),  # the last block of ten rows has two
    ((5, 7), (8, 8), (1, 1)),  # one block, larger than the mask
    ((3, 20, 33), (1, 4, 8), (3, 1, 5)),  # layers of a stack
    ((3, 3, 32, 16), (1, 1, 8, 4), (3, 3, 1, 4)),
    ((64, 3), (1, 2), (8, 2)),
    ((1, 300), (2, 4), (1, 10)),
    ((12,), (2,), (1,)),
    ((0, 4), (2, 2), (0, 2)),
]


@pytest.mark.parametrize("shape, block, bits", CASES)
def test_unpack_gives_back_every_bit_of_every_block(shape, block, bits):
    mask = mask_of_blocks(shape, block)
    packed = jp.pack({"w": jnp.asarray(mask), "bias": None}, block=block)
    assert packed["w"].shape == shape and packed["w"].block == block
    assert packed["w"].bits.shape == bits and packed["bias"] is None
    np.testing.assert_array_equal(jp.unpack(packed)["w"], mask)


@pytest.mark.parametrize("shape, block", [((10, 24), (4, 8)), ((3, 20, 33), (1, 4, 8))])
def test_a_stack_of_masks_of_blocks_is_unpacked_as_a_stack(shape, block):
    mask = mask_of_blocks(shape, block)
    stack = np.stack([mask, mask_of_blocks(shape, block, seed=1)])
    stacked = jax.vmap(functools.partial(jp.pack, block=block))({"w": jnp.asarray(stack)})
    assert stacked["w"].shape == shape
    np.testing.assert_array_equal(jp.unpack(stacked)["w"], stack)
    np.testing.assert_array_equal(jax.vmap(jp.unpack)(stacked)["w"], stack)


def test_the_first_block_is_the_highest_bit():
    rows = jnp.array([True, True, False, False, True, True, True])  # the last has one row
    mask = jnp.broadcast_to(rows[:, None], (7, 6))
    packed = jp.pack({"w": mask}, block=(2, 3))
    assert packed["w"].bits.tolist() == [[0b10110000] * 2]


def test_blocks_of_one_weight_are_no_blocks_and_a_short_block_means_the_last_axes():
    mask = {"w": jnp.asarray(mask_of_blocks((2, 4, 6), (1, 2, 3)))}
    assert_trees_equal(jp.pack(mask, block=(1, 1)), jp.pack(mask))
    assert_trees_equal(jp.pack(mask, block=(2, 3)), jp.pack(mask, block=(1, 2, 3)))
    blocks = jp.pack(mask, block=(2, 3))
    assert_trees_equal(jp.pack(blocks), blocks)
    assert_trees_equal(pickle.loads(pickle.dumps(blocks)), blocks)


def test_masks_that_keep_a_part_of_a_block_are_refused_by_path():
    masks = {"a": {"w": jnp.ones((4, 4), bool).at[3, 3].set(False)}, "b": jnp.ones((4, 4), bool)}
    with pytest.raises(ValueError, match=r"a part of a block at 'a/w'. Pack them without `block`"):
        jp.pack(masks, block=(2, 2))
    with pytest.raises(ValueError, match=r"at least 3 axes, which 'a/w', 'b' lack"):
        jp.pack(masks, block=(1, 2, 2))
    wrong = {"w": jp.Packed(jnp.zeros((4, 5), jnp.uint8), (64, 16), (2, 2))}
    with pytest.raises(ValueError, match=r"\(64, 16\) in blocks of \(2, 2\) has bits of shape"):
        jp.unpack(wrong)


# How many bytes.


@pytest.mark.parametrize(
    "shape, share",
    [
        ((1024, 1024), 64),
        ((64, 8), 64),  # 1/64 wherever rows come in 64s and columns in 8s
        ((24, 4096, 16384), 64),
        ((768, 50257), 63),
        ((784, 300), 59),  # 98 rows of blocks are 13 bytes
    ],
)
def test_a_state_has_at_most_a_bit_for_48_weights_in_blocks_of_8_by_8(shape, share):
    tx = jp.prune(
        optax.sgd(0.1), schedule=jp.schedules.constant(0.5), pattern=Blocks((8, 8)), packed=True
    )
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    bits = jax.eval_shape(tx.init, params).masks["kernel"].bits
    weights = math.prod(shape)
    assert 8 * bits.size * share <= weights < 8 * bits.size * (share + 1)


@pytest.mark.optimized
def test_neither_an_event_nor_a_step_writes_a_mask_of_the_size_of_the_weights():
    n = 512
    params = {"kernel": jnp.ones((n, n))}
    make = functools.partial(jp.prune, optax.adam(0.1), schedule=WAVE)
    tx = make(pattern=Blocks((8, 8)), packed=True)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    program = step.lower(params, tx.init(params), params).compile(FULL)
    assert program.memory_analysis().temp_size_in_bytes < n * n / 2  # with bools it is 4.1 n^2
    written = "\n".join(_outside_of_fusions(program.as_text()))
    assert f"f32[{n},{n}]" in written
    assert f"pred[{n},{n}]" not in written and f"u8[{n},{n}]" not in written


def _outside_of_fusions(text):
    """The instructions of a program whose results are written to memory."""
    fused = False
    for line in text.splitlines():
        if line.endswith("{"):
            fused = "fused" in line.split("(")[0]
        elif " = " in line and not fused:
            yield line


# Training: what comes out is the same to the bit.

PARAMS = {
    "ragged": {"kernel": draw(10, 7, seed=1), "bias": draw(7, seed=2)},
    "layers": {"kernel": draw(3, 8, 12, seed=3)},
}
LAYOUT = jp.Layout(
    {
        "ragged/kernel": ("in", "out"),
        "layers/kernel": ("layer", "in", "out"),
        "ragged/bias": ("out",),
    }
)
# Falls, so that what was removed comes back.
WAVE = jp.schedules.custom(lambda t: jnp.where(t == 2, 0.3, 0.6), begin=0, end=4, every=2)
EVENTS = {"sparsity": 0.5, "begin": 0, "end": 4, "every": 2}
PRUNE = functools.partial(jp.prune, schedule=WAVE)
LAID = {"layout": LAYOUT, "pattern": Blocks((2, 4), axes=("out", "in"))}
WRAPPERS = {
    "per_leaf": functools.partial(PRUNE, pattern=Blocks((2, 4)), scope=scopes.per_leaf),
    "across": functools.partial(PRUNE, pattern=Blocks((3, 5)), scope=scopes.across),
    "windows": functools.partial(PRUNE, pattern=Blocks((4, 1)), scope=scopes.windows(2)),
    "per_output with a layout": functools.partial(PRUNE, **LAID, scope=scopes.per_output),
    "across with a layout": functools.partial(PRUNE, **LAID, scope=scopes.across),
    "a scope that sees layers": functools.partial(
        PRUNE, **LAID, scope=lambda units, s, within=None: scopes.per_leaf(units, s, within=within)
    ),
    "rigl": functools.partial(jp.dynamic.rigl, **EVENTS, pattern=Blocks((3, 4))),
    "set": lambda inner, packed: jp.dynamic.set(
        inner, key=jax.random.key(0), **EVENTS, pattern=Blocks((2, 2)), packed=packed
    ),
    "straight_through": functools.partial(
        jp.straight_through, schedule=WAVE, pattern=Blocks((2, 4))
    ),
}
FEWER = {  # windows of blocks take nothing ragged; others compile for long
    "windows": {"layers": PARAMS["layers"]},
    "across": {"ragged": PARAMS["ragged"]},
    "rigl": {"ragged": PARAMS["ragged"]},
    "straight_through": {"ragged": PARAMS["ragged"]},
}


def train(tx, params, steps=5):
    """A scan over donated states; params and masks after every step."""

    def step(carry, _):
        params, state = carry
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, jp.get_masks(state))

    start = jax.tree.map(jnp.copy, params), tx.init(params)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, length=steps), donate_argnums=0)
    (_, state), history = run(start)
    return state, history


def stored(state):
    return getattr(state, "masked", state).masks


SLOW = ("per_leaf", "across with a layout", "a scope that sees layers", "set")


@pytest.mark.parametrize("name", fast_if(lambda name: name not in SLOW, WRAPPERS))
def test_training_with_bits_of_blocks_is_that_with_bools(name):
    wrap, params = WRAPPERS[name], FEWER.get(name, PARAMS)
    _, want = train(wrap(optax.sgd(0.1), packed=False), params)
    state, got = train(wrap(optax.sgd(0.1), packed=True), params)
    assert_trees_equal(got, want)
    blocks = {m.block for m in jax.tree.leaves(stored(state), is_leaf=_is_packed)}
    assert all(blocks) == (name != "a scope that sees layers")
    removed = jp.sparsity(jp.get_masks(state), params)
    assert 0.3 < removed < 0.8, removed


def _is_packed(node):
    return isinstance(node, jp.Packed)


def test_seeds_side_by_side_have_masks_of_their_own():
    tx = jp.prune(
        optax.sgd(0.1),
        schedule=jp.schedules.constant(0.5),
        pattern=Blocks((2, 2)),
        packed=True,
    )
    seeds = {"kernel": draw(3, 8, 6)}
    states = jax.jit(jax.vmap(tx.init))(seeds)
    _, states = jax.jit(jax.vmap(tx.update))(seeds, states, seeds)
    assert states.masks["kernel"].bits.shape == (3, 1, 3)
    masks = jp.get_masks(states)["kernel"]
    for seed, mask in zip(seeds["kernel"], masks, strict=True):
        want = jp.find_masks({"kernel": seed}, 0.5, pattern=Blocks((2, 2)))["kernel"]
        np.testing.assert_array_equal(mask, want)


# Masks that are put in, held, looked at.

KERNEL = {"kernel": draw(16, 8), "bias": draw(8, seed=1)}
HALF = jp.schedules.constant(0.5, begin=0, end=0)
PATTERN = Blocks((4, 2))


PRUNER = jp.prune(optax.sgd(0.1, momentum=0.9), schedule=HALF, pattern=PATTERN, packed=True)


UNPACKED = jp.prune(optax.sgd(0.1, momentum=0.9), schedule=HALF, pattern=PATTERN)


def found(sparsity=0.25):
    return jp.find_masks(KERNEL, sparsity, pattern=PATTERN)


@functools.partial(jax.jit, static_argnums=0)
def one_step(tx, params, state):
    updates, state = tx.update(jax.tree.map(jnp.cos, params), state, params)
    return optax.apply_updates(params, updates), state


def test_full_masks_of_blocks_are_put_in_and_hold():
    state = one_step(PRUNER, KERNEL, PRUNER.init(KERNEL))[1]
    new = jp.with_masks(state, found())
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert new.masks["kernel"].bits.shape == (1, 4)
    assert_trees_equal(jp.get_masks(new), found())
    params, after = one_step(PRUNER, KERNEL, new)
    assert_trees_equal(jp.get_masks(after), found())
    assert not jp.check(params, after)
    columns = {"kernel": jnp.ones((1, 8), bool).at[0, :2].set(False), "bias": None}
    after = one_step(PRUNER, KERNEL, jp.with_masks(state, columns))[1]  # widened on the way
    assert not jp.get_masks(after)["kernel"][:, :2].any() and after.masks["kernel"].block == (4, 2)


def test_masks_of_weights_are_refused_where_a_state_has_a_bit_for_each_block():
    state, weights = one_step(PRUNER, KERNEL, PRUNER.init(KERNEL))[1], jp.find_masks(KERNEL, 0.5)
    words = r"keep a part of a block at 'kernel'.* the pattern of the optimizer, or make it with"
    with pytest.raises(ValueError, match=words):
        jp.with_masks(state, weights)
    traced = jax.jit(jp.with_masks)(state, weights)  # which cannot tell, and so loses nothing
    assert traced.masks["kernel"].block == ()
    assert_trees_equal(jp.get_masks(one_step(PRUNER, KERNEL, traced)[1]), weights)


def test_hold_keeps_the_blocks_of_masks_that_come_packed():
    packed = jp.pack(found(), block=(4, 2))
    tx = jp.hold(optax.sgd(0.1), masks=packed, packed=True)
    params, state = one_step(tx, KERNEL, tx.init(KERNEL))
    assert state.masks["kernel"].block == (4, 2)
    assert_trees_equal(jp.get_masks(state), found())
    assert not jp.check(params, state)
    unpacked = jp.hold(optax.sgd(0.1), masks=packed).init(KERNEL)
    assert_trees_equal(unpacked.masks, found())


@pytest.mark.parametrize("rows, block", [(8, (4, 2)), (6, ())])
def test_a_state_that_is_cut_keeps_its_blocks_where_the_cut_goes_between_them(rows, block):
    mask = jnp.asarray(mask_of_blocks((16, 8), (4, 2)))
    state = jp.with_masks(PRUNER.init(KERNEL), {"kernel": mask, "bias": None})
    state = state._replace(count=jnp.int32(1))
    gone = {"kernel": jnp.ones((16, 1), bool).at[: 16 - rows].set(False), "bias": None}
    small = {**KERNEL, "kernel": KERNEL["kernel"][16 - rows :]}
    for tx in (PRUNER, jp.hold(optax.sgd(0.1, momentum=0.9), packed=True)):
        cut = jp.shrink_state(tx, state, KERNEL, gone)
        assert cut.masks["kernel"].shape == (rows, 8) and cut.masks["kernel"].block == block
        after = one_step(tx, small, cut)[1]
        np.testing.assert_array_equal(jp.get_masks(after)["kernel"], mask[16 - rows :])


def test_a_state_that_is_compacted_has_bits_of_weights_since_nothing_in_it_is_removed():
    params, fn = {"a": draw(32, 32)}, lambda p, x: jnp.tanh(x @ p["a"])
    masks = jp.find_masks(params, 0.5, pattern=Blocks((8, 8)), scope=scopes.per_output)
    tx = jp.hold(optax.sgd(0.1, momentum=0.9), masks=jp.pack(masks, block=(8, 8)), packed=True)
    _, sparse = jp.compact(fn, params, masks, only="a")
    state = jp.compact_state(jp.hold(optax.sgd(0.1, momentum=0.9), packed=True),
                             tx.init(params), params, masks, only="a")  # fmt: skip
    assert state.masks["a"].shape == sparse["a"].shape and state.masks["a"].block == ()
    assert jp.unpack(state.masks)["a"].all()


# Files.


def test_what_was_saved_with_a_bit_a_weight_comes_back_with_a_bit_a_block(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    states = {"blocks": jp.with_masks(PRUNER.init(KERNEL), found())}
    states["weights"] = states["blocks"]._replace(masks=jp.pack(found()))
    states["bools"] = jp.with_masks(UNPACKED.init(KERNEL), found())
    for name, state in states.items():
        jp.checkpoint.save_run(tmp_path / name, 0, state)
    for name in states:
        assert_trees_equal(
            jp.checkpoint.restore_run(tmp_path / name, PRUNER.init(KERNEL)), states["blocks"]
        )
    assert_trees_equal(
        jp.checkpoint.restore_run(tmp_path / "blocks", states["weights"]), states["weights"]
    )
    torn = states["weights"]._replace(masks=jp.pack(jp.find_masks(KERNEL, 0.5)))
    jp.checkpoint.save_run(tmp_path / "torn", 0, torn)
    with pytest.raises(ValueError, match=r"\(16, 8\) keeps a part of a block.*bit for each weight"):
        jp.checkpoint.restore_run(tmp_path / "torn", PRUNER.init(KERNEL))
    assert_trees_equal(jp.checkpoint.restore_run(tmp_path / "torn", states["weights"]), torn)


def test_a_state_with_bits_of_weights_goes_on_with_them():
    """One of an earlier version, whose masks need not be constant within blocks."""
    weights = jp.find_masks(KERNEL, 0.5)
    old = PRUNER.init(KERNEL)._replace(masks=jp.pack(weights), count=jnp.int32(5))
    after = pickle.loads(pickle.dumps(old))
    for _ in range(2):
        _, after = one_step(PRUNER, KERNEL, after)
    assert jax.tree.structure(after) == jax.tree.structure(old)
    assert_trees_equal(jp.get_masks(after), weights)


def test_flax_writes_the_block_and_reads_bytes_from_before_there_was_one():
    state = jp.with_masks(PRUNER.init(KERNEL), found())
    back = serialization.from_bytes(PRUNER.init(KERNEL), serialization.to_bytes(state))
    assert_trees_equal(back, state)
    assert set(serialization.to_state_dict(state.masks["kernel"])) == {"bits", "shape", "block"}
    weights = jp.pack(found())
    assert set(serialization.to_state_dict(weights["kernel"])) == {"bits", "shape"}


def test_exported_functions_take_blocks():
    pytest.importorskip("flatbuffers")
    packed = jp.pack(found(), block=(4, 2))
    exported = jax.export.export(jax.jit(jp.unpack))(packed)
    again = jax.export.deserialize(bytearray(exported.serialize()))
    assert again.in_tree == jax.tree.structure(((packed,), {}))
    assert_trees_equal(again.call(packed), jp.unpack(packed))


# Over a mesh, where bits lie with their weights; trainings are in the contract tests.


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "shape, block, spec, bits",
    [
        ((256, 24), (4, 8), P("x"), (1, 3)),  # 32 rows a device are a byte of blocks
        ((64, 64), (4, 8), P(None, "x"), (2, 1)),
        ((16, 24), (4, 8), P("x"), (1, 3)),  # two rows a device are less than a block
        ((40, 10), (4, 4), P("x"), (2, 3)),
    ],
)
def test_masks_over_a_mesh_are_packed_where_they_lie(shape, block, spec, bits, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    mask = mask_of_blocks(shape, block)
    with jax.set_mesh(mesh):
        placed = {"w": jax.device_put(mask, NamedSharding(mesh, spec))}
        packed = jax.jit(functools.partial(jp.pack, block=block))(placed)
        array = packed["w"].bits
        if axis_type is AxisType.Explicit:  # with automatic ones the compiler chooses
            assert array.sharding.shard_shape(array.shape) == bits
        np.testing.assert_array_equal(jax.jit(jp.unpack)(packed)["w"], mask)
        np.testing.assert_array_equal(jp.unpack(packed)["w"], mask)
