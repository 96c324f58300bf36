"""Weights in the sparsity table of the schema that LiteRT files have, and dense again."""

import re
from typing import Any, NamedTuple

import numpy as np

from jaxprune.export._extras import need

SPARSE = 8  # version of a fully connected layer whose weights are sparse; XNNPACK leaves it alone
DENSE, CSR = 0, 1  # kinds of a dimension
WIDTH = 4  # inputs of a block: the only one that the runtime knows for float32


class Table(NamedTuple):
    """A matrix by what is not zero.

    Attributes:
      values: of the blocks that are kept, `[blocks, width]`.
      segments: where each row begins among the blocks, `[rows + 1]`.
      columns: which block of its row each one is, `[blocks]`.
    """

    values: np.ndarray
    segments: np.ndarray
    columns: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes in the file, but for a hundred or so that describe the table."""
        return sum(x.nbytes for x in self)


def tabulate(weights: np.ndarray, width: int) -> Table:
    """List the blocks of 1 x width of a matrix `[outputs, inputs]` that are not zero.

    Example:
      >>> tabulate(np.array([[0.0, 5.0], [6.0, 0.0]]), 1).columns
      array([1, 0], dtype=uint8)
    """
    blocks = weights.reshape(len(weights), -1, width)
    alive = (blocks != 0).any(-1)
    alive[0, 0] |= not alive.any()  # an empty buffer would say that nobody knows the values
    segments = np.concatenate([[0], np.cumsum(alive.sum(1))])
    return Table(blocks[alive], _narrow(segments), _narrow(np.nonzero(alive)[1]))


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """Take the smallest type that the schema has for them."""
    kinds = (np.uint8, np.uint16, np.int32)
    return numbers.astype(next(k for k in kinds if numbers.max(initial=0) <= np.iinfo(k).max))


def read_weights(model: Any, graph: int, index: int) -> np.ndarray:
    """Read the float32 weights `[outputs, inputs]` of a tensor, whether they are sparse or not."""
    tensor = model.subgraphs[graph].tensors[_origin(model.subgraphs[graph], index)]
    values = np.asarray(model.buffers[tensor.buffer].data, np.uint8).view(np.float32)
    if tensor.sparsity is None:
        return values.reshape(tensor.shape)
    width = WIDTH if tensor.sparsity.blockMap is not None else 1
    columns = tensor.sparsity.dimMetadata[1]
    segments = np.asarray(columns.arraySegments.values, np.int64)
    places = np.asarray(columns.arrayIndices.values, np.int64)
    rows, inputs = tensor.shape
    dense = np.zeros((rows, inputs // width, width), np.float32)
    dense[np.repeat(np.arange(rows), np.diff(segments)), places] = values.reshape(-1, width)
    return dense.reshape(rows, inputs)


def _origin(graph: Any, index: int) -> int:
    """Find the sparse tensor that a tensor is unpacked from; the tensor itself if it is none."""
    for operator in graph.operators:
        ends = operator.inputs, operator.outputs
        if all(x is not None and len(x) == 1 for x in ends) and operator.outputs[0] == index:
            source = int(operator.inputs[0])
            return source if graph.tensors[source].sparsity is not None else index
    return index


def store(model: Any, weight: "Weight", table: Table, unpack: bool) -> None:
    """Put a table in the place of dense weights, to be unpacked when the file is loaded or not."""
    schema = need("ai_edge_litert.schema_py_generated", "sparsify_tflite", "litert")
    width = table.values.shape[1]
    sparsity = schema.SparsityParametersT()
    rows = schema.DimensionMetadataT(format=DENSE, denseSize=weight.dense.shape[0])
    columns = schema.DimensionMetadataT(format=CSR)
    columns.arraySegmentsType, columns.arraySegments = _vector(schema, table.segments)
    columns.arrayIndicesType, columns.arrayIndices = _vector(schema, table.columns)
    sparsity.dimMetadata = [rows, columns]
    if width > 1:  # axis 2 goes through a block, which lies along axis 1
        sparsity.blockMap = np.array([1], np.int32)
        sparsity.dimMetadata.append(schema.DimensionMetadataT(format=DENSE, denseSize=width))
    sparsity.traversalOrder = np.arange(len(sparsity.dimMetadata), dtype=np.int32)
    graph = model.subgraphs[weight.graph]
    tensor = graph.tensors[weight.tensor]
    model.buffers[tensor.buffer].data = np.frombuffer(table.values.tobytes(), np.uint8)
    layer = schema.BuiltinOperator.FULLY_CONNECTED
    if not unpack:
        tensor.sparsity = sparsity
        code = _code(model, schema, layer, SPARSE)
        for operator in graph.operators:
            if _is_dense_layer(model, operator, schema) and operator.inputs[1] == weight.tensor:
                operator.opcodeIndex = code
        return
    packed = schema.TensorT(
        name=f"{weight.name}/sparse",
        shape=tensor.shape,
        type=tensor.type,
        buffer=tensor.buffer,
        sparsity=sparsity,
    )
    tensor.buffer = 0  # the empty one, of all that is computed
    graph.tensors.append(packed)
    code = _code(model, schema, schema.BuiltinOperator.DENSIFY, 1)
    step = schema.OperatorT(
        opcodeIndex=code, inputs=[len(graph.tensors) - 1], outputs=[weight.tensor]
    )
    graph.operators.insert(0, step)


def _vector(schema: Any, numbers: np.ndarray) -> tuple[int, Any]:
    name = {"uint8": "Uint8Vector", "uint16": "Uint16Vector", "int32": "Int32Vector"}[
        numbers.dtype.name
    ]
    return getattr(schema.SparseIndexVector, name), getattr(schema, f"{name}T")(values=numbers)


def _code(model: Any, schema: Any, operator: int, version: int) -> int:
    """Find, or add, an operator of a version: others keep theirs, and with it XNNPACK."""
    for i, code in enumerate(model.operatorCodes):
        if _builtin(code) == operator and code.version == version:
            return i
    model.operatorCodes.append(
        schema.OperatorCodeT(deprecatedBuiltinCode=operator, builtinCode=operator, version=version)
    )
    return len(model.operatorCodes) - 1


class Weight(NamedTuple):
    """The weights of fully connected layers.

    Attributes:
      name: of the tensor.
      graph: which subgraph it is in.
      tensor: which of its tensors it is.
      dense: values, `[outputs, inputs]`.
    """

    name: str
    graph: int
    tensor: int
    dense: np.ndarray

    @property
    def zeros(self) -> float:
        """The share of weights that are 0."""
        return float(np.mean(self.dense == 0)) if self.dense.size else 0.0


def find_weights(model: Any) -> tuple[list[Weight], dict[str, str]]:
    """List the weights that the runtime could take sparse, and why it could not take the others."""
    schema = need("ai_edge_litert.schema_py_generated", "sparsify_tflite", "litert")
    owners = [t.buffer for graph in model.subgraphs for t in graph.tensors]
    found, others, run = [], {}, {0, *signatures(model).values()}
    for g, graph in enumerate(model.subgraphs):
        layers = [o for o in graph.operators if _is_dense_layer(model, o, schema)]
        for index in dict.fromkeys(int(layer.inputs[1]) for layer in layers):
            tensor = graph.tensors[index]
            name = (tensor.name or b"").decode() or f"tensor {index}"
            users = [layer for layer in layers if layer.inputs[1] == index]
            why = _unfit(model, graph, index, schema) or _shared(graph, index, len(users), owners)
            if any(layer.builtinOptions.weightsFormat for layer in users if layer.builtinOptions):
                why = why or "is stored in a shuffled order"
            if g not in run:
                why = why or "is in the body of a loop or branch, which nobody can run alone"
            if why:
                others[name] = why
            else:
                found.append(Weight(name, g, index, read_weights(model, g, index)))
    return found, others


def signatures(model: Any) -> dict[str, int]:
    """Which subgraph each signature runs, by its name."""
    known = {(s.signatureKey or b""): int(s.subgraphIndex) for s in model.signatureDefs or ()}
    return {k.decode() if isinstance(k, bytes) else k: index for k, index in known.items()}


def _is_dense_layer(model: Any, operator: Any, schema: Any) -> bool:
    code = _builtin(model.operatorCodes[operator.opcodeIndex])
    return bool(code == schema.BuiltinOperator.FULLY_CONNECTED)


def _builtin(code: Any) -> int:
    """Read which operator it is: a field for large numbers came later, and is 0 in old files."""
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def _unfit(model: Any, graph: Any, index: int, schema: Any) -> str:
    """Say what keeps a tensor from being sparse."""
    tensor = graph.tensors[index]
    data = model.buffers[tensor.buffer].data
    if tensor.sparsity is not None or _origin(graph, index) != index:
        return "is sparse already"
    if data is None or not len(data):
        return "is computed by other operations, as float16 weights are"
    if tensor.type != schema.TensorType.FLOAT32:
        kinds = {value: key for key, value in vars(schema.TensorType).items()}
        return f"is {kinds.get(tensor.type, 'of an unknown type').lower()}, not float32"
    return "" if len(tensor.shape) == 2 else f"has shape {[int(n) for n in tensor.shape]}"


def _shared(graph: Any, index: int, users: int, owners: list[int]) -> str:
    reads = [i for o in graph.operators for i in (o.inputs if o.inputs is not None else ())]
    ends = [i for part in (graph.inputs, graph.outputs) if part is not None for i in part]
    if [*reads, *ends].count(index) > users or owners.count(graph.tensors[index].buffer) > 1:
        return "is shared with other operations"
    return ""


def parse(data: bytes) -> Any:
    """Read a file as objects; an error of some kind where it is none."""
    schema = need("ai_edge_litert.schema_py_generated", "sparsify_tflite", "litert")
    if not re.match(rb".{4}TFL3", data, re.DOTALL):
        raise ValueError("it does not begin as one")
    model = schema.ModelT.InitFromPackedBuf(data)
    if any(buffer.offset > 1 for buffer in model.buffers):
        raise ValueError("it holds more than 2 GiB, weights beside the program")
    if not model.subgraphs or any(
        g.tensors is None or g.operators is None for g in model.subgraphs
    ):
        raise ValueError("it computes nothing")
    return model


def serialize(model: Any) -> bytes:
    """Write objects as a file."""
    plain: Any = need("flatbuffers", "sparsify_tflite", "litert").Builder

    class Builder(plain):
        """Starts bytes at multiples of 16, as the schema wants and its Python does not do."""

        def CreateNumpyVector(self, x: np.ndarray) -> int:  # noqa: N802
            if x.dtype == np.uint8:
                self.Prep(16, x.nbytes)
            return int(super().CreateNumpyVector(x))

    builder = Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
