"""Products with kept blocks, and stacked layers, as files: what they hold and compute."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.export._fold import fold
from jaxprune.graph._block_product import block_product

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

LAYERS, COLUMNS, KEPT, BLOCK = 3, 4, 2, 16
WIDTH = COLUMNS * BLOCK
INDEX = np.array([[0, 3], [1, 2], [0, 1], [2, 3]], np.int32)
GATHERED = ["Reshape", "Gather", "Reshape", "Transpose", "MatMul", "Transpose", "Reshape"]
WEIGHTS = jnp.cos(jnp.arange(5120.0)).reshape(512, 10)
X = jnp.sin(jnp.arange(5.0 * WIDTH)).reshape(5, WIDTH)


def one(blocks, x):
    return block_product(x, blocks, INDEX)


def stacked(params, x):
    def layer(stream, each):
        index, blocks, bias = each
        return jax.nn.relu(block_product(stream, blocks, index) + bias[None]), stream[0, 0]

    indices = np.stack([INDEX, INDEX[::-1], INDEX])
    return lax.scan(layer, x, (indices, params["blocks"], params["bias"]))


@pytest.fixture
def blocks(key):
    return jax.random.normal(key, (COLUMNS, KEPT, BLOCK, BLOCK)) / 6


@pytest.fixture
def params(key):
    drawn = jax.random.normal(key, (LAYERS, COLUMNS, KEPT, BLOCK, BLOCK)) / 6
    return {"blocks": drawn, "bias": jnp.linspace(-1, 1, LAYERS * WIDTH).reshape(LAYERS, WIDTH)}


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))


def kinds(path):
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("batch", ["batch", None])
def test_a_product_with_kept_blocks_is_a_gather_and_a_product(blocks, batch, tmp_path):
    report = jp.export.onnx(tmp_path / "net", one, blocks, X, batch=batch, latency=())
    assert kinds(report.path) == GATHERED
    x = jnp.cos(jnp.arange((5 if batch is None else 7) * WIDTH)).reshape(-1, WIDTH)
    (got,) = run(report.path, x)
    np.testing.assert_allclose(got, one(blocks, x), rtol=1e-5, atol=1e-5)


def test_a_compacted_network_is_on_disk_by_its_kept_blocks_alone(key, tmp_path):
    mlp = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"]
    wide = {"w": jax.random.normal(key, (512, 512)), "b": jnp.ones(512), "v": WEIGHTS}
    x = jnp.sin(jnp.arange(4.0 * 512)).reshape(4, 512)
    blocks = jp.patterns.Blocks((32, 32), axes=("in", "out"))
    layout, where = jp.find_layout(mlp, wide, x), jp.by_path("w")
    parts = {"pattern": blocks, "scope": jp.scopes.per_output, "layout": layout, "where": where}
    masks = jp.find_masks(wide, 0.875, **parts)
    sparse_fn, sparse = jp.compact(mlp, wide, masks, only="w")
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(sparse))
    assert sparse["w"].size * 8 == wide["w"].size
    for export, room in ((jp.export.onnx, 8 * 32 + 2000), (jp.export.stablehlo, 10_000)):
        kwargs = {"latency": ()} if export is jp.export.onnx else {}
        report = export(tmp_path / "net", sparse_fn, sparse, x, **kwargs)
        assert kept < report.bytes < kept + room and report.parity < 1e-5
        assert report.gzip_bytes > kept / 2  # no zeros that compress away
        if export is jp.export.onnx:
            assert kinds(report.path) == [*GATHERED, "Add", "Relu", "MatMul"]
            want = mlp(jp.apply_masks(wide, masks), x[:3])
            np.testing.assert_allclose(run(report.path, x[:3])[0], want, rtol=1e-4, atol=1e-4)


def test_stacked_layers_are_written_one_by_one(params, tmp_path):
    report = jp.export.onnx(tmp_path / "net", stacked, params, X, latency=())
    counts = collections.Counter(kinds(report.path))
    assert counts["MatMul"] == LAYERS and "Loop" not in counts
    assert not {"Min", "Max", "Einsum"} & set(counts)  # no index is clipped
    x = X[:2]
    got = run(report.path, x)
    for a, b in zip(got, jax.tree.leaves(stacked(params, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_kept_blocks_in_int8_have_one_scale_for_a_product_of_integers(blocks, tmp_path):
    both = lambda p, x: one(p["blocks"], x) @ p["head"]
    params = {"blocks": blocks, "head": jnp.cos(jnp.arange(WIDTH * 10.0)).reshape(WIDTH, 10)}
    jp.export.onnx(tmp_path / "float", both, params, X, latency=())
    calibration = np.random.default_rng(0).normal(size=(64, WIDTH)).astype(np.float32)
    path, source = tmp_path / "int8", tmp_path / "float"
    report = jp.export.quantize_onnx(path, source, calibration, latency=())
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    (kept,) = (t for t in tensors.values() if len(t.dims) == 3)
    assert kept.data_type == onnx.TensorProto.INT8
    scales = sorted(
        list(t.dims) for n, t in tensors.items() if n.startswith("const") and "scale" in n
    )
    assert scales == [[], [10]]  # of the head each output has its own
    assert report.parity < 0.1


def test_a_program_for_xla_runs_after_it_is_read_back(params, tmp_path):
    report = jp.export.stablehlo(tmp_path / "net", stacked, params, X)
    exported = jax.export.deserialize(bytearray(report.path.read_bytes()))
    got = jax.tree.leaves(exported.call(X[:2]))
    for a, b in zip(got, jax.tree.leaves(stacked(params, X[:2])), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_layers_from_the_last_to_the_first_are_stacked_in_their_order():
    rows = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    fn = lambda x: lax.scan(lambda c, r: (c * 2 + r, c + r), x, rows, reverse=True)
    closed = jax.make_jaxpr(fn)(X[0, :2])
    for a, b in zip(fold(closed, X[0, :2]), jax.tree.leaves(fn(X[0, :2])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_of_branches_for_platforms_one_is_written():
    fn = lambda x: lax.platform_dependent(x, cpu=lambda x: x + 0, default=lambda x: x * 1)
    folded = jax.make_jaxpr(lambda x: fold(jax.make_jaxpr(fn)(x), x))(X)
    assert [eqn.primitive.name for eqn in folded.eqns] == ["mul"]
    known = lambda x: lax.switch(jnp.int32(7), [lambda x: x, lambda x: x + x], x)
    np.testing.assert_array_equal(fold(jax.make_jaxpr(known)(X), X)[0], 2 * X)


def test_heads_that_share_keys_are_a_matrix_product(tmp_path):
    queries, keys = jnp.ones((2, 3, 2, 4, 5)), jnp.linspace(0, 1, 2 * 6 * 2 * 5)
    fn = lambda keys, x: jnp.einsum("btkgd,bskd->bkgts", x, x[:, :, :, 0] + keys[None, :3])
    keys = keys.reshape(-1, 2, 5)
    report = jp.export.onnx(tmp_path / "net", fn, keys, queries, latency=())
    assert "Einsum" not in kinds(report.path) and "MatMul" in kinds(report.path)
    np.testing.assert_allclose(run(report.path, queries[:1])[0], fn(keys, queries[:1]), rtol=1e-5)


def test_places_beyond_the_array_are_clipped_in_the_file(tmp_path):
    fn = lambda p, x: jnp.take(x, p, axis=1, mode="clip")
    places = jnp.array([-3, 2, WIDTH + 5])
    report = jp.export.onnx(tmp_path / "net", fn, places, X, latency=())
    np.testing.assert_array_equal(run(report.path, X)[0], fn(places, X))


def test_a_transposed_array_that_others_read_too_is_gathered_where_it_lies(blocks, tmp_path):
    def both(blocks, x):
        laid = x.reshape(x.shape[0], -1, BLOCK).transpose(1, 0, 2)
        taken = jnp.take(laid, INDEX.reshape(-1), axis=0, mode="clip")
        parted = taken.reshape(COLUMNS, KEPT, -1, BLOCK)
        joined = parted.transpose(0, 2, 1, 3).reshape(COLUMNS, -1, KEPT * BLOCK)
        return joined @ blocks.reshape(COLUMNS, -1, BLOCK), laid, parted

    report = jp.export.onnx(tmp_path / "net", both, blocks, X, latency=())
    for a, b in zip(run(report.path, X[:3]), both(blocks, X[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_sizes_that_do_not_follow_from_one_another_are_computed(tmp_path):
    fn = lambda _, x: x.reshape(x.shape[0], 2, -1, x.shape[1]).transpose(1, 0, 3, 2)
    x = jnp.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    report = jp.export.onnx(tmp_path / "net", fn, {}, x, shapes="b, t, _", latency=())
    np.testing.assert_array_equal(run(report.path, x[:1, :2])[0], fn({}, x[:1, :2]))
