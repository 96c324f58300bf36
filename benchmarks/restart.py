"""Time how soon a killed experiment goes on: from the start of its process to a new record.

    python -m benchmarks.restart

Each experiment is started in a temporary folder, killed by SIGKILL when it has written its second
record, and put back to where it has one. From there it is started again with the same command and
killed at the same record: with the programs that it has kept, and without them. What is timed
holds the training of that record too. Only for Unix, as the CPU time of a killed process is asked
for.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.common import machine, print_table, write_json

Experiment = Literal["lottery_ticket", "compare_methods", "structured"]
TOYS: dict[Experiment, str] = {
    "lottery_ticket": "--levels 3 --steps 60 --seeds 2 --eval-every 20",
    "compare_methods": "--methods gradual rigl --sparsities 0.8 0.95 --seeds 2 --steps 60",
    "structured": "--models cnn --channels 0.5 --layers 0.5 --steps 20 --fine-tune-steps 20",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      experiments: which.
      sizes: toy, as in CI, and default, as without options.
      turns: restarts with and without programs, in turns.
      out: JSON file to write.
    """

    experiments: tuple[Experiment, ...] = tuple(TOYS)
    sizes: tuple[Literal["toy", "default"], ...] = ("toy", "default")
    turns: int = 3
    out: Path = Path("results/benchmarks/restart.json")


def until_record(
    number: int, command: list[str], folder: Path, *, keep: bool = True
) -> dict[str, float]:
    """Start an experiment, kill it at a record, and tell the seconds that it has taken."""
    metrics = folder / "run" / "metrics.jsonl"
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": str(keep),
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--out", str(folder / "run")],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} has ended before it wrote a record.")
        time.sleep(0.01)
    wall = time.perf_counter() - start
    process.send_signal(signal.SIGKILL)
    usage = os.wait4(process.pid, 0)[2]
    process.returncode = -signal.SIGKILL  # it has been waited for
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime}


def measure(config: Config, experiment: Experiment, size: str) -> dict[str, Any]:
    """Kill and restart an experiment, with its programs and without."""
    options = TOYS[experiment].split() if size == "toy" else []
    command = [sys.executable, "-m", f"experiments.{experiment}", *options]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics = folder / "run" / "metrics.jsonl"
        taken = {"first start": [until_record(1, command, folder)], "kept": [], "without": []}
        one = metrics.read_bytes().splitlines(keepends=True)[0]  # others may have come with it
        for kind in ("", *config.turns * ("kept", "without")):
            metrics.write_bytes(one)
            seconds = until_record(2, command, folder, keep=kind != "without")
            if kind:  # and not the time that leaves the programs
                taken[kind].append(seconds)
    medians = {
        kind: {clock: float(np.median([each[clock] for each in turns])) for clock in turns[0]}
        for kind, turns in taken.items()
    }
    return {"experiment": experiment, "size": size, "seconds": medians}


def main(config: Config) -> dict[str, Any]:
    cases = [measure(config, name, size) for name in config.experiments for size in config.sizes]
    shown = "{wall:.1f} ({cpu:.1f})"
    print_table(
        f"Seconds from start to a new record (CPU seconds): median of {config.turns} restarts",
        ["experiment", "first start", "restart, programs kept", "without"],
        [
            [
                f"{case['experiment']}, {case['size']}",
                *(shown.format(**seconds) for seconds in case["seconds"].values()),
            ]
            for case in cases
        ],
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, "cases": cases}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
