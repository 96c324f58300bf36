"""Rows of networks with zeros of some kind, and which of them are worth it."""

import itertools
import math
from typing import Any

import numpy as np
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from experiments.common.runner import Record
from experiments.common.show import mean, plain, spread

STYLES = {  # colour and words of each kind
    "dense": ("#595959", "dense"),
    "unstructured": ("#999999", "single weights"),
    "n:m": ("#E69F00", "N:M"),
    "blocks_16": ("#CC79A7", "blocks of 16, balanced"),
    "blocks_64": ("#56B4E9", "blocks of 64, balanced"),
    "blocks_128": ("#0072B2", "blocks of 128, balanced"),
    "blocks_64_unbalanced": ("#D55E00", "blocks of 64, unbalanced"),
    "channels": ("#009E73", "channels, cut"),
}
MARKERS = "oD^sPvX"  # of the levels, in order
RUNTIMES = {"xla": "XLA", "onnxruntime": "onnxruntime, 1 thread"}
SHORT = {"xla": "XLA", "onnxruntime": "ort"}
METRICS = {"mlp": ("accuracy", "accuracy [%]"), "transformer": ("bits", "bits per character")}
LOSSES = {"accuracy": (0.5, 2.0), "bits": (0.05, 0.5)}  # that nobody misses, and that some do
FASTER = 1.2  # times as fast as dense; less may be noise
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5)  # ticks of an axis


def name_of(kind: str, level: float) -> str:
    """Name a condition.

    >>> name_of("dense", 0.0), name_of("n:m", 0.5), name_of("n:m", 0.875)
    ('dense', 'n:m 0.5', 'n:m 0.875')
    """
    return kind if kind == "dense" else f"{kind} {level:g}"


def summarise(records: list[Record], clocks: dict[str, Record]) -> list[Record]:
    """Gather the seeds of every condition, and what was measured of the first one.

    Returns:
      A row for each, in order. ``accuracy`` is in percent and ``bits`` is the loss in bits; both
      are a mean, a standard deviation over the seeds (divided by n) and the seeds.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record["model"], record["kind"], record["level"]), []).append(record)
    return [
        {
            **dict(zip(("model", "kind", "level"), key, strict=True)),
            "accuracy": spread([100 * record["accuracy"] for record in group]),
            "bits": spread([record["loss"] / math.log(2) for record in group]),
            "left": mean(group, "left"),
            **clocks[key[0]][name_of(*key[1:])],
        }
        for key, group in groups.items()
    ]


def of_model(rows: list[Record], model: str) -> list[Record]:
    """Rows of a network, the dense one first."""
    return [row for row in rows if row["model"] == model]


def metric_of(row: Record) -> Record:
    """Give what a network is judged by."""
    return row[METRICS[row["model"]][0]]


def lost(row: Record, dense: Record) -> tuple[float, float]:
    """Say by how much a row is worse than dense, seed by seed: mean and standard deviation."""
    gaps = np.subtract(metric_of(row)["seeds"], metric_of(dense)["seeds"])
    gaps = gaps if METRICS[row["model"]][0] == "bits" else -gaps
    return float(gaps.mean()), float(gaps.std())


def sizes(rows: list[Record]) -> list[str]:
    """The numbers of rows that were timed."""
    return list(rows[0]["xla"])


def removed(row: Record) -> str:
    """Say how much is removed."""
    ways = {0.0: "nothing", 0.5: "2:4"}
    if row["kind"] == "n:m" and row["level"] not in ways:
        return f"1:{round(1 / (1 - row['level']))}"
    return ways.get(row["level"], f"{100 * row['level']:.4g} %")


def speedup(row: Record, runtime: str, size: str) -> float:
    """Say how many times as fast as dense."""
    return 1 / row[runtime][size]["ratio"]["median"]


def table(rows: list[Record], model: str) -> rich.table.Table:
    """Lay out what each condition costs and buys."""
    own = of_model(rows, model)
    told = f"{model}: {METRICS[model][1]}, times as fast as dense, and the file"
    found = rich.table.Table(title=told, caption="Mean ± std over seeds; XLA on all threads.")
    for column in ("zeros", "removed"):
        found.add_column(column, no_wrap=True)
    clocks = [(runtime, size) for runtime in RUNTIMES for size in sizes(own)]
    names = [METRICS[model][0], *(f"{SHORT[r]} {size}" for r, size in clocks), "MB", "gzip"]
    for name in names:
        found.add_column(name, justify="right", no_wrap=True)
    for row in own:
        spread_ = metric_of(row)
        found.add_row(
            STYLES[row["kind"]][1],
            removed(row),
            f"{spread_['mean']:.2f}±{spread_['std']:.2f}",
            *(f"{speedup(row, *clock):.2f}" for clock in clocks),
            *(f"{row[size] / 1e6:.1f}" for size in ("bytes", "gzip_bytes")),
        )
    return found


def answer(rows: list[Record], *, dataset: str) -> str:
    """Say in Markdown which zeros are worth it; every word of it is read off the rows."""
    lines = [
        "# Which zeros make it faster",
        "",
        f"Images: {dataset}; text: Python's own help. Seeds: {len(rows[0]['bits']['seeds'])}. How "
        "many times as fast as the dense network, by rows of its products, on this machine; XLA on "
        "all threads, onnxruntime (ort) on one.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines += ["", f"## {model}", "", *_worth(of_model(rows, model))]
    return "\n".join(lines) + "\n"


def _worth(rows: list[Record]) -> list[str]:
    """What is fastest for what it costs, and what balance costs."""
    dense, *others = rows
    metric, words = METRICS[dense["model"]]
    value = metric_of(dense)
    return [
        f"Dense: {value['mean']:.2f}±{value['std']:.2f} {words}.",
        "",
        *(line for most in LOSSES[metric] for line in _fastest(others, dense, most)),
        *_balance(others),
    ]


def _fastest(rows: list[Record], dense: Record, most: float) -> list[str]:
    """The fastest of those that lose at most so much, each with the clocks that say so."""
    unit = {"accuracy": "points", "bits": "bits"}[METRICS[dense["model"]][0]]
    free, winners = [row for row in rows if lost(row, dense)[0] <= most], {}
    for runtime, size in itertools.product(RUNTIMES, sizes(rows)):
        best = max(free, key=lambda row: speedup(row, runtime, size), default=None)
        if best is not None and speedup(best, runtime, size) >= FASTER:
            name = f"{STYLES[best['kind']][1]}, {removed(best)} removed"
            cost = (
                f"{lost(best, dense)[0]:+.2f} {unit}, {best['bytes'] / dense['bytes']:.0%} of the"
            )
            said = f"{SHORT[runtime]} {size}: {speedup(best, runtime, size):.1f}"
            winners.setdefault(f"{name} ({cost} bytes)", []).append(said)
    if not winners:
        return [f"- Nothing that loses at most {most:g} {unit} is faster."]
    found = "; ".join(f"{name}: times {', '.join(all_)}" for name, all_ in winners.items())
    return [f"- Fastest of what loses at most {most:g} {unit}: {found}."]


def _balance(rows: list[Record]) -> list[str]:
    """What it costs that all columns keep as many blocks."""
    by = {(row["kind"], row["level"]): row for row in rows}
    pairs = [(row, by.get(("blocks_64_unbalanced", level))) for (k, level), row in by.items()
             if k == "blocks_64"]  # fmt: skip
    costs = [f"{lost(a, b)[0]:+.2f} at {removed(a)}" for a, b in pairs if b is not None]
    return [f"- What balance costs of blocks of 64: {', '.join(costs)}."] if costs else []


def worth_figure(rows: list[Record]) -> Figure:
    """Draw what a network is worth against its latency: a row a network, a column a size."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    clocks = [("xla", size) for size in sizes(rows)] + [("onnxruntime", sizes(rows)[0])]
    wide, high = 3.4 * len(clocks), 3.5 * len(models) + 1.1
    figure = Figure(figsize=(wide, high), layout="constrained")
    panels = figure.subplots(len(models), len(clocks), squeeze=False, sharey="row", sharex=True)
    levels = sorted({row["level"] for row in rows if row["kind"] != "dense"})
    for line, model in zip(panels, models, strict=True):
        for axes, clock in zip(line, clocks, strict=True):
            _draw(axes, of_model(rows, model), levels, *clock)
        line[0].set_ylabel(f"{model}: {METRICS[model][1]}")
        if METRICS[model][0] == "bits":
            line[0].invert_yaxis()  # up is better
    for axes, (runtime, size) in zip(panels[0], clocks, strict=True):
        axes.set_title(f"{RUNTIMES[runtime]}: {size} row{'s' * (size != '1')}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("latency / dense")
    _share_axis(panels, rows, clocks)
    handles = _legend(rows, levels)
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _draw(axes: Axes, rows: list[Record], levels: list[float], runtime: str, size: str) -> None:
    """Draw the conditions of a network: a line a kind, a marker a level."""
    dense, *others = rows
    axes.axhline(metric_of(dense)["mean"], color="0.35", linestyle="--", linewidth=1)
    axes.axvline(1, color="0.35", linestyle="--", linewidth=1)
    for kind in dict.fromkeys(row["kind"] for row in others):
        found = [row for row in others if row["kind"] == kind]
        ratios = [row[runtime][size]["ratio"]["median"] for row in found]
        middle = [metric_of(row)["mean"] for row in found]
        colour = STYLES[kind][0]
        axes.plot(ratios, middle, color=colour, linewidth=1, alpha=0.6)
        for row, ratio in zip(found, ratios, strict=True):
            value, marker = metric_of(row), MARKERS[levels.index(row["level"])]
            axes.errorbar(
                ratio, value["mean"], yerr=value["std"], fmt=marker, color=colour, markersize=6
            )
    plain(axes)


def _share_axis(panels: Any, rows: list[Record], clocks: list[tuple[str, str]]) -> None:
    ratios = [row[r][size]["ratio"]["median"] for row in rows for r, size in clocks]
    low, high = min(ratios) / 1.2, max(ratios) * 1.2
    ticks = [tick for tick in RATIOS if low <= tick <= high]
    for axes in panels.ravel():
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())


def _legend(rows: list[Record], levels: list[float]) -> list[Line2D]:
    """Name colours, then markers."""
    kinds = [k for k in STYLES if any(row["kind"] == k for row in rows if k != "dense")]
    colours = [Line2D([], [], color=STYLES[k][0], linewidth=3, label=STYLES[k][1]) for k in kinds]
    shapes = [
        Line2D([], [], color="0.3", marker=m, linestyle="", label=f"{100 * level:.4g} % removed")
        for m, level in zip(MARKERS, levels, strict=False)
    ]
    return [*colours, *shapes, Line2D([], [], color="0.35", linestyle="--", label="dense")]
