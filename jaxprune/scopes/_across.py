"""Units compete across the whole tree."""

import jax

from jaxprune._types import Sparsity, Units
from jaxprune.scopes._count import is_fixed, removed
from jaxprune.scopes._rank import keep_largest
from jaxprune.scopes._spread import check_units, is_tree


def across(units: Units, sparsity: Sparsity, *, within: Units = None) -> Units:
    """Remove a fraction of the units of the whole tree, the lowest first (global pruning).

    Scores of different leaves are compared as they are. Nothing is gathered: over sharded leaves
    the ranking costs some dozens of all-reduces of a few bytes. A leaf may lose all of its units;
    ``summary`` warns of it.

    Args:
      units: scores of the units; any shapes, None where not prunable.
      sparsity: fraction to remove of all units: one number. Exactly ``round(sparsity * n)`` of
        ``n`` units go; among equals the later leaf, then the later position goes first.
      within: bool tree like ``units``; units outside of it are gone already and count as removed.

    Returns:
      A bool tree like ``units``, True for what stays.

    Raises:
      ValueError: ``sparsity`` is a tree.

    Example:
      >>> import jax.numpy as jnp
      >>> across({"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}, 0.25)
      {'a': Array([False,  True], dtype=bool), 'b': Array([ True,  True], dtype=bool)}
    """
    if is_tree(sparsity):
        raise ValueError(
            "`across` ranks all leaves together and takes one sparsity, but got a tree of "
            f"{len(jax.tree.leaves(sparsity, is_leaf=is_fixed))} of them. Pass a number, or rank "
            "with `scope=jp.scopes.per_leaf`."
        )
    leaves, treedef = jax.tree.flatten(units)
    check_units(leaves, "across")
    alive = None if within is None else jax.tree.leaves(within)
    n = sum(leaf.size for leaf in leaves)
    keep = keep_largest(leaves, [n - removed(sparsity, n)], (tuple(range(len(leaves))),), alive)
    return jax.tree.unflatten(treedef, keep)
