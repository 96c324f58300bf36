#!/usr/bin/env bash
# What llm-compressor 0.14.0.1 (torch 2.13.0) removes, counted. The two functions that its modifiers
# call for one layer are given a layer of 258 inputs and 8 outputs, and the statistics of random
# inputs. In `mask_structure="N:M"` N counts what is removed, for both methods: 1:4 keeps three of
# four, where N:M elsewhere means N that stay. (2:4, the usual one, is the same either way.)
# SparseGPT takes its mask from a threshold that is removed as well: at 50 % one weight more in each
# block of 128 inputs, three here. Wanda rounds down what each output loses: 180 of 258 at 70 %,
# where 180.6 were asked for.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "llmcompressor==0.14.0.1"
CUDA_VISIBLE_DEVICES= "$work/venv/bin/python" -W ignore - 2> "$work/log" <<'PYTHON' | grep zero | tee "$work/seen"
import torch
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify

INPUTS, OUTPUTS = 258, 8
torch.manual_seed(0)
x = torch.randn(1000, INPUTS)


def layer(inputs=INPUTS):
    torch.manual_seed(1)
    return torch.nn.Linear(inputs, OUTPUTS, bias=False)


def sparsegpt(sparsity, n=0, m=0, inputs=INPUTS):
    module, rows = layer(inputs), x[:, :inputs]
    return sgpt_sparsify.sparsify_weight(
        module,
        {module: 2 * rows.T @ rows / len(rows)},
        sparsity=sparsity,
        prune_n=n,
        prune_m=m,
        block_size=128,
        dampening_frac=0.01,
        preserve_sparsity_mask=False,
    )[1]


def wanda(sparsity, n=0, m=0, inputs=INPUTS):
    module = layer(inputs)
    norms = (x[:, :inputs] ** 2).mean(0)
    return wanda_sparsify.sparsify_weight(module, {module: norms}, sparsity, n, m)


def zeros(w):
    return int((w == 0).sum())


for name, method in (("sparsegpt", sparsegpt), ("wanda", wanda)):
    w = method(0.5, 1, 4, inputs=256)
    print(f"{name} 1:4: {zeros(w)} of {w.numel()} are zero")
print(f"sparsegpt 50 %: {zeros(sparsegpt(0.5))} of {INPUTS * OUTPUTS} are zero")
print(f"wanda 70 %: {zeros(wanda(0.7)) // OUTPUTS} of {INPUTS} inputs of each output are zero")
PYTHON
diff - "$work/seen" <<'EXPECTED'
sparsegpt 1:4: 512 of 2048 are zero
wanda 1:4: 512 of 2048 are zero
sparsegpt 50 %: 1035 of 2064 are zero
wanda 70 %: 180 of 258 inputs of each output are zero
EXPECTED
