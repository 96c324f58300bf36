#!/usr/bin/env bash
# What nncf 3.4.0 makes of the weights of a convolution in an ONNX file when it compresses weights
# alone (`compress_weights`): integers and a DequantizeLinear along the axis of the outputs, whose
# scale has three axes, `[outputs, 1, 1]`, where ONNX wants a vector. The checker of
# onnx takes the file, onnxruntime 1.32.0 loads it, and it does not run. Of a matrix the scale is a
# vector, and the file runs. In both modes pruned weights stay 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "nncf==3.4.0" "onnxruntime==1.32.0" "onnx==1.23.2" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | grep "^seen: " | tee "$work/seen"
import nncf
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

rng = np.random.default_rng(0)


def pruned(*shape):
    weights = rng.standard_normal(shape).astype(np.float32)
    return weights * (np.abs(weights) > 0.7)


def model(kind, weights, shape):
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w"], ["y"], name="layer")],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weights, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


for kind, weights, shape in (
    ("MatMul", pruned(64, 32), [1, 64]),
    ("Conv", pruned(32, 16, 3, 3), [1, 16, 8, 8]),
):
    small = nncf.compress_weights(
        model(kind, weights, shape), mode=nncf.CompressWeightsMode.INT8_SYM
    )
    onnx.checker.check_model(small)
    arrays = {t.name: numpy_helper.to_array(t) for t in small.graph.initializer}
    node = next(n for n in small.graph.node if n.op_type == "DequantizeLinear")
    whole, scale = arrays[node.input[0]], arrays[node.input[1]]
    zeros = bool((whole[weights == 0] == 0).all())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        small.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    try:
        session.run(None, {"x": np.ones(shape, np.float32)})
        runs = "runs"
    except Exception as error:
        runs = "does not run" if "scale must be 1D" in str(error) else f"fails: {error}"
    print("seen:", kind, "scale", list(scale.shape), "zeros kept", zeros, "loads and", runs)
PYTHON
diff - "$work/seen" <<'EXPECTED'
seen: MatMul scale [32] zeros kept True loads and runs
seen: Conv scale [32, 1, 1] zeros kept True loads and does not run
EXPECTED
echo "as found with nncf 3.4.0 and onnxruntime 1.32.0 on a CPU"
