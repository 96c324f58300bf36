"""Scores drawn at random: the control that every criterion has to beat."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._mesh import all_true
from jaxprune.typing import Params, Scores


def random(params: Params, *, key: jax.Array, layout: Any = None, **_: Any) -> Scores:
    """Score every weight with an independent draw from [0, 1).

    Args:
      params: prunable parameters; any shapes.
      key: a random key. Leaf ``i`` draws with ``fold_in(key, i)``, in the order of the tree.
      layout: taken because a stack is scored as its layers would be, and need not be taken apart.

    Returns:
      Scores like ``params``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> scores = random({"w": jnp.zeros((2, 3))}, key=jax.random.key(0))
      >>> scores["w"].shape
      (2, 3)
    """
    del layout
    leaves, treedef = jax.tree.flatten(params)
    # Float32 whatever the weights are: eight bits of bfloat16 would make ties the rule. Added to
    # zeros made from the weights, so that scores lie where the weights do.
    zeros = [(~all_true(w)).astype(jnp.float32) for w in leaves]
    draws = [
        zero + jax.random.uniform(jax.random.fold_in(key, i), zero.shape)
        for i, zero in enumerate(zeros)
    ]
    return jax.tree.unflatten(treedef, draws)
