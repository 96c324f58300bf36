"""Units compete inside their own leaf."""

import jax

from jaxprune._types import Sparsity, Units
from jaxprune.scopes._count import removed
from jaxprune.scopes._rank import keep_largest
from jaxprune.scopes._spread import check_units, spread


def per_leaf(units: Units, sparsity: Sparsity, *, within: Units = None) -> Units:
    """Remove the same fraction of the units of every leaf, the lowest first.

    Args:
      units: scores of the units; any shapes, None where not prunable.
      sparsity: fraction to remove from each leaf: a number, or a tree of numbers like ``units``.
        Exactly ``round(sparsity * n)`` of ``n`` units go, the later ones first among equals.
      within: bool tree like ``units``; units outside of it are gone already and count as removed.

    Returns:
      A bool tree like ``units``, True for what stays.

    Raises:
      ValueError: a tree of sparsities does not mirror ``units``.

    Example:
      >>> import jax.numpy as jnp
      >>> per_leaf({"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}, 0.5)
      {'a': Array([False,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """
    leaves, treedef = jax.tree.flatten(units)
    alive = None if within is None else jax.tree.leaves(within)
    for leaf in leaves:
        check_units([leaf], "per_leaf")
    counts = [
        leaf.size - removed(s, leaf.size)
        for leaf, s in zip(leaves, spread(units, sparsity, "per_leaf"), strict=True)
    ]
    keep = keep_largest(leaves, counts, tuple((i,) for i in range(len(leaves))), alive)
    return jax.tree.unflatten(treedef, keep)
