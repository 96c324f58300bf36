"""Laws 7 and 8: one trace, and a state that survives whatever JAX does to it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.contract import laws
from tests.contract.tables import small_params
from tests.contract.trainings import TRAININGS
from tests.helpers import assert_trees_equal, run

STEPS = 5
RAMP = schedules.cubic(0.75, begin=0, end=4, every=2)


@pytest.fixture(
    scope="module",
    params=[
        *("plain", "packed", "everything", "set", "straight_through"),
        pytest.param("rigl", marks=pytest.mark.slow),
    ],
)
def tx(request):
    """A pruner with masks as bool, as bits, one with a key and several leaves a ranking; others."""
    if request.param in TRAININGS:
        return TRAININGS[request.param](optax.adam(0.1))
    settings = {
        "plain": {},
        "packed": {"packed": True},
        "everything": {
            "criterion": criteria.random,
            "key": jax.random.key(5),
            "pattern": patterns.Blocks((2, 2)),
            "scope": scopes.across,
            "packed": True,
        },
    }[request.param]
    return jp.prune(optax.adam(0.1), schedule=RAMP, **settings)


def stepper(tx):
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    return step


def loop(step, params, state):
    for _ in range(STEPS):
        params, state = step(params, state)
    return params, state


def assert_same(got, want):
    """Equal masks, and params equal but for the rounding of another program."""
    assert_trees_equal(jp.get_masks(got[1]), jp.get_masks(want[1]))
    for a, b in zip(*map(jax.tree.leaves, (got[0], want[0])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def want(tx):
    params = small_params()
    return loop(jax.jit(stepper(tx)), params, tx.init(params))


def test_events_cause_no_retrace(tx):
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    params = small_params()
    state = tx.init(params)
    for _ in range(STEPS):
        params, new = step(params, state)
        laws.closed(state, new)
        state = new
    assert jp.sparsity(jp.get_masks(state), params) == 0.75


def test_eager_updates_do_what_compiled_ones_do():
    tx = jp.prune(optax.adam(0.1), schedule=schedules.linear(0.75, begin=0, end=1, every=1))
    step, params = stepper(tx), small_params()
    eager, compiled = ((params, tx.init(params)) for _ in range(2))
    for _ in range(2):
        eager, compiled = step(*eager), jax.jit(step)(*compiled)
    assert_same(eager, compiled)


def test_a_scan_does_what_a_python_loop_does(tx, want):
    params = small_params()
    step = stepper(tx)
    carry = (params, tx.init(params))
    got, _ = jax.jit(
        lambda carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, None, length=STEPS)
    )(carry)
    laws.closed(carry, got)
    assert_same(got, want)


def test_a_cond_takes_a_step_or_not(tx, want):
    step = stepper(tx)
    maybe = jax.jit(lambda take, *c: jax.lax.cond(take, step, lambda *c: c, *c))
    params = small_params()
    carry = params, tx.init(params)
    for _ in range(STEPS):
        carry = maybe(False, *maybe(True, *carry))
    assert_same(carry, want)


def test_donated_states_may_be_used_on(tx, want):
    params = small_params()
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    assert_same(loop(step, params, tx.init(params)), want)


def test_a_state_survives_a_round_trip_through_numpy(tx, want):
    def through_numpy(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(np.asarray(jax.random.key_data(x)))
        return jnp.asarray(np.asarray(x))

    params = small_params()
    step = jax.jit(stepper(tx))
    carry = params, tx.init(params)
    for _ in range(STEPS):
        saved = jax.tree.map(through_numpy, carry)
        laws.closed(carry, saved)
        carry = step(*saved)
    assert_same(carry, want)


def test_init_inside_a_jit_makes_the_same_state(tx):
    params = small_params()
    laws.closed(tx.init(params), jax.jit(tx.init)(params))
    shapes = jax.eval_shape(tx.init, params)
    laws.closed(shapes, tx.init(params))


def test_seeds_train_side_by_side_under_vmap():
    tx = jp.prune(optax.adam(0.1), schedule=RAMP)
    keys = jax.random.split(jax.random.key(0), 3)
    batch = jax.vmap(lambda k: {"w": jax.random.normal(k, (8, 8))})(keys)
    step = jax.jit(jax.vmap(stepper(tx)))
    params, state = loop(step, batch, jax.vmap(tx.init)(batch))
    masks = jp.get_masks(state)["w"]
    assert (~masks).sum((1, 2)).tolist() == [48, 48, 48]
    alone = jax.jit(stepper(tx))
    for i in range(3):
        one = {"w": batch["w"][i]}
        want = loop(alone, one, tx.init(one))
        np.testing.assert_array_equal(masks[i], jp.get_masks(want[1])["w"])
        np.testing.assert_allclose(params["w"][i], want[0]["w"], rtol=1e-5, atol=1e-6)


def test_an_unbatched_count_serves_all_seeds():
    tx = jp.prune(optax.sgd(0.1), schedule=RAMP)
    batch = {"w": jax.random.normal(jax.random.key(0), (3, 8, 8))}
    axes = jp.PruneState(count=None, masks=0, inner_state=0, criterion_state=0, key=None)
    state = jax.vmap(tx.init, out_axes=axes)(batch)
    step = jax.jit(jax.vmap(stepper(tx), in_axes=(0, axes), out_axes=(0, axes)))
    _, state = loop(step, batch, state)
    assert state.count.shape == ()
    assert (~jp.get_masks(state)["w"]).sum((1, 2)).tolist() == [48, 48, 48]


def test_a_traced_sparsity_under_vmap_gives_a_sweep():
    params = {"w": jax.random.normal(jax.random.key(0), (8, 8))}

    @jax.jit
    @jax.vmap
    def train(final):
        tx = jp.prune(optax.sgd(0.1), schedule=schedules.linear(final, 0, 2, 1))
        state, p = tx.init(params), params
        for _ in range(3):
            updates, state = tx.update(p, state, p)
            p = optax.apply_updates(p, updates)
        return jp.get_masks(state)["w"]

    assert (~train(jnp.array([0.0, 0.5, 1.0]))).sum((1, 2)).tolist() == [0, 32, 64]


# Training states of others.


def test_a_linen_train_state_prunes():
    model = linen.Dense(4)
    x = jnp.ones((2, 8))
    variables = model.init(jax.random.key(0), x)
    tx = jp.prune(optax.adam(0.1), schedule=RAMP)
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=tx)

    @jax.jit
    def step(state):
        loss = lambda params: jnp.sum(state.apply_fn({"params": params}, x) ** 2)
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(STEPS):
        state = step(state)
        laws.zero(state.params, jp.get_masks(state))
    assert jp.sparsity(jp.get_masks(state), state.params) == 0.75


def test_an_nnx_optimizer_prunes():
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    tx = jp.prune(optax.adam(0.1), schedule=RAMP)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.ones((2, 8))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(STEPS):
        step(model, optimizer)
        masks = jp.get_masks(optimizer.opt_state)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        laws.zero(params, nnx.to_pure_dict(masks))
    assert jp.sparsity(masks, params) == 0.75


def test_an_nnx_optimizer_holds_a_ticket():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    masks = jp.find_masks(nnx.to_pure_dict(params), 0.5)
    optimizer = nnx.Optimizer(model, jp.hold(optax.adam(0.1)), wrt=nnx.Param)
    optimizer.opt_state = nnx.data(jp.with_masks(optimizer.opt_state, masks))
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 8))) ** 2))(model)
    optimizer.update(model, grads)
    laws.zero(nnx.to_pure_dict(nnx.state(model, nnx.Param)), masks)
    assert jp.sparsity(jp.get_masks(optimizer.opt_state), params) == 0.5


def test_a_hand_written_step_needs_nothing_but_optax():
    tx = jp.prune(optax.sgd(0.1), schedule=RAMP)
    params, state, _, masks = run(tx, small_params(), STEPS)
    laws.zero(params, jp.get_masks(state))
    assert jp.sparsity(jp.get_masks(state), params) == 0.75
    assert all(m.shape[0] == STEPS for m in jax.tree.leaves(masks))
