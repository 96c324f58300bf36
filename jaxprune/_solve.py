"""A method at a weight: compiled once for all weights of a shape, and its results checked."""

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jaxprune._calibrate import Changed, Visit
from jaxprune._errors import short
from jaxprune._keep import Keep
from jaxprune._mesh import over_last_axis
from jaxprune.typing import Method

# (what is known of the weight, the weight, Gram matrix, what stays) -> new values, mask
Solve: TypeAlias = Callable[[Visit, jax.Array, jax.Array, Keep], Changed]


def solver(method: Method, name: Callable[[Any], str]) -> Solve:
    """Let a method solve for weights; groups are solved side by side, each as its own matrix.

    Args:
      method: of one matrix.
      name: what a weight is called, for messages.
    """

    def solve(at: Visit, w: jax.Array, gram: jax.Array, keep: Keep) -> Changed:
        # Columns are solved for where they lie.
        new, mask = _solved(over_last_axis(w), gram, keep, method=method)
        _check(method, new, mask, w.shape, name(at.weight))
        return new.astype(w.dtype), mask

    return solve


@functools.partial(jax.jit, static_argnames="method")
def _solved(w: jax.Array, gram: jax.Array, keep: Keep, *, method: Method) -> Changed:
    """One program for a method and a shape, whatever the sparsity."""

    def one(w: jax.Array, gram: jax.Array, keep: Keep) -> Changed:
        found = method(w, gram, keep=keep)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise TypeError(
                f"The method `{_name(method)}` gave {short(found)}. It should give a pair: new "
                "values and a bool mask."
            )
        return found[0], found[1]

    each = one if w.ndim == 2 else jax.vmap(one, (0, 0, keep.axes))
    return each(w, gram, keep)


@jax.jit
def moved(w: jax.Array, gram: jax.Array, cross: jax.Array) -> jax.Array:
    """The weight that comes closest to what the dense network makes, and not far from itself.

    Least squares with a pull to ``w``, as strong as methods damp: 0.01 of the mean diagonal.

    Args:
      w: `[..., inputs, outputs]`.
      gram: inputs^T inputs, `[..., inputs, inputs]`.
      cross: inputs^T times what they should become, `[..., inputs, outputs]`.
    """
    n = gram.shape[-1]
    mean = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None] / n
    pull = jnp.maximum(0.01 * mean, jnp.finfo(gram.dtype).tiny)
    solve = functools.partial(jax.scipy.linalg.solve, assume_a="pos")
    for _ in range(gram.ndim - 2):
        solve = jax.vmap(solve)
    right = cross + pull * w.astype(gram.dtype)
    return solve(gram + pull * jnp.eye(n, dtype=gram.dtype), right).astype(w.dtype)


def _name(method: Method) -> str:
    return getattr(method, "__name__", short(method))


def _check(method: Method, new: Any, mask: Any, shape: tuple[int, ...], path: str) -> None:
    """Refuse what is no new weight and mask."""
    name = _name(method)
    kind = getattr(mask, "dtype", type(mask))
    if jnp.shape(new) != shape or jnp.shape(mask) != shape or kind != jnp.bool_:
        raise ValueError(
            f"The method `{name}` gave {jnp.shape(new)} and a mask of {jnp.shape(mask)} {kind} for "
            f"{path!r}. It should give new values and a bool mask of {shape}."
        )
    if not bool(jnp.isfinite(new).all()):
        raise ValueError(
            f"The method `{name}` gave values that are not finite for {path!r}. Is its Gram matrix "
            "singular? More damping helps, or more rows of data."
        )
