"""What the benchmarks share: interleaved timing, the machine in words, a table, a JSON file."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

Task = Callable[[], Any]


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


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write ``result`` to ``path``, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: names on the left, numbers on the right."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # A pipe has no width of its own, and 80 columns would cut the numbers.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
