"""Tests of sparse training that falls out of prune: AC/DC, and static random sparsity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.contract.laws import leaves
from tests.contract.tables import small_params
from tests.helpers import TraceCount, assert_zero_where_removed, slow_keep

LR = 0.25
# Sparse at 2 3, 7 8 and from 12 on, dense before and between.
CYCLE = {"dense": 3, "sparse": 2, "begin": 2, "end": 12}
SPARSE = (2, 3, 7, 8, 12, 13)
STEPS = 14


def gradients(params):
    rng = np.random.default_rng(11)
    draw = lambda p: jnp.asarray(rng.integers(-9, 10, (STEPS, *p.shape)) / 8, p.dtype)
    return jax.tree.map(draw, params)


def train(tx, params, all_grads):
    """Train in one compiled step; give the params and masks after every step."""

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    traces, history = TraceCount(step), []
    step, state = jax.jit(traces), tx.init(params)
    for i in range(STEPS):
        params, state = step(params, state, jax.tree.map(lambda g: g[i], all_grads))  # noqa: B023
        history.append((params, jp.get_masks(state)))
    assert traces.count == 1
    return history


def test_ac_dc_is_that_of_a_slow_loop():
    params = small_params()
    all_grads = gradients(params)
    final = scopes.erk(params, 0.75)
    tx = jp.prune(optax.sgd(LR), schedule=schedules.cyclic(final, **CYCLE))
    w, share = leaves(params), leaves(final)
    masks = {path: np.ones(w[path].shape, bool) for path in share}
    found = []
    for step, (got, got_masks) in enumerate(train(tx, params, all_grads)):
        grads = leaves(jax.tree.map(lambda g: g[step], all_grads))  # noqa: B023
        for path, m in masks.items():
            if step in SPARSE and step - 1 not in SPARSE:  # among all weights, before the update
                kept = m.size - round(float(share[path]) * m.size)
                masks[path] = slow_keep(np.abs(w[path]), kept)
            elif step not in SPARSE:
                masks[path] = np.ones(m.shape, bool)
        w = {path: p - LR * grads[path] for path, p in w.items()}
        w = {path: np.where(masks[path], p, 0) if path in masks else p for path, p in w.items()}
        for path, p in leaves(got).items():
            np.testing.assert_array_equal(p, w[path], f"{path} at {step}")
        for path, m in leaves(got_masks).items():
            np.testing.assert_array_equal(m, masks[path], f"{path} at {step}")
        found.append(masks["b", "kernel"])
    assert (found[2] != found[7]).any() and (found[7] != found[12]).any()
    assert jp.sparsity(got_masks, params) == 0.75


def test_what_a_sparse_phase_removed_trains_again_in_the_dense_phase():
    params = small_params()
    schedule = schedules.cyclic(0.5, **CYCLE)
    tx = jp.prune(optax.adam(0.1), schedule=schedule, pattern=patterns.Channels(-1))
    history = train(tx, params, gradients(params))
    for step, (p, masks) in enumerate(history):
        assert_zero_where_removed(p, masks)
        assert jp.sparsity(masks, params) == (0.5 if step in SPARSE else 0.0)
    removed = np.broadcast_to(~np.asarray(history[3][1]["a"]["kernel"]), (8, 8))
    for step in (4, 5, 6):
        before, now = (np.asarray(history[i][0]["a"]["kernel"])[removed] for i in (step - 1, step))
        assert (now != before).all()


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_a_cycle_of_nothing_and_of_everything(sparsity):
    params = small_params()
    tx = jp.prune(optax.sgd(LR), schedule=schedules.cyclic(sparsity, **CYCLE))
    with jax.disable_jit():
        state = tx.init(params)
        for step in range(5):
            _, state = tx.update(params, state, params)
            want = sparsity if step in SPARSE else 0.0
            assert jp.sparsity(jp.get_masks(state), params) == want


def test_static_random_sparsity_holds_one_mask_for_ever(key):
    params = small_params()
    erk = scopes.erk(params, 0.8)
    tx = jp.prune(
        optax.adam(0.1), schedule=schedules.constant(erk), criterion=criteria.random, key=key
    )
    first = jp.find_masks(params, erk, criterion=criteria.random, key=jax.random.fold_in(key, 0))
    for p, masks in train(tx, params, gradients(params)):
        assert_zero_where_removed(p, masks)
        for a, b in zip(*map(jax.tree.leaves, (masks, first)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert jp.sparsity(masks, params) == 0.8
