"""Pools of ONNX, put on the axes of their images."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxprune.export._extras import need

AXES = ("kernel_shape", "strides", "dilations")


def free_pools(model: Any) -> None:
    """Let a pool take the first two axes as batch and channels; in place.

    jax2onnx puts two axes in front of them and pools over all, which no runtime does beyond three.
    For a sum it convolves with ones, here an average is taken that many times.
    """
    found = list(graphs(model.graph))
    constants = {tensor.name: tensor for graph in found for tensor in graph.initializer}
    for graph in found:
        for pool in [node for node in graph.node if node.op_type in ("MaxPool", "Conv")]:
            _free(pool, graph, constants)


def graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside of it: the bodies of loops."""
    yield graph
    for attribute in (a for node in graph.node for a in node.attribute if a.HasField("g")):
        yield from graphs(attribute.g)


def _free(pool: Any, graph: Any, constants: Mapping[str, Any]) -> None:
    size = _size(pool, constants)
    made = {name: node for node in graph.node for name in node.output}
    outer: Any = made.get(pool.input[0])
    inner: Any = None if outer is None else made.get(outer.input[0])
    readers = [node for node in graph.node if pool.output[0] in node.input]
    kinds = [None if n is None else n.op_type for n in (inner, outer, *readers)]
    if size[:2] != [1, 1] or kinds != ["Unsqueeze", "Unsqueeze", "Squeeze"]:
        return
    pool.input[0], pool.output[0] = inner.input[0], readers[0].output[0]
    for attribute in pool.attribute:
        _drop_two(attribute)
    for node in (inner, outer, readers[0]):
        graph.node.remove(node)
    if pool.op_type == "Conv":
        _average(pool, size[2:], graph, constants)


def _size(pool: Any, constants: Mapping[str, Any]) -> list[int]:
    """Size of the window over all axes; none for a convolution that is no sum."""
    if pool.op_type == "MaxPool":
        return list(next(a for a in pool.attribute if a.name == "kernel_shape").ints)
    weights = constants.get(pool.input[1])
    if weights is None or list(weights.dims[:2]) != [1, 1] or len(pool.input) > 2:
        return []
    ones = need("onnx.numpy_helper", "onnx").to_array(weights)
    return list(weights.dims[2:]) if (ones == 1).all() else []


def _drop_two(attribute: Any) -> None:
    """Leave out what a setting says of two axes in front."""
    ints = list(attribute.ints)
    if attribute.name == "pads":
        half = len(ints) // 2
        attribute.ints[:] = ints[2:half] + ints[half + 2 :]
    elif attribute.name in AXES:
        attribute.ints[:] = ints[2:]


def _average(pool: Any, size: list[int], graph: Any, constants: Mapping[str, Any]) -> None:
    """Turn a convolution with ones into an average and a factor."""
    helper, (x, ones), out = need("onnx.helper", "onnx"), pool.input, pool.output[0]
    kept = [a for a in pool.attribute if a.name in ("strides", "dilations", "pads")]
    mean, count = f"{out}_mean", f"{out}_count"
    settings = {a.name: list(a.ints) for a in kept}
    average = helper.make_node(
        "AveragePool", [x], [mean], kernel_shape=size, count_include_pad=1, **settings
    )
    graph.initializer.append(
        helper.make_tensor(count, constants[ones].data_type, [], [float(math.prod(size))])
    )
    place = list(graph.node).index(pool)
    graph.node.remove(pool)
    graph.node.insert(place, average)
    graph.node.insert(place + 1, helper.make_node("Mul", [mean, count], [out]))
