"""Rows of methods and sparsities, and what they say about which approach to take when."""

from collections.abc import Callable

import numpy as np
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.common.runner import Record
from experiments.common.show import gap, mean, percent, plain, spread

# A method keeps its colour and marker in all figures; within a family both differ. Colours are
# Okabe and Ito's, which all eyes can tell apart.
FAMILIES = {
    "dense to sparse": {
        "one_shot": ("#0072B2", "o"),
        "iterative": ("#009E73", "s"),
        "iterative_one_shot": ("#56B4E9", "D"),
        "gradual": ("#D55E00", "^"),
        "ac_dc": ("#CC79A7", "v"),
        "straight_through": ("#E69F00", "P"),
    },
    "sparse all along": {
        "rigl": ("#D55E00", "o"),
        "set": ("#0072B2", "s"),
        "static": ("#009E73", "^"),
    },
    "pruned at initialisation": {
        "random_init": ("#000000", "x"),
        "magnitude_init": ("#56B4E9", "D"),
        "snip": ("#D55E00", "o"),
        "grasp": ("#009E73", "^"),
        "synflow": ("#0072B2", "s"),
    },
}
STYLES = {"dense": ("0.35", "_")} | {n: s for names in FAMILIES.values() for n, s in names.items()}


def summarise(records: list[Record]) -> list[Record]:
    """Gather the seeds of every method and sparsity, the dense network first.

    Returns:
      A row for each. Accuracy is a mean, a standard deviation over the seeds (of the seeds
      themselves, divided by n) and the seeds, in order; FLOPs are means. ``flops_share`` and
      ``inference_share`` are relative to the dense network, and ``collapsed`` counts the seeds
      that lost a whole layer.
    """
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        groups.setdefault((record["method"], record["sparsity"]), []).append(record)
    dense = groups[("dense", 0.0)]
    order = list(dict.fromkeys((r["method"], r["sparsity"]) for r in records))
    return [
        {
            "method": method,
            "sparsity": sparsity,
            "accuracy": spread([record["accuracy"] for record in group]),
            "flops": mean(group, "flops"),
            "flops_share": mean(group, "flops") / mean(dense, "flops"),
            "inference_share": mean(group, "inference_flops") / mean(dense, "inference_flops"),
            "bytes": group[0]["bytes"],
            "kept": group[0]["kept"],
            "collapsed": sum(0 in record["densities"].values() for record in group),
        }
        for (method, sparsity), group in ((key, groups[key]) for key in order)
    ]


def methods(rows: list[Record]) -> list[str]:
    """Methods other than dense, in the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))


def sparsities(rows: list[Record]) -> list[float]:
    """Sparsities other than 0, rising."""
    return sorted({row["sparsity"] for row in rows} - {0.0})


def row_at(rows: list[Record], method: str, sparsity: float) -> Record:
    """Find the row of a method and sparsity."""
    return next(r for r in rows if (r["method"], r["sparsity"]) == (method, sparsity))


def at_sparsity(rows: list[Record], sparsity: float) -> list[Record]:
    """Rows of a sparsity, the most accurate first."""
    found = [row for row in rows if row["sparsity"] == sparsity]
    return sorted(found, key=lambda row: -row["accuracy"]["mean"])


def as_good(rows: list[Record], sparsity: float) -> list[Record]:
    """Rows of a sparsity whose mean gap to the best is within one standard error of that mean.

    The best is one of them, and the first. A spread would not do: who fails on one seed in five has
    a large one, and is not as good.
    """
    best, *others = at_sparsity(rows, sparsity)
    free = max(len(best["accuracy"]["seeds"]) - 1, 1)
    gaps = [gap(best, other) for other in others]
    return [
        best,
        *(o for o, (behind, std) in zip(others, gaps, strict=True) if behind <= std / free**0.5),
    ]


def cheapest(rows: list[Record], sparsity: float, *, within: float = 0.01) -> Record:
    """Find the fewest training FLOPs among what is ``within`` so much accuracy of the best."""
    found = at_sparsity(rows, sparsity)
    limit = found[0]["accuracy"]["mean"] - within
    near = [row for row in found if row["accuracy"]["mean"] >= limit]
    return min(near, key=lambda row: row["flops"])


def collapses(rows: list[Record], sparsity: float) -> list[Record]:
    """Rows of a sparsity that lost a layer in some seed, or half of the dense accuracy."""
    half = row_at(rows, "dense", 0.0)["accuracy"]["mean"] / 2
    found = at_sparsity(rows, sparsity)
    return [row for row in found if row["collapsed"] or row["accuracy"]["mean"] < half]


def answer(rows: list[Record], *, dataset: str, steps: int) -> str:
    """Say in Markdown which approach to take when; every word of it is read off the rows."""
    dense = row_at(rows, "dense", 0.0)
    choices = _choices(rows)
    lines = [
        "# Which approach when",
        "",
        f"{dataset}, {steps} steps, seeds: {len(dense['accuracy']['seeds'])}. Test accuracy in "
        f"percent, mean±std over the seeds; dense: {percent(dense)}.",
        "",
        "The best, if",
        "",
        f"| sparsity | {' | '.join(choices)} |",
        "|---" * (1 + len(choices)) + "|",
        *(_choice_line(choices, sparsity) for sparsity in sparsities(rows)),
        "",
        *(line for name, found in choices.items() for line in _favourite(name, found)),
        *_free(rows),
        *_regrowing(rows),
        "",
        "As good as the best is what falls behind it by no more than one standard error, over "
        "the seeds, of the difference. Cheapest is what needs the fewest training FLOPs (in "
        "percent of dense) among all within one point of the best. Collapsed has lost a whole "
        "layer in some seed, or half of the dense accuracy.",
        "",
        "| sparsity | best | as good | cheapest | collapsed |",
        "|---|---|---|---|---|",
        *(_detail_line(rows, sparsity) for sparsity in sparsities(rows)),
    ]
    return "\n".join(lines) + "\n"


def _choices(rows: list[Record]) -> dict[str, list[Record]]:
    """Rows to choose from, under conditions that get harder."""
    fixed = ("static", *FAMILIES["pruned at initialisation"])
    sparse = (*FAMILIES["sparse all along"], *fixed)
    choices = {
        "training may be dense": rows[1:],
        "training is sparse all along": [row for row in rows if row["method"] in sparse],
        "the mask is fixed before training": [row for row in rows if row["method"] in fixed],
    }
    return {name: found for name, found in choices.items() if found}


def _choice_line(choices: dict[str, list[Record]], sparsity: float) -> str:
    best = [at_sparsity(found, sparsity)[0] for found in choices.values()]
    cells = [f"{100 * sparsity:g} %", *(f"{row['method']} {percent(row)}" for row in best)]
    return f"| {' | '.join(cells)} |"


def _detail_line(rows: list[Record], sparsity: float) -> str:
    best, *equals = as_good(rows, sparsity)
    cheap = cheapest(rows, sparsity)
    cells = [
        f"{100 * sparsity:g} %",
        best["method"],
        _names(equals),
        f"{cheap['method']} ({100 * cheap['flops_share']:.0f} %)",
        _names(collapses(rows, sparsity)),
    ]
    return f"| {' | '.join(cells)} |"


def _favourite(name: str, found: list[Record]) -> list[str]:
    """The method of a choice that is most often the best or as good."""
    levels = sparsities(found)
    winners = [row["method"] for sparsity in levels for row in as_good(found, sparsity)]
    often = {method: winners.count(method) for method in methods(found)}
    most = max(often.values())
    first = [method for method, times in often.items() if times == most]
    if len(often) == 1:
        return []
    return [
        f"- If {name}: {' or '.join(first)}, the best or as good at {most} of {len(levels)} "
        "sparsities."
    ]


def _free(rows: list[Record]) -> list[str]:
    """How far pruning costs next to nothing."""
    limit = row_at(rows, "dense", 0.0)["accuracy"]["mean"] - 0.01
    found = [row for row in rows[1:] if row["accuracy"]["mean"] >= limit]
    if not found:
        return ["- No method stays within one point of the dense network."]
    counts = [
        f"{sum(row['sparsity'] == sparsity for row in found)} at {100 * sparsity:g} %"
        for sparsity in sparsities(rows)
    ]
    last = sparsities(found)[-1]
    return [
        f"- Within one point of the dense network, of {len(methods(rows))} methods: "
        f"{', '.join(counts)}. The last are, at {100 * last:g} %, "
        f"{_names(at_sparsity(found, last))}."
    ]


def _regrowing(rows: list[Record]) -> list[str]:
    """Whether regrowing weights pays, and by gradient more than at random."""
    there, lines = methods(rows), []
    for one, other in (("rigl", "set"), ("set", "static")):
        if one in there and other in there:
            gaps = [gap(row_at(rows, one, s), row_at(rows, other, s)) for s in sparsities(rows)]
            cells = [
                f"{100 * mean:+.2f}±{100 * std:.2f} at {100 * sparsity:g} %"
                for (mean, std), sparsity in zip(gaps, sparsities(rows), strict=True)
            ]
            lines.append(f"- {one} minus {other}, in points seed by seed: {', '.join(cells)}.")
    return lines


def _names(rows: list[Record]) -> str:
    return ", ".join(row["method"] for row in rows) or "none"


def accuracy_table(rows: list[Record], *, title: str) -> rich.table.Table:
    """Lay out the accuracy of a method a line, sparsities across."""
    lines = _lines(rows, percent, title)
    lines.caption = f"dense: {percent(rows[0])}"
    return lines


def cost_table(rows: list[Record], *, title: str) -> rich.table.Table:
    """Lay out the training FLOPs of a method a line, and the bytes, which are the same for all."""
    lines = _lines(rows, lambda row: f"{100 * row['flops_share']:.1f}", title)
    sizes = [at_sparsity(rows, s)[0]["bytes"] for s in sparsities(rows)]
    lines.add_section()
    lines.add_row("model bytes", *(f"{size:,}" for size in sizes))
    lines.caption = f"dense: {rows[0]['flops']:.4g} FLOPs, {rows[0]['bytes']:,} bytes"
    return lines


def _lines(rows: list[Record], cell: Callable[[Record], str], title: str) -> rich.table.Table:
    across = sparsities(rows)
    lines = rich.table.Table("method", *(f"{100 * s:g} %" for s in across), title=title)
    for method in methods(rows):
        lines.add_row(method, *(cell(row_at(rows, method, s)) for s in across))
    return lines


def comparison_figure(rows: list[Record]) -> Figure:
    """Draw test accuracy against sparsity: a panel a family, a line a method, and dense."""
    there = methods(rows)
    families = {
        family: [name for name in names if name in there] for family, names in FAMILIES.items()
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
        sparsity_axis(axes, sparsities(rows))
        axes.set_title(family)
        axes.legend(loc="lower left", frameon=False)
        plain(axes)
    error_axis(panels[0], rows)
    panels[0].set_ylabel("test accuracy [%], spaced by the logarithm of the error")
    return figure


def draw_method(axes: Axes, rows: list[Record], method: str, *, background: bool = False) -> None:
    """Draw accuracy against sparsity with its spread, or as a thin grey line to compare with."""
    line = [row_at(rows, method, s) for s in sparsities(rows)]
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
    dense = 100 * row_at(rows, "dense", 0.0)["accuracy"]["mean"]
    axes.axhline(dense, color="0.35", linestyle="--", linewidth=1, label="dense")


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
