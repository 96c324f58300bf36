"""One sparsity for every leaf: from a number, or from a tree that mirrors the leaves."""

from typing import Any

import jax

from jaxprune._tree import Keys, is_hole, leaves_by_keys, list_paths, slots
from jaxprune.scopes._count import MOST_UNITS, is_fixed
from jaxprune.typing import Sparsity


def is_tree(sparsity: Sparsity) -> bool:
    """True for one sparsity a leaf rather than one number."""
    return not jax.tree_util.treedef_is_leaf(jax.tree.structure(sparsity, is_leaf=is_fixed))


def spread(units: Any, sparsity: Sparsity, user: str) -> list[Any]:
    """List the sparsity of each leaf of ``units``, in order."""
    wanted = list(leaves_by_keys(units))
    if not is_tree(sparsity):
        return [sparsity] * len(wanted)
    given = _leaves(sparsity)
    missing = ["/".join(keys) for keys in wanted if keys not in given]
    extra = ["/".join(keys) for keys in given if keys not in wanted]
    if missing or extra:
        raise ValueError(
            f"`{user}` got a tree of sparsities that does not mirror the prunable leaves: none "
            f"for {list_paths(missing)}; not prunable {list_paths(extra)}. Make it with "
            "`jp.scopes.uniform`, `erk` or `custom` and the same `where`."
        )
    return [given[keys] for keys in wanted]


def _leaves(sparsity: Sparsity) -> dict[Keys, Any]:
    found = slots(sparsity, lambda x: is_hole(x) or is_fixed(x))
    return {slot.keys: slot.leaf for slot in found if not is_hole(slot.leaf)}


def check_units(n: int, user: str) -> None:
    """Refuse rankings of ``n`` units that an int32 cannot count."""
    if n > MOST_UNITS:
        raise NotImplementedError(
            f"`{user}` would rank {n} units together, more than the {MOST_UNITS} that a 32-bit "
            "count holds. Rank smaller parts, for example with `scope=jp.scopes.per_leaf`."
        )
