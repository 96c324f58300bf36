"""Indices taken out of arrays."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax


def take(x: Any, indices: Sequence[np.ndarray | None]) -> Any:
    """Take the given indices of each axis, all of them where there is None."""
    for i, wanted in enumerate(indices):
        if wanted is None or np.array_equal(wanted, np.arange(x.shape[i])):
            continue
        first, n = (int(wanted[0]), len(wanted)) if len(wanted) else (0, 0)
        if np.array_equal(wanted, np.arange(first, first + n)):
            x = lax.slice_in_dim(x, first, first + n, axis=i)
        else:
            once = len(np.unique(wanted)) == len(wanted)
            x = jnp.take(x, wanted, axis=i, unique_indices=once)
    return x


def pick(x: Any, have: Sequence[Any], source: Sequence[Any], keep: Sequence[Any]) -> Any:
    """Take what the kept results come from out of an operand that has been cut.

    For each axis: the indices that the operand still has, where each index of the whole result
    comes from, and the results to keep. None for axes to leave alone.
    """
    return take(
        x,
        [
            None if h is None or s is None else np.searchsorted(h, s if k is None else s[k])
            for h, s, k in zip(have, source, keep, strict=True)
        ],
    )
