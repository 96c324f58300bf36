"""What methods do with the Gram matrix of the inputs: norms, damping, a factor of its inverse."""

import jax
import jax.numpy as jnp
from jax import lax


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply matrices in full float32, which accelerators do only if asked."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def wide(x: jax.Array) -> jax.Array:
    """Whatever the dtype of the weights, methods compute in float32."""
    return jnp.asarray(x).astype(jnp.float32)


def norms(gram: jax.Array) -> jax.Array:
    """Norms of the inputs as a column `[inputs, 1]`, from a Gram matrix or its diagonal."""
    squares = wide(gram)
    if squares.ndim == 2 and len(set(squares.shape)) > 1:
        raise ValueError(
            f"`gram` should be a square matrix or its diagonal, but its shape is {squares.shape}. "
            "Of data `x` [rows, inputs] it is `x.T @ x`."
        )
    return jnp.sqrt(squares if squares.ndim == 1 else jnp.diagonal(squares))[:, None]


def damped(gram: jax.Array, damping: float) -> jax.Array:
    """Add a share of the mean diagonal to the diagonal, and 1 where an input is always zero.

    Fewer rows than inputs, or inputs that repeat others, make a matrix that has no inverse; with
    damping it has one, and weights stay near what they were where the data say nothing.

    Args:
      gram: inputs^T inputs, `[inputs, inputs]`.
      damping: fraction of the mean diagonal.

    Returns:
      float32 `[inputs, inputs]`, positive definite for ``damping`` above 0.
    """
    squares = jnp.diagonal(gram)
    extra = damping * jnp.mean(wide(squares)) + jnp.where(squares == 0, 1.0, 0.0)
    return wide(gram) + jnp.diag(extra)


def without_dead(w: jax.Array, gram: jax.Array) -> jax.Array:
    """Weights as float32, zero at inputs that are always zero: no data ever asked for those.

    Raises:
      ValueError: ``gram`` is not the Gram matrix of the inputs of ``w``.
    """
    n = jnp.shape(w)[0]
    if jnp.shape(gram) != (n, n):
        raise ValueError(
            f"`gram` should be of shape {(n, n)} for `w` of shape {jnp.shape(w)}, but its shape is "
            f"{jnp.shape(gram)}. Of data `x` [rows, inputs] it is `x.T @ x`."
        )
    return jnp.where((jnp.diagonal(gram) == 0)[:, None], 0.0, wide(w))


def inverse_factor(h: jax.Array) -> jax.Array:
    """Factor the inverse of a positive definite matrix into `U^T U`, U upper triangular.

    With all indices mirrored, `h = L L^T` reads `h = M M^T` with M upper triangular, and U is the
    inverse of M: one Cholesky factorisation and one triangular solve, and no inverse of `h`.
    """
    lower = jnp.linalg.cholesky(h[::-1, ::-1])
    eye = jnp.eye(h.shape[0], dtype=h.dtype)
    return lax.linalg.triangular_solve(lower, eye, left_side=True, lower=True)[::-1, ::-1]
