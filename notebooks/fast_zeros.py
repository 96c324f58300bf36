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
# # Which zeros make it faster
#
# What `python -m experiments.fast_zeros` found: networks pruned to the same share of weights by
# zeros of every kind, and what a user would deploy of each, on the clock. Set `JAXPRUNE_RESULTS` to
# look at another run folder than `results/fast_zeros_digits`; a relative path starts at the
# repository.

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

from experiments import fast_zeros_figures as figures
from experiments.common import runner

run = Path(runner.__file__).parents[2] / os.environ.get(
    "JAXPRUNE_RESULTS", "results/fast_zeros_digits"
)
config, summary = runner.read_config(run), runner.read_summary(run)
rows = summary["rows"]
models = list(dict.fromkeys(row["model"] for row in rows))
print(config)

# %% [markdown]
# ## What a network is worth, against its latency
#
# Up and to the left is better. A colour is a kind of zeros, a marker how much of the weights that
# may be pruned is removed; bars are one standard deviation over the seeds. On the vertical line are
# networks that are no faster than the dense one, on the horizontal one those that are no worse.

# %%
figures.worth_figure(rows)

# %% [markdown]
# ## In words

# %%
Markdown((run / "answer.md").read_text())

# %% [markdown]
# ## How much of the arithmetic that is left out the clock gives back
#
# How many times as fast as dense, beside how many times fewer weights the pruned products have: on
# the line the clock gives back all of it. One panel a network, at the largest size under XLA.

# %%
figure, panels = plt.subplots(
    1, len(models), figsize=(1 + 5 * len(models), 4), squeeze=False, layout="constrained"
)
for axes, model in zip(panels[0], models, strict=True):
    others = [row for row in figures.of_model(rows, model) if row["kind"] != "dense"]
    size = figures.sizes(others)[-1]
    fewer = [1 / (1 - row["level"]) for row in others]
    axes.plot([1, max(fewer)], [1, max(fewer)], color="0.35", linewidth=1, label="all of it")
    for kind in dict.fromkeys(row["kind"] for row in others):
        found = [row for row in others if row["kind"] == kind]
        x = [1 / (1 - row["level"]) for row in found]
        y = [figures.speedup(row, "xla", size) for row in found]
        colour, words = figures.STYLES[kind]
        axes.plot(x, y, "o-", color=colour, label=words)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("times fewer weights")
    axes.set_ylabel(f"times as fast, {size} rows")
    axes.set_title(model)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## What is on disk
#
# Bytes of the ONNX files in percent of the dense one's. Zeros that are multiplied with take room
# until the file is compressed; kept blocks and cut channels take none.

# %%
figure, panels = plt.subplots(
    1, len(models), figsize=(1 + 6 * len(models), 4.5), squeeze=False, layout="constrained"
)
for axes, model in zip(panels[0], models, strict=True):
    own = figures.of_model(rows, model)
    names = [f"{figures.STYLES[row['kind']][1]}, {figures.removed(row)}" for row in own]
    for field, colour, shift in (("bytes", "#0072B2", 0.2), ("gzip_bytes", "#E69F00", -0.2)):
        shares = [100 * row[field] / own[0]["bytes"] for row in own]
        axes.barh(shift - np.arange(len(own)), shares, 0.4, color=colour, label=field)
    axes.set_yticks(-np.arange(len(own)), names, fontsize=7)
    axes.set_xlabel("% of the dense file")
    axes.set_title(model)
    axes.legend(frameon=False)
plt.show()
