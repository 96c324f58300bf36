#!/usr/bin/env bash
# What the CPU kernel of onnxruntime 1.21.0 to 1.24.4 divides by in an `AveragePool` that counts its
# padding (`count_include_pad=1`), from opset 19 on. The padding below the last row is taken to be as
# much as that on the left, `pads[1]`, where the file says `pads[2]`. With more below than on the
# left the averages of the last row are too large, without an error: `pads=[0, 0, 1, 0]`, or
# `[0, 0, 1, 1]`, which is "SAME" at an even size with a window of 3 and a stride of 2, as
# `flax.linen.avg_pool` has it. 1.20.1 and 1.25.0 are right, and so are all with opset 18. It is
# known and mended there: issue 26708 and pull request 27375 of microsoft/onnxruntime.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
for version in 1.20.1 1.21.0 1.24.4 1.25.0; do
    "$work/venv/bin/pip" install --quiet "onnxruntime==$version" "onnx==1.23.2" "numpy==2.4.6"
    "$work/venv/bin/python" - "$version" 2> "$work/log" <<'PYTHON' || { cat "$work/log" >&2; exit 1; }
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

WINDOW, STRIDE = 3, 2
x = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)


def averages(pads, opset):
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    settings = {"kernel_shape": [WINDOW] * 2, "strides": [STRIDE] * 2, "count_include_pad": 1}
    node = helper.make_node("AveragePool", ["x"], ["y"], pads=pads, **settings)
    graph = helper.make_graph([node], "pool", [value("x", x.shape)], [value("y", None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0][0, 0]


def wanted(pads):
    top, left, bottom, right = pads
    padded = np.pad(x[0, 0], ((top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (WINDOW, WINDOW))
    return windows[::STRIDE, ::STRIDE].mean((2, 3))


for pads in ([0, 0, 1, 0], [0, 0, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]):
    too_large = [averages(pads, opset) / wanted(pads) for opset in (18, 19)]
    rows = ["/".join(f"{row[0]:.1f}" for row in ratio) for ratio in too_large]
    print(f"{sys.argv[1]} {pads}, seen to wanted in both rows: opset 18 {rows[0]}, opset 19 {rows[1]}")
PYTHON
done | tee "$work/seen"
diff - "$work/seen" <<'EXPECTED'
1.20.1 [0, 0, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.20.1 [0, 0, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.20.1 [0, 1, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.20.1 [1, 0, 0, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.20.1 [1, 1, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.21.0 [0, 0, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.5
1.21.0 [0, 0, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.5
1.21.0 [0, 1, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.21.0 [1, 0, 0, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.21.0 [1, 1, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.24.4 [0, 0, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.5
1.24.4 [0, 0, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.5
1.24.4 [0, 1, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.24.4 [1, 0, 0, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.24.4 [1, 1, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.25.0 [0, 0, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.25.0 [0, 0, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.25.0 [0, 1, 1, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.25.0 [1, 0, 0, 0], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
1.25.0 [1, 1, 1, 1], seen to wanted in both rows: opset 18 1.0/1.0, opset 19 1.0/1.0
EXPECTED
echo "as found with onnxruntime 1.20.1 to 1.25.0 on a CPU"
