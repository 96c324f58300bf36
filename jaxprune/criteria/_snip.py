"""Scores from how the loss would feel the loss of a connection, before training."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._errors import check_loss
from jaxprune._tree import wide
from jaxprune.typing import Params, Scores


def snip(
    params: Params, *, loss_fn: Callable[..., jax.Array], batch: Any, layout: Any = None, **_: Any
) -> Scores:
    r"""Score a connection by the slope of the loss in its mask (SNIP).

    At a mask of ones :math:`|\partial L / \partial m| = |w \, \partial L / \partial w|`, divided
    by the sum over the tree. Meant for a network at initialisation, with
    ``scope=jp.scopes.across``. It takes the gradient of one batch itself; ``taylor`` takes
    gradients that are there already.

    Args:
      params: prunable parameters; any shapes.
      loss_fn: ``loss_fn(params, batch)`` gives the mean loss, a scalar.
      batch: any tree of arrays; some examples of every class.
      layout: taken because a stack is scored as its layers would be, and need not be taken apart.

    Returns:
      Non-negative scores like ``params``, at least float32, that sum to 1. Higher means keep.

    Raises:
      TypeError: the loss is no scalar.
      ValueError: through ``find_masks``, the loss is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, batch: jnp.sum(batch * params["w"] ** 2)
      >>> snip({"w": jnp.array([2.0, -1.0])}, loss_fn=loss_fn, batch=jnp.array([0.5, 6.0]))
      {'w': Array([0.25, 0.75], dtype=float32)}

    References:
      Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019.
    """
    del layout
    grads = jax.grad(lambda p: check_loss(loss_fn(p, batch), "snip"))(params)
    felt = jax.tree.map(lambda w, g: jnp.abs(wide(w) * wide(g)), params, grads)
    total = sum(jnp.nansum(s) for s in jax.tree.leaves(felt))
    # Without any slope nothing is felt, and all scores are the zeros that they were.
    return jax.tree.map(lambda s: s / jnp.where(total > 0, total, 1.0), felt)
