"""Laws 1-5 on every kind of tree that JAX code keeps params in."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import schedules
from tests.contract import laws
from tests.contract.tables import ALLOCATIONS, PATTERNS, REFUSED, SCOPES, TREES
from tests.contract.trainings import SPARSE, TRAININGS
from tests.helpers import assert_trees_equal, assert_zero_where_removed

PAIRS = [
    pair
    for pair in itertools.product(PATTERNS, SCOPES)
    if pair not in REFUSED and pair[1] not in ALLOCATIONS
]
is_none = lambda x: x is None


def structure(tree):
    return jax.tree.structure(tree, is_leaf=is_none)


@pytest.mark.parametrize("kind", TREES)
def test_masks_of_every_pattern_and_scope_obey_the_laws(kind):
    params = TREES[kind]()
    dense = jp.dense_masks(params)

    @jax.jit
    def find(params):
        return {
            pair: jp.find_masks(params, 0.5, pattern=PATTERNS[pair[0]], scope=SCOPES[pair[1]])
            for pair in PAIRS
        }

    for (pattern, scope), masks in find(params).items():
        assert structure(masks) == structure(params)
        laws.mirror(params, masks)
        names = "magnitude", pattern, scope
        laws.count_and_order(names, params, params, None, lambda path: 0.5, dense, masks)
        laws.zero(jp.apply_masks(params, masks), masks)


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_allocations_mirror_every_kind_of_tree(kind, name):
    params = TREES[kind]()
    allocate = getattr(jp.scopes, name)
    tree = allocate(params, {".*kernel|.*": 0.5} if name == "custom" else 0.5)
    assert structure(tree) == structure(params)
    sparsities = laws.leaves(tree)
    for path, mask in laws.leaves(jp.find_masks(params, tree)).items():
        assert int((~mask).sum()) == round(float(sparsities[path]) * mask.size)


@pytest.mark.parametrize("kind", TREES)
def test_training_prunes_every_kind_of_tree(kind):
    params = TREES[kind]()
    tx = jp.prune(optax.adam(0.1), schedule=schedules.linear(0.5, begin=0, end=2, every=1))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        before = state
        params, state = step(params, state)
        laws.closed(before, state)
    masks = jp.get_masks(state)
    laws.zero(params, state.masks)
    assert jp.sparsity(masks, params) == 0.5
    assert all(isinstance(m, jax.Array) for m in jax.tree.leaves(masks))
    assert_trees_equal(jp.get_masks(jp.with_masks(state, masks)), masks)
    assert jp.summary(params, masks).total.sparsity == 0.5


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "nnx state" else pytest.mark.slow) for k in TREES]
)
def test_sparse_training_takes_every_kind_of_tree(kind):
    for name, wrap in TRAININGS.items():
        params, tx = TREES[kind](), wrap(optax.adam(0.1))
        with jax.disable_jit():
            state = tx.init(params)
            for _ in range(3):
                before = state
                updates, state = tx.update(params, state, params)
                params = optax.apply_updates(params, updates)
                laws.closed(before, state)
        masks = jp.get_masks(state)
        seen = params if name in SPARSE else jp.forward_params(params, state)
        assert structure(seen) == structure(params)
        assert_zero_where_removed(seen, masks)
        kept = {p: int(m.sum()) for p, m in laws.leaves(jp.get_masks(before)).items()}
        if name in SPARSE:
            assert kept == {p: int(m.sum()) for p, m in laws.leaves(masks).items()}


@pytest.mark.parametrize("kind", TREES)
def test_tickets_are_found_in_every_kind_of_tree(kind):
    params = TREES[kind]()
    levels = list(jp.imp(params, lambda ticket, masks: ticket, rounds=2, rate=0.5))
    assert [jp.sparsity(level.masks, params) for level in levels] == [0.0, 0.5, 0.75]
    assert structure(levels[2].ticket) == structure(params)


@pytest.mark.parametrize("kind", TREES)
def test_masks_of_every_kind_of_tree_are_packed_and_compared(kind):
    params = TREES[kind]()
    masks = jp.find_masks(params, 0.5)
    assert_trees_equal(jp.unpack(jp.pack(masks)), masks)
    assert jp.overlap(masks, masks).total == 1.0


def test_the_container_does_not_change_the_masks():
    leaves = [jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)] * 2
    found = [
        jax.tree.leaves(jp.find_masks(tree, 0.5, scope=jp.scopes.across))
        for tree in (leaves, tuple(leaves), dict(enumerate(leaves)))
    ]
    assert_trees_equal(found[0], found[1])
    assert_trees_equal(found[0], found[2])
