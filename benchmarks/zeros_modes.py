"""Which modes of which tools are asked whether a zero stays a zero."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.zeros_tools import (
    aqt_bits,
    bnb_4bit,
    bnb_blockwise,
    bnb_int8,
    coreml,
    gguf_type,
    hqq_bits,
    keras_mode,
    mlx_mode,
    mnn_bits,
    nncf_mode,
    onnx_blocks,
    onnx_dynamic,
    onnx_hqq,
    onnx_static,
    quanto_type,
    qwix_gptq,
    qwix_type,
    torchao_config,
)

Quantize = Callable[[np.ndarray], np.ndarray]


class Mode(NamedTuple):
    """One way to quantize with one tool.

    Attributes:
      tool: as it is called.
      module: that has to be there, and what is imported.
      package: whose version counts.
      name: of the mode, in the tool's own words.
      run: the function.
    """

    tool: str
    module: str
    package: str
    name: str
    run: Quantize


def _modes(
    tool: str, module: str, package: str, modes: dict[str, tuple[Callable[..., np.ndarray], dict]]
) -> list[Mode]:
    return [
        Mode(tool, module, package, name, functools.partial(run, **settings))
        for name, (run, settings) in modes.items()
    ]


MODES = (
    *_modes(
        *("onnxruntime", "onnxruntime", "onnxruntime"),
        {
            f"{how} {kind}, per {'channel' if per else 'tensor'}": (
                run,
                {"kind": kind, "per_channel": per},
            )
            for how, run in (("static", onnx_static), ("dynamic", onnx_dynamic))
            for kind in (("QInt8", "QUInt8", "QInt4") if how == "static" else ("QInt8", "QUInt8"))
            for per in (False, True)
        }
        | {
            f"MatMulNBits {bits} bit x {block}{'' if symmetric else ' asym'}, level {level}": (
                onnx_blocks,
                {"bits": bits, "block": block, "level": level, "symmetric": symmetric},
            )
            for bits, block, level, symmetric in (
                *((2, 32, 0, False), (4, 32, 0, False), (4, 128, 0, True), (8, 128, 0, False)),
                *((4, 32, 4, False), (4, 128, 4, True), (8, 128, 4, False)),
            )
        }
        | {"MatMulNBits 4 bit, HQQ": (onnx_hqq, {})},
    ),
    *_modes(
        *("gguf", "gguf", "gguf"),
        {
            kind: (gguf_type, {"kind": kind})
            for kind in (
                *("Q8_0", "Q5_0", "Q4_0", "MXFP4", "TQ1_0", "TQ2_0", "F16", "BF16"),
                *("Q5_1", "Q4_1"),
            )
        },
    ),
    *_modes(
        *("coremltools", "coremltools", "coremltools"),
        {
            "linear int8": (coreml, {"steps": "linear"}),
            "palettize 4 bit": (coreml, {"steps": "palettize"}),
            "prune, palettize": (coreml, {"steps": "prune+palettize"}),
            "prune, palettize, joint_compression": (
                coreml,
                {"steps": "prune+palettize", "joint": True},
            ),
        },
    ),
    *_modes(
        *("Keras on JAX", "keras", "keras"),
        {mode: (keras_mode, {"mode": mode}) for mode in ("int8", "int4", "float8")},
    ),
    *_modes(
        *("qwix", "qwix", "qwix"),
        {
            **{kind: (qwix_type, {"kind": kind}) for kind in ("int8", "int4", "int2", "nf4")},
            "int4, tiles of 32": (qwix_type, {"kind": "int4", "tile": 32}),
            "float8_e4m3fn": (qwix_type, {"kind": "float8_e4m3fn"}),
            "GPTQ int8": (qwix_gptq, {"kind": "int8"}),
            "GPTQ int4": (qwix_gptq, {"kind": "int4"}),
        },
    ),
    *_modes(
        *("aqtp", "aqt.jax.v2.aqt_quantizer", "aqtp"),
        {
            **{f"{bits} bit": (aqt_bits, {"bits": bits}) for bits in (8, 4, 2)},
            "8 bit, preserve_zero=False": (aqt_bits, {"bits": 8, "preserve_zero": False}),
        },
    ),
    *_modes(
        *("nncf on OpenVINO", "openvino", "nncf"),
        {
            mode: (nncf_mode, {"mode": mode, **settings})
            for mode, settings in (
                *(("INT8_SYM", {}), ("INT8_ASYM", {})),
                *(
                    (mode, {"all_layers": True, "group_size": 64})
                    for mode in ("INT4_SYM", "INT4_ASYM", "NF4")
                ),
                *((mode, {"all_layers": True}) for mode in ("MXFP4", "FP8_E4M3")),
            )
        },
    ),
    *_modes(
        *("optimum-quanto", "optimum.quanto", "optimum-quanto"),
        {
            kind: (quanto_type, {"kind": kind})
            for kind in ("qint8", "qfloat8_e4m3fn", "qint4", "qint2")
        },
    ),
    *_modes(
        *("torchao", "torchao", "torchao"),
        {
            "Int8WeightOnlyConfig": (torchao_config, {"kind": "Int8WeightOnlyConfig"}),
            "IntxWeightOnlyConfig(int4)": (
                torchao_config,
                {"kind": "IntxWeightOnlyConfig", "weight_dtype": "int4"},
            ),
            "Float8WeightOnlyConfig": (torchao_config, {"kind": "Float8WeightOnlyConfig"}),
        },
    ),
    *_modes(
        *("bitsandbytes", "bitsandbytes", "bitsandbytes"),
        {
            "NF4": (bnb_4bit, {"kind": "nf4"}),
            "FP4": (bnb_4bit, {"kind": "fp4"}),
            "int8, vectorwise": (bnb_int8, {}),
            "8 bit, blockwise (its optimizers' state)": (bnb_blockwise, {}),
        },
    ),
    *_modes(
        *("hqq", "hqq", "hqq"),
        {f"{bits} bit": (hqq_bits, {"bits": bits}) for bits in (8, 4, 2)},
    ),
    *_modes(
        *("mlx", "mlx.core", "mlx"),
        {
            "affine 4 bit": (mlx_mode, {"bits": 4, "group_size": 64}),
            "affine 8 bit": (mlx_mode, {"bits": 8, "group_size": 64}),
            "affine 4 bit, bfloat16": (
                mlx_mode,
                {"dtype": "bfloat16", "bits": 4, "group_size": 64},
            ),
            "mxfp4": (mlx_mode, {"mode": "mxfp4", "bits": 4, "group_size": 32}),
            "nvfp4": (mlx_mode, {"mode": "nvfp4", "bits": 4, "group_size": 16}),
        },
    ),
    *_modes(
        *("MNN", "MNN", "MNN"),
        {
            **{f"--weightQuantBits {bits}": (mnn_bits, {"bits": bits}) for bits in (8, 4)},
            **{
                f"--weightQuantBits {bits} --weightQuantAsymmetric": (
                    mnn_bits,
                    {"bits": bits, "flags": ("--weightQuantAsymmetric",)},
                )
                for bits in (8, 4)
            },
        },
    ),
)
