"""What the benchmarks share: interleaved timing, the machine in words, a table, a JSON file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.timing import Task, in_turns, interleave, machine, paired_ratio

__all__ = (
    "Task",
    "in_turns",
    "interleave",
    "machine",
    "paired_ratio",
    "print_table",
    "write_json",
)


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
