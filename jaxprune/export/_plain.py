"""Products and their weights in the plainest form, which the tools of others look for."""

import collections
from typing import Any

import numpy as np

from jaxprune.export._extras import need
from jaxprune.export._pools import graphs

MOVES = ("Transpose", "Reshape", "Slice", "Squeeze", "Unsqueeze")


def plain_products(model: Any) -> None:
    """Write products as ``MatMul`` and ``Add``, and weights as they are multiplied; in place.

    jax2onnx writes ``Gemm`` with a bias of one zero, and a ``Transpose`` behind kernels in the
    order of JAX. onnxruntime makes the same program of both. Its quantizers do not. Without a word
    the dynamic one skips a ``Gemm`` that has no bias, the one for 4 bits every ``Gemm``, and both
    what is no constant.
    """
    for graph in graphs(model.graph):
        _move_constants(graph)
        constants = {tensor.name: tensor for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Gemm" and _is_bare(node, constants):
                node.op_type = "MatMul"
                del node.input[2:], node.attribute[:]
        _flatten_rows(graph, constants)


def _move_constants(graph: Any) -> None:
    """Compute now what only moves the entries of a constant, and the shape of one.

    Not where somebody else reads the constant as it is, so that a file does not hold it twice.
    """
    helper = need("onnx.numpy_helper", "onnx")
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = collections.Counter(name for node in graph.node for name in node.input)
    parts = collections.Counter(n.input[0] for n in graph.node if n.op_type == "Slice")
    for node in list(graph.node):
        known = all(name in constants for name in node.input)
        alone = node.op_type in MOVES and readers[node.input[0]] in (1, parts[node.input[0]])
        if known and (alone or node.op_type == "Shape"):
            values = [helper.to_array(constants[name]) for name in node.input]
            moved = helper.from_array(_evaluate(node, values), node.output[0])
            constants[moved.name] = moved
            graph.initializer.append(moved)
            graph.node.remove(node)


def _evaluate(node: Any, values: list[np.ndarray]) -> np.ndarray:
    onnx = need("onnx", "onnx")
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for name, value in dict(zip(node.input, values, strict=True)).items()
    ]
    outputs = [onnx.helper.make_empty_tensor_value_info(node.output[0])]
    graph = onnx.helper.make_graph([node], "move", inputs, outputs)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    run = need("onnx.reference", "onnx").ReferenceEvaluator(model).run
    return np.array(run(None, dict(zip(node.input, values, strict=True)))[0], order="C")


def _is_bare(gemm: Any, constants: Any) -> bool:
    """Tell a product without factors, transpositions or a bias of its own."""
    helper = need("onnx.numpy_helper", "onnx")
    if any(a.i for a in gemm.attribute if a.name in ("transA", "transB")):
        return False
    if any(a.f != 1.0 for a in gemm.attribute if a.name == "alpha"):
        return False
    bias = constants.get(gemm.input[2]) if len(gemm.input) > 2 else None
    return len(gemm.input) < 3 or (bias is not None and not helper.to_array(bias).any())


def _flatten_rows(graph: Any, constants: Any) -> None:
    """Let a row that is added to a product be a vector, which alone is a bias to quantizers.

    JAX adds arrays of the same rank: nothing gains or loses an axis.
    """
    products = {node.output[0] for node in graph.node if node.op_type == "MatMul"}
    for add in [node for node in graph.node if node.op_type == "Add"]:
        for i, name in enumerate(add.input):
            row = constants.get(name)
            if row is None or add.input[1 - i] not in products or len(row.dims) < 2:
                continue
            if all(n == 1 for n in row.dims[:-1]):
                flat = graph.initializer.add()
                flat.CopyFrom(row)
                flat.name, flat.dims[:] = f"{add.output[0]}_bias", [row.dims[-1]]
                add.input[i] = flat.name
