"""Checks at the door, shared by everything that takes a sparsity."""

import math
from typing import Any

import jax
import numpy as np

from jaxprune._tree import leaves_with_path, list_paths


def check_sparsity(sparsity: Any, user: str = "sparsity") -> None:
    """Refuse numbers outside [0, 1], NaN, and what is no number. Traced values pass unseen."""
    bad = []
    for path, value in leaves_with_path(sparsity):
        if isinstance(value, jax.core.Tracer):
            continue
        where = f" at {path!r}" if path else ""
        if np.ndim(value) or not isinstance(
            value, int | float | np.generic | np.ndarray | jax.Array
        ):
            raise TypeError(
                f"`{user}` got {value!r}{where}. Pass the fraction to remove: one number in "
                "[0, 1], or a tree with one number for each prunable leaf."
            )
        number = float(value)
        if math.isnan(number) or not 0.0 <= number <= 1.0:
            bad.append(f"{number:g}{where}")
    if bad:
        raise ValueError(
            f"`{user}` got {', '.join(bad)}, outside [0, 1]. It is the fraction to remove: 0.9 "
            "keeps a tenth."
        )


def check_loss(loss: Any, user: str) -> Any:
    """Refuse a loss that is no scalar, while it is traced; give it back."""
    shapes = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(loss)]
    if shapes != [()]:
        raise TypeError(
            f"`{user}` got a `loss_fn` that returns {shapes or 'nothing'} instead of a scalar. "
            "Let it return the mean loss of the batch alone: `loss_fn(params, batch) -> []`."
        )
    return loss


def check_living(tree: Any, name: str = "masks") -> None:
    """Refuse arrays that a step took along because its arguments were donated."""
    gone = [
        path
        for path, leaf in leaves_with_path(tree)
        if isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.is_deleted()
    ]
    if gone:
        raise ValueError(
            f"The arrays of `{name}` at {list_paths(gone, 6)} have been deleted: they were part of "
            "a state that was donated. Take them from the state that the step gave back, or copy "
            "them before it, as `jp.get_masks(opt_state)` does."
        )
