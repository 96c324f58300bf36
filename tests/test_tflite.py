"""LiteRT files with sparse weights: what they compute and weigh, and what is left dense."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.export import _tflite
from jaxprune.export._sparse_weights import read_weights, tabulate

pytest.importorskip("flatbuffers")
pytest.importorskip("ai_edge_litert.interpreter")

from ai_edge_litert.interpreter import Interpreter

from benchmarks import litert

SPARSE = (9, 8)  # a fully connected layer, of the version whose weights are sparse
UNPACK = (124, 1)


def matrix(seed, outputs, inputs, sparsity, block=1):
    """Draw a pruned kernel, in the orientation of the file."""
    w = jnp.asarray(np.random.default_rng(seed).standard_normal((inputs, outputs)), jnp.float32)
    masks = jp.find_masks({"w": w}, sparsity, pattern=jp.patterns.Blocks((block, 1)))
    return np.ascontiguousarray(np.asarray(jp.apply_masks({"w": w}, masks)["w"]).T)


def run(path, x):
    interpreter = Interpreter(model_path=str(path))  # as a user does: all threads, XNNPACK
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def codes(path):
    return [(code.builtinCode, code.version) for code in litert.read(path).operatorCodes]


def weights(path, *indices):
    model = litert.read(path)
    return [read_weights(model, 0, i) for i in indices]


@pytest.fixture
def net(tmp_path):
    """Two layers, 90 % of whose weights are zero in blocks of four inputs."""
    ws = matrix(0, 512, 256, 0.9, 4), matrix(1, 64, 512, 0.9, 4)
    return litert.write(tmp_path / "net.tflite", litert.mlp(*ws)), ws


# What a file computes and weighs


def test_blocks_of_four_inputs_weigh_a_ninth_and_compute_the_same(net, tmp_path):
    source, ws = net
    report = jp.export.sparsify_tflite(tmp_path / "sparse.tflite", source)
    assert report.bytes <= 0.15 * report.dense_bytes and report.parity < 1e-6
    assert (
        report.bytes == report.path.stat().st_size and report.dense_bytes == source.stat().st_size
    )
    assert report.zeros_kept == 1 and report.zeroed == 0 and report.agreement == 1
    assert report.latency_ms.keys() == report.dense_latency_ms.keys() == {1}
    x = np.random.default_rng(2).standard_normal((1, 256), np.float32)
    want = np.maximum(x @ ws[0].T + np.linspace(-1, 1, 512), 0) @ ws[1].T + np.linspace(-1, 1, 64)
    got = run(report.path, x)
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()
    for now, before in zip(weights(report.path, 1, 4), ws, strict=True):
        np.testing.assert_array_equal(now, before)
    assert "dense 0.0" in str(report) and "of dense" in str(report)


@pytest.mark.filterwarnings("ignore:`export.sparsify_tflite` stored weights")
@pytest.mark.parametrize("compute", ["sparse", "dense"])
@pytest.mark.parametrize("block", [(1, 1), (1, 4), None])
@pytest.mark.parametrize("inputs", [20, 300])
@pytest.mark.parametrize("batch", [1, 3])
def test_sparse_weights_of_any_shape_compute_the_same(compute, block, inputs, batch, tmp_path):
    w = matrix(0, 201, inputs, 0.6, 4)
    w[1] = 0  # an output without inputs
    source = litert.write(tmp_path / "net.tflite", litert.mlp(w, batch=batch))
    report = jp.export.sparsify_tflite(tmp_path / "sparse.tflite", source, block=block, latency=())
    assert report.parity < 1e-6 and report.zeros_kept == 1 and report.latency_ms is None
    np.testing.assert_array_equal(weights(report.path, 1)[0], w)


def test_a_matrix_of_zeros_alone_is_no_unknown_one(tmp_path):
    ws = matrix(0, 64, 64, 0.95), np.zeros((64, 64), np.float32)
    source = litert.write(tmp_path / "net.tflite", litert.mlp(*ws))
    report = jp.export.sparsify_tflite(tmp_path / "sparse.tflite", source, latency=())
    assert report.parity == 0 and not weights(report.path, 4)[0].any()


def test_a_batch_of_any_size_stays_one_and_is_timed_at_several(tmp_path):
    w = matrix(0, 256, 256, 0.9, 4)
    source = litert.write(tmp_path / "net.tflite", litert.mlp(w, free=True))
    report = jp.export.sparsify_tflite(tmp_path / "sparse.tflite", source, latency=(1, 5))
    assert report.latency_ms.keys() == report.dense_latency_ms.keys() == {1, 5}
    interpreter = Interpreter(model_path=str(report.path))
    assert interpreter.get_input_details()[0]["shape_signature"].tolist() == [-1, 256]


def test_a_file_may_replace_its_source(net):
    source, _ = net
    before = source.stat().st_size
    report = jp.export.sparsify_tflite(source, source, latency=())
    assert source.stat().st_size == report.bytes < 0.2 * before == 0.2 * report.dense_bytes
    with pytest.raises(ValueError, match="'w0' is sparse already"):
        jp.export.sparsify_tflite(source, source)


def test_signatures_and_metadata_stay(tmp_path):
    model = litert.mlp(matrix(0, 64, 64, 0.95))
    names = [litert.schema.TensorMapT(name=n, tensorIndex=i) for n, i in (("images", 0), ("y", 3))]
    model.signatureDefs = [
        litert.schema.SignatureDefT(inputs=names[:1], outputs=names[1:], signatureKey="serve")
    ]
    model.buffers.append(litert.schema.BufferT(data=np.arange(5, dtype=np.uint8)))
    model.metadata = [litert.schema.MetadataT(name="min", buffer=len(model.buffers) - 1)]
    source = litert.write(tmp_path / "net.tflite", model)
    path = jp.export.sparsify_tflite(tmp_path / "out.tflite", source, latency=()).path
    out = litert.read(path)
    assert bytes(out.buffers[out.metadata[0].buffer].data) == bytes(range(5))
    runner = Interpreter(model_path=str(path)).get_signature_runner("serve")
    assert runner(images=np.ones((1, 64), np.float32))["y"].shape == (1, 64)


def two_graphs(*named):
    """Make a file of two networks, of which the second one is no part of the first."""
    model, other = litert.mlp(matrix(0, 64, 64, 0.95)), litert.mlp(matrix(1, 64, 64, 0.95))
    (second,), ends = other.subgraphs, (("x", 0), ("y", 3))
    for tensor in second.tensors:
        tensor.buffer += len(model.buffers)
    model.buffers += other.buffers
    model.subgraphs.append(second)
    model.signatureDefs = []
    for graph, key in enumerate(named):
        x, y = ([litert.schema.TensorMapT(name=n, tensorIndex=i)] for n, i in ends)
        model.signatureDefs.append(
            litert.schema.SignatureDefT(inputs=x, outputs=y, signatureKey=key, subgraphIndex=graph)
        )
    return model


def test_each_signature_is_compared(tmp_path, monkeypatch):
    source = litert.write(tmp_path / "net.tflite", two_graphs("encode", "decode"))
    out = tmp_path / "out.tflite"
    report = jp.export.sparsify_tflite(out, source, latency=())
    assert report.zeros_kept == 1 and report.parity < 1e-6
    model = litert.read(out)
    assert all(any(t.sparsity for t in graph.tensors) for graph in model.subgraphs)
    second = matrix(1, 64, 64, 0.95)
    wrong = lambda w, n: tabulate(2 * w if np.array_equal(w, second) else w, n)
    monkeypatch.setattr(_tflite, "tabulate", wrong)
    with pytest.raises(ValueError, match=r"differs from the source by .* 'decode/y'"):
        jp.export.sparsify_tflite(out, source, latency=())


def test_what_no_signature_runs_stays_dense(tmp_path):
    source = litert.write(tmp_path / "net.tflite", two_graphs("encode"))
    model = litert.read(jp.export.sparsify_tflite(tmp_path / "o.tflite", source, latency=()).path)
    assert [any(t.sparsity for t in graph.tensors) for graph in model.subgraphs] == [True, False]


# Which form, for which matrix


def test_each_matrix_takes_the_form_of_the_fewest_bytes(tmp_path):
    single, blocks = matrix(0, 128, 128, 0.95), matrix(1, 128, 128, 0.95, 4)
    few, odd = matrix(2, 128, 128, 0.1), matrix(3, 7, 128, 0.95)
    source = litert.write(tmp_path / "net.tflite", litert.mlp(single, blocks, few, odd))
    path = tmp_path / "out.tflite"
    jp.export.sparsify_tflite(path, source, compute="sparse", latency=())
    out = litert.read(path)
    tables = [out.subgraphs[0].tensors[i].sparsity for i in (1, 4, 7, 10)]
    assert [table and len(table.dimMetadata) for table in tables] == [2, 3, None, 2]
    # Dense layers keep their operator, and with it XNNPACK.
    used = [codes(path)[o.opcodeIndex] for o in out.subgraphs[0].operators]
    assert used == [SPARSE, SPARSE, (9, 1), SPARSE]


def test_what_would_be_slow_is_unpacked_and_fast_blocks_are_not(tmp_path):
    ws = matrix(0, 128, 128, 0.9), matrix(1, 128, 128, 0.9, 4), matrix(2, 128, 128, 0.75, 4)
    source = litert.write(tmp_path / "net.tflite", litert.mlp(*ws))
    path = jp.export.sparsify_tflite(tmp_path / "out.tflite", source).path
    operators = litert.read(path).subgraphs[0].operators
    unpacked = [int(o.outputs[0]) for o in operators if codes(path)[o.opcodeIndex] == UNPACK]
    layers = [codes(path)[o.opcodeIndex] for o in operators[len(unpacked) :]]
    assert sorted(unpacked) == [1, 7] and layers == [(9, 1), SPARSE, (9, 1)]
    for now, before in zip(weights(path, 1, 4, 7), ws, strict=True):
        np.testing.assert_array_equal(now, before)
    with pytest.raises(ValueError, match=r"'w0' is sparse already\n- 'w1' is sparse already"):
        jp.export.sparsify_tflite(tmp_path / "again.tflite", path)


def test_matrices_below_the_least_sparsity_stay_dense(tmp_path):
    ws = matrix(0, 128, 128, 0.75, 4), matrix(1, 128, 128, 0.95, 4)
    source = litert.write(tmp_path / "net.tflite", litert.mlp(*ws))
    report = jp.export.sparsify_tflite(
        tmp_path / "out.tflite", source, min_sparsity=0.9, latency=()
    )
    out = litert.read(report.path).subgraphs[0].tensors
    assert out[1].sparsity is None and out[4].sparsity is not None and len(out) == 7


def test_few_zeros_are_told_to_be_slow(tmp_path):
    w = matrix(0, 256, 256, 0.5)
    source = litert.write(tmp_path / "net.tflite", litert.mlp(w))
    words = r"'w0' \(50.0%, 1 x 1\).* over those of the source: \d.* at batch 1"
    with pytest.warns(UserWarning, match=words):
        report = jp.export.sparsify_tflite(tmp_path / "out.tflite", source, compute="sparse")
    assert report.bytes < report.dense_bytes


def test_tables_list_blocks_row_by_row():
    w = np.zeros((3, 8), np.float32)
    w[0, 5], w[2, 0] = 1, 2
    table = tabulate(w, 4)
    assert table.segments.tolist() == [0, 1, 1, 2] and table.columns.tolist() == [1, 0]
    assert table.values.tolist() == [[0, 1, 0, 0], [2, 0, 0, 0]]
    assert [tabulate(np.ones((n, 1)), 1).segments.dtype for n in (255, 256, 65536)] == [
        np.uint8,
        np.uint16,
        np.int32,
    ]


def test_buffers_begin_at_multiples_of_16(net, tmp_path):
    source, (w, _) = net
    path = jp.export.sparsify_tflite(tmp_path / "out.tflite", source, latency=()).path
    values = tabulate(w, 4).values.tobytes()
    assert path.read_bytes().index(values) % 16 == 0


# What is left dense, and bad input


def shared():
    """Make a layer whose weights are the second operand of an addition, too."""
    model = litert.mlp(matrix(0, 64, 64, 0.9))
    y = litert.tensor(model, "sum", (64, 64))
    litert.operator(model, "ADD", [1, 1], [y])
    model.subgraphs[0].outputs.append(y)
    return model


def widened():
    """Make a layer whose weights come out of another operation."""
    model = litert.mlp(matrix(0, 64, 64, 0.9))
    y = litert.tensor(model, "sum", (64, 64))
    litert.operator(model, "ADD", [1, 1], [y])
    model.subgraphs[0].operators.reverse()
    model.subgraphs[0].operators[1].inputs[1] = y
    return model


def in_int8():
    return litert.mlp((matrix(0, 64, 64, 0.9) * 20).astype(np.int8))


REASONS = {
    shared: "'w0' is shared with other operations",
    widened: "'sum' is computed by other operations, as float16 weights are",
    in_int8: "'w0' is int8, not float32",
    lambda: litert.mlp(matrix(0, 64, 64, 0.1)): "'w0' has 10% zeros and would be no smaller",
}


@pytest.mark.parametrize(("make", "words"), REASONS.items())
def test_weights_that_cannot_be_sparse_are_named_with_the_reason(make, words, tmp_path):
    source = litert.write(tmp_path / "net.tflite", make())
    with pytest.raises(ValueError, match=f"to store sparse:\n- {words}"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", source)
    assert not (tmp_path / "out.tflite").exists()


def test_blocks_that_do_not_fit_and_too_few_zeros_are_named(tmp_path):
    source = litert.write(tmp_path / "net.tflite", litert.mlp(matrix(0, 64, 30, 0.9)))
    with pytest.raises(ValueError, match="'w0' has 30 inputs, no multiple of 4"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", source, block=(1, 4))
    with pytest.raises(ValueError, match="'w0' has 90% zeros, less than 95%"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", source, min_sparsity=0.95)


def test_a_file_without_fully_connected_layers_is_refused(tmp_path):
    model = litert.empty()
    x, y = litert.tensor(model, "x", (1, 4)), litert.tensor(model, "y", (1, 4))
    litert.operator(model, "ADD", [x, x], [y])
    model.subgraphs[0].inputs, model.subgraphs[0].outputs = [x], [y]
    source = litert.write(tmp_path / "net.tflite", model)
    with pytest.raises(ValueError, match=r"finds no fully connected layer in .*net\.tflite"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", source)


def test_what_is_no_file_of_litert_is_refused(tmp_path):
    path = tmp_path / "net.tflite"
    with pytest.raises(FileNotFoundError, match="The path of the new file comes first"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", path)
    path.write_text("a text, which is long enough to be something")
    with pytest.raises(ValueError, match=r"cannot load .*net\.tflite.* does not begin as one"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", path)
    whole = litert.write(path, litert.mlp(matrix(0, 64, 64, 0.95))).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot load .*net\.tflite"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", path)
    with pytest.raises(TypeError, match=r"sparsify_tflite\(path, source\)"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", b"TFL3")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"block": (4, 4)}, r"block=\(4, 4\).* Use \(1, 4\)"),
        ({"min_sparsity": 90}, "share of zeros"),
        ({"compute": "fast"}, "'sparse', 'dense', or"),
        ({"block": 4}, r"block=4\)` is none .* Use \(1, 4\)"),
        ({"min_sparsity": "0.5"}, "share of zeros"),
        ({"latency": 1}, r"latency=1\)` is no sequence of batch sizes"),
        ({"latency": (0,)}, r"latency=\(0,\)\)` is no sequence of batch sizes"),
        ({"tolerance": None}, "tolerance=None.* is no difference"),
    ],
)
def test_unknown_settings_are_refused(setting, words, net, tmp_path):
    with pytest.raises(ValueError, match=words):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", net[0], **setting)


def test_a_file_that_differs_is_not_put_in_place(net, tmp_path, monkeypatch):
    out = tmp_path / "out.tflite"
    out.write_text("an older one")
    wrong = lambda w, width: tabulate(2 * w, width)
    monkeypatch.setattr(_tflite, "tabulate", wrong)
    with pytest.raises(ValueError, match=r"differs from the source by .* No file was written"):
        jp.export.sparsify_tflite(out, net[0])
    assert out.read_text() == "an older one"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["net.tflite", "out.tflite"]


def test_a_missing_package_is_told_with_its_extra(net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"needs 'ai_edge_litert'.*jaxprune\[litert\]"):
        jp.export.sparsify_tflite(tmp_path / "out.tflite", net[0])
