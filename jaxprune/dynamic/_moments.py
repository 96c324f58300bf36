"""Moments of the inner optimizer for weights that grow: set back to where they start from."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._tree import is_hole
from jaxprune.typing import Masks, Params


def reset_moments(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    fresh: optax.OptState,
    params: Params,
    grown: Masks,
) -> optax.OptState:
    """Give the moments of weights that have just grown the value that they start from."""
    where = optax.tree.map_params(
        inner,
        # The sums that adafactor keeps have another shape than the weight, and stay.
        lambda leaf, p, g: False if is_hole(leaf) or is_hole(g) or leaf.shape != p.shape else g,
        state,
        params,
        grown,
        transform_non_params=lambda _: False,
        is_leaf=is_hole,
    )
    return jax.tree.map(
        lambda leaf, first, g: leaf if g is False else jnp.where(g, first, leaf),
        state,
        fresh,
        where,
        is_leaf=is_hole,
    )


def check_moments(inner: optax.GradientTransformation, params: Params, user: str) -> None:
    """Refuse an optimizer whose moments could not be reset, before anything has been trained."""
    state = jax.eval_shape(inner.init, params)
    histories: list[Any] = []

    def visit(leaf: Any, param: Any) -> Any:
        if not is_hole(leaf) and len(leaf.shape) > len(param.shape):
            histories.append(leaf)
        return leaf

    try:
        optax.tree.map_params(inner, visit, state, params, is_leaf=is_hole)
        why = "remembers several steps of each weight" if histories else ""
    except Exception as error:  # whatever an optimizer does with placeholders for its params
        why = f"cannot be mapped over the params ({type(error).__name__} in `map_params`)"
    if why:
        names = dict.fromkeys(
            type(node).__name__ for node in _nodes(state) if hasattr(node, "_fields")
        )
        raise TypeError(
            f"`{user}` resets the moments of weights that grow, but the state of this optimizer "
            f"({', '.join(names)}) {why}. Use a first-order one, such as `optax.adamw`, or prune "
            "with `jp.prune`, which needs no reset."
        )


def _nodes(tree: Any) -> list[Any]:
    """All tuples of a state, the outer ones first."""
    if not isinstance(tree, tuple):
        return []
    return [tree, *(node for child in tree for node in _nodes(child))]
