#!/usr/bin/env bash
# What the quantizers of onnxruntime 1.32.0 make of a product with a batch of weights, such as kept
# blocks `[columns, inputs, outputs]` or experts. Per channel both take axis 1 for the channels,
# which of three axes is the inputs: the dynamic one writes a file that loads and does not run; the static
# one writes a scale for each input, with which no integer product can be computed, so that weights
# are dequantized at every call. Told that the channels are the last axis, it writes a file whose
# integer product of one row takes many times as long as that with one scale for all weights.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "onnxruntime==1.32.0" "onnx==1.23.2" "numpy==2.4.6" sympy
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import statistics
import time

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader, QuantType, quantize_dynamic, quantize_static,
)

columns, inputs, outputs = 32, 128, 64
rng = np.random.default_rng(0)
weights = rng.standard_normal((columns, inputs, outputs)).astype(np.float32)
x = rng.standard_normal((columns, 1, inputs)).astype(np.float32)
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
    "net",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [columns, "rows", inputs])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [columns, "rows", outputs])],
    [numpy_helper.from_array(weights, "w")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
onnx.save(model, "float.onnx")


def load(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Reader(CalibrationDataReader):
    left = iter([])

    def get_next(self):
        return next(self.left, None)


def seconds(session):
    taken = []
    for _ in range(200):
        start = time.perf_counter()
        session.run(None, {"x": x})
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


quantize_dynamic("float.onnx", "channels.onnx", per_channel=True)
session = load("channels.onnx")
print("dynamic, per channel: loads")
try:
    session.run(None, {"x": x})
    print("dynamic, per channel: runs")
except Exception as error:
    reason = "zero point is not valid"
    print("dynamic, per channel:", reason if reason in str(error) else error)

def static(path, **kwargs):
    Reader.left = iter([{"x": x}])
    quantize_static("float.onnx", path, Reader(), weight_type=QuantType.QInt8, **kwargs)


static("static.onnx", per_channel=True)
scale = next(t for t in onnx.load("static.onnx").graph.initializer if t.name == "w_scale")
print("static, per channel: scales", list(scale.dims), "of", list(weights.shape))

last = {"QDQOpTypePerChannelSupportToAxis": {"MatMul": -1}}
static("last.onnx", per_channel=True, extra_options=last)
static("tensor.onnx")
ratio = seconds(load("last.onnx")) / seconds(load("tensor.onnx"))
print("last axis over per tensor:", "more than 4 times" if ratio > 4 else f"{ratio:.1f} times")
PYTHON
diff - "$work/seen" <<'EXPECTED'
dynamic, per channel: loads
dynamic, per channel: zero point is not valid
static, per channel: scales [128] of [32, 128, 64]
last axis over per tensor: more than 4 times
EXPECTED
echo "as found with onnxruntime 1.32.0 on a CPU"
