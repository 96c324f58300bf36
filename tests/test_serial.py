"""Training steps that leave JAX: masks and states in what ``jax.export`` serializes."""

import contextlib
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import jaxprune as jp
from jaxprune import _serial

pytest.importorskip("flatbuffers")

PARAMS = {"kernel": jnp.sin(jnp.arange(1.0, 37.0)).reshape(4, 9), "bias": jnp.zeros(9)}
HALF = jp.schedules.constant(0.5)
STATES = {
    "packed": lambda tx: jp.prune(tx, schedule=HALF, packed=True),
    "hold": jp.hold,
    "straight_through": lambda tx: jp.straight_through(tx, schedule=HALF),
}


@pytest.fixture(scope="module", autouse=True)
def optax_states():
    """The states of optax itself, which it leaves to its users."""
    for node in (optax.EmptyState, optax.TraceState):
        with contextlib.suppress(ValueError):
            export.register_namedtuple_serialization(node, serialized_name=f"o.{node.__name__}")


@pytest.mark.parametrize("wrap", STATES.values(), ids=STATES)
def test_a_training_step_is_serialized_with_its_state_and_goes_on_as_it_was(wrap):
    tx = wrap(optax.sgd(0.1, momentum=0.9))

    def step(params, state, x):
        loss = lambda p: jnp.sum((x @ p["kernel"] + p["bias"][None]) ** 2)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    given = PARAMS, tx.init(PARAMS), jnp.ones((2, 4))
    data = export.export(jax.jit(step))(*given).serialize()
    got = export.deserialize(bytearray(data)).call(*given)
    want = jax.jit(step)(*given)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jp.sparsity(jp.unpack(jp.get_masks(got[1])), PARAMS) == (0.0 if wrap is jp.hold else 0.5)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 9)])
def test_packed_masks_of_any_shape_keep_it(shape):
    mask = {"w": jnp.ones(shape, bool)}
    given = jp.pack(mask)
    data = export.export(jax.jit(jp.unpack))(given).serialize()
    exported = export.deserialize(bytearray(data))
    assert exported.in_tree == jax.tree.structure(((given,), {}))
    np.testing.assert_array_equal(exported.call(given)["w"], mask["w"])


def test_a_level_of_iterative_pruning_is_serialized():
    level = next(iter(jp.imp(PARAMS, lambda params, masks: params, rounds=1)))
    data = export.export(jax.jit(lambda level: level.ticket))(level).serialize()
    got = export.deserialize(bytearray(data)).call(level)
    jax.tree.map(np.testing.assert_array_equal, got, level.ticket)


def test_a_module_that_is_loaded_again_raises_nothing():
    importlib.reload(_serial).serialize_tuple(jp.PruneState)
    _serial.serialize_shaped(jp.Packed)
