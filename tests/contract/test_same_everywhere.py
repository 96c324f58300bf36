"""Law 9: replicas agree, and sharded trees give the masks of one device. On eight CPU devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.contract import laws
from tests.contract.trainings import TRAININGS
from tests.helpers import FULL, assert_trees_equal

DEVICES = 8
STEPS = 4
RAMP = schedules.linear(0.75, begin=0, end=3, every=1)
SETTINGS = {
    "magnitude per leaf": {},
    "taylor across": {"criterion": criteria.taylor, "scope": scopes.across},
    "random channels": {
        "criterion": criteria.random,
        "key": jax.random.key(1),
        "pattern": patterns.Channels(-1),
    },
    "windows, packed": {"scope": scopes.windows(4), "packed": True},
}


def pruner(name, inner):
    if name in TRAININGS:
        return TRAININGS[name](inner)
    return jp.prune(inner, schedule=RAMP, **SETTINGS[name])


def network():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.integers(-64, 65, shape) / 64, jnp.float32)
    return {"in": {"kernel": draw(16, 8), "bias": draw(8)}, "out": {"kernel": draw(8, 8)}}


def data():
    rng = np.random.default_rng(4)
    return jnp.asarray(rng.integers(-2, 3, (DEVICES * 2, 16)), jnp.float32)


def loss(params, x):
    hidden = jax.nn.relu(x @ params["in"]["kernel"] + params["in"]["bias"][None])
    return jnp.mean((hidden @ params["out"]["kernel"] - 1.0) ** 2)


def on_one_device(tx):
    params, state = network(), tx.init(network())

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params, data()), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(STEPS):
        params, state = step(params, state)
    return params, jp.get_masks(state)


def mesh_of(axis_type):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(axis_type,))


def assert_close(got, want):
    for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "taylor across",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (*SETTINGS, *TRAININGS)
            if name != "taylor across"
        ),
    ],
)
def test_replicas_under_pmap_agree_with_one_another_and_with_one_device(name):
    tx = pruner(name, optax.sgd(0.05, momentum=0.9))
    want_params, want_masks = on_one_device(tx)

    @functools.partial(jax.pmap, axis_name="data")
    def step(params, state, x):
        grads = jax.lax.pmean(jax.grad(loss)(params, x), "data")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), network())
    state = jax.pmap(tx.init)(params)
    x = data().reshape(DEVICES, 2, 16)
    for _ in range(STEPS):
        params, new = step(params, state, x)
        laws.closed(state, new)
        state = new
    masks = jp.get_masks(state)
    for i in range(DEVICES):
        assert_trees_equal(jax.tree.map(lambda m: m[i], masks), want_masks)  # noqa: B023
    assert_close(jax.tree.map(lambda p: p[0], params), want_params)


QUICK = [("taylor across", True), ("windows, packed", False), ("rigl", True)]


@pytest.mark.parametrize(
    ("name", "check_vma"),
    [
        *QUICK,
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product([*SETTINGS, *TRAININGS], [True, False])
            if case not in QUICK
        ),
    ],
)
def test_replicas_under_shard_map_agree_with_one_device(name, check_vma):
    tx = pruner(name, optax.sgd(0.05, momentum=0.9))
    want_params, want_masks = on_one_device(tx)

    def step(params, state, x):
        if check_vma:  # gradients of the averaged loss are averaged themselves
            grads = jax.grad(lambda p: jax.lax.pmean(loss(p, x), "data"))(params)
        else:
            grads = jax.lax.pmean(jax.grad(loss)(params, x), "data")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(P(), P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    params, state = network(), tx.init(network())
    for _ in range(STEPS):
        params, new = step(params, state, data())
        laws.closed(state, new)
        state = new
    assert_trees_equal(jp.get_masks(state), want_masks)
    assert_close(params, want_params)


def sharded(tree, mesh):
    """Cut every leaf along its first axis."""
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), tree)


FINDERS = {
    "per leaf": {},
    "across": {"scope": scopes.across},
    "windows": {"scope": scopes.windows(4)},
    "channels in": {"pattern": patterns.Channels(0), "scope": scopes.across},
    "channels out": {"pattern": patterns.Channels(-1)},
    "blocks": {"pattern": patterns.Blocks((2, 2)), "scope": scopes.across},
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", FINDERS)
def test_a_sharded_tree_gives_the_masks_of_one_device(name, axis_type):
    params = network()
    sparsity = 0.75 if name == "windows" else 0.7  # what windows of four can have
    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        masks = jp.find_masks(sharded(params, mesh), sparsity, **FINDERS[name])
        masks = jax.tree.map(np.asarray, masks)
    assert_trees_equal(masks, jp.find_masks(params, sparsity, **FINDERS[name]))


@pytest.mark.optimized
@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across])
def test_a_sharded_ranking_gathers_nothing_but_scalars(scope):
    mesh = mesh_of(AxisType.Auto)
    params = sharded({"a": jnp.ones((64, 32)), "b": jnp.ones((32, 64))}, mesh)
    find = jax.jit(lambda p: jp.find_masks(p, 0.5, scope=scope))
    text = find.lower(params).compile(FULL).as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_masks_keep_the_sharding_of_their_parameter_through_training(scope, axis_type):
    mesh = mesh_of(axis_type)
    tx = jp.prune(optax.sgd(0.0625), schedule=RAMP, scope=scope)
    params = sharded(network(), mesh)
    with jax.set_mesh(mesh):
        state = tx.init(params)
        for p, m in zip(
            jax.tree.leaves(jp.prunable(params)), jax.tree.leaves(state.masks), strict=True
        ):
            assert m.sharding.is_equivalent_to(p.sharding, p.ndim)

        @jax.jit
        def step(params, state):
            updates, state = tx.update(params, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(STEPS):
            params, new = step(params, state)
            laws.closed(state, new)
            for a, b in zip(*map(jax.tree.leaves, (state.masks, new.masks)), strict=True):
                assert a.sharding.is_equivalent_to(b.sharding, b.ndim)
            state = new
        masks = jax.tree.map(np.asarray, jp.get_masks(state))
    assert jp.sparsity(masks, network()) == 0.75


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        ("rigl", AxisType.Auto),
        ("rigl", AxisType.Explicit),
        pytest.param("set", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("set", AxisType.Explicit, marks=pytest.mark.slow),
        pytest.param("straight_through", AxisType.Auto, marks=pytest.mark.slow),
        ("straight_through", AxisType.Explicit),
    ],
)
def test_sparse_training_of_a_sharded_tree_gives_the_masks_of_one_device(name, axis_type):
    tx = TRAININGS[name](optax.sgd(0.0625, momentum=0.5))

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: p * p - 0.25, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(params):
        state = tx.init(params)
        for _ in range(STEPS):
            params, new = step(params, state)
            laws.closed(state, new)
            state = new
        return jax.tree.map(np.asarray, (params, jp.get_masks(state)))

    mesh = mesh_of(axis_type)
    with jax.set_mesh(mesh):
        params, masks = train(sharded(network(), mesh))
    want_params, want_masks = train(network())
    assert_trees_equal(masks, want_masks)
    assert_close(params, want_params)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_masks_of_sharded_params_are_packed_and_applied(axis_type):
    mesh = mesh_of(axis_type)
    params = sharded(network(), mesh)
    with jax.set_mesh(mesh):
        dense = jp.dense_masks(params)
        assert_trees_equal(jp.unpack(jp.pack(dense)), jp.dense_masks(network()))
        masks = jp.find_masks(params, 0.5)
        laws.zero(jp.apply_masks(params, masks), masks)
        assert jp.sparsity(masks, params) == 0.5


@pytest.mark.parametrize(
    "name",
    [
        "magnitude per leaf",
        "rigl",
        pytest.param("set", marks=pytest.mark.slow),
        pytest.param("straight_through", marks=pytest.mark.slow),
        pytest.param("windows, packed", marks=pytest.mark.slow),
    ],
)
def test_a_seed_on_each_device_of_shard_map_trains_as_it_would_alone(name):
    """Params that differ from device to device, and are known to (`check_vma`)."""
    tx = pruner(name, optax.sgd(0.0625))
    seeds = jax.tree.map(lambda p: jnp.stack([p + i / 8 for i in range(DEVICES)]), network())

    def train(params):
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(params, data()), state, params)
            params = optax.apply_updates(params, updates)
        return jp.get_masks(state)

    def one_each(seeds):
        masks = train(jax.tree.map(lambda p: p[0], seeds))
        return jax.tree.map(lambda m: m[None], masks)

    mesh = jax.make_mesh((DEVICES,), ("seed",), axis_types=(AxisType.Auto,))
    spread = jax.shard_map(one_each, mesh=mesh, in_specs=P("seed"), out_specs=P("seed"))
    assert_trees_equal(jax.jit(spread)(seeds), jax.jit(jax.vmap(train))(seeds))
