"""Scores from the size of the weights."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.typing import Params, Scores, elementwise


@elementwise
def magnitude(params: Params, **_: Any) -> Scores:
    r"""Score a weight by its size :math:`|w|`.

    The oldest criterion and a hard one to beat once the network can be trained further.

    Args:
      params: prunable parameters; any shapes.

    Returns:
      Non-negative scores like ``params``. Higher means keep.

    Example:
      >>> import jax.numpy as jnp
      >>> magnitude({"w": jnp.array([2.0, -3.0])})
      {'w': Array([2., 3.], dtype=float32)}

    References:
      Han et al., `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015.
    """
    return jax.tree.map(jnp.abs, params)
