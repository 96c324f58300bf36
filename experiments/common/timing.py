"""How long things take: in turns, as ratios, on a machine in words; for benchmarks too."""

import functools
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

Task = Callable[[], Any]
BLOCK = 0.01  # seconds of calls in a row, of which only the first finds the caches cold


def interleave(
    tasks: Mapping[str, Task],
    repeats: Mapping[str, int],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time tasks in turns (A B C A B C), so that a busy spell of the machine hits all of them.

    Every other round runs backwards: nobody always comes after the same neighbour, who may leave
    the caches cold.

    Args:
      tasks: what to time, by name; each has to wait for its own result.
      repeats: turns of each task; one that has had its turns sits out.
      clock: seconds; ``time.process_time`` counts those of all threads.

    Returns:
      Seconds of each turn, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(max(repeats.values())):
        names = [name for name in tasks if turn < repeats[name]]
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            start = clock()
            tasks[name]()
            seconds[name].append(clock() - start)
    return seconds


def paired_ratio(
    ours: Sequence[float], base: Sequence[float], *, seed: int, draws: int = 2000
) -> dict[str, float]:
    """Compare two tasks turn by turn: the median ratio and its 95 % bootstrap interval.

    Args:
      ours: seconds of each turn.
      base: seconds of the same turns of what it is divided by.
      seed: of the bootstrap.
      draws: resamples of the turns.

    Returns:
      ``median``, ``low`` and ``high``.
    """
    ratios = np.asarray(ours) / np.asarray(base)
    picks = np.random.default_rng(seed).integers(len(ratios), size=(draws, len(ratios)))
    low, high = np.quantile(np.median(ratios[picks], axis=1), [0.025, 0.975])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def machine() -> dict[str, Any]:
    """Describe what the numbers were measured on, in words that travel."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "backend": jax.default_backend(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "numpy": np.__version__,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def call(infer: Callable[[Any, Any], jax.Array], variables: Any, inputs: Any) -> Task:
    """Compile an inference, and make what runs it and waits for the result."""
    run = jax.jit(infer).lower(variables, inputs).compile()
    variables, inputs = jax.device_put((variables, inputs))
    return lambda: jax.block_until_ready(run(variables, inputs))


def compare(small: Task, dense: Task, *, turns: int) -> dict[str, Any]:
    """Time blocks of calls of a small network and of the dense one in turns.

    Returns:
      ``latency_ms`` of a call of the small network and ``dense_ms`` of the dense one, both medians,
      and ``latency_ratio``: the median ratio of the turns with its 95 % interval.
    """
    per_call = in_turns({"small": small, "dense": dense}, turns=turns)
    return {
        "latency_ms": 1e3 * float(np.median(per_call["small"])),
        "dense_ms": 1e3 * float(np.median(per_call["dense"])),
        "latency_ratio": paired_ratio(per_call["small"], per_call["dense"], seed=0),
    }


def in_turns(calls: dict[str, Task], *, turns: int) -> dict[str, np.ndarray]:
    """Time blocks of calls in turns; seconds of a call `[turns]`, by name."""
    each = {name: math.ceil(BLOCK / _seconds(run)) for name, run in calls.items()}
    blocks = {name: functools.partial(_repeat, run, each[name]) for name, run in calls.items()}
    seconds = interleave(blocks, dict.fromkeys(blocks, turns))
    return {name: np.array(taken) / each[name] for name, taken in seconds.items()}


def _seconds(run: Task) -> float:
    """The shortest of three calls."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _repeat(run: Task, times: int) -> None:
    for _ in range(times):
        run()
