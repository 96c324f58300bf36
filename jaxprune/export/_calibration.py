"""Inputs for an ONNX file, in whatever form they come, as batches of arrays in its order."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from jaxprune.export._session import Session

Batches: TypeAlias = list[list[np.ndarray]]
ROWS = 64  # of a batch that is calibrated or compared in one call


class Reader:
    """Calibration inputs as onnxruntime reads them."""

    def __init__(self, session: Session, batches: Sequence[Sequence[np.ndarray]]) -> None:
        self._names = [value.name for value in session.inputs]
        self._left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        values = next(self._left, None)
        return None if values is None else dict(zip(self._names, values, strict=True))


def read(what: str, given: Any, session: Session) -> Batches:
    """Bring inputs of all forms to lists of arrays in the order of the file, in small batches."""
    one = isinstance(given, Mapping | tuple) or hasattr(given, "shape")
    if not one and (isinstance(given, str) or not isinstance(given, Iterable)):
        raise ValueError(
            f"`export.quantize_onnx` got {given!r} as {what} inputs. Pass an array, a tuple or "
            "dict of arrays, or an iterable of such batches."
        )
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


def sized(
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
