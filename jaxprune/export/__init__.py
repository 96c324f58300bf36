"""What leaves JAX: masks baked in, programs and files, verified before they are in place."""

from jaxprune.export._bake import bake as bake
from jaxprune.export._coreml import coreml as coreml
from jaxprune.export._gguf import gguf as gguf
from jaxprune.export._onnx import onnx as onnx
from jaxprune.export._quantize import quantize_onnx as quantize_onnx
from jaxprune.export._replay import replay as replay
from jaxprune.export._report import Report as Report
from jaxprune.export._safetensors import safetensors as safetensors
from jaxprune.export._stablehlo import stablehlo as stablehlo
from jaxprune.export._tflite import sparsify_tflite as sparsify_tflite
from jaxprune.export._zeros import Zeros as Zeros
from jaxprune.export._zeros import check_zeros as check_zeros

__all__ = (
    "Report",
    "Zeros",
    "bake",
    "check_zeros",
    "coreml",
    "gguf",
    "onnx",
    "quantize_onnx",
    "replay",
    "safetensors",
    "sparsify_tflite",
    "stablehlo",
)
