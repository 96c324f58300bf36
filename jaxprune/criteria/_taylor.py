"""Scores from the first-order change in loss."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import mirrored, wide
from jaxprune.typing import Params, Scores, elementwise


@elementwise
def taylor(params: Params, *, grads: Params, **_: Any) -> Scores:
    r"""Estimate how much the loss moves if a weight is set to zero.

    The score of weight :math:`w` with gradient :math:`g` is :math:`|w g|`, the size of the
    linear term of the loss around the current weights.

    Args:
      params: prunable parameters; any shapes.
      grads: gradient of the mean loss, same structure and shapes as ``params``. Average
        over devices first, or replicas will disagree about the mask.

    Returns:
      Non-negative scores like ``params``, at least float32. Higher means keep.

    Raises:
      ValueError: ``grads`` does not mirror ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> taylor({"w": jnp.array([2.0, -3.0])}, grads={"w": jnp.array([1.0, 0.5])})
      {'w': Array([2. , 1.5], dtype=float32)}

    References:
      Molchanov et al., `Importance Estimation for Neural Network Pruning
      <https://arxiv.org/abs/1906.10771>`_, 2019.
    """
    return jax.tree.map(
        lambda w, g: jnp.abs(wide(w) * wide(g)), params, mirrored(grads, params, "grads")
    )
