"""Scores from how much a connection helps the gradient to flow, before training."""

from collections.abc import Callable
from typing import Any

import jax

from jaxprune._errors import check_loss
from jaxprune._tree import wide
from jaxprune.typing import Params, Scores


def grasp(
    params: Params, *, loss_fn: Callable[..., jax.Array], batch: Any, layout: Any = None, **_: Any
) -> Scores:
    r"""Score a connection by what its removal does to the gradient norm (GraSP).

    To first order, removing weight :math:`w` changes :math:`\|g\|^2` by :math:`-2 w (H g)`, with
    :math:`g` the gradient and :math:`H` the Hessian. The score is the signed :math:`w (H g)`:
    high where the gradient would shrink. Meant for a network at initialisation, with
    ``scope=jp.scopes.across``.

    Args:
      params: prunable parameters; any shapes.
      loss_fn: ``loss_fn(params, batch)`` gives the mean loss, a scalar. The paper divides the
        logits by a temperature of 200 in it, so that the softmax is not saturated.
      batch: any tree of arrays; some examples of every class.
      layout: taken because a stack is scored as its layers would be, and need not be taken apart.

    Returns:
      Signed scores like ``params``, at least float32. Higher means keep.

    Raises:
      TypeError: the loss is no scalar.
      ValueError: through ``find_masks``, the loss is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> loss_fn = lambda params, batch: 0.5 * jnp.sum(batch * params["w"] ** 2)
      >>> grasp({"w": jnp.array([2.0, 1.0])}, loss_fn=loss_fn, batch=jnp.array([1.0, -3.0]))
      {'w': Array([4., 9.], dtype=float32)}

    References:
      Wang et al., `Picking Winning Tickets Before Training by Preserving Gradient Flow
      <https://arxiv.org/abs/2002.07376>`_, 2020.
    """
    del layout
    slope = jax.grad(lambda p: check_loss(loss_fn(p, batch), "grasp"))
    # Forward over reverse: the product with the Hessian costs two gradients and no second graph.
    _, curved = jax.jvp(slope, (params,), (slope(params),))
    return jax.tree.map(lambda w, hg: wide(w) * wide(hg), params, curved)
