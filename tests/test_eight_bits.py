"""Weights of eight bits, which promote to nothing by themselves."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria
from tests.contract.tables import PATTERNS
from tests.contract.trainings import SPARSE, wrappers
from tests.helpers import assert_trees_equal, assert_zero_where_removed

EIGHT = ("float8_e4m3fn", "float8_e5m2")
W = np.asarray(jax.random.normal(jax.random.key(0), (8, 8)))
GRADED = {
    "magnitude": criteria.magnitude,
    "taylor": criteria.taylor,
    "fisher": criteria.fisher,
    "fisher_ema": criteria.fisher_ema(0.5),
    "movement": criteria.movement,
}


def step_of(tx, grads_in):
    """One step of training with gradients of another type, added as they ask for."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: p.astype(grads_in or p.dtype), params)
        updates, state = tx.update(grads, state, params)
        add = lambda p, u: (p.astype(u.dtype) + u).astype(p.dtype)
        apply = optax.apply_updates if grads_in is None else lambda *t: jax.tree.map(add, *t)
        return apply(params, updates), state

    return step


QUICK = [("prune", EIGHT[1], jnp.float32), ("rigl", EIGHT[0], None), ("hold", EIGHT[0], None)]


@pytest.mark.parametrize(
    "name, dtype, grads_in",
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(wrappers(), EIGHT, [None, jnp.float32])
    ],
)
def test_every_wrapper_leaves_exact_zeros_among_eight_bits(name, dtype, grads_in):
    params = {"kernel": jnp.asarray(W, dtype)}
    tx = wrappers()[name](optax.sgd(0.1))
    step, state = step_of(tx, grads_in), tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert params["kernel"].dtype == dtype
    if name in ("prune", *SPARSE):
        assert_zero_where_removed(params, jp.get_masks(state))
        assert jp.sparsity(jp.get_masks(state), params) == 0.75


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", GRADED)
def test_scores_of_eight_bits_are_those_of_the_same_numbers_in_float32(name, pattern):
    narrow = {"kernel": jnp.asarray(W, EIGHT[0])}
    same = jax.tree.map(lambda w: w.astype(jnp.float32), narrow)
    criterion = GRADED[name]

    @jax.jit
    def find(params, grads):
        evidence = {"grads": grads}
        if hasattr(criterion, "init"):
            state = criterion.update(criterion.init(params), params, grads)
            evidence = {"state": state}
        settings = {"criterion": criterion, "pattern": PATTERNS[pattern]}
        return jp.find_masks(params, 0.5, **settings, **evidence)

    want = find(same, same)
    assert_trees_equal(find(narrow, same), want)
    assert_trees_equal(find(narrow, narrow), want)


def test_units_of_coupled_groups_are_scored_among_eight_bits():
    params = {"w": jnp.asarray(W, EIGHT[0]), "v": jnp.asarray(W.T, EIGHT[0])}
    net = lambda p, x: jax.nn.relu(x @ p["w"].astype(x.dtype)) @ p["v"].astype(x.dtype)
    groups = jp.find_groups(net, params, jnp.ones((1, 8)))
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    assert [int(m.sum()) for m in jax.tree.leaves(masks)] == [4, 4]
