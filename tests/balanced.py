"""Masks that keep as many blocks of each column, for weights of any layout."""

import jax.numpy as jnp
import numpy as np

from jaxprune._tree import is_floating, map_with_path

LEADS = ("layer", "group")


def factor(n):
    """The smallest number above 1 that divides, if there is any but ``n``; else 1."""
    return next((d for d in range(2, n) if n % d == 0), 1)


def balanced_mask(shape, roles, rng, *, share=0.5, block=factor):
    """A mask in blocks, random but for the number that each column keeps; None where none fits.

    Blocks lie inside of the last axis of inputs and the last one of outputs.
    """
    kinds = [
        "lead" if r in LEADS else {"in": "in", "window": "in", "out": "out"}.get(r) for r in roles
    ]
    if None in kinds or not {"in", "out"} <= set(kinds):
        return None
    axes = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in ("lead", "in", "out")}
    plain = [i for i in axes["in"] if roles[i] == "in"]
    if not plain:
        return None
    size = {plain[-1]: block(shape[plain[-1]]), axes["out"][-1]: block(shape[axes["out"][-1]])}
    if np.prod(list(size.values())) == 1:
        return None
    units = [n // size.get(i, 1) for i, n in enumerate(shape)]
    count = lambda kind: int(np.prod([units[i] for i in axes[kind]]))
    lead, blocks, columns = map(count, ("lead", "in", "out"))
    kept = max(1, round(share * blocks))
    ranks = rng.random((lead, columns, blocks)).argsort(-1).argsort(-1)
    grid = (ranks < kept).swapaxes(1, 2)
    order = [*axes["lead"], *axes["in"], *axes["out"]]
    grid = grid.reshape([units[i] for i in order]).transpose(np.argsort(order))
    for i, n in size.items():
        grid = np.repeat(grid, n, axis=i)
    return grid


def balanced_masks(params, layout, seed=0, **settings):
    """Such masks for all weights whose axes are known."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        if not is_floating(leaf) or leaf.ndim < 2:
            return None
        mask = balanced_mask(leaf.shape, layout.roles(path, leaf.ndim), rng, **settings)
        return None if mask is None or mask.all() else jnp.asarray(mask)

    return map_with_path(one, params)
