"""Exported files as a small device runs them: by onnxruntime, on one thread."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

RUN_AT_ONCE = 1000


def predict(path: Path, inputs: np.ndarray) -> np.ndarray:
    """Give what a file answers to all inputs, `[n, classes]`."""
    parts = np.array_split(inputs, -(-len(inputs) // RUN_AT_ONCE))
    run = _runner(path)
    return np.concatenate([run(part) for part in parts])


def call(path: Path, inputs: np.ndarray) -> Callable[[], np.ndarray]:
    """Load a file, and make what runs it on ``inputs``."""
    run = _runner(path)
    return lambda: run(inputs)


def _runner(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda inputs: session.run(None, {name: inputs})[0]
