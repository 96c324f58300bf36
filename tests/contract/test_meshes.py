"""Laws 8 and 9 for every wrapper on a mesh of two axes, however the weights are cut over it."""

import functools
import math
import re
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import patterns, scopes
from jaxprune._ranking import _tally, count_true
from tests.contract import laws, sharded
from tests.helpers import FULL, TraceCount, assert_trees_equal, fast_if

AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
NAMES = sharded.NAMES
LAYOUTS = ("fsdp", "tensor", "grid")


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), sharded.NAMES, axis_types=(axis_type,) * 2)


def assert_lie_like(masks, params):
    """Each axis of a mask is cut as that of its weights; of bits, where shards are whole ones."""

    def check(param, mask):
        if mask is None:
            return
        packed = isinstance(mask, jp.Packed)
        array = mask.bits if packed else mask
        block = (packed and mask.block) or (1,) * len(mask.shape)
        spec = [*param.sharding.spec, *[None] * param.ndim]
        cut = P(*(s if n > 1 else None for s, n in zip(spec, mask.shape, strict=False)))
        want = NamedSharding(param.sharding.mesh, cut).shard_shape(mask.shape)
        got = array.sharding.shard_shape(array.shape)
        for axis, (n, part) in enumerate(zip(want, got, strict=True)):
            in_bytes = array.shape[axis] != -(-mask.shape[axis] // block[axis])
            share = 8 * block[axis] if in_bytes else block[axis]  # weights that share an entry
            assert part == n // share or n % share, (axis, array.sharding, param.sharding)

    jax.tree.map(check, params, masks, is_leaf=lambda x: x is None)


def stored_masks(state):
    (node,) = (n for n in jax.tree.leaves(state, is_leaf=_is_pruner) if _is_pruner(n))
    return node.masks


def _is_pruner(node):
    return isinstance(node, jp.PruneState)


def train(name, params, check=lambda masks, params: None):
    """Take a few donated steps in one trace; weights and masks after each, in NumPy."""
    tx = sharded.WRAPPERS[name](optax.sgd(0.25, momentum=0.5))
    state = sharded.start(tx, params, name)
    check(stored_masks(state), params)
    check(stored_masks(jax.jit(tx.init)(params)), params)
    counted = TraceCount(functools.partial(sharded.step, tx))
    step = jax.jit(counted, donate_argnums=(0, 1))
    history = []
    for _ in range(sharded.STEPS):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        params, state = step(params, state)
        laws.closed(shapes, state)
        check(stored_masks(state), params)
        history.append(jax.tree.map(np.asarray, (params, jp.get_masks(state))))
    assert counted.count == 1
    return history


@functools.cache
def on_one_device(name):
    return train(name, jax.tree.map(jnp.array, sharded.network()))


QUICK = [
    ("magnitude", "fsdp", AxisType.Auto),
    ("taylor across, packed", "grid", AxisType.Explicit),
    ("windows", "tensor", AxisType.Explicit),
    ("blocks, packed", "fsdp", AxisType.Explicit),
    ("rigl", "tensor", AxisType.Explicit),
]
SLOW = [
    (name, layout, axis_type)
    for name in sharded.WRAPPERS
    for layout in sharded.LAYOUTS
    for axis_type in AXIS_TYPES
    if (name, layout, axis_type) not in QUICK
]


@pytest.mark.parametrize(
    ("name", "layout", "axis_type"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_weights_cut_over_a_mesh_train_as_on_one_device(name, layout, axis_type):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        got = train(name, sharded.place(sharded.network(), mesh, layout), assert_lie_like)
    assert_trees_equal(got, on_one_device(name))


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_what_is_done_with_masks_is_done_on_a_mesh(axis_type):
    """Applied, combined, counted, compared, packed, summed up; searched for within others."""
    mesh = mesh_of(axis_type)
    alone = jax.tree.map(jnp.array, sharded.network())

    def use(params):
        first = jp.find_masks(params, 0.5, scope=scopes.across)
        other = jp.find_masks(params, 0.5, pattern=patterns.Channels(-1), within=first)
        both = jp.combine_masks(first, other)
        told = jp.sparsity(both, params), jp.overlap(first, both), str(jp.summary(params, both))
        masked = jp.apply_masks(params, jp.unpack(jp.pack(both)))
        rounds = jp.find_masks(params, 0.7, rounds=3, scope=scopes.across)
        levels = [level.masks for level in jp.imp(params, lambda p, m: p, rounds=2)]
        return told, jax.tree.map(np.asarray, (first, other, both, masked, rounds, levels))

    with jax.set_mesh(mesh):
        params = sharded.place(sharded.network(), mesh, "grid")
        told, got = use(params)
        assert_lie_like(jp.find_masks(params, 0.5), params)
        assert_lie_like(jp.dense_masks(params), params)
    told_alone, want = use(alone)
    assert told == told_alone
    assert_trees_equal(got, want)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_channels_of_a_network_on_a_mesh_are_coupled_and_cut(axis_type):
    mesh = mesh_of(axis_type)
    net = lambda p, x: (
        jax.nn.relu(x @ p["in"]["kernel"] + p["in"]["bias"][None]) @ p["out"]["kernel"]
    )
    x = jnp.ones((2, 16))
    alone = jax.tree.map(jnp.array, sharded.network())
    groups = jp.find_groups(net, alone, x)
    find = functools.partial(jp.find_masks, sparsity=0.5, pattern=patterns.Coupled(groups))
    want = find(alone)
    with jax.set_mesh(mesh):
        params = sharded.place(sharded.network(), mesh, "tensor")
        masks = find(params)
        assert_trees_equal(jax.tree.map(np.asarray, masks), jax.tree.map(np.asarray, want))
    _, small_params = jp.shrink(net, alone, want)
    assert small_params["in"]["kernel"].shape == (16, 4)


# What travels between devices.

COLLECTIVE = re.compile(
    r"= (?P<result>\(?[^=]*?\)?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|"
    r"collective-broadcast|reduce-scatter|ragged-all-to-all)(?:-start)?\("
)
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4}


def travelling(compiled):
    """The kind and the bytes of every collective of a compiled program."""
    found = []
    for match in COLLECTIVE.finditer(compiled.as_text()):
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
        size = sum(
            BYTES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
            for dtype, dims in shapes
        )
        found.append((match["kind"], size))
    return found


@pytest.mark.optimized
def test_collectives_are_found_where_there_are_some():
    mesh = mesh_of()
    x = jax.device_put(jnp.ones((8, 128)), NamedSharding(mesh, P(None, "model")))
    total = jax.jit(jnp.sum).lower(x).compile(FULL)
    assert travelling(total) == [("all-reduce", 4)]
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P())).lower(x).compile(FULL)
    assert travelling(whole) == [("all-gather", 8 * 128 * 4)]


WIDE = {"in": {"kernel": (1024, 2048), "bias": (2048,)}, "out": {"kernel": (2048, 512)}}


def shapes(mesh, layout, dtype=jnp.float32):
    return jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec)),
        WIDE,
        sharded.LAYOUTS[layout],
        is_leaf=lambda x: isinstance(x, tuple),
    )


@pytest.mark.optimized
@pytest.mark.parametrize(
    "scope, layout, axis_type",
    fast_if(  # every two of them meet
        lambda scope, layout, axis_type: (
            (scope is scopes.across) ^ LAYOUTS.index(layout) % 2 ^ (axis_type is AxisType.Auto)
        ),
        product([scopes.across, scopes.per_leaf], LAYOUTS, AXIS_TYPES),
    ),
)
def test_a_ranking_over_a_mesh_moves_nothing_but_counts(scope, layout, axis_type):
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        find = jax.jit(lambda p: jp.find_masks(p, 0.5, scope=scope))
        compiled = find.lower(shapes(mesh, layout)).compile(FULL)
    moved = travelling(compiled)
    assert moved and {kind for kind, _ in moved} == {"all-reduce"}
    assert max(size for _, size in moved) <= 256
    # What a device needs beside its part: a byte a unit to count, one to compare.
    part = sum(np.prod(WIDE[name]["kernel"]) for name in WIDE) / (4 if layout == "tensor" else 8)
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * part + 100_000


@pytest.mark.optimized
@pytest.mark.parametrize("layout", ["fsdp", "grid"])
def test_an_event_of_a_training_step_moves_nothing_but_counts(layout):
    mesh = mesh_of()
    tx = jp.prune(optax.adam(0.1), schedule=sharded.RAMP, scope=scopes.across)
    params = shapes(mesh, layout)
    state = jax.eval_shape(tx.init, params)
    state = jax.jit(tx.init).lower(params).compile(FULL).output_shardings, state
    state = jax.tree.map(
        lambda cut, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=cut), *state
    )
    step = jax.jit(functools.partial(sharded.step, tx)).lower(params, state).compile(FULL)
    assert {kind for kind, _ in travelling(step)} == {"all-reduce"}
    assert max(size for _, size in travelling(step)) <= 256


CUTS = [
    ((4, 64, 24), P(None, "data", None)),
    ((4, 64, 24), P("data", None, None)),
    ((4, 64, 24), P(None, NAMES, None)),
    ((64, 24), P("data", None)),
    ((64, 24), P(None, "model")),
    ((64, 24), P("data", "model")),
    ((64, 4, 24), P("data", "model", None)),
    ((3, 3, 64, 24), P(None, None, "model", "data")),
    ((64, 1), P("data", None)),
    ((1, 64), P(None, "model")),
    ((64,), P(NAMES)),
]


@pytest.mark.optimized
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("shape, spec", CUTS)
def test_packing_and_unpacking_over_a_mesh_moves_nothing(shape, spec, axis_type):
    mesh = mesh_of(axis_type)
    mask = np.random.default_rng(0).random(shape) < 0.5
    masks = {"w": jax.device_put(mask, NamedSharding(mesh, spec))}
    with jax.set_mesh(mesh):
        pack = jax.jit(jp.pack).lower(masks).compile(FULL)
        packed = pack(masks)
        unpack = jax.jit(jp.unpack).lower(packed).compile(FULL)
    assert_lie_like(packed, masks)
    assert_lie_like(unpack(packed), masks)
    assert travelling(pack) == travelling(unpack) == []
    np.testing.assert_array_equal(unpack(packed)["w"], mask)


@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize(
    "shape, spec", [((16, 24), P(NAMES)), ((8, 4), P("model")), ((12,), P("model"))]
)
def test_shards_that_are_no_whole_bytes_are_packed_as_well(shape, spec, axis_type):
    mesh = mesh_of(axis_type)
    mask = np.random.default_rng(0).random(shape) < 0.5
    masks = {"w": jax.device_put(mask, NamedSharding(mesh, spec))}
    with jax.set_mesh(mesh):
        for pack, unpack in ((jp.pack, jp.unpack), (jax.jit(jp.pack), jax.jit(jp.unpack))):
            np.testing.assert_array_equal(unpack(pack(masks))["w"], mask)


@pytest.mark.optimized
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
@pytest.mark.parametrize("shape, spec", [CUTS[0], CUTS[1], CUTS[2], CUTS[5], CUTS[6], CUTS[10]])
def test_counting_beyond_a_word_over_a_mesh_moves_nothing_but_counts(
    shape, spec, axis_type, monkeypatch
):
    mesh = mesh_of(axis_type)
    monkeypatch.setattr(_tally, "MOST", math.prod(shape) // 3)
    mask = np.random.default_rng(0).random(shape) < 0.5
    placed = jax.device_put(mask, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        count = functools.partial(count_true)  # traced anew, for the lower limit
        compiled = jax.jit(count).lower(placed).compile(FULL)
    assert int(compiled(placed)) == mask.sum()
    assert {kind for kind, _ in travelling(compiled)} == {"all-reduce"}
    assert max(size for _, size in travelling(compiled)) <= 4 * max(shape)


@pytest.mark.parametrize("scope", [scopes.across, scopes.per_leaf])
def test_layers_of_one_shape_that_are_cut_differently_are_ranked_as_on_one_device(scope):
    rng = np.random.default_rng(5)
    specs = [
        P("data", None),
        P(None, "model"),
        P("data", "model"),
        P(None, None),
        P("model", "data"),
    ]
    layers = {
        f"layer_{i}": {"kernel": rng.choice([0.0, 1.0, -2.0, 3.0], (64, 48)).astype(np.float32)}
        for i in range(len(specs))
    }
    alone = jp.find_masks(layers, 0.6, scope=scope)
    mesh = mesh_of()
    cut = {
        name: {"kernel": jax.device_put(layer["kernel"], NamedSharding(mesh, spec))}
        for (name, layer), spec in zip(layers.items(), specs, strict=True)
    }
    for masks in (
        jp.find_masks(cut, 0.6, scope=scope),
        jax.jit(lambda p: jp.find_masks(p, 0.6, scope=scope))(cut),
    ):
        jax.tree.map(np.testing.assert_array_equal, masks, alone)
