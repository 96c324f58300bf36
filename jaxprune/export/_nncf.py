"""The quantizers of nncf, on ONNX files."""

from pathlib import Path
from typing import Any

from jaxprune.export._calibration import Batches
from jaxprune.export._extras import need
from jaxprune.export._quantizers import dequantize_others, with_four_bits
from jaxprune.export._session import Session

USER = "quantize_onnx"
CONVOLUTIONS = ("Conv", "ConvTranspose")


def nncf(
    written: Path,
    source: Path,
    session: Session,
    batches: Batches,
    *,
    bits: int,
    weight_only: bool,
) -> None:
    """Quantize by nncf: symmetric weights, so that a zero stays one.

    Of weights alone convolutions are left out and quantized here: nncf 3.4 gives them scales of
    three axes, with which they do not run (``findings/nncf_onnx_convolutions.sh``).
    """
    tool, onnx = need("nncf", USER, "nncf"), need("onnx", USER)
    model: Any = onnx.load(str(source))
    if weight_only:
        modes = tool.CompressWeightsMode
        four = {"mode": modes.INT4_SYM, "group_size": 32, "all_layers": True}
        settings = four if bits == 4 else {"mode": modes.INT8_SYM}
        apart = tool.IgnoredScope(types=list(CONVOLUTIONS), validate=False)
        model = with_four_bits(model) if bits == 4 else model
        model = tool.compress_weights(model, ignored_scope=apart, **settings)
        dequantize_others(model, bits, CONVOLUTIONS)
    else:
        names = [value.name for value in session.inputs]
        rows = [dict(zip(names, batch, strict=True)) for batch in batches]
        model = tool.quantize(model, tool.Dataset(rows), subset_size=len(rows))
    written.write_bytes(model.SerializeToString())
