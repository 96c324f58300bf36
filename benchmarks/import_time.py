"""CPU time that `import jaxprune` takes, over `import jax, optax`, which it cannot do without.

    python -m benchmarks.import_time

Each turn is a fresh process, and all take turns; the sources are compiled beforehand, as they are
after the first import.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import interleave, machine, paired_ratio, print_table, write_json

IMPORTS = {
    "jax, optax": "import jax, optax",
    "jax, optax, measured twice": "import jax, optax",
    "jaxprune": "import jax, optax, jaxprune",
    "what one line takes": "import jax, optax, jaxprune as jp; jp.prune; jp.schedules.cubic",
    "every name": "import jax, optax, jaxprune as jp; [getattr(jp, name) for name in jp.__all__]",
}
BARE = "jax, optax"
MOST = 1.15  # what we allow ourselves


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      turns: processes of every contestant.
      seed: of the bootstrap.
      out: JSON file to write.
    """

    turns: int = 15
    seed: int = 0
    out: Path = Path("results/benchmarks/import_time.json")


def start(code: str) -> None:
    """Run a program in a fresh process, which may keep what it compiles of its sources."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", code], check=True, env=kept)


def seconds_of_children() -> float:
    """CPU seconds of all processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main(config: Config) -> dict[str, Any]:
    tasks = {name: functools.partial(start, code) for name, code in IMPORTS.items()}
    for task in tasks.values():
        task()
    seconds = interleave(tasks, dict.fromkeys(tasks, config.turns), seconds_of_children)
    bare = seconds.pop(BARE)
    over = {name: paired_ratio(turns, bare, seed=config.seed) for name, turns in seconds.items()}
    print_table(
        f"CPU time over that of `{IMPORTS[BARE]}`, median [95 %]; at most {MOST} is allowed",
        ["import", "over jax, optax"],
        [[n, f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"] for n, r in over.items()],
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, "most": MOST, "over_jax_and_optax": over}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
