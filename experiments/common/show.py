"""What tables, figures and answers of the experiments share."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import rich.console
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common import files
from experiments.common.runner import Record
from jaxprune.typing import Tree


def spread(values: list[float]) -> Record:
    """Put a mean and a standard deviation (divided by n) beside the values of the seeds."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "seeds": values}


def mean(records: list[Record], field: str) -> float:
    """Average a field."""
    return float(np.mean([record[field] for record in records]))


def percent(row: Record, metric: str = "accuracy") -> str:
    """Write the spread of a metric as mean±std in percent."""
    return f"{100 * row[metric]['mean']:.2f}±{100 * row[metric]['std']:.2f}"


def gap(row: Record, other: Record) -> tuple[float, float]:
    """Compare two rows seed by seed: mean and standard deviation of row minus other."""
    gaps = np.subtract(row["accuracy"]["seeds"], other["accuracy"]["seeds"])
    return float(gaps.mean()), float(gaps.std())


def write(folder: Path, summary: Record, *, answer: str | None = None, **figures: Figure) -> None:
    """Write what a finished run ends with: ``summary.json``, figures by name, ``answer.md``."""
    files.write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    for name, figure in figures.items():
        files.write(folder / f"{name}.png", png(figure))
    if answer is not None:
        files.write(folder / "answer.md", answer)


def printed(*what: Any, width: int = 120) -> None:
    """Print tables and text; a pipe has no width of its own, and 80 columns would cut them."""
    console = rich.console.Console(width=None if sys.stdout.isatty() else width)
    for each in what:
        console.print(each)


def png(figure: Figure) -> bytes:
    """Render a figure to the content of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def plain(axes: Axes) -> None:
    """Draw a faint grid, and no frame above and on the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_masks(masks: Tree, params: Tree, *, corner: int | None = None) -> Figure:
    """Draw which weights stay, leaf by leaf: blue ones do.

    Weights are drawn as matrices: all that goes in to the right, outputs (the last axis) upwards.
    ``corner`` draws the first of both only, which shows the pattern of a large layer.
    """
    leaves = jax.tree_util.tree_leaves_with_path(masks)
    weights = dict(jax.tree_util.tree_leaves_with_path(params))
    many = max(len(leaves), 1)
    figure = plt.figure(figsize=(3.3 * many, 3), layout="constrained")
    panels = figure.subplots(1, many, squeeze=False)[0]
    for axes, (path, mask) in zip(panels, leaves, strict=False):
        full = np.broadcast_to(mask, weights[path].shape)
        matrix = full.reshape(-1, full.shape[-1])[:corner, :corner]
        axes.pcolormesh(matrix.T, cmap="Blues", vmin=0, vmax=1.3, rasterized=True)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes.set(title=f"{name}: {1 - full.mean():.0%} removed", xlabel="input", ylabel="output")
    plt.close(figure)  # else a notebook would show it twice
    return figure
