#!/usr/bin/env bash
# Which optimizers of optax 0.2.8 (jax 0.10.2) take a stack of layers for one layer. Layers that a
# scan runs over lie in one array; four layers of very different size are given as a stack and as
# four leaves, with the same gradients, for one step. AdamW, Lion, Yogi, Adan and SM3 update both
# alike. LAMB, LARS, Fromage, NovoGrad and Adafactor take norms over a whole array, so that layers
# get steps up to some hundred times as long as they would alone. `adaptive_grad_clip` takes norms
# along the first axis of an array of three: over the layers. And Muon orthogonalises nothing: an
# array of three axes goes to Adam, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "jax==0.10.2" "optax==0.2.8"
JAX_PLATFORMS=cpu "$work/venv/bin/python" -W ignore - <<'PYTHON' | tee "$work/seen"
import jax
import jax.numpy as jnp
import optax

LAYERS, SHAPE = 4, (128, 256)
keys = jax.random.split(jax.random.key(0))
size = (10.0 ** jnp.arange(LAYERS))[:, None, None]
weights = jax.random.normal(keys[0], (LAYERS, *SHAPE)) * size
grads = jax.random.normal(keys[1], (LAYERS, *SHAPE)) / size

clipped = optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1e-2))
optimizers = {
    "adamw": optax.adamw(1e-2),
    "lion": optax.lion(1e-2),
    "yogi": optax.yogi(1e-2),
    "adan": optax.adan(1e-2),
    "sm3": optax.sm3(1e-2),
    "lamb": optax.lamb(1e-2),
    "lars": optax.lars(1e-2),
    "fromage": optax.fromage(1e-2),
    "novograd": optax.novograd(1e-2),
    "adafactor": optax.adafactor(1e-2),
    "adaptive_grad_clip": clipped,
    "muon": optax.contrib.muon(1e-2),
}


def updates(tx, weights, grads):
    return tx.update(grads, tx.init(weights), weights)[0]


for name, tx in optimizers.items():
    stack = updates(tx, weights, grads)
    leaves = jnp.stack(updates(tx, list(weights), list(grads)))
    difference = jnp.abs(stack - leaves).max((1, 2)) / jnp.abs(leaves).max((1, 2))
    print(f"{name}: {'as layers' if difference.max() < 1e-5 else 'as one layer'}")
adam = updates(optax.contrib.muon(1e-2), weights, grads)
plain = updates(optax.adamw(1e-2, b2=0.999, weight_decay=0.0, nesterov=True), weights, grads)
print("muon of a stack is Adam:", bool(jnp.abs(adam - plain).max() < 1e-5))
PYTHON
diff - "$work/seen" <<'EXPECTED'
adamw: as layers
lion: as layers
yogi: as layers
adan: as layers
sm3: as layers
lamb: as one layer
lars: as one layer
fromage: as one layer
novograd: as one layer
adafactor: as one layer
adaptive_grad_clip: as one layer
muon: as one layer
muon of a stack is Adam: True
EXPECTED
echo "as found with optax 0.2.8 and jax 0.10.2"
