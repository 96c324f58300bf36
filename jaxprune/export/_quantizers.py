"""The quantizers of onnxruntime and nncf, told what keeps zeros and biases."""

import collections
import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.export._calibration import Batches, Reader
from jaxprune.export._extras import need
from jaxprune.export._pools import graphs
from jaxprune.export._session import Session

USER = "quantize_onnx"
BLOCK = 32  # weights along the inputs that share a scale, of 4 bits
LEAST = 1024  # weights of a layer; fewer are not worth a scale of their own
FLAT = 1e-30  # weights of an output that are no larger are none: their scale would be 1


def static(
    written: Path,
    source: Path,
    session: Session,
    batches: Batches,
    *,
    bits: int,
    method: str,
    operators: Sequence[str],
) -> None:
    """Quantize weights to 8 or 4 bits and activations to 8, by the ranges that batches show."""
    tool = need("onnxruntime.quantization", USER)
    prepare = need("onnxruntime.quantization.shape_inference", USER).quant_pre_process
    kind = tool.QuantType.QInt8 if bits == 8 else tool.QuantType.QInt4
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = str(Path(folder) / "prepared.onnx")
        prepare(str(source), prepared, skip_symbolic_shape=True)
        graph = need("onnx", USER).load(prepared).graph
        tool.quantize_static(
            prepared,
            str(written),
            Reader(session, batches),
            quant_format=tool.QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
            per_channel=True,
            activation_type=tool.QuantType.QUInt8,
            weight_type=kind,
            calibrate_method=getattr(tool.CalibrationMethod, method),
            extra_options={
                "TensorQuantOverrides": {
                    **_one_scale_each(graph, kind),
                    **_scales_of_dead_outputs(graph, kind),
                }
            },
        )


def _one_scale_each(graph: Any, kind: Any) -> dict[str, list[dict[str, Any]]]:
    """Name weights in batches, such as kept blocks: each has one scale.

    Of `[columns, inputs, outputs]` onnxruntime takes the inputs for the channels, and for integers
    that are scaled so there is no product: it would make floats of them at every call.
    """
    batches = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 2}
    read = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    return {name: [{"quant_type": kind, "symmetric": True}] for name in sorted(batches & read)}


def _scales_of_dead_outputs(graph: Any, kind: Any) -> dict[str, list[dict[str, Any]]]:
    """Give outputs without weights the scale of the others, for the sake of their biases.

    A bias is an integer of as many steps of the input's scale times the weights'. onnxruntime takes
    1 for the scale of weights that are all zero, so that a bias below half of the input's step,
    0.5 for pixels of 0 to 255, would become 0.
    """
    to_array = need("onnx.numpy_helper", USER).to_array
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        axis = _outputs(node)
        if axis is None or len(node.input) < 3 or not {*node.input[1:3]} <= constants.keys():
            continue
        w, bias = (to_array(constants[name]) for name in node.input[1:3])
        largest = np.abs(w).max(axis=tuple(i for i in range(w.ndim) if i != axis), initial=0.0)
        dead = largest <= FLAT
        if dead.any():
            other = largest.max() if not dead.all() else np.abs(bias).max(initial=FLAT) / 256
            tops = np.where(dead, other, largest).astype(w.dtype)
            symmetric = {"quant_type": kind, "symmetric": True}
            found[node.input[1]] = [{**symmetric, "rmin": -top, "rmax": top} for top in tops]
            found[node.input[1]][0]["axis"] = axis
    return found


def _outputs(node: Any) -> int | None:
    """The axis of the outputs, of weights whose biases become integers."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(a.i for a in node.attribute if a.name == "transB") else 1
    return None


def weights(written: Path, source: Path, *, bits: int, operators: Sequence[str]) -> None:
    """Quantize weights alone: matrices and tables by onnxruntime's tool, all others here.

    Products are computed in float (``accuracy_level=1``): what onnxruntime does by default rounds
    activations to int8 at every call, and of such integers weights of 0 are no longer exactly 0.
    """
    onnx = need("onnx", USER)
    tool = need("onnxruntime.quantization.matmul_nbits_quantizer", USER).MatMulNBitsQuantizer
    model = onnx.load(str(source))
    model = model if bits == 8 else with_four_bits(model)
    takes = ("MatMul",) if bits == 8 else ("MatMul", "Gather")
    known = tuple(name for name in takes if name in operators)
    with _quiet():
        if known:
            quantizer = tool(
                model,
                bits=bits,
                block_size=BLOCK,
                is_symmetric=True,
                accuracy_level=1,
                op_types_to_quantize=known,
                nodes_to_exclude=_no_tables(model.graph),
            )
            quantizer.process()
            model = quantizer.model.model
        dequantize_others(model, bits, operators)
        if bits == 8 and "Gather" in operators:
            _look_up_integers(model.graph)
        onnx.checker.check_model(model)
    written.write_bytes(model.SerializeToString())


def _no_tables(graph: Any) -> list[str]:
    """Name what looks up something else than a matrix of floats, which the tool stumbles over."""
    kinds = need("onnx", USER).TensorProto
    tables = {
        t.name: len(t.dims) == 2 and t.data_type in (kinds.FLOAT, kinds.FLOAT16)
        for t in graph.initializer
    }
    gathers = [node for node in graph.node if node.op_type == "Gather"]
    for i, node in enumerate(gathers):
        node.name = node.name or f"jaxprune_gather_{i}"
    return [node.name for node in gathers if not tables.get(node.input[0])]


def with_four_bits(model: Any) -> Any:
    """Bring a model to the first version of ONNX that has integers of 4 bits."""
    onnx = need("onnx", USER)
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version < 21:
        model = need("onnx.version_converter", USER).convert_version(model, 21)
    model.ir_version = max(model.ir_version, onnx.IR_VERSION_2024_3_25)
    return model


# The axes of the outputs and of the inputs of weights that onnxruntime's tool leaves in float.
AXES = {"Conv": (0, 1), "ConvTranspose": (1, 0), "Gemm": (1, 0), "MatMul": (-1, -2)}


def dequantize_others(model: Any, bits: int, operators: Sequence[str]) -> None:
    """Put integers and a ``DequantizeLinear`` in the place of weights that are still floats.

    Those of loops are among them: what is computed outside of a loop is known in its body.
    """
    to_array = need("onnx.numpy_helper", USER).to_array
    places = {t.name: graph for graph in graphs(model.graph) for t in graph.initializer}
    for graph in list(graphs(model.graph)):
        for node in list(graph.node):
            name = node.input[1] if node.op_type in AXES else ""
            holder = places.get(name)
            if holder is None or node.op_type not in operators:
                continue
            tensor = next(t for t in holder.initializer if t.name == name)
            w = to_array(tensor)
            if w.dtype == np.float32 and w.ndim > 1 and w.size >= LEAST:
                del places[name]
                holder.initializer.remove(tensor)
                _dequantize(holder, name, w, bits, _axes(node, w.ndim))


def _axes(node: Any, rank: int) -> tuple[int, int]:
    out, inputs = (axis % rank for axis in AXES[node.op_type])
    turned = any(a.i for a in node.attribute if a.name == "transB")
    return (inputs, out) if turned else (out, inputs)


def _dequantize(graph: Any, name: str, w: np.ndarray, bits: int, axes: tuple[int, int]) -> None:
    """Write a weight as integers: a scale for each output, of 4 bits for each block of inputs."""
    onnx, most = need("onnx", USER), 2 ** (bits - 1) - 1
    kind = np.int8 if bits == 8 else jnp.int4
    out, inputs = axes
    if bits == 4 and w.shape[inputs] % BLOCK == 0:
        shape = (*w.shape[:inputs], -1, BLOCK, *w.shape[inputs + 1 :])
        top = np.abs(w.reshape(shape)).max(axis=inputs + 1)
        each, settings = np.repeat(_steps(top, most), BLOCK, inputs), (inputs, BLOCK)
    else:
        others = tuple(i for i in range(w.ndim) if i != out)
        top = np.abs(w).max(axis=others)
        each, settings = np.expand_dims(_steps(top, most), others), (out, 0)
    whole = np.clip(np.rint(w / each), -most, most)
    integers, scale = f"{name}_quantized", f"{name}_scale"
    axis, block = settings
    graph.initializer.append(onnx.numpy_helper.from_array(whole.astype(kind), integers))
    graph.initializer.append(onnx.numpy_helper.from_array(_steps(top, most), scale))
    extra = {"block_size": block} if block else {}
    made = onnx.helper.make_node("DequantizeLinear", [integers, scale], [name], axis=axis, **extra)
    graph.node.insert(0, made)


def _look_up_integers(graph: Any) -> None:
    """Look tables up in 8 bits: the rows, and the scale of each."""
    onnx = need("onnx", USER)
    array = onnx.numpy_helper
    tables = {t.name: t for t in graph.initializer if len(t.dims) == 2}
    gathers = [n for n in graph.node if n.op_type == "Gather" and not any(a.i for a in n.attribute)]
    lookups = collections.Counter(node.input[0] for node in gathers)
    read = collections.Counter(
        name for each in graphs(graph) for n in each.node for name in n.input
    )
    for name, times in lookups.items():
        w = array.to_array(tables[name]) if name in tables and read[name] == times else None
        if w is None or w.dtype != np.float32 or w.size < LEAST:
            continue
        scale = _steps(np.abs(w).max(axis=1, keepdims=True, initial=0.0), 127)
        graph.initializer.remove(tables[name])
        whole = np.rint(w / scale).astype(np.int8)
        graph.initializer.append(array.from_array(whole, f"{name}_quantized"))
        graph.initializer.append(array.from_array(scale, f"{name}_scale"))
        for node in [node for node in gathers if node.input[0] == name]:
            _look_up(graph, node, onnx)


def _look_up(graph: Any, gather: Any, onnx: Any) -> None:
    (name, places), out, make = gather.input, gather.output[0], onnx.helper.make_node
    made = [
        make("Gather", [f"{name}_quantized", places], [f"{out}_rows"]),
        make("Cast", [f"{out}_rows"], [f"{out}_float"], to=onnx.TensorProto.FLOAT),
        make("Gather", [f"{name}_scale", places], [f"{out}_scale"]),
        make("Mul", [f"{out}_float", f"{out}_scale"], [out]),
    ]
    at = list(graph.node).index(gather)
    graph.node.remove(gather)
    for i, each in enumerate(made):
        graph.node.insert(at + i, each)


def _steps(top: np.ndarray, most: int) -> np.ndarray:
    return np.where(top > FLAT, top / most, 1.0).astype(np.float32)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the tools say to those who develop them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            np.errstate(all="ignore"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
