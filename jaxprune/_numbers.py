"""Sparsities as they come: numbers that are known now, traced ones, and trees of either."""

from typing import Any

import jax
import numpy as np

from jaxprune.typing import Sparsity


def is_number(sparsity: Any) -> bool:
    """True for a sparsity known now in double precision; a float32 array counts as traced does."""
    if isinstance(sparsity, np.ndarray):
        return sparsity.dtype == np.float64
    return isinstance(sparsity, int | float | np.integer)  # np.float64 is a float


def is_tree(sparsity: Sparsity) -> bool:
    """True for one sparsity a leaf rather than one number."""
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(sparsity))


def is_known(sparsity: Sparsity) -> bool:
    """True if all numbers of a sparsity are known now."""
    return all(map(is_number, jax.tree.leaves(sparsity)))


def plain(sparsity: Sparsity) -> Sparsity:
    """Numbers that are known as those of Python, the others as they are."""
    return jax.tree.map(lambda s: _plain(s) if is_number(s) else s, sparsity)


def _plain(number: Any) -> Any:
    return np.asarray(number, float) if np.ndim(number) else float(number)
