"""Files that leave JAX: what they compute, what they weigh, and what happens if they cannot."""

import gzip
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments.common import models
from jaxprune.export import _onnx
from jaxprune.export._fold import fold
from jaxprune.export._plain import plain_products
from tests.helpers import TraceCount, sums_int8_exactly

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

CALLED = {"onnx": jp.export.onnx, "stablehlo": jp.export.stablehlo}
EXPORTS = pytest.mark.parametrize("export", CALLED.values(), ids=CALLED)


def mlp(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"][None]) @ params["v"]


@pytest.fixture
def params(key):
    w, v = jax.random.split(key)
    return {
        "w": jax.random.normal(w, (16, 32)),
        "b": jnp.linspace(-1, 1, 32),
        "v": jax.random.normal(v, (32, 10)),
    }


X = jnp.sin(jnp.arange(80.0)).reshape(5, 16)


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# Masks


def test_bake_sets_to_zero_what_masks_remove_and_leaves_all_else(params):
    masks = jp.find_masks(params, 0.5)
    variables = {"params": params, "flag": True}
    baked = jp.export.bake(variables, {"params": jp.pack(masks)})
    assert baked["flag"] is True
    for name in params:
        want = params[name] if masks[name] is None else np.where(masks[name], params[name], 0)
        np.testing.assert_array_equal(baked["params"][name], want)


def test_bake_names_masks_that_the_params_lack(params):
    with pytest.raises(
        ValueError, match=r"`bake\(masks\)` is not .*unknown 'u' \(its paths are 'b', 'v', 'w'\)"
    ):
        jp.export.bake(params, {"u": jnp.ones(3, bool)})


def test_bake_names_masks_that_do_not_fit(params):
    with pytest.raises(ValueError, match=r"'w' has shape \(3, 2\)"):
        jp.export.bake(params, {"w": jnp.ones((3, 2), bool)})


# Files


@EXPORTS
def test_a_file_computes_what_the_masked_function_computes(export, params, tmp_path):
    masks = jp.find_masks(params, 0.9)
    kwargs = {"latency": (1, 2)} if export is jp.export.onnx else {}
    report = export(tmp_path / "net", mlp, params, X, masks=masks, **kwargs)
    inputs = jnp.cos(jnp.arange(7 * 16.0)).reshape(7, 16)  # neither values nor batch were seen
    want = mlp(jp.apply_masks(params, masks), inputs)
    if export is jp.export.onnx:
        (got,) = run(report.path, inputs)
        assert set(report.latency_ms) == {1, 2} and min(report.latency_ms.values()) > 0
    else:
        exported = jax.export.deserialize(bytearray(report.path.read_bytes()))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        got, report_latency = exported.call(inputs), report.latency_ms
        assert report_latency is None
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    data = report.path.read_bytes()
    assert (report.bytes, report.gzip_bytes) == (len(data), len(gzip.compress(data, mtime=0)))
    assert report.parity < 1e-6 and report.agreement == 1.0
    assert files(tmp_path) == ["net"]


def test_zeros_take_no_room_in_a_compressed_file(tmp_path):
    rng = np.random.default_rng(0)
    params = {"w": rng.standard_normal((16, 512), np.float32), "b": np.ones(512, np.float32)}
    params["v"] = rng.standard_normal((512, 10), np.float32)
    dense = jp.export.stablehlo(tmp_path / "dense", mlp, params, X)
    masks = jp.find_masks(params, 0.9)
    pruned = jp.export.stablehlo(tmp_path / "pruned", mlp, params, X, masks=masks)
    assert pruned.bytes == pytest.approx(dense.bytes, rel=0.02)
    assert pruned.gzip_bytes < dense.gzip_bytes / 2


@EXPORTS
def test_an_exported_small_function_is_small_and_takes_any_batch(export, params, tmp_path):
    groups = jp.find_groups(mlp, params, X)
    masks = jp.find_masks(params, 0.75, pattern=jp.patterns.Coupled(groups))
    small_fn, small = jp.shrink(mlp, params, masks)
    kwargs = {"latency": ()} if export is jp.export.onnx else {}
    dense = export(tmp_path / "dense", mlp, params, X, **kwargs)
    report = export(tmp_path / "small", small_fn, small, X, **kwargs)
    assert report.parity < 1e-6
    gone = 4 * (sum(w.size for w in params.values()) - sum(w.size for w in small.values()))
    assert dense.bytes - report.bytes == pytest.approx(gone, rel=0.3)


def test_a_report_prints_a_table(tmp_path):
    report = jp.export.Report(tmp_path / "a.onnx", 12345, 99, 1e-7, 0.995, {1: 0.5, 64: 12.0})
    assert str(report).splitlines()[1:] == [
        "bytes      12,345",
        "gzipped    99",
        "parity     1.0e-07",
        "agreement  99.50%",
        "batch 1    0.500 ms",
        "batch 64   12.000 ms",
    ]
    assert "agreement" not in str(jp.export.Report(tmp_path, 1, 1, 0.0))


def test_trees_of_inputs_and_outputs_are_named_by_their_paths(tmp_path):
    def fn(_, batch, tokens, train):
        total = batch["a"] + batch["b"] * (2 if train else 1)
        return {"sum": total, "both": (tokens, batch["a"], batch["a"])}

    inputs = ({"a": X, "b": X + 1}, jnp.array([[3], [5], [7], [2], [4]]), False)
    report = jp.export.onnx(tmp_path / "net", fn, {}, *inputs, latency=())
    graph = onnx.load(report.path).graph
    assert [v.name for v in graph.input] == ["input_0_a", "input_0_b", "input_1"]
    assert [v.name for v in graph.output] == [
        "output_both_0",
        "output_both_1",
        "output_both_2",
        "output_sum",
    ]
    tokens, first, second, total = run(report.path, X, X + 1, inputs[1])
    np.testing.assert_array_equal(tokens, inputs[1])
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(total, 2 * X + 1, rtol=1e-6)
    program = jp.export.stablehlo(tmp_path / "program", fn, {}, *inputs)
    loaded = jax.export.deserialize(bytearray(program.path.read_bytes()))
    out = loaded.call({"a": X, "b": X + 1}, inputs[1])
    assert jax.tree.structure(out) == jax.tree.structure(fn({}, *inputs))
    np.testing.assert_allclose(out["sum"], 2 * X + 1, rtol=1e-6)


def test_names_that_would_meet_are_numbered(tmp_path):
    fn = lambda _, x: {"a": {"b": x + 1}, "a_b": x + 2}
    report = jp.export.onnx(tmp_path / "net", fn, {}, X, latency=())
    assert [v.name for v in onnx.load(report.path).graph.output] == ["output_0", "output_1"]


@EXPORTS
def test_shapes_alone_are_examples_enough_and_a_batch_can_be_fixed(export, params, tmp_path):
    kwargs = {"latency": (1, 64)} if export is jp.export.onnx else {}
    example = jax.ShapeDtypeStruct((5, 16), jnp.float32)
    report = export(tmp_path / "net", mlp, params, example, batch=None, **kwargs)
    if export is jp.export.onnx:
        assert onnx.load(report.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 5
        assert list(report.latency_ms) == [5]
    else:
        loaded = jax.export.deserialize(bytearray(report.path.read_bytes()))
        assert loaded.in_avals[0].shape == (5, 16)


# What is made simpler


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), feature_group_count=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        branch = nn.BatchNorm(use_running_average=True)(nn.Conv(6, (1, 1), use_bias=False)(x))
        x = nn.relu(x + branch) * 2.0
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(5)(x.mean((1, 2))))
        return jnp.concatenate([x, x - 1], axis=-1)


def moved(tree, seed=0):
    """The tree with other numbers, so that no bias is 0 and no scale is 1; all positive."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.uniform(0.1, 0.9, w.shape), w.dtype), tree)


def test_folding_changes_no_value_and_leaves_no_norm(key):
    x = jnp.sin(jnp.arange(2 * 64 * 4.0)).reshape(2, 8, 8, 4)
    variables = moved(jax.eval_shape(Normed().init, key, x))
    closed = jax.make_jaxpr(lambda x: Normed().apply(variables, x))(x)
    folded = jax.make_jaxpr(lambda x: fold(closed, x)[0])(x)
    both = jax.jit(lambda x: (fold(closed, x)[0], Normed().apply(variables, x)))
    np.testing.assert_allclose(*both(x), rtol=1e-4)
    names = [eqn.primitive.name for eqn in folded.jaxpr.eqns]
    assert names.count("conv_general_dilated") == 2 and names.count("dot_general") == 1
    # A bias each, the way around, the multiplication by 2; `x - 1` behind what is read twice.
    assert names.count("mul") == 1 and "rsqrt" not in names and names.count("sub") == 1


@pytest.mark.parametrize(
    "sums, shapes",
    [
        ("btc,cd->btd", [(2, 3, 4), (4, 5)]),
        ("btc,chd->bthd", [(2, 3, 4), (4, 2, 5)]),
        ("bthd,hdc->btc", [(2, 3, 2, 5), (2, 5, 4)]),
        ("bthd,dhc->btc", [(2, 3, 2, 5), (5, 2, 4)]),
        ("cbt,cd->btd", [(4, 2, 3), (4, 5)]),
    ],
)
def test_products_with_weights_become_matrix_products_with_their_norms_inside(sums, shapes):
    rng = np.random.default_rng(0)
    x, weights = (rng.standard_normal(shape, np.float32) for shape in shapes)
    size = jnp.einsum(sums, x, weights).shape
    scale, shift = (jnp.asarray(rng.standard_normal((1,) * (len(size) - 1) + size[-1:], np.float32))
                    for _ in range(2))  # fmt: skip
    fn = lambda x: jnp.einsum(sums, x, weights) * scale + shift
    closed = jax.make_jaxpr(fn)(x)
    folded = jax.make_jaxpr(lambda x: fold(closed, x)[0])(x)
    assert "mul" not in str(folded)
    np.testing.assert_allclose(
        jax.jit(lambda x: fold(closed, x)[0])(x), fn(x), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "sums",
    [
        *("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bij,bjk->bik"),
        *("bqhid,bkhd->bhiqk", "bhiqk,bkhd->bqhid", "bij,jqk->biqk", "bqi,qib->i", "bq,bqi->i"),
    ],
)
def test_batches_of_products_keep_their_values(sums):
    rng = np.random.default_rng(0)
    sizes = dict(zip("bqkhdij", (2, 3, 3, 4, 5, 3, 6), strict=True))
    a, b = (rng.standard_normal([sizes[i] for i in s], np.float32)
            for s in sums.split("->")[0].split(","))  # fmt: skip
    fn = lambda a, b: jnp.einsum(sums, a, b)
    closed = jax.make_jaxpr(fn)(a, b)
    got = jax.jit(lambda a, b: fold(closed, a, b)[0])(a, b)
    np.testing.assert_allclose(got, fn(a, b), rtol=1e-5, atol=1e-6)


def test_folding_computes_what_is_read_twice_once(key):
    weights = jax.random.normal(key, (3, 3))

    def twice(x):
        y = x @ weights
        return y * 2.0, y + 1.0

    closed = jax.make_jaxpr(twice)(X[:, :3])
    folded = jax.make_jaxpr(lambda x: fold(closed, x))(X[:, :3])
    assert [eqn.primitive.name for eqn in folded.jaxpr.eqns].count("dot_general") == 1


def test_folding_keeps_large_constants_out_of_the_file():
    closed = jax.make_jaxpr(lambda x: x + jnp.broadcast_to(jnp.float32(3.0), (400, 400)))(
        jnp.ones((400, 400))
    )
    folded = jax.make_jaxpr(lambda x: fold(closed, x))(jnp.ones((400, 400)))
    assert all(np.size(c) <= 1 for c in folded.consts)


def test_products_are_written_with_constant_weights_and_a_vector_that_is_added():
    from onnx.reference import ReferenceEvaluator

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = onnx.numpy_helper.from_array(np.arange(6.0, dtype=np.float32).reshape(2, 3), "w")
    zero = onnx.numpy_helper.from_array(np.float32(0.0), "zero")
    bias = onnx.numpy_helper.from_array(np.array([[1.0, 2.0]], np.float32), "bias")
    nodes = [
        helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
        helper.make_node("Gemm", ["x", "turned", "zero"], ["product"], beta=0.0),
        helper.make_node("Add", ["product", "bias"], ["y"]),
        helper.make_node("Gemm", ["x", "turned", "zero"], ["bare"]),
        helper.make_node("Gemm", ["x", "turned", "zero"], ["twice"], alpha=2.0),
    ]
    values = [helper.make_tensor_value_info(n, kind, None) for n in ("x", "y", "bare", "twice")]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], [weights, zero, bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    want = ReferenceEvaluator(model).run(None, {"x": np.eye(3, dtype=np.float32)})
    plain_products(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add", "MatMul", "Gemm"]
    kept = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    assert kept["turned"] == [3, 2] and kept["y_bias"] == [2]
    got = ReferenceEvaluator(model).run(None, {"x": np.eye(3, dtype=np.float32)})
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


# What jax2onnx alone refuses or gets wrong

IMAGES = jnp.sin(jnp.arange(2 * 6 * 6 * 3.0)).reshape(2, 6, 6, 3)
ROWS = jnp.sin(jnp.arange(2 * 6 * 4.0)).reshape(2, 6, 4)
CODES = jnp.array([[1, 2, 3], [3, 2, 0]], jnp.int32)


def pools(_, x):
    both = {"strides": (2, 2), "padding": "SAME"}
    lowest = lambda x, init: jax.lax.reduce_window(x, init, jax.lax.min, (1, 3, 2, 1),
                                                   (1, 2, 1, 1), "VALID")  # fmt: skip
    yield from (nn.max_pool(x, (2, 3), **both), nn.avg_pool(x, (3, 2), **both))
    yield nn.max_pool(x, (2, 2), padding=((1, 1), (0, 1)))
    yield from (lowest(x, jnp.inf), lowest(x, 0.0))
    yield nn.max_pool(x[:, 0], (2,), strides=(2,))
    yield nn.max_pool(x[..., None], (2, 2, 2), strides=(2, 2, 2))  # over three axes
    yield nn.max_pool(jnp.stack([x, -x], 1), (2, 2))  # batches of batches
    yield jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID",
                                None, (1, 2, 1, 1))  # fmt: skip
    yield nn.max_pool(jnp.round(9 * x).astype(jnp.int32), (2, 2))
    yield jax.lax.map(lambda row: nn.max_pool(row, (2, 2), **both), x.swapaxes(0, 1)[..., None])


def products(params, x):
    half, whole = x.astype(jnp.float16), jnp.round(9 * x).astype(jnp.int32)
    yield jnp.einsum("bti,btj->btij", x, x)
    yield jnp.einsum("bi,bj,bk->bijk", x[:, 0], x[:, 1], x[:, 2])
    yield jnp.einsum("bi,bj->ij", x[:, 0], x[:, 1, :3])  # over the batch
    yield jnp.einsum("bti,bt->bi", x, whole[..., 0])
    for left in (half, x.astype(jnp.bfloat16), whole, x > 0):
        yield jax.lax.dot_general(left, params, (((2,), (0,)), ((), ())),
                                  preferred_element_type=jnp.float32)  # fmt: skip
    yield whole[:, 0] @ jnp.round(9 * params).astype(jnp.int32)
    yield jax.lax.dot_general(whole.astype(jnp.int8), whole.astype(jnp.int8),
                              (((2,), (2,)), ((0,), (0,))),
                              preferred_element_type=jnp.int32)  # fmt: skip
    yield nn.Conv(2, (2, 2, 2)).apply({"params": {"kernel": params.reshape(2, 2, 2, 1, 2),
                                                  "bias": jnp.ones(2)}},
                                      x.reshape(x.shape[0], 6, 2, 2, 1))  # fmt: skip


def paddings(_, x, codes):
    causal = lambda x, by: jnp.pad(x, ((0, 0), (2 * by, 0), (0, 0)))
    yield from (causal(x, 1), causal(x, 2) * 2, jnp.pad(codes, ((0, 1), (1, 2))))
    yield jax.lax.pad(x, 1.0, ((0, 0, 0), (-1, 2, 1), (0, 0, 0)))
    yield from (jnp.pad(x, ((0, 0), (1, 2), (0, 0)), mode=mode) for mode in ("edge", "reflect"))
    yield jnp.take_along_axis(x, codes[:, :, None], axis=1)
    yield x[jnp.arange(x.shape[0]), codes[:, 0]]
    yield jax.vmap(jax.vmap(lambda i: ROWS[0, i]))(codes)  # equinox's Embedding
    yield jnp.take(ROWS[0].astype(jnp.float16), codes, axis=0).astype(jnp.float32)
    yield from (x / x.shape[0], x.mean(0), jnp.argsort(x, -1), jnp.mod(x, 0.3), codes << 1)
    yield from (jax.lax.cumprod(x, 1), jax.lax.cumprod(x, 1, reverse=True))


def loops(params, x):
    rows = x.swapaxes(0, 1)
    start = jnp.zeros((x.shape[0], 4))
    step = lambda c, r: (jnp.tanh(c @ params[:, :4] + r), c * r)
    yield from (*jax.lax.scan(step, start, rows), *jax.lax.scan(step, start, rows, reverse=True))
    yield jax.lax.fori_loop(0, 3, lambda _, c: jnp.tanh(c @ params[:, :4]), x[:, 0])
    yield jax.lax.cond(x.sum() > 0, lambda x: x[:, 0] @ params, lambda x: -x[:, 0] @ params, x)
    branches = [jnp.sin, lambda x: x * 2, jnp.cos]
    yield jax.lax.switch(jnp.argmax(x[0, 0, :3]), branches, x)


@pytest.mark.parametrize(
    "fn, inputs",
    [(pools, (IMAGES,)), (products, (ROWS,)), (paddings, (ROWS, CODES)), (loops, (ROWS,))],
    ids=["pools", "products", "paddings", "loops"],
)
def test_operations_that_jax2onnx_refuses_are_written_by_others_for_any_batch(fn, inputs, tmp_path):
    params = jnp.cos(jnp.arange(16.0)).reshape(4, 4)
    every = lambda params, *inputs: list(fn(params, *inputs))
    report = jp.export.onnx(tmp_path / "net", every, params, *inputs, latency=())
    assert report.parity < 1e-5
    three = [jnp.concatenate([x, x[:1]]) for x in inputs]
    for got, want in zip(run(report.path, *three), every(params, *three), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_pools_are_those_of_onnx_on_batch_and_channels(tmp_path):
    fn = lambda _, x: nn.avg_pool(nn.max_pool(x, (2, 2)), (2, 2))
    report = jp.export.onnx(tmp_path / "net", fn, {}, IMAGES, latency=())
    nodes = {node.op_type: node for node in onnx.load(report.path).graph.node}
    for kind in ("MaxPool", "AveragePool"):
        assert [a.ints for a in nodes[kind].attribute if a.name == "kernel_shape"] == [[2, 2]]
    assert not {"Conv", "Unsqueeze"} & nodes.keys()


@pytest.mark.slow
def test_a_network_in_bfloat16_is_computed_in_float32_and_rounded(tmp_path):
    net = nn.Sequential([nn.Dense(5, dtype=jnp.bfloat16), nn.LayerNorm(dtype=jnp.bfloat16)])
    variables = net.init(jax.random.key(0), X)
    fn = lambda v, x: net.apply(v, x).astype(jnp.float32)
    assert jp.export.onnx(tmp_path / "net", fn, variables, X, tolerance=0.02).parity <= 0.02
    kinds = {node.op_type for node in onnx.load(tmp_path / "net").graph.node}
    assert {"MatMul", "Cast"} <= kinds  # rounded where JAX rounds
    with pytest.raises(ValueError, match=r"differs from JAX.*bfloat16 or float16: to 0.02"):
        jp.export.onnx(tmp_path / "net", fn, variables, X, tolerance=-1.0)


# Axes of any size


def attend(params, x, mask):
    scores = jnp.einsum("bqd,bkd->bqk", x @ params, x)
    scores = jnp.where(mask[:, None] > 0, scores, -1e9)
    return jax.nn.softmax(scores) @ x


@EXPORTS
def test_further_axes_may_be_of_any_size(export, tmp_path):
    inputs, words = (ROWS, jnp.ones((2, 6), jnp.int32)), ("batch, time, _", "batch, time")
    report = export(tmp_path / "net", attend, jnp.eye(4), *inputs, shapes=words)
    x, mask = jnp.cos(jnp.arange(3 * 9 * 4.0)).reshape(3, 9, 4), jnp.ones((3, 9), jnp.int32)
    if export is jp.export.onnx:
        (got,) = run(report.path, x, mask)
    else:
        got = jax.export.deserialize(bytearray(report.path.read_bytes())).call(x, mask)
    np.testing.assert_allclose(got, attend(jnp.eye(4), x, mask), rtol=1e-5, atol=1e-6)


def test_images_of_any_size_are_pooled_and_averaged_and_named_by_specs_alone(tmp_path):
    def fn(w, x):
        x = nn.max_pool(nn.relu(x @ w), (2, 2), strides=(2, 2))
        return x.mean((1, 2))

    b, h, w = jax.export.symbolic_shape("b, 2*h, 2*w")
    spec = jax.ShapeDtypeStruct((b, h, w, 3), jnp.float32)
    report = jp.export.onnx(tmp_path / "net", fn, jnp.eye(3), spec, latency=(1,))
    (got,) = run(report.path, IMAGES[:, :4])
    np.testing.assert_allclose(got, fn(jnp.eye(3), IMAGES[:, :4]), rtol=1e-5)
    assert list(report.latency_ms) == [1]


def test_a_loop_runs_over_rows_of_any_number(tmp_path):
    fn = lambda _, x: jax.lax.scan(lambda c, r: (c + r, c * r), x[:, 0], x.swapaxes(0, 1))
    report = jp.export.onnx(tmp_path / "net", fn, {}, ROWS, shapes="b, t, _", latency=())
    got = run(report.path, ROWS[:, :2])
    for a, b in zip(got, jax.tree.leaves(fn({}, ROWS[:, :2])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_sizes_obey_the_constraints_that_are_given(tmp_path):
    table = jnp.ones((8, 4))
    fn = lambda p, x: x + p[None, : x.shape[1]]
    words = jax.export.symbolic_args_specs((ROWS,), "b, t, _", constraints=("t <= 8",))
    assert jp.export.stablehlo(tmp_path / "net", fn, table, ROWS, shapes=words).parity == 0.0
    with pytest.raises(ValueError, match=r"cannot trace `fn` for b, t of any size.*constraints="):
        jp.export.stablehlo(tmp_path / "net", fn, table, ROWS, shapes="b, t, _")


@EXPORTS
@pytest.mark.parametrize(
    "shapes, words",
    [
        ("b, t", r"shapes='b, t', which do not fit inputs of shapes \[\[2, 6, 4\]\]"),
        ("b, (, _", r"shapes='b, \(, _' for inputs of shapes.*'batch, time, ...'"),
        (
            "b, 4*t, _",
            r"shapes \[\[2, 6, 4\]\] that do not fit \['\(b, 4\*t, 4\)'\].*sizes that fit",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(export, shapes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        export(tmp_path / "net", lambda _, x: x, {}, ROWS, shapes=shapes)


def test_specs_whose_constraints_allow_no_usual_size_ask_for_examples(tmp_path):
    (n,) = jax.export.symbolic_shape("n", constraints=("n >= 1000",))
    spec = jax.ShapeDtypeStruct((n,), jnp.float32)
    with pytest.raises(ValueError, match=r"no sizes to try n at. Pass arrays as examples"):
        jp.export.stablehlo(tmp_path / "net", lambda _, x: x, {}, spec)


# Arguments in the wrong places


@EXPORTS
def test_arguments_in_the_wrong_places_are_told(export, params, tmp_path):
    path, net = tmp_path / "net", nn.Dense(3)
    variables, masks = net.init(jax.random.key(0), X), jp.find_masks(params, 0.5)
    for args, words in (
        ((mlp, path, params, X), r"the function `mlp` as path, .*\(path, fn, params, \*inputs\)"),
        ((path, params, mlp, X), r"type `dict` as fn, .*the function `mlp` as params. The order"),
        ((path, mlp, X, params), r"params and inputs the other way round"),
        ((path, net, variables, X), r"type `Dense` as fn.*Pass its `apply`"),
        ((path, mlp, params, masks, X), r"masks as input 0.*`masks=`"),
        ((path, mlp, params, jp.pack(masks), X), r"masks as input 0"),
    ):
        with pytest.raises(TypeError, match=words):
            export(*args)
    with pytest.raises(ValueError, match=r"unknown 'count', 'masks/v'.*`jp.get_masks` takes them"):
        export(path, mlp, params, X, masks=jp.PruneState(jnp.array(0), masks, (), (), None))


@EXPORTS
def test_a_module_is_no_function_of_its_params(export, tmp_path):
    from flax import nnx

    module = nnx.Linear(16, 3, rngs=nnx.Rngs(0))
    for inputs in ((X,), (nnx.split(module)[1], X)):
        with pytest.raises(TypeError, match=r"type `Linear` as fn, a module.*nnx.split\(module"):
            export(tmp_path / "net", module, *inputs)


def test_quantization_with_its_paths_the_wrong_way_round_is_told(float_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path of the new file comes first"):
        jp.export.quantize_onnx(float_file, tmp_path / "int8", X)
    with pytest.raises(TypeError, match=r"array float32\[5, 16\] as source.*path, source, calib"):
        jp.export.quantize_onnx(tmp_path / "int8", X, float_file)


def test_what_onnx_or_numpy_lacks_is_named(tmp_path):
    spectrum = lambda _, x: jnp.fft.rfft(x).real
    with pytest.raises(ValueError, match=r"`fft` at test_export.py:\d+, which makes complex num"):
        jp.export.onnx(tmp_path / "net", spectrum, {}, X)
    with pytest.raises(TypeError, match=r"an input of type bfloat16.*Convert it inside of `fn`"):
        jp.export.onnx(tmp_path / "net", lambda _, x: x, {}, X.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match=r"a result of type bfloat16"):
        jp.export.onnx(tmp_path / "net", lambda _, x: x.astype(jnp.bfloat16), {}, X)


def test_an_operation_that_loads_but_does_not_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(_onnx, "free_pools", lambda model: None)
    with pytest.raises(ValueError, match=r"`reduce_window_max` at test_export.py:\d+.*pooling"):
        jp.export.onnx(tmp_path / "net", lambda _, x: nn.max_pool(x, (2, 2)), {}, IMAGES)


# int8


def int8_weights(path):
    """The int8 matrices of a file, and whether all zero points beside them are zero."""
    graph = onnx.load(path).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    found = [(arrays[n.input[0]], arrays[n.input[2]]) for n in nodes if n.input[0] in arrays]
    return {w.shape: w for w, _ in found if w.ndim > 1}, all(not z.any() for _, z in found)


def test_pruned_weights_stay_zero_in_int8_and_the_file_is_smaller(tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = {"w": draw(16, 256), "b": draw(256), "v": draw(256, 10)}
    masks = jp.find_masks(params, 0.5)
    x = draw(300, 16)
    dense = jp.export.onnx(tmp_path / "net", mlp, params, x, masks=masks, latency=())
    report = jp.export.quantize_onnx(tmp_path / "int8", tmp_path / "net", x, latency=(1,))
    weights, symmetric = int8_weights(report.path)
    assert symmetric and set(weights) == {(16, 256), (256, 10)}
    for name in ("w", "v"):
        assert (weights[params[name].shape][~np.asarray(masks[name])] == 0).all()
    assert report.bytes < dense.bytes / 2
    assert list(report.latency_ms) == [1]
    assert (report.parity < 0.05 and report.agreement > 0.9) or not sums_int8_exactly()
    assert files(tmp_path) == ["int8", "net"]


@pytest.fixture(scope="module")
def float_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "net.onnx"
    params = {"w": jnp.eye(16, 32), "b": jnp.zeros(32), "v": jnp.ones((32, 10))}
    jp.export.onnx(path, mlp, params, X, latency=())
    return path


@pytest.mark.parametrize(
    "calibration",
    [
        np.asarray(X),
        (X,),
        {"input_0": X},
        [X[:2], X[2:]],
        iter([(X[:2],), {"input_0": X[2:]}]),
    ],
    ids=["array", "tuple", "dict", "list", "generator"],
)
def test_calibration_inputs_come_in_many_forms_and_mean_the_same(float_file, calibration, tmp_path):
    report = jp.export.quantize_onnx(tmp_path / "a", float_file, calibration, test=X, latency=())
    want = jp.export.quantize_onnx(tmp_path / "b", float_file, X, latency=())
    assert report.parity == want.parity and report.path.read_bytes() == want.path.read_bytes()


@pytest.mark.parametrize(
    "calibration, words",
    [
        ([], r"got no calibration inputs.*some hundred"),
        (X[:0], r"got no calibration inputs"),
        (X[:, :3], r"'input_0' is float32\[5, 3\], wanted tensor\(float\)\['batch', 16\]"),
        (X.astype(jnp.int32), r"'input_0' is int32\[5, 16\]"),
        ({"images": X}, r"inputs \['images'\], but the file takes \['input_0'\]"),
        ((X, X), r"inputs 2 arrays, but the file takes \['input_0'\]"),
        (X.at[0, 0].set(jnp.nan), r"'input_0' holds values that are not finite"),
    ],
)
def test_calibration_inputs_that_do_not_fit_are_refused(float_file, calibration, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        jp.export.quantize_onnx(tmp_path / "int8", float_file, calibration)
    assert files(tmp_path) == []


def test_quantization_says_what_is_wrong_and_leaves_the_old_file(float_file, tmp_path):
    old = tmp_path / "int8"
    old.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"method='max'\)` is unknown.*'minmax', 'entropy'"):
        jp.export.quantize_onnx(old, float_file, X, method="max")
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere'.*jp.export.onnx"):
        jp.export.quantize_onnx(old, "nowhere", X)
    with pytest.raises(ValueError, match=r"top-1 predictions, less than `min_agreement=1.01`"):
        jp.export.quantize_onnx(old, float_file, X, min_agreement=1.01)
    (tmp_path / "broken").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"cannot load '.*broken'"):
        jp.export.quantize_onnx(old, tmp_path / "broken", X)
    assert old.read_bytes() == b"old" and files(tmp_path) == ["broken", "int8"]


# What goes wrong


@EXPORTS
def test_a_file_is_replaced_whole_or_stays_as_it_was(export, params, tmp_path):
    path = tmp_path / "new" / "net"
    kwargs = {"latency": ()} if export is jp.export.onnx else {}
    first = export(path, mlp, params, X, **kwargs)
    again = export(path, mlp, params, X, **kwargs)
    assert again.bytes == first.bytes  # never appended
    before = path.read_bytes()
    drifting = iter([0.0, *[1.0] * 9])  # another number at every trace
    with pytest.raises(ValueError, match=r"differs from JAX by .*0.0001`: 'output' at \["):
        export(path, lambda p, x: mlp(p, x) + next(drifting), params, X, **kwargs)
    assert path.read_bytes() == before and files(path.parent) == ["net"]


@EXPORTS
def test_a_folder_is_no_file(export, params, tmp_path):
    with pytest.raises(ValueError, match=r"is a folder. Pass the path of a file"):
        export(tmp_path, mlp, params, X)


@EXPORTS
def test_an_operation_without_a_counterpart_is_named_with_a_way_out(export, params, tmp_path):
    def unknown(params, x):
        return mlp(params, jax.pure_callback(np.sin, jax.ShapeDtypeStruct((5, 16), x.dtype), x))

    with pytest.raises(ValueError, match=r"`pure_callback` at test_export.py:\d+.*out of `fn`"):
        export(tmp_path / "net", unknown, params, X, batch=None)
    assert files(tmp_path) == []


def test_onnx_names_a_decomposition_that_it_does_not_know(tmp_path):
    eigen = lambda p, x: jnp.linalg.eigvalsh(x @ jnp.swapaxes(x, -1, -2))
    with pytest.raises(ValueError, match=r"`eigh` at test_export.py:\d+.*jp.export.stablehlo"):
        jp.export.onnx(tmp_path / "net", eigen, {}, jnp.ones((2, 4, 4)))
    assert jp.export.stablehlo(tmp_path / "net", eigen, {}, jnp.ones((2, 4, 4))).parity < 1e-4


@EXPORTS
def test_a_function_that_needs_to_know_its_batch_is_told_how_not_to(export, tmp_path):
    fn = lambda p, x: x.reshape(len(x), -1) + 1
    with pytest.raises(ValueError, match=r"batch of any size.*`x.shape\[0\]`.*`batch=None`"):
        export(tmp_path / "net", fn, {}, X)
    assert export(tmp_path / "net", fn, {}, X, batch=None).parity == 0.0


@EXPORTS
def test_an_error_of_the_function_itself_passes_as_it_is(export, tmp_path):
    with pytest.raises(TypeError, match="contracting dimensions"):
        export(tmp_path / "net", lambda p, x: x @ x, {}, X)


@EXPORTS
@pytest.mark.parametrize(
    "params, inputs, error, words",
    [
        ({"w": jax.ShapeDtypeStruct((1,), jnp.float32)}, (X,), TypeError, r"without values at 'w'"),
        ({}, (), ValueError, r"got no input array.*examples after the params"),
        ({}, (3,), ValueError, r"got no input array"),
        (None, (X,), ValueError, r"a function that returns no array"),
        ({}, (jax.random.key(0),), TypeError, r"of type key<fry>, which exists in JAX only"),
    ],
)
def test_inputs_that_cannot_be_exported_are_refused(export, params, inputs, error, words, tmp_path):
    with pytest.raises(error, match=words):
        export(tmp_path / "net", lambda p, x: None if p is None else x, params, *inputs)


def test_stablehlo_for_other_platforms_alone_could_not_be_checked(params, tmp_path):
    with pytest.raises(ValueError, match=r"platforms=\('cuda',\)\)` could not be compared.*'cpu'"):
        jp.export.stablehlo(tmp_path / "net", mlp, params, X, platforms=("cuda",))


def test_onnx_refuses_weights_beyond_the_limit_of_a_file(params, tmp_path, monkeypatch):
    monkeypatch.setattr(_onnx, "LIMIT", 3000)
    with pytest.raises(ValueError, match=r"GiB of weights.*less than 2 GiB. Shrink more"):
        jp.export.onnx(tmp_path / "net", mlp, params, X)


@pytest.mark.parametrize(
    "module, call",
    [
        ("jax2onnx", lambda p: jp.export.onnx(p, mlp, {}, X)),
        ("flatbuffers", lambda p: jp.export.stablehlo(p, mlp, {}, X)),
        ("onnxruntime", lambda p: jp.export.quantize_onnx(p, p, X)),
    ],
)
def test_a_missing_package_is_named_with_its_extra(module, call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "net").write_bytes(b"")
    with pytest.raises(ImportError, match=rf"'{module}'.*pip install 'jaxprune\[export\]'"):
        call(tmp_path / "net")


def test_a_reference_is_compiled_once_for_a_batch_size(params, tmp_path):
    counted = TraceCount(mlp)
    jp.export.stablehlo(tmp_path / "net", counted, params, X)
    assert counted.count == 3  # for any batch; for the batch given; for a batch of one


# Whole networks, slow


@pytest.fixture(scope="module", params=["mlp", "lenet", "residual", "transformer"])
def model(request):
    """A network of the experiments as it is initialised, and inputs."""
    key = jax.random.key(0)
    images, codes = jax.random.normal(key, (3, 784)), jax.random.randint(key, (3, 16), 0, 20)
    net, x = {
        "mlp": (models.MLP((64, 32), 10), images),
        "lenet": (models.LeNet5(10), images),
        "residual": (models.ResidualNet((8, 16), 10, 1), images),
        "transformer": (models.Transformer(20, 16, 32, 2, 4), codes),
    }[request.param]
    return net, jax.jit(net.init)(key, x), x


@pytest.mark.slow
@pytest.mark.parametrize("small", [False, True], ids=["pruned", "shrunk"])
@EXPORTS
def test_whole_networks_pruned_and_shrunk_are_exported_for_any_batch(
    export, small, model, tmp_path
):
    net, variables, x = model
    rng = np.random.default_rng(0)  # no bias is 0 any more and no scale is 1
    nudge = lambda w: w + 0.1 * np.abs(rng.standard_normal(w.shape)).astype(w.dtype)
    variables = jax.tree.map(nudge, variables)
    if small:
        groups = jp.find_groups(net.apply, variables, x)
        masks = jp.find_masks(variables, 0.5, pattern=jp.patterns.Coupled(groups))
        fn, params = jp.shrink(net.apply, variables, masks)
    else:
        masks = jp.find_masks(
            variables, 0.8, where=lambda path, w: "params/" in path and w.ndim > 1
        )
        fn, params = net.apply, jp.export.bake(variables, masks)
    report = export(tmp_path / "net", fn, params, x)
    assert report.parity < 1e-5 and report.agreement == 1.0
    seven = jnp.tile(x, (3, 1))[:7]
    want = net.apply(jp.apply_masks(variables, masks), seven)
    if export is jp.export.onnx:
        (got,) = run(report.path, seven)
    else:
        got = jax.export.deserialize(bytearray(report.path.read_bytes())).call(seven)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_whole_networks_are_quantized(model, tmp_path):
    net, variables, x = model
    rng = np.random.default_rng(1)
    shape = (256, *x.shape[1:])
    calibration = (
        rng.integers(0, 20, shape).astype(np.int32)
        if x.dtype == jnp.int32
        else rng.standard_normal(shape).astype(np.float32)
    )
    dense = jp.export.onnx(tmp_path / "net", net.apply, variables, x, latency=())
    report = jp.export.quantize_onnx(tmp_path / "int8", dense.path, calibration, latency=())
    assert report.bytes < dense.bytes and report.parity < 0.1 and report.agreement > 0.9
    assert int8_weights(report.path)[1]


@pytest.mark.slow
def test_nnx_equinox_and_haiku_are_functions_like_any_other(tmp_path):
    equinox, haiku = pytest.importorskip("equinox"), pytest.importorskip("haiku")
    from flax import nnx

    x = jnp.sin(jnp.arange(24.0)).reshape(3, 8)
    graphdef, state = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    arrays, rest = equinox.partition(
        equinox.nn.Linear(8, 4, key=jax.random.key(0)), equinox.is_array
    )

    @haiku.without_apply_rng
    @haiku.transform
    def net(x):
        return haiku.Linear(4)(x)

    for fn, params in (
        (lambda state, x: nnx.merge(graphdef, state)(x), state),
        (lambda arrays, x: jax.vmap(equinox.combine(arrays, rest))(x), arrays),
        (net.apply, net.init(jax.random.key(0), x)),
    ):
        report = jp.export.onnx(tmp_path / "net", fn, params, x, latency=())
        assert report.parity < 1e-5
        assert jp.export.stablehlo(tmp_path / "program", fn, params, x).parity < 1e-5


def test_jax_numpy_is_as_it_was_after_an_export(tmp_path):
    before = dict(vars(jnp))
    jp.export.onnx(
        tmp_path / "net.onnx", lambda p, x: p * x, jnp.array(2.0), jnp.ones((2, 3)), latency=()
    )
    assert [name for name, f in before.items() if getattr(jnp, name) is not f] == []
    assert jnp.cumsum(jnp.ones((2, 3)), 1).tolist() == [[1, 2, 3]] * 2


def test_floats_beyond_a_narrow_integer_saturate_in_a_file_as_in_jax(tmp_path):
    fn = lambda p, x: jnp.round(x * p).astype(jnp.int8).astype(jnp.float32)
    x = jnp.array([[-300.0, -128.4, 127.6, 128.0, 300.0, 3.0]])
    report = jp.export.onnx(tmp_path / "net.onnx", fn, jnp.float32(1.0), x)
    assert report.parity == 0
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: np.asarray(x)})
    np.testing.assert_array_equal(got, [[-128, -128, 127, 127, 127, 3]])
