#!/usr/bin/env bash
# What optax 0.2.8's `freeze` keeps still: it sets the gradients of some leaves to zero, and what
# follows in the chain does what it likes with a gradient of zero. Behind it `adam` and `sgd` with
# momentum do not move them; `adamw` and `lion` with weight decay shrink them at every step, so that
# "frozen" weights decay. `freeze` at the end of the chain, or `partition` with `set_to_zero`, holds
# them. Whoever prunes around such a chain sees frozen layers get smaller and rank lower.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "jax==0.10.2" "optax==0.2.8"
"$work/venv/bin/python" - <<'PYTHON' | tee "$work/seen"
import jax
import jax.numpy as jnp
import optax

params = {"frozen": jnp.ones(2), "trained": jnp.ones(2)}
mask = {"frozen": True, "trained": False}
decay = {"weight_decay": 0.5}
chains = {
    "freeze, adam": optax.chain(optax.freeze(mask), optax.adam(0.1)),
    "freeze, sgd with momentum": optax.chain(optax.freeze(mask), optax.sgd(0.1, momentum=0.9)),
    "freeze, adamw": optax.chain(optax.freeze(mask), optax.adamw(0.1, **decay)),
    "freeze, lion": optax.chain(optax.freeze(mask), optax.lion(0.1, **decay)),
    "adamw, freeze": optax.chain(optax.adamw(0.1, **decay), optax.freeze(mask)),
    "partition": optax.partition(
        {True: optax.set_to_zero(), False: optax.adamw(0.1, **decay)}, mask
    ),
}
for name, tx in chains.items():
    now, state = params, tx.init(params)
    for _ in range(10):
        updates, state = tx.update(now, state, now)
        now = optax.apply_updates(now, updates)
    print(f"{name}: a frozen weight of 1 is {float(now['frozen'][0]):.3f} after 10 steps")
PYTHON
diff - "$work/seen" <<'EXPECTED'
freeze, adam: a frozen weight of 1 is 1.000 after 10 steps
freeze, sgd with momentum: a frozen weight of 1 is 1.000 after 10 steps
freeze, adamw: a frozen weight of 1 is 0.599 after 10 steps
freeze, lion: a frozen weight of 1 is 0.599 after 10 steps
adamw, freeze: a frozen weight of 1 is 1.000 after 10 steps
partition: a frozen weight of 1 is 1.000 after 10 steps
EXPECTED
echo "as found with optax 0.2.8 and jax 0.10.2 on a CPU"
