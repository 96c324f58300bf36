#!/usr/bin/env bash
# What the static quantizer of onnxruntime 1.32.0 makes of output channels whose weights are all
# zero, as structured pruning leaves them, and whose biases are alive. Per channel it takes 1 for the
# scale of weights that are all zero. A bias is an integer of steps of the input's scale times the
# weights', so that with raw pixels of 0 to 255, whose scale is 1, every bias below 0.5 becomes 0.
# Per tensor the same biases survive.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "onnxruntime==1.32.0" "onnx==1.23.2" "numpy==2.4.6" sympy
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

rng = np.random.default_rng(0)
weights = rng.standard_normal((64, 8)).astype(np.float32) / 64
weights[:, ::2] = 0
bias = np.linspace(-0.45, 0.45, 8).astype(np.float32)
pixels = rng.integers(0, 256, (128, 64)).astype(np.float32)
pixels[0] = np.linspace(0, 255, 64)
graph = helper.make_graph(
    [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer")],
    "net",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 8])],
    [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
onnx.save(model, "float.onnx")


class Reader(CalibrationDataReader):
    def __init__(self):
        self.left = iter([{"x": pixels}])

    def get_next(self):
        return next(self.left, None)


for per_channel in (True, False):
    quantize_static(
        "float.onnx", "int8.onnx", Reader(), per_channel=per_channel,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load("int8.onnx").graph.initializer}
    scale, whole = np.atleast_1d(arrays["w_scale"]), arrays["b_quantized"]
    stored = whole * np.atleast_1d(arrays["b_quantized_scale"])
    kind = "per channel" if per_channel else "per tensor"
    print(kind, "scales of dead channels:", sorted(set(scale[::2].tolist())) if per_channel else "shared")
    print(kind, "biases of dead channels that are 0:", int((stored[::2] == 0).sum()), "of 4;",
          "of others:", int((stored[1::2] == 0).sum()), "of 4")
PYTHON
diff - "$work/seen" <<'EXPECTED'
per channel scales of dead channels: [1.0]
per channel biases of dead channels that are 0: 4 of 4; of others: 0 of 4
per tensor scales of dead channels: shared
per tensor biases of dead channels that are 0: 0 of 4; of others: 0 of 4
EXPECTED
echo "as found with onnxruntime 1.32.0 on a CPU"
