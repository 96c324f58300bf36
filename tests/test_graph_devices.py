"""Networks on several devices: named axes, shards, explicit meshes; what the cut one computes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.patterns import Coupled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"w": draw(0, 4, 12), "b": draw(1, 12), "v": draw(2, 12, 3)}
X = draw(3, 8, 4)
LAYOUT = {"w": P(None, "model"), "b": P("model"), "v": P("model", None)}


def some(groups, like, keep):
    """Masks that keep the first units of every group."""
    first = {group.name: np.arange(group.size) < keep for group in groups}
    return Coupled(groups).expand(first, like=like)


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


def reshard_like(mesh, tree, specs):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


# What shard_map does on each device.


def columns(p, x):
    """Hidden units on one mesh axis, the batch on the other."""
    return lax.psum(jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"], "model")


def averages(p, x):
    """Statistics over the batch, which is on all devices; constants that are the same on each."""
    h = x @ p["w"] + p["b"][None]
    mean, top = lax.pmean(h.mean(0), "data"), lax.pmax(jnp.abs(h).max(0), "data")
    h = jax.nn.gelu((h - mean[None]) / (1 + top[None])) * (1 + lax.axis_index("data"))
    return h[:, jnp.arange(11, -1, -1)][:, ::-1] @ p["v"]


def gathers(p, x):
    """Hidden units made apart and looked at together."""
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    h = lax.all_gather(h, "model", axis=1, tiled=True)
    h = h + lax.ppermute(h, "data", [(i, (i + 1) % 4) for i in range(4)])
    return h @ lax.all_gather(p["v"], "model", axis=0, tiled=True)


BATCH = P("data", None)
MAPS = {
    "columns": (columns, LAYOUT, True, 6),
    "columns, unchecked": (columns, LAYOUT, False, 6),
    "averages": (averages, dict.fromkeys(PARAMS, P()), True, 12),
    "gathers": (gathers, LAYOUT, False, 6),
}


QUICK = (("gathers", AxisType.Explicit),)


@pytest.mark.parametrize(
    "name, kind",
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(MAPS, (AxisType.Auto, AxisType.Explicit))
    ],
)
def test_what_shard_map_does_is_cut_on_every_device_alike(name, kind):
    device, specs, check, units = MAPS[name]
    mesh = make_mesh(kind)
    fn = jax.shard_map(device, mesh=mesh, in_specs=(specs, BATCH), out_specs=BATCH, check_vma=check)
    params, x = PARAMS, X
    if kind == AxisType.Explicit:
        params, x = reshard_like(mesh, PARAMS, specs), reshard_like(mesh, X, BATCH)
    (group,) = groups = jp.find_groups(fn, params, x)
    assert group.size == units and group.exact and len(group.members) == 3
    masks = some(groups, params, units // 2)
    assert jp.verify_shrink(fn, params, masks, x) < 1e-6
    small_fn, small = jp.shrink(fn, params, masks)
    assert jax.tree.map(jnp.shape, small) == {"w": (4, 6), "b": (6,), "v": (6, 3)}
    assert 2 * jp.count_flops(small_fn, small, x) == jp.count_flops(fn, params, x)
    if name == "columns":
        loss = lambda fn: lambda p: jnp.sum(jax.jit(fn)(p, x) ** 2)
        with jax.set_mesh(mesh):
            grads = jax.grad(loss(fn))(jp.apply_masks(params, masks))
            got = jax.grad(loss(small_fn))(small)
        assert_close(got, jp.shrink(fn, grads, masks)[1])


def assert_close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_one_index_for_each_device_cannot_go():
    mesh = make_mesh(AxisType.Auto)
    fn = jax.shard_map(columns, mesh=mesh, in_specs=(LAYOUT, BATCH), out_specs=BATCH)
    params = {"w": draw(0, 4, 2), "b": draw(1, 2), "v": draw(2, 2, 3)}
    groups = jp.find_groups(fn, params, X)
    assert not groups and "leaves one index of it to each device" in str(groups)


def scatters(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    return lax.psum_scatter(h, "data", scatter_dimension=1, tiled=True) @ p["v"][:3]


def trades(p, x):
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    return lax.all_to_all(h, "data", 1, 0, tiled=True) @ p["v"][:3]


@pytest.mark.parametrize("device, name", [(scatters, "reduce_scatter"), (trades, "all_to_all")])
def test_channels_that_are_dealt_out_to_devices_stay_whole_with_the_reason(device, name):
    fn = jax.shard_map(
        device, mesh=make_mesh(AxisType.Auto), in_specs=(P(), BATCH), out_specs=P(), check_vma=False
    )
    groups = jp.find_groups(fn, PARAMS, X)
    why = {(path, axis): reason for path, axis, _, reason in groups.frozen}
    assert f"`{name}` at test_graph_devices.py" in why["w", 1]


# Explicit mesh axes outside of shard_map.


def out(h, p):
    return jnp.dot(h, p["v"], out_sharding=P("data", None))


def dense(p, x):
    return out(jax.nn.relu(x @ p["w"] + p["b"][None]), p)


def resharded(p, x):
    h = jax.sharding.reshard(jax.nn.relu(x @ p["w"] + p["b"][None]), P("data", None))
    return jnp.dot(h, jax.sharding.reshard(p["v"], P(None, None)), out_sharding=P("data", None))


def reshaped(p, x):
    h = jnp.broadcast_to(p["b"][None], (8, 12), out_sharding=P("data", "model")) + x @ p["w"]
    h = jax.nn.relu(h).reshape(8, 2, 6, out_sharding=P("data", "model", None))
    return out(h.reshape(8, 12, out_sharding=P("data", "model")), p)


@pytest.mark.parametrize(
    "fn, keep",
    [
        pytest.param(fn, keep, marks=() if (fn, keep) == (resharded, 5) else pytest.mark.slow)
        for fn in (dense, resharded, reshaped)
        for keep in (6, 5)
    ],
)
def test_params_on_an_explicit_mesh_are_cut_and_stay_there_as_far_as_it_divides(fn, keep):
    mesh = make_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, x = reshard_like(mesh, PARAMS, LAYOUT), reshard_like(mesh, X, BATCH)
        groups = jp.find_groups(fn, params, x)
        units = sorted(group.size for group in groups)
        assert units == ([2, 6] if fn is reshaped else [12])
        chosen = {g.name: np.arange(g.size) < min(keep, g.size) for g in groups}
        masks = Coupled(groups).expand(chosen, like=params)
        assert jp.verify_shrink(fn, params, masks, x) < 1e-6
        small_fn, small = jp.shrink(fn, params, masks)
        kept = small["b"].shape[0]
        assert kept in (keep, 2 * keep)
        assert jax.typeof(small["b"]).sharding.spec == P(None if kept % 2 else "model")
        want = fn(jp.apply_masks(params, masks), x)
        np.testing.assert_allclose(jax.jit(small_fn)(small, x), want, rtol=1e-5, atol=1e-5)


# Axes that vmap and pmap name.


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name="batch")(nn.Dense(6)(x))
        return nn.Dense(3)(nn.relu(x))


def each(mapped, in_axes):
    apply = lambda v, x: Normed().apply(v, x, True, mutable=["batch_stats"])
    return mapped(apply, in_axes=in_axes, axis_name="batch")


@pytest.fixture(scope="module")
def variables():
    init = lambda key: Normed().init(key, X[:1], False)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 1 + 0.3 * draw(leaf.size, *leaf.shape), shapes)


def train(mapped, stats):
    pick = {"of each": lambda s: s, "the first": lambda s: s[0], "their mean": lambda s: s.mean(0)}

    def fn(v, x):
        out, new = each(mapped, (None, 0))(v, x)
        return out, jax.tree.map(pick[stats], new)

    return fn


def test_statistics_over_a_named_axis_are_cut_with_their_channels(variables):
    fn, x = train(jax.vmap, "of each"), X.reshape(4, 2, 4)
    (group,) = groups = jp.find_groups(fn, variables, x)
    assert group.size == 6 and len(group.members) == 7 and group.exact
    small_fn, small = jp.shrink(fn, variables, some(groups, variables, 3))
    new = jax.eval_shape(small_fn, small, x)[1]["batch_stats"]["BatchNorm_0"]
    assert new["mean"].shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("stats", ["of each", "the first", "their mean"])
@pytest.mark.parametrize("mapped", [jax.vmap, jax.pmap])
def test_batch_norm_over_a_named_axis_computes_what_the_masked_one_does(variables, mapped, stats):
    fn, x = train(mapped, stats), X.reshape(4, 2, 4)
    (group,) = groups = jp.find_groups(fn, variables, x)
    assert group.size == 6 and len(group.members) == 7
    assert jp.verify_shrink(fn, variables, some(groups, variables, 3), x) < 1e-6


@pytest.mark.slow
def test_replicas_lose_the_same_units(variables):
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), variables)
    train, x = each(jax.vmap, 0), X.reshape(4, 2, 4)
    (group,) = groups = jp.find_groups(train, replicas, x)
    assert group.size == 6 and {m.axis for m in group.members} == {1, 2}
    assert jp.verify_shrink(train, replicas, some(groups, replicas, 4), x) < 1e-6


# Keys of layers.


def draws(p, x, key):
    def layer(x, w_and_key):
        w, key = w_and_key
        mask = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.7, x.shape)
        return x + jnp.where(mask, jnp.tanh(x @ w), 0), None

    return lax.scan(layer, x, (p["w"], jax.random.split(key, 3)))[0] @ p["v"]


DEEP = {"w": draw(4, 3, 4, 4), "v": draw(5, 4, 2)}
KEYS = {"typed": jax.random.key, "raw": jax.random.PRNGKey}


@pytest.mark.parametrize("kind", KEYS)
def test_layers_that_draw_by_keys_of_their_own_are_blocks(kind):
    key = KEYS[kind](1)
    blocks = jp.find_blocks(draws, DEEP, X, key)
    assert [b.name for b in blocks] == ["w[0]", "w[1]", "w[2]"] and all(b.exact for b in blocks)
    small_fn, small = jp.shrink(draws, DEEP, blocks.without(["w[1]"], DEEP))
    assert small["w"].shape == (2, 4, 4) and jax.eval_shape(small_fn, small, X, key).shape == (8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEYS)
def test_layers_that_are_left_draw_what_they_drew(kind):
    key = KEYS[kind](1)
    masks = jp.find_blocks(draws, DEEP, X, key).without(["w[1]"], DEEP)
    assert jp.verify_shrink(draws, DEEP, masks, X, key) < 1e-6
