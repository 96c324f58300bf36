#!/usr/bin/env bash
# What HGQ2 0.2.0 (Keras 3.15.1 on JAX) estimates for the cost of a layer whose kernel has been pruned:
# EBOPs, the product of the bit widths, which its regularisation punishes in training. It counts
# widths, not values. With nine of ten weights at exactly 0 the estimate stays as it was; only with the
# widths of the same weights at 0 it falls. Zeros themselves survive its quantizers exactly.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "HGQ2==0.2.0" "keras==3.15.1" "jax==0.10.2" "numpy==2.4.6"
cd "$work"
KERAS_BACKEND=jax "$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import keras
import numpy as np
from hgq.config import LayerConfigScope, QuantizerConfigScope
from hgq.layers import QDense
from hgq.utils import trace_minmax

with (
    QuantizerConfigScope(default_q_type="kbi", place="weight"),
    LayerConfigScope(enable_ebops=True, beta0=0.0),
):
    layer = QDense(64, use_bias=False, name="layer")
    model = keras.Sequential([keras.Input((64,)), layer])

rng = np.random.default_rng(0)
x = rng.normal(size=(256, 64)).astype(np.float32)
kernel = rng.normal(size=(64, 64)).astype(np.float32)
gone = np.abs(kernel) < np.quantile(np.abs(kernel), 0.9)


def cost():
    return float(np.sum(np.asarray(trace_minmax(model, x, verbose=0))))


layer.kernel.assign(kernel)
dense = cost()
layer.kernel.assign(np.where(gone, 0, kernel))
values = cost()
kept = np.asarray(layer.qkernel)
widths = [v for v in layer.kq.variables if v.shape == kernel.shape]
for width in widths:
    width.assign(np.where(gone, 0, np.asarray(width)))
both = cost()
print("zeros survive the quantizer:", bool((kept[gone] == 0).all()))
print(f"cost with 90 % of the values at 0: {values / dense:.1f} of dense")
print(f"cost with their widths at 0, too: {both / dense:.1f} of dense")
PYTHON
diff - "$work/seen" <<'EXPECTED'
zeros survive the quantizer: True
cost with 90 % of the values at 0: 1.0 of dense
cost with their widths at 0, too: 0.1 of dense
EXPECTED
echo "as found with HGQ2 0.2.0 and Keras 3.15.1 on JAX 0.10.2"
