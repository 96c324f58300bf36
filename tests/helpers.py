"""What several test files need: trees to prune, slow NumPy references, trace counts."""

import jax
import jax.numpy as jnp
import numpy as np


def tree_of_weights(key, dtype=jnp.float32):
    """A small network: two kernels to prune, biases and a scale to leave alone."""
    a, b, c = jax.random.split(key, 3)
    return {
        "Dense_0": {
            "kernel": jax.random.normal(a, (12, 8), dtype),
            "bias": jax.random.normal(b, (8,), dtype),
        },
        "Dense_1": {"kernel": jax.random.normal(c, (8, 4), dtype), "bias": jnp.zeros(4, dtype)},
        "norm": {"scale": jnp.ones((2, 8), dtype)},
    }


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def slow_keep(scores, count, alive=None):
    """Keep ``count`` of the scores of one competition set, one at a time, as HOUSE says it."""
    flat = [float(s) for s in np.asarray(scores, np.float64).ravel()]
    living = [True] * len(flat) if alive is None else [bool(a) for a in np.asarray(alive).ravel()]

    def rank(i):  # the living first, NaN after every number, then by score, then by position
        missing = np.isnan(flat[i])
        return (not living[i], missing, 0.0 if missing else -flat[i], i)

    chosen = set(sorted(range(len(flat)), key=rank)[:count])
    keep = [i in chosen and living[i] for i in range(len(flat))]
    return np.array(keep, bool).reshape(np.shape(scores))


class TraceCount:
    """Wrap a function to be jitted; ``count`` says how often it has been traced."""

    def __init__(self, f):
        self.f, self.count = f, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.f(*args, **kwargs)
