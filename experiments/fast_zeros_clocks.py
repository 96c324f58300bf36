"""What a user would deploy of each network, as a file and on the clock."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import jaxprune as jp
from experiments.common import device, files, timing, train
from experiments.common.runner import Record
from experiments.fast_zeros_networks import Task

RUNTIMES = ("xla", "onnxruntime")
Named = dict[str, tuple[Any, Any]]  # function and params, by the name of a condition


def measured(told_in: Path, task: Callable[[], tuple[Task, Named]], **settings: Any) -> Any:
    """Measure all that is deployed of a network, or read what was measured before.

    Args:
      told_in: the file that keeps it.
      task: loads a network, and what is deployed of it, of which ``dense`` is one.
      settings: of :func:`measure`.

    Returns:
      By the names of the conditions ``bytes`` and ``gzip_bytes`` of the ONNX file, and under each
      of the runtimes ``ms`` and ``ratio`` to dense by the number of rows.
    """
    if not told_in.exists():
        found = measure(*task(), **settings)
        told = {"machine": timing.machine(), "networks": found}
        files.write(told_in, json.dumps(told, indent=2) + "\n")
    return json.loads(told_in.read_text())["networks"]


def measure(task: Task, networks: Named, *, rows: tuple[int, ...], turns: int) -> Record:
    """Write a file for each, and let all take turns under XLA and onnxruntime, one size at a time.

    XLA has all threads of this machine, onnxruntime one.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{i}.onnx" for i, name in enumerate(networks)}
        bar = tqdm(networks.items(), unit="file", desc="files")
        found = {name: _sizes(paths[name], task, *network) for name, network in bar}
        compile_ = train.compiler()  # what multiplies with zeros is one program for all
        for count in tqdm(rows, unit="size", desc="clocks"):
            inputs = task.rows(count)
            calls = {
                "xla": {n: _call(compile_, *network, inputs) for n, network in networks.items()},
                "onnxruntime": {n: device.call(path, inputs) for n, path in paths.items()},
            }
            for runtime, of_runtime in calls.items():
                for name, told in _in_turns(of_runtime, turns).items():
                    found[name].setdefault(runtime, {})[str(count)] = told
    return found


def _sizes(path: Path, task: Task, fn: Any, params: Any) -> Record:
    """Export, compare with JAX, and weigh."""
    inputs = task.test.inputs[:2]
    report = jp.export.onnx(path, fn, params, inputs, shapes=task.shapes, latency=())
    return {"bytes": report.bytes, "gzip_bytes": report.gzip_bytes}


def _call(compile_: train.Compile, fn: Any, params: Any, inputs: np.ndarray) -> timing.Task:
    run = compile_(fn, params, inputs)
    params, inputs = jax.device_put((params, inputs))
    return lambda: jax.block_until_ready(run(params, inputs))


def _in_turns(calls: dict[str, timing.Task], turns: int) -> dict[str, Record]:
    seconds = timing.in_turns(calls, turns=turns)
    return {
        name: {
            "ms": 1e3 * float(np.median(taken)),
            "ratio": timing.paired_ratio(taken, seconds["dense"], seed=0),
        }
        for name, taken in seconds.items()
    }
