"""Laws 4-8 over a table of optimizers and of what optax puts around or inside them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import schedules
from tests.contract import laws
from tests.contract.tables import OPTIMIZERS, WRAPPERS, small_params
from tests.contract.trainings import SPARSE, TRAININGS, takes, wrappers
from tests.helpers import TraceCount, assert_trees_equal

STEPS = 6
TRACES = {"lbfgs": 2}  # optax starts its state with weak types: bare, it is traced twice as well


def loss(params):
    """Pull every weight towards another number."""
    leaves = jax.tree.leaves(params)
    return sum(jnp.sum((p - 0.3 * (i + 1)) ** 2) for i, p in enumerate(leaves))


def stepper(make):
    """One compiled step of the optimizer that `make` builds from a (traced) final sparsity."""

    def step(final, params, state):
        tx = optax.with_extra_args_support(make(final))
        value, grads = jax.value_and_grad(loss)(params)
        extra = {"value": value, "grad": grads, "value_fn": loss}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    traces = TraceCount(step)
    return jax.jit(traces), traces


def pruned_to(final):
    schedule = schedules.linear(final, begin=0, end=4, every=2)
    return lambda inner: jp.prune(inner, schedule=schedule)


def check(step, make, final, arrived=True):
    """Train, hold every step against the laws, and give the final params."""
    params, state = small_params(), make(final).init(small_params())
    for _ in range(STEPS):
        new_params, new_state = step(final, params, state)
        masks = jp.get_masks(new_state)
        laws.closed(state, new_state)
        laws.monotone(jp.get_masks(state), masks)
        laws.zero(new_params, masks)
        params, state = new_params, new_state
    if arrived:
        for m in jax.tree.leaves(masks):
            assert int((~m).sum()) == round(final * m.size)
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_laws_hold_around_every_optimizer(name):
    make = lambda final: pruned_to(final)(OPTIMIZERS[name]())
    step, traces = stepper(make)
    check(step, make, 0.75)
    check(step, make, 0.0)
    assert traces.count == TRACES.get(name, 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_given_masks_hold_under_every_optimizer(name):
    masks = jp.find_masks(small_params(), 0.5)
    tx = jp.hold(OPTIMIZERS[name]())
    step, traces = stepper(lambda final: tx)
    params, state = small_params(), jp.with_masks(tx.init(small_params()), masks)
    for _ in range(STEPS):
        params, new_state = step(0.0, params, state)
        laws.closed(state, new_state)
        laws.zero(params, masks)
        state = new_state
    assert traces.count == TRACES.get(name, 1)
    assert_trees_equal(jp.get_masks(state), masks)
    moved = jax.tree.map(lambda a, b: (a != b).any(), params, small_params())
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_laws_hold_in_every_position(name):
    make = lambda final: WRAPPERS[name](pruned_to(final))
    step, traces = stepper(make)
    # Inside MultiSteps three of the six steps reach the pruner: the updates 0 to 2 of its ramp.
    inside = name == "inside MultiSteps"
    check(step, make, 0.75, arrived=not inside)
    check(step, make, 0.0)
    assert traces.count == 1


@pytest.mark.parametrize("name", WRAPPERS)
def test_given_masks_hold_in_every_position(name):
    masks = jp.find_masks(small_params(), 0.5)
    tx = WRAPPERS[name](jp.hold)
    step, _ = stepper(lambda final: tx)
    params, state = small_params(), jp.with_masks(tx.init(small_params()), masks)
    for _ in range(STEPS):
        params, state = step(0.0, params, state)
    laws.zero(params, masks)
    assert [m.tolist() for m in jax.tree.leaves(jp.get_masks(state))] == [
        m.tolist() for m in jax.tree.leaves(masks)
    ]


def test_every_sparse_training_is_in_the_table():
    assert set(jp.dynamic.__all__) | {"straight_through"} == set(TRAININGS)


FAST = {
    *(("rigl", "schedule_free"), ("set", "muon"), ("straight_through", "lbfgs")),
    *(("rigl", "inside MultiSteps"), ("straight_through", "inside apply_if_finite")),
}
EVERY_TRAINING = [
    pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in FAST))
    for pair in itertools.product(TRAININGS, [*OPTIMIZERS, *WRAPPERS])
    if takes(*pair)
]


@pytest.mark.parametrize(("training", "name"), EVERY_TRAINING)
def test_the_laws_hold_for_sparse_training_with_every_optimizer(training, name):
    wrap = TRAININGS[training]
    tx = WRAPPERS[name](wrap) if name in WRAPPERS else wrap(OPTIMIZERS[name]())
    step, traces = stepper(lambda final: tx)
    params, state = small_params(), tx.init(small_params())
    for i in range(STEPS):
        params, new_state = step(0.0, params, state)
        laws.closed(state, new_state)
        old, new = (jp.get_masks(s) for s in (state, new_state))
        if training in SPARSE:
            if i or name != "inside MultiSteps":  # which emits no update at first
                laws.zero(params, new)
            for a, b in zip(*map(jax.tree.leaves, (old, new)), strict=True):
                assert int(a.sum()) == int(b.sum())
        state = new_state
    assert traces.count == TRACES.get(name, 1)
    assert all(bool(jnp.isfinite(p).all()) for p in jax.tree.leaves(params))


def test_a_micro_step_inside_and_an_emitted_update_around_multi_steps_count():
    def removed_after(tx):
        state, params, counts = tx.init(small_params()), small_params(), []
        step = jax.jit(lambda p, s: tx.update(p, s, p))
        for _ in range(4):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
            counts.append(jp.sparsity(jp.get_masks(state), params))
        return counts

    ramp = schedules.linear(0.75, begin=1, end=3, every=1)
    accumulated = lambda tx: optax.MultiSteps(tx, 2).gradient_transformation()
    micro = removed_after(jp.prune(accumulated(optax.sgd(0.1)), schedule=ramp))
    emitted = removed_after(accumulated(jp.prune(optax.sgd(0.1), schedule=ramp)))
    assert micro == [0.0, 0.0, 0.375, 0.75]
    assert emitted == [0.0, 0.0, 0.0, 0.0]  # emitted updates 0 and 1 of the ramp


def test_a_step_that_is_not_finite_leaves_masks_and_zeros_alone():
    tx = optax.apply_if_finite(jp.prune(optax.adam(0.1), schedule=schedules.constant(0.5)), 5)
    params, state = small_params(), tx.init(small_params())
    step = jax.jit(tx.update)
    for scale in (1.0, jnp.nan, 1.0):
        grads = jax.tree.map(lambda p: p * scale, params)  # noqa: B023
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
        laws.zero(params, jp.get_masks(state))
    assert all(jnp.isfinite(p).all() for p in jax.tree.leaves(params))


def test_gradients_that_are_not_finite_leave_exact_zeros_where_weights_are_removed():
    tx = jp.prune(optax.sgd(0.1), schedule=schedules.constant(0.5))
    params, state = small_params(), tx.init(small_params())
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.inf), params)
    updates, state = tx.update(grads, state, params)
    laws.zero(optax.apply_updates(params, updates), jp.get_masks(state))


# Number formats.

NARROW = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    "adam": lambda: optax.adam(0.1, eps=1e-4),  # float16 takes 1e-8 for zero
    "adam in float32": lambda: optax.adam(0.1, eps=1e-4, mu_dtype=jnp.float32),
}


# Every two of type, optimizer and width of gradients meet in the fast suite.
HALVES = [
    pytest.param(
        dtype,
        name,
        wide,
        marks=[pytest.mark.slow] * ((dtype == jnp.float16) ^ (name == "adam") ^ wide),
        id=f"{wide}-{name}-{jnp.dtype(dtype).name}",
    )
    for wide, name, dtype in itertools.product([False, True], NARROW, [jnp.bfloat16, jnp.float16])
]


@pytest.mark.parametrize("dtype, name, wide_grads", HALVES)
def test_zeros_are_exact_in_half_precision(dtype, name, wide_grads):
    params = jax.tree.map(lambda p: (p * 1.01).astype(dtype), small_params())
    inner = NARROW[name]()
    if "float32" in name:  # the state of a mixed-precision optimizer, second moment included
        inner = optax.GradientTransformation(
            lambda p: NARROW[name]().init(jax.tree.map(lambda x: x.astype(jnp.float32), p)),
            NARROW[name]().update,
        )
    tx = jp.prune(inner, schedule=schedules.linear(0.75, begin=0, end=3, every=1))

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(
            lambda p: (p * 0.7).astype(jnp.float32 if wide_grads else dtype), params
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
        laws.zero(params, jp.get_masks(state))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert jp.sparsity(jp.get_masks(state), params) == 0.75


def test_zeros_are_exact_in_float64():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p) / 3, jnp.float64), small_params())
        tx = jp.prune(optax.adam(0.1), schedule=schedules.linear(0.75, begin=0, end=3, every=1))
        state = tx.init(params)
        step = jax.jit(tx.update)
        for _ in range(4):
            updates, new_state = step(params, state, params)
            laws.closed(state, new_state)
            params, state = optax.apply_updates(params, updates), new_state
            laws.zero(params, jp.get_masks(state))
        assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.float64)}
        assert jp.sparsity(jp.get_masks(state), params) == 0.75


def test_wide_updates_of_narrow_params_do_not_leave_a_rest():
    # In bfloat16 -param is exact; an update rounded from elsewhere would not be.
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 8)), jnp.float32)}
    narrow = optax.stateless(lambda g, p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), g))
    tx = jp.prune(narrow, schedule=schedules.constant(0.5))
    updates, state = tx.update(params, tx.init(params), params)
    laws.zero(optax.apply_updates(params, updates), jp.get_masks(state))


# Keywords of an update.


@pytest.mark.parametrize("name", wrappers())
def test_a_misspelled_keyword_of_an_update_is_told_unless_the_optimizer_might_know_it(name):
    params = small_params()
    for inner in (optax.scale(-0.1), optax.trace(0.9)):
        tx = wrappers()[name](inner)
        with pytest.raises(TypeError, match=r"update` got `lossfn=`.*Did you mean `loss_fn=`"):
            jax.eval_shape(lambda tx=tx: tx.update(params, tx.init(params), params, lossfn=params))
        jax.eval_shape(lambda tx=tx: tx.update(params, tx.init(params), params, batch=params))
    takes_all = wrappers()[name](optax.sgd(0.1))  # like all that optax chains
    jax.eval_shape(lambda: takes_all.update(params, takes_all.init(params), params, lossfn=params))
