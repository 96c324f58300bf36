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
# # What cutting costs and buys
#
# What `python -m experiments.structured` found: channels and layers cut out of a CNN and a
# transformer, everything at once or in rounds. Set `JAXPRUNE_RESULTS` to look at another run folder
# than `results/structured_digits`; a relative path starts at the repository.

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

from experiments import structured_figures as figures
from experiments.common import runner, show

run = Path(runner.__file__).parents[2] / os.environ.get(
    "JAXPRUNE_RESULTS", "results/structured_digits"
)
config, summary = runner.read_config(run), runner.read_summary(run)
records = runner.read_records(run)
rows = summary["rows"]
models, methods = figures.models(rows), figures.methods(rows)
print(config)

# %% [markdown]
# ## Accuracy and latency against FLOPs
#
# Above, up and to the left is better: as accurate with fewer FLOPs; bars are one standard deviation
# over the seeds. Below, what the clock says, on a machine that `latency.json` describes; bars are
# 95 % intervals of the ratio.

# %%
figures.tradeoff_figure(rows)

# %% [markdown]
# ## In words

# %%
Markdown((run / "answer.md").read_text())

# %% [markdown]
# ## What is lost, seed by seed
#
# Points of test accuracy below the dense network of the same seed: the mean, and one standard
# deviation as a bar.

# %%
figure, panels = plt.subplots(
    1, len(models), figsize=(1 + 5 * len(models), 4), squeeze=False, layout="constrained"
)
for axes, model in zip(panels[0], models, strict=True):
    base = figures.dense(rows, model)
    kinds = ("channels", "layers")
    names = {
        figures.share(row): None
        for kind in kinds
        for row in figures.line(rows, model, methods[0], kind)
    }
    for method, shift in zip(methods, np.linspace(0.12, -0.12, len(methods)), strict=True):
        found = [row for kind in kinds for row in figures.line(rows, model, method, kind)]
        lost = 100 * np.array([show.gap(base, row) for row in found])
        colour, marker = figures.STYLES[method]
        heights = shift - np.arange(len(found))
        axes.errorbar(
            lost[:, 0],
            heights,
            xerr=lost[:, 1],
            fmt=marker,
            color=colour,
            capsize=3,
            label=method,
        )
    axes.axvline(0, color="0.35", linestyle="--", linewidth=1)
    axes.set_yticks(-np.arange(len(names)), list(names))
    axes.set_xlabel("points lost")
    axes.set_title(model)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
plt.show()

# %% [markdown]
# ## Which layers go
#
# In how many seeds each residual branch is left out. Branches are ranked together, so this is what
# the criterion thinks of them.


# %%
def gone(model, method, share):
    """Count for each branch the seeds that leave it out."""
    wanted = (model, method, 0.0, share)
    found = [record["left"] for record in records if figures.key_of(record) == wanted]
    return {name: sum(not left[name] for left in found) for name in found[0]}


shares = config["layers"]
figure, panels = plt.subplots(
    1, len(models), figsize=(1 + 6 * len(models), 3.6), squeeze=False, layout="constrained"
)
for axes, model in zip(panels[0], models, strict=True):
    columns = [(method, share) for share in shares for method in methods]
    counts = [gone(model, *column) for column in columns]
    branches = list(counts[0]) if counts else []
    table = np.array([[count[name] for count in counts] for name in branches], ndmin=2)
    if branches:
        axes.imshow(table, vmin=0, vmax=config["seeds"], cmap="Blues", aspect="auto")
    for (i, j), count in np.ndenumerate(table):
        axes.text(j, i, count, ha="center", va="center", color="0.5")
    axes.set_xticks(range(len(columns)), [f"{m}\n{100 * s:g} %" for m, s in columns])
    axes.set_yticks(range(len(branches)), [name.removeprefix("params/") for name in branches])
    axes.set_title(f"{model}: seeds without the branch, of {config['seeds']}")
plt.show()
