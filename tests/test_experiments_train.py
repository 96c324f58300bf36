"""Tests of experiments/common/train.py: steps, whole trainings, seeds side by side."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments.common import train
from experiments.common.data import Examples
from experiments.common.models import MLP
from tests.helpers import TraceCount, assert_trees_equal

MODEL = MLP((8,), 3)


@pytest.fixture
def problem(key):
    inputs = jax.random.normal(key, (30, 6))
    targets = (inputs[:, 0] > 0).astype(jnp.int32) + (inputs[:, 1] > 0)
    params = MODEL.init(key, inputs)["params"]
    masks = jp.find_masks(params, 0.5)
    return jp.apply_masks(params, masks), masks, Examples(inputs, targets)


def test_every_epoch_sees_every_example_once(key):
    order = train.batch_order(key, examples=12, steps=9, batch_size=4).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(order, axis=1), [range(12)] * 3)
    assert not np.array_equal(order[0], order[1])


def test_a_longer_order_begins_with_the_shorter_one(key):
    short = train.batch_order(key, examples=10, steps=5, batch_size=3)
    long = train.batch_order(key, examples=10, steps=11, batch_size=3)
    np.testing.assert_array_equal(short, long[:5])


def test_a_batch_may_be_larger_than_the_data(key):
    order = train.batch_order(key, examples=3, steps=2, batch_size=7)
    assert order.shape == (2, 7) and set(np.ravel(order)) == {0, 1, 2}


def by_hand(params, masks, examples, order):
    """Adam under masks, written out."""

    @jax.jit
    def loss(params, inputs, targets):
        logits = MODEL.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    tx = optax.adam(0.01)
    state = tx.init(params)
    for batch in order:
        grads = jax.grad(loss)(params, examples.inputs[batch], examples.targets[batch])
        updates, state = tx.update(grads, state, params)
        params = jp.apply_masks(optax.apply_updates(params, updates), masks)
    return params


def recipe(rate=0.01):
    return train.Recipe(train.learner(MODEL), jp.hold(optax.adam(rate)))


def assert_close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_scan_and_a_loop_of_steps_do_what_a_loop_by_hand_does(key, problem):
    params, masks, examples = problem
    order = train.batch_order(key, examples=30, steps=12, batch_size=5)
    expected = by_hand(params, masks, examples, order)
    state = jp.with_masks(jax.jit(recipe().tx.init)(params), masks)
    scanned, _, seen = jax.jit(
        functools.partial(train.scan, recipe(), look=lambda s: s.inner_state[0].count)
    )({"params": params}, state, examples, order)
    assert seen.tolist() == list(range(12))  # what the optimizer's state was before each step
    assert_close(scanned["params"], expected)
    batches = ((Examples(*(a[i] for a in examples)), np.float32(0.01)) for i in order)
    looped, _ = train.loop(recipe, {"params": params}, state, batches, train.compiler())
    assert_close(looped["params"], expected)


def test_a_step_shows_the_network_what_the_recipe_says_and_moves_its_statistics():
    recipe = train.Recipe(
        learn=lambda v, x: (v["params"] * x, {"count": v["count"] + 1}),
        tx=optax.sgd(1.0),
        loss=lambda logits, targets: ((logits - targets) ** 2).sum(),
        shown=lambda params, state: 2 * params,
    )
    variables = {"params": jnp.float32(1.0), "count": 3, "other": 5}
    batch = Examples(jnp.ones(1), jnp.zeros(1))
    variables, _ = train.step(recipe, variables, recipe.tx.init(1.0), batch)
    # The loss is that of 2, so its gradient is 4; what the optimizer moves is 1.
    assert variables == {"params": -3.0, "count": 4, "other": 5}


@pytest.mark.parametrize(
    "seeds, devices", [(1, 1), (2, 2), (5, 5), (8, 8), (9, 3), (11, 1), (12, 6), (16, 8)]
)
def test_as_many_devices_share_the_seeds_as_divide_them(seeds, devices):
    assert train.mesh(seeds).devices.size == devices


def collatz(seed, step):
    """Count the rounds that a loop takes, as many as the seed decides."""
    start, key = seed

    def halve(carry):
        n, rounds = carry
        return jnp.where(n % 2 == 0, n // 2, 3 * n + 1), rounds + step

    _, rounds = jax.lax.while_loop(lambda carry: carry[0] > 1, halve, (start, jnp.int32(0)))
    return {"rounds": rounds, "drawn": jax.random.normal(key, (3,)), "hole": None}


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_seeds_side_by_side_have_what_they_have_alone(count):
    starts = [(jnp.int32(n), jax.random.key(n)) for n in range(1, count + 1)]
    together = list(train.each_seed(collatz, starts, jnp.int32(2), together=True))
    alone = list(train.each_seed(collatz, starts, jnp.int32(2), together=False))
    assert [type(each["rounds"]) for each in together] == [np.int32] * count
    for one, other, start in zip(together, alone, starts, strict=True):
        assert_trees_equal(one, other)
        assert_trees_equal(one, jax.device_get(collatz(start, jnp.int32(2))))


def test_what_all_seeds_share_lies_on_the_devices_already():
    count = TraceCount(lambda seeds, common: train.side_by_side(jnp.multiply, seeds, common))
    run, common = jax.jit(count), train.placed(jnp.arange(4.0), 8, together=True)
    assert common.sharding.is_fully_replicated and len(common.devices()) == 8
    for factor in (1.0, 2.0):
        out = run(factor * jnp.arange(8.0), common)
        assert len(out.devices()) == 8
        np.testing.assert_array_equal(out, factor * np.outer(np.arange(8), np.arange(4)))
    assert count.count == 1


def test_stacked_trees_come_apart_again():
    trees = [{"a": np.arange(3) + n, "b": (np.float32(n), None)} for n in range(4)]
    for tree, back in zip(trees, train.unstack(train.stack(trees)), strict=True):
        assert_trees_equal(back, tree)
