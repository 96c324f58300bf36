"""Scores from the curvature of the loss, taken from squared gradients (optimal brain damage)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree import mirrored, wide
from jaxprune.typing import Params, Scores, elementwise


@elementwise
def fisher(
    params: Params, *, grads: Params | None = None, second_moment: Params | None = None, **_: Any
) -> Scores:
    r"""Estimate the rise of the loss at a minimum if a weight is set to zero.

    The score is :math:`\frac{1}{2} h w^2`, the quadratic term with a diagonal Hessian
    :math:`h`, which squared gradients stand in for (the empirical Fisher information).

    Args:
      params: prunable parameters; any shapes.
      grads: gradient of the mean loss, like ``params``; :math:`h = g^2`.
      second_moment: :math:`h` itself, like ``params``, and preferred: squared gradients averaged
        over examples or steps, such as ``optax.tree.get(opt_state, "nu")`` of Adam (its bias
        correction is one factor for all weights and changes no ranking). ``fisher_ema`` keeps an
        average where the optimizer has none.

    Returns:
      Non-negative scores like ``params``, at least float32. Higher means keep.

    Raises:
      TypeError: there is neither ``grads`` nor ``second_moment``.
      ValueError: the evidence does not mirror ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> fisher({"w": jnp.array([2.0, -3.0])}, second_moment={"w": jnp.array([1.0, 2.0])})
      {'w': Array([2., 9.], dtype=float32)}

    References:
      LeCun et al., `Optimal Brain Damage
      <https://papers.nips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html>`_,
      1990. Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
      <https://arxiv.org/abs/1801.05787>`_, 2018.
    """
    if second_moment is not None:
        h = mirrored(second_moment, params, "second_moment")
    elif grads is not None:
        h = jax.tree.map(_squared, mirrored(grads, params, "grads"))
    else:
        raise TypeError(
            "The criterion `fisher` needs `grads` or `second_moment`, and neither was given. Pass "
            "one to `jp.find_masks`, or to `tx.update` inside a training step."
        )
    return jax.tree.map(lambda w, h: 0.5 * wide(h) * _squared(w), params, h)


@dataclasses.dataclass(frozen=True)
class FisherEma:
    """The criterion that ``fisher_ema`` makes."""

    decay: float

    def init(self, params: Params) -> Params:
        """Start from no curvature at all: float32 zeros like ``params``."""
        return jax.tree.map(lambda w: jnp.zeros_like(wide(w)), params)

    def update(self, state: Params, params: Params, grads: Params) -> Params:
        """Average the squared gradients of one more step in; what is not finite is left out."""

        def average(h: jax.Array, g: jax.Array) -> jax.Array:
            new = self.decay * h + (1.0 - self.decay) * _squared(g)
            return jnp.where(jnp.isfinite(new), new, h)

        return jax.tree.map(average, state, mirrored(grads, params, "grads"))

    @elementwise
    def __call__(self, params: Params, *, state: Params, **_: Any) -> Scores:
        return fisher(params, second_moment=state)


def fisher_ema(decay: float = 0.999) -> FisherEma:
    r"""Take the curvature of ``fisher`` from a running average of squared gradients.

    A criterion with memory: ``prune`` keeps :math:`h \leftarrow d h + (1 - d) g^2` in its state
    and updates it at every step. It starts from zero, which is one factor for all weights and
    changes no ranking.

    Args:
      decay: what stays of the average at each step, in [0, 1); 0.999 is Adam's.

    Returns:
      A criterion of params and ``state``, with ``init(params)`` and ``update(state, params,
      grads)``.

    Raises:
      ValueError: ``decay`` is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> criterion, params = fisher_ema(decay=0.5), {"w": jnp.array([2.0, 1.0])}
      >>> state = criterion.update(criterion.init(params), params, {"w": jnp.array([1.0, 4.0])})
      >>> criterion(params, state=state)
      {'w': Array([1., 4.], dtype=float32)}

    References:
      LeCun et al., 1990, as for ``fisher``.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(
            f"`fisher_ema(decay={decay!r})` is outside [0, 1). It is what stays of the average at "
            "each step; use 0.999 as Adam does."
        )
    return FisherEma(decay)


def _squared(x: jax.Array) -> jax.Array:
    return jnp.square(wide(x))
