"""Networks cut over a mesh of two axes, and every wrapper that trains them, for several tests."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.contract.trainings import TRAININGS

NAMES = ("data", "model")
STEPS = 4
RAMP = schedules.linear(0.75, begin=0, end=3, every=1)

# How the leaves of `network` are cut: by rows over all devices, by columns and rows in turn as in
# tensor parallelism, over both axes, and not at all.
LAYOUTS = {
    "fsdp": {"in": {"kernel": P(NAMES), "bias": P(NAMES)}, "out": {"kernel": P(NAMES)}},
    "tensor": {
        "in": {"kernel": P(None, "model"), "bias": P("model")},
        "out": {"kernel": P("model")},
    },
    "grid": {"in": {"kernel": P(*NAMES), "bias": P("model")}, "out": {"kernel": P(*NAMES)}},
    "replicated": {"in": {"kernel": P(), "bias": P()}, "out": {"kernel": P()}},
}

WRAPPERS = {
    "magnitude": functools.partial(jp.prune, schedule=RAMP),
    "taylor across, packed": functools.partial(
        jp.prune, schedule=RAMP, criterion=criteria.taylor, scope=scopes.across, packed=True
    ),
    "random channels": lambda inner: jp.prune(  # a key made now would start the backend
        inner,
        schedule=RAMP,
        criterion=criteria.random,
        key=jax.random.key(1),
        pattern=patterns.Channels(-1),
    ),
    "windows": functools.partial(jp.prune, schedule=RAMP, scope=scopes.windows(4)),
    "blocks, packed": functools.partial(
        jp.prune, schedule=RAMP, pattern=patterns.Blocks((2, 2)), scope=scopes.across, packed=True
    ),
    "hold": jp.hold,
    **TRAININGS,
}


def network():
    """Dyadic weights, so that sums are exact in whatever order devices add them up."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: rng.integers(-64, 65, shape).astype(np.float32) / 64
    return {"in": {"kernel": draw(16, 8), "bias": draw(8)}, "out": {"kernel": draw(8, 16)}}


def place(tree, mesh, layout):
    """Cut a tree over a mesh, whichever of its devices this process has."""

    def cut(leaf, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(cut, tree, LAYOUTS[layout])


def start(tx, params, name):
    """The state of an optimizer; a ticket where it holds one."""
    state = tx.init(params)
    if name == "hold":
        masks = jp.find_masks(params, 0.5, scope=scopes.across)
        state = jp.with_masks(state, masks)
    return state


def step(tx, params, state):
    """One update by gradients made from the weights alone: one multiplication each."""
    grads = jax.tree.map(lambda p: p * 0.5 - 0.125, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state
