"""Inputs go one after the other, and those that are still to come make up for them."""

# With U upper triangular and `inverse(H) = U^T U`, row i of U says how to make up for input i with
# the inputs behind it, once those before it are settled. So that most of the work is products of
# matrices, what a removed weight leaves behind (its error) is pushed on at three distances:
#
#     block of 128 inputs   after a block to all behind it, by one product      (`lax.scan`)
#     strip of a block      before a strip from the strips before it, by one    (`lax.scan`)
#     input of a strip      one by one                                          (a loop)
#
# What stays is decided for a block at once, by the weights as earlier blocks left them; of N:M,
# for a strip at once, which is a window.

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.methods._gram import damped, inverse_factor, product, without_dead
from jaxprune.methods._refit import least_squares
from jaxprune.typing import Keeping

STRIP = 8  # inputs that are settled one by one before a product takes their errors on

Ask = Callable[[jax.Array, Any], jax.Array]  # scores [n, outputs] from an input on -> mask


def sparsegpt(
    w: jax.Array,
    gram: jax.Array,
    *,
    keep: Keeping,
    damping: float = 0.01,
    block: int = 128,
    refit: bool = False,
    iterations: int = 15,
) -> tuple[jax.Array, jax.Array]:
    r"""Remove inputs' weights in order, and let the weights behind make up for each (SparseGPT).

    The score of a weight is what the outputs lose by it, :math:`w_{ij}^2 / U_{ii}^2`, with
    :math:`U^T U` the inverse of the damped Gram matrix. What stays is decided for a block of inputs
    at a time, on weights that have already made up for earlier blocks; of N:M, window by window.
    All weights of the matrix compete, each block losing its share, unless somebody says otherwise.

    Args:
      w: weights, `[inputs, outputs]`.
      gram: inputs^T inputs over all rows of data, `[inputs, inputs]`.
      keep: from scores `[inputs, outputs]`, higher = keep, to a bool mask like them. One that has
        ``block(scores, start)``, as ``jp.Keep`` has, is told which inputs they are of; any other
        function is shown each block as if it were all.
      damping: fraction of the mean diagonal of ``gram`` that is added to it; 0.01 as in the paper.
      block: inputs that are decided at once; 128 as in the paper.
      refit: at last put the best weights on the mask, as ``jp.refit`` does.
      iterations: of that.

    Returns:
      New weights of the dtype that they had, exactly zero where they are removed, and the mask,
      both `[inputs, outputs]`.

    Raises:
      ValueError: what is removed together has more inputs than a block.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> gram = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> keep = jp.Keep.of((2, 1), 0.5)
      >>> w, mask = sparsegpt(jnp.array([[1.0], [2.0]]), gram, keep=keep, damping=0.0)
      >>> w.round(3)
      Array([[0. ],
             [2.5]], dtype=float32)

    References:
      Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023. There the factor
      comes from three factorisations, here from one of the mirrored matrix.
    """
    window, size = getattr(keep, "window", None), _block_size(keep, block)
    dense, h = without_dead(w, gram), damped(gram, damping)
    upper = inverse_factor(h)
    ask = getattr(keep, "block", lambda scores, _: keep(scores))

    def settle(size: int, x: jax.Array, start: Any) -> tuple[jax.Array, jax.Array]:
        rows = lax.dynamic_slice_in_dim(upper, start, size)
        here = lax.dynamic_slice_in_dim(x, start, size)
        square = lax.dynamic_slice_in_dim(rows, start, size, 1)
        asked = lambda scores, first: ask(scores, start + first)  # noqa: E731
        errors, mask = _settle_block(here, square, asked, window)
        # U is zero before the block, in it this gives what stays, and behind it what is made up.
        return x - product(rows.T, errors), mask

    whole, rest = divmod(len(dense), size)
    x, masks = dense, []
    if whole:
        x, found = lax.scan(functools.partial(settle, size), x, size * jnp.arange(whole))
        masks.append(found.reshape(whole * size, -1))
    if rest:
        x, found = settle(rest, x, whole * size)
        masks.append(found)
    mask = jnp.concatenate(masks)
    x = least_squares(dense, mask, h, x, iterations) if refit else jnp.where(mask, x, 0.0)
    return x.astype(w.dtype), mask


def _settle_block(
    here: jax.Array, upper: jax.Array, ask: Ask, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Settle the inputs of a block strip by strip.

    Args:
      here: weights as earlier blocks left them, `[n, outputs]`.
      upper: the rows and columns of U that belong to the block, `[n, n]`.
      ask: from scores of some inputs `[m, outputs]`, and the place of the first in the block, to
        their mask.
      window: inputs that are decided together; None for the whole block.

    Returns:
      The error of each removed weight, zero for the others, and the mask, both `[n, outputs]`.
    """
    n = len(here)
    lower, diagonal = upper.T, jnp.diagonal(upper)[:, None]
    decided = None if window else ask((here / diagonal) ** 2, 0)
    size = window or next(size for size in range(STRIP, 0, -1) if n % size == 0)

    def strip(errors: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = functools.partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        rows = part(here) - product(part(lower), errors)
        stays = ask((rows / part(diagonal)) ** 2, first) if decided is None else part(decided)
        mine = _settle_strip(rows, part(part(lower), axis=1), stays)
        return lax.dynamic_update_slice_in_dim(errors, mine, first, 0), stays

    errors, mask = lax.scan(strip, jnp.zeros_like(here), size * jnp.arange(n // size))
    return errors, mask.reshape(here.shape)


def _settle_strip(rows: jax.Array, lower: jax.Array, stays: jax.Array) -> jax.Array:
    """Find the errors of a strip `[m, outputs]`, each input after those before it."""

    def settle(i: jax.Array, errors: jax.Array) -> jax.Array:
        row = rows[i] - jnp.sum(lower[i][:, None] * errors, 0)  # errors from i on are still zero
        return errors.at[i].set(jnp.where(stays[i], 0.0, row / lower[i, i]))

    m = len(rows)
    return lax.fori_loop(0, m, settle, jnp.zeros_like(rows), unroll=m <= STRIP)


def _block_size(keep: Keeping, block: int) -> int:
    """The most inputs up to ``block`` of which none shares a unit or a window with one behind."""
    unit = getattr(keep, "unit", 1)
    together = getattr(keep, "window", None) or unit
    if unit is None or together > block:
        pattern = getattr(getattr(keep, "parts", None), "pattern", "the pattern")
        what = f"whose units own {f'{unit} inputs' if unit else 'all inputs'} together"
        raise ValueError(
            f"`sparsegpt(block={block})` decides {block} inputs at a time and cannot use "
            f"`{pattern}`, {what}. Use `jp.methods.admm`, which decides all at once."
        )
    return block - block % together
