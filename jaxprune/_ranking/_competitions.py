"""Who competes: rankings over whole leaves, and competitions inside of one."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._ranking._shards import Shard

Ranking: TypeAlias = tuple[int, ...]  # positions, in a list of leaves, of those that rank together


@dataclasses.dataclass(frozen=True)
class Competitions:
    """All competitions of a search, numbered through from 0 to `n` - 1.

    A ranking is one competition over all of its leaves, or, where it has one leaf and counts that
    broadcast over it, one for each entry of them. A search keeps a vector `[n]` of whatever it
    knows of each; ``over`` spreads that over a leaf, ``total`` collects it from the leaves. With
    the leaves `a [2, 3]` and `b [5]`, of which `b` and the rows of `a` rank for themselves:

        rankings ((0,), (1,))   shapes ((2, 1), ())   n = 3: row 0, row 1, b

    Attributes:
      rankings: which leaves compete with one another; every leaf is in exactly one ranking.
      shapes: for each ranking the shape of its counts: `()`, or each axis of its leaf full or 1.
    """

    rankings: tuple[Ranking, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def of_leaf(self) -> list[int]:
        """For each leaf the ranking that it takes part in."""
        of = {i: r for r, ranking in enumerate(self.rankings) for i in ranking}
        return [of[i] for i in range(len(of))]

    def over(self, known: jax.Array, leaf: int) -> jax.Array:
        """What is known of each competition, `[n]`, so that it broadcasts over a leaf."""
        ranking = self.of_leaf[leaf]
        first = [0, *itertools.accumulate(map(math.prod, self.shapes))][ranking]
        shape = self.shapes[ranking]
        if not shape:
            return known[first]
        return lax.slice_in_dim(known, first, first + math.prod(shape)).reshape(shape)

    def flat(self, found: Sequence[jax.Array]) -> jax.Array:
        """Put what was found for each ranking, in the shapes of the counts, into a vector `[n]`."""
        return jnp.concatenate([jnp.reshape(x, -1) for x in found])

    def total(self, counts: Sequence[jax.Array], shards: Sequence[Shard]) -> jax.Array:
        """Sum the counts of the leaves of each ranking, and over the devices that share a leaf."""
        total = jnp.zeros(sum(map(math.prod, self.shapes)), jnp.int32)
        for names in dict.fromkeys(
            shard.names for shard in shards
        ):  # one sum for all sharded alike
            here = self.flat(
                [
                    sum((counts[i] for i in ranking if shards[i].names == names), _zeros(shape))
                    for ranking, shape in zip(self.rankings, self.shapes, strict=True)
                ]
            )
            total += lax.psum(here, names) if names else here
        return total

    def sizes(self, leaves: Sequence[jax.Array], shards: Sequence[Shard]) -> list[int]:
        """Count the units of each competition, `n` of them."""
        found = []
        for ranking, shape in zip(self.rankings, self.shapes, strict=True):
            units, parts = sum(shards[i].whole(leaves[i]) for i in ranking), math.prod(shape)
            found += [units // max(parts, 1)] * parts
        return found


def _zeros(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.zeros(shape, np.int32))
