"""int8 by qwix, after training and in training, of networks that were pruned or shrunk."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from tests.helpers import assert_zero_where_removed

qwix = pytest.importorskip("qwix")

# qwix calls two methods of nnx that flax has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(flax|qwix)")
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}


class Linen(nn.Module):
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3), name="hidden")(x))
        return nn.Dense(4, name="out")(x.mean((1, 2)))


class Nnx(nnx.Module):
    def __init__(self, width=8):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(72, width, rngs=rngs)
        self.out = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def linen_network(x, provider=None):
    """``fn(params, x)`` and its params, quantized in training if there is a provider."""
    model = Linen()
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    model = model if provider is None else qwix.quantize_model(model, provider)
    return jax.jit(lambda params, x: model.apply({"params": params}, x)), params


def nnx_network(x, provider=None):
    model = Nnx()
    model = model if provider is None else qwix.quantize_model(model, provider, x)
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)), state


def linen_int8(params, x, width=8):
    """The quantized network, and its int8 kernels by name."""
    model = qwix.quantize_model(Linen(width), qwix.PtqProvider([qwix.QuantizationRule(**INT8)]))
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    quantized = qwix.quantize_params(params, abstract)
    apply = jax.jit(lambda x: model.apply({"params": quantized}, x))
    return apply, {name: quantized[name]["kernel"].array for name in ("hidden", "out")}


def nnx_int8(state, x, width=8):
    model = Nnx(width)
    nnx.update(model, state)
    provider = qwix.PtqProvider([qwix.QuantizationRule(**INT8)])
    model = qwix.quantize_model(model, provider, x)
    return model, {name: getattr(model, name).kernel.array for name in ("hidden", "out")}


LIBRARIES = pytest.mark.parametrize(
    "network, int8",
    [
        pytest.param(nnx_network, nnx_int8, id="nnx"),
        pytest.param(linen_network, linen_int8, id="linen", marks=pytest.mark.slow),
    ],
)


def kernel(tree, name):
    leaf = tree[name]["kernel"]
    return np.asarray(leaf[...] if isinstance(leaf, nnx.Variable) else leaf)


def values(variable):
    return np.asarray(variable[...] if isinstance(variable, nnx.Variable) else variable)


@pytest.fixture
def x(key):
    return jax.random.normal(key, (16, 6, 6, 2))


def in_training():
    return qwix.QtProvider([qwix.QtRule(**INT8)])


@LIBRARIES
def test_pruned_weights_are_zero_in_int8_after_training(network, int8, x):
    fn, params = network(x)
    masks = jp.find_masks(params, 0.7)
    pruned = jp.export.bake(params, masks)
    small, kernels = int8(pruned, x)
    for name, array in kernels.items():
        quantized, mask = values(array.qvalue), kernel(masks, name)
        assert quantized.dtype == np.int8 and array.zero_point is None
        assert (quantized[~mask] == 0).all() and quantized[mask].any()
    want = fn(pruned, x)
    np.testing.assert_allclose(small(x), want, atol=0.03 * float(jnp.abs(want).max()))


@LIBRARIES
def test_a_network_in_int8_is_the_one_that_was_trained_with_quantization(network, int8, x):
    fn, params = network(x, in_training())
    params = jp.export.bake(params, jp.find_masks(params, 0.7))
    small, _ = int8(params, x)
    np.testing.assert_allclose(small(x), fn(params, x), atol=1e-6)


@LIBRARIES
@pytest.mark.parametrize("wrapper", ["prune", "hold"])
def test_masks_hold_while_training_with_quantization(network, int8, wrapper, x):
    fn, params = network(x, in_training())
    labels = jnp.arange(16) % 4
    loss = lambda p: optax.losses.softmax_cross_entropy_with_integer_labels(fn(p, x), labels).mean()
    if wrapper == "prune":
        tx = jp.prune(optax.adam(0.02), schedule=jp.schedules.cubic(0.8, begin=0, end=8, every=2))
        state = tx.init(params)
    else:
        tx = jp.hold(optax.adam(0.02))
        state = jp.with_masks(tx.init(params), jp.find_masks(params, 0.8))

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    losses = []
    for _ in range(30):
        params, state, value, grads = step(params, state)
        losses.append(float(value))
        assert_zero_where_removed(params, jp.get_masks(state))
    masks = jp.get_masks(state)
    assert jp.sparsity(masks, params) == pytest.approx(0.8, abs=0.01) and losses[-1] < losses[0]
    # Fake quantization passes gradients straight through, to removed weights too; the optimizer
    # gets none of them: its mean has only decayed since they were removed, 22 steps ago at least.
    for name in ("hidden", "out"):
        gone = ~kernel(masks, name)
        moment = kernel(optax.tree.get(state, "mu"), name)
        assert kernel(grads, name)[gone].any()
        assert np.abs(moment[gone]).max() <= (0.0 if wrapper == "hold" else 0.9**20)
    _, kernels = int8(params, x)
    for name, array in kernels.items():
        assert (values(array.qvalue)[~kernel(masks, name)] == 0).all()


@LIBRARIES
def test_a_network_that_trains_with_quantization_is_shrunk_as_it_is(network, int8, x):
    fn, params = network(x, in_training())
    groups = jp.find_groups(fn, params, x)
    assert [group.size for group in groups] == [8] and groups[0].exact
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    assert jp.verify_shrink(fn, params, masks, x) < 1e-6
    small_fn, small = jp.shrink(fn, params, masks)
    grads = jax.grad(lambda p: jnp.sum(small_fn(p, x) ** 2))(small)
    assert kernel(grads, "hidden").shape[-1] == 4 and kernel(grads, "hidden").any()
    masked = jp.apply_masks(params, masks)
    large = jax.grad(lambda p: jnp.sum(fn(p, x) ** 2))(masked)
    axes = jp.cut_list(params, masks)["hidden/kernel"]
    (keep,) = map(np.array, axes.values())
    want = kernel(large, "hidden")[..., keep]
    np.testing.assert_allclose(kernel(grads, "hidden"), want, rtol=1e-4, atol=1e-6)


@LIBRARIES
def test_small_params_go_into_a_module_of_the_small_width_and_into_int8(network, int8, x):
    fn, params = network(x)
    groups = jp.find_groups(fn, params, x)
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    small_fn, small = jp.shrink(fn, params, masks)
    quantized, kernels = int8(small, x, width=4)
    assert kernels["hidden"].qvalue.shape[-1] == 4
    want = small_fn(small, x)
    np.testing.assert_allclose(quantized(x), want, atol=0.03 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_a_quantized_function_goes_to_stablehlo_and_within_a_step_of_int8_to_onnx(x, tmp_path):
    pytest.importorskip("jax2onnx")
    fn, params = nnx_network(x, in_training())
    assert jp.export.stablehlo(tmp_path / "net", fn, params, x).parity < 1e-5
    with pytest.raises(ValueError, match=r"differs from JAX by 0\.0"):
        jp.export.onnx(tmp_path / "onnx", fn, params, x)  # what lies between two steps of int8
    assert jp.export.onnx(tmp_path / "onnx", fn, params, x, tolerance=0.03).parity < 0.03
