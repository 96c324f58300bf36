"""Operations that only move data: sizes written down, and transpositions left out."""

import collections
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from jaxprune.export._extras import need
from jaxprune.export._pools import graphs

Constants: TypeAlias = dict[str, np.ndarray]  # those that may be sizes or indices, by name

# A product with kept blocks (see `graph/_block_product.py`) gathers rows of blocks from data that
# has them in front, as is best for XLA. onnxruntime copies whole rows as fast from behind, and then
# one transposition of the data before and one after the gather are a single one:
#
#     x [rows, n, bi]  transposed  [n, rows, bi]  gathered  [columns * kept, rows, bi]
#       in parts  [columns, kept, rows, bi]  transposed and joined  [columns, rows, kept * bi]
#
#     x [rows, n, bi]  gathered  [rows, columns * kept, bi]  joined  [rows, columns, kept * bi]
#       transposed  [columns, rows, kept * bi]


class Chain(NamedTuple):
    """The nodes between data in blocks and what is multiplied with the blocks that are kept."""

    turned: Any
    gathered: Any
    parted: Any
    swapped: Any
    joined: Any


KINDS = Chain("Transpose", "Gather", "Reshape", "Transpose", "Reshape")


def ease_moves(model: Any) -> None:
    """Write down what sizes are known to be, and gather blocks where they are; in place.

    jax2onnx computes the new shape of every array with an axis of any size from the shapes of
    others, some six nodes each. A size that follows from the others is a -1 to ONNX.
    """
    constants, found = _constants(model), list(graphs(model.graph))
    for graph in found:
        made = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            if node.op_type == "Reshape":
                _write_sizes(node, made.get(node.input[1]), model, constants)
    _drop_unread(found)  # among them readers of what is in a chain
    for graph in found:
        for chain in list(_chains(graph, constants)):
            _gather_behind(chain, constants[chain.joined.input[1]].tolist(), model, constants)
            for node in (chain.turned, chain.joined):
                graph.node.remove(node)
    _share_constants(model)
    _drop_unread(found)


def _constants(model: Any) -> Constants:
    """Vectors of integers; those of a graph are known to the graphs inside of it."""
    array = need("onnx.numpy_helper", "onnx").to_array
    tensors = [tensor for graph in graphs(model.graph) for tensor in graph.initializer]
    kinds = [need("onnx", "onnx").TensorProto.INT32, need("onnx", "onnx").TensorProto.INT64]
    return {t.name: array(t) for t in tensors if t.data_type in kinds and len(t.dims) == 1}


def _write_sizes(reshape: Any, sizes: Any | None, model: Any, constants: Constants) -> None:
    """Give a reshape a constant shape, if all but one of its sizes are known."""
    if sizes is None or sizes.op_type != "Concat":
        return
    parts = [constants.get(name) for name in sizes.input]
    known = [n for part in parts if part is not None for n in part.tolist()]
    if sum(part is None for part in parts) == 1 and all(n > 0 for n in known):
        place = next(i for i, part in enumerate(parts) if part is None)
        before = sum(len(part) for part in parts[:place] if part is not None)
        _reshape_to(reshape, [*known[:before], -1, *known[before:]], model, constants)


def _reshape_to(node: Any, sizes: list[int], model: Any, constants: Constants) -> None:
    """Give a reshape constant sizes; those of the outer graph are known in the bodies of loops."""
    name = "sizes_" + "_".join(map(str, sizes))
    if name not in constants:
        constants[name] = np.array(sizes, np.int64)
        tensor = need("onnx.numpy_helper", "onnx").from_array(constants[name], name)
        model.graph.initializer.append(tensor)
    node.input[1] = name


def _chains(graph: Any, constants: Constants) -> Iterator[Chain]:
    """Find where blocks are gathered, and nobody else reads what is in between."""
    readers = _readers(graph)
    for node in graph.node:
        nodes = [node]
        for _ in KINDS[1:]:
            after = [] if nodes[-1] is None else readers[nodes[-1].output[0]]
            nodes.append(after[0] if len(after) == 1 else None)
        kinds = tuple(n and n.op_type for n in nodes)
        if kinds == KINDS and _gathers_blocks(Chain(*nodes), constants):
            yield Chain(*nodes)


def _readers(graph: Any) -> dict[str, list[Any]]:
    """The nodes of a graph that read a value; None for its results, and for loops inside."""
    readers: dict[str, list[Any]] = collections.defaultdict(list)
    for inner in graphs(graph):
        for node in inner.node:
            for name in node.input:
                readers[name].append(node if inner is graph else None)
        for value in inner.output:
            readers[value.name].append(None)
    return readers


def _gathers_blocks(chain: Chain, constants: Constants) -> bool:
    """Tell whether shapes and orders of axes are those of a product with blocks."""
    shapes = [constants.get(node.input[1]) for node in (chain.parted, chain.joined)]
    if chain.gathered.input[1] not in constants or any(shape is None for shape in shapes):
        return False
    parted, joined = ([] if shape is None else shape.tolist() for shape in shapes)
    orders = [_setting(node, "perm") for node in (chain.turned, chain.swapped)]
    if orders != [[1, 0, 2], [0, 2, 1, 3]] or _setting(chain.gathered, "axis"):
        return False
    columns, kept, rows, bi = parted
    return joined == [columns, rows, kept * bi]


def _setting(node: Any, name: str) -> Any:
    """An attribute of a node; None where it has none of that name."""
    value = need("onnx.helper", "onnx").get_attribute_value
    return next((value(a) for a in node.attribute if a.name == name), None)


def _gather_behind(chain: Chain, shape: list[int], model: Any, constants: Constants) -> None:
    """Gather along the second axis, join, and transpose last."""
    columns, rows, wide = shape
    chain.gathered.input[0] = chain.turned.input[0]
    _set(chain.gathered, "axis", 1)
    _reshape_to(chain.parted, [rows, columns, wide], model, constants)
    _set(chain.swapped, "perm", [1, 0, 2])
    chain.swapped.output[0] = chain.joined.output[0]


def _set(node: Any, name: str, value: Any) -> None:
    rest = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*rest, need("onnx.helper", "onnx").make_attribute(name, value)])


def _share_constants(model: Any) -> None:
    """Let nodes read one table where several are the same, such as the angles of all layers.

    Vectors stay: a quantizer gives each bias the scale of its own product.
    """
    found = list(graphs(model.graph))
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    for tensor in model.graph.initializer:
        key = tensor.data_type, tuple(tensor.dims), tensor.raw_data
        if tensor.raw_data and len(tensor.dims) > 1:
            same[tensor.name] = first.setdefault(key, tensor.name)
    inner = {tensor.name for graph in found[1:] for tensor in graph.initializer}
    for node in (node for graph in found for node in graph.node):
        for i, name in enumerate(node.input):
            if name not in inner:
                node.input[i] = same.get(name, name)


def _drop_unread(found: list[Any]) -> None:
    """Leave out nodes and constants that nobody reads."""
    gone: list[tuple[Any, Any]] | None = None
    read: set[str] = set()
    while gone is None or gone:
        read = {name for graph in found for node in graph.node for name in node.input}
        read |= {value.name for graph in found for value in graph.output}
        gone = [(g, n) for g in found for n in g.node if not read.intersection(n.output)]
        for graph, node in gone:
            graph.node.remove(node)
    for graph in found:
        for tensor in [t for t in graph.initializer if t.name not in read]:
            graph.initializer.remove(tensor)
