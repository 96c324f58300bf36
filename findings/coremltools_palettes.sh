#!/usr/bin/env bash
# What happens to the zeros of weights when coremltools 9.0 compresses them twice. Palettes alone replace
# every zero of a matrix without a gap around zero by a value near it. Pruning first and palettes
# afterwards, with their defaults, change nothing in the second pass and say nothing. Only
# `joint_compression=True` gives sparse palettes, whose zeros are zeros.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "coremltools==9.0" "numpy==2.4.6" "scikit-learn==1.8.0"
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import logging
import pathlib

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
from coremltools.converters.mil import Builder as mb

logging.disable(logging.WARNING)
rng = np.random.default_rng(0)
weights = rng.standard_normal((256, 256)).astype(np.float32)
weights[rng.random(weights.shape) < 0.6] = 0  # at random: no gap around zero


@mb.program(input_specs=[mb.TensorSpec(shape=(1, 256))])
def program(x):
    return mb.linear(x=x, weight=weights)


dense = ct.convert(program, minimum_deployment_target=ct.target.iOS18, compute_units=ct.ComputeUnit.CPU_ONLY)
palettes = cto.OptimizationConfig(
    global_config=cto.OpPalettizerConfig(mode="kmeans", nbits=4)
)
sparse = cto.prune_weights(
    dense,
    cto.OptimizationConfig(global_config=cto.OpThresholdPrunerConfig(threshold=0.0)),
)


def look(name, model):
    model.save(f"{name}.mlpackage")
    size = sum(p.stat().st_size for p in pathlib.Path(f"{name}.mlpackage").rglob("*") if p.is_file())
    plain = cto.decompress_weights(model)
    back = [
        op.weight.val for op in plain._mil_program.functions["main"].operations if op.op_type == "linear"
    ][0]
    kept = float((back[weights == 0] == 0).mean())
    print(f"{name}: zeros kept {kept:.0%}, bytes {size / sizes.setdefault('dense', size):.2f} of dense")


sizes = {}
look("dense", dense)
look("pruned", sparse)
look("palettes", cto.palettize_weights(dense, palettes))
look("pruned, palettes", cto.palettize_weights(sparse, palettes))
look("pruned, palettes jointly", cto.palettize_weights(sparse, palettes, joint_compression=True))
PYTHON
diff - "$work/seen" <<'EXPECTED'
dense: zeros kept 100%, bytes 1.00 of dense
pruned: zeros kept 100%, bytes 0.47 of dense
palettes: zeros kept 0%, bytes 0.27 of dense
pruned, palettes: zeros kept 100%, bytes 0.47 of dense
pruned, palettes jointly: zeros kept 100%, bytes 0.19 of dense
EXPECTED
echo "as found with coremltools 9.0 on Linux"
