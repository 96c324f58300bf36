"""Pattern, scope and sparsity put together: what stays of one matrix of scores."""

# Methods that prune a matrix ask again and again what would stay, of scores that change meanwhile.
# They are handed one function for that, and never see a sparsity. It travels as a pytree: what it
# counts are arrays, so that matrices of one shape share a program whatever their sparsity.
#
#     scores [inputs, outputs]  ->  mask, True for what stays
#
# SparseGPT decides a block of inputs at a time. So that the blocks together keep exactly what the
# matrix should, each keeps what the inputs up to its end have to, less what those before it have:
# a share of all that stays, as large as its share of what is alive.
#
#     7 of 10 inputs stay, blocks of 4, 4 and 2: floor(2.8), floor(5.6) - 2, 7 - 5 = 2, 3, 2

import bisect
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._errors import check_sparsity, short, whole
from jaxprune._find import select
from jaxprune._layout import Layout
from jaxprune._masks import check_masks
from jaxprune._parts import Parts, declared
from jaxprune._where import everything
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Params, Pattern, Scope

_LAYOUT = Layout({"w": ("in", "out")})
_MOST = 24  # no unit has 2**24 inputs, unless it has all


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
      unit: how many inputs are removed together; None where always all are.

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
    unit: int | None = dataclasses.field(default=1, metadata={"static": True})

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
          within: bool mask `[inputs, outputs]`, each axis full or 1; what it removes stays removed.

        Raises:
          TypeError: ``shape`` is no pair of integers.
          ValueError: the sparsity is outside [0, 1], or a part does not fit the matrix or the
            other part.
        """
        check_sparsity(sparsity)
        if not (isinstance(shape, tuple) and len(shape) == 2 and None not in map(whole, shape)):
            raise TypeError(
                f"`Keep.of` got shape={short(shape)}. Pass inputs and outputs of the matrix, such "
                "as `w.shape`."
            )
        parts = Parts("prune_trained", magnitude, pattern, scope, everything, _LAYOUT)
        parts.check(sparsity, exact=True)
        like = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        if within is not None:  # whole, so that blocks can be cut out of it
            within = jnp.broadcast_to(check_masks({"w": within}, like, "within")["w"], shape)
        bound = parts.bind(like)
        unit = _inputs_of_a_unit(bound, shape[1])
        if not bound.can_count:
            return cls(sparsity, within, bound, shape[0], unit)
        counts = bound.counts(jax.eval_shape(bound.pool, like), sparsity)
        integers = jax.tree.map(lambda k: np.asarray(k, np.int32), counts)
        return cls(integers, within, bound, shape[0], unit)

    def among(self, within: jax.Array) -> "Keep":
        """The same among what an earlier mask `[..., inputs, outputs]` has left."""
        return dataclasses.replace(self, within=within)

    @property
    def axes(self) -> "Keep":
        """What of it ``jax.vmap`` maps over, for groups of matrices: earlier masks alone."""
        mapped: Any = None if self.within is None else 0
        return dataclasses.replace(self, amount=None, within=mapped)

    @property
    def window(self) -> int | None:
        """How many neighbouring inputs compete: 4 for 2:4; None where all of them do."""
        units = declared(self.parts.scope, "window")
        return units * self.unit if units and self.unit else None

    def __call__(self, scores: jax.Array) -> jax.Array:
        """Give the mask of a whole matrix of scores `[inputs, outputs]`.

        Raises:
          ValueError: the scores are not of as many inputs.
        """
        if jnp.shape(scores)[:1] != (self.inputs,):
            raise ValueError(
                f"A `Keep` of {self.inputs} inputs got scores of shape {jnp.shape(scores)}. Make "
                "one of that shape with `Keep.of`."
            )
        return self._select(scores, self.amount, self.within)

    def block(self, scores: jax.Array, start: jax.Array | int) -> jax.Array:
        """Give the mask of some inputs `[n, outputs]` of the matrix, from ``start`` on.

        Blocks begin where units and windows do. Those that make up the matrix together keep what
        the whole of it does, if its scope counts beforehand; else each loses the same fraction.
        """
        within, amount = self.within, self.amount
        if within is not None:
            within = lax.dynamic_slice_in_dim(within, start, scores.shape[0])
        if self.parts.can_count and self.window is None:
            size = self.unit or self.inputs
            first, last = start // size, (start + scores.shape[0] + size - 1) // size
            whole = jax.ShapeDtypeStruct((self.inputs, scores.shape[1]), jnp.float32)
            amount = jax.tree.map(lambda k: self._share(k, first, last, {"w": whole}), amount)
        return self._select(scores, amount, within)

    def _share(self, kept: jax.Array, first: Any, last: Any, like: Params) -> jax.Array:
        """Of what competitions keep, `[]` or `[1, outputs]`, what falls to some rows of units."""
        rows, columns = jax.eval_shape(self.parts.pool, like)["w"].shape
        if self.within is None:
            each = columns // kept.size
            return _part(kept, last * each, rows * each) - _part(kept, first * each, rows * each)
        alive = self.parts.alive(like, {"w": self.within})["w"].astype(jnp.int32)
        axes = (0, 1) if kept.ndim == 0 else (0,)

        def count(end: Any) -> jax.Array:  # of the units alive in the rows before one
            before = jnp.arange(rows)[:, None] < end
            return jnp.sum(jnp.where(before, alive, 0), axes).reshape(kept.shape)

        total = count(rows)
        kept = jnp.minimum(kept, total)
        return _part(kept, count(last), total) - _part(kept, count(first), total)

    def _select(self, scores: jax.Array, amount: Any, within: jax.Array | None) -> jax.Array:
        earlier = None if within is None else {"w": within}
        tree = {"w": scores}
        masks = select(self.parts, tree, amount, earlier, like=tree)
        return jnp.broadcast_to(masks["w"], scores.shape)


def _part(kept: jax.Array, some: Any, total: Any) -> jax.Array:
    """Give `floor(kept * some / total)`, neither above `total < 2**29`: long division, bit by bit.

    The product may be larger than any integer here, what is left of it at each bit is not.
    """
    total = jnp.maximum(total, 1)

    def bit(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found, left = state
        left = 2 * left + jnp.where((some >> (29 - i)) & 1, kept, 0)
        return 2 * found + left // total, left % total

    zero = jnp.zeros(jnp.shape(kept), jnp.int32)
    return lax.fori_loop(0, 30, bit, (zero, zero))[0]


def _inputs_of_a_unit(parts: Parts, outputs: int) -> int | None:
    """Find how many inputs a unit has by asking for the units of ever more; None if always all.

    Units that list what they own may own any inputs.
    """
    if parts.crosses_leaves:
        return None

    def units(inputs: int) -> int:
        like = {"w": jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)}
        return int(jax.eval_shape(parts.pool, like)["w"].shape[0])

    last = next((n for n in (2**i for i in range(1, _MOST)) if units(n) > 1), None)
    if last is None:
        return None
    # The largest of which one unit has all inputs, somewhere from half as many on.
    return bisect.bisect_left(range(last), 2, lo=last // 2, key=units) - 1
