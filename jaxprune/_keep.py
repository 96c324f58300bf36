"""Pattern, scope and sparsity put together: what stays of one matrix of scores."""

# Methods that prune a matrix ask again and again what would stay, of scores that change meanwhile.
# They are handed one function for that, and never see a sparsity. It travels as a pytree: what it
# counts are arrays, so that matrices of one shape share a program whatever their sparsity.
#
#     scores [inputs, outputs]  ->  mask, True for what stays
#
# SparseGPT decides a block of inputs at a time. So that the blocks together lose exactly what the
# matrix should, block by block goes what the inputs up to its end lose, less what is gone already.

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._errors import check_sparsity
from jaxprune._find import select
from jaxprune._layout import Layout
from jaxprune._parts import Parts, declared
from jaxprune._where import everything
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Pattern, Scope

_LAYOUT = Layout({"w": ("in", "out")})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keep:
    """Says what stays of a matrix of scores: pattern, scope and sparsity put together.

    Made by ``Keep.of``. Calling it with scores `[inputs, outputs]`, higher = keep, gives a bool
    mask of that shape.

    Attributes:
      amount: the sparsity, or what the scope counted for it.
      within: mask `[inputs, outputs]` of what is not gone already, or None.
      parts: pattern and scope, settled on the matrix.
      inputs: rows of the matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> keep = Keep.of((2, 2), 0.5)
      >>> keep(jnp.array([[3.0, 1.0], [2.0, 4.0]]))
      Array([[ True, False],
             [False,  True]], dtype=bool)
    """

    amount: Any
    within: jax.Array | None
    parts: Parts = dataclasses.field(metadata={"static": True})
    inputs: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        shape: tuple[int, int],
        sparsity: float,
        *,
        pattern: Pattern = Weights(),
        scope: Scope = per_leaf,
        within: jax.Array | None = None,
    ) -> "Keep":
        """Put pattern, scope and sparsity together for a matrix.

        Args:
          shape: inputs and outputs of the matrix; parts may name its axes ``"in"`` and ``"out"``.
          sparsity: fraction of units to remove.
          pattern: what is removed together.
          scope: who competes with whom; ``per_leaf`` ranks the whole matrix.
          within: bool mask `[inputs, outputs]`; what it removes stays removed.

        Raises:
          ValueError: the sparsity is outside [0, 1], or a part does not fit the matrix or the
            other part.
        """
        check_sparsity(sparsity)
        parts = Parts("prune_trained", magnitude, pattern, scope, everything, _LAYOUT)
        parts.check(sparsity, exact=True)
        like = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        bound = parts.bind(like)
        if not bound.can_count:
            return cls(sparsity, within, bound, shape[0])
        counts = bound.counts(jax.eval_shape(bound.pool, like), sparsity)
        integers = jax.tree.map(lambda k: np.asarray(k, np.int32), counts)
        return cls(integers, within, bound, shape[0])

    @property
    def window(self) -> int | None:
        """How many neighbours along the inputs compete: 4 for 2:4; None where all of them do."""
        return declared(self.parts.scope, "window")

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Give the mask of a whole matrix of scores `[inputs, outputs]`."""
        return self._select(scores, self.amount, self.within)

    def block(self, scores: jax.Array, start: jax.Array | int) -> jax.Array:
        """Give the mask of some inputs `[n, outputs]` of the matrix, from ``start`` on."""
        within = self.within
        if within is not None:
            within = lax.dynamic_slice_in_dim(within, start, scores.shape[0])
        amount = self.amount
        if self.parts.can_count and self.window is None:
            units = jax.eval_shape(self.parts.pool, {"w": scores})["w"].shape[0]
            each = scores.shape[0] // max(units, 1)  # inputs of a unit
            first, total = start // each, self.inputs // each
            amount = jax.tree.map(
                lambda k: _up_to(k, first + units, total) - _up_to(k, first, total), amount
            )
        return self._select(scores, amount, within)

    def _select(self, scores: jax.Array, amount: Any, within: jax.Array | None) -> jax.Array:
        earlier = None if within is None else {"w": within}
        tree = {"w": scores}
        masks = select(self.parts, tree, amount, earlier, like=tree)
        return jnp.broadcast_to(masks["w"], scores.shape)


def _up_to(kept: jax.Array, rows: jax.Array | int, total: int) -> jax.Array:
    """Of what a matrix of ``total`` rows keeps, what its first rows do: in whole numbers."""
    whole, rest = kept // total, kept % total
    return whole * rows + (rest * rows) // total
