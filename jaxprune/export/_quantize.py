"""int8 versions of ONNX files, through onnxruntime's static quantization."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune._atomic import in_place
from jaxprune.export._compare import Comparison
from jaxprune.export._door import check_path
from jaxprune.export._extras import need
from jaxprune.export._report import Report, describe
from jaxprune.export._session import Session, measure

ROWS = 64  # of a batch that is calibrated or compared in one call


def quantize_onnx(
    path: str | Path,
    source: str | Path,
    calibration: Any,
    *,
    test: Any = None,
    method: str = "minmax",
    operators: Sequence[str] = ("Conv", "Gemm", "MatMul"),
    latency: Sequence[int] = (1, 64),
    min_agreement: float = 0.0,
) -> Report:
    """Write an int8 version of an ONNX file that ``jp.export.onnx`` has written.

    Static quantization of weights and activations (QDQ nodes): weights symmetric with a scale for
    each output channel, so that a pruned weight stays exactly zero; activations by the ranges that
    calibration inputs show. The file is loaded and compared with the float file before it is put in
    place. Networks of a few thousand weights may grow: each scale is a node.

    Args:
      path: where to write; a file that is there is replaced at once and whole.
      source: the float file; it may be the same path.
      calibration: inputs that look like those to come, some hundred are enough: an array for a
        file with one input, a tuple of arrays or a dict by input names for several, or an iterable
        of such batches.
      test: inputs to compare on, of the same forms; None for the calibration inputs.
      method: how ranges are found: ``"minmax"``, or ``"entropy"`` or ``"percentile"``, which cut
        off rare extremes.
      operators: what is computed in int8. Those that multiply weights are the default; additions,
        softmax and norms cost accuracy and each brings two nodes more.
      latency: batch sizes to time; only that of the file if it is fixed, none if this is empty.
      min_agreement: the least agreement that is acceptable.

    Returns:
      A ``Report`` of the new file, with parity and agreement between the int8 and the float file.

    Raises:
      ValueError: no calibration inputs; inputs of other names or shapes, or that are not finite;
        an unknown method; less agreement than asked for.
      FileNotFoundError: there is no ``source``.
      ImportError: a package of the extra ``export`` is missing.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> folder = tempfile.TemporaryDirectory()
      >>> path, x = f"{folder.name}/net.onnx", jnp.linspace(-1, 1, 640).reshape(10, 64)
      >>> net = lambda p, x: x @ p["w"]
      >>> dense = jp.export.onnx(path, net, {"w": jnp.sin(jnp.arange(6400.0)).reshape(64, -1)}, x)
      >>> small = quantize_onnx(f"{folder.name}/int8.onnx", path, x)
      >>> small.bytes / dense.bytes < 0.4, small.parity < 0.02
      (True, True)
      >>> folder.cleanup()
    """
    methods = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
    if method not in methods:
        raise ValueError(
            f"`export.quantize_onnx(method={method!r})` is unknown. Use one of {list(methods)}."
        )
    check_path("quantize_onnx", path)
    check_path("quantize_onnx", source, "source")
    dense = _load(Path(source))
    batches = _read("calibration", calibration, dense)
    tests = batches if test is None else _read("test", test, dense)
    with in_place(Path(path)) as written:
        small = _quantize(
            written, Path(source), _Reader(dense, batches), methods[method], operators
        )
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
        timed = measure(small, _sized(dense, tests[0], latency)) if latency else None
        return describe(path, written, found.result(), timed)


def _load(source: Path) -> Session:
    if not source.is_file():
        raise FileNotFoundError(
            f"`export.quantize_onnx` finds no file {str(source)!r}. Write it with "
            "`jp.export.onnx`; the path of the new file comes first, that of the source second."
        )
    need("onnxruntime", "quantize_onnx")
    try:
        return Session(source, "quantize_onnx")
    except Exception as error:
        raise ValueError(
            f"`export.quantize_onnx` cannot load {str(source)!r}: {error}. Write it with "
            "`jp.export.onnx`."
        ) from error


def _quantize(
    written: Path, source: Path, reader: Any, method: str, operators: Sequence[str]
) -> Session:
    quantization = need("onnxruntime.quantization", "quantize_onnx")
    prepare = need("onnxruntime.quantization.shape_inference", "quantize_onnx").quant_pre_process
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = str(Path(folder) / "prepared.onnx")
            prepare(str(source), prepared, skip_symbolic_shape=True)
            quantization.quantize_static(
                prepared,
                str(written),
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(operators),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=getattr(quantization.CalibrationMethod, method),
                extra_options={"TensorQuantOverrides": _one_scale_each(prepared)},
            )
        return Session(written, "quantize_onnx")
    except Exception as error:
        raise ValueError(
            f"`export.quantize_onnx` cannot quantize {str(source)!r}: {type(error).__name__}: "
            f"{error}. Export the float file with `opset=20`, or leave some of `operators` out."
        ) from error


def _one_scale_each(file: str) -> dict[str, list[dict[str, Any]]]:
    """Name weights in batches, such as kept blocks: each has one scale.

    Of `[columns, inputs, outputs]` onnxruntime takes the inputs for the channels, and for integers
    that are scaled so there is no product: it would make floats of them at every call.
    """
    graph = need("onnx", "quantize_onnx").load(file).graph
    batches = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 2}
    read = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    kind = need("onnxruntime.quantization", "quantize_onnx").QuantType.QInt8
    return {name: [{"quant_type": kind, "symmetric": True}] for name in sorted(batches & read)}


class _Reader:
    """Calibration inputs as onnxruntime reads them."""

    def __init__(self, session: Session, batches: Sequence[Sequence[np.ndarray]]) -> None:
        self._names = [value.name for value in session.inputs]
        self._left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        values = next(self._left, None)
        return None if values is None else dict(zip(self._names, values, strict=True))


def _read(what: str, given: Any, session: Session) -> list[list[np.ndarray]]:
    """Bring inputs of all forms to lists of arrays in the order of the file, in small batches."""
    one = isinstance(given, Mapping | tuple) or hasattr(given, "shape")
    batches = [_arrays(what, each, session) for each in ([given] if one else given)]
    pieces = [piece for batch in batches for piece in _pieces(batch, session)]
    if not pieces:
        raise ValueError(
            f"`export.quantize_onnx` got no {what} inputs. Pass some hundred that look like those "
            "to come, such as images of the training set."
        )
    return pieces


def _arrays(what: str, given: Any, session: Session) -> list[np.ndarray]:
    """One batch in the order of the file, checked."""
    names = [value.name for value in session.inputs]
    if isinstance(given, Mapping):
        values = [given[name] for name in names if name in given]
        known = len(values) == len(given)
    else:
        values = list(given) if isinstance(given, tuple | list) else [given]
        known = True
    if len(values) != len(names) or not known:
        got = sorted(given) if isinstance(given, Mapping) else f"{len(values)} arrays"
        raise ValueError(
            f"`export.quantize_onnx` got {what} inputs {got}, but the file takes {names}. Pass an "
            "array for each, in a tuple in this order or in a dict."
        )
    arrays = [np.asarray(value) for value in values]
    bad = [
        f"{value.name!r} is {array.dtype}{list(array.shape)}, wanted {value.type}{value.shape}"
        for value, array in zip(session.inputs, arrays, strict=True)
        if not _fits(array, value)
    ]
    bad += [
        f"{name!r} holds values that are not finite"
        for name, array in zip(names, arrays, strict=True)
        if array.dtype.kind == "f" and not np.isfinite(array).all()
    ]
    if bad:
        raise ValueError(
            f"`export.quantize_onnx` got {what} inputs that do not fit: {'; '.join(bad)}. Prepare "
            "them as for the network itself."
        )
    return arrays


TYPES = {"float": "float32", "double": "float64"}


def _fits(array: np.ndarray, value: Any) -> bool:
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    return (
        TYPES.get(kind, kind) == str(array.dtype)
        and len(value.shape) == array.ndim
        and all(
            n in (m, None) or isinstance(n, str)
            for n, m in zip(value.shape, array.shape, strict=True)
        )
    )


def _pieces(batch: Sequence[np.ndarray], session: Session) -> Iterator[list[np.ndarray]]:
    """Split a batch of any size; one of a fixed size goes as it is."""
    moves = [bool(value.shape) and isinstance(value.shape[0], str) for value in session.inputs]
    size = max((len(x) for x, m in zip(batch, moves, strict=True) if m), default=None)
    if size is None:
        yield list(batch)
        return
    for start in range(0, size, ROWS):
        yield [x[start : start + ROWS] if m else x for x, m in zip(batch, moves, strict=True)]


def _sized(
    session: Session, values: Sequence[np.ndarray], latency: Iterable[int]
) -> dict[int, list[np.ndarray]]:
    """Inputs of the batch sizes to time, rows repeated."""
    moves = [bool(value.shape) and isinstance(value.shape[0], str) for value in session.inputs]
    if not any(moves):
        return {values[0].shape[0] if values[0].ndim else 1: list(values)}
    return {
        n: [np.resize(x, (n, *x.shape[1:])) if m else x for x, m in zip(values, moves, strict=True)]
        for n in latency
    }
