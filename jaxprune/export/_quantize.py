"""Small versions of ONNX files in integers, and what became of their zeros."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune._advice import PruneWarning
from jaxprune._atomic import in_place
from jaxprune._tree import list_paths
from jaxprune.export import _quantizers
from jaxprune.export._calibration import Batches, read, sized
from jaxprune.export._compare import Comparison
from jaxprune.export._door import check_path
from jaxprune.export._extras import need
from jaxprune.export._nncf import nncf
from jaxprune.export._report import Report, describe
from jaxprune.export._session import Session, measure
from jaxprune.export._stored import Arrays, floats_in, read_onnx
from jaxprune.export._zeros import Zeros, compare_zeros

METHODS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
OPERATORS = ("Conv", "ConvTranspose", "Gather", "Gemm", "MatMul")


def quantize_onnx(
    path: str | Path,
    source: str | Path,
    calibration: Any,
    *,
    bits: int = 8,
    weight_only: bool = False,
    tool: str = "onnxruntime",
    test: Any = None,
    method: str = "minmax",
    operators: Sequence[str] | None = None,
    latency: Sequence[int] = (1, 64),
    min_agreement: float = 0.0,
) -> Report:
    """Write a version in integers of an ONNX file that ``jp.export.onnx`` has written.

    Weights are symmetric, so that a pruned weight stays exactly zero, with a scale for each output
    channel, or of 4 bits alone for each block of 32 inputs. Activations get 8 bits by the ranges
    that calibration inputs show, or stay floats (``weight_only``). The file is loaded, compared
    with the float file, and its weights are read back and counted before it is put in place.

    Which one is fast? On a CPU 8 bits with activations; and 4 bits of weights alone, for matrices
    that are read once for each row of data, as in language models. Convolutions in 4 bits, and 4
    bits with activations, are small on disk and dequantized at every call: slower than floats.
    Networks of a few thousand weights may grow: each scale is a node.

    The same file is computed in another way on other CPUs: onnxruntime 1.32 adds pairs of products
    in 16 bits on x86 without VNNI, which saturate where activations and weights are both large.
    The report says what this machine makes of the file.

    Args:
      path: where to write; a file that is there is replaced at once and whole.
      source: the float file; it may be the same path.
      calibration: inputs that look like those to come, some hundred are enough: an array for a
        file with one input, a tuple of arrays or a dict by input names for several, or an iterable
        of such batches. Of ``weight_only`` they are what is compared on.
      bits: of the weights, 8 or 4.
      weight_only: leave activations and their products in float.
      tool: ``"onnxruntime"``, or ``"nncf"`` where that is installed.
      test: inputs to compare on, of the same forms; None for the calibration inputs.
      method: how ranges are found: ``"minmax"``, or ``"entropy"`` or ``"percentile"``, which cut
        off rare extremes. Of onnxruntime with activations.
      operators: whose weights are quantized, of ``"Conv"``, ``"ConvTranspose"``, ``"Gather"``,
        ``"Gemm"``, ``"MatMul"``; None for all of them, or of onnxruntime with activations for
        Conv, Gemm and MatMul. With activations others are known, too: additions, softmax and norms
        cost accuracy and each brings two nodes more.
      latency: batch sizes to time; only that of the file if it is fixed, none if this is empty.
      min_agreement: the least agreement that is acceptable.

    Returns:
      A ``Report`` of the new file, with parity and agreement between it and the float file, the
      share of weights that are 0 in the float file and in this one, and how many others became 0.

    Warns:
      PruneWarning: zeros of the float file are no longer zero; how many, and the way out. Or
        large weights stayed in float.

    Raises:
      ValueError: no calibration inputs; inputs of other names or shapes, or that are not finite;
        unknown bits, tool, method or operators; less agreement than asked for; weights that are
        not finite, or float16 with activations; a file of which nothing was quantized.
      FileNotFoundError: there is no ``source``.
      ImportError: a package of the extra ``export`` is missing, or of the extra ``nncf``.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> folder = tempfile.TemporaryDirectory()
      >>> path, x = f"{folder.name}/net.onnx", jnp.linspace(-1, 1, 640).reshape(10, 64)
      >>> net = lambda p, x: x @ p["w"]
      >>> w = jnp.sin(jnp.arange(6400.0)).reshape(64, -1)
      >>> w = jnp.where(jnp.abs(w) > 0.5, w, 0)
      >>> dense = jp.export.onnx(path, net, {"w": w}, x)
      >>> small = quantize_onnx(f"{folder.name}/int8.onnx", path, x)
      >>> small.bytes / dense.bytes < 0.4, small.zeros_kept
      (True, 1.0)
      >>> small = quantize_onnx(f"{folder.name}/int4.onnx", path, x, bits=4, weight_only=True)
      >>> small.bytes / dense.bytes < 0.2, small.zeros_kept
      (True, 1.0)
      >>> folder.cleanup()
    """
    _check_choice(bits, weight_only, tool, method, operators)
    check_path("quantize_onnx", path)
    check_path("quantize_onnx", source, "source")
    dense = _load(Path(source), tool)
    weights = read_onnx(Path(source), USER, multiplied=True)
    _check_weights(weights, weight_only)
    batches = read("calibration", calibration, dense)
    tests = batches if test is None else read("test", test, dense)
    with in_place(Path(path)) as written:
        write = _tool(tool, bits, weight_only, METHODS[method], operators)
        small = _quantize(written, Path(source), dense, batches, write)
        found = Comparison(dense.outputs)
        for values in tests:
            found.add(small(values), dense(values))
        if found.agreement is not None and found.agreement < min_agreement:
            raise ValueError(
                f"`export.quantize_onnx` agrees with the float file on {found.agreement:.2%} of "
                f"top-1 predictions, less than `min_agreement={min_agreement:g}`. No file was "
                "written. Calibrate on more inputs, try `method='percentile'`, or train with "
                "quantization."
            )
        if not np.isfinite(found.parity):
            raise ValueError(
                "`export.quantize_onnx` made a file whose outputs differ from those of the float "
                f"file without bound: {found.where}. No file was written. Look at the range of "
                "weights and activations, or choose other `bits`."
            )
        zeros, missing = compare_zeros(weights, read_onnx(written, USER))
        _warn_of_lost(zeros, missing)
        _warn_of_floats(str(source), weights, floats_in(written, USER))
        timed = measure(small, sized(dense, tests[0], latency)) if latency else None
        report = describe(path, written, found.result(), timed)
        return report if zeros is None else zeros.in_report(report)


USER = "quantize_onnx"


def _check_choice(
    bits: int, weight_only: bool, tool: str, method: str, operators: Sequence[str] | None
) -> None:
    if bits not in (4, 8):
        raise ValueError(f"`export.quantize_onnx(bits={bits!r})` is unknown. Use 8 or 4.")
    if tool not in ("onnxruntime", "nncf"):
        raise ValueError(
            f"`export.quantize_onnx(tool={tool!r})` is unknown. Use 'onnxruntime' or 'nncf'."
        )
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"`export.quantize_onnx(method={method!r})` is unknown. Use one of {list(METHODS)}."
        )
    chosen = {operators} if isinstance(operators, str) else set(operators or ())
    if isinstance(operators, str) or (weight_only and not chosen <= set(OPERATORS)):
        raise ValueError(
            f"`export.quantize_onnx(operators={operators!r})` is no list of operators that are "
            f"quantized here. Pass a list of some of {list(OPERATORS)}."
        )
    if tool == "nncf" and bits == 4 and not weight_only:
        raise ValueError(
            "`export.quantize_onnx(tool='nncf', bits=4)` with activations is nothing that nncf "
            "has. Pass `weight_only=True`, or leave `tool` out."
        )


def _check_weights(weights: Arrays, weight_only: bool) -> None:
    """Refuse what integers cannot hold, and what the tools pass over without a word."""
    bad = [name for name, w in weights.items() if not np.isfinite(w).all()]
    if bad:
        raise ValueError(
            f"`export.quantize_onnx` got weights that are inf or NaN in {list_paths(bad)}, of "
            "which one spoils the scale of all. Look for where they come from."
        )
    half = [name for name, w in weights.items() if w.dtype == np.float16]
    if half and not weight_only:
        raise ValueError(
            f"`export.quantize_onnx` got weights in float16, {list_paths(half)}, which onnxruntime "
            "would leave as they are. Export the network in float32, or pass `weight_only=True`."
        )


def _load(source: Path, tool: str) -> Session:
    if not source.is_file():
        raise FileNotFoundError(
            f"`export.quantize_onnx` finds no file {str(source)!r}. Write it with "
            "`jp.export.onnx`; the path of the new file comes first, that of the source second."
        )
    if tool == "nncf":
        need("nncf", USER, "nncf")
    need("onnxruntime", USER)
    try:
        return Session(source, USER)
    except Exception as error:
        raise ValueError(
            f"`export.quantize_onnx` cannot load {str(source)!r}: {error}. Write it with "
            "`jp.export.onnx`."
        ) from error


def _tool(
    tool: str, bits: int, weight_only: bool, method: str, operators: Sequence[str] | None
) -> Callable[[Path, Path, Session, Batches], None]:
    """What writes the file, of all that there is to choose from."""
    if tool == "nncf":
        return lambda *args: nncf(*args, bits=bits, weight_only=weight_only)
    if weight_only:
        chosen = OPERATORS if operators is None else operators
        return lambda written, source, *_: _quantizers.weights(
            written, source, bits=bits, operators=chosen
        )
    chosen = ("Conv", "Gemm", "MatMul") if operators is None else operators
    return lambda *args: _quantizers.static(*args, bits=bits, method=method, operators=chosen)


def _quantize(
    written: Path,
    source: Path,
    dense: Session,
    batches: Batches,
    write: Callable[[Path, Path, Session, Batches], None],
) -> Session:
    try:
        write(written, source, dense, batches)
        small = Session(written, USER)
        small(batches[0])  # what loads may yet not run
        return small
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"`export.quantize_onnx` cannot quantize {str(source)!r}: {type(error).__name__}: "
            f"{error}. Export the float file with `opset=20`, or leave some of `operators` out."
        ) from error


def _warn_of_lost(zeros: Zeros | None, missing: list[str]) -> None:
    lost = [leaf for leaf in zeros.leaves if leaf.lost] if zeros else []
    if zeros and lost:
        named = ", ".join(f"{leaf.path!r} ({leaf.lost:,} of {leaf.removed:,})" for leaf in lost[:5])
        warnings.warn(
            f"`export.quantize_onnx` brought {1 - zeros.kept:.2%} of the removed weights back, up "
            f"to {max(leaf.largest for leaf in lost):.1e} of the largest weight: {named}. Choose "
            "another `tool` or `bits`, or mask the weights again.",
            PruneWarning,
            stacklevel=3,
        )
    if missing:
        warnings.warn(
            f"`export.quantize_onnx` has made something else of {list_paths(missing)}, so that "
            "nobody knows what became of their zeros. Compare outputs on data.",
            PruneWarning,
            stacklevel=3,
        )


def _warn_of_floats(source: str, weights: Arrays, floats: dict[str, int]) -> None:
    """Say what stayed as it was, and refuse where that is all."""
    left = {name: size for name, size in floats.items() if size >= 4 * _quantizers.LEAST}
    if sum(floats.values()) >= sum(w.nbytes for w in weights.values()):
        raise ValueError(
            f"`export.quantize_onnx` finds nothing to quantize in {source!r}: "
            + (f"{list_paths(list(floats))} stayed in float." if floats else "it holds no matrix.")
            + " Export with `jp.export.onnx`, whose products are `MatMul` and `Conv`, or name more "
            "in `operators`."
        )
    if left:
        named = ", ".join(f"{name!r} ({size:,} bytes)" for name, size in list(left.items())[:5])
        warnings.warn(
            f"`export.quantize_onnx` left weights in float: {named}. Of tables pass `operators=` "
            "with 'Gather'; the others are read by operators that the tool does not quantize.",
            PruneWarning,
            stacklevel=3,
        )
