"""Tests of find_masks: keywords, parts and rounds, and SynFlow, which is what rounds are for."""

import itertools
from itertools import product

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria, patterns, scopes
from tests.helpers import TraceCount, assert_trees_equal, fast_if, tree_of_weights


def flow(params, x):
    hidden = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return hidden @ params["Dense_1"]["kernel"]


SYNFLOW = {"criterion": criteria.synflow, "apply_fn": flow, "batch": jnp.ones((1, 12))}


def loop(params, sparsity, rounds, *, within=None, **parts):
    """One search after the other, each among what the last one left."""
    masks = within
    for i in range(1, rounds + 1):
        now = jax.tree.map(
            lambda s, i=i: s if i == rounds else 1 - (1 - s) ** (i / rounds), sparsity
        )
        if isinstance(parts.get("scope"), type(scopes.windows(4))):
            now = round(now * 4) / 4  # on the way each window rounds
        left = params if masks is None else jp.apply_masks(params, masks)
        masks = jp.find_masks(left, now, within=masks, **parts)
    return masks


def removed(masks):
    return [int((~m).sum()) for m in jax.tree.leaves(masks)]


@pytest.mark.parametrize(
    "sparsity, parts",
    [
        (0.9, {"scope": scopes.across}),
        (0.5, {"scope": scopes.windows(4)}),
        (0.7, {"pattern": patterns.Channels(-1)}),
        (scopes.erk, {}),
    ],
)
def test_rounds_are_a_loop_of_searches_among_what_is_left(key, sparsity, parts):
    params = tree_of_weights(key)
    sparsity = sparsity(params, 0.9) if sparsity is scopes.erk else sparsity
    masks = jp.find_masks(params, sparsity, rounds=5, **parts, **SYNFLOW)
    assert_trees_equal(masks, loop(params, sparsity, 5, **parts, **SYNFLOW))


def test_rounds_stay_within_earlier_masks_from_the_first_score_on(key):
    params = tree_of_weights(key)
    within = jp.find_masks(params, 0.3, criterion=criteria.random, key=key)
    parts = {"scope": scopes.across, **SYNFLOW}
    masks = jp.find_masks(params, 0.8, rounds=4, within=within, **parts)
    assert_trees_equal(masks, loop(params, 0.8, 4, within=within, **parts))
    revived = jax.tree.map(lambda new, old: (new & ~old).any(), masks, within)
    assert not any(jax.tree.leaves(revived)) and sum(removed(masks)) == round(0.8 * 128)


def test_channel_masks_may_be_what_rounds_of_weights_stay_within(key):
    params = tree_of_weights(key)
    within = jp.find_masks(params, 0.5, pattern=patterns.Channels(-1))
    masks = jp.find_masks(params, 0.75, rounds=3, within=within, **SYNFLOW)
    assert_trees_equal(masks, loop(params, 0.75, 3, within=within, **SYNFLOW))
    assert removed(masks) == [72, 24]


@pytest.mark.optimized
def test_another_score_among_what_is_left_makes_another_choice(key):
    params = tree_of_weights(key)
    once, often = (
        jp.find_masks(params, 0.9, rounds=rounds, scope=scopes.across, **SYNFLOW)
        for rounds in (1, 20)
    )
    assert sum(removed(once)) == sum(removed(often)) == round(0.9 * 128)
    assert removed(once) != removed(often)


def test_one_round_is_the_default(key):
    params = tree_of_weights(key)
    assert_trees_equal(
        jp.find_masks(params, 0.6, rounds=1, **SYNFLOW), jp.find_masks(params, 0.6, **SYNFLOW)
    )


def test_rounds_change_nothing_where_scores_do_not_depend_on_what_is_left(key):
    params = tree_of_weights(key)
    assert_trees_equal(jp.find_masks(params, 0.7, rounds=7), jp.find_masks(params, 0.7))


def test_the_last_round_removes_exactly_what_python_says(key):
    params = {"w": jax.random.normal(key, (37, 10))}
    offered = {"apply_fn": lambda p, x: x @ p["w"], "batch": jnp.ones((1, 37))}
    find = lambda s: jp.find_masks(params, s, criterion=criteria.synflow, rounds=6, **offered)
    traced = jax.jit(find)
    for sparsity in (0.0, 1.0, 0.1, 1 / 3, 0.7, 0.99, 0.999):
        want = [round(sparsity * 370)]
        assert removed(find(sparsity)) == removed(traced(sparsity)) == want


def test_rounds_compile_once_for_all_sparsities(key):
    count = TraceCount(lambda params, **_: jax.tree.map(jnp.abs, params))
    for sparsity in (0.1, 0.5, 0.9, 1.0):
        jp.find_masks(tree_of_weights(key), sparsity, criterion=count, rounds=10)
    assert count.count <= 2  # once for the shapes, once for the loop, whatever the rounds


@pytest.mark.parametrize("bad", [0, -1, 2.0, True, None, "many"])
def test_rounds_that_are_no_number_of_rounds_are_refused(bad):
    wrong = ValueError if isinstance(bad, int) else TypeError
    with pytest.raises(wrong, match=r"`find_masks` got rounds=.*integer from 1 on; 100"):
        jp.find_masks({"w": jnp.ones((2, 2))}, 0.5, rounds=bad)


# SynFlow, Tanaka 2020: no layer is emptied while another choice of the same size avoids it. The
# highest compression at which one can is the number of weights over the number of layers.

WIDTHS = (784, 100, 100, 100, 100, 100, 10)
WEIGHTS = sum(a * b for a, b in itertools.pairwise(WIDTHS))
LAYERS = len(WIDTHS) - 1


def mlp(key):
    """Six layers as at initialisation, zeros for the biases."""
    keys = jax.random.split(key, LAYERS)
    make = jax.nn.initializers.lecun_normal()
    return [
        {"kernel": make(k, shape), "bias": jnp.zeros(shape[1])}
        for k, shape in zip(keys, itertools.pairwise(WIDTHS), strict=True)
    ]


def mlp_apply(params, x):
    for i, layer in enumerate(params):
        x = x @ layer["kernel"] + layer["bias"][None]
        x = jax.nn.relu(x) if i < LAYERS - 1 else x
    return x


def mlp_loss(params, batch):
    x, y = batch
    logs = jax.nn.log_softmax(mlp_apply(params, x))
    return -jnp.mean(jnp.take_along_axis(logs, y[:, None], axis=1))


def kept(masks):
    return [int(layer["kernel"].sum()) for layer in masks]


def connected(masks):
    """Say whether a path of kept weights leads from an input to an output."""
    reached = np.ones(WIDTHS[0], bool)
    for layer in masks:
        reached = np.asarray(layer["kernel"])[reached].any(axis=0)
    return bool(reached.any())


FLOW = {"criterion": criteria.synflow, "apply_fn": mlp_apply, "batch": jnp.zeros((1, 784))}
KEPT = {"10x": WEIGHTS // 10, "100x": WEIGHTS // 100, "1000x": WEIGHTS // 1000}
KEPT |= {"two a layer": 2 * LAYERS, "one more than the least": LAYERS + 1, "the least": LAYERS}


@pytest.mark.parametrize(
    "seed, size",
    fast_if(lambda seed, size: seed == list(KEPT).index(size) % 3, product(range(3), KEPT)),
)
def test_synflow_in_100_rounds_empties_no_layer_up_to_the_maximal_compression(seed, size):
    params, sparsity = mlp(jax.random.key(seed)), 1 - KEPT[size] / WEIGHTS
    masks = jp.find_masks(params, sparsity, scope=scopes.across, rounds=100, **FLOW)
    assert sum(kept(masks)) == KEPT[size] and min(kept(masks)) >= 1
    assert connected(masks)
    positive = jax.tree.map(jnp.abs, jp.apply_masks(params, masks))
    assert jax.grad(lambda x: mlp_apply(positive, x).sum())(jnp.ones((1, 784))).max() > 0


@pytest.mark.parametrize("seed", range(3))
def test_magnitude_at_initialisation_empties_a_layer_at_a_tenfold_compression(seed):
    masks = jp.find_masks(mlp(jax.random.key(seed)), 0.9, scope=scopes.across)
    assert min(kept(masks)) == 0 and not connected(masks)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_snip_grasp_and_one_round_of_synflow_empty_layers_too(key, seed):
    params = mlp(jax.random.key(seed))
    batch = jax.random.normal(key, (128, 784)), jax.random.randint(key, (128,), 0, 10)
    loss = {"loss_fn": mlp_loss, "batch": batch}
    snip, grasp = ({"criterion": c, **loss} for c in (criteria.snip, criteria.grasp))
    for fold, parts in [(10, FLOW), (1000, snip), (1000, grasp)]:
        masks = jp.find_masks(params, 1 - 1 / fold, scope=scopes.across, **parts)
        assert min(kept(masks)) == 0 and not connected(masks)


# Keywords, roles and parts.

W = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}


@pytest.mark.parametrize(
    "given, want",
    [
        ({"scopes": jp.scopes.across}, "scope"),
        ({"criteria": jp.criteria.taylor}, "criterion"),
        ({"wher": jp.is_matrix}, "where"),
        ({"round": 3}, "rounds"),
        ({"mask": W}, "within"),
        ({"seed": 0}, "key"),
        ({"grad": W}, "grads"),
        ({"patern": jp.patterns.Weights()}, "pattern"),
        ({"sparsity_": 0.5}, "sparsity"),
    ],
)
def test_a_misspelled_keyword_is_told_the_nearest_setting(given, want):
    (name,) = given
    with pytest.raises(TypeError, match=f"`{name}=`.*no setting.*Did you mean `{want}=`"):
        jp.find_masks(W, 0.5, **given)


def test_a_keyword_like_no_other_is_told_what_there_is():
    with pytest.raises(TypeError, match=r"`banana=`.*There are `criterion`.*`grads`"):
        jp.find_masks(W, 0.5, banana=1)
    with pytest.raises(TypeError, match="`oops=`"):
        evidence = lambda level: {"oops": 1}
        list(jp.imp(W, lambda t, m: t, rounds=1, evidence=evidence))
    with pytest.raises(TypeError, match=r"returned list. Return a dict"):
        list(jp.imp(W, lambda t, m: t, rounds=1, evidence=lambda level: []))


def test_one_set_of_evidence_may_be_handed_to_every_criterion():
    masks = jp.find_masks(W, 0.5, grads=W, key=jax.random.key(0), params_init=W, batch=W)
    assert_trees_equal(masks, jp.find_masks(W, 0.5))


def test_a_criterion_may_name_evidence_of_its_own_or_take_all():
    mine = lambda params, *, flavour, **_: jax.tree.map(lambda w: w * flavour, params)
    assert jp.find_masks(W, 0.5, criterion=mine, flavour=-1.0)["w"].tolist()[0] == [True] * 4
    with pytest.raises(TypeError, match=r"`flavor=`.*Did you mean `flavour=`"):
        jp.find_masks(W, 0.5, criterion=mine, flavor=-1.0)
    everything = lambda params, **more: jax.tree.map(lambda w: w * more["flavor"], params)
    assert jp.find_masks(W, 0.5, criterion=everything, flavor=-1.0)["w"].tolist()[0] == [True] * 4


def test_functions_of_the_params_go_by_their_name():
    mine = lambda params, *, norm, **_: jax.tree.map(jnp.abs, params)
    with pytest.raises(TypeError, match=r"got the function `norm`.*let the criterion ask for"):
        jp.find_masks(W, 0.5, criterion=mine, norm=lambda p: p)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"criterion": "magnitude"}, "criterion='magnitude', a string"),
        ({"scope": "global"}, "scope='global', a string"),
        ({"where": ".*"}, r"where=.*a string.*jp.by_path\('\.\*'\)"),
        ({"pattern": jp.patterns.Channels}, r"a class. Pass what it makes: `Channels\(...\)`"),
    ],
)
def test_what_is_no_part_is_refused_by_find_masks_and_imp(given, words):
    with pytest.raises(TypeError, match=f"`find_masks` got .*{words}"):
        jp.find_masks(W, 0.5, **given)
    with pytest.raises(TypeError, match=f"`imp` got .*{words}"):
        jp.imp(W, lambda t, m: t, **given)


def test_a_module_in_the_place_of_its_params_is_told_so():
    with pytest.raises(ValueError, match="no arrays but objects, such as Dense"):
        jp.find_masks(nn.Dense(3), 0.5)


# Windows and sparsities that none of them has.


@pytest.mark.parametrize("m, sparsity, near", [(4, 0.6, "0.5 and 0.75"), (8, 0.9, "0.875 and 1")])
def test_one_shot_windows_refuse_what_no_window_has(m, sparsity, near):
    params = {"w": jnp.ones((8, 2))}
    scope = jp.scopes.windows(m)
    with pytest.raises(ValueError, match=rf"{sparsity} \(there are {near}\)"):
        jp.find_masks(params, sparsity, scope=scope)
    with pytest.raises(ValueError, match=rf"{sparsity} at 'w' \(there are {near}\)"):
        jp.make_masks(params, {"w": sparsity}, scope=scope)


def test_windows_that_exist_pass_and_schedules_round():
    params = {"w": jnp.arange(16.0).reshape(8, 2)}
    for sparsity in (0.0, 0.25, 0.5, 0.75, 1.0, np.float32(0.5)):
        masks = jp.find_masks(params, sparsity, scope=jp.scopes.windows(4))
        assert jp.sparsity(masks, params) == sparsity
    thirds = jp.find_masks({"w": jnp.ones((9, 1))}, 2 / 3, scope=jp.scopes.windows(3))
    assert int(thirds["w"].sum()) == 3
    schedule = jp.schedules.constant(0.6)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, scope=jp.scopes.windows(4))
    _, state = tx.update(params, tx.init(params), params)
    assert jp.summary(params, jp.get_masks(state)).total.sparsity == 0.5
    levels = jp.imp(params, lambda t, m: t, rounds=1, rate=0.2, scope=jp.scopes.windows(4))
    assert [jp.sparsity(level.masks, params) for level in levels] == [0.0, 0.25]


def test_leaves_that_are_no_numbers_are_left_alone(key):
    params = {"w": jax.random.normal(key, (4, 6)), "dropout": jax.random.key(0), "n": jnp.arange(3)}
    masks = jp.find_masks(params, 0.5)
    assert masks["dropout"] is None and masks["n"] is None and masks["w"].sum() == 12
    assert_trees_equal(jax.jit(lambda params: jp.find_masks(params, 0.5))(params), masks)
    assert jp.apply_masks(params, masks)["dropout"] == params["dropout"]
