"""The state of a pruner, and how masks lie in it."""

from typing import Any, NamedTuple

import jax
import optax

from jaxprune._serial import serialize_tuple
from jaxprune.typing import Leaf, Masks, Tree


class PruneState(NamedTuple):
    """State of ``prune`` and ``hold``, and of all else that carries masks through training.

    Attributes:
      count: updates so far, int32 ``[]``.
      masks: the masks in force, or ``Packed`` bits; None where a leaf is not prunable.
      inner_state: state of the wrapped optimizer.
      criterion_state: what a criterion with memory remembers, else ``()``.
      key: random key for criteria that ask for one, else None.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count, which nobody calls here
    masks: Masks
    inner_state: optax.OptState
    criterion_state: Any
    key: jax.Array | None


serialize_tuple(PruneState)


def without_variables(tree: Tree) -> Any:
    """Take nnx variables from around arrays."""
    return jax.tree.map(
        lambda v: v.get_value() if _is_variable(v) else v, tree, is_leaf=_is_variable
    )


def _is_variable(node: Leaf) -> bool:
    """True for an nnx variable, known by what it can do: the core does not import flax."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def is_placeholder(params: Any) -> bool:
    """True for what optax inits with to see which parts of a state mirror the params.

    It is a node without leaves, but none of the usual containers.
    """
    return not isinstance(params, dict | list | tuple | None) and not jax.tree.leaves(params)
