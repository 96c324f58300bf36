"""Rows of pruned language models, and what they look like."""

import math

import numpy as np
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.runner import Record
from experiments.common.show import plain

STYLES = {
    "dense": ("#595959", ""),
    "magnitude": ("#999999", "v"),
    "wanda": ("#E69F00", "o"),
    "ria": ("#CC79A7", "P"),
    "sparsegpt": ("#0072B2", "s"),
    "admm": ("#009E73", "D"),
    "admm_dense": ("#D55E00", "^"),
    "taylor": ("#56B4E9", "v"),
    "influence": ("#0072B2", "s"),
    "influence_refit": ("#D55E00", "^"),
}


PARTS = ("nothing", "weights", "neurons", "blocks")


def summarise(records: list[Record]) -> list[Record]:
    """Put figures on every condition, in whatever order they were met.

    Returns:
      A row for each, the dense network first, then by part, amount and method. ``error`` is the
      standard error of the perplexity's distance to the dense one: windows are hard or easy for
      both, so it is taken from differences between losses of the same window; infinite of one.
    """

    def place(record: Record) -> tuple[int, str, int]:
        return PARTS.index(record["part"]), record["amount"], list(STYLES).index(record["method"])

    records = sorted(records, key=place)
    dense = np.array(records[0]["losses"])
    return [_row(record, dense) for record in records]


def _row(record: Record, dense: np.ndarray) -> Record:
    lost = np.array(record["losses"])
    perplexity = math.exp(min(lost.mean(), 700.0))  # what follows is infinite in float64
    spread = np.std(lost - dense, ddof=1) / math.sqrt(len(lost)) if len(lost) > 1 else math.inf
    kept = {key: value for key, value in record.items() if key != "losses"}
    return {**kept, "perplexity": perplexity, "error": perplexity * float(spread)}


def table(rows: list[Record], *, title: str) -> rich.table.Table:
    """Lay out what each condition costs, a condition a line."""
    found = rich.table.Table(title=title, caption="± standard error of the distance to dense.")
    for name in ("removed", "method", "amount"):
        found.add_column(name)
    for name in ("perplexity", "left [%]", "CPU s", "peak GB"):
        found.add_column(name, justify="right")
    for row, before in zip(rows, [None, *rows], strict=False):
        if before is not None and before["part"] != row["part"]:
            found.add_section()
        found.add_row(
            row["part"],
            row["method"],
            row["amount"],
            f"{row['perplexity']:.4g} ± {row['error']:.2g}",
            f"{100 * row['left']:.1f}",
            f"{row['cpu_seconds']:.0f}",
            f"{row['peak_gb']:.1f}",
        )
    return found


def perplexity_figure(rows: list[Record]) -> Figure:
    """Draw the perplexity against what is removed: single weights left, neurons and layers right.

    N:M is drawn as hollow marks beside the line of its method.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    weights, structure = figure.subplots(1, 2)
    _lines(weights, [row for row in rows if row["part"] == "weights"], rows[0])
    _lines(structure, [row for row in rows if row["part"] in ("neurons", "blocks")], rows[0])
    weights.set(title="single weights", xlabel="weights removed of all layers [%]")
    structure.set(title="neurons and layers", xlabel="weights removed of all layers [%]")
    return figure


def _lines(axes: Axes, rows: list[Record], dense: Record) -> None:
    """Draw a line for each method of each part."""
    axes.axhline(dense["perplexity"], color="0.35", linestyle="--", linewidth=1, label="dense")
    for part, method in dict.fromkeys((row["part"], row["method"]) for row in rows):
        colour, marker = STYLES[method]
        own = [row for row in rows if (row["part"], row["method"]) == (part, method)]
        free = sorted((r for r in own if ":" not in r["amount"]), key=lambda row: row["left"])
        name = method if part == "weights" else f"{part}, {method}"
        style = "--" if part == "blocks" else "-"
        axes.errorbar(*_points(free), fmt=marker + style, color=colour, capsize=2, label=name)
        for row in (row for row in own if ":" in row["amount"]):
            axes.errorbar(*_points([row]), fmt=marker, color=colour, mfc="none", capsize=2)
            place = 100 * (1 - row["left"]), row["perplexity"]
            axes.annotate(row["amount"], place, (5, -3), fontsize=7, textcoords="offset points")
    axes.set(yscale="log", ylabel="perplexity")
    axes.legend(frameon=False, fontsize=8)
    plain(axes)


def _points(rows: list[Record]) -> tuple[list[float], list[float], list[float]]:
    """Where rows lie: percent removed, perplexity, its error."""
    removed = [100 * (1 - row["left"]) for row in rows]
    return removed, [row["perplexity"] for row in rows], [row["error"] for row in rows]
