#!/usr/bin/env bash
# What the package gguf 0.19.0 reads back for the zeros of a pruned matrix that it has written in blocks
# of 4 or 5 bits. All are zeros, but in blocks whose largest weight is positive they are -0.0: the scale
# of such a block is negative. Of Q8_0 and MXFP4 all are +0.0. A negative zero has a bit of its own, so
# that dequantized weights compress worse: those of Q4_0 with 90 % zeros by zlib some 10 %.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "gguf==0.19.0" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - 2> "$work/errors" <<'PYTHON' | tee "$work/seen"
import zlib

import gguf
import numpy as np

rng = np.random.default_rng(0)
weights = rng.standard_normal((256, 512)).astype(np.float32)
weights[np.abs(weights) < np.quantile(np.abs(weights), 0.9)] = 0
gone = weights == 0
assert not np.signbit(weights[gone]).any()
for name in ("Q4_0", "Q5_0", "Q8_0", "MXFP4"):
    kind = gguf.GGMLQuantizationType[name]
    back = gguf.quants.dequantize(gguf.quants.quantize(weights, kind), kind)
    assert (back[gone] == 0).all()
    negative = float(np.signbit(back[gone]).mean())
    larger = len(zlib.compress(back.tobytes())) / len(zlib.compress((back + 0.0).tobytes())) - 1
    size = "more than 5 % larger" if larger > 0.05 else "no larger"
    print(f"{name}: {negative:.1f} of the zeros are -0.0, compressed {size}")
PYTHON
diff - "$work/seen" <<'EXPECTED'
Q4_0: 0.5 of the zeros are -0.0, compressed more than 5 % larger
Q5_0: 0.5 of the zeros are -0.0, compressed more than 5 % larger
Q8_0: 0.0 of the zeros are -0.0, compressed no larger
MXFP4: 0.0 of the zeros are -0.0, compressed no larger
EXPECTED
echo "as found with gguf 0.19.0"
