#!/usr/bin/env bash
# How XLA on a CPU (jaxlib 0.10.2) compiles many layers of one shape: kernels whose text is equal are
# compiled once, so 72 comparisons with 72 scalars cost hardly more than one. The same comparisons
# with 72 entries of one vector cost some ten times as much, since the constant index of each entry
# becomes a part of its kernel, and none equals another. A program for the layers of an unrolled
# network compiles fast if what differs between them is data, and slowly if it is a constant.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "jax==0.10.2"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON' | tee "$work/seen"
import time

import jax
import jax.numpy as jnp

LAYERS = 72
layers = [jnp.ones((256, 256)) for _ in range(LAYERS)]
scalars, vector = [jnp.float32(0) for _ in layers], jnp.zeros(LAYERS)


def compile_seconds(compare, bounds):
    lowered = jax.jit(compare).lower(layers, bounds)
    before = time.process_time()
    lowered.compile()
    return time.process_time() - before


pairs = lambda xs, bounds: [x > bound for x, bound in zip(xs, bounds)]
entries = lambda xs, bounds: [x > bounds[i] for i, x in enumerate(xs)]
compile_seconds(pairs, scalars)
ratio = compile_seconds(entries, vector) / compile_seconds(pairs, scalars)
print("entries of a vector over scalars, at least four times:", ratio > 4)
PYTHON
diff - "$work/seen" <<'EXPECTED'
entries of a vector over scalars, at least four times: True
EXPECTED
echo "as found with jax 0.10.2 on a CPU"
