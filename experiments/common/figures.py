"""Figures of the experiments; each function draws on axes or makes one figure."""

import io
from collections.abc import Callable

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.common import comparison, deployment, results, tradeoff
from experiments.common.runs import Record

# Okabe and Ito's colours, which all eyes can tell apart.
COLOURS = {"ticket": "#0072B2", "reinit": "#D55E00", "shuffle": "#009E73", "random": "#CC79A7"}
# A method keeps its colour and marker in all figures; within a family both differ.
STYLES = {
    "dense": ("0.35", "_"),
    "one_shot": ("#0072B2", "o"),
    "iterative": ("#009E73", "s"),
    "iterative_one_shot": ("#56B4E9", "D"),
    "gradual": ("#D55E00", "^"),
    "ac_dc": ("#CC79A7", "v"),
    "straight_through": ("#E69F00", "P"),
    "rigl": ("#D55E00", "o"),
    "set": ("#0072B2", "s"),
    "static": ("#009E73", "^"),
    "random_init": ("#000000", "x"),
    "magnitude_init": ("#56B4E9", "D"),
    "snip": ("#D55E00", "o"),
    "grasp": ("#009E73", "^"),
    "synflow": ("#0072B2", "s"),
}
# Stages on the way to a device; files in int8 are squares of the colour of their float file.
STAGES = {
    "dense": ("0.35", "o"),
    "quantized": ("0.35", "s"),
    "pruned_one_shot": ("#56B4E9", "v"),
    "pruned_iterative": ("#56B4E9", "^"),
    "pruned": ("#0072B2", "o"),
    "pruned_distilled": ("#D55E00", "o"),
    "pruned_distilled_quantized": ("#D55E00", "s"),
    "thin_from_scratch": ("#000000", "x"),
    "distilled": ("#009E73", "D"),
    "searched": ("#CC79A7", "o"),
    "searched_quantized": ("#CC79A7", "s"),
}

SHARES = (1, 2, 5, 10, 20, 30, 50, 75, 100)  # ticks of an axis in percent of dense


def accuracy_figure(rows: list[Record], *, steps: int, early_step: int) -> Figure:
    """Draw test accuracy against weights left, at the end of training and early on."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    end, early = figure.subplots(1, 2)
    draw_metric(end, rows, "accuracy", percent=True)
    draw_metric(early, rows, "accuracy_early", percent=True)
    end.set_title(f"at the end of training (step {steps:,})")
    early.set_title(f"early (step {early_step:,})")
    end.set_ylabel("test accuracy [%]")
    end.set_ylim(_limits(rows))
    end.legend(loc="lower left", frameon=False)
    return figure


def learning_figure(records: list[Record]) -> Figure:
    """Draw validation accuracy against step, a panel a condition and a line a level."""
    rows = results.summarise(records)
    names = results.conditions(rows) or ["dense"]
    figure = Figure(figsize=(max(5.0, 3.2 * len(names)), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        draw_curves(axes, records, name)
        axes.set_title(name)
        axes.set_xlabel("step")
    panels[0].set_ylabel("validation accuracy [%]")
    panels[0].legend(title="weights left", loc="lower right", frameon=False)
    return figure


def draw_metric(axes: Axes, rows: list[Record], metric: str, *, percent: bool = False) -> None:
    """Draw a metric against the weights left: a line a condition, its spread, and dense."""
    scale = 100 if percent else 1
    dense = scale * results.row_at(rows, 0, "dense")[metric]["mean"]
    axes.axhline(dense, color="0.35", linestyle="--", linewidth=1, label="dense")
    levels = sorted({row["level"] for row in rows})
    left = [100 * results.row_at(rows, level, "ticket")["remaining"] for level in levels]
    for name in results.conditions(rows):
        line = [results.row_at(rows, level, name)[metric] for level in levels]
        mean = scale * np.array([spread["mean"] for spread in line])
        std = scale * np.array([spread["std"] for spread in line])
        axes.fill_between(left, mean - std, mean + std, color=COLOURS[name], alpha=0.15, lw=0)
        axes.plot(left, mean, "o-", color=COLOURS[name], markersize=3.5, linewidth=1.5, label=name)
    weights_left_axis(axes, left)
    _plain(axes)


def draw_curves(axes: Axes, records: list[Record], condition: str, *, pruned: int = 3) -> None:
    """Draw validation accuracy over training: dense, and some pruned levels of a condition."""
    deepest = max(record["level"] for record in records)
    levels = sorted({round(n) for n in np.linspace(1, deepest, pruned)}) if deepest else []
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(levels)))
    for level, colour in zip([0, *levels], ["0.35", *colours], strict=True):
        steps, seeds = results.curves(records, level, condition)
        mean, std = 100 * seeds.mean(0), 100 * seeds.std(0)
        left = next(100 * record["remaining"] for record in records if record["level"] == level)
        axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
        axes.plot(steps, mean, "-" if level else "--", color=colour, label=f"{left:.3g} %")
    _plain(axes)


def comparison_figure(rows: list[Record]) -> Figure:
    """Draw test accuracy against sparsity: a panel a family, a line a method, and dense."""
    there = comparison.methods(rows)
    families = {
        family: [name for name in names if name in there]
        for family, names in comparison.FAMILIES.items()
    }
    families = {family: names for family, names in families.items() if names}
    figure = Figure(figsize=(1.5 + 4.2 * len(families), 4.6), layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for axes, (family, names) in zip(panels, families.items(), strict=True):
        for name in set(there) - set(names):
            draw_method(axes, rows, name, background=True)
        for name in names:
            draw_method(axes, rows, name)
        draw_dense(axes, rows)
        sparsity_axis(axes, comparison.sparsities(rows))
        axes.set_title(family)
        axes.legend(loc="lower left", frameon=False)
        _plain(axes)
    error_axis(panels[0], rows)
    panels[0].set_ylabel("test accuracy [%], spaced by the logarithm of the error")
    return figure


def draw_method(axes: Axes, rows: list[Record], method: str, *, background: bool = False) -> None:
    """Draw accuracy against sparsity with its spread, or as a thin grey line to compare with."""
    line = [comparison.row_at(rows, method, s) for s in comparison.sparsities(rows)]
    density = [100 * (1 - row["sparsity"]) for row in line]
    mean = 100 * np.array([row["accuracy"]["mean"] for row in line])
    std = 100 * np.array([row["accuracy"]["std"] for row in line])
    if background:
        axes.plot(density, mean, "-", color="0.85", linewidth=1, zorder=1)
        return
    colour, marker = STYLES[method]
    axes.fill_between(density, mean - std, mean + std, color=colour, alpha=0.12, lw=0)
    axes.plot(density, mean, f"{marker}-", color=colour, markersize=5, lw=1.5, label=method)


def draw_dense(axes: Axes, rows: list[Record]) -> None:
    """Draw the accuracy of the dense network across the axes."""
    dense = 100 * comparison.row_at(rows, "dense", 0.0)["accuracy"]["mean"]
    axes.axhline(dense, color="0.35", linestyle="--", linewidth=1, label="dense")


def tradeoff_figure(rows: list[Record]) -> Figure:
    """Draw accuracy, and below it latency, against FLOPs: a column a network."""
    names = tradeoff.models(rows)
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
    base = tradeoff.dense(rows, model)
    axes.axhline(100 * base["accuracy"]["mean"], color="0.35", linestyle="--", linewidth=1)
    for method in tradeoff.methods(rows):
        colour, marker = STYLES[method]
        for kind, style, face in (("channels", "-", colour), ("layers", ":", "white")):
            found = [base, *tradeoff.line(rows, model, method, kind)]
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
    _plain(axes)


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
    _plain(axes)


def pareto_figure(rows: list[Record], *, tolerance: float) -> Figure:
    """Draw test accuracy against latency at batch 1, and against the size of the file.

    Args:
      rows: of the stages.
      tolerance: points below the dense network at which a line is drawn.
    """
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    time, size = figure.subplots(1, 2, sharey=True)
    draw_pareto(time, rows, lambda row: row["latency_ms"]["1"], tolerance=tolerance)
    draw_pareto(size, rows, lambda row: row["bytes"] / 1e3, tolerance=tolerance)
    time.set_ylabel("test accuracy [%]")
    time.set_xlabel("latency at batch 1 [ms], one thread")
    size.set_xlabel("file [kB]")
    handles, labels = size.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_pareto(
    axes: Axes, rows: list[Record], cost: Callable[[Record], float], *, tolerance: float
) -> None:
    """Draw accuracy with its spread against a cost, and a line through what nothing beats."""
    best = deployment.front(rows, cost)
    axes.step(
        [cost(row) for row in best],
        [100 * row["accuracy"]["mean"] for row in best],
        where="post",
        color="0.8",
        linewidth=3,
        zorder=1,
        label="nothing cheaper is as accurate",
    )
    limit = 100 * deployment.row_of(rows, "dense")["accuracy"]["mean"] - tolerance
    label = f"dense less {tolerance:g} points"
    axes.axhline(limit, color="0.35", linestyle=":", linewidth=1, zorder=1, label=label)
    for row in rows:
        colour, marker = STAGES[row["stage"]]
        axes.errorbar(
            cost(row),
            100 * row["accuracy"]["mean"],
            yerr=100 * row["accuracy"]["std"],
            fmt=marker,
            color=colour,
            markersize=7,
            elinewidth=1,
            capsize=2,
            label=row["stage"],
        )
    axes.set_xscale("log")
    costs = [cost(row) for row in rows]
    low, high = min(costs) / 1.3, max(costs) * 1.3
    ticks = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    _plain(axes)


def _share_axis(axes: Axes, shares: list[float]) -> None:
    ticks = [tick for tick in SHARES if tick >= min(shares) / 1.3]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(shares) / 1.3, 115)
    axes.set_xlabel("FLOPs [% of dense]")


def sparsity_axis(axes: Axes, sparsities: list[float]) -> None:
    """Make an axis of weights left that is logarithmic and labelled with the sparsity."""
    density = [100 * (1 - sparsity) for sparsity in sparsities]
    axes.set_xscale("log")
    axes.set_xticks(density, [f"{100 * sparsity:g}" for sparsity in sparsities])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(1.2 * max(density), min(density) / 1.2)
    axes.set_xlabel("sparsity [%]")


def error_axis(axes: Axes, rows: list[Record]) -> None:
    """Space accuracies by the logarithm of the error, so that the best and the worst both fit."""
    means = [100 * row["accuracy"]["mean"] for row in rows]
    floor = 0.05  # of the error, in percent: nothing is infinitely far up
    axes.set_yscale(
        "function",
        functions=(
            lambda accuracy: -np.log10(np.maximum(100 - accuracy, floor)),
            lambda height: 100 - 10.0**-height,
        ),
    )
    ticks = [0, 20, 40, 60, 80, 90, 95, 98, 99, 99.5, 99.9]
    low, high = min(means) - 2, 100 - max(floor, 0.7 * (100 - max(means)))
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(max(0, low), high)


def weights_left_axis(axes: Axes, left: list[float]) -> None:
    """Make a logarithmic axis from dense to sparse, with about ten levels labelled."""
    left = [share for share in left if share > 0]  # a logarithm has no place for nothing left
    ticks = left[:: 1 + len(left) // 10]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(1.1 * max(left), min(left) / 1.1)
    axes.set_xlabel("weights left [%]")


def png(figure: Figure) -> bytes:
    """Render a figure to the content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _limits(rows: list[Record]) -> tuple[float | None, float | None]:
    """Room for the ticket and its closest control; one that collapses may leave the picture."""
    shown = [row for row in rows if row["condition"] in ("dense", "ticket", "reinit")]
    means = [100 * row["accuracy"]["mean"] for row in shown]
    margin = 0.1 * (max(means) - min(means))
    return (min(means) - margin, max(means) + margin) if margin else (None, None)


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
