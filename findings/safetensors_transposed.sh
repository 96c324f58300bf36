#!/usr/bin/env bash
# What safetensors 0.8.0 does with a numpy array that is not contiguous, such as a kernel transposed
# on its way to another library's layout: `safetensors.numpy.save_file` writes the buffer as it lies
# in memory under the shape of the view, so that other numbers come back, without an error. 0.7.0
# copies first and is right. `np.ascontiguousarray` on each array before saving is right with both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 0.7.0 0.8.0; do
    "${PYTHON:-python3}" -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet "safetensors==$version" "numpy==2.4.0"
    (cd "$work" && "$work/$version/bin/python" - "$version") <<'PYTHON'
import sys

import numpy as np
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
for name, array in (("transposed", kernel.T), ("copied", np.ascontiguousarray(kernel.T))):
    save_file({"kernel": array}, "kernel.safetensors")
    back = load_file("kernel.safetensors")["kernel"]
    print(f"safetensors {sys.argv[1]}, {name}: {back.tolist()}, equal: {(back == array).all()}")
PYTHON
done | tee "$work/seen"
diff - "$work/seen" <<'EXPECTED'
safetensors 0.7.0, transposed: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], equal: True
safetensors 0.7.0, copied: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], equal: True
safetensors 0.8.0, transposed: [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], equal: False
safetensors 0.8.0, copied: [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]], equal: True
EXPECTED
echo "as found with safetensors 0.7.0 and 0.8.0, numpy 2.4.0"
