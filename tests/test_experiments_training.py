"""Tests of experiments/common/training.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments.common import training
from experiments.common.data import Split
from experiments.common.models import MLP

MODEL = MLP((8,), 3)


@pytest.fixture
def problem(key):
    images = jax.random.normal(key, (30, 6))
    labels = (images[:, 0] > 0).astype(jnp.int32) + (images[:, 1] > 0)
    params = MODEL.init(key, images)["params"]
    masks = jp.find_masks(params, 0.5)
    ticket = jp.apply_masks(params, masks)
    return ticket, masks, Split(images, labels), Split(images[:9], labels[:9])


def train(problem, order, learning_rate=0.01):
    return training.train(
        *problem[:2], order, *problem[2:], model=MODEL, learning_rate=learning_rate
    )


def test_every_epoch_sees_every_example_once(key):
    order = training.batch_order(key, examples=12, steps=9, batch_size=4).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(order, axis=1), [range(12)] * 3)
    assert not np.array_equal(order[0], order[1])


def test_a_longer_order_begins_with_the_shorter_one(key):
    short = training.batch_order(key, examples=10, steps=5, batch_size=3)
    long = training.batch_order(key, examples=10, steps=11, batch_size=3)
    np.testing.assert_array_equal(short, long[:5])


def test_a_batch_may_be_larger_than_the_data(key):
    order = training.batch_order(key, examples=3, steps=2, batch_size=7)
    assert order.shape == (2, 7) and set(np.ravel(order)) == {0, 1, 2}


@pytest.mark.parametrize(("evaluations", "index"), [(1, 0), (2, 0), (6, 0), (30, 4), (40, 6)])
def test_early_is_one_sixth_of_the_run(evaluations, index):
    assert training.early_evaluation(evaluations) == index


def test_the_scan_does_what_a_plain_loop_does(key, problem):
    params, masks, data, validation = problem
    order = training.batch_order(key, examples=30, steps=12, batch_size=5).reshape(4, 3, 5)
    outcome = train(problem, order)

    @jax.jit
    def loss(params, images, labels):
        logits = MODEL.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = optax.adam(0.01)
    state, losses = tx.init(params), []
    for batches in order:
        for batch in batches:
            grads = jax.grad(loss)(params, data.images[batch], data.labels[batch])
            updates, state = tx.update(grads, state, params)
            params = jp.apply_masks(optax.apply_updates(params, updates), masks)
        losses.append(loss(params, *validation))
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)
    for found, wanted in zip(jax.tree.leaves(outcome.final), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_pruned_weights_are_zero_and_biases_are_free(key, problem):
    order = training.batch_order(key, examples=30, steps=4, batch_size=5).reshape(2, 2, 5)
    final = train(problem, order).final
    for layer, mask in problem[1].items():
        assert not np.any(final[layer]["kernel"][~mask["kernel"]])
        assert np.any(final[layer]["bias"])


def test_best_and_early_are_the_parameters_of_their_moment(key, problem):
    order = training.batch_order(key, examples=30, steps=60, batch_size=5).reshape(12, 5, 5)
    outcome = train(problem, order, learning_rate=1.0)  # so large that the loss goes up again
    best = int(outcome.losses.argmin())
    assert 0 < best < 11
    for params, moment in [(outcome.best, best), (outcome.early, 1), (outcome.final, 11)]:
        until_then = train(problem, order[: moment + 1], learning_rate=1.0).final
        for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(until_then), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_training_compiles_once_and_leaves_the_start_alone(key, problem):
    start = jax.tree.map(np.asarray, problem[0])
    order = training.batch_order(key, examples=30, steps=6, batch_size=5).reshape(2, 3, 5)
    before = training.train._cache_size()
    for sparsity in (0.0, 0.3, 0.8):
        masks = jp.find_masks(problem[0], sparsity)
        train((problem[0], masks, *problem[2:]), order)
    assert training.train._cache_size() == before + 1
    for found, wanted in zip(jax.tree.leaves(problem[0]), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_accuracy_counts_hits():
    images = jnp.eye(3)
    params = {
        "hidden_0": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)},
        "out": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)},
    }
    examples = Split(images, jnp.array([0, 1, 0]))
    assert training.accuracy(params, examples, model=MLP((3,), 3)) == 2 / 3
