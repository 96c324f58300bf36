#!/usr/bin/env bash
# What optax 0.2.8 does to boolean masks in an optimizer state: `optax.contrib.sam` selects between
# the old and the new state by arithmetic (`a * x + b * y`), so that a bool array comes back as
# int32 from the first update on. `lax.scan` over such steps is refused (the carry changes its
# type), and a jitted step is traced again.
#
# For a pruner inside of `sam` this means masks of 0 and 1 that `jnp.where` still takes, and `~mask`
# that is -1 or -2, both of which are true. Wrap the other way round: the pruner outermost.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "jax==0.10.2" "optax==0.2.8"
"$work/venv/bin/python" - <<'PYTHON' | tee "$work/seen"
import jax
import jax.numpy as jnp
import optax


def remembers_a_mask():
    state = {"mask": jnp.array([True, False])}
    return optax.GradientTransformation(lambda params: state, lambda u, s, params=None: (u, s))


inner = optax.chain(optax.sgd(0.1), remembers_a_mask())
adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
params = jnp.array([1.0, 2.0])
for name, tx in (("alone", inner), ("inside of sam", optax.contrib.sam(inner, adversary))):
    state = tx.init(params)
    before = optax.tree.get(state, "mask")
    _, state = tx.update(params, state, params)
    after = optax.tree.get(state, "mask")
    print(f"{name}: {before.dtype} -> {after.dtype}, inverted {(~after).tolist()}")
PYTHON
diff - "$work/seen" <<'EXPECTED'
alone: bool -> bool, inverted [False, True]
inside of sam: bool -> int32, inverted [-2, -1]
EXPECTED
echo "as found with optax 0.2.8 and jax 0.10.2 on a CPU"
