"""Everything public that the laws run over. A new name needs a row here; a test says so."""

import dataclasses
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes

# The slow, obvious score of one leaf, up to a factor for all leaves: from weights, gradients, key
# and the place of the leaf; a criterion with memory gets what it remembers of the leaf as well.
CRITERIA = {
    "magnitude": lambda w, g, key, i: np.abs(w),
    "taylor": lambda w, g, key, i: np.abs(w * g),
    "random": lambda w, g, key, i: np.asarray(
        jax.random.uniform(jax.random.fold_in(key, i), w.shape)
    ),
    "fisher": lambda w, g, key, i: (g * w) ** 2 / 2,
    "fisher_ema": lambda w, g, key, i, h: h * w**2 / 2,
    "grasp": lambda w, g, key, i: w * BATCH * (slope(w) + BATCH * w),  # the Hessian is BATCH
    "lamp": lambda w, g, key, i: slow_lamp(w),
    "magnitude_increase": lambda w, g, key, i: np.abs(w) - np.abs(start(w)),
    "movement": lambda w, g, key, i, moved: moved,
    "snip": lambda w, g, key, i: np.abs(w * (slope(w) + BATCH * w)),
    "synflow": lambda w, g, key, i: np.abs(w) * np.abs(slope(w)),
    "wanda": lambda w, g, key, i: np.abs(w) * norms(w),
}

# How a memory takes one step, leaf by leaf; it starts from zero.
MEMORIES = {
    "fisher_ema": lambda h, w, g: 0.5 * h + 0.5 * g**2,
    "movement": lambda moved, w, g: moved - w * g,
}

# Criteria that differ from others in nothing that a pattern sees: one will do in the fast suite.
ONE_PATTERN = (
    *("fisher", "fisher_ema", "grasp", "lamp"),
    *("magnitude_increase", "movement", "snip", "synflow", "wanda"),
)


def make_criterion(name):
    """The criterion of a row; ``fisher_ema`` is a factory."""
    return criteria.fisher_ema(0.5) if name == "fisher_ema" else getattr(criteria, name)


# Evidence for every criterion, known by hand. The loss has the gradient slope + BATCH * w and the
# Hessian BATCH; the flow, with the input replaced by 1, has the slope |slope|.
BATCH = 2.0


def draw(w, seed, most):
    """Binary fractions of few bits for a leaf, so that products with weights are exact."""
    drawn = np.random.default_rng([seed, w.size]).integers(-most, most + 1, w.shape)
    return (drawn / 8).astype(w.dtype)


def slow_lamp(w):
    """Each weight against those that go after it: the larger ones, and equal ones before it."""
    size, share = np.abs(w).ravel(), np.zeros(w.size)
    for u, x in enumerate(size):
        left = sum(y * y for v, y in enumerate(size) if y > x or (y == x and v <= u))
        share[u] = x * x / left if x else 0.0
    return share.reshape(w.shape)


def slope(w):
    return draw(w, 1, 4)


def start(w):
    return draw(w, 2, 8)


def norms(w):
    """One for each input: of the rank of the leaf, 1 along its outputs."""
    return np.abs(draw(w[..., :1], 3, 8)) + np.asarray(0.125, w.dtype)


def loss_fn(params, batch):
    return sum(jnp.sum(slope(w) * w + batch * w * w / 2) for w in jax.tree.leaves(params))


def apply_fn(params, batch):
    return jax.tree.map(lambda w: np.abs(slope(w)) * w**batch, params)


def evidence():
    """What the criteria ask for beside grads, key and state."""
    return {
        "loss_fn": loss_fn,
        "apply_fn": apply_fn,
        "batch": jnp.float32(BATCH),
        "params_init": jax.tree.map(start, small_params()),
        "norms": jax.tree.map(norms, small_params()),
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
    "per_output": scopes.per_output,
    "windows": scopes.windows(4),
    "uniform": scopes.uniform,
    "erk": scopes.erk,
    "custom": lambda params, sparsity: scopes.custom(params, {"a/.*": sparsity}, default=0.25),
    "owl": lambda params, sparsity: scopes.owl(
        jax.tree.map(jnp.abs, params), sparsity, threshold=1.5, deviation=0.125, where=jp.is_matrix
    ),
}
ALLOCATIONS = ("uniform", "erk", "custom", "owl")

# How each schedule is built from a final sparsity, over the updates 1 to 5 of six.
SCHEDULES = {
    "constant": schedules.constant,
    "one_shot": lambda final: schedules.one_shot(final, at=2),
    "linear": lambda final: schedules.linear(final, begin=1, end=5, every=3),
    "cubic": lambda final: schedules.cubic(final, begin=1, end=5, every=3),
    "cosine": lambda final: schedules.cosine(final, begin=1, end=5, every=3),
    # Three events, of which half the final sparsity as the rate brings about as much.
    "geometric": lambda final: schedules.geometric(
        jax.tree.map(lambda s: s / 2, final), begin=1, end=5, every=3
    ),
    "custom": lambda final: schedules.custom(
        lambda step: jax.tree.map(lambda s: s * jnp.minimum(step, 4) / 4, final), 1, 5, 3
    ),
    "cyclic": lambda final: schedules.cyclic(final, dense=1, sparse=2, begin=1, end=5),
}
STEPS = 6

# These need the groups of a function: tests/test_structure.py and test_zoo.py run over them.
COUPLED = ("Coupled", "isomorphic")

# Pairs that make no sense, with the words that refuse them.
REFUSED = {
    ("Channels", "windows"): r"`windows\(m=4\)`.*`Channels`",
    ("Channels", "per_output"): r"`per_output`.*`Channels`",
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


class Attention(NamedTuple):
    key: jax.Array
    value: jax.Array


@struct.dataclass
class Called:
    """Params that can be called: neither evidence nor params go by what is callable."""

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.kernel + self.bias


def equinox_module():
    model = eqx.nn.MLP(8, 8, 8, 1, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_array)


TREES = {
    "dict": lambda: {"a": {"kernel": kernel(), "bias": jnp.ones(8)}, "b": kernel(16, 4)},
    "FrozenDict": lambda: FrozenDict({"a": {"kernel": kernel(), "bias": jnp.ones(8)}}),
    "list": lambda: [kernel(), [jnp.ones(8), kernel(16, 4)]],
    "tuple": lambda: (kernel(), (jnp.ones(8), kernel(16, 4))),
    "NamedTuple": lambda: Layers(kernel(), jnp.ones(8)),
    "dataclass": lambda: Net(kernel(), [jnp.ones(8), kernel(16, 4)]),
    "nnx state": linear_state,
    "nnx pure": lambda: nnx.to_pure_dict(linear_state()),
    "callable module": equinox_module,
    "callable struct": lambda: Called(kernel(), jnp.ones(8)),
    "key and value": lambda: {"attention": Attention(kernel(), kernel(16, 4))},
    "paths that meet": lambda: {"a/kernel": kernel(), "a": {"kernel": kernel(16, 4)}},
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
    patterns: [*PATTERNS, *COUPLED[:1]],
    scopes: [*SCOPES, *COUPLED[1:]],
    schedules: SCHEDULES,
}
