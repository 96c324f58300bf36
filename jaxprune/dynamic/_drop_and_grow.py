"""Drop the worst of the kept units and grow the most promising of the others."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import schedules
from jaxprune._errors import is_bool, whole
from jaxprune._mesh import in_auto_mode
from jaxprune._parts import Parts
from jaxprune._ranking import count_true, keep_largest
from jaxprune.typing import Masks, Schedule, Scores


def drop_and_grow(
    masks: Masks, *, worth: Scores, promise: Scores, fraction: Any, parts: Parts
) -> Masks:
    """Move a fraction of the kept units of each leaf: the worst ones to the most promising zeros.

    As many grow as are dropped, at most as many as were zero: the number kept stays the same.
    """
    move = functools.partial(_move, parts=parts)
    return in_auto_mode(move, masks, worth, promise, jnp.asarray(fraction), like=worth)


def _move(
    masks: Masks, worth: Scores, promise: Scores, fraction: jax.Array, *, parts: Parts
) -> Masks:
    pattern = parts.pattern
    alive, treedef = jax.tree.flatten(parts.alive(worth, masks))
    kept = [count_true(a) for a in alive]
    moving = [
        jnp.minimum(_floor(fraction, k), a.size - k) for k, a in zip(kept, alive, strict=True)
    ]
    each = tuple((i,) for i in range(len(alive)))
    stay = keep_largest(
        jax.tree.leaves(pattern.pool(worth)),
        [k - m for k, m in zip(kept, moving, strict=True)],
        each,
        alive,
    )
    grow = keep_largest(jax.tree.leaves(pattern.pool(promise)), moving, each, [~a for a in alive])
    staying = pattern.expand(jax.tree.unflatten(treedef, stay), like=worth)
    growing = pattern.expand(jax.tree.unflatten(treedef, grow), like=worth)
    return jax.tree.map(lambda old, s, g: (old & s) | g, masks, staying, growing)


def _floor(fraction: Any, n: jax.Array) -> jax.Array:
    # A little more than the product, so that half of 30 % of 100 is 15 and not 14.999999.
    # Above some ten thousand, float32 may be off by some millionth of the product either way.
    floor = jnp.floor(fraction * n.astype(jnp.float32) + 1e-3).astype(jnp.int32)
    return jnp.minimum(floor, n)


def decay(user: str, drop_fraction: float, begin: int, end: int, every: int) -> Schedule:
    """From drop_fraction to 0 along a cosine, and when."""
    number = isinstance(drop_fraction, int | float | jax.Array | np.generic)
    if not number or is_bool(drop_fraction):
        raise TypeError(
            f"`{user}(drop_fraction={drop_fraction!r})` is no number. Pass one in [0, 1], such as "
            "0.3."
        )
    if not isinstance(drop_fraction, jax.core.Tracer) and not 0.0 <= drop_fraction <= 1.0:
        raise ValueError(
            f"`{user}(drop_fraction={drop_fraction!r})` is outside [0, 1]. It is the fraction of "
            "the kept weights that moves at the first event; 0.3 is common."
        )

    def value(step: Any) -> jax.Array:
        time = jnp.clip((jnp.asarray(step) - first) / max(last - first, 1), 0.0, 1.0)
        return drop_fraction * 0.5 * (1.0 + jnp.cos(jnp.pi * time))

    # What is no step is told by `custom`, before it asks for a value.
    first, last = (whole(step) or 0 for step in (begin, end))
    return schedules.custom(value, begin, end, every)
