"""The lowest sparsity that meets a budget."""

from collections.abc import Callable

from jaxprune.typing import Masks


def masks_within_budget(
    find: Callable[[float], Masks], cost: Callable[[Masks], float], budget: float
) -> Masks:
    """Find the lowest sparsity whose masks cost no more than a budget, by bisection.

    The cost is whatever counts: a fraction of the parameters or of the FLOPs that are left,
    milliseconds, bytes. It has to fall as the sparsity grows.

    Args:
      find: makes masks of a sparsity in [0, 1].
      cost: says what masks cost.
      budget: the most that they may cost.

    Returns:
      Masks of the lowest sparsity, to within 1/1024, that cost at most ``budget``.

    Raises:
      ValueError: even at sparsity 1 they cost more.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"kernel": jnp.arange(10.0).reshape(1, 10)}
      >>> masks = masks_within_budget(
      ...     lambda s: jp.find_masks(params, s), lambda m: 1 - jp.sparsity(m, params), 0.35)
      >>> jp.sparsity(masks, params)
      0.7
    """
    masks = find(0.0)
    if cost(masks) <= budget:
        return masks
    best = find(1.0)
    least = cost(best)
    if least > budget:
        raise ValueError(
            f"`masks_within_budget` cannot reach a budget of {budget:g}: at sparsity 1 the cost is "
            f"still {least:g}. Raise the budget, or let more be removed: other groups, blocks, a "
            "higher `max_sparsity`."
        )
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        masks = find(middle)
        if cost(masks) <= budget:
            best, high = masks, middle
        else:
            low = middle
    return best
