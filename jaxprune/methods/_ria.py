"""Weights relative to what else their input and output have decide; values stay."""

import jax
import jax.numpy as jnp

from jaxprune.methods._gram import norms, wide
from jaxprune.typing import Keeping


def ria(
    w: jax.Array, gram: jax.Array, *, keep: Keeping, power: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    r"""Prune by relative importance times a power of the norm of the input: no weight changes.

    The score of a weight is its share of its input's and of its output's weights,

    .. math:: \left(\frac{|w_{ij}|}{\sum_k |w_{ik}|} + \frac{|w_{ij}|}{\sum_k |w_{kj}|}\right)
              \|x_i\|^p

    so that no input and no output goes because all of its weights are small. All weights of the
    matrix compete unless somebody says otherwise. Of the Gram matrix it reads the diagonal only,
    which is welcome alone.

    Args:
      w: weights, `[inputs, outputs]`.
      gram: inputs^T inputs over all rows of data, `[inputs, inputs]`, or its diagonal, `[inputs]`.
      keep: from scores `[inputs, outputs]`, higher = keep, to a bool mask like them.
      power: of the norms; 0.5 as in the paper.

    Returns:
      The weights with zeros, of the dtype that they had, and the mask, both `[inputs, outputs]`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w = jnp.array([[9.0, 1.0], [8.0, 7.0]])  # 7 is most of its output
      >>> ria(w, jnp.eye(2), keep=jp.Keep.of((2, 2), 0.5))[0]
      Array([[9., 0.],
             [0., 7.]], dtype=float32)

    References:
      Zhang et al., `Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
      Models <https://openreview.net/forum?id=Tr0lPx9woF>`_, 2024.
    """
    size = jnp.abs(wide(w))
    share = _share(size, 1) + _share(size, 0)
    mask = keep(share * norms(gram) ** power)
    return jnp.where(mask, w, 0), mask


ria.diagonal = True  # type: ignore[attr-defined]  # all that it reads of a Gram matrix


def _share(size: jax.Array, axis: int) -> jax.Array:
    """Divide by the sum along an axis; what sums to zero has no share."""
    total = jnp.sum(size, axis, keepdims=True)
    return size / jnp.where(total > 0, total, 1.0)
