"""Views: parameters rearranged, which are read, and written back exactly."""

# Before it meets data a parameter may be transposed, reshaped, cut in three or laid beside others.
# All of that is linear and shows no weight twice, so that what is done to the result can be done to
# the parameters: the transpose of reading writes.
#
#     v = concatenate(q.T, k.T)      read: (q, k) -> v
#     the transpose of read at v'    (q', k'), each entry where it came from
#
# Of a parameter times a number c the transpose gives c * v' = c * c * q', so that it is divided by
# what it makes of ones.

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.typing import Leaf

_BASE = 32  # digits that half precision knows, times a number and divided by it, too


class Part(NamedTuple):
    """A parameter, or a layer of it.

    Attributes:
      leaf: number of the parameter.
      layer: which one, where a loop runs over them; of nested loops the outer one first.
    """

    leaf: int
    layer: tuple[int, ...] = ()


class Written(NamedTuple):
    """What a view has for one parameter.

    Attributes:
      shown: bools like the parameter.
      values: of each value that was written, an array like the parameter.
    """

    shown: jax.Array
    values: list[jax.Array]


def _same(x: jax.Array) -> jax.Array:
    return x


@dataclasses.dataclass(frozen=True)
class View:
    """A linear function of some parameters that shows none of their entries twice.

    Attributes:
      parts: what it shows.
      moves: what is done to them; views of equal moves read in the same way.
      read: ``(*parts) -> value``.
    """

    parts: tuple[Part, ...]
    moves: tuple[Hashable, ...] = ()
    read: Callable[..., jax.Array] = dataclasses.field(default=_same, compare=False)

    def then(self, move: Hashable, run: Callable[[jax.Array], jax.Array]) -> "View":
        """The view after one more move."""
        return View(self.parts, (*self.moves, move), lambda *parts: run(self.read(*parts)))

    def row(self, i: int) -> "View":
        """One index of the first axis. A parameter as it is becomes its layers."""
        if not self.moves and len(self.parts) == 1:
            part = self.parts[0]
            return View((part._replace(layer=(*part.layer, i)),))
        return self.then(("row", i), lambda x: x[i])

    def through(self, outer: Sequence["View"]) -> "View":
        """The same view of what views of other parameters show, of each part one."""
        ends = [sum(len(v.parts) for v in outer[: k + 1]) for k in range(len(outer))]

        def read(*parts: jax.Array) -> jax.Array:
            groups = [parts[end - len(v.parts) : end] for v, end in zip(outer, ends, strict=True)]
            return self.read(*(v.read(*group) for v, group in zip(outer, groups, strict=True)))

        moves = self.moves
        if any(v.moves for v in outer) or len(outer) > 1:
            moves = (*((v.moves, len(v.parts)) for v in outer), *self.moves)
        return View(tuple(p for v in outer for p in v.parts), moves, read)

    def scatter(self, parts: Sequence[Leaf], values: Sequence[jax.Array]) -> list[Written]:
        """Write values like what it shows to where they are from.

        Args:
          parts: the parameters, which say what shapes there are.
          values: arrays of the shape of the view; bools and integers count entries and are not
            scaled as values are.

        Returns:
          For each part whether an entry is shown, and what each of the values has for it; zero
          where it is not shown.
        """
        like = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in parts]
        back = jax.linear_transpose(self.read, *like)
        scale = self.read(*(jnp.ones(p.shape, p.dtype) for p in parts))
        square = back(scale)
        values = [v if jnp.issubdtype(v.dtype, jnp.floating) else v * scale for v in values]
        found = [back(v.astype(scale.dtype)) for v in values]
        return [
            Written(s > 0, [each[i] / jnp.where(s > 0, s, 1) for each in found])
            for i, s in enumerate(square)
        ]

    def read_numbers(self, parts: Sequence[np.ndarray], dtypes: Sequence[Any]) -> jax.Array:
        """Read whole numbers that entries of the parameters carry, exactly.

        Args:
          parts: integers of 0 and above, in the shapes of the parameters.
          dtypes: of the parameters; half precision knows few numbers, so that they are read digit
            by digit.
        """
        scale = self.read(*(jnp.ones(p.shape, d) for p, d in zip(parts, dtypes, strict=True)))
        found = jnp.zeros(scale.shape, jnp.int32)
        for power in _powers(max(int(p.max(initial=0)) for p in parts)):
            digits = [(p // power % _BASE).astype(d) for p, d in zip(parts, dtypes, strict=True)]
            found += power * jnp.round(self.read(*digits) / scale).astype(jnp.int32)
        return found

    def scatter_numbers(self, parts: Sequence[Leaf], values: jax.Array) -> list[Written]:
        """Write whole numbers of 0 and above to where what it shows is from, exactly.

        Args:
          parts: the parameters, or their shapes and dtypes.
          values: integers of the shape of the view.
        """
        shown = self.scatter(parts, [])
        found = [jnp.zeros(p.shape, jnp.int32) for p in parts]
        for power in _powers(int(values.max(initial=0))):
            each = self.scatter(parts, [values // power % _BASE])
            digits = (jnp.round(one.values[0]).astype(jnp.int32) for one in each)
            found = [old + power * digit for old, digit in zip(found, digits, strict=True)]
        return [Written(one.shown, [x]) for one, x in zip(shown, found, strict=True)]


def _powers(most: int) -> list[int]:
    """What the digits of numbers up to one count."""
    return [_BASE**i for i in range(7) if i == 0 or _BASE**i <= most]


def joined(views: Sequence[View], move: Hashable, run: Callable[..., jax.Array]) -> View:
    """What a function makes of several views, as one that lays them beside one another."""
    one = View(tuple(Part(i) for i in range(len(views))), (move,), run)
    return one.through(views)
