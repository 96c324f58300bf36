"""Biases of matrix products, put where ONNX and its quantizers look for them."""

import math
from typing import Any

from jaxprune.export._extras import need


def merge_biases(model: Any) -> None:
    """Make an addition behind a ``Gemm`` its bias; in place, as all of ONNX's models are.

    jax2onnx gives every matrix product a bias of one zero, which onnxruntime's quantizer refuses.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for gemm in [node for node in graph.node if node.op_type == "Gemm" and len(node.input) == 3]:
        if not _is_zero(constants.get(gemm.input[2])):
            continue
        del gemm.input[2]
        add = _only_reader(graph, gemm.output[0])
        bias = None if add is None else _bias(add, gemm.output[0], constants)
        if add is not None and bias is not None:
            named = graph.initializer.add()
            named.CopyFrom(bias)
            named.name, named.dims[:] = f"{gemm.output[0]}_bias", [math.prod(bias.dims)]
            gemm.input.append(named.name)
            factors = [factor for factor in gemm.attribute if factor.name != "beta"]  # it is 0
            del gemm.attribute[:]
            gemm.attribute.extend(factors)
            gemm.output[0] = add.output[0]
            graph.node.remove(add)
    read = {name for node in graph.node for name in node.input}
    read |= {value.name for value in graph.output}
    for name, tensor in constants.items():
        if name not in read:
            graph.initializer.remove(tensor)


def _is_zero(tensor: Any) -> bool:
    helper = need("onnx.numpy_helper", "onnx")
    return tensor is not None and not helper.to_array(tensor).any()


def _only_reader(graph: Any, name: str) -> Any | None:
    """The addition that alone reads a value."""
    readers = [node for node in graph.node for used in node.input if used == name]
    alone = len(readers) == 1 and name not in {value.name for value in graph.output}
    return readers[0] if alone and readers[0].op_type == "Add" else None


def _bias(add: Any, product: str, constants: Any) -> Any | None:
    """The constant row that is added to a product."""
    other = [name for name in add.input if name != product]
    tensor = constants.get(other[0]) if other else None
    if tensor is None or len(tensor.dims) not in (1, 2):
        return None
    return tensor if all(n == 1 for n in tensor.dims[:-1]) else None
