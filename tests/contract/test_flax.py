"""Masks in what flax keeps optimizer states in: variables of nnx, and dictionaries of bytes."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, serialization
from flax.training.train_state import TrainState

import jaxprune as jp
from tests.contract import laws
from tests.contract.tables import small_params
from tests.contract.trainings import SPARSE, wrappers
from tests.helpers import assert_trees_equal, with_old_bits


def squares(model):
    return (model(jnp.ones((2, 16))) ** 2).sum()


def step(model, optimizer):
    optimizer.update(model, nnx.grad(squares)(model))


def trained(wrap, step, steps=3):
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, wrap(optax.adam(0.1)), wrt=nnx.Param)
    for _ in range(steps):
        step(model, optimizer)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param)), optimizer


FAST = ("prune", "hold")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FAST)) for n in wrappers()]
)
def test_masks_as_bits_live_in_an_nnx_optimizer(name):
    want, plain = trained(wrappers()[name], nnx.jit(step))
    for how in (nnx.jit(step), step)[: 1 + (name != "prune")]:
        params, optimizer = trained(wrappers(packed=True)[name], how)
        masks = jp.get_masks(optimizer.opt_state)
        assert_trees_equal(jax.tree.leaves(masks), jax.tree.leaves(jp.get_masks(plain.opt_state)))
        if name in ("prune", *SPARSE):
            laws.zero(params, nnx.to_pure_dict(masks))
            assert jp.sparsity(masks, params) == 0.75
        assert jnp.allclose(params["kernel"], want["kernel"], rtol=1e-5)


@pytest.mark.parametrize(
    ("packed", "pattern"), [(False, jp.patterns.Weights()), (True, jp.patterns.Channels(-1))]
)
def test_masks_put_into_an_nnx_optimizer_hold(packed, pattern):
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, jp.hold(optax.adam(0.1), packed=packed), wrt=nnx.Param)
    masks = jp.find_masks(nnx.state(model, nnx.Param), 0.5, pattern=pattern)
    optimizer.opt_state = nnx.data(jp.with_masks(optimizer.opt_state, masks))
    for _ in range(2):
        nnx.jit(step)(model, optimizer)
    laws.equal(masks, jp.get_masks(optimizer.opt_state))
    assert float((model.kernel[...] == 0).mean()) == 0.5


@pytest.mark.parametrize(
    ("name", "packed"), [("hold", False), ("prune", True), ("straight_through", True)]
)
def test_a_train_state_passes_through_bytes(name, packed):
    key = jax.random.PRNGKey(5)  # flax cannot write typed keys
    tx = wrappers(key, packed=packed)[name](optax.adam(0.1))
    start = TrainState.create(apply_fn=None, params=small_params(), tx=tx)
    masks = jp.find_masks(small_params(), 0.5)
    state = start.replace(step=3, opt_state=jp.with_masks(start.opt_state, masks))
    back = serialization.from_bytes(start, serialization.to_bytes(state))
    assert_trees_equal(back, state)
    assert_trees_equal(jp.get_masks(back.opt_state), masks)


def test_bytes_of_an_earlier_version_hold_the_same_masks():
    tx = wrappers(packed=True)["prune"](optax.adam(0.1))
    start = TrainState.create(apply_fn=None, params=small_params(), tx=tx)
    masks = jp.find_masks(small_params(), 0.5)
    state = start.replace(step=3, opt_state=jp.with_masks(start.opt_state, masks))
    data = serialization.to_bytes(with_old_bits(state))
    assert data != serialization.to_bytes(state)
    back = serialization.from_bytes(start, data)
    assert_trees_equal(jp.get_masks(back.opt_state), masks)
    anew = jp.with_masks(back.opt_state, jp.get_masks(back.opt_state))
    assert_trees_equal(back.replace(opt_state=anew), state)
