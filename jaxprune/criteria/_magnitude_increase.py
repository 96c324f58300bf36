"""Scores from how much a weight has grown since the start."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import mirrored
from jaxprune.typing import Params, Scores, elementwise


@elementwise
def magnitude_increase(params: Params, *, params_init: Params, **_: Any) -> Scores:
    r"""Score a weight by the growth of its size :math:`|w| - |w_0|`.

    The mask criterion of the lottery ticket studies that does not favour weights which started
    large. ``imp`` offers ``params_init`` by itself; with ``prune`` it is passed to
    ``tx.update(..., params_init=...)``, since a criterion that closes over arrays would bake them
    into the compiled step.

    Args:
      params: prunable parameters; any shapes.
      params_init: the parameters before training, like ``params``.

    Returns:
      Signed scores like ``params``. Higher means keep.

    Raises:
      ValueError: ``params_init`` does not mirror ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> start = {"w": jnp.array([1.0, -3.0])}
      >>> magnitude_increase({"w": jnp.array([-2.0, 3.5])}, params_init=start)
      {'w': Array([1. , 0.5], dtype=float32)}

    References:
      Zhou et al., `Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask
      <https://arxiv.org/abs/1905.01067>`_, 2019.
    """
    start = mirrored(params_init, params, "params_init")
    return jax.tree.map(lambda w, w0: jnp.abs(w) - jnp.abs(w0), params, start)
