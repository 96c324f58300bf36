"""Rows of small networks, and what they say about what cutting costs and buys."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.common.runner import Record
from experiments.common.show import gap, mean, percent, plain, spread

SHARES = (1, 2, 5, 10, 20, 30, 50, 75, 100)  # ticks of an axis in percent of dense
STYLES = {"one_shot": ("#0072B2", "o"), "iterative": ("#009E73", "s")}
KEY = ("model", "method", "channels_removed", "layers_removed")
FREE = 0.003  # accuracy that nobody misses


def key_of(record: Record) -> tuple[str, str, float, float]:
    """Say of which network, method and fractions a record tells."""
    return tuple(record[field] for field in KEY)


def summarise(records: list[Record], latencies: list[Record]) -> list[Record]:
    """Gather the seeds of every network, method and fraction.

    Args:
      records: of the training runs.
      latencies: of the networks of the first seed; those of the dense ones are beside the others.

    Returns:
      A row for each, in order. Accuracy and loss are a mean, a standard deviation over the seeds
      (of the seeds themselves, divided by n) and the seeds; parameters and FLOPs are means.
      ``flops_ratio`` is relative to the dense network and that of the first seed, which is the one
      that was timed.
    """
    groups: dict[tuple[str, str, float, float], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        groups.setdefault(key_of(record), []).append(record)
    timed = {key_of(record): record for record in latencies}
    rows = []
    for key in dict.fromkeys(map(key_of, records)):
        group, dense = groups[key], groups[key[0], "dense", 0.0, 0.0]
        rows.append(
            {
                **dict(zip(KEY, key, strict=True)),
                **{m: spread([record[m] for record in group]) for m in ("accuracy", "loss")},
                "parameters": mean(group, "parameters"),
                "flops": mean(group, "flops"),
                "flops_ratio": group[0]["flops"] / dense[0]["flops"],
                **_times(timed, key),
            }
        )
    return rows


def _times(timed: dict[tuple[str, str, float, float], Record], key: tuple[str, ...]) -> Record:
    if key[1] != "dense":
        return {field: timed[key][field] for field in ("latency_ms", "latency_ratio")}
    beside = [record["dense_ms"] for record in timed.values() if record["model"] == key[0]]
    one = {"median": 1.0, "low": 1.0, "high": 1.0}
    return {"latency_ms": float(np.median(beside)), "latency_ratio": one}


def models(rows: list[Record]) -> list[str]:
    """Networks, in the order of the rows."""
    return list(dict.fromkeys(row["model"] for row in rows))


def methods(rows: list[Record]) -> list[str]:
    """Methods other than dense, in the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))


def dense(rows: list[Record], model: str) -> Record:
    """Find the row of a dense network."""
    return next(r for r in rows if (r["model"], r["method"]) == (model, "dense"))


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
    kinds = [kind for kind in ("channels", "layers") if row[f"{kind}_removed"]]
    return " and ".join(f"{100 * row[f'{kind}_removed']:g} % {kind}" for kind in kinds) or "nothing"


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
    base = dense(rows, model)
    small = [row for row in rows if row["model"] == model and row["method"] != "dense"]
    return [
        "",
        f"## {model}",
        "",
        f"Dense: {percent(base)} %, {base['parameters']:,.0f} parameters, "
        f"{base['flops'] / 1e6:.2f} MFLOPs, {base['latency_ms']:.2f} ms.",
        "",
        "| removed | method | accuracy | lost | FLOPs | latency | latency over FLOPs |",
        "|---|---|---|---|---|---|---|",
        *(_table_line(row, base) for row in sorted(small, key=_by_what)),
        "",
        *_free(small, base),
        *_rounds(rows, model),
        *_kinds(rows, model, base),
        *_clock(small),
    ]


def _by_what(row: Record) -> tuple[float, float, str]:
    return row["layers_removed"], row["channels_removed"], row["method"]


def _table_line(row: Record, base: Record) -> str:
    mean, std = gap(base, row)
    cells = [
        share(row),
        row["method"],
        percent(row),
        f"{100 * mean:.2f}±{100 * std:.2f}",
        f"{100 * row['flops_ratio']:.1f} %",
        f"{100 * row['latency_ratio']['median']:.1f} %",
        f"{overhead(row):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


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
    pairs = [
        pair
        for kind in ("channels", "layers")
        for pair in zip(
            line(rows, model, "iterative", kind), line(rows, model, "one_shot", kind), strict=True
        )
    ]
    cells = [_difference(one, other) for one, other in pairs]
    return [f"- iterative minus one_shot, in points: {', '.join(cells)}."]


def _difference(one: Record, other: Record) -> str:
    mean, std = gap(one, other)
    return f"{100 * mean:+.2f}±{100 * std:.2f} at {share(one)}"


def _kinds(rows: list[Record], model: str, base: Record) -> list[str]:
    """Layers against channels, for as many FLOPs as interpolation between the channels gives."""
    lines = []
    for method in methods(rows):
        channels = [base, *line(rows, model, method, "channels")]
        channels.sort(key=lambda other: other["flops"])
        for row in line(rows, model, method, "layers"):
            if channels[0]["flops"] <= row["flops"]:
                there = np.interp(
                    np.log(row["flops"]),
                    [np.log(other["flops"]) for other in channels],
                    [other["accuracy"]["mean"] for other in channels],
                )
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
    best, *_, worst = sorted([small[0], *small], key=overhead)
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
    for column, name in enumerate(names):
        above, below = panels[:, column]
        draw_tradeoff(above, rows, name)
        draw_latency(below, rows, name)
        above.set_title(name)
        above.legend(loc="lower right", frameon=False)
        below.legend(loc="lower right", frameon=False)
    panels[0, 0].set_ylabel("test accuracy [%]")
    panels[1, 0].set_ylabel("latency [% of dense]")
    return figure


def draw_tradeoff(axes: Axes, rows: list[Record], model: str) -> None:
    """Draw accuracy against FLOPs: a line a method, broken where layers are removed."""
    base = dense(rows, model)
    axes.axhline(100 * base["accuracy"]["mean"], color="0.35", linestyle="--", linewidth=1)
    for method in methods(rows):
        colour, marker = STYLES[method]
        for kind, style, face in (("channels", "-", colour), ("layers", ":", "white")):
            found = [base, *line(rows, model, method, kind)]
            flops = [100 * row["flops_ratio"] for row in found]
            mean = [100 * row["accuracy"]["mean"] for row in found]
            std = [100 * row["accuracy"]["std"] for row in found]
            if len(found) > 1:
                axes.plot(flops, mean, style, color=colour, linewidth=1.5)
                axes.errorbar(
                    flops[1:],
                    mean[1:],
                    yerr=std[1:],
                    fmt=marker,
                    color=colour,
                    markerfacecolor=face,
                    markersize=6,
                    elinewidth=1,
                    capsize=2,
                    label=f"{method}, {kind}",
                )
    axes.plot(100, 100 * base["accuracy"]["mean"], "D", color="0.35", markersize=6, label="dense")
    _share_axis(axes, [100 * row["flops_ratio"] for row in rows if row["model"] == model])
    plain(axes)


def draw_latency(axes: Axes, rows: list[Record], model: str) -> None:
    """Draw latency against FLOPs, and where they would be the same."""
    small = [row for row in rows if row["model"] == model and row["method"] != "dense"]
    shares = [100, *(100 * row["flops_ratio"] for row in small)]
    ends = np.array([min(shares) / 1.3, 100])
    axes.plot(ends, ends, color="0.35", linewidth=1, label="as the FLOPs say")
    axes.plot(ends, 1.4 * ends, color="0.35", linewidth=1, linestyle=":", label="1.4 times that")
    for kind, colour, marker in (("channels", "#0072B2", "o"), ("layers", "#D55E00", "s")):
        found = [row for row in small if row[f"{kind}_removed"]]
        flops = [100 * row["flops_ratio"] for row in found]
        ratios = [row["latency_ratio"] for row in found]
        mid, low, high = (
            np.array([100 * ratio[part] for ratio in ratios]) for part in ("median", "low", "high")
        )
        if found:
            axes.errorbar(
                flops,
                mid,
                yerr=[mid - low, high - mid],
                fmt=marker,
                color=colour,
                markersize=5,
                elinewidth=1,
                capsize=2,
                label=f"{kind} removed",
            )
    _share_axis(axes, shares)
    axes.set_yscale("log")
    ticks = [tick for tick in SHARES if tick >= min(shares) / 1.3]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    plain(axes)


def _share_axis(axes: Axes, shares: list[float]) -> None:
    ticks = [tick for tick in SHARES if tick >= min(shares) / 1.3]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(shares) / 1.3, 115)
    axes.set_xlabel("FLOPs [% of dense]")
