"""Files of LiteRT written by hand, with the schema that comes with the runtime."""

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

KINDS = {
    np.dtype(name): getattr(schema.TensorType, name.upper())
    for name in ("float32", "int8", "int32")
}


def empty():
    """Make a model of one graph that computes nothing yet."""
    graph = schema.SubGraphT(tensors=[], operators=[], inputs=[], outputs=[], name="main")
    return schema.ModelT(version=3, operatorCodes=[], subgraphs=[graph], buffers=[schema.BufferT()])


def tensor(model, name, shape=None, *, values=None, dtype=np.float32, free=False, scale=None):
    """Add a tensor, with values if it is constant; free: its first axis is of any size."""
    data = None if values is None else np.frombuffer(values.tobytes(), np.uint8)
    model.buffers.append(schema.BufferT(data=data))
    shape = list(values.shape if shape is None else shape)
    made = schema.TensorT(
        name=name,
        shape=shape,
        shapeSignature=[-1, *shape[1:]] if free else None,
        type=KINDS[np.dtype(dtype if values is None else values.dtype)],
        buffer=len(model.buffers) - 1,
    )
    if scale is not None:
        made.quantization = schema.QuantizationParametersT(scale=[scale], zeroPoint=[0])
    model.subgraphs[0].tensors.append(made)
    return len(model.subgraphs[0].tensors) - 1


def operator(model, name, inputs, outputs, **options):
    """Add an operation, with the options of its own table."""
    code, title = getattr(schema.BuiltinOperator, name), name.title().replace("_", "")
    codes = [known.builtinCode for known in model.operatorCodes]
    if code not in codes:
        model.operatorCodes.append(
            schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=min(code, 127))
        )
        codes.append(code)
    model.subgraphs[0].operators.append(
        schema.OperatorT(
            opcodeIndex=codes.index(code),
            inputs=inputs,
            outputs=outputs,
            builtinOptionsType=getattr(schema.BuiltinOptions, f"{title}Options"),
            builtinOptions=getattr(schema, f"{title}OptionsT")(**options),
        )
    )


def mlp(*weights, batch=1, free=False):
    """Make fully connected layers of weights `[outputs, inputs]`, with relu in between."""
    model = empty()
    graph = model.subgraphs[0]
    x = tensor(model, "x", (batch, weights[0].shape[1]), free=free)
    graph.inputs = [x]
    for i, w in enumerate(weights):
        scale = 0.01 if w.dtype == np.int8 else None
        bias = np.linspace(-1, 1, len(w), dtype=np.float32)
        parts = tensor(model, f"w{i}", values=w, scale=scale), tensor(model, f"b{i}", values=bias)
        y = tensor(model, f"y{i}", (batch, len(w)), free=free)
        relu = schema.ActivationFunctionType.RELU if i < len(weights) - 1 else 0
        operator(model, "FULLY_CONNECTED", [x, *parts], [y], fusedActivationFunction=relu)
        x = y
    graph.outputs = [x]
    return model


def write(path, model):
    """Write a model to a file."""
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(builder.Output())
    return path


def read(path):
    return schema.ModelT.InitFromPackedBuf(path.read_bytes())
