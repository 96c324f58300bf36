"""How the scores of many weights become the score of one unit."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxprune._tree import wide

Axes = tuple[int, ...]

_REDUCTIONS: dict[str, Callable[[jax.Array, Axes], jax.Array]] = {
    "mean": lambda s, axes: jnp.mean(s, axis=axes, keepdims=True),
    "sum": lambda s, axes: jnp.sum(s, axis=axes, keepdims=True),
    "norm": lambda s, axes: jnp.sqrt(jnp.sum(s * s, axis=axes, keepdims=True)),
}


def check_reduce(reduce: str, user: str) -> None:
    """Refuse unknown reductions when a pattern is built."""
    if reduce not in _REDUCTIONS:
        raise ValueError(
            f"`{user}(reduce={reduce!r})` is not a reduction. Choose one of "
            f"{', '.join(map(repr, _REDUCTIONS))}."
        )


def reduce_scores(reduce: str, scores: jax.Array, axes: Axes) -> jax.Array:
    """Reduce over ``axes`` (kept with size 1), in at least float32: bfloat16 means tie."""
    return _REDUCTIONS[reduce](wide(scores), axes)
