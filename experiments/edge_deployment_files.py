"""Files as a device runs them: exported, quantized to int8, measured on the test set and timed."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import jaxprune as jp
from experiments.common import device, files, timing, train
from experiments.common.data import Examples
from experiments.common.runner import Record
from experiments.common.small_networks import Network

LATENCY_BATCHES = (1, 64)
LATENCY_TURNS = 25


def export(path: Path, network: Network, test: Examples, compile_: train.Compile) -> Record:
    """Write the file of a network, and put in figures what it does with the whole test set."""
    infer, variables = network.infer, network.variables
    ours = train.predict(infer, variables, test.inputs, compile_)
    written = place(path, jp.export.onnx, infer, variables, test.inputs[:1])
    theirs = device.predict(path, test.inputs)
    return {
        **measure(written, theirs, ours, test.targets),
        "parity": float(np.abs(theirs - ours).max() / np.abs(ours).max()),
        "parameters": jp.size_of(variables["params"], {}),
        "flops": jp.count_flops(infer, variables, test.inputs[:1]),
    }


def quantize(path: Path, source: Path, batches: list[np.ndarray], test: Examples) -> Record:
    """Write the int8 file of a float one, calibrated on batches, and put it in figures."""
    written = place(path, jp.export.quantize_onnx, source, batches)
    small, large = (device.predict(file, test.inputs) for file in (path, source))
    return measure(written, small, large, test.targets)


def place(path: Path, write: Callable[..., jp.export.Report], *args: object) -> jp.export.Report:
    """Export a file elsewhere, and put it in place like all others of a run."""
    with tempfile.TemporaryDirectory() as folder:
        written = write(Path(folder) / path.name, *args, latency=())
        files.write(path, written.path.read_bytes())
    return written


def measure(
    written: jp.export.Report, logits: np.ndarray, reference: np.ndarray, labels: np.ndarray
) -> Record:
    """Put a file in figures: its size, and what it answers to the test set.

    Args:
      written: what is known of the file.
      logits: that it gives, `[n, classes]`.
      reference: logits that it should give, `[n, classes]`.
      labels: classes of the test set, `[n]`.
    """
    return {
        "accuracy": hits(logits, labels),
        "agreement": hits(logits, reference.argmax(-1)),
        "bytes": written.bytes,
        "gzip_bytes": written.gzip_bytes,
    }


def hits(logits: np.ndarray, labels: np.ndarray) -> float:
    """Give the share of labels `[n]` that are the most likely class, from a count."""
    return int((logits.argmax(-1) == labels).sum()) / len(labels)


def latencies(
    told_in: Path, stages: dict[str, Path], images: Callable[[], np.ndarray]
) -> list[Record]:
    """Time the files of all stages in turns, or read how long they took when they were timed.

    Args:
      told_in: the file that keeps it.
      stages: their files; one is dense.
      images: loads what the files are asked about, `[n, pixels]`.
    """
    if told_in.exists():
        return json.loads(told_in.read_text())["stages"]
    inputs = images()
    found: dict[str, Record] = {name: {"stage": name} for name in stages}
    for batch in LATENCY_BATCHES:
        calls = {name: device.call(path, inputs[:batch]) for name, path in stages.items()}
        seconds = timing.in_turns(calls, turns=LATENCY_TURNS)
        for name, taken in seconds.items():
            ratio = timing.paired_ratio(taken, seconds["dense"], seed=0)
            found[name][str(batch)] = {"ms": 1e3 * float(np.median(taken)), "ratio": ratio}
    told = {"machine": timing.machine(), "stages": list(found.values())}
    files.write(told_in, json.dumps(told, indent=2) + "\n")
    return told["stages"]
