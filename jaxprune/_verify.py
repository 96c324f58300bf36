"""How far the small function is from the masked one."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._groups import Groups
from jaxprune._masks import apply_masks
from jaxprune._shrink import cut_of
from jaxprune._tree import leaves_by_path, map_with_path
from jaxprune.graph import Rule
from jaxprune.graph._carry import Carry
from jaxprune.graph._network import check_call
from jaxprune.graph._shrunk import Surgery, small_function
from jaxprune.graph._take import take
from jaxprune.typing import Masks, Params


def verify_shrink(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks | None = None,
    *inputs: Any,
    cut: Mapping[str, Any] | None = None,
    groups: Groups | None = None,
    counts: str = "masked",
    rules: Mapping[str, Rule] | None = None,
    carry: Carry | None = None,
    **keywords: Any,
) -> float:
    """Measure how far the small function is from the masked one.

    The masked one has the weights that ``masks`` remove set to zero and no others, as it was
    trained, also where ``groups`` carry the masks further: what the small function loses besides
    is part of the difference.

    Args:
      fn: function of params and inputs.
      params: the whole params.
      masks: masks, as for ``shrink``; None with ``cut``.
      *inputs: inputs to compare on.
      cut: instead of masks, as for ``shrink``: the masked one has zeros in all that it takes out.
      groups: as for ``shrink``.
      counts: as for ``shrink``.
      rules: as for ``shrink``.
      carry: as for ``shrink``. Both start from the carry that is given, so what it holds at
        removed units counts if the network looks at it.
      **keywords: keyword arguments of ``fn``.

    Returns:
      The largest difference between outputs, as a fraction of the largest of the small ones;
      infinite where one of them is not finite and the other is; at least 1 where integers differ.
      New values of the state and of a carry are compared where they stay.

    Raises:
      TypeError, ValueError: as for ``shrink``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
      >>> params = {"w": jnp.array([[1.0, 3.0]]), "v": jnp.ones((2, 1))}
      >>> masks = {"w": jnp.array([[True, False]]), "v": jnp.array([[True], [False]])}
      >>> verify_shrink(mlp, params, masks, jnp.ones((1, 1)))
      0.0
    """
    check_call(fn, keywords, verify_shrink)
    whole = cut_of(params, masks, cut, groups, "verify_shrink")
    surgery = Surgery(fn, whole.whole, whole, counts, rules, carry=carry)
    plan = surgery.plan(inputs, keywords)
    small_fn = small_function(surgery, plan.left_of_carry())
    small = small_fn(whole.params(params), *inputs, **keywords)
    removed = whole.masks() if masks is None else masks_over(masks, params)
    large = fn(apply_masks(params, removed), *inputs, **keywords)
    return difference(large, small, plan.left_of_outputs())


def masks_over(masks: Masks, params: Params) -> Masks:
    """Masks for all of the params, None where subtrees were left out."""
    given = leaves_by_path(masks, "verify_shrink")
    return map_with_path(lambda path, _: given.get(path), params)


def difference(large: Any, small: Any, left: Sequence[Sequence[np.ndarray | None]]) -> float:
    """The largest difference between results, ``left`` of the large ones, as a fraction.

    A NaN equals a NaN and an infinity itself, so that only what the small function adds counts.
    The scale is that of the largest finite number; where integers differ it is no matter.
    """
    worst, scale, otherwise = 0.0, 0.0, 0.0
    for whole, less, kept in zip(jax.tree.leaves(large), jax.tree.leaves(small), left, strict=True):
        cut_whole = take(jnp.asarray(whole), kept)
        if cut_whole.size and jnp.issubdtype(cut_whole.dtype, jnp.inexact):
            both_nan = jnp.isnan(cut_whole) & jnp.isnan(less)
            gap = jnp.where((cut_whole == less) | both_nan, 0, jnp.abs(cut_whole - less))
            apart = float(jnp.max(gap))
            worst = max(worst, apart if math.isfinite(apart) else math.inf)
            scale = max(scale, float(jnp.max(jnp.where(jnp.isfinite(less), jnp.abs(less), 0))))
        elif cut_whole.size and not np.array_equal(_numbers(cut_whole), _numbers(less)):
            otherwise = 1.0
    return max(worst / scale if scale else worst, otherwise)


def _numbers(x: jax.Array) -> jax.Array:
    """What NumPy can compare: keys as their data."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
