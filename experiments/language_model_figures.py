"""Rows of pruned language models, and what they look like."""

import math
from collections.abc import Callable

import numpy as np
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

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

    Sparsities of single weights are joined by a line; N:M stand beside them.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    weights, structure = figure.subplots(1, 2)
    single = [row for row in rows if row["part"] == "weights"]
    amounts = sorted({row["amount"] for row in single}, key=lambda a: (":" in a, a))
    places = {amount: float(i) for i, amount in enumerate(amounts)}
    free = [row for row in single if ":" not in row["amount"]]
    fixed = [row for row in single if ":" in row["amount"]]
    _lines(weights, free, lambda row: places[row["amount"]], named=True)
    _lines(weights, fixed, lambda row: places[row["amount"]], named=not free)
    weights.set_xticks(list(places.values()), list(map(_label, places)))
    weights.set(title="single weights", xlabel="removed of each kernel, or N:M that stay")
    whole = [row for row in rows if row["part"] in ("neurons", "blocks")]
    _lines(structure, whole, lambda row: 100 * (1 - row["left"]), named=True)
    structure.set(title="neurons and layers", xlabel="removed of all layers [%]")
    for axes in (weights, structure):
        dense = rows[0]["perplexity"]
        axes.axhline(dense, color="0.35", linestyle="--", linewidth=1, label="dense")
        axes.set(yscale="log", ylabel="perplexity")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False, fontsize=8)
        plain(axes)
    return figure


def _label(amount: str) -> str:
    return amount if ":" in amount else f"{100 * float(amount):g} %"


def _lines(
    axes: Axes, rows: list[Record], place: Callable[[Record], float], *, named: bool
) -> None:
    """Draw the rows of each method of each part; those of N:M hollow and by themselves."""
    for part, method in dict.fromkeys((row["part"], row["method"]) for row in rows):
        colour, marker = STYLES[method]
        own = [row for row in rows if (row["part"], row["method"]) == (part, method)]
        own = sorted(own, key=place)
        alone = ":" in own[0]["amount"]
        name = method if part == "weights" else f"{part}, {method}"
        axes.errorbar(
            [place(row) for row in own],
            [row["perplexity"] for row in own],
            [row["error"] for row in own],
            fmt=marker,
            linestyle="none" if alone else "--" if part == "blocks" else "-",
            color=colour,
            markerfacecolor="none" if alone else colour,
            capsize=2,
            label=name if named else None,
        )
