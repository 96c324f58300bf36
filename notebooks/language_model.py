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
# # What one pass over a text buys
#
# What `python -m experiments.language_model` found: a trained language model of which single
# weights, neurons or layers are removed without any training. Set `JAXPRUNE_RESULTS` to look at
# another run folder than `results/language_model_smollm2`; a relative path starts at the
# repository.

# %%
# %matplotlib inline
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

# The experiments are no installed package: find them from the repository or a folder in it.
sys.path.extend(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())

from experiments import language_model_figures as figures
from experiments.common import runner, show

run = Path(runner.__file__).parents[2] / os.environ.get(
    "JAXPRUNE_RESULTS", "results/language_model_smollm2"
)
config, rows = runner.read_config(run), runner.read_summary(run)["rows"]
records = runner.read_records(run)
print(config)

# %% [markdown]
# ## All figures
#
# The standard error is that of the distance to the dense network, window by window.

# %%
show.printed(figures.table(rows, title=config["model"]))

# %% [markdown]
# ## Perplexity against what is removed
#
# Lower is better; hollow marks are N of M neighbours that stay.

# %%
figures.perplexity_figure(rows)

# %% [markdown]
# ## What better weights cost
#
# CPU seconds of the pruning against the perplexity after it, for each amount of single weights.

# %%
weights = [row for row in rows if row["part"] == "weights"]
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for method in dict.fromkeys(row["method"] for row in weights):
    own = [row for row in weights if row["method"] == method]
    colour, marker = figures.STYLES[method]
    seconds, perplexities = zip(
        *((row["cpu_seconds"], row["perplexity"]) for row in own), strict=True
    )
    axes.plot(seconds, perplexities, marker, color=colour, label=method)
    for row in own:
        place = row["cpu_seconds"], row["perplexity"]
        axes.annotate(row["amount"], place, (5, -3), textcoords="offset points", fontsize=7)
axes.set(yscale="log", xlabel="CPU seconds", ylabel="perplexity")
axes.legend(frameon=False)
show.plain(axes)
plt.show()

# %% [markdown]
# ## Window by window
#
# By how much each window is harder to predict than for the dense network, in nats of a token. Where
# all dots of a method lie on one side of another's, few windows are enough to tell them apart.

# %%
dense = next(np.array(r["losses"]) for r in records if r["part"] == "nothing")
shown = [r for r in records if r["amount"] in ("0.5", "2:4") and r["part"] == "weights"]
figure, axes = plt.subplots(figsize=(7, 0.5 + 0.4 * len(shown)), layout="constrained")
for height, record in enumerate(shown):
    lost = np.array(record["losses"]) - dense
    colour, marker = figures.STYLES[record["method"]]
    axes.plot(lost, np.full(len(lost), -height), marker, color=colour, alpha=0.5)
    axes.plot(lost.mean(), -height, "|", color="black", markersize=14)
axes.set_yticks(-np.arange(len(shown)), [f"{r['method']}, {r['amount']}" for r in shown])
axes.set_xlabel("loss above dense [nats]")
axes.grid(alpha=0.25)
plt.show()
