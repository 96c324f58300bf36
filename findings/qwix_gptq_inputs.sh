#!/usr/bin/env bash
# How many zeros of a pruned matrix survive GPTQ of qwix 0.1.8. It sends the rounding error of a weight
# into those that come after it, in proportion to how inputs go together: of inputs that have nothing to
# do with one another all zeros survive, whatever the sparsity, so that a check on random inputs sees
# nothing. Of inputs with a spectrum that decays, as that of activations does, some per cent of the zeros
# come back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "qwix==0.1.8" "jax==0.10.2" "flax==0.12.8" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import jax.numpy as jnp
import numpy as np
import qwix
from qwix._src.core import qarray
from qwix.contrib import gptq_core

rng = np.random.default_rng(0)
weights = rng.standard_normal((256, 128)).astype(np.float32)
weights[np.abs(weights) < np.median(np.abs(weights))] = 0
gone = weights == 0
white = np.linalg.qr(rng.standard_normal((1024, 128)))[0].T  # [inputs, samples], no correlation
basis = np.linalg.qr(rng.standard_normal((128, 128)))[0]
mixed = basis @ (rng.standard_normal((128, 1024)) / np.arange(1, 129)[:, None])
how = qarray.HowToQuantize(qtype="int8", channelwise_axes=[0])
for name, inputs in (("uncorrelated", white), ("decaying spectrum", mixed)):
    hessian = gptq_core.compute_hessian(jnp.asarray(inputs, jnp.float32))
    made, _ = gptq_core.quantize_weight(jnp.asarray(weights), hessian, how)
    kept = float((np.asarray(qwix.dequantize(made))[gone] == 0).mean())
    print(f"{name}: {'all' if kept == 1 else 'fewer than 98 %' if kept < 0.98 else 'most'} survive")
PYTHON
diff - "$work/seen" <<'EXPECTED'
uncorrelated: all survive
decaying spectrum: fewer than 98 % survive
EXPECTED
echo "as found with qwix 0.1.8 and jax 0.10.2 on a CPU"
