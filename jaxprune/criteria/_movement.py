"""Scores from where training moves the weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import mirrored, wide
from jaxprune.typing import Params, Scores, elementwise


@dataclasses.dataclass(frozen=True)
class Movement:
    r"""Score a weight by how much training has moved it away from zero.

    The score is :math:`-\sum_t w_t g_t` over the steps so far: a descent step grows a weight
    where :math:`w g < 0` and shrinks it where :math:`w g > 0`. For fine-tuning, where magnitudes
    tell of the pretraining. A criterion with memory: ``prune`` and ``straight_through`` keep the
    sum in their state. Under ``prune`` the sum of a removed weight stands still; under
    ``straight_through``, as in the paper, removed weights go on moving and may return.

    Use it as ``criterion=jp.criteria.movement``. By hand: ``state = movement.init(params)``, then
    ``state = movement.update(state, params, grads)`` at every step.

    Args:
      params: prunable parameters; any shapes.
      state: the sum so far, like ``params``.

    Returns:
      Signed scores like ``params``. Higher means keep.

    Raises:
      ValueError: ``state`` or ``grads`` does not mirror ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> movement, params = Movement(), {"w": jnp.array([2.0, 2.0])}
      >>> state = movement.update(movement.init(params), params, {"w": jnp.array([-1.0, 1.0])})
      >>> movement(params, state=state)
      {'w': Array([ 2., -2.], dtype=float32)}

    References:
      Sanh et al., `Movement Pruning: Adaptive Sparsity by Fine-Tuning
      <https://arxiv.org/abs/2005.07683>`_, 2020.
    """

    def init(self, params: Params) -> Params:
        """Start from rest: float32 zeros like ``params``."""
        return jax.tree.map(lambda w: jnp.zeros_like(wide(w)), params)

    def update(self, state: Params, params: Params, grads: Params) -> Params:
        """Add the movement of one step; ``grads`` are those handed to the optimizer.

        A step that is not finite counts as none: the sum would not recover from it.
        """

        def add(s: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
            moved = wide(w) * wide(g)
            return jnp.where(jnp.isfinite(moved), s - moved, s)

        return jax.tree.map(add, state, params, mirrored(grads, params, "grads"))

    @elementwise
    def __call__(self, params: Params, *, state: Params, **_: Any) -> Scores:
        return mirrored(state, params, "state")


movement = Movement()
