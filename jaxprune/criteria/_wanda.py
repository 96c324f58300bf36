"""Scores from the size of the weights and of what they are multiplied with."""

from typing import Any

import jax.numpy as jnp

from jaxprune._tree import map_leaves, match, wide
from jaxprune.typing import Params, Scores, elementwise


@elementwise
def wanda(params: Params, *, norms: Params, **_: Any) -> Scores:
    r"""Score a weight by its size times the norm of its inputs.

    The score of weight :math:`w_{ij}` is :math:`|w_{ij}| \, \|x_i\|`, with :math:`x_i` its input
    over all rows of calibration data: magnitudes count by what they are multiplied with. The paper
    ranks the inputs of each output, ``scope=jp.scopes.per_output``.

    Args:
      params: prunable parameters; any shapes.
      norms: for each weight array the norms of its inputs, of the rank of the array with each axis
        full or 1, such as `[layers, inputs, 1]` for a stack of kernels; None where there are none,
        as ``jp.input_stats`` gives them. They do not move with training: pass them to
        ``find_masks``, or at each step to ``tx.update(..., norms=norms)``.

    Returns:
      Non-negative scores like ``params``, at least float32, None where norms are. Higher means
      keep.

    Raises:
      ValueError: ``norms`` does not mirror ``params``, or does not broadcast over a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> wanda({"w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}, norms={"w": jnp.array([[4.0], [1.0]])})
      {'w': Array([[4., 8.],
             [3., 4.]], dtype=float32)}

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2024.
    """
    step = "Pass what `jp.input_stats` gives for these params: each axis of a leaf full or 1."
    beside = match(norms, params, "norms", step=step, gaps="holes", fits=_broadcasts)
    score = lambda w, n: None if n is None else jnp.abs(wide(w)) * wide(n)  # noqa: E731
    return map_leaves(score, params, beside)


def _broadcasts(norms: tuple[int, ...], weights: tuple[int, ...]) -> bool:
    """Say whether norms are of the rank of the weights, each axis full or 1."""
    same_rank = len(norms) == len(weights)
    return same_rank and all(n in (1, m) for n, m in zip(norms, weights, strict=True))
