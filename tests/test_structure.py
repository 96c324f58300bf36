"""Coupled groups in small networks whose cuts can be checked by eye."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import io_callback

import jaxprune as jp
from jaxprune.patterns import Coupled
from tests.contract.tables import CRITERIA, evidence, make_criterion


def mlp(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"]


@pytest.fixture
def params(key):
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    return {"w": draw(0, 3, 8), "b": draw(1, 8), "v": draw(2, 8, 2)}


@pytest.fixture
def groups(params):
    return jp.find_groups(mlp, params, jnp.ones((1, 3)))


def keep_units(groups, params, **chosen):
    """Masks that keep the given units of the only group."""
    (group,) = groups
    keep = np.isin(np.arange(group.size), chosen["units"])
    return Coupled(groups).expand({group.name: keep}, like=params)


# Groups as data.


def test_a_group_names_every_slice_of_a_hidden_unit(groups):
    (group,) = groups
    assert [(m.path, m.axis) for m in group.members] == [("b", 0), ("v", 0), ("w", 1)]
    assert all((m.indices == np.arange(8)[:, None]).all() for m in group.members)
    assert group.size == 8 and group.exact and group.reason == ""


def test_groups_of_the_same_function_are_equal_and_hash_alike(groups, params):
    again = jp.find_groups(mlp, params, jnp.ones((5, 3)))
    assert again == groups and hash(again) == hash(groups)
    assert again != jp.find_groups(mlp, params | {"b": params["b"][:8]}, jnp.ones((1, 3))).cut(
        keep_units(groups, params, units=[0, 1])
    )


def test_groups_print_members_and_what_is_frozen(groups):
    text = str(groups)
    assert text.startswith("w:1: 8 units\n  b axis 0\n  v axis 0\n  w axis 1\nfrozen:")
    assert "v axis 1: it is axis 1 of an output" in text
    assert "w axis 0: `dot_general` at test_structure.py" in text


def test_at_strips_a_prefix_and_refuses_an_unknown_one(params):
    apply = lambda v, x: mlp(v["params"], x)
    groups = jp.find_groups(apply, {"params": params}, jnp.ones((1, 3)))
    assert groups[0].name == "params/w:1"
    assert {m.path for m in groups.at("params")[0].members} == {"w", "b", "v"}
    with pytest.raises(ValueError, match=r"groups.at\('batch_stats'\).*params/b"):
        groups.at("batch_stats")
    assert groups.at("") == groups


def test_at_takes_a_tree_that_has_no_prefix_and_leaves_out_what_it_lacks(params):
    flat = {**params, "mean": jnp.ones(8)}
    fn = lambda v, x: mlp({**v, "b": v["b"] - v["mean"]}, x)
    groups = jp.find_groups(fn, flat, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"nothing at 'mean'.*`groups.at\(params\)`"):
        jp.find_masks(params, 0.5, pattern=Coupled(groups))
    part = groups.at({**params, "mean": None})
    assert part == groups.at(params) and {m.path for m in part[0].members} == {"w", "b", "v"}
    masks = jp.find_masks(params, 0.5, pattern=Coupled(part))
    assert groups.complete(masks, flat)["mean"].sum() == 4
    with pytest.raises(ValueError, match=r"a tree of 'x'.*no member below it.*'mean'"):
        groups.at({"x": jnp.ones(2)})


def test_cut_renumbers_the_units_that_are_left(groups, params):
    masks = keep_units(groups, params, units=[1, 4, 7])
    (small,) = groups.cut(masks)
    assert small.size == 3 and (small.members[0].indices == np.arange(3)[:, None]).all()
    _, small_params = jp.shrink(mlp, params, masks)
    assert (
        groups.cut(masks)[0].members
        == jp.find_groups(mlp, small_params, jnp.ones((1, 3)))[0].members
    )


def test_complete_carries_masks_of_one_member_to_all(groups, params):
    masks = groups.complete({"w": jnp.arange(8)[None] % 2 == 0}, params)
    np.testing.assert_array_equal(masks["b"], [True, False] * 4)
    np.testing.assert_array_equal(masks["v"][:, 0], [True, False] * 4)


def test_heads_and_head_dimensions_of_a_fused_projection_are_groups_of_their_own(key):
    def attend(p, x):
        q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(*x.shape[:2], 3, 2, 4), 2, 0)
        scores = jnp.einsum("bthd,bshd->bhts", q, k)
        mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)
        return mixed.reshape(*x.shape[:2], 8) @ p["out"]

    p = {"qkv": jax.random.normal(key, (5, 24)), "out": jax.random.normal(key, (8, 5))}
    x = jax.random.normal(key, (2, 3, 5))
    found = jp.find_groups(attend, p, x)
    assert sorted(group.size for group in found) == [2, 4]
    masks = jp.find_masks(p, 0.5, pattern=Coupled(found))
    assert jp.verify_shrink(attend, p, masks, x) < 1e-5
    assert jp.cut_list(p, masks)["out"][0] in ([0, 1], *([4 * h + i for i in d] for h in (0, 1)
        for d in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))))  # fmt: skip


# The pattern.


@pytest.mark.parametrize("reduce", ["mean", "sum", "norm"])
def test_a_unit_is_scored_over_all_its_members(groups, params, reduce):
    got = Coupled(groups, reduce=reduce).pool(params)["w:1"]
    slices = [[*params["w"][:, u], params["b"][u], *params["v"][u]] for u in range(8)]
    slow = {"mean": np.mean, "sum": np.sum, "norm": np.linalg.norm}[reduce]
    np.testing.assert_allclose(got, [slow(np.array(s)) for s in slices], rtol=1e-5, atol=1e-6)


def test_normalized_scores_average_to_one(groups, params):
    scores = jax.tree.map(jnp.abs, params)
    got = Coupled(groups, normalize=True).pool(scores)["w:1"]
    np.testing.assert_allclose(jnp.mean(got), 1.0, rtol=1e-6)


@pytest.mark.parametrize("scope", [jp.scopes.per_leaf, jp.scopes.across, "isomorphic"])
def test_the_lowest_units_go_and_one_always_stays(groups, params, scope):
    scope = jp.scopes.isomorphic(groups) if scope == "isomorphic" else scope
    scores = Coupled(groups).pool(jax.tree.map(jnp.abs, params))["w:1"]
    for sparsity, left in ((0.0, 8), (0.25, 6), (0.5, 4), (1.0, 1)):
        masks = jp.find_masks(params, sparsity, pattern=Coupled(groups), scope=scope)
        kept = np.nonzero(np.asarray(masks["b"]))[0]
        np.testing.assert_array_equal(kept, np.sort(np.argsort(-scores)[:left]))


def test_widths_are_rounded_up_and_bounded(groups, params):
    left = lambda sparsity, **how: int(
        jp.find_masks(params, sparsity, pattern=Coupled(groups, **how))["b"].sum()
    )
    assert left(0.4, round_to=4) == 8 and left(0.5, round_to=4) == 4 and left(1.0, round_to=4) == 4
    assert left(0.5, round_to=3) == 6 and left(0.1, round_to=5) == 8
    assert left(1.0, max_sparsity=0.75) == 2


def test_within_never_revives_a_unit(groups, params):
    first = jp.find_masks(params, 0.5, pattern=Coupled(groups))
    flipped = jax.tree.map(lambda p: 1 / p, params)
    second = jp.find_masks(flipped, 0.5, pattern=Coupled(groups), within=first)
    third = jp.find_masks(flipped, 0.75, pattern=Coupled(groups), within=first)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), first, second))
    assert third["b"].sum() == 2 and not (third["b"] & ~first["b"]).any()


def test_where_protects_a_group_if_it_refuses_a_member(key):
    net = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    p = {name: jax.random.normal(key, shape) for name, shape in
         (("a", (3, 6)), ("b", (6, 4)), ("c", (4, 2)))}  # fmt: skip
    groups = jp.find_groups(net, p, jnp.ones((1, 3)))
    masks = jp.find_masks(p, 0.5, pattern=Coupled(groups), where=jp.by_path("a", "b"))
    assert masks["c"] is None and masks["b"].shape == (6, 1) and masks["b"].sum() == 3
    with pytest.raises(ValueError, match="`where` refuses a member of each of the 2 groups"):
        jp.find_masks(p, 0.5, pattern=Coupled(groups), where=jp.by_path("a"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_ranks_coupled_units(name, key):
    from tests.contract.tables import small_params

    p = small_params()
    net = lambda p, x: (x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ jnp.ones((8, 2))
    groups = jp.find_groups(net, {"a": p["a"]}, jnp.ones((1, 8)))
    everything = {**evidence(), "grads": p, "key": key, "state": jax.tree.map(jnp.abs, p)}
    masks = jp.find_masks(p, 0.5, pattern=Coupled(groups), criterion=make_criterion(name),
                          **everything)  # fmt: skip
    assert masks["a"]["bias"].sum() == 4 and masks["b"]["kernel"] is None


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda g: Coupled("no"), TypeError, "needs groups"),
        (lambda g: Coupled(()), ValueError, "no groups"),
        (lambda g: Coupled(g, reduce="max"), ValueError, "not a reduction"),
        (lambda g: Coupled(g, round_to=0), ValueError, "below 1"),
        (lambda g: Coupled(g, round_to=2.0), TypeError, "needs an integer"),
        (lambda g: Coupled(g, max_sparsity=2), ValueError, "outside"),
    ],
)
def test_the_pattern_refuses_settings_by_name(groups, make, error, words):
    with pytest.raises(error, match=words):
        make(groups)


def test_pairs_that_make_no_sense_are_refused(groups, params):
    coupled = Coupled(groups)
    with pytest.raises(ValueError, match=r"`windows\(m=4\)`.*`Coupled`"):
        jp.find_masks(params, 0.5, pattern=coupled, scope=jp.scopes.windows(4))
    with pytest.raises(ValueError, match=r"`Coupled` ranks units.*tree of sparsities"):
        jp.find_masks(params, {"w": 0.5, "b": 0.5, "v": 0.5}, pattern=coupled)
    with pytest.raises(ValueError, match="`rigl` grows"):
        jp.dynamic.rigl(optax.sgd(1.0), sparsity=0.5, begin=0, end=9, every=1, pattern=coupled)
    with pytest.raises(ValueError, match="params have nothing at 'b'"):
        jp.find_masks({"w": params["w"]}, 0.5, pattern=coupled)
    with pytest.raises(ValueError, match="`isomorphic` ranks coupled groups"):
        jp.find_masks(params, 0.5, scope=jp.scopes.isomorphic(groups))


# In training.


@pytest.mark.parametrize("packed", [False, True])
def test_prune_masks_whole_units_and_compiles_once(groups, params, packed):
    schedule = jp.schedules.linear(0.5, begin=1, end=5, every=2)
    tx = jp.prune(optax.adam(0.1), schedule=schedule, pattern=Coupled(groups), packed=packed,
                  criterion=jp.criteria.taylor)  # fmt: skip
    traces = []

    @jax.jit
    def step(p, state):
        traces.append(1)
        grads = jax.grad(lambda p: jnp.sum(mlp(p, jnp.ones((4, 3))) ** 2))(p)
        updates, state = tx.update(grads, state, p)
        return optax.apply_updates(p, updates), state

    state = tx.init(params)
    for _ in range(6):
        params, state = step(params, state)
    masks = jp.get_masks(state)
    assert len(traces) == 1 and masks["b"].sum() == 4
    small_fn, small = jp.shrink(mlp, params, masks)
    np.testing.assert_allclose(
        small_fn(small, jnp.ones((4, 3))), mlp(params, jnp.ones((4, 3))), rtol=1e-4, atol=1e-5
    )
    small_state = jp.shrink_state(tx, state, params, masks)
    tx = jp.prune(optax.adam(0.1), schedule=schedule, pattern=Coupled(groups.cut(masks)),
                  packed=packed, criterion=jp.criteria.taylor)  # fmt: skip
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(small_state) == shapes(tx.init(small))
    tx.update(small, small_state, small)


def test_imp_removes_units_round_by_round(groups, params):
    levels = jp.imp(params, lambda ticket, masks: ticket, rounds=2, rate=0.5,
                    pattern=Coupled(groups))  # fmt: skip
    assert [int(level.masks["b"].sum()) for level in levels] == [8, 4, 2]


def test_hold_and_straight_through_take_coupled_masks(groups, params):
    pattern = Coupled(groups)
    masks = jp.find_masks(params, 0.5, pattern=pattern)
    tx = jp.hold(optax.sgd(0.1), where=pattern.owns)
    state = jp.with_masks(tx.init(params), masks)
    updates, _ = tx.update(params, state, params)
    assert (optax.apply_updates(params, updates)["b"][~masks["b"]] == 0).all()
    tx = jp.straight_through(optax.sgd(0.1), schedule=jp.schedules.constant(0.5), pattern=pattern)
    _, state = tx.update(params, tx.init(params), params)
    assert (jp.forward_params(params, state)["b"] == 0).sum() == 4


@pytest.mark.parametrize(
    "tx", [optax.adamw(0.1), optax.sgd(0.1, momentum=0.9), optax.chain(optax.clip(1.0),
           optax.adafactor(0.1, min_dim_size_to_factor=2))],
    ids=["adamw", "momentum", "adafactor"],
)  # fmt: skip
def test_the_optimizer_goes_on_with_the_small_params(groups, params, tx):
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    masks = keep_units(groups, params, units=[0, 3, 4, 5])
    _, small = jp.shrink(mlp, params, masks)
    small_state = jp.shrink_state(tx, state, params, masks)
    fresh = tx.init(small)
    assert jax.tree.structure(fresh) == jax.tree.structure(small_state)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small_state)
    tx.update(small, small_state, small)


def test_a_state_that_goes_by_sizes_may_have_to_start_anew(groups, params):
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    masks = keep_units(groups, params, units=[0, 5])  # now the other axis is the longer one
    with pytest.raises(ValueError, match=r"v_row/w' has shape \(3,\).*Start anew"):
        jp.shrink_state(tx, tx.init(params), params, masks)


def test_an_index_of_two_units_goes_with_either(key):
    outer = lambda p, x: jnp.einsum("bi,bj->bij", x @ p["a"], x @ p["a"]).reshape(4, -1) @ p["c"]
    p = {"a": jax.random.normal(key, (6, 5)), "c": jax.random.normal(key, (25, 3))}
    groups, x = jp.find_groups(outer, p, jnp.ones((4, 6))), jax.random.normal(key, (4, 6))
    masks = keep_units(groups, p, units=[0, 1, 3])
    assert masks["c"].sum() == 9
    assert jp.verify_shrink(outer, p, masks, x) < 1e-5


# The small function.


def test_the_small_function_is_differentiable_batched_and_exported(groups, params):
    masks = keep_units(groups, params, units=[2, 3, 6])
    small_fn, small = jp.shrink(mlp, params, masks)
    masked = jp.apply_masks(params, masks)
    x = jax.random.normal(jax.random.key(1), (4, 5, 3))
    want = jnp.stack([mlp(masked, one) for one in x])
    np.testing.assert_allclose(jax.vmap(small_fn, (None, 0))(small, x), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(small_fn)(small, x[0]), want[0], rtol=1e-5, atol=1e-6)
    loss = lambda fn: lambda p: jnp.sum(fn(p, x[0]) ** 2)
    large, less = jax.grad(loss(mlp))(masked), jax.grad(loss(small_fn))(small)
    np.testing.assert_allclose(less["w"], large["w"][:, jnp.array([2, 3, 6])], rtol=1e-4, atol=1e-5)


def test_the_small_function_is_exported_for_any_batch(groups, params):
    pytest.importorskip("flatbuffers")
    from jax import export

    small_fn, small = jp.shrink(mlp, params, keep_units(groups, params, units=[1]))
    (batch,) = export.symbolic_shape("batch")
    spec = jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    data = export.export(jax.jit(small_fn))(small, spec).serialize()
    x = jnp.ones((7, 3))
    np.testing.assert_allclose(export.deserialize(data).call(small, x), small_fn(small, x))


def test_a_cut_goes_through_json(groups, params):
    masks = keep_units(groups, params, units=[0, 7])
    cut = json.loads(json.dumps(jp.cut_list(params, masks)))
    assert cut == {"w": {"1": [0, 7]}, "b": {"0": [0, 7]}, "v": {"0": [0, 7]}}
    small_fn, small = jp.shrink(mlp, params, cut=cut)
    assert small["w"].shape == (3, 2) and small_fn(small, jnp.ones((1, 3))).shape == (1, 2)
    assert jp.size_of(params, masks) == sum(leaf.size for leaf in jax.tree.leaves(small))


@pytest.mark.parametrize("mean", ["jnp.var", "by hand", "squares"])
def test_counts_equal_the_masked_network_or_the_narrower_module(key, mean):
    def norm(p, x):
        h = x @ p["w"]
        if mean == "squares":  # exact: zeros add nothing to it
            scale = jnp.mean(h * h, -1, keepdims=True)
        elif mean == "jnp.var":
            scale = jnp.var(h, -1, keepdims=True)
        else:
            centred = h - h.sum(-1, keepdims=True) / h.shape[-1]
            scale = (centred**2).sum(-1, keepdims=True) / h.shape[-1]
        return h / jnp.sqrt(scale + 1e-3) @ p["v"]

    p = {"w": jax.random.normal(key, (3, 6)), "v": jax.random.normal(key, (6, 2))}
    x = jax.random.normal(key, (4, 3))
    (group,) = groups = jp.find_groups(norm, p, x)
    masks = keep_units(groups, p, units=[0, 1, 4])
    assert group.exact == (mean == "squares")
    assert group.exact or "sums what is not zero where a unit is removed" in group.reason
    difference = jp.verify_shrink(norm, p, masks, x)
    assert difference < 1e-5 if group.exact else difference > 1e-3
    small_fn, small = jp.shrink(norm, p, masks, counts="rescaled")
    np.testing.assert_allclose(small_fn(small, x), norm(small, x), rtol=1e-5, atol=1e-6)


def test_budgets_of_parameters_and_flops_are_met(groups, params):
    find = lambda sparsity: jp.find_masks(params, sparsity, pattern=Coupled(groups))
    x = jnp.ones((1, 3))
    whole = jp.count_flops(mlp, params, x)
    flops = lambda masks: jp.count_flops(*jp.shrink(mlp, params, masks), x) / whole
    assert flops(jp.masks_within_budget(find, flops, 0.5)) == 0.5
    size = lambda masks: jp.size_of(params, masks) / 48
    assert size(jp.masks_within_budget(find, size, 0.3)) == 0.25
    assert jp.masks_within_budget(find, size, 1.0)["b"].all()
    with pytest.raises(ValueError, match=r"cannot reach a budget of 0.1.*still 0.125"):
        jp.masks_within_budget(find, size, 0.1)


# Depth.


def residual(p, x):
    for layer in p["layers"]:
        x = x + jnp.tanh(x @ layer["in"]) @ layer["out"]
    return x @ p["head"]


def scanned(p, x):
    step = lambda x, layer: (x + jnp.tanh(x @ layer["in"]) @ layer["out"], None)
    return lax.scan(step, x, p["layers"])[0] @ p["head"]


@pytest.fixture
def deep(key):
    layers = [
        {"in": jax.random.normal(jax.random.fold_in(key, i), (4, 5)),
         "out": jax.random.normal(jax.random.fold_in(key, 9 + i), (5, 4))} for i in range(3)
    ]  # fmt: skip
    return {"layers": layers, "head": jax.random.normal(key, (4, 2))}


def test_residual_branches_are_dropped_whole(deep):
    x = jnp.ones((2, 4))
    blocks = jp.find_blocks(residual, deep, x)
    assert [block.name for block in blocks] == [f"layers/{i}" for i in range(3)]
    assert all(block.exact and block.size == 1 and block.kind == "block" for block in blocks)
    masks = blocks.without(["layers/1"], deep)
    small_fn, small = jp.shrink(residual, deep, masks)
    assert [layer["in"].size for layer in small["layers"]] == [20, 0, 20]
    want = residual({**deep, "layers": [deep["layers"][0], deep["layers"][2]]}, x)
    np.testing.assert_allclose(small_fn(small, x), want, rtol=1e-5)
    assert jp.count_flops(small_fn, small, x) == 2 * (4 * 20 * 2 + 16)
    with pytest.raises(ValueError, match="no group 'nobody'"):
        blocks.without(["nobody"], deep)


def test_layers_of_a_scan_are_cut_out_of_the_stack(deep):
    stacked = {**deep, "layers": jax.tree.map(lambda *x: jnp.stack(x), *deep["layers"])}
    x = jnp.ones((2, 4))
    blocks = jp.find_blocks(scanned, stacked, x)
    assert len(blocks) == 3 and all(block.exact for block in blocks)
    masks = blocks.without([blocks[0].name], stacked)
    small_fn, small = jp.shrink(scanned, stacked, masks)
    assert small["layers"]["in"].shape == (2, 4, 5)
    want = residual({**deep, "layers": deep["layers"][1:]}, x)
    np.testing.assert_allclose(small_fn(small, x), want, rtol=1e-5)
    assert jp.count_flops(scanned, stacked, x) == 2 * (2 * 20 * 2 * 3 + 16)


def test_half_of_the_blocks_go_by_rank_and_combine_with_channels(deep):
    x = jnp.ones((2, 4))
    strong = {**deep, "layers": [jax.tree.map(lambda w, i=i: w * (i + 1), layer)
                                 for i, layer in enumerate(deep["layers"])]}  # fmt: skip
    blocks = Coupled(jp.find_blocks(residual, strong, x))
    layers = jp.find_masks(strong, 1 / 3, pattern=blocks, scope=jp.scopes.across)
    assert not layers["layers"][0]["in"].any() and layers["layers"][2]["in"].all()
    channels = jp.find_masks(strong, 0.4, pattern=Coupled(jp.find_groups(residual, strong, x)))
    both = jp.combine_masks(channels, layers)
    assert jp.verify_shrink(residual, strong, both, x) < 1e-5
    groups = jp.find_groups(residual, strong, x)
    assert len(groups.cut(both)) == len(groups) - 1  # hidden units of a layer that is gone


def test_a_layer_that_is_no_identity_without_weights_says_so(deep):
    stacked = {**deep, "layers": jax.tree.map(lambda *x: jnp.stack(x), *deep["layers"])}

    def plain(p, x):
        step = lambda x, layer: (jnp.tanh(x @ layer["in"]) @ layer["out"], None)
        return lax.scan(step, x, p["layers"])[0] @ p["head"]

    block = jp.find_blocks(plain, stacked, jnp.ones((2, 4)))[0]
    assert not block.exact and "changes what it is given" in block.reason


# What is counted.


@pytest.mark.parametrize(
    "fn, shapes, flops",
    [
        (lambda w, x: x @ w, ((3, 5), (2, 3)), 60),
        (lambda w, x: jnp.einsum("bij,bjk->bik", x, w), ((4, 3, 5), (4, 2, 3)), 240),
        (lambda w, x: lax.conv(x, w, (1, 1), "SAME"), ((6, 3, 3, 3), (1, 3, 8, 8)), 2 * 64 * 162),
        (lambda w, x: lax.conv_general_dilated(x, w, (1, 1), "SAME", feature_group_count=3),
         ((6, 1, 3, 3), (1, 3, 8, 8)), 2 * 64 * 54),
        (lambda w, x: lax.fori_loop(0, 7, lambda _, y: y @ w, x), ((3, 3), (2, 3)), 7 * 36),
        (lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), ((3, 3), (2, 3)), 36),
    ],
    ids=["dot", "batched", "conv", "grouped", "loop", "cond"],
)  # fmt: skip
def test_flops_are_those_of_the_products(fn, shapes, flops):
    w, x = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    assert jp.count_flops(fn, w, x) == flops


# Bad input.


def test_masks_of_single_weights_are_refused(params):
    masks = jp.find_masks(params, 0.5)
    with pytest.raises(ValueError, match=r"mask of '[vw]' removes \d+ single weights"):
        jp.shrink(mlp, params, masks)


def test_masks_that_contradict_what_is_coupled_are_refused(groups, params):
    masks = {"w": jnp.arange(8)[None] > 0, "b": None, "v": None}
    small_fn, small = jp.shrink(mlp, params, masks)
    with pytest.raises(ValueError, match=r"remove index 0 of axis 1 of 'w'.*stays: 'b' axis 0"):
        small_fn(small, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="index 0 of axis 0 of 'v', which contradicts"):
        groups.keep({**masks, "b": jnp.ones(8, bool), "v": jnp.arange(8)[:, None] > 0})
    outputs = {"v": jnp.array([[True, False]])}
    small_fn, small = jp.shrink(mlp, params, outputs)
    with pytest.raises(ValueError, match=r"index 1 of axis 1 of 'v'.*it is axis 1 of an output"):
        small_fn(small, jnp.ones((1, 3)))


def test_a_group_that_is_emptied_is_refused(groups, params):
    small_fn, small = jp.shrink(mlp, params, keep_units(groups, params, units=[]))
    with pytest.raises(ValueError, match="remove all of 'b', 'v', 'w'"):
        small_fn(small, jnp.ones((1, 3)))


def test_shrink_refuses_what_it_cannot_read(groups, params):
    masks = keep_units(groups, params, units=[1])
    for given, words in (
        ({"masks": {"z": jnp.ones(1, bool)}}, "'z', which the params lack"),
        ({"masks": {"b": jnp.ones((1, 8), bool)}}, "mask of 'b' is bool.*does not fit"),
        ({"cut": {"b": {"0": [9]}}}, "keeps .* of axis 0 of 'b'"),
        ({}, "either `masks` or `cut`"),
        ({"masks": masks, "counts": "other"}, "'other'.*unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            jp.shrink(mlp, params, **given)
    small_fn, _ = jp.shrink(mlp, params, masks)
    with pytest.raises(ValueError, match=r"'b' has shape \(8,\), wanted \(1,\)"):
        small_fn(params, jnp.ones((1, 3)))


def test_inputs_that_the_function_rejects_are_named(params):
    with pytest.raises(TypeError) as error:
        jp.find_groups(mlp, params, jnp.ones((1, 4)))
    assert "3 parameter arrays and float32[1, 4]" in "".join(error.value.__notes__)


def test_unread_and_integer_params_are_warned_of(params):
    with pytest.warns(UserWarning, match="never reads 'spare'"):
        jp.find_groups(mlp, {**params, "spare": jnp.ones(3)}, jnp.ones((1, 3)))
    net = lambda p, x: mlp(p, x * p["scale"][None].astype(float))
    with pytest.warns(UserWarning, match=r"'scale' is int32\[3\]"):
        jp.find_groups(net, {**params, "scale": jnp.arange(3)}, jnp.ones((1, 3)))


def test_callbacks_that_compute_freeze_what_they_touch_and_those_that_watch_do_not(params):
    def shouting(call):
        def net(p, x):
            h = jax.nn.relu(x @ p["w"] + p["b"][None])
            call(lambda h: None, h)
            return h @ p["v"]

        return net

    told = shouting(lambda f, h: io_callback(f, None, h))
    groups = jp.find_groups(told, params, jnp.ones((1, 3)))
    assert not groups and re.search(r"`io_callback` at test_structure.py:\d+ hands", str(groups))
    (group,) = jp.find_groups(shouting(jax.debug.callback), params, jnp.ones((1, 3)))
    assert group.size == 8 and group.exact


def test_a_user_teaches_a_primitive(key):
    net = lambda p, x: jnp.abs(jnp.fft.rfft(p["w"] @ x)).T @ p["v"]
    p = {"w": jax.random.normal(key, (6, 3)), "v": jax.random.normal(key, (6, 1))}
    x = jax.random.normal(key, (3, 8))
    whole = jp.graph.Rule(lambda at: [at.freeze(a) for a in at.ins[0]] and [(None, None)])
    assert not jp.find_groups(net, p, x, rules={"fft": whole})

    def fft(at):
        at.freeze(at.ins[0][-1])
        return [(*at.ins[0][:-1], None)]

    rules = {"fft": jp.graph.Rule(fft)}
    groups = jp.find_groups(net, p, x, rules=rules)
    masks = keep_units(groups, p, units=[0, 2, 5])
    assert jp.verify_shrink(net, p, masks, x, rules=rules) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frozen = jp.find_groups(mlp, {"w": p["w"], "b": jnp.ones(3), "v": x}, jnp.ones((1, 6)),
                                frozen=jp.by_path("b"))  # fmt: skip
    assert not frozen and "'b' is protected" in str(frozen)


# What looks exact and is not, and the other way round.


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def two_pass(h):
    h = h - h.mean(-1, keepdims=True)
    return h * lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-5)


INEXACT = {
    "a norm over merged heads": (
        lambda p, x: two_pass(jnp.einsum("bd,dhk->bhk", x, p["w"]).reshape(4, 12)) @ p["v"],
        ((5, 3, 4), (12, 2)),
        "reduce_sum",
    ),
    "heads behind a norm": (
        lambda p, x: (
            jnp.tanh(two_pass(x @ p["w"]).reshape(4, 3, 4) @ p["u"]).reshape(4, -1) @ p["v"]
        ),
        ((5, 12), (12, 2), (4, 4)),
        "reduce_sum",
    ),
    "a sum of exponentials": (
        lambda p, x: lax.cumlogsumexp((x @ p["w"])[:, None] * p["v"].T[None], axis=1).sum((1, 2)),
        ((5, 8), (8, 2)),
        "reduce_sum",
    ),
    "weights divided by their norm": (
        lambda p, x: (x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)[None])) @ p["v"],
        ((5, 8), (8, 3)),
        "`div` at test_structure.py:[0-9]+ is not finite",
    ),
}


@pytest.mark.parametrize("name", INEXACT)
def test_groups_say_what_is_not_exact(name):
    net, shapes, reason = INEXACT[name]
    p = {key: draw(i, *shape) for i, (key, shape) in enumerate(zip("wvu", shapes, strict=False))}
    groups, x = jp.find_groups(net, p, draw(9, 4, 5)), draw(9, 4, 5)
    wrong = [group for group in groups if not group.exact]
    assert wrong and all(re.search(reason, group.reason) for group in wrong)
    masks = jp.find_masks(p, 0.5, pattern=Coupled(groups))
    assert not jp.verify_shrink(net, p, masks, x) < 1e-3


LAYERS = {
    "a number of the layer": lambda p, x: lax.scan(
        lambda h, a: (h + jnp.tanh(h @ a[0] + a[1]), None), x, (p["w"], jnp.arange(4.0))
    )[0],
    "what every layer gives": lambda p, x: lax.scan(
        lambda h, w: (h + jnp.tanh(h @ w), h), x, p["w"]
    )[1].mean(0),
    "weights used elsewhere": lambda p, x: (
        lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), x, p["w"])[0] + jnp.exp(p["w"]).sum()
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers_say_why_leaving_them_out_is_not_exact(name):
    p, x = {"w": 0.3 * draw(1, 4, 5, 5)}, draw(0, 4, 5)
    blocks = jp.find_blocks(LAYERS[name], p, x)
    assert len(blocks) == 4 and all(not block.exact and block.reason for block in blocks)
    assert jp.verify_shrink(LAYERS[name], p, blocks.without([blocks[2].name], p), x) > 1e-3


def test_an_output_is_no_state_for_its_name_alone():
    net = lambda p, x: {"w2": jnp.tanh(x @ p["h"]) @ p["w"] + p["w2"]}
    p = {"h": draw(1, 5, 6), "w": draw(2, 6, 8), "w2": draw(3, 8)}
    (group,) = jp.find_groups(net, p, draw(4, 5))
    assert group.size == 6


def test_fixed_inputs_that_compare_equal_are_told_apart(params, groups):
    net = lambda p, x, flag: mlp(p, x) * (2.0 if flag is True else 3.0)
    small_fn, small = jp.shrink(net, params, keep_units(groups, params, units=[1, 2]))
    x = jnp.ones((1, 3))
    np.testing.assert_allclose(2 * small_fn(small, x, 1), 3 * small_fn(small, x, True), rtol=1e-6)


def test_a_branch_with_a_scalar_gate_is_dropped():
    def net(p, x):
        for layer in p:
            x = x + layer["gate"] * jnp.tanh(x @ layer["w"])
        return x

    p = [{"gate": jnp.float32(0.5), "w": draw(i, 5, 5)} for i in range(3)]
    blocks = jp.find_blocks(net, p, draw(7, 4, 5))
    assert all(block.exact for block in blocks)
    masks = blocks.without([blocks[0].name], p)
    assert jp.verify_shrink(net, p, masks, draw(7, 4, 5)) < 1e-6


@pytest.mark.slow
def test_second_derivatives_keep_the_rules_of_custom_functions(params, groups):
    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    @jax.custom_jvp
    def cosine(x):
        return jnp.cos(x)

    sine.defjvp(lambda p, t: (sine(*p), 3.0 * t[0] * cosine(*p)))
    cosine.defjvp(lambda p, t: (cosine(*p), 7.0 * t[0]))
    net = lambda p, x: sine(x @ p["w"] + p["b"][None]) @ p["v"]
    masks = keep_units(groups, params, units=[0, 3, 4])
    small_fn, small = jp.shrink(net, params, masks)
    second = lambda fn, p: jax.grad(lambda x: jax.grad(lambda x: fn(p, x).sum())(x).sum())(x)
    x = jnp.ones((1, 3))
    np.testing.assert_allclose(
        second(small_fn, small), second(net, jp.apply_masks(params, masks)), rtol=1e-4
    )


def test_what_nobody_could_tell_apart_is_refused():
    p = {"a/b": jnp.ones((3, 4)), "a": {"b": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match="Several parameters have the path 'a/b'"):
        jp.find_groups(lambda p, x: x @ p["a/b"] @ p["a"]["b"], p, jnp.ones((1, 3)))


@pytest.mark.slow
def test_a_sum_that_is_no_mean_is_told_of_when_counts_are_rescaled(key):
    net = lambda p, x: jnp.tanh(x @ p["w"]).sum(-1)
    p = {"w": jax.random.normal(key, (3, 6)), "b": jnp.ones(6)}
    both = lambda p, x: net(p, x) + (x @ p["w"] * p["b"][None]).sum(-1)
    groups = jp.find_groups(both, p, jnp.ones((1, 3)))
    masks = jp.find_masks(p, 0.5, pattern=Coupled(groups))
    small_fn, small = jp.shrink(both, p, masks, counts="rescaled")
    with pytest.warns(UserWarning, match="finds no division by 6 behind `reduce_sum`"):
        small_fn(small, jnp.ones((1, 3)))
