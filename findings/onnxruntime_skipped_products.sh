#!/usr/bin/env bash
# Which forms of a matrix product the quantizers of onnxruntime 1.32.0 take. One and the same product
# of a dense layer may be a MatMul, or a Gemm with or without a bias. The dynamic one skips a Gemm
# without a bias that still has the attribute `beta=0`, as jax2onnx 0.17 leaves it, and the one for 4
# bits skips every Gemm, both without a word: the file stays as large as it was.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "onnxruntime==1.32.0" "onnx==1.23.2" "onnx-ir==1.1.0" "numpy==2.4.6" sympy
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import os

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

rng = np.random.default_rng(0)
weights = numpy_helper.from_array(rng.standard_normal((128, 128)).astype(np.float32), "w")
bias = numpy_helper.from_array(np.zeros(128, np.float32), "b")
nodes = {
    "MatMul": helper.make_node("MatMul", ["x", "w"], ["y"], name="layer"),
    "Gemm with a bias": helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="layer"),
    "Gemm without": helper.make_node("Gemm", ["x", "w"], ["y"], name="layer"),
    "Gemm without, beta=0": helper.make_node("Gemm", ["x", "w"], ["y"], name="layer", beta=0.0),
}
for kind, node in nodes.items():
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 128])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 128])],
        [weights, bias][: len(node.input) - 1],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, "float.onnx")
    before = os.path.getsize("float.onnx")
    quantize_dynamic("float.onnx", "dynamic.onnx")
    four = MatMulNBitsQuantizer(model, block_size=32, is_symmetric=True)
    four.process()
    sizes = os.path.getsize("dynamic.onnx"), len(four.model.model.SerializeToString())
    taken = ["taken" if size < before / 2 else "skipped" for size in sizes]
    print(f"{kind}: dynamic {taken[0]}, 4 bits {taken[1]}")
PYTHON
diff - "$work/seen" <<'EXPECTED'
MatMul: dynamic taken, 4 bits taken
Gemm with a bias: dynamic taken, 4 bits skipped
Gemm without: dynamic taken, 4 bits skipped
Gemm without, beta=0: dynamic skipped, 4 bits skipped
EXPECTED
echo "as found with onnxruntime 1.32.0 on a CPU"
