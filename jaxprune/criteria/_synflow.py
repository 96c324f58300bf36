"""Scores from the flow through a network that sees no data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import is_floating
from jaxprune.typing import Params, Scores


def synflow(
    params: Params, *, apply_fn: Callable[..., Any], batch: Any, layout: Any = None, **_: Any
) -> Scores:
    r"""Score a connection by the synaptic flow that passes through it (SynFlow).

    With :math:`R = 1^T f_{|w|}(1)`, the summed output for an input of ones and absolute weights,
    the score is :math:`|w| \, \partial R / \partial |w|`. Re-scored over many rounds it never
    empties a layer as long as another choice of the same size would not::

        jp.find_masks(params, 0.99, criterion=jp.criteria.synflow, scope=jp.scopes.across,
                      rounds=100, apply_fn=model.apply, batch=images[:1])

    Each round is a pass forward and backward, and scores are stored for it.

    Args:
      params: prunable parameters; any shapes.
      apply_fn: ``apply_fn(params, batch)`` gives the outputs, in evaluation mode. Leaves that are
        not prunable stay as they are: zeros and ones at initialisation. In a network where
        biases or norms are negative, let ``apply_fn`` take their absolute values.
      batch: an input, one example is enough. Only the shapes count: floating arrays are replaced
        by ones.
      layout: taken because a stack is scored as its layers would be, and need not be taken apart.

    Returns:
      Non-negative scores like ``params``. Higher means keep.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_fn = lambda params, x: x @ params["w"]
      >>> synflow({"w": jnp.array([[2.0], [-3.0]])}, apply_fn=apply_fn, batch=jnp.zeros((1, 2)))
      {'w': Array([[2.],
             [3.]], dtype=float32)}

    References:
      Tanaka et al., `Pruning neural networks without any data by iteratively conserving synaptic
      flow <https://arxiv.org/abs/2006.05467>`_, 2020.
    """
    del layout
    ones = jax.tree.map(lambda x: jnp.ones_like(x) if is_floating(x) else x, batch)
    size = jax.tree.map(jnp.abs, params)

    def flow(p: Params) -> jax.Array:
        return jnp.sum(jnp.stack([jnp.sum(y) for y in jax.tree.leaves(apply_fn(p, ones))]))

    return jax.tree.map(lambda w, r: jnp.abs(w * r), size, jax.grad(flow)(size))
