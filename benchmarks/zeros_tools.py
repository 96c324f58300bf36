"""What other people's quantizers give back for weights: one small function for each tool.

Each takes weights `[out, in]` in float32 and gives back those that the tool's own code computes
with. Where weights cannot be read a product with the identity is computed instead, of which each
entry is one weight.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# onnxruntime


def _product(w: np.ndarray) -> Any:
    """A model of one MatMul with a kernel `[in, out]` that is called ``w``."""
    import onnx

    kinds, helper = onnx.TensorProto, onnx.helper
    rows, columns = w.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "product",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["n", columns])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, ["n", rows])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(w.T), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _of_identity(model: Any, size: int, optimize: bool = True) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimize:  # else weights in eight bits are multiplied with activations in eight bits
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = model.SerializeToString()
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(size, dtype=np.float32)})[0].T


def _stored(path: str) -> np.ndarray:
    """What the integers, scales and zero points of a file stand for."""
    import onnx

    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in onnx.load(path).graph.initializer}
    q, scale, zero = (arrays[f"w_{part}"] for part in ("quantized", "scale", "zero_point"))
    return ((q.astype(np.int32) - zero.astype(np.int32)) * scale).astype(np.float32).T


def onnx_dynamic(w: np.ndarray, *, kind: str, per_channel: bool) -> np.ndarray:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(_product(w), f"{folder}/a.onnx")
        quantize_dynamic(
            f"{folder}/a.onnx",
            f"{folder}/b.onnx",
            weight_type=QuantType[kind],
            per_channel=per_channel,
        )
        return _stored(f"{folder}/b.onnx")


def onnx_static(w: np.ndarray, *, kind: str, per_channel: bool) -> np.ndarray:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        rows = iter([{"x": np.eye(w.shape[1], dtype=np.float32)}])

        def get_next(self) -> Any:
            return next(self.rows, None)

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(_product(w), f"{folder}/a.onnx")
        quantize_static(
            f"{folder}/a.onnx",
            f"{folder}/b.onnx",
            Reader(),
            weight_type=QuantType[kind],
            activation_type=QuantType.QUInt8 if kind == "QUInt8" else QuantType.QInt8,
            per_channel=per_channel,
        )
        return _stored(f"{folder}/b.onnx")


def onnx_blocks(w: np.ndarray, *, bits: int, block: int, level: int, symmetric: bool) -> np.ndarray:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(
        _product(w), bits=bits, block_size=block, is_symmetric=symmetric, accuracy_level=level
    )
    made.process()
    return _of_identity(made.model.model, w.shape[1])


def onnx_hqq(w: np.ndarray) -> np.ndarray:
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        HQQWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    made = MatMulNBitsQuantizer(_product(w), algo_config=HQQWeightOnlyQuantConfig(block_size=128))
    made.process()
    return _of_identity(made.model.model, w.shape[1])


# gguf


def gguf_type(w: np.ndarray, *, kind: str) -> np.ndarray:
    import gguf

    number = gguf.GGMLQuantizationType[kind]
    return gguf.dequantize(gguf.quantize(w, number), number)


# mlx


def mlx_mode(w: np.ndarray, *, dtype: str = "float32", **settings: Any) -> np.ndarray:
    import mlx.core as mx

    parts = mx.quantize(mx.array(w).astype(getattr(mx, dtype)), **settings)
    return np.array(mx.dequantize(*parts, **settings).astype(mx.float32))


# bitsandbytes


def bnb_4bit(w: np.ndarray, *, kind: str) -> np.ndarray:
    import bitsandbytes.functional as F  # noqa: N812
    import torch

    return F.dequantize_4bit(*F.quantize_4bit(torch.tensor(w), quant_type=kind)).numpy()


def bnb_blockwise(w: np.ndarray) -> np.ndarray:
    import bitsandbytes.functional as F  # noqa: N812
    import torch

    return F.dequantize_blockwise(*F.quantize_blockwise(torch.tensor(w))).numpy()


def bnb_int8(w: np.ndarray) -> np.ndarray:
    import bitsandbytes.functional as F  # noqa: N812
    import torch

    q, scale, _ = F.int8_vectorwise_quant(torch.tensor(w).half())
    return F.int8_vectorwise_dequant(q, scale).numpy()


# hqq


def hqq_bits(w: np.ndarray, *, bits: int) -> np.ndarray:
    import torch
    from hqq.core.quantize import Quantizer

    q, meta = Quantizer.quantize(
        torch.tensor(w), nbits=bits, group_size=64, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(q, meta).numpy()


# PyTorch: optimum-quanto, torchao


def _linear(w: np.ndarray) -> Any:
    import torch

    layer = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    layer.weight.data = torch.tensor(w)
    return torch.nn.Sequential(layer)


def quanto_type(w: np.ndarray, *, kind: str) -> np.ndarray:
    from optimum import quanto

    model = _linear(w)
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    return model[0].weight.dequantize().detach().numpy()


def torchao_config(w: np.ndarray, *, kind: str, **settings: Any) -> np.ndarray:
    import torch
    import torchao.quantization

    model = _linear(w)
    named = {k: getattr(torch, v) if isinstance(v, str) else v for k, v in settings.items()}
    torchao.quantization.quantize_(model, getattr(torchao.quantization, kind)(**named))
    return model[0].weight.dequantize().detach().float().numpy()


# nncf on OpenVINO


def nncf_mode(w: np.ndarray, *, mode: str, **settings: Any) -> np.ndarray:
    import nncf
    import openvino as ov

    x = ov.opset13.parameter([-1, w.shape[1]], np.float32)
    model = ov.Model([ov.opset13.matmul(x, ov.opset13.constant(w), False, True)], [x])
    mode_ = nncf.CompressWeightsMode[mode]
    model = nncf.compress_weights(model, mode=mode_, **settings)
    exact = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", exact)
    return compiled(np.eye(w.shape[1], dtype=np.float32))[0].T


# Keras


def keras_mode(w: np.ndarray, *, mode: str) -> np.ndarray:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    layer = keras.layers.Dense(w.shape[0], use_bias=False)
    layer.build((None, w.shape[1]))
    layer.set_weights([w.T])
    layer.quantize(mode)
    return np.asarray(layer(np.eye(w.shape[1], dtype=np.float32))).T


# qwix


def qwix_type(w: np.ndarray, *, kind: str, tile: int = 0) -> np.ndarray:
    import jax.numpy as jnp
    import qwix

    tiles = {1: tile} if tile else {}
    made = qwix.quantize(jnp.asarray(w), kind, channelwise_axes=[0], tiled_axes=tiles)
    return np.asarray(qwix.dequantize(made))


def correlated(features: int, examples: int = 2048) -> np.ndarray:
    """Draw inputs `[features, examples]` of which few directions hold most, as in networks."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(features, examples)) * np.exp(-np.arange(features) / 100)[:, None]
    return (rng.normal(size=(features, features)) @ x).astype(np.float32)


def qwix_gptq(w: np.ndarray, *, kind: str) -> np.ndarray:
    import jax.numpy as jnp
    import qwix
    from qwix._src.core import qarray
    from qwix.contrib import gptq_core

    how = qarray.HowToQuantize(qtype=kind, channelwise_axes=[0])
    x = correlated(w.shape[1])
    made, _ = gptq_core.quantize_weight(
        jnp.asarray(w), gptq_core.compute_hessian(jnp.asarray(x)), how
    )
    return np.asarray(qwix.dequantize(made))


# aqtp


def aqt_bits(w: np.ndarray, *, bits: int, preserve_zero: bool = True) -> np.ndarray:
    import dataclasses

    import jax.numpy as jnp
    from aqt.jax.v2 import aqt_quantizer

    made = aqt_quantizer.quantizer_make(bits, initialize_calibration=False)
    if not preserve_zero:  # as `set_int_numerics_preserve_zero` of its config does
        halves = dataclasses.replace(made.numerics, preserve_zero=False, dtype=None)
        made = dataclasses.replace(made, numerics=halves)
    made.init_calibration()
    return np.asarray(aqt_quantizer.make_fake_quant(made, [1])(jnp.asarray(w)))


# coremltools


def coreml(w: np.ndarray, *, steps: str, joint: bool = False) -> np.ndarray:
    import coremltools as ct
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil import Builder

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1, w.shape[1]))])
    def program(x: Any) -> Any:
        return Builder.linear(x=x, weight=w, name="y")

    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    config = {
        "linear": cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8"),
        "palettize": cto.OpPalettizerConfig(mode="kmeans", nbits=4),
        "prune": cto.OpMagnitudePrunerConfig(target_sparsity=float((w == 0).mean())),
    }
    change = {
        "linear": cto.linear_quantize_weights,
        "palettize": cto.palettize_weights,
        "prune": cto.prune_weights,
    }
    for step in steps.split("+"):
        more = {"joint_compression": True} if joint and step != "prune" else {}
        model = change[step](model, cto.OptimizationConfig(global_config=config[step]), **more)
    found = cto.get_weights_metadata(cto.decompress_weights(model), weight_threshold=w.size // 2)
    return next(np.asarray(x.val, np.float32) for x in found.values())


# MNN


def mnn_bits(w: np.ndarray, *, bits: int, flags: tuple[str, ...] = ()) -> np.ndarray:
    import subprocess
    import sys

    import onnx

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(_product(w), f"{folder}/a.onnx")
        tool = Path(sys.executable).with_name("mnnconvert")
        files = ("--modelFile", f"{folder}/a.onnx", "--MNNModel", f"{folder}/b.mnn")
        subprocess.run(
            [tool, "-f", "ONNX", *files, "--weightQuantBits", str(bits), *flags],
            check=True,
            capture_output=True,
        )
        import MNN

        net = MNN.nn.load_module_from_file(f"{folder}/b.mnn", ["x"], ["y"])
        x = MNN.expr.const(np.eye(w.shape[1], dtype=np.float32), [w.shape[1]] * 2, MNN.expr.NCHW)
        return np.array(net.forward([x])[0].read()).T
