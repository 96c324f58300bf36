"""Tables and figures of lottery tickets: rows of levels and conditions, and how they are shown."""

from typing import Any

import jax
import numpy as np
import rich.table
from flax.traverse_util import flatten_dict
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.common.runner import Record
from experiments.common.show import plain, spread

METRICS = ("accuracy", "accuracy_early", "accuracy_best", "early_stop_step")
# Okabe and Ito's colours, which all eyes can tell apart.
COLOURS = {"ticket": "#0072B2", "reinit": "#D55E00", "shuffle": "#009E73", "random": "#CC79A7"}


def summarise(records: list[Record]) -> list[Record]:
    """Gather the seeds of every level and condition.

    Returns:
      A row for each level and condition, ordered by level. Each metric is a mean, a standard
      deviation over the seeds (of the seeds themselves, divided by n) and the seeds, in order.
    """
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["level"], record["seed"])):
        groups.setdefault((record["level"], record["condition"]), []).append(record)
    return [
        {
            "level": level,
            "sparsity": group[0]["sparsity"],
            "condition": condition,
            **{metric: spread([record[metric] for record in group]) for metric in METRICS},
        }
        for (level, condition), group in groups.items()
    ]


def conditions(rows: list[Record]) -> list[str]:
    """Conditions of the pruned levels, in the order of the rows: the ticket, then its controls."""
    return list(dict.fromkeys(row["condition"] for row in rows if row["level"]))


def row_at(rows: list[Record], level: int, condition: str) -> Record:
    """Find the row of a level and condition; at level 0 every condition is the dense network."""
    condition = condition if level else "dense"
    return next(r for r in rows if (r["level"], r["condition"]) == (level, condition))


def left_of(row: Record) -> float:
    """Percent of the weights that are left."""
    return 100 * (1 - row["sparsity"])


def difference(
    rows: list[Record], level: int, other: str, metric: str = "accuracy"
) -> tuple[float, float]:
    """Compare the ticket with a control of the same seed.

    Returns:
      The mean of ticket minus control over the seeds, and the worst seed.
    """
    ticket, control = (row_at(rows, level, c)[metric]["seeds"] for c in ("ticket", other))
    gaps = np.subtract(ticket, control)
    return float(gaps.mean()), float(gaps.min())


def curves(records: list[Record], level: int, condition: str) -> tuple[np.ndarray, np.ndarray]:
    """Collect validation accuracy over training.

    Returns:
      Steps `[evaluations]` and accuracies `[seeds, evaluations]`.
    """
    wanted = (level, condition if level else "dense")
    found = [r for r in records if (r["level"], r["condition"]) == wanted]
    return np.array(found[0]["steps"]), np.array([r["validation_accuracy"] for r in found])


def table(rows: list[Record], *, title: str) -> rich.table.Table:
    """Lay out a line a level: each condition, and by how much the ticket beats fresh weights."""
    names = conditions(rows)
    headings = ["left [%]", *(names or ["dense"])]
    if "reinit" in names:
        headings.append("ticket - reinit\n(worst seed)")
    lines = rich.table.Table(*headings, title=title)
    lines.add_row("100.0", _accuracies(row_at(rows, 0, "dense")))
    for level in sorted({row["level"] for row in rows} - {0}):
        shown = [row_at(rows, level, name) for name in names]
        cells = [f"{left_of(shown[0]):.1f}", *map(_accuracies, shown)]
        if "reinit" in names:
            mean, worst = difference(rows, level, "reinit")
            cells.append(f"{100 * mean:+.2f} ({100 * worst:+.2f})")
        lines.add_row(*cells)
    return lines


def _accuracies(row: Record) -> str:
    end, early = row["accuracy"], row["accuracy_early"]
    return f"{100 * end['mean']:.2f}±{100 * end['std']:.2f} ({100 * early['mean']:.2f})"


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
    rows = summarise(records)
    names = conditions(rows) or ["dense"]
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
    dense = scale * row_at(rows, 0, "dense")[metric]["mean"]
    axes.axhline(dense, color="0.35", linestyle="--", linewidth=1, label="dense")
    levels = sorted({row["level"] for row in rows})
    left = [left_of(row_at(rows, level, "ticket")) for level in levels]
    for name in conditions(rows):
        line = [row_at(rows, level, name)[metric] for level in levels]
        mean = scale * np.array([spread["mean"] for spread in line])
        std = scale * np.array([spread["std"] for spread in line])
        axes.fill_between(left, mean - std, mean + std, color=COLOURS[name], alpha=0.15, lw=0)
        axes.plot(left, mean, "o-", color=COLOURS[name], markersize=3.5, linewidth=1.5, label=name)
    weights_left_axis(axes, left)
    plain(axes)


def draw_curves(axes: Axes, records: list[Record], condition: str, *, pruned: int = 3) -> None:
    """Draw validation accuracy over training: dense, and some pruned levels of a condition."""
    deepest = max(record["level"] for record in records)
    levels = sorted({round(n) for n in np.linspace(1, deepest, pruned)}) if deepest else []
    colours = colormaps["viridis"](np.linspace(0, 0.85, len(levels)))
    for level, colour in zip([0, *levels], ["0.35", *colours], strict=True):
        steps, seeds = curves(records, level, condition)
        mean, std = 100 * seeds.mean(0), 100 * seeds.std(0)
        left = next(left_of(record) for record in records if record["level"] == level)
        axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.15, lw=0)
        axes.plot(steps, mean, "-" if level else "--", color=colour, label=f"{left:.3g} %")
    plain(axes)


def weights_left_axis(axes: Axes, left: list[float]) -> None:
    """Make a logarithmic axis from dense to sparse, with about ten levels labelled."""
    left = [share for share in left if share > 0]  # a logarithm has no place for nothing left
    ticks = left[:: 1 + len(left) // 10]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(1.1 * max(left), min(left) / 1.1)
    axes.set_xlabel("weights left [%]")


def _limits(rows: list[Record]) -> tuple[float | None, float | None]:
    """Room for the ticket and its closest control; one that collapses may leave the picture."""
    shown = [row for row in rows if row["condition"] in ("dense", "ticket", "reinit")]
    means = [100 * row["accuracy"]["mean"] for row in shown]
    margin = 0.1 * (max(means) - min(means))
    return (min(means) - margin, max(means) + margin) if margin else (None, None)


def chance_overlap(masks_a: Any, masks_b: Any) -> float:
    """Jaccard index to expect if the masks kept as many weights of each layer, but at random.

    Masks that keep fractions `p` and `q` of a layer share `p q` of it by chance.
    """
    leaves = list(zip(jax.tree.leaves(masks_a), jax.tree.leaves(masks_b), strict=True))
    both = sum(int(a.sum()) * int(b.sum()) / a.size for a, b in leaves)
    kept = sum(int(a.sum()) + int(b.sum()) for a, b in leaves)
    return both / (kept - both) if kept else 0.0


def split_weights(weights: Any, masks: Any) -> tuple[np.ndarray, np.ndarray]:
    """Line up the weights that the masks keep, and those that they remove."""
    weights, masks = flatten_dict(weights), flatten_dict(masks)
    pairs = [(weights[path], mask) for path, mask in masks.items() if mask is not None]
    kept = np.concatenate([weight[mask] for weight, mask in pairs])
    removed = np.concatenate([weight[~mask] for weight, mask in pairs])
    return kept, removed
