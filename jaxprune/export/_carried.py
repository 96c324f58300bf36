"""Constants that loops carry round unchanged, read where they are."""

from typing import Any

from jaxprune.export._pools import graphs


def free_constants(model: Any) -> None:
    """Let bodies of loops read weights as constants of the graph around them; in place.

    jax2onnx hands everything that a body reads round the loop. A runtime then copies it, prepares
    none of it for products, and no tool finds the weights of a recurrent network.
    """
    for graph in graphs(model.graph):
        constants = {tensor.name for tensor in graph.initializer}
        for loop in [node for node in graph.node if node.op_type == "Loop"]:
            (body,) = (a.g for a in loop.attribute if a.name == "body")
            read = {name for each in graphs(graph) for node in each.node for name in node.input}
            read |= {value.name for value in graph.output}
            for k in reversed(range(len(loop.input) - 2)):
                if loop.input[k + 2] in constants and loop.output[k] not in read:
                    _free(loop, body, k)


def _free(loop: Any, body: Any, k: int) -> None:
    """Take the k-th state of a loop out, if its body leaves it as it is."""
    given, taken = body.input[k + 2].name, body.output[k + 1].name
    same = [n for n in body.node if n.op_type == "Identity" and taken in n.output]
    if not same or same[0].input[0] != given:
        return
    constant = loop.input[k + 2]
    body.node.remove(same[0])
    for graph in graphs(body):
        for node in graph.node:
            node.input[:] = [constant if name == given else name for name in node.input]
    del body.input[k + 2], body.output[k + 1], loop.input[k + 2], loop.output[k]
