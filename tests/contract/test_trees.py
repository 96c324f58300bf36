"""Laws 1-5 on every kind of tree that JAX code keeps params in."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import schedules
from tests.contract import laws
from tests.contract.tables import (
    ALLOCATIONS,
    CRITERIA,
    MEMORIES,
    PATTERNS,
    REFUSED,
    SCOPES,
    TREES,
    kernel,
    make_criterion,
)
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


# What other trees show as well, as far as masks of every pattern go.
SLOW = ("callable struct", "paths that meet", "FrozenDict", "tuple")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow if k in SLOW else []) for k in TREES]
)
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
    if (kind, name) == ("paths that meet", "custom"):
        with pytest.raises(ValueError, match="`custom` got several leaves at 'a/kernel'"):
            allocate(params, {".*": 0.5})
        return
    asked = {".*kernel|.*": 0.5} if name == "custom" else 0.5
    tree = allocate(params, asked, where=jp.is_matrix)
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

        @jax.jit
        def step(params, state):
            updates, state = tx.update(params, state, params)  # noqa: B023
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(params)
        for _ in range(3):
            before = state
            params, state = step(params, state)
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


# Whole modules: functions, strings and numbers among the leaves.


class Module(eqx.Module):
    net: eqx.nn.MLP  # its activation is a leaf
    dropout: eqx.nn.Dropout  # and so are these two numbers
    name: str

    def __call__(self, x):
        return self.net(x)


def module():
    return Module(eqx.nn.MLP(8, 8, 8, 1, key=jax.random.key(0)), eqx.nn.Dropout(0.5), "a name")


def test_what_is_no_array_passes_through_masks():
    model = module()
    masks = jp.find_masks(model, 0.5)
    assert jp.sparsity(masks, model) == 0.5 and masks.name is None
    assert_trees_equal(
        jax.tree.leaves(masks), jax.tree.leaves(jp.find_masks(eqx.filter(model, eqx.is_array), 0.5))
    )
    pruned = jp.apply_masks(model, masks)
    assert pruned.name == "a name" and pruned.net.activation is model.net.activation
    assert jp.summary(model, masks).total.sparsity == 0.5
    assert jp.sparsity(jp.find_masks(model, 0.75, within=masks), model) == 0.75


QUICK_CRITERIA = ("taylor", "snip", "magnitude_increase")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK_CRITERIA else pytest.mark.slow)
        for n in CRITERIA
        if n not in MEMORIES
    ],
)
def test_every_criterion_takes_whole_callable_modules_as_evidence(name):
    model = module()

    def loss_fn(model, batch):
        assert model.name == "a name"  # functions of the params get all leaves back
        return jnp.mean(jax.vmap(model)(batch) ** 2)

    masks = jp.find_masks(
        model,
        0.5,
        criterion=make_criterion(name),
        grads=eqx.filter_grad(loss_fn)(model, jnp.ones((2, 8))),
        params_init=module(),
        norms=eqx.filter(module(), eqx.is_array),
        key=jax.random.key(0),
        loss_fn=loss_fn,
        apply_fn=lambda model, x: jax.vmap(model)(x),
        batch=jnp.ones((2, 8)),
    )
    assert jp.sparsity(masks, model) == 0.5


def test_tickets_of_whole_modules_are_found():
    levels = list(
        jp.imp(
            module(),
            lambda ticket, masks: ticket,
            rounds=2,
            rate=0.5,
            criterion=jp.criteria.magnitude_increase,
        )
    )
    assert [jp.sparsity(level.masks, module()) for level in levels] == [0.0, 0.5, 0.75]
    assert levels[2].trained.name == "a name"


@pytest.mark.parametrize(
    "kind", ["callable module", pytest.param("callable struct", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "name", ["taylor", "fisher", "fisher_ema", "movement", "magnitude_increase"]
)
def test_training_takes_callable_trees_as_evidence(kind, name):
    params = TREES[kind]()
    schedule = schedules.constant(0.5)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, criterion=make_criterion(name))
    _, state = jax.jit(tx.update)(params, tx.init(params), params, params_init=params)
    assert jp.sparsity(jp.get_masks(state), params) == 0.5


# A hole for a whole subtree, and several pruners.

NETWORK = {
    "encoder": {"a": {"kernel": kernel()}, "c": [jnp.ones(4)]},
    "head": {"kernel": kernel(8, 4), "bias": jnp.ones(4)},
}


def halved(**settings):
    return jp.prune(optax.adam(0.1), schedule=schedules.constant(0.5), **settings)


PARTS = {
    "one pruner, prefix labels": lambda: optax.partition(
        {"p": halved(), "q": optax.adam(0.1)}, {"encoder": "p", "head": "q"}
    ),
    "two pruners, prefix labels": lambda: optax.partition(
        {"p": halved(), "q": halved()}, {"encoder": "p", "head": "q"}
    ),
    "two pruners, one of them packed": lambda: optax.partition(
        {"p": halved(packed=True), "q": halved()}, {"encoder": "p", "head": "q"}
    ),
    "two pruners, a label a leaf": lambda: optax.partition(
        {"p": halved(), "q": halved()},
        lambda tree: jax.tree.map(lambda w: "p" if w.shape[-1] == 8 else "q", tree),
    ),
    "masked by a prefix": lambda: optax.masked(halved(), {"encoder": True, "head": False}),
    "straight through in parts": lambda: optax.partition(
        {"p": jp.straight_through(optax.sgd(0.1), schedule=schedules.constant(0.5)), "q": halved()},
        {"encoder": "p", "head": "q"},
    ),
}


QUICK_PARTS = ("one pruner, prefix labels", "two pruners, one of them packed")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in QUICK_PARTS else pytest.mark.slow) for k in PARTS]
)
def test_masks_of_parts_of_the_params_go_everywhere(kind, tmp_path):
    tx = PARTS[kind]()
    _, state = jax.jit(tx.update)(NETWORK, tx.init(NETWORK), NETWORK)
    masks = jp.get_masks(state)
    covered = 64 + (0 if "one" in kind[:3] or "masked" in kind else 32)
    assert jp.sparsity(masks, NETWORK) == 0.5
    assert jp.summary(NETWORK, masks).total.total == covered
    pruned = jp.apply_masks(NETWORK, masks)
    assert sum(int((w == 0).sum()) for w in jax.tree.leaves(pruned)) == covered // 2
    assert jp.overlap(masks, masks).total == 1.0
    assert_trees_equal(jp.unpack(jp.pack(masks)), masks)
    jp.checkpoint.save(tmp_path / "m.safetensors", NETWORK, masks)
    assert_trees_equal(jp.checkpoint.load(tmp_path / "m.safetensors", NETWORK)[0], pruned)
    assert jp.sparsity(jp.find_masks(NETWORK, 0.75, within=masks), NETWORK) == 0.75
    if "straight" in kind:
        seen = jp.forward_params(NETWORK, state)
        assert int((seen["encoder"]["a"]["kernel"] == 0).sum()) == 32


@pytest.mark.parametrize("kind", PARTS)
def test_each_pruner_takes_the_masks_of_its_part(kind):
    tx = PARTS[kind]()
    state = tx.init(NETWORK)
    new = jax.tree.map(lambda m: jnp.zeros_like(m).at[0].set(True), jp.get_masks(state))
    assert_trees_equal(jp.get_masks(jp.with_masks(state, new)), new)
    whole = jp.dense_masks(NETWORK)
    if "one" in kind[:3] or "masked" in kind:
        with pytest.raises(ValueError, match="masks for 'head/kernel', which no pruner"):
            jp.with_masks(state, whole)
    else:
        assert jp.sparsity(jp.get_masks(jp.with_masks(state, whole)), NETWORK) == 0.0


def test_two_pruners_of_the_same_leaves_are_refused():
    nested = jp.prune(jp.hold(optax.sgd(0.1)), schedule=schedules.constant(0.5))
    for tx in (nested, optax.chain(jp.hold(optax.sgd(0.1)), jp.hold(optax.identity()))):
        state = jax.jit(tx.init)(NETWORK)  # where nobody is warned
        for use in (jp.get_masks, lambda s: jp.with_masks(s, jp.dense_masks(NETWORK))):
            words = "holds 2 pruners, want one for each leaf, but several mask 'encoder/a/kernel'"
            with pytest.raises(ValueError, match=words):
                use(state)
