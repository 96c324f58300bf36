"""Masks and values found together: dense steps that minimise, pruned ones that project."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.methods._gram import damped, inverse_factor, product, without_dead
from jaxprune.methods._refit import least_squares
from jaxprune.typing import Keeping


class _State(NamedTuple):
    """Where the search stands, `[inputs, outputs]` each.

    Attributes:
      x: pruned weights, of scaled inputs.
      dual: what the dense ones were asked to move by, over the penalty.
      mask: of ``x``.
    """

    x: jax.Array
    dual: jax.Array
    mask: jax.Array


def admm(
    w: jax.Array,
    gram: jax.Array,
    *,
    keep: Keeping,
    damping: float = 0.01,
    stages: int = 4,
    rounds: int = 6,
    penalty: float = 0.07,
    factor: float = 2.0,
    iterations: int = 5,
) -> tuple[jax.Array, jax.Array]:
    r"""Find mask and weights together by alternating directions, then refit.

    The outputs should change as little as possible while the weights are those of a mask. Each
    round solves the first with a penalty on the distance from the second, then projects: of dense
    weights the largest stay. Inputs are scaled to norm one, so that sizes compare. All weights of
    the matrix compete unless somebody says otherwise; any pattern will do, whole inputs among them.

    The best of the methods, and mostly products of matrices: one inverse a stage, one product a
    round. The defaults were the best of those tried on layers of a language model; fewer stages, or
    a larger factor, are worse: masks should settle slowly.

    Args:
      w: weights, `[inputs, outputs]`.
      gram: inputs^T inputs over all rows of data, `[inputs, inputs]`.
      keep: from scores `[inputs, outputs]`, higher = keep, to a bool mask like them.
      damping: fraction of the mean diagonal of ``gram`` that is added to it.
      stages: in which the penalty grows.
      rounds: of each stage.
      penalty: of the first stage, where the squared norm of an input is 1.
      factor: by which it grows.
      iterations: of ``jp.refit`` at the end; few, for the search has all but arrived.

    Returns:
      New weights of the dtype that they had, exactly zero where they are removed, and the mask,
      both `[inputs, outputs]`.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> gram = jnp.array([[1.0, 0.5], [0.5, 1.0]])
      >>> keep = jp.Keep.of((2, 1), 0.5)
      >>> w, mask = admm(jnp.array([[1.0], [2.0]]), gram, keep=keep, damping=0.0)
      >>> w.round(3)
      Array([[0. ],
             [2.5]], dtype=float32)

    References:
      Boza, `Fast and Effective Weight Update for Pruned Large Language Models
      <https://arxiv.org/abs/2401.02938>`_, 2024. Meng et al., `ALPS
      <https://arxiv.org/abs/2406.07831>`_, 2024. There penalties follow how many weights change;
      here they are fixed, so that a round is one product with a matrix that is known.
    """
    dense, h = without_dead(w, gram), damped(gram, damping)
    scale = jnp.sqrt(jnp.diagonal(h))[:, None]
    scaled, target = h / scale / scale.T, dense * scale
    eye = jnp.eye(len(h), dtype=h.dtype)

    def project(x: jax.Array) -> _State:
        mask = keep(jnp.abs(x))
        x, rest = jnp.where(mask, x, 0.0), jnp.where(mask, 0.0, x)
        return _State(x, rest, mask)

    def stage(state: _State, penalty: jax.Array) -> tuple[_State, None]:
        upper = inverse_factor(scaled + penalty * eye)
        pull = penalty * product(upper.T, upper)

        def step(_: jax.Array, state: _State) -> _State:
            # The dense weights nearest to minimal and `x - dual`: the target plus what pulls at it.
            moved = target + product(pull, state.x - state.dual - target)
            return project(moved + state.dual)

        state = lax.fori_loop(0, rounds, step, state)
        return state._replace(dual=state.dual / factor), None  # the next penalty is as much larger

    start = project(target)._replace(dual=jnp.zeros_like(target))
    state, _ = lax.scan(stage, start, penalty * factor ** jnp.arange(stages, dtype=jnp.float32))
    best = least_squares(dense, state.mask, h, state.x / scale, iterations)
    return best.astype(w.dtype), state.mask
