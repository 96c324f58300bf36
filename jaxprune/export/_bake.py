"""Masks made part of the parameters."""

from jaxprune._masks import apply_masks, unpack
from jaxprune._tree import match
from jaxprune.typing import Masks, Params


def bake(params: Params, masks: Masks) -> Params:
    """Set what masks remove to zero for good, to export a network without its masks.

    As ``apply_masks``, but subtrees may be left out and masks may be packed: masks of the params
    alone go with a tree that holds running statistics too.

    Args:
      params: the tree that the function takes; anything in it that has no mask stays as it is.
      masks: masks of single weights, channels, blocks, by the paths of ``params``.

    Returns:
      Parameters like ``params``, exactly zero where a mask is False.

    Raises:
      ValueError: masks of unknown paths, or of shapes that do not fit.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> variables = {"params": {"w": jnp.array([2.0, 3.0])}, "steps": jnp.array(7)}
      >>> bake(variables, {"params": {"w": jnp.array([True, False])}})
      {'params': {'w': Array([2., 0.], dtype=float32)}, 'steps': Array(7, dtype=int32...)}
    """
    step = (
        "Nest the masks as the params are; out of an optimizer's state `jp.get_masks` takes them."
    )
    return apply_masks(
        params, match(unpack(masks), params, "bake(masks)", gaps="any", fits=None, step=step)
    )
