"""The best weights on a given mask: least squares by conjugate gradients."""

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.methods._gram import damped, product, without_dead


def refit(
    w: jax.Array, mask: jax.Array, gram: jax.Array, *, damping: float = 0.01, iterations: int = 15
) -> jax.Array:
    r"""Find the weights on a mask whose outputs come closest to those of the dense weights.

    Minimises :math:`\|X \hat w - X w\|^2 + \lambda \|\hat w - w\|^2` over :math:`\hat w` that is
    zero where the mask is, for all outputs at once: each has a least squares problem of its own, of
    which an iteration of conjugate gradients takes one product with the Gram matrix that all share.

    Args:
      w: the dense weights, `[inputs, outputs]`.
      mask: bool, True for what stays, `[inputs, outputs]`.
      gram: inputs^T inputs over all rows of data, `[inputs, inputs]`.
      damping: :math:`\lambda` as a fraction of the mean diagonal of ``gram``; 0.01 as in SparseGPT.
      iterations: of conjugate gradients, preconditioned by the diagonal.

    Returns:
      Weights `[inputs, outputs]` of the dtype of ``w``, exactly zero where the mask is, and at
      inputs that are always zero.

    Raises:
      ValueError: ``mask`` is not of the shape of ``w``, or ``gram`` not `[inputs, inputs]`.

    Example:
      >>> import jax.numpy as jnp
      >>> gram = jnp.array([[1.0, 0.5], [0.5, 1.0]])  # who goes is made up for by a neighbour
      >>> w, mask = jnp.array([[2.0], [1.0]]), jnp.array([[True], [False]])
      >>> refit(w, mask, gram, damping=0.0)
      Array([[2.5],
             [0. ]], dtype=float32)
    """
    if jnp.shape(mask) != jnp.shape(w):
        raise ValueError(
            f"`refit` got a mask of shape {jnp.shape(mask)} for `w` of shape {jnp.shape(w)}. Pass "
            "one of its shape."
        )
    dense, h = without_dead(w, gram), damped(gram, damping)
    mask = jnp.broadcast_to(mask, dense.shape)
    return least_squares(dense, mask, h, dense, iterations).astype(w.dtype)


def least_squares(
    dense: jax.Array, mask: jax.Array, h: jax.Array, start: jax.Array, iterations: int
) -> jax.Array:
    """Minimise `(x - dense)^T h (x - dense)` over `x` on the mask, from a start that is near.

    Args:
      dense: float32 `[inputs, outputs]`.
      mask: bool `[inputs, outputs]`.
      h: positive definite, float32 `[inputs, inputs]`.
      start: float32 `[inputs, outputs]`; what of it the mask has not is left out.
      iterations: of conjugate gradients.

    Returns:
      float32 `[inputs, outputs]`.
    """
    inverse = 1.0 / jnp.diagonal(h)[:, None]
    on_mask = lambda x: jnp.where(mask, x, 0.0)  # noqa: E731
    x = on_mask(start)
    residual = on_mask(product(h, dense - x))
    ahead = residual * inverse

    def step(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, residual, ahead, slope = state
        moved = on_mask(product(h, ahead))
        length = _ratio(slope, _dot(ahead, moved))
        x, residual = x + length * ahead, residual - length * moved
        steepest = residual * inverse
        new = _dot(residual, steepest)
        return x, residual, steepest + _ratio(new, slope) * ahead, new

    state = (x, residual, ahead, _dot(residual, ahead))
    return lax.fori_loop(0, iterations, step, state)[0]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply column by column: `[1, outputs]`."""
    return jnp.sum(a * b, 0, keepdims=True)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """Divide; an output that has arrived, or has nothing to move, has nothing to divide by."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
