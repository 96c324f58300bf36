"""Weights read back from files, as the numbers that they stand for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxprune.export._extras import need
from jaxprune.export._plain import MOVES
from jaxprune.export._pools import graphs

Arrays: TypeAlias = dict[str, np.ndarray]

# Which inputs of an operation are integers, their scale and their zero point. A scale of -1 is in
# another operation: a product of integers is scaled afterwards.
INTEGERS = {
    "DequantizeLinear": (0, 1, 2),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "QGemm": (3, 4, 5),
    "QLinearConv": (3, 4, 5),
    "QLinearMatMul": (3, 4, 5),
    "ConvInteger": (1, -1, 3),
    "MatMulInteger": (1, -1, 3),
    "Gather": (0, -1, 9),  # a table of integers; what is looked up is scaled
}
SUFFIXES = ("_quantized", "_Q4", "_Q8", "_Q4G", "_Q8G")  # of tools, behind the name of a weight


def read_weights(path: str | Path, user: str) -> Arrays:
    """Read an ONNX, safetensors or GGUF file, whatever its name ends with."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"`export.{user}` finds no file {str(path)!r}.")
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"GGUF":
        from jaxprune.export._gguf import read_gguf

        return read_gguf(path, user)
    if head[8:] == b"{":  # behind the length of a header in JSON
        from jaxprune.export._safetensors import read_safetensors

        return read_safetensors(path, user)
    return read_onnx(path, user)


def read_onnx(source: str | Path, user: str, *, multiplied: bool = False) -> Arrays:
    """Read the float weights of an ONNX file, by name; integers as what they stand for.

    ``multiplied`` leaves out what is no weight of a product or a table, such as a causal mask.
    """
    found = _graphs(source, user)
    constants = {name: x for graph in found for name, x in _constants(graph)}
    stored = {name: x for name, x in constants.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    stored = {
        name: x if x.dtype.kind == "f" else x.astype(np.float32) for name, x in stored.items()
    }
    for node in (node for graph in found for node in graph.node):
        stored.update(_dequantized(node, constants))
    if not multiplied:
        return stored
    read = {n for graph in found for node in graph.node for n in _weights(node)}
    for graph in found:  # weights that are moved on their way
        for node in reversed(graph.node):
            if read & set(node.output) and node.op_type in MOVES:
                read.add(node.input[0])
    return {name: x for name, x in stored.items() if x.ndim > 1 and name in read}


def _graphs(source: str | Path, user: str) -> list[Any]:
    onnx = need("onnx", user)
    try:
        model = onnx.load(source)
        found = [graph for graph in graphs(model.graph) if graph.node or graph.initializer]
    except Exception as error:
        raise ValueError(
            f"`export.{user}` cannot read {str(source)!r}: {error}. It reads ONNX, safetensors "
            "and GGUF files."
        ) from error
    if not found:
        raise ValueError(
            f"`export.{user}` finds no network in {str(source)!r}. It reads ONNX, safetensors and "
            "GGUF files."
        )
    return found


def floats_in(path: str | Path, user: str) -> dict[str, int]:
    """The bytes of matrices that a file holds as floats and multiplies or looks up as they are."""
    found = _graphs(path, user)
    floats = {
        name: x.nbytes
        for graph in found
        for name, x in _constants(graph)
        if x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
    }
    read = {name for graph in found for node in graph.node for name in _weights(node)}
    return {name: size for name, size in floats.items() if name in read}


def _weights(node: Any) -> list[str]:
    """What a node may multiply with data, or look up."""
    kinds = ("Conv", "ConvTranspose", "Einsum", "Gather", "Gemm", "MatMul")
    return list(node.input[:2]) if node.op_type in kinds else []


def _constants(graph: Any) -> Iterator[tuple[str, np.ndarray]]:
    to_array = need("onnx.numpy_helper", "check_zeros").to_array
    for tensor in graph.initializer:
        yield tensor.name, to_array(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                yield node.output[0], to_array(attribute.t)


def _dequantized(node: Any, constants: Arrays) -> Arrays:
    """The weights that a node reads as integers."""
    settings = {a.name: a.i for a in node.attribute}
    inputs = [constants.get(name) for name in node.input]
    if node.op_type in PACKED:
        place, unpack = PACKED[node.op_type]
        zeros = inputs[3] if len(inputs) > 3 else None
        packed = inputs[place]
        known = _base(node.input[place])
        return {} if packed is None else {known: unpack(settings, packed, inputs[2], zeros)}
    whole, scale, zero = INTEGERS.get(node.op_type, (0, 0, 0))
    if whole == scale or len(inputs) <= whole:
        return {}
    stored, known = inputs[whole], _base(node.input[whole])
    if stored is None or stored.dtype.kind == "f":
        return {}
    by = constants.get(f"{known}_scale") if scale < 0 else inputs[scale]
    if node.op_type == "Gather" and by is None:
        return {}  # numbers, not weights
    origin = inputs[zero] if zero < len(inputs) else constants.get(f"{known}_zero_point")
    axis = settings.get("axis", 1) if node.op_type == "DequantizeLinear" else None
    values = _scaled(stored, by, origin, axis, settings.get("block_size", 0))
    return {known: values}


def _base(name: str) -> str:
    """The name that a weight had before it was quantized."""
    return next((name.removesuffix(s) for s in SUFFIXES if name.endswith(s)), name)


def _scaled(
    whole: Any, scale: np.ndarray | None, zero: np.ndarray | None, axis: int | None, block: int
) -> np.ndarray:
    """Subtract the zero point and multiply with the scale, of all or of a channel or block."""
    values = np.asarray(whole).astype(np.float32)
    for by, join in ((zero, np.subtract), (scale, np.multiply)):
        if by is not None:
            values = join(values, _broadcast(np.asarray(by, np.float32), values, axis, block))
    return values + 0.0


def _broadcast(by: np.ndarray, values: np.ndarray, axis: int | None, block: int) -> np.ndarray:
    if by.size == 1:
        return by.reshape(())
    if by.ndim == values.ndim and not block:
        return by
    if block:
        return np.repeat(by, block, axis)[tuple(slice(n) for n in values.shape)]
    if axis is None:  # kernels have their outputs in front, matrices last
        axis = 0 if values.ndim > 2 else values.ndim - 1
        axis = axis if values.shape[axis] == by.size else values.shape.index(by.size)
    shape = [1] * values.ndim
    shape[axis] = by.size
    return by.reshape(shape)


def _of_matmul(settings: Mapping[str, int], packed: Any, scales: Any, zeros: Any) -> np.ndarray:
    """Weights `[K, N]` of a ``MatMulNBits``: bytes `[N, blocks, bytes]`, the low bits first."""
    bits, rows, columns = (settings.get(name, 4) for name in ("bits", "K", "N"))
    whole = _unpacked(packed, bits)
    blocks = whole.shape[1]
    origin: Any = 2.0 ** (bits - 1)
    if zeros is not None:  # packed as the weights are, or floats
        origin = _unpacked(zeros.reshape(columns, -1), bits)[:, :blocks, None]
    values = (whole - origin) * scales.astype(np.float32).reshape(columns, blocks, 1)
    return values.reshape(columns, -1)[:, :rows].T


def _of_gather(settings: Mapping[str, int], packed: Any, scales: Any, zeros: Any) -> np.ndarray:
    """A table of a ``GatherBlockQuantized``, in blocks along one axis."""
    bits, block = settings.get("bits", 4), settings.get("block_size", 128)
    packs = packed.dtype == np.uint8
    whole = _unpacked(packed, bits) if packs else packed.astype(np.float32)
    axis = settings.get("quantize_axis", 1) % whole.ndim
    origin: Any = np.float32(2.0 ** (bits - 1) if packs else 0)
    if zeros is not None:
        origin = _unpacked(zeros, bits) if packs else zeros.astype(np.float32)
        origin = np.repeat(origin[..., : scales.shape[-1]], block, axis)
        origin = origin[tuple(slice(n) for n in whole.shape)]
    by = np.repeat(scales.astype(np.float32), block, axis)[tuple(slice(n) for n in whole.shape)]
    return (whole - origin) * by


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Integers of 2, 4 or 8 bits out of bytes, the low bits first, as floats."""
    if packed.dtype != np.uint8:
        return packed.astype(np.float32)
    places = np.arange(0, 8, bits, dtype=np.uint8)
    whole = (packed[..., None] >> places) & np.uint8(2**bits - 1)
    return whole.reshape(*packed.shape[:-1], -1).astype(np.float32)


# Operations on integers in blocks: which input they are, and what unpacks them.
PACKED = {"MatMulNBits": (1, _of_matmul), "GatherBlockQuantized": (0, _of_gather)}
