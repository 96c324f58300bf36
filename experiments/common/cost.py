"""What a task costs: CPU time and memory of this process."""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
UNIT = 1 if sys.platform == "darwin" else 1024  # of getrusage, in bytes


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a task took.

    Attributes:
      cpu_seconds: of all threads, compiling too.
      seconds: on the clock.
      peak_gb: most memory that the process held at a time, in 10^9 bytes.
      above_gb: the same, less what it held before.
    """

    cpu_seconds: float
    seconds: float
    peak_gb: float
    above_gb: float


def measured(task: Callable[[], Any]) -> tuple[Any, Cost]:
    """Run a task, which has to wait for its own result.

    The peak is that of the task where Linux lets it be reset, else that of the process so far.
    """
    _reset_peak()
    before, cpu, clock = _memory("VmRSS"), time.process_time(), time.perf_counter()
    result = task()
    seconds = time.process_time() - cpu, time.perf_counter() - clock
    peak = _memory("VmHWM")
    return result, Cost(*seconds, peak / 1e9, (peak - before) / 1e9)


def _reset_peak() -> None:
    try:
        CLEAR.write_text("5")
    except OSError:  # not Linux, or not allowed
        return


def _memory(field: str) -> int:
    """Read a line of the process's status, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
