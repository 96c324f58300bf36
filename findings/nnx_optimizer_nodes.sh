#!/usr/bin/env bash
# What flax 0.12.8's `nnx.Optimizer` does to an optimizer whose state holds a pytree node for each
# parameter, such as a mask in bits with its shape: it wraps each array of the state in a variable,
# a node made by `tree.map` over the params lies inside of one, and after the first update the
# variable holds an nnx `State` of the node's fields in the place of the node. An optimizer that
# reads its own node at the next update finds a type that it never made.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "jax==0.10.2" "optax==0.2.8" "flax==0.12.8"
"$work/venv/bin/python" - <<'PYTHON' | tee "$work/seen"
import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Bits:
    bits: jax.Array
    size: int = dataclasses.field(metadata={"static": True})


def keeps_bits():
    bits_of = lambda p: Bits(jnp.zeros(-(-p.size // 8), jnp.uint8), p.size)
    return optax.GradientTransformation(
        lambda params: jax.tree.map(bits_of, params), lambda u, s, params=None: (u, s)
    )


model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, keeps_bits(), wrt=nnx.Param)


def kind():
    return type(optimizer.opt_state["kernel"].get_value()).__name__


print(f"before an update: {kind()}")
optimizer.update(model, nnx.grad(lambda m: m(jnp.ones(4)).sum())(model))
print(f"after an update: {kind()}")
PYTHON
diff - "$work/seen" <<'EXPECTED'
before an update: Bits
after an update: State
EXPECTED
echo "as found with flax 0.12.8, optax 0.2.8 and jax 0.10.2 on a CPU"
