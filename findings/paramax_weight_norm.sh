#!/usr/bin/env bash
# What paramax 0.0.5 makes of weights when it reparametrizes them by direction and scale
# (`WeightNormalization`). It starts from the inverse of each row's norm: a row of norm 5 has norm 0.2
# once unwrapped, where one expects the weights that were given, as of PyTorch's `weight_norm`. A row
# that pruning has removed has the scale inf and is NaN. Flows of flowjax are built of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "paramax==0.0.5" "jax==0.10.2" "equinox==0.13.8"
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import jax.numpy as jnp
import paramax

weights = jnp.array([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]])
unwrapped = paramax.unwrap(paramax.WeightNormalization(weights))
for before, after in zip(weights, unwrapped):
    print(f"norm {float(jnp.linalg.norm(before)):.1f} -> {float(jnp.linalg.norm(after)):.1f}")
PYTHON
diff - "$work/seen" <<'EXPECTED'
norm 5.0 -> 0.2
norm 1.0 -> 1.0
norm 0.0 -> nan
EXPECTED
echo "as found with paramax 0.0.5 and jax 0.10.2 on a CPU"
