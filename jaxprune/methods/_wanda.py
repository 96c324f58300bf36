"""Weights times the norm of their inputs decide; values stay."""

import jax
import jax.numpy as jnp

from jaxprune.methods._gram import norms, wide
from jaxprune.typing import Keeping


def wanda(w: jax.Array, gram: jax.Array, *, keep: Keeping) -> tuple[jax.Array, jax.Array]:
    r"""Prune by magnitude times the norm of the input: no weight changes.

    The score of weight :math:`w_{ij}` is :math:`|w_{ij}| \, \|x_i\|`, and the inputs of each output
    compete (``per_output``) unless somebody says otherwise. The cheapest method: of the Gram matrix
    it reads the diagonal only, which is welcome alone.

    Args:
      w: weights, `[inputs, outputs]`.
      gram: inputs^T inputs over all rows of data, `[inputs, inputs]`, or its diagonal, `[inputs]`.
      keep: from scores `[inputs, outputs]`, higher = keep, to a bool mask like them.

    Returns:
      The weights with zeros, of the dtype that they had, and the mask, both `[inputs, outputs]`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> w, gram = jnp.array([[1.0, 3.0], [2.0, 2.0]]), jnp.diag(jnp.array([9.0, 1.0]))
      >>> keep = jp.Keep.of((2, 2), 0.5, scope=jp.scopes.per_output)
      >>> wanda(w, gram, keep=keep)[0]
      Array([[1., 3.],
             [0., 0.]], dtype=float32)

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2024.
    """
    mask = keep(jnp.abs(wide(w)) * norms(gram))
    return jnp.where(mask, w, 0), mask


wanda.per_output = True  # type: ignore[attr-defined]  # who competes where nobody says
wanda.diagonal = True  # type: ignore[attr-defined]  # all that it reads of a Gram matrix
