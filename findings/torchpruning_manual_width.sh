#!/usr/bin/env bash
# What the number given to `manual_prune_width` of Torch-Pruning 1.6.1 (torch 2.13.0) means. Its
# docstring says "Either a pruning ratio (float) or list of indices to prune", and everywhere else
# in the package a pruning ratio is the share that goes. Here it is the share that stays: of 16
# outputs 0.25 leaves 4, where `pruning_ratio=0.25` of the pruner itself leaves 12.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "torch-pruning==1.6.1"
CUDA_VISIBLE_DEVICES= "$work/venv/bin/python" -W ignore - <<'PYTHON' | tee "$work/seen"
import torch
import torch_pruning as tp


def network():
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def pruner(model, **settings):
    importance = tp.importance.MagnitudeImportance()
    return tp.pruner.BasePruner(model, torch.ones(1, 8), importance, ignored_layers=[model[2]], **settings)


for ratio in (0.25, 0.75):
    model = network()
    pruner(model, pruning_ratio=ratio).step()
    print(f"pruning_ratio={ratio}: {model[0].out_features} of 16 outputs stay")
    model = network()
    pruner(model).manual_prune_width(model[0], tp.prune_linear_out_channels, ratio)
    print(f"manual_prune_width(..., {ratio}): {model[0].out_features} of 16 outputs stay")
PYTHON
diff - "$work/seen" <<'EXPECTED'
pruning_ratio=0.25: 12 of 16 outputs stay
manual_prune_width(..., 0.25): 4 of 16 outputs stay
pruning_ratio=0.75: 4 of 16 outputs stay
manual_prune_width(..., 0.75): 12 of 16 outputs stay
EXPECTED
echo "as found with torch-pruning 1.6.1 and torch 2.13.0 on a CPU"
