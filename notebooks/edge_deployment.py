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
# # From a trained network to a small device
#
# What `python -m experiments.edge_deployment` found: a CNN pruned, distilled and quantized, each
# alone and together, measured as the ONNX file that a device would run. Set `JAXPRUNE_RESULTS` to
# look at another run folder than `results/edge_deployment_digits`; a relative path starts at the
# repository.

# %%
# %matplotlib inline
import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

# The experiments are no installed package: find them from the repository or a folder in it.
sys.path.extend(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())

from experiments import edge_deployment_figures as figures
from experiments.common import runner, show

run = Path(runner.__file__).parents[2] / os.environ.get(
    "JAXPRUNE_RESULTS", "results/edge_deployment_digits"
)
config, summary = runner.read_config(run), runner.read_summary(run)
rows = summary["rows"]
dense = figures.row_of(rows, "dense")
print(config)
print(json.loads((run / "latency.json").read_text())["machine"])

# %% [markdown]
# ## Accuracy against latency and bytes
#
# Up and to the left is better. Bars are one standard deviation over the seeds; squares are files in
# int8, in the colour of the float file that they were made from.

# %%
figures.pareto_figure(rows, tolerance=config["tolerance"])

# %% [markdown]
# ## In words

# %%
Markdown((run / "answer.md").read_text())

# %% [markdown]
# ## What is lost, seed by seed
#
# Points of test accuracy below the dense network of the same seed, a dot a seed and a bar for the
# mean. The dotted line is the tolerance of the search.

# %%
others = [row for row in rows if row is not dense]
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
for height, row in enumerate(reversed(others)):
    colour, _ = figures.STAGES[row["stage"]]
    lost = 100 * np.subtract(dense["accuracy"]["seeds"], row["accuracy"]["seeds"])
    axes.barh(height, lost.mean(), color=colour, alpha=0.4)
    axes.plot(lost, np.full(len(lost), height), "o", color=colour, markersize=4)
axes.axvline(config["tolerance"], color="0.35", linestyle=":", linewidth=1)
axes.axvline(0, color="0.35", linewidth=1)
axes.set_yticks(range(len(others)), [row["stage"] for row in reversed(others)])
axes.set_xlabel("points lost")
axes.grid(alpha=0.25, axis="x")
plt.show()

# %% [markdown]
# ## How much can go
#
# The search: accuracy on the validation set, in the mean over the seeds, after a short fine-tuning
# of what is left. Whatever lies above the dotted line is within the tolerance; the ring is what the
# bisection came to.

# %%
trials, found = summary["search"]["trials"], summary["search"]["sparsity"]
removed = np.array([100 * trial["sparsity"] for trial in trials])
mean = np.array([100 * trial["accuracy"]["mean"] for trial in trials])
std = np.array([100 * trial["accuracy"]["std"] for trial in trials])
figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
axes.errorbar(removed, mean, yerr=std, fmt="o-", color="#0072B2", capsize=3)
best = next(i for i, trial in enumerate(trials) if trial["sparsity"] == found)
axes.plot(removed[best], mean[best], "o", color="#D55E00", markersize=14, fillstyle="none")
axes.axhline(mean[0] - config["tolerance"], color="0.35", linestyle=":", linewidth=1)
axes.set_xlabel("channels removed [%]")
axes.set_ylabel("validation accuracy [%]")
axes.grid(alpha=0.25)
plt.show()

# %% [markdown]
# ## Where the bytes and the time go
#
# Each stage relative to dense, the smaller the better: bytes as they are and compressed, FLOPs, and
# the time of a call. A small network is slower than its FLOPs say: the cost of starting an
# operation stays.

# %%
measures = {
    "bytes": lambda row: row["bytes"] / dense["bytes"],
    "gzipped": lambda row: row["gzip_bytes"] / dense["gzip_bytes"],
    "FLOPs": lambda row: row["flops"] / dense["flops"],
    "batch 1": lambda row: row["latency_ratio"]["1"]["median"],
    "batch 64": lambda row: row["latency_ratio"]["64"]["median"],
}
table = np.array([[100 * share(row) for share in measures.values()] for row in others])
figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
axes.imshow(np.log(table), cmap="Blues", aspect="auto", alpha=0.6)
for (i, j), value in np.ndenumerate(table):
    axes.text(j, i, f"{value:.3g} %", ha="center", va="center")
axes.set_xticks(range(len(measures)), list(measures))
axes.set_yticks(range(len(others)), [f"{r['stage']}, {show.percent(r)} %" for r in others])
axes.set_title("percent of dense")
plt.show()
