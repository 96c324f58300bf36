"""One network with its layers stacked, and the same with each layer a leaf: the truth of stacks."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp

LAYERS = 2
AXES = {"a": 0, "b": 1}  # of the layers in each stack
LAYOUT = jp.Layout(
    {"head|out": ("in", "out"), "h/a": ("layer", "in", "out"), "h/b": ("in", "layer", "out")}
)
ALONE = jp.Layout({"head|out|h/.*": ("in", "out")})


def draw(seed, *shape):
    """Binary fractions of few bits, with many ties, so that sums of them are exact."""
    return (np.random.default_rng(seed).integers(-16, 17, shape) / 16).astype(np.float32)


def alone(seed=0):
    """Each layer a leaf; they differ in size, so that ranking them together shows."""
    layers = range(LAYERS)
    return {
        "h": {
            "a": [draw([seed, 1, i], 8, 8) * 2**i for i in layers],
            "b": [draw([seed, 2, i], 8, 16) * 2**i for i in layers],
        },
        "head": draw([seed, 3], 8, 8),
        "out": draw([seed, 4], 16, 4),
    }


def stacked(tree):
    """Lists of layers as stacks; None for a list of them stays None."""
    return {
        **tree,
        "h": {
            name: None if layers[0] is None else jnp.stack(layers, AXES[name])
            for name, layers in tree["h"].items()
        },
    }


def unstacked(tree):
    """Stacks, of weights or masks, as lists of layers."""

    def apart(name, x):
        if x is None or jnp.ndim(x) < 2:
            return [x] * LAYERS if jnp.ndim(x) == 0 else list(x)
        index = lambda i: i if x.shape[AXES[name]] == LAYERS else 0
        return [jnp.take(x, index(i), AXES[name]) for i in range(LAYERS)]

    return {**tree, "h": {name: apart(name, x) for name, x in tree["h"].items()}}


def assert_same(stacks, leaves):
    """Compare masks or weights of the stacks with those of the leaves, bit for bit."""
    got, want = jax.tree.leaves(unstacked(stacks)), jax.tree.leaves(leaves)
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.broadcast_to(x, y.shape) if x.size < y.size else x, y)
