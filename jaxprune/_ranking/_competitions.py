"""Who competes: rankings over whole leaves, and competitions inside of one."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._ranking._alike import Stack, stacks
from jaxprune._ranking._shards import MOST_PLACES, Shard
from jaxprune._ranking._whole import Whole, in_words

Ranking: TypeAlias = tuple[int, ...]  # positions, in a list of leaves, of those that rank together
Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Competitions:
    """All competitions of a search, numbered through from 0 to `n` - 1.

    A ranking is one competition over all of its leaves, or, where it has one leaf and counts that
    broadcast over it, one for each entry of them. A search keeps a vector `[n]` of whatever it
    knows of each; ``over`` gives leaves what is known of their own, ``total`` collects it from
    them. With the leaves `a [2, 3]` and `b [5]`, of which `b` and the rows of `a` rank
    for themselves:

        rankings ((0,), (1,))   shapes ((2, 1), ())   n = 3: row 0, row 1, b

    Attributes:
      rankings: which leaves compete with one another; every leaf is in exactly one ranking.
      shapes: for each ranking the shape of its counts: `()`, or each axis of its leaf full or 1.
      leaves: the shape of each leaf, or of this device's shard of it.
      shards: for each leaf which part of it this device has.
      stacks: the leaves that are alike, each leaf in one stack.
    """

    rankings: tuple[Ranking, ...]
    shapes: tuple[Shape, ...]
    leaves: tuple[Shape, ...]
    shards: tuple[Shard, ...]
    stacks: tuple[Stack, ...]

    @classmethod
    def of_some(
        cls,
        pairs: Sequence[Any],
        names: Sequence[str],
        shards: Sequence[Shard],
        rankings: tuple[Ranking, ...],
        shapes: tuple[Shape, ...],
    ) -> "Competitions":
        """Find out which leaves are alike, given what each one's ranks are made from."""
        shape_of = {i: shapes[r] for r, ranking in enumerate(rankings) for i in ranking}
        kinds = [(shard, shape_of[i]) for i, shard in enumerate(shards)]
        leaves = tuple(scores.shape for scores, _ in pairs)
        return cls(rankings, shapes, leaves, tuple(shards), tuple(stacks(pairs, names, kinds)))

    @cached_property
    def ranking_of(self) -> list[int]:
        """For each leaf the ranking that it takes part in."""
        of = {i: r for r, ranking in enumerate(self.rankings) for i in ranking}
        return [of[i] for i in range(len(of))]

    def shape(self, leaf: int) -> Shape:
        """The shape of the counts of a leaf's ranking."""
        return self.shapes[self.ranking_of[leaf]]

    @cached_property
    def ids(self) -> list[np.ndarray]:
        """For each leaf its competitions, by number, in the shape of its counts."""
        firsts = [0, *itertools.accumulate(map(math.prod, self.shapes))]
        numbers = [
            np.arange(first, first + math.prod(shape), dtype=np.int32).reshape(shape)
            for first, shape in zip(firsts, self.shapes, strict=False)
        ]
        return [numbers[ranking] for ranking in self.ranking_of]

    def over(self, known: jax.Array, stack: Stack) -> jax.Array:
        """What is known of each competition, `[n]`, for the leaves of a stack: `[k, ...]`."""
        ids = np.stack([self.ids[i] for i in stack])
        first = int(ids.flat[0]) if ids.size else 0
        if np.array_equal(ids.ravel(), first + np.arange(ids.size)):  # a slice, mostly: no gather
            return lax.slice_in_dim(known, first, first + ids.size).reshape(ids.shape)
        return jnp.broadcast_to(known[first], ids.shape) if (ids == first).all() else known[ids]

    def of_leaves(self, known: jax.Array) -> jax.Array:
        """What is known of each competition, `[n]`, for each leaf that has but one: `[m]`."""
        firsts = np.array([ids.ravel()[0] if ids.size else 0 for ids in self.ids])
        if np.array_equal(firsts, np.arange(self.n)):
            return known
        return jnp.broadcast_to(known[0], firsts.shape) if self.n == 1 else known[firsts]

    def flat(self, found: Sequence[Any]) -> Any:
        """Put what was found for each ranking, in the shapes of the counts, into a vector `[n]`.

        Counts that are entries of a vector are one again, if nothing was done with them before.
        """
        return jax.tree.map(lambda *xs: jnp.concatenate([jnp.reshape(x, -1) for x in xs]), *found)

    def total(self, counts: Sequence[Whole]) -> Whole:
        """Sum counts over the leaves of each competition, and over the devices that share a leaf.

        Args:
          counts: for each stack numbers `[k, ...]`, as the counts of its leaves.

        Returns:
          Numbers `[n]`.
        """
        total = in_words(jnp.zeros(self.n, jnp.int32))
        # One sum over devices for all leaves that are sharded over the same axes.
        for names in dict.fromkeys(shard.names for shard in self.shards):
            mine = [
                s for s, stack in enumerate(self.stacks) if self.shards[stack[0]].names == names
            ]
            ids = np.concatenate([self.ids[i].ravel() for s in mine for i in self.stacks[s]])
            words = jax.tree.leaves(self.flat([counts[s] for s in mine]))
            high, low = (self._sum(word, ids) for word in words)
            if names:
                high, low = lax.psum((high, low), names)
            total += Whole(high, low)
        return total

    def _sum(self, counts: jax.Array, ids: np.ndarray) -> jax.Array:
        if self.n == 1:
            return jnp.sum(counts, keepdims=True, dtype=jnp.int32)
        if np.array_equal(ids, np.arange(self.n)):
            return counts
        if np.array_equal(np.sort(ids), np.arange(self.n)):  # one count each, in another order
            return counts[np.argsort(ids)]
        return jnp.zeros(self.n, jnp.int32).at[ids].add(counts)

    @cached_property
    def n(self) -> int:
        """How many competitions there are."""
        return sum(map(math.prod, self.shapes))

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Count the units of each competition: for each ranking, how many, and in how many."""
        return [
            (sum(math.prod(self._slabs(i)) for i in ranking), math.prod(shape))
            for ranking, shape in zip(self.rankings, self.shapes, strict=True)
        ]

    @cached_property
    def starts(self) -> tuple[np.ndarray, ...]:
        """Where the precedence of each leaf starts: one word, or slabs and units in one; uint32.

        The first of `m` leaves comes first, and so starts highest.
        """
        slabs, inside = np.zeros((2, len(self.leaves)), object)
        for ranking in self.rankings:
            left = 0
            for i in reversed(ranking):
                here, inside[i] = self._slabs(i)
                left += here if self.is_wide else here * inside[i]
                slabs[i] = left
        words = (slabs, inside) if self.is_wide else (slabs,)
        return tuple(word.astype(np.uint32) for word in words)

    @cached_property
    def is_wide(self) -> bool:
        """True if one word does not number all units of a competition."""
        return max(units for units, _ in self.sizes) > MOST_PLACES

    def _slabs(self, leaf: int) -> tuple[int, int]:
        """Slabs of a leaf's competitions, and units in each."""
        counts, shape = self.shape(leaf), self.leaves[leaf]
        axes = [i for i in range(len(shape)) if not counts or counts[i] == 1]
        return self.shards[leaf].sizes(shape, self.shards[leaf].order(axes))

    def bits(self) -> list[int]:
        """How many bits each word of the precedence takes."""
        return [int(word.max(initial=1)).bit_length() for word in self.starts]
