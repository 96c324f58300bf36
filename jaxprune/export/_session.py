"""ONNX files run by onnxruntime, on one thread."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.export._extras import need

TURNS = 15  # of every batch size, of which the median is reported
BLOCK = 0.005  # seconds of calls in a row: one call is shorter than the clock is exact


class Session:
    """A file that is loaded: arrays in, arrays out, both in the order of the file."""

    def __init__(self, file: Path | bytes, user: str) -> None:
        runtime = need("onnxruntime", user)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = runtime.InferenceSession(
            file if isinstance(file, bytes) else str(file),
            options,
            providers=["CPUExecutionProvider"],
        )
        self.inputs = self._session.get_inputs()
        self.outputs = [out.name for out in self._session.get_outputs()]

    def __call__(self, values: Sequence[np.ndarray]) -> list[np.ndarray]:
        names = [value.name for value in self.inputs]
        return list(self._session.run(None, dict(zip(names, values, strict=True))))


def measure(session: Session, batches: Mapping[int, Sequence[np.ndarray]]) -> dict[int, float]:
    """Milliseconds of a call by batch size."""
    calls = {n: (lambda values=values: session(values)) for n, values in batches.items()}
    return in_turns(calls)


def in_turns(calls: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Milliseconds of each call: the median of turns, after a warm-up."""
    each = {n: math.ceil(BLOCK / max(_seconds(call, 3), 1e-6)) for n, call in calls.items()}
    taken: dict[Any, list[float]] = {n: [] for n in calls}
    for _ in range(TURNS):
        for n, call in calls.items():
            taken[n].append(_seconds(call, each[n]))
    return {n: 1e3 * statistics.median(seconds) for n, seconds in taken.items()}


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times
