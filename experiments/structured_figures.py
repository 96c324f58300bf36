"""Rows of small networks, and what they say about what cutting costs and buys."""

from collections.abc import Callable
from typing import Any

import numpy as np
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.common.runner import Record
from experiments.common.show import gap, mean, percent, plain, spread

SHARES = (1, 2, 5, 10, 20, 30, 50, 75, 100)  # ticks of an axis in percent of dense
STYLES = {"one_shot": ("#0072B2", "o"), "iterative": ("#009E73", "s")}
BARS = {"elinewidth": 1, "capsize": 2}
KEY = ("model", "method", "channels_removed", "layers_removed")
KINDS = ("channels", "layers")
FREE = 0.003  # accuracy that nobody misses


def key_of(record: Record) -> tuple[Any, ...]:
    """Say of which network, method and fractions a record tells."""
    return tuple(record[field] for field in KEY)


def summarise(records: list[Record], latencies: list[Record]) -> list[Record]:
    """Gather the seeds of every network, method and fraction.

    Args:
      records: of the training runs, the seeds in order.
      latencies: of the networks of the first seed; those of the dense ones are beside the others.

    Returns:
      A row for each, in order. Accuracy and loss are a mean, a standard deviation over the seeds
      (of the seeds themselves, divided by n) and the seeds; parameters and FLOPs are means.
      ``flops_ratio`` is relative to the dense network and that of the first seed, which is the one
      that was timed.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key_of(record), []).append(record)
    timed = {key_of(record): record for record in latencies}
    for model in models(records):
        beside = [record["dense_ms"] for record in latencies if record["model"] == model]
        one = {"median": 1.0, "low": 1.0, "high": 1.0}
        own = {"latency_ms": float(np.median(beside)), "latency_ratio": one}
        timed[model, "dense", 0.0, 0.0] = own
    return [
        {
            **dict(zip(KEY, key, strict=True)),
            **{metric: spread([r[metric] for r in group]) for metric in ("accuracy", "loss")},
            **{cost: mean(group, cost) for cost in ("parameters", "flops")},
            "flops_ratio": group[0]["flops"] / groups[key[0], "dense", 0.0, 0.0][0]["flops"],
            **{time: timed[key][time] for time in ("latency_ms", "latency_ratio")},
        }
        for key, group in groups.items()
    ]


def models(rows: list[Record]) -> list[str]:
    """Networks, in the order of the rows."""
    return list(dict.fromkeys(row["model"] for row in rows))


def methods(rows: list[Record]) -> list[str]:
    """Methods other than dense, in the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))


def dense(rows: list[Record], model: str) -> Record:
    """Find the row of a dense network."""
    return next(r for r in rows if (r["model"], r["method"]) == (model, "dense"))


def cut(rows: list[Record], model: str) -> list[Record]:
    """Rows of a network of which something is removed."""
    return [row for row in rows if row["model"] == model and row["method"] != "dense"]


def line(rows: list[Record], model: str, method: str, kind: str) -> list[Record]:
    """Rows of a method that remove ``channels`` or ``layers``, the fractions rising."""
    field = f"{kind}_removed"
    found = [r for r in rows if (r["model"], r["method"]) == (model, method) and r[field]]
    return sorted(found, key=lambda row: row[field])


def overhead(row: Record) -> float:
    """How many times longer a network takes than its FLOPs say."""
    return row["latency_ratio"]["median"] / row["flops_ratio"]


def share(row: Record) -> str:
    """Say what a row removes."""
    found = [kind for kind in KINDS if row[f"{kind}_removed"]]
    return " and ".join(f"{100 * row[f'{kind}_removed']:g} % {kind}" for kind in found) or "nothing"


def accuracy_table(rows: list[Record], *, title: str) -> rich.table.Table:
    """Lay out what each network gets right, a network a line."""
    columns = [("accuracy [%]", percent), ("loss", lambda row: f"{row['loss']['mean']:.3f}")]
    return _table(rows, columns, title=title, caption="Mean ± std.")


def cost_table(rows: list[Record], *, batch: int) -> rich.table.Table:
    """Lay out what is left of each network and how long it takes, a network a line."""
    columns = [
        ("parameters", lambda row: f"{row['parameters']:,.0f}"),
        ("MFLOPs", lambda row: f"{row['flops'] / 1e6:.2f}"),
        ("(%)", lambda row: f"{100 * row['flops_ratio']:.1f}"),
        ("ms", lambda row: f"{row['latency_ms']:.2f}"),
        ("(%)", lambda row: f"{100 * row['latency_ratio']['median']:.1f}"),
        ("over", lambda row: f"{overhead(row):.2f}"),
    ]
    caption = (
        f"Latency is that of a batch of {batch}; over: how many times what the FLOPs say, compared "
        "with dense."
    )
    return _table(rows, columns, title=None, caption=caption)


def _table(
    rows: list[Record],
    columns: list[tuple[str, Callable[[Record], str]]],
    *,
    title: str | None,
    caption: str,
) -> rich.table.Table:
    """Lines of cells, a section for each model; no wider than 80 columns."""
    lines = rich.table.Table(title=title, caption=caption, padding=0)
    for name in ("network", "method", "removed"):
        lines.add_column(name, no_wrap=True)
    for name, _ in columns:
        lines.add_column(name, justify="right", no_wrap=True)
    for model in models(rows):
        for row in (row for row in rows if row["model"] == model):
            cells = (cell(row) for _, cell in columns)
            lines.add_row(model, row["method"], share(row), *cells)
        lines.add_section()
    return lines


def answer(rows: list[Record], *, dataset: str) -> str:
    """Say in Markdown what small networks cost and buy; every word of it is read off the rows."""
    seeds = len(rows[0]["accuracy"]["seeds"])
    lines = [
        "# What cutting costs and buys",
        "",
        f"Images: {dataset}; text: Python's own help. Seeds: {seeds}. Accuracy is that on the test "
        "set in percent, mean±std over the seeds; differences are taken seed by seed. Every "
        "network, the dense one too, had the same number of training steps on the same batches.",
        *(line for model in models(rows) for line in _section(rows, model)),
    ]
    return "\n".join(lines) + "\n"


def _section(rows: list[Record], model: str) -> list[str]:
    base, small = dense(rows, model), cut(rows, model)
    by_what = sorted(small, key=lambda r: (r["layers_removed"], r["channels_removed"], r["method"]))
    return [
        "",
        f"## {model}",
        "",
        f"Dense: {percent(base)} %, {base['parameters']:,.0f} parameters, "
        f"{base['flops'] / 1e6:.2f} MFLOPs, {base['latency_ms']:.2f} ms.",
        "",
        "| removed | method | accuracy | lost | FLOPs | latency | latency over FLOPs |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {share(row)} | {row['method']} | {percent(row)} | {_points(base, row)} "
            f"| {100 * row['flops_ratio']:.1f} % | {100 * row['latency_ratio']['median']:.1f} % "
            f"| {overhead(row):.2f} |"
            for row in by_what
        ),
        "",
        *_free(small, base),
        *_rounds(rows, model),
        *_kinds(rows, model, base),
        *_clock(small),
    ]


def _points(row: Record, other: Record, sign: str = "") -> str:
    mean, std = gap(row, other)
    return f"{100 * mean:{sign}.2f}±{100 * std:.2f}"


def _free(small: list[Record], base: Record) -> list[str]:
    """The cheapest network that costs next to nothing."""
    found = [row for row in small if gap(base, row)[0] <= FREE]
    if not found:
        return [f"- Every network loses more than {100 * FREE:g} points."]
    best = min(found, key=lambda row: row["flops"])
    return [
        f"- Within {100 * FREE:g} points of dense, the fewest FLOPs has {best['method']}, "
        f"{share(best)} removed: {100 * best['flops_ratio']:.1f} % of the FLOPs, "
        f"{100 * best['latency_ratio']['median']:.1f} % of the latency."
    ]


def _rounds(rows: list[Record], model: str) -> list[str]:
    """Whether rounds beat a single cut."""
    if {"one_shot", "iterative"} - set(methods(rows)):
        return []
    one, other = (
        [row for kind in KINDS for row in line(rows, model, method, kind)]
        for method in ("iterative", "one_shot")
    )
    cells = [f"{_points(a, b, '+')} at {share(a)}" for a, b in zip(one, other, strict=True)]
    return [f"- iterative minus one_shot, in points: {', '.join(cells)}."]


def _kinds(rows: list[Record], model: str, base: Record) -> list[str]:
    """Layers against channels, for as many FLOPs as interpolation between the channels gives."""
    lines = []
    for method in methods(rows):
        channels = [base, *line(rows, model, method, "channels")]
        channels.sort(key=lambda other: other["flops"])
        flops = [np.log(other["flops"]) for other in channels]
        means = [other["accuracy"]["mean"] for other in channels]
        for row in line(rows, model, method, "layers"):
            if channels[0]["flops"] <= row["flops"]:
                there = np.interp(np.log(row["flops"]), flops, means)
                points = 100 * (row["accuracy"]["mean"] - there)
                lines.append(f"{points:+.2f} for {method} at {share(row)}")
    if not lines:
        return []
    return [
        "- Removing layers instead of channels, for as many FLOPs (accuracy interpolated along the "
        f"logarithm of the FLOPs), in points: {', '.join(lines)}."
    ]


def _clock(small: list[Record]) -> list[str]:
    """How much of what the FLOPs promise the clock keeps."""
    best, worst = min(small, key=overhead), max(small, key=overhead)
    return [
        f"- Latency is {overhead(best):.2f} ({best['method']}, {share(best)} removed) to "
        f"{overhead(worst):.2f} ({worst['method']}, {share(worst)} removed) times what the FLOPs "
        "say."
    ]


def tradeoff_figure(rows: list[Record]) -> Figure:
    """Draw accuracy, and below it latency, against FLOPs: a column a network."""
    names = models(rows)
    figure = Figure(figsize=(1 + 4.8 * len(names), 7.6), layout="constrained")
    panels = figure.subplots(2, len(names), squeeze=False, height_ratios=(1.25, 1))
    for (above, below), name in zip(panels.T, names, strict=True):
        draw_tradeoff(above, rows, name)
        draw_latency(below, rows, name)
        above.set_title(name)
        for axes in (above, below):
            axes.legend(loc="lower right", frameon=False)
    panels[0, 0].set_ylabel("test accuracy [%]")
    panels[1, 0].set_ylabel("latency [% of dense]")
    return figure


def draw_tradeoff(axes: Axes, rows: list[Record], model: str) -> None:
    """Draw accuracy against FLOPs: a line a method, broken where layers are removed."""
    base = dense(rows, model)
    height = 100 * base["accuracy"]["mean"]
    axes.axhline(height, color="0.35", linestyle="--", linewidth=1)
    for method in methods(rows):
        colour, marker = STYLES[method]
        for kind, style, face in (("channels", "-", colour), ("layers", ":", "white")):
            found = line(rows, model, method, kind)
            flops = [100 * row["flops_ratio"] for row in found]
            mean, std = ([100 * row["accuracy"][part] for row in found] for part in ("mean", "std"))
            if found:
                axes.plot([100, *flops], [height, *mean], style, color=colour, linewidth=1.5)
                look = {"markerfacecolor": face, "markersize": 6, "label": f"{method}, {kind}"}
                axes.errorbar(flops, mean, yerr=std, fmt=marker, color=colour, **BARS, **look)
    axes.plot(100, height, "D", color="0.35", markersize=6, label="dense")
    _share_axis(axes, [100 * row["flops_ratio"] for row in rows if row["model"] == model])
    plain(axes)


def draw_latency(axes: Axes, rows: list[Record], model: str) -> None:
    """Draw latency against FLOPs, and where they would be the same."""
    small = cut(rows, model)
    shares = [100, *(100 * row["flops_ratio"] for row in small)]
    ends = np.array([min(shares) / 1.3, 100])
    axes.plot(ends, ends, color="0.35", linewidth=1, label="as the FLOPs say")
    axes.plot(ends, 1.4 * ends, color="0.35", linewidth=1, linestyle=":", label="1.4 times that")
    for kind, colour, marker in zip(KINDS, ("#0072B2", "#D55E00"), "os", strict=True):
        found = [row for row in small if row[f"{kind}_removed"]]
        ratios = [row["latency_ratio"] for row in found]
        flops = [100 * row["flops_ratio"] for row in found]
        mid, low, high = (
            np.array([100 * ratio[part] for ratio in ratios]) for part in ("median", "low", "high")
        )
        if found:
            look = {"markersize": 5, "label": f"{kind} removed"}
            bars = [mid - low, high - mid]
            axes.errorbar(flops, mid, yerr=bars, fmt=marker, color=colour, **BARS, **look)
    ticks = _share_axis(axes, shares)
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    plain(axes)


def _share_axis(axes: Axes, shares: list[float]) -> list[int]:
    """Make an axis of FLOPs that is logarithmic; gives its ticks."""
    ticks = [tick for tick in SHARES if tick >= min(shares) / 1.3]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(shares) / 1.3, 115)
    axes.set_xlabel("FLOPs [% of dense]")
    return ticks
