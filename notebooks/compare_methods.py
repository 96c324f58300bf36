# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which approach when
#
# What `python -m experiments.compare_methods` found. Set `JAXPRUNE_RESULTS` to look at another run
# folder than `results/compare_methods_digits`; a relative path starts at the repository.

# %%
# %matplotlib inline
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

# The experiments are no installed package: find them from the repository or a folder in it.
sys.path.extend(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())

from experiments import compare_methods_figures as figures
from experiments.common import runner, show

run = Path(runner.__file__).parents[2] / os.environ.get(
    "JAXPRUNE_RESULTS", "results/compare_methods_digits"
)
config, summary = runner.read_config(run), runner.read_summary(run)
records = runner.read_records(run)
rows = summary["rows"]
methods, sparsities = figures.methods(rows), figures.sparsities(rows)
print(config)

# %% [markdown]
# ## Accuracy against sparsity
#
# A line is the mean over the seeds, a band one standard deviation, the dashed line the dense
# network, and the grey lines are the methods of the other panels. Every run had the same number of
# training steps.

# %%
figures.comparison_figure(rows)

# %% [markdown]
# ## The answer

# %%
Markdown((run / "answer.md").read_text())

# %% [markdown]
# ## In numbers
#
# Test accuracy in percent, mean±std over the seeds, and training FLOPs in percent of dense.

# %%
head = ["method", *(f"{100 * sparsity:g} %" for sparsity in sparsities)]
lines = [head, ["---"] * len(head)]
for method in methods:
    found = [figures.row_at(rows, method, sparsity) for sparsity in sparsities]
    cells = [f"{show.percent(row)} ({100 * row['flops_share']:.0f})" for row in found]
    lines.append([method, *cells])
Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))

# %% [markdown]
# ## What accuracy costs
#
# Each line goes from the lowest sparsity to the highest. Up and to the left is better: as accurate
# with fewer FLOPs, on a device that skips zeros.

# %%
figure, panels = plt.subplots(
    1, 3, figsize=(14, 4.6), sharex=True, sharey=True, layout="constrained"
)
for axes, (family, names) in zip(panels, figures.FAMILIES.items(), strict=True):
    for name in [name for name in names if name in methods]:
        found = [figures.row_at(rows, name, sparsity) for sparsity in sparsities]
        accuracy = [100 * row["accuracy"]["mean"] for row in found]
        colour, marker = figures.STYLES[name]
        cost = [100 * row["flops_share"] for row in found]
        axes.plot(cost, accuracy, f"{marker}-", color=colour, markersize=5, label=name)
        axes.legend(frameon=False)
    figures.draw_dense(axes, rows)
    axes.set_title(family)
    axes.set_xscale("log")
    axes.set_xticks(ticks := [1, 2, 5, 10, 20, 50, 100], ticks, minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training FLOPs [% of dense]")
    axes.grid(alpha=0.25)
figures.error_axis(panels[0], rows)
panels[0].set_ylabel("test accuracy [%]")
plt.show()

# %% [markdown]
# ## Where the weights go
#
# Weights left in each layer at a high sparsity, mean over the seeds. A cross is a layer that some
# seed lost altogether: nothing passes through it any more.

# %%
high = sparsities[max(0, len(sparsities) - 2)]
layers = list(records[0]["densities"])
density = {
    method: np.array(
        [
            [record["densities"][layer] for layer in layers]
            for record in records
            if (record["method"], record["sparsity"]) == (method, high)
        ]
    )
    for method in methods
}
shares = 100 * np.array([density[method].mean(0) for method in methods])
figure, axes = plt.subplots(
    figsize=(2 + 1.3 * len(layers), 1.5 + 0.35 * len(methods)), layout="constrained"
)
image = axes.imshow(np.log10(np.maximum(shares, 0.1)), aspect="auto", cmap="viridis")
axes.set_xticks(range(len(layers)), [layer.removesuffix("/kernel") for layer in layers])
axes.set_yticks(range(len(methods)), methods)
for i, method in enumerate(methods):
    for j in range(len(layers)):
        lost = " x" if np.any(density[method][:, j] == 0) else ""
        colour = "black" if shares[i, j] > 10 else "white"
        axes.text(j, i, f"{shares[i, j]:.3g}{lost}", ha="center", va="center", color=colour)
axes.set_title(f"weights left [%] at {100 * high:g} % sparsity")
plt.show()

# %% [markdown]
# ## How far behind the best
#
# The difference to the most accurate method of a sparsity, seed by seed: its mean, and one standard
# deviation as a bar. What reaches zero with its bar is as good.

# %%
shown = sorted({sparsities[len(sparsities) // 2], sparsities[-1]})
figure, panels = plt.subplots(
    1,
    len(shown),
    figsize=(1 + 5 * len(shown), 1.5 + 0.28 * len(methods)),
    squeeze=False,
    layout="constrained",
)
for axes, sparsity in zip(panels[0], shown, strict=True):
    ranked = figures.at_sparsity(rows, sparsity)
    gaps = 100 * np.array([show.gap(row, ranked[0]) for row in ranked])
    for height, (row, (mean, std)) in enumerate(zip(ranked, gaps, strict=True)):
        colour, marker = figures.STYLES[row["method"]]
        axes.errorbar(mean, -height, xerr=std, fmt=marker, color=colour, capsize=3)
    axes.axvline(0, color="0.35", linestyle="--", linewidth=1)
    axes.set_yticks(range(0, -len(ranked), -1), [row["method"] for row in ranked])
    axes.set_xlabel("points of test accuracy behind the best")
    axes.set_title(f"{100 * sparsity:g} % sparsity")
    axes.grid(alpha=0.25)
plt.show()
