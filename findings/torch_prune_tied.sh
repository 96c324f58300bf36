#!/usr/bin/env bash
# What `torch.nn.utils.prune` of torch 2.13.0 does to weights that two modules share, as an embedding
# and the output layer of a language model do. It unties them while it masks: the module that is
# pruned computes with a masked copy, the other one with the dense parameter. `prune.remove`, which
# is to make the pruning permanent, writes the masked weights into that parameter, so that now both
# are sparse and the network computes something else than it did while it was trained and measured.
# Mask both modules with one mask (`prune.custom_from_mask`) and nothing changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6"
CUDA_VISIBLE_DEVICES= "$work/venv/bin/python" -W ignore - <<'PYTHON' | tee "$work/seen"
import torch
from torch.nn.utils import prune

for both in (False, True):
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    modules = [embedding, head] if both else [embedding]
    mask = embedding.weight.abs() > embedding.weight.abs().median()

    def outputs():
        return head(embedding(torch.arange(6))).detach()

    def zeros():
        return ", ".join(f"{int((m.weight == 0).sum())} of 24" for m in (embedding, head))

    for module in modules:
        prune.custom_from_mask(module, "weight", mask)
    before = outputs()
    print("both masked" if both else "the embedding is masked", "- zeros of embedding and head:", zeros())
    for module in modules:
        prune.remove(module, "weight")
    print("  after prune.remove:", zeros() + ", same outputs:", torch.equal(before, outputs()))
PYTHON
diff - "$work/seen" <<'EXPECTED'
the embedding is masked - zeros of embedding and head: 12 of 24, 0 of 24
  after prune.remove: 12 of 24, 12 of 24, same outputs: False
both masked - zeros of embedding and head: 12 of 24, 12 of 24
  after prune.remove: 12 of 24, 12 of 24, same outputs: True
EXPECTED
echo "as found with torch 2.13.0 on a CPU"
