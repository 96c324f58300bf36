"""Networks in integers, by us and by others: what becomes of zeros, biases and bytes."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.export import _quantize, _quantizers
from tests.helpers import sums_int8_exactly

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
exact_int8 = pytest.mark.skipif(
    not sums_int8_exactly(), reason="sums of int8 saturate on this CPU, whatever the file"
)

RNG = np.random.default_rng(0)
DRAW = lambda *shape: jnp.asarray(RNG.standard_normal(shape), jnp.float32)
X = DRAW(64, 64)


def behind(y, p):
    """A bias, a ReLU, and the second layer."""
    return jax.nn.relu(y + p["b"].reshape((1,) * (y.ndim - 1) + (-1,))) @ p["v"]


def dense(p, x):
    return behind(x @ p["w"], p)


def turned(p, x):
    """As equinox has it: a matrix times a vector, mapped over the batch."""
    return behind(jax.vmap(lambda row: p["w"].T @ row)(x), p)


def conv(p, x):
    images = x.reshape(-1, 2, 2, 16)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(images, p["w"], (1, 1), "SAME", dimension_numbers=numbers)
    return behind(out, p).mean((1, 2))


def heads(p, x):
    """Matrices in a batch, one for each head."""
    parts = jnp.einsum("bhi,hio->bho", x.reshape(-1, 2, 32), p["w"])
    return behind(parts.sum(1), p)


def table(p, x):
    tokens = jnp.clip(jnp.abs(x[:, :4] * 20), 0, 63).astype(jnp.int32)
    return behind(p["w"][tokens].mean(1), p)


LAYERS = {"dense": dense, "turned": turned, "conv": conv, "heads": heads, "table": table}
SHAPES = {"conv": (2, 2, 16, 128), "heads": (2, 32, 128)}


@pytest.fixture(scope="module", params=list(LAYERS))
def exported(request, tmp_path_factory):
    fn = LAYERS[request.param]
    params = {"w": DRAW(*SHAPES.get(request.param, (64, 128))), "b": DRAW(128), "v": DRAW(128, 128)}
    masks = jp.find_masks(params, 0.5)
    path = tmp_path_factory.mktemp(request.param) / "net.onnx"
    report = jp.export.onnx(path, fn, params, X, masks=masks, latency=())
    assert report.parity < 1e-6
    return report, params, masks


@pytest.mark.parametrize(
    "bits, weight_only, most, apart",
    [(8, False, 0.35, 0.05), (8, True, 0.40, 0.02), (4, True, 0.2, 0.25), (4, False, 0.2, 0.4)],
)
def test_all_layers_get_small_and_no_zero_is_lost(
    exported, bits, weight_only, most, apart, tmp_path
):
    float_, params, masks = exported
    if not weight_only and float_.path.parent.name.startswith("table"):
        most = 0.6  # with activations a table stays as it is
    kwargs = {"bits": bits, "weight_only": weight_only, "latency": ()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = jp.export.quantize_onnx(tmp_path / "small", float_.path, X, **kwargs)
    assert [str(each.message)[:48] for each in said] == (
        ["`export.quantize_onnx` left weights in float: 'c"] if most == 0.6 else []
    )
    assert report.zeros_kept == 1.0 and report.zeroed is not None
    assert report.bytes < most * float_.bytes
    assert report.parity < apart or not (weight_only or sums_int8_exactly())
    found = jp.export.check_zeros(report.path, params, masks)
    assert not found and found.kept == 1.0 and found.zeroed == report.zeroed
    assert sum(leaf.removed for leaf in found.leaves) == 64 * 128 // 2 + 128 * 128 // 2


def test_the_tools_of_others_take_every_product_that_we_write(exported, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    float_, params, masks = exported
    small = tmp_path / "dynamic.onnx"
    quantize_dynamic(float_.path, small, per_channel=True, weight_type=QuantType.QInt8)
    batched = "heads" in str(float_.path)  # per channel its file does not run: findings/
    most = 0.35 if "table" not in str(float_.path) else 0.6
    assert small.stat().st_size < most * float_.bytes
    found = jp.export.check_zeros(small, params, masks)
    assert not found and (batched or sum(leaf.removed for leaf in found.leaves) > 0)
    if "conv" in str(float_.path) or batched:
        return  # 4 bits are for matrices
    tool = MatMulNBitsQuantizer(onnx.load(float_.path), block_size=32, is_symmetric=True)
    tool.process()
    four = tmp_path / "four.onnx"
    four.write_bytes(tool.model.model.SerializeToString())
    assert four.stat().st_size < (0.2 if "table" not in str(float_.path) else 0.6) * float_.bytes
    assert not jp.export.check_zeros(four, params, masks)


def test_zeros_that_a_tool_loses_are_counted_by_path(tmp_path):
    from onnxruntime.quantization import matmul_nbits_quantizer as tools

    params = {"w": DRAW(64, 128), "b": DRAW(128), "v": DRAW(128, 128)}
    masks = {**jp.find_masks(params, 0.5), "v": None}
    jp.export.onnx(tmp_path / "net", dense, params, X, masks=masks, latency=())
    tool = tools.MatMulNBitsQuantizer(onnx.load(tmp_path / "net"), block_size=64, is_symmetric=True)
    tool.process()
    graph = tool.model.model.graph
    (node,) = [node for node in graph.node if node.op_type == "MatMulNBits"][:1]
    zeros = onnx.numpy_helper.from_array(np.full(128, 8.02, np.float32), "zeros")
    graph.initializer.append(zeros)  # floats, as the tool writes them with a config of HQQ
    node.input.append("zeros")
    (tmp_path / "hqq").write_bytes(tool.model.model.SerializeToString())
    found = jp.export.check_zeros(tmp_path / "hqq", params, masks)
    (leaf,) = found.leaves
    assert found and found.kept < 0.1 and leaf.path == "w" and leaf.removed == 64 * 128 // 2
    assert 0 < leaf.largest < 0.1 and leaf.lost > 0.9 * leaf.removed
    assert [line.split()[0] for line in str(found).splitlines()] == ["removed", "w"]


def test_a_tool_that_loses_zeros_makes_a_warning_with_the_figure(tmp_path, monkeypatch):
    def shifted(written, source, *_, **__):
        model = onnx.load(str(source))
        for tensor in model.graph.initializer:
            w = onnx.numpy_helper.to_array(tensor)
            if w.shape == (64, 128):
                tensor.CopyFrom(onnx.numpy_helper.from_array(w + np.float32(1e-3), tensor.name))
        written.write_bytes(model.SerializeToString())

    params = {"w": DRAW(64, 128), "b": DRAW(128), "v": DRAW(128, 128)}
    masks = {**jp.find_masks(params, 0.5), "v": None}
    float_ = jp.export.onnx(tmp_path / "net", dense, params, X, masks=masks, latency=())
    monkeypatch.setattr(_quantizers, "static", shifted)
    monkeypatch.setattr(_quantize, "_warn_of_floats", lambda *_: None)
    words = r"brought 100.00% of the removed weights back, up to .*of the largest.*4,096 of 4,096"
    with pytest.warns(jp.PruneWarning, match=words):
        report = jp.export.quantize_onnx(tmp_path / "small", float_.path, X, latency=())
    assert report.zeros_kept == 0.0
    assert str(report).splitlines()[-2].split() == ["zeros", "kept", "0.00%"]


def test_small_kept_weights_that_become_zero_are_counted(tmp_path):
    w = np.full((64, 128), 0.001, np.float32)
    w[0], w[1] = 1.0, 0.0
    jp.export.onnx(tmp_path / "net", lambda p, x: x @ p, jnp.asarray(w), X, latency=())
    report = jp.export.quantize_onnx(tmp_path / "small", tmp_path / "net", X, latency=())
    assert report.zeros_kept == 1.0 and report.zeroed == 62 * 128


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"bits": 3}, r"bits=3\)` is unknown. Use 8 or 4"),
        ({"tool": "torch"}, r"tool='torch'\)` is unknown. Use 'onnxruntime' or 'nncf'"),
        ({"tool": "nncf", "bits": 4}, r"Pass `weight_only=True`"),
    ],
)
def test_unknown_ways_to_quantize_are_refused(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        jp.export.quantize_onnx(tmp_path / "a", tmp_path / "b", X, **settings)


# Outputs whose weights are all removed, and whose biases live


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(24, (3, 3), strides=2, name="conv")(x))
        x = nn.relu(nn.Conv(24, (3, 3), strides=2, name="behind")(x))
        x = nn.relu(nn.Dense(48, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="out")(x)


PRUNED = jp.by_path("params/(conv|behind|dense)/kernel")


def learn(fn, p, x, y, steps):
    tx = optax.adam(2e-3)

    def loss(p, x, y):
        return optax.losses.softmax_cross_entropy_with_integer_labels(fn(p, x), y).mean()

    @jax.jit
    def step(p, state, x, y):
        updates, state = tx.update(jax.grad(loss)(p, x, y), state, p)
        return optax.apply_updates(p, updates), state

    state = tx.init(p)
    for i in range(steps):
        rows = (np.arange(64) * 7 + i * 64) % 1500
        p, state = step(p, state, x[rows], y[rows])
    return p


@pytest.fixture(scope="module")
def pixels():
    """Digits of 0 to 255, and a network that has learnt them with channels or weights masked."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = jnp.asarray(np.rint(digits.images[..., None] * 255 / 16), jnp.float32)
    y = jnp.asarray(digits.target)
    net = Net()
    start = net.init(jax.random.key(0), x[:1])
    start["params"]["conv"]["kernel"] /= 128
    for name in ("conv", "behind", "dense"):
        bias = start["params"][name]["bias"]
        start["params"][name]["bias"] = jax.random.uniform(jax.random.key(1), bias.shape) - 0.5

    p = learn(net.apply, start, x, y, 100)
    kinds = {"channels": jp.patterns.Channels(-1), "weights": jp.patterns.Weights()}
    masks = {
        kind: jp.find_masks(p, 1 / 3, pattern=pattern, where=PRUNED)
        for kind, pattern in kinds.items()
    }
    return net.apply, x, y, {kind: (jp.apply_masks(p, each), each) for kind, each in masks.items()}


@exact_int8
def test_biases_of_dead_channels_survive_int8(pixels, tmp_path):
    fn, x, _, trained = pixels
    reports = {}
    for kind, (params, masks) in trained.items():
        if kind == "channels":
            kernel = params["params"]["conv"]["kernel"]
            dead = ~np.asarray(kernel).any((0, 1, 2))
            bias = np.asarray(params["params"]["conv"]["bias"])[dead]
            assert dead.sum() == 8 and np.abs(bias).max() < 0.5 and bias.any()
        float_ = jp.export.onnx(tmp_path / kind, fn, params, x[:8], masks=masks, latency=())
        report = jp.export.quantize_onnx(
            tmp_path / f"{kind}8", float_.path, x[:300], test=x, latency=()
        )
        assert report.zeros_kept == 1.0
        reports[kind] = report
    assert reports["channels"].agreement >= 0.975
    assert reports["channels"].parity <= 1.3 * reports["weights"].parity


@exact_int8
def test_a_network_that_was_cut_and_trained_on_agrees_better(pixels, tmp_path):
    fn, x, y, trained = pixels
    params, masks = trained["channels"]
    masks = jax.tree.map(lambda leaf: leaf, masks)
    for name, after in (("conv", "behind"), ("behind", "dense"), ("dense", "out")):
        kernel = params["params"][after]["kernel"]
        kept = masks["params"][name]["kernel"].any(range(masks["params"][name]["kernel"].ndim - 1))
        masks["params"][name]["bias"] = kept
        inputs = jnp.tile(kept, kernel.shape[-2] // kept.size)
        inputs = jnp.broadcast_to(inputs[:, None], kernel.shape[-2:])
        own = masks["params"][after]["kernel"]
        own = jnp.ones(kernel.shape, bool) if own is None else jnp.broadcast_to(own, kernel.shape)
        masks["params"][after]["kernel"] = own & jnp.broadcast_to(
            jnp.expand_dims(inputs, range(kernel.ndim - 2)), kernel.shape
        )
    small_fn, small = jp.shrink(fn, params, masks)
    small = learn(small_fn, small, x, y, 100)
    float_ = jp.export.onnx(tmp_path / "net", small_fn, small, x[:8], latency=())
    report = jp.export.quantize_onnx(tmp_path / "int8", float_.path, x[:300], test=x, latency=())
    assert report.agreement >= 0.99


@exact_int8
def test_a_matrix_without_any_weights_keeps_its_biases(tmp_path):
    params = {"w": jnp.zeros((64, 128)), "b": DRAW(128) * 0.1, "v": DRAW(128, 128)}
    x = jnp.rint(jnp.abs(X) * 100)
    float_ = jp.export.onnx(tmp_path / "net", dense, params, x, latency=())
    report = jp.export.quantize_onnx(tmp_path / "int8", float_.path, x, latency=())
    assert report.parity < 0.02


# A look at arrays and files of others


def test_leaves_are_found_by_name_or_by_their_values():
    w, other = np.asarray(DRAW(32, 32)), np.asarray(DRAW(32, 32))
    kernel = np.asarray(DRAW(3, 3, 8, 16))
    stack = np.asarray(DRAW(3, 16, 8))
    params = {"a": w, "b": other, "conv": kernel, "layers": stack}
    masks = jax.tree.map(lambda leaf: jnp.asarray(np.abs(leaf) > 0.6), params)
    zero = jax.tree.map(np.asarray, jp.apply_masks(params, masks))
    scale = np.array([-1.0, 0.5] * 8, np.float32)
    arrays = {
        "one": zero["b"].T,
        "two": zero["a"] + 1e-4 * np.asarray(DRAW(32, 32)),
        "three": (zero["conv"] * scale).transpose(3, 2, 0, 1),
        **{f"model.{i}.weight": layer.T for i, layer in enumerate(zero["layers"])},
    }
    found = {leaf.path: leaf for leaf in jp.export.check_zeros(arrays, params, masks).leaves}
    lost = {path: leaf.lost for path, leaf in found.items()}
    assert lost["b"] == lost["conv"] == lost["layers"] == 0
    assert lost["a"] == found["a"].removed == (~np.asarray(masks["a"])).sum()


def test_weights_that_a_file_does_not_hold_are_named(tmp_path):
    params = {"w": DRAW(64, 128), "v": DRAW(128, 128)}
    masks = jp.find_masks(params, 0.5)
    words = r"finds no weights like 'v' in the arrays, which holds 'other', 'w'.*None for what"
    with pytest.raises(ValueError, match=words):
        jp.export.check_zeros({"w": params["w"], "other": DRAW(128, 128)}, params, masks)
    with pytest.raises(FileNotFoundError, match=r"no file .nowhere\.onnx."):
        jp.export.check_zeros("nowhere.onnx", params, masks)
    (tmp_path / "text").write_text("no model at all")
    with pytest.raises(ValueError, match=r"reads ONNX, safetensors and GGUF"):
        jp.export.check_zeros(tmp_path / "text", params, masks)
    with pytest.raises(ValueError, match=r"check_zeros\(masks\)"):
        jp.export.check_zeros({}, params, {"w": masks["w"]})


@pytest.mark.parametrize("layer", ["dense", "conv"])
@pytest.mark.parametrize("bits, weight_only", [(8, False), (8, True), (4, True)])
@pytest.mark.filterwarnings("ignore")  # nncf starts processes to draw its tables
def test_nncf_quantizes_where_it_is_installed(layer, bits, weight_only, tmp_path):
    pytest.importorskip("nncf")
    params = {"w": DRAW(*SHAPES.get(layer, (64, 128))), "b": DRAW(128), "v": DRAW(128, 128)}
    masks = jp.find_masks(params, 0.5)
    net = tmp_path / "net"
    float_ = jp.export.onnx(net, LAYERS[layer], params, X, masks=masks, latency=())
    kwargs = {"bits": bits, "weight_only": weight_only, "tool": "nncf", "latency": ()}
    report = jp.export.quantize_onnx(tmp_path / "small", net, X, **kwargs)
    assert report.bytes < (0.35 if bits == 8 else 0.2) * float_.bytes
    assert report.parity < 0.25 and report.zeros_kept == 1.0
    assert not jp.export.check_zeros(report.path, params, masks)


def test_a_tool_that_is_not_installed_is_named(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nncf", None)
    jp.export.onnx(tmp_path / "net", lambda p, x: x @ p, DRAW(64, 128), X, latency=())
    with pytest.raises(ImportError, match=r"needs 'nncf'.*jaxprune\[nncf\]"):
        jp.export.quantize_onnx(tmp_path / "small", tmp_path / "net", X, tool="nncf")


def scanned(p, x):
    step = lambda h, row: (jnp.tanh(row @ p["w"] + h @ p["u"]), h.sum())
    return jax.lax.scan(step, jnp.zeros((x.shape[0], 128)), jnp.stack([x, x]))[0] @ p["v"]


def nested(p, x):
    inner = lambda h, _: (jnp.tanh(h @ p["u"]), None)
    outer = lambda h, row: (jax.lax.scan(inner, row @ p["w"] + h, length=2)[0], None)
    return jax.lax.scan(outer, jnp.zeros((x.shape[0], 128)), jnp.stack([x, x]))[0] @ p["v"]


def carried(p, x):
    """The weights are a state that no step changes, and are read behind the loop."""
    step = lambda c, row: ((c[0], jnp.tanh(row @ p["w"] + c[1] @ c[0])), None)
    start = p["u"], jnp.zeros((x.shape[0], 128))
    (u, h), _ = jax.lax.scan(step, start, jnp.stack([x, x]))
    return (h @ u) @ p["v"]


@pytest.mark.parametrize("fn", [scanned, nested, carried])
def test_weights_of_loops_are_quantized(fn, tmp_path):
    params = {"w": DRAW(64, 128), "u": DRAW(128, 128) / 12, "v": DRAW(128, 128)}
    net = tmp_path / "net"
    masks = jp.find_masks(params, 0.5)
    float_ = jp.export.onnx(net, fn, params, X, masks=masks, latency=())
    assert float_.parity < 1e-6
    for bits, most in ((8, 0.33), (4, 0.22)):
        kwargs = {"bits": bits, "weight_only": True, "latency": ()}
        report = jp.export.quantize_onnx(tmp_path / "small", net, X, **kwargs)
        assert report.bytes < most * float_.bytes and report.zeros_kept == 1.0
        assert not jp.export.check_zeros(report.path, params, masks)


def test_what_stays_in_float_is_told_and_an_error_where_that_is_all(tmp_path):
    params, net = {"w": DRAW(64, 128)}, tmp_path / "net"
    jp.export.onnx(net, lambda _, x: x + 1, {}, X, latency=())
    with pytest.raises(ValueError, match=r"finds nothing to quantize in .*it holds no matrix"):
        jp.export.quantize_onnx(tmp_path / "none", net, X, latency=())
    jp.export.onnx(net, lambda p, x: x @ p, params["w"], X, latency=())
    with pytest.raises(ValueError, match=r"'const_0' stayed in float.*name more in `operators`"):
        kwargs = {"operators": ["Conv"], "weight_only": True, "latency": ()}
        jp.export.quantize_onnx(tmp_path / "none", net, X, **kwargs)
    with pytest.raises(ValueError, match=r"operators='MatMul'\)` is no list of operators"):
        jp.export.quantize_onnx(tmp_path / "none", net, X, operators="MatMul")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("look_up", ["embed", "twice", "vector", "integers"])
def test_tables_are_quantized_however_they_are_looked_up(look_up, bits, tmp_path):
    tokens = jnp.asarray(RNG.integers(0, 512, (8, 12)), jnp.int32)
    params = {
        "e": DRAW(512, 64).at[5].set(0),
        "v": DRAW(512),
        "i": jnp.arange(512),
        "h": DRAW(64, 64),
    }
    fns = {
        "embed": lambda p, i: jnp.take(p["e"], i, axis=0) @ p["h"],
        "twice": lambda p, i: (p["e"][i] + p["e"][511 - i]) @ p["h"],
        "vector": lambda p, i: p["e"][i] * p["v"][i][..., None],
        "integers": lambda p, i: p["e"][p["i"][i]] @ p["h"],
    }
    net = tmp_path / "net"
    float_ = jp.export.onnx(net, fns[look_up], params, tokens, latency=())
    kwargs = {"bits": bits, "weight_only": True, "latency": ()}
    report = jp.export.quantize_onnx(tmp_path / "small", net, tokens, **kwargs)
    assert report.bytes < (0.31 if bits == 8 else 0.2) * float_.bytes
    assert report.parity < (0.03 if bits == 8 else 0.3) and report.zeros_kept == 1.0


def test_weights_that_no_scale_can_hold_are_refused(tmp_path):
    net = tmp_path / "net"
    for value in (jnp.inf, jnp.nan):
        jp.export.onnx(net, lambda p, x: x @ p, DRAW(64, 64).at[3, 3].set(value), X, latency=())
        for weight_only in (False, True):
            with pytest.raises(ValueError, match=r"inf or NaN in 'const_0'"):
                jp.export.quantize_onnx(tmp_path / "a", net, X, weight_only=weight_only)
    half, x = DRAW(64, 64).astype(jnp.float16), X.astype(jnp.float16)
    float_ = jp.export.onnx(net, lambda p, x: x @ p, half, x, latency=(), tolerance=0.05)
    with pytest.raises(
        ValueError, match=r"float16, 'const_0'.*float32, or pass `weight_only=True`"
    ):
        jp.export.quantize_onnx(tmp_path / "a", net, x)
    for given in (None, 3, "images"):
        with pytest.raises(ValueError, match=r"as calibration inputs\. Pass an array"):
            jp.export.quantize_onnx(tmp_path / "a", net, given, weight_only=True)
    report = jp.export.quantize_onnx(tmp_path / "a", net, x, weight_only=True, latency=())
    assert report.bytes < 0.7 * float_.bytes


def test_square_kernels_are_turned_as_the_file_has_them():
    w = DRAW(64, 64)
    masks = {"w": jnp.abs(w) > 0.7}
    zero = np.asarray(jp.apply_masks({"w": w}, masks)["w"])
    for arrays in ({"w": zero}, {"w": zero.T}, {"other": zero.T}):
        assert jp.export.check_zeros(arrays, {"w": w}, masks).kept == 1.0


def test_the_worse_of_two_copies_is_told_and_copies_of_others_are_theirs():
    w, noise = DRAW(96, 64), np.asarray(DRAW(64, 96))
    masks = {"e": jnp.abs(w) > 0.7}
    zero = np.asarray(jp.apply_masks({"e": w}, masks)["e"])
    arrays = {"embed": zero, "head": zero.T + 0.05 * noise}
    (leaf,) = jp.export.check_zeros(arrays, {"e": w}, masks).leaves
    assert leaf.lost == leaf.removed == (zero == 0).sum()
    # Experts that began as copies, with other weights removed.
    other = {"a": masks["e"], "b": jnp.abs(w) < 1.0}
    experts = {"a": w, "b": w}
    arrays = {f"x{k}": np.asarray(v) for k, v in jp.apply_masks(experts, other).items()}
    assert jp.export.check_zeros(arrays, experts, other).kept == 1.0


def test_a_mask_that_was_lost_whole_is_counted_however_small_the_leaf():
    w = DRAW(64, 64)
    for sparsity in (0.9, 0.95, 0.98):
        masks = jp.find_masks({"w": w}, sparsity)
        (leaf,) = jp.export.check_zeros({"weight": w.T}, {"w": w}, masks).leaves
        assert leaf.lost == leaf.removed == round(sparsity * w.size)
    with pytest.raises(ValueError, match="finds no weights like 'b'"):
        small = {"b": jnp.array([5.0, 3.0])}
        jp.export.check_zeros({"x": np.array([0.0, 7.0])}, small, {"b": small["b"] > 4})


def test_transposed_convolutions_and_thinned_channels_are_found_in_our_own_files(tmp_path):
    images = DRAW(2, 8, 8, 8)
    up = nn.ConvTranspose(16, (2, 2), strides=(2, 2))
    params = up.init(jax.random.key(0), images)
    masks = jp.find_masks(params, 0.5)
    jp.export.onnx(tmp_path / "up", up.apply, params, images, masks=masks, latency=())
    assert jp.export.check_zeros(tmp_path / "up", params, masks).kept == 1.0

    def thinned(p, x):
        out = jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out * p["gain"].reshape(1, 1, 1, -1)

    gain = jnp.where(jnp.arange(64) < 45, 0.0, DRAW(64))
    params = {"w": DRAW(3, 3, 8, 64), "gain": gain}
    masks = {"w": jnp.abs(params["w"]) > 0.5, "gain": None}
    jp.export.onnx(tmp_path / "thin", thinned, params, images, masks=masks, latency=())
    assert jp.export.check_zeros(tmp_path / "thin", params, masks).kept == 1.0


def test_files_in_bfloat16_are_read(tmp_path):
    w = DRAW(64, 64)
    masks = {"w": jnp.abs(w) > 0.5}
    zero = np.asarray(jp.apply_masks({"w": w}, masks)["w"].astype(jnp.bfloat16))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, [1, 64])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, [1, 64])],
        [onnx.numpy_helper.from_array(zero, "w")],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "half.onnx")
    assert jp.export.check_zeros(tmp_path / "half.onnx", {"w": w}, masks).kept == 1.0
    shapes = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    with pytest.raises(TypeError, match="params without values at 'w'"):
        jp.export.check_zeros(tmp_path / "half.onnx", shapes, masks)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_files_that_we_wrote_by_a_layout_hold_the_zeros_of_every_leaf(kind, tmp_path):
    pytest.importorskip("gguf")
    net, x = nn.MultiHeadDotProductAttention(2), DRAW(2, 6, 128)
    params = net.init(jax.random.key(0), x)
    layout = jp.find_layout(net.apply, params, x)
    masks = jax.tree.map(lambda leaf: jnp.abs(leaf) > 0.05, params)
    path = tmp_path / f"net.{kind}"
    report = getattr(jp.export, kind)(path, params, layout=layout, masks=masks)
    found = jp.export.check_zeros(path, params, masks)
    assert report.zeros_kept == found.kept == 1.0 and len(found.leaves) == 8
    report.path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"net\.(safetensors|gguf)"):
        jp.export.check_zeros(path, params, masks)
