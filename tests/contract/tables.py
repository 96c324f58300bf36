"""Everything public that the laws run over. A new name needs a row here; a test says so."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import FrozenDict

from jaxprune import criteria, patterns, schedules, scopes

# The slow, obvious score of one leaf: from weights, gradients, key and the place of the leaf.
CRITERIA = {
    "magnitude": lambda w, g, key, i: np.abs(w),
    "taylor": lambda w, g, key, i: np.abs(w * g),
    "random": lambda w, g, key, i: np.asarray(
        jax.random.uniform(jax.random.fold_in(key, i), w.shape)
    ),
}

PATTERNS = {
    "Weights": patterns.Weights(),
    "Channels": patterns.Channels(-1),
    "Blocks": patterns.Blocks((2, 4)),  # ragged on the second kernel
}

# Scopes, and allocations as the tree of sparsities that they make for `per_leaf`.
SCOPES = {
    "per_leaf": scopes.per_leaf,
    "across": scopes.across,
    "windows": scopes.windows(4),
    "uniform": scopes.uniform,
    "erk": scopes.erk,
    "custom": lambda params, sparsity: scopes.custom(params, {"a/.*": sparsity}, default=0.25),
}
ALLOCATIONS = ("uniform", "erk", "custom")

# How each schedule is built from a final sparsity, over the updates 1 to 5 of six.
SCHEDULES = {
    "constant": schedules.constant,
    "one_shot": lambda final: schedules.one_shot(final, at=2),
    "linear": lambda final: schedules.linear(final, begin=1, end=5, every=3),
    "cubic": lambda final: schedules.cubic(final, begin=1, end=5, every=3),
    "cosine": lambda final: schedules.cosine(final, begin=1, end=5, every=3),
    "geometric": lambda rate: schedules.geometric(rate, begin=1, end=5, every=3),
    "custom": lambda final: schedules.custom(
        lambda step: jax.tree.map(lambda s: s * jnp.minimum(step, 4) / 4, final), 1, 5, 3
    ),
}
STEPS = 6

# Pairs that make no sense, with the words that refuse them.
REFUSED = {
    ("Channels", "windows"): r"`windows\(m=4\)`.*`Channels`",
    ("tree", "across"): r"`across`.*one sparsity.*got a tree",
}


def small_params():
    """Two kernels and a bias of short binary fractions, so that sums of them are exact."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: jnp.asarray(rng.integers(-64, 65, shape) / 64, jnp.float32)
    return {"a": {"kernel": draw(8, 8), "bias": draw(8)}, "b": {"kernel": draw(16, 6)}}


class Layers(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Net:
    kernel: jax.Array
    layers: list


def linear_state():
    return nnx.state(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Param)


def kernel(rows=8, columns=8):
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, columns)), jnp.float32)


TREES = {
    "dict": lambda: {"a": {"kernel": kernel(), "bias": jnp.ones(8)}, "b": kernel(16, 4)},
    "FrozenDict": lambda: FrozenDict({"a": {"kernel": kernel(), "bias": jnp.ones(8)}}),
    "list": lambda: [kernel(), [jnp.ones(8), kernel(16, 4)]],
    "tuple": lambda: (kernel(), (jnp.ones(8), kernel(16, 4))),
    "NamedTuple": lambda: Layers(kernel(), jnp.ones(8)),
    "dataclass": lambda: Net(kernel(), [jnp.ones(8), kernel(16, 4)]),
    "nnx state": linear_state,
    "nnx pure": lambda: nnx.to_pure_dict(linear_state()),
}


OPTIMIZERS = {
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.1),
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: optax.lion(0.01, weight_decay=0.1),
    "rmsprop": lambda: optax.rmsprop(0.01, momentum=0.9),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4, weight_decay_rate=0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.1, weight_decay=0.1),
    "lbfgs": optax.lbfgs,
}


def labels(params):
    return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "rest", params)


# From a function that wraps an optimizer (prune or hold) to a transformation of the whole tree.
WRAPPERS = {
    "alone": lambda wrap: wrap(optax.adam(0.1)),
    "chain, last": lambda wrap: optax.chain(
        optax.clip_by_global_norm(1.0), wrap(optax.adamw(0.1, weight_decay=0.1))
    ),
    "around a chain": lambda wrap: wrap(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    ),
    "inside masked": lambda wrap: optax.masked(
        wrap(optax.adam(0.1)), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "around masked": lambda wrap: wrap(
        optax.masked(optax.adam(0.1), lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    ),
    "inside multi_transform": lambda wrap: optax.multi_transform(
        {"matrix": wrap(optax.adam(0.1)), "rest": optax.sgd(0.1)}, labels
    ),
    "around multi_transform": lambda wrap: wrap(
        optax.multi_transform({"matrix": optax.adam(0.1), "rest": optax.sgd(0.1)}, labels)
    ),
    "around inject_hyperparams": lambda wrap: wrap(
        optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1)
    ),
    "inside inject_hyperparams": lambda wrap: optax.inject_hyperparams(
        lambda learning_rate: wrap(optax.adam(learning_rate))
    )(learning_rate=0.1),
    "inside MultiSteps": lambda wrap: optax.MultiSteps(
        wrap(optax.adam(0.1)), every_k_schedule=2
    ).gradient_transformation(),
    "around MultiSteps": lambda wrap: wrap(
        optax.MultiSteps(optax.adam(0.1), every_k_schedule=2).gradient_transformation()
    ),
    "inside apply_if_finite": lambda wrap: optax.apply_if_finite(wrap(optax.adam(0.1)), 5),
    "around apply_if_finite": lambda wrap: wrap(optax.apply_if_finite(optax.adam(0.1), 5)),
}

FAMILIES = {
    criteria: CRITERIA,
    patterns: PATTERNS,
    scopes: SCOPES,
    schedules: SCHEDULES,
}
