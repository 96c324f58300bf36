"""Make the golden masks: ``python -m tests.golden.make``, from the root of the repository."""

import json
from pathlib import Path

import jax
import numpy as np
import optax

import jaxprune as jp
from jaxprune import criteria, patterns, scopes

FILE = Path(__file__).with_name("masks.json")


def params():
    """Weights that no random number generator can change: fractions of a multiplicative walk."""
    walk = (np.arange(1, 161) * 7919 % 1009 - 504) / 504
    return {
        "in": {"kernel": walk[:96].reshape(12, 8).astype(np.float32)},
        "out": {"kernel": walk[96:].reshape(16, 4).astype(np.float32)},
    }


def masks():
    """Find one mask for each way of ranking."""
    w = params()
    grads = jax.tree.map(lambda x: np.flip(x).copy(), w)
    return {
        "magnitude per leaf 0.9": jp.find_masks(w, 0.9),
        "taylor across 0.7": jp.find_masks(
            w, 0.7, criterion=criteria.taylor, grads=grads, scope=scopes.across
        ),
        "2:4": jp.find_masks(w, 0.5, scope=scopes.windows(4)),
        "blocks by erk 0.75": jp.find_masks(
            w, scopes.erk(w, 0.75), pattern=patterns.Blocks((2, 2))
        ),
        "channels 0.5": jp.find_masks(w, 0.5, pattern=patterns.Channels(-1)),
        "rigl 0.75 after two events": train(
            jp.dynamic.rigl(optax.sgd(0.25), sparsity=0.75, begin=0, end=4, every=2), w, grads
        ),
    }


def train(tx, w, grads):
    """Give the masks after three steps along the same gradients."""
    state = tx.init(w)
    for _ in range(3):
        updates, state = tx.update(grads, state, w)
        w = optax.apply_updates(w, updates)
    return jp.get_masks(state)


def rows(tree):
    """Write each mask as rows of 0 and 1, which diff well."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            "".join("01"[int(x)] for x in row) for row in np.asarray(mask)
        ]
        for path, mask in jax.tree_util.tree_leaves_with_path(tree)
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps({name: rows(m) for name, m in masks().items()}, indent=1) + "\n")
