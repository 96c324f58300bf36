#!/usr/bin/env bash
# What da4ml 0.6.0 makes of a product of two arrays of three axes, such as attention or experts: `x @ w`
# and `np.matmul` sum over the last axis of its variables and the *first* of the weights, as tensordot
# with axes=1 does, and count no batch. NumPy sums over the last but one, for each entry of the batch.
# Sizes that happen to be equal give another result without an error. `np.einsum` is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "da4ml==0.6.0" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import numpy as np
from da4ml.trace import FixedVariableArray

x = np.arange(48.0).reshape(4, 3, 4) % 7
w = np.arange(80.0).reshape(4, 4, 5) % 5
bits = np.full(x.shape, 3)
variables = FixedVariableArray.from_kif(np.zeros_like(bits), bits, np.zeros_like(bits))
print("numpy:", (x @ w).shape)
print("da4ml, @:", (variables @ w).shape)
print("da4ml, matmul:", np.matmul(variables, w).shape)
print("da4ml, einsum:", np.einsum("bij,bjk->bik", variables, w).shape)
print("tensordot:", np.tensordot(x, w, axes=1).shape)
PYTHON
diff - "$work/seen" <<'EXPECTED'
numpy: (4, 3, 5)
da4ml, @: (4, 3, 4, 5)
da4ml, matmul: (4, 3, 4, 5)
da4ml, einsum: (4, 3, 5)
tensordot: (4, 3, 4, 5)
EXPECTED
echo "as found with da4ml 0.6.0"
