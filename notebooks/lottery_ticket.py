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
# # Lottery tickets
#
# What `python -m experiments.lottery_ticket` found. Set `JAXPRUNE_RESULTS` to look at another run
# folder than `results/lottery_ticket_digits`; a relative path starts at the repository.

# %%
import itertools
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from flax.traverse_util import flatten_dict

# The experiments are no installed package: find them from the repository or a folder in it.
sys.path.extend(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "experiments").is_dir())

import jaxprune as jp
from experiments import lottery_ticket as ticket
from experiments import lottery_ticket_figures as figures
from experiments.common import runner, settings

run = Path(runner.__file__).parents[2] / os.environ.get(
    "JAXPRUNE_RESULTS", "results/lottery_ticket_digits"
)
config, summary = runner.read_config(run), runner.read_summary(run)
records = runner.read_records(run)
rows, seeds = summary["rows"], settings.seed_range(config["seeds"])
levels, first = range(config["levels"] + 1), seeds[0]
start, _ = runner.load(ticket.start_of(run, first))
masks = {
    (seed, level): runner.load(ticket.level_of(run, seed, level))[1]
    for seed in seeds
    for level in levels
}
left = [100 * (1 - jp.sparsity(masks[first, level], start)) for level in levels]
print(config)

# %% [markdown]
# ## How well, and how soon
#
# A line is the mean over the seeds, a band one standard deviation, the dashed line the dense
# network. Training stops early where the validation loss is lowest. A loss that still falls at the
# last step puts that point at the end, so only long runs tell how much sooner a ticket is there.

# %%
figure, (accuracy, early_stop) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
figures.draw_metric(accuracy, rows, "accuracy_best", percent=True)
figures.draw_metric(early_stop, rows, "early_stop_step")
accuracy.set_ylabel("test accuracy at early stopping [%]")
early_stop.set_ylabel("early-stopping step")
early_stop.set_ylim(bottom=0)
accuracy.legend(frameon=False)
plt.show()

# %%
figures.learning_figure(records)

# %% [markdown]
# ## Where the weights go
#
# Each layer loses its share; the output layer, small as it is, half as much a round.

# %%
tables = [jp.summary(jp.apply_masks(start, masks[first, n]), masks[first, n]) for n in levels]
sparsity = [{row.path: row.sparsity for row in table.rows} for table in tables]
figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for path in sparsity[0]:
    axes.plot(levels, [100 * layers[path] for layers in sparsity], "o-", markersize=3.5, label=path)
axes.plot(levels, [100 - share for share in left], "k--", linewidth=1, label="all")
axes.set_xlabel("level")
axes.set_ylabel("sparsity [%]")
axes.grid(alpha=0.25)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Do different seeds find the same ticket?
#
# Overlap is the Jaccard index of two masks, averaged over all pairs of seeds. What chance gives is
# what masks with as many weights in each layer would share if they were drawn at random.

# %%
pairs = list(itertools.combinations(seeds, 2))
if pairs:
    figure, (total, layers) = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    overlaps = [[jp.overlap(masks[a, n], masks[b, n]) for a, b in pairs] for n in levels]
    chance = [[figures.chance_overlap(masks[a, n], masks[b, n]) for a, b in pairs] for n in levels]
    found = [[overlap.total for overlap in level] for level in overlaps]
    total.plot(left, np.mean(found, axis=1), "o-", markersize=3.5, label="between seeds")
    total.plot(left, np.mean(chance, axis=1), "k--", linewidth=1, label="chance")
    for path in sparsity[0]:
        found = [[flatten_dict(o.leaves, sep="/")[path] for o in level] for level in overlaps]
        layers.plot(left, np.mean(found, axis=1), "o-", markersize=3.5, label=path)
    for axes in (total, layers):
        figures.weights_left_axis(axes, left)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    total.set_ylabel("overlap of the masks")
    plt.show()
else:
    print("One seed has no other to compare with.")

# %% [markdown]
# ## Which weights win
#
# The weights that a ticket keeps and those that it loses: where it starts from, and after the dense
# network was trained. Pruning by magnitude takes the middle out of the trained weights, and most
# of the winners stood out from the start.

# %%
level = len(levels) // 2
trained, _ = runner.load(ticket.level_of(run, first, 0))
figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
moments = {"where the ticket starts": start, "after training the dense network": trained}
for axes, (moment, weights) in zip(panels, moments.items(), strict=True):
    kept, removed = figures.split_weights(weights, masks[first, level])
    bins = np.linspace(*np.quantile(np.concatenate([kept, removed]), [0.001, 0.999]), 60)
    axes.hist(removed, bins, color="0.7", label=f"removed ({len(removed):,})")
    axes.hist(kept, bins, color=figures.COLOURS["ticket"], alpha=0.7, label=f"kept ({len(kept):,})")
    axes.set_title(moment)
    axes.set_xlabel(f"weight (ticket with {left[level]:.1f} % left)")
    axes.legend(frameon=False)
panels[0].set_ylabel("weights")
plt.show()
