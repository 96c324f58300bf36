"""Constants that loops carry round unchanged, read where they are."""

from collections.abc import Iterator
from typing import Any

from jaxprune.export._extras import need
from jaxprune.export._pools import graphs


def free_constants(model: Any) -> None:
    """Let bodies of loops read weights as constants of the graph around them; in place.

    jax2onnx hands everything that a body reads round the loop. A runtime then copies it, prepares
    none of it for products, and no tool finds the weights of a recurrent network.
    """
    _free_in(model.graph, set())


def _free_in(graph: Any, around: set[str]) -> None:
    """Free the loops of a graph, and then those inside of them: what is known outside is inside."""
    constants = around | {tensor.name for tensor in graph.initializer}
    for loop in [node for node in graph.node if node.op_type == "Loop"]:
        for k in reversed(range(len(loop.input) - 2)):
            if loop.input[k + 2] in constants:
                _free(graph, loop, k)
    for node in graph.node:
        for inner in _inside(node):
            _free_in(inner, constants)


def _inside(node: Any) -> Iterator[Any]:
    return (attribute.g for attribute in node.attribute if attribute.HasField("g"))


def _free(graph: Any, loop: Any, k: int) -> None:
    """Take the k-th state of a loop out, if its body leaves it as it is."""
    (body,) = _inside(loop)
    given, taken = body.input[k + 2].name, body.output[k + 1].name
    same = [n for n in body.node if n.op_type == "Identity" and taken in n.output]
    if not same or same[0].input[0] != given:
        return
    constant, last = loop.input[k + 2], loop.output[k]
    body.node.remove(same[0])
    for inner in graphs(body):
        for node in inner.node:
            node.input[:] = [constant if name == given else name for name in node.input]
    del body.input[k + 2], body.output[k + 1], loop.input[k + 2], loop.output[k]
    read = {name for each in graphs(graph) for node in each.node for name in node.input}
    if last in read | {value.name for value in graph.output}:
        after = list(graph.node).index(loop) + 1
        graph.node.insert(
            after, need("onnx.helper", "onnx").make_node("Identity", [constant], [last])
        )
