"""Tests of what is left out because the wrapped optimizer never moves it."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp
from jaxprune._frozen import frozen
from tests.contract import laws
from tests.contract.trainings import SPARSITY, wrappers
from tests.helpers import assert_trees_equal

PARAMS = {
    "base": {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4) / 16, "bias": jnp.ones(4)},
    "head": {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4) / 8},
}
MASK = {"base": {"kernel": True, "bias": True}, "head": {"kernel": False}}
LABELS = {"base": "frozen", "head": "trained"}
ZERO = optax.set_to_zero()


def parts(zero, trained):
    return optax.partition({"frozen": zero, "trained": trained}, LABELS)


def by_hand(grads, params):
    del params
    return {**grads, "base": jax.tree.map(jnp.zeros_like, grads["base"])}


FREEZING = {
    "partition": lambda: parts(ZERO, optax.adam(0.1)),
    "partition of no rate": lambda: parts(optax.sgd(0.0), optax.adam(0.1)),
    "multi_transform": lambda: optax.multi_transform({"frozen": ZERO, "trained": ADAM}, LABELS),
    "freeze last": lambda: optax.chain(optax.adam(0.1), optax.freeze(MASK)),
    "freeze first": lambda: optax.chain(optax.freeze(MASK), optax.adam(0.1)),
    "selective_transform": lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=MASK),
    "masked": lambda: optax.chain(
        optax.scale_by_adam(), optax.masked(ZERO, MASK), optax.scale_by_learning_rate(0.1)
    ),
    "inside a chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), parts(ZERO, ADAM)),
    "inside MultiSteps": lambda: optax.MultiSteps(parts(ZERO, ADAM), 2).gradient_transformation(),
    "inside apply_if_finite": lambda: optax.apply_if_finite(parts(ZERO, ADAM), 3),
    "by hand": lambda: optax.chain(optax.stateless(by_hand), optax.sgd(0.1)),
    "by hand, compiled": lambda: optax.chain(optax.stateless(jax.jit(by_hand)), optax.sgd(0.1)),
}
ADAM = optax.adam(0.1)


@pytest.mark.parametrize("name", FREEZING)
def test_what_is_frozen_is_found_however_it_is(name):
    assert frozen(FREEZING[name](), PARAMS) == ["base/bias", "base/kernel"]


TRAINING = {
    "adam": ADAM,
    "a rate that starts from zero": optax.adam(optax.linear_schedule(0.0, 0.1, 10)),
    "a rate of zero at first": optax.sgd(
        optax.join_schedules([optax.constant_schedule(0.0), optax.constant_schedule(0.1)], [5])
    ),
    "a rate of zero that may be set": parts(
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.0), ADAM
    ),
    "no rate at all": optax.sgd(0.0),
    "nothing moves": ZERO,
    "MultiSteps": optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "apply_every": optax.chain(optax.sgd(0.1), optax.apply_every(3)),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
    "conditionally_mask": optax.conditionally_mask(ADAM, lambda step, **_: step > 3),
    "decay of what has no gradient": optax.chain(optax.freeze(MASK), optax.adamw(0.1)),
    "masked Adam": optax.masked(ADAM, MASK),
    "noise from a key": optax.chain(ADAM, optax.add_noise(0.1, 0.5, jax.random.key(0))),
    "L-BFGS": optax.lbfgs(),  # wants more than gradients: nothing is assumed
}


@pytest.mark.parametrize("name", TRAINING)
def test_what_moves_at_some_time_is_not_frozen(name):
    assert not frozen(TRAINING[name], PARAMS)


@pytest.mark.parametrize("name", wrappers())
def test_frozen_leaves_are_left_out_by_default_in_every_wrapper(name):
    masks = jp.get_masks(wrappers()[name](FREEZING["partition"]()).init(PARAMS))
    assert masks["base"] == {"kernel": None, "bias": None}
    assert masks["head"]["kernel"].shape == (4, 4)


SLOW = ("rigl", "set", "straight_through")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in wrappers()]
)
def test_frozen_leaves_stay_as_they_are_in_every_wrapper(name):
    tx = wrappers()[name](FREEZING["partition"]())
    step = jax.jit(lambda p, s: tx.update(p, s, p))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        updates, new = step(params, state)
        laws.closed(state, new)
        params, state = optax.apply_updates(params, updates), new
    masks = jp.get_masks(state)
    assert jp.sparsity(masks, params) == (0.0 if name == "hold" else SPARSITY)
    assert_trees_equal(params["base"], PARAMS["base"])


def test_an_explicit_where_is_obeyed_for_frozen_leaves():
    where = jp.by_path(".*kernel")
    for tx in (jp.hold(FREEZING["partition"](), where=where), pruned(where=where)):
        assert jp.get_masks(tx.init(PARAMS))["base"]["kernel"] is not None


def pruned(inner=None, **settings):
    schedule = settings.pop("schedule", jp.schedules.constant(0.5))
    return jp.prune(inner or FREEZING["partition"](), schedule=schedule, **settings)


def test_coupled_groups_with_a_frozen_member_stay_whole():
    def net(p, x):
        return jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"] + p["bias"][None]) @ p["c"]

    params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    params["c"] = jnp.ones((4, 2))
    groups = jp.find_groups(net, params, jnp.ones((1, 2)))
    labels = {name: "frozen" if name == "a" else "trained" for name in params}
    inner = optax.partition({"frozen": ZERO, "trained": optax.sgd(0.1)}, labels)
    tx = pruned(inner, pattern=jp.patterns.Coupled(groups))
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    masks = jp.get_masks(state)
    assert masks["a"] is None
    assert [int((~masks[name]).sum()) for name in ("b", "bias", "c")] == [2, 2, 2]


def test_a_tree_of_sparsities_may_have_numbers_for_frozen_leaves():
    tree = jp.scopes.uniform(PARAMS, 0.5)
    tx = pruned(schedule=jp.schedules.constant(tree))
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    rigl = jp.dynamic.rigl(FREEZING["partition"](), sparsity=tree, begin=0, end=2, every=1)
    for masks in (jp.get_masks(state), jp.get_masks(rigl.init(PARAMS))):
        assert jp.sparsity(masks, PARAMS) == 0.5


def test_where_all_that_could_be_pruned_is_frozen_it_is_said():
    labels = {"base": "frozen", "head": {"kernel": "frozen", "bias": "trained"}}
    params = {**PARAMS, "head": {**PARAMS["head"], "bias": jnp.ones(4)}}
    inner = optax.partition({"frozen": ZERO, "trained": ADAM}, labels)
    for name, wrap in wrappers().items():
        words = rf"`{name}` finds nothing.*freezes 'base/kernel', 'head/kernel'.*obeyed"
        with pytest.raises(ValueError, match=words):
            wrap(inner).init(params)


def test_masks_without_a_leaf_that_trains_are_refused_as_before():
    tx = pruned()
    masks = {"base": {"kernel": jnp.ones((4, 4), bool), "bias": None}, "head": {"kernel": None}}
    with pytest.raises(ValueError, match=r"finds masks for .*'head/kernel'.*for 'base/kernel'"):
        tx.update(PARAMS, jp.with_masks(tx.init(PARAMS), masks), PARAMS)


def test_exclude_on_top_of_the_default_leaves_out_what_is_frozen_as_well():
    params = {name: {"kernel": jnp.ones((4, 4)) * i} for i, name in enumerate("abc", 1)}
    params = jax.tree.map(lambda w: w + jnp.arange(16.0).reshape(4, 4), params)
    inner = optax.partition(
        {"train": optax.adam(0.1), "freeze": optax.set_to_zero()},
        {"a": "train", "b": "freeze", "c": "train"},
    )
    for where, want in {
        jp.exclude("c/kernel"): ["a"],
        jp.exclude("c/kernel", where=jp.by_path(".*kernel")): ["a", "b"],
    }.items():
        tx = jp.prune(inner, schedule=jp.schedules.constant(0.5), where=where)
        masks = jp.get_masks(tx.init(params))
        assert [name for name in "abc" if masks[name]["kernel"] is not None] == want
