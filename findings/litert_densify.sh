#!/usr/bin/env bash
# What the runtime of ai-edge-litert 2.3.0 does with a fully connected layer whose weights, nine of ten
# of them zero, are stored in the sparsity table of the schema and unpacked by the schema's own operator
# DENSIFY. No converter writes that operator any more. One would expect it to be gone, or to unpack at
# every call. It runs, the outputs are those of the dense file bit for bit, the file has less than a
# quarter of the bytes, and a call takes as long as with dense weights: it unpacks once, on loading.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "ai-edge-litert==2.3.0" "flatbuffers==25.12.19" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import statistics
import time

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

rng = np.random.default_rng(0)
weights = rng.standard_normal((512, 256)).astype(np.float32)
weights[np.abs(weights) < np.quantile(np.abs(weights), 0.9)] = 0
x = rng.standard_normal((1, 256)).astype(np.float32)


def model(sparse):
    made = schema.ModelT(version=3, operatorCodes=[], buffers=[schema.BufferT()])
    graph = schema.SubGraphT(tensors=[], operators=[], inputs=[0], outputs=[2], name="main")
    made.subgraphs = [graph]

    def tensor(name, shape, values=None):
        made.buffers.append(schema.BufferT())
        if values is not None:
            made.buffers[-1].data = np.frombuffer(values.tobytes(), np.uint8)
        graph.tensors.append(
            schema.TensorT(name=name, shape=list(shape), buffer=len(made.buffers) - 1)
        )

    def operator(code, version, inputs, outputs, options=0, table=None):
        made.operatorCodes.append(
            schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=version)
        )
        graph.operators.append(
            schema.OperatorT(
                opcodeIndex=len(made.operatorCodes) - 1, inputs=inputs, outputs=outputs,
                builtinOptionsType=options, builtinOptions=table,
            )
        )

    tensor("x", x.shape)
    tensor("w", weights.shape, None if sparse else weights)
    tensor("y", (1, 512))
    if sparse:
        rows, columns = np.nonzero(weights)
        tensor("stored", weights.shape, weights[rows, columns])
        starts = np.searchsorted(rows, np.arange(513)).astype(np.int32)
        dense = schema.DimensionMetadataT(format=schema.DimensionType.DENSE, denseSize=512)
        listed = schema.DimensionMetadataT(
            format=schema.DimensionType.SPARSE_CSR,
            arraySegmentsType=schema.SparseIndexVector.Int32Vector,
            arraySegments=schema.Int32VectorT(values=starts),
            arrayIndicesType=schema.SparseIndexVector.Uint8Vector,
            arrayIndices=schema.Uint8VectorT(values=columns.astype(np.uint8)),
        )
        graph.tensors[-1].sparsity = schema.SparsityParametersT(
            traversalOrder=[0, 1], blockMap=[], dimMetadata=[dense, listed]
        )
        operator(schema.BuiltinOperator.DENSIFY, 1, [3], [1])
    layer = schema.FullyConnectedOptionsT()
    operator(
        schema.BuiltinOperator.FULLY_CONNECTED, 1, [0, 1, -1], [2],
        schema.BuiltinOptions.FullyConnectedOptions, layer,
    )
    builder = flatbuffers.Builder(1024)
    builder.Finish(made.Pack(builder), b"TFL3")
    return bytes(builder.Output())


files = [model(False), model(True)]
loaded = [Interpreter(model_content=file, num_threads=1) for file in files]
for each in loaded:
    each.allocate_tensors()
    each.set_tensor(0, x)


def seconds(each):
    start = time.perf_counter()
    for _ in range(200):
        each.invoke()
    return time.perf_counter() - start


taken = [[seconds(each) for each in loaded] for _ in range(21)]
dense, sparse = (statistics.median(times) for times in zip(*taken))
outputs = [each.get_tensor(2) for each in loaded]
print("bit for bit:", outputs[0].tobytes() == outputs[1].tobytes())
print("bytes:", "less than a quarter" if len(files[1]) < len(files[0]) / 4 else "more")
print("time:", "that of dense" if 0.5 < sparse / dense < 1.5 else f"{sparse / dense:.2f} of dense")
PYTHON
diff - "$work/seen" <<'EXPECTED'
bit for bit: True
bytes: less than a quarter
time: that of dense
EXPECTED
echo "as found with ai-edge-litert 2.3.0 on a CPU"
