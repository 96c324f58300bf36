"""Law 6: at sparsity 0 a wrapped optimizer does what the bare one does, bit for bit."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp
from jaxprune import schedules
from tests.contract.tables import OPTIMIZERS, WRAPPERS, small_params
from tests.contract.trainings import IDLE, takes
from tests.helpers import assert_trees_equal, fast_if


def loss(params):
    return sum(jnp.sum((p - 0.3) ** 2) for p in jax.tree.leaves(params))


def train(tx, steps=3, whole=False):
    """Train operation by operation: a compiler would round differently in different programs.

    What JAX compiles on its own, such as a branch, it leaves ``whole`` or takes apart as well.
    """
    tx = optax.with_extra_args_support(tx)
    params, state = small_params(), tx.init(small_params())
    with jax.disable_jit(not whole):
        for _ in range(steps):
            value, grads = jax.value_and_grad(loss)(params)
            extra = {"value": value, "grad": grads, "value_fn": loss}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
    return params


PRUNERS = {
    "prune": lambda tx: jp.prune(tx, schedule=schedules.linear(0.0, 0, 3, 1)),
    "hold": jp.hold,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_wrapped_and_bare_optimizers_agree_bit_for_bit(name):
    bare = train(OPTIMIZERS[name](), whole=True)
    for user, wrap in (PRUNERS | IDLE).items():
        if takes(user, name):
            assert_trees_equal(train(wrap(OPTIMIZERS[name]()), whole=True), bare)


@pytest.mark.parametrize(
    "name",
    fast_if(
        lambda name: name[:6] != "around" or name in ("around MultiSteps", "around masked"),
        sorted(set(WRAPPERS) - {"alone"}),
    ),
)
def test_wrapped_and_bare_optimizers_agree_bit_for_bit_in_every_position(name):
    bare = train(WRAPPERS[name](lambda tx: tx))
    for user in ("prune", "rigl"):
        assert_trees_equal(train(WRAPPERS[name]((PRUNERS | IDLE)[user])), bare)
