"""The search for the last unit that stays, a byte of its rank at a time."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._ranking._competitions import Competitions
from jaxprune._ranking._lazy import Leaf, stored
from jaxprune._ranking._order import Rank
from jaxprune._ranking._shards import Shard
from jaxprune._ranking._tally import count_none, count_true, most_shards


class Data(NamedTuple):
    """What ranks are made from. All of it passes the barrier of the search loop."""

    leaves: list[Leaf]
    zero: jax.Array  # uint32 [], where positions are counted from


# The rank so far, how many units reach it, how many what comes after it [n], and bytes found [].
_State: TypeAlias = tuple[Rank, jax.Array, jax.Array, jax.Array]


class _Bracket(NamedTuple):
    """Where a byte lies, `[n]`: ``reached`` units have at least ``low``, ``beyond`` ``high``."""

    low: jax.Array
    high: jax.Array
    reached: jax.Array
    beyond: jax.Array
    turn: jax.Array  # []


def last_kept(
    ranks: Callable[[Data], list[Rank]],
    data: Data,
    wanted: jax.Array,
    competitions: Competitions,
    shards: Sequence[Shard],
) -> Rank:
    """Find for each competition the rank that exactly ``wanted`` units reach.

    A rank is a number of some bytes, those of the key before those of the precedence, and so the
    number that is looked for is found a byte at a time, from the highest on. With all bytes before
    it settled, a unit can only be below, within or beyond what is still open; one byte says so,
    saturated at both ends, and the counting passes read that byte instead of the score:

        found so far 0x40....; units 0x3f12 0x4007 0x40c1 0x9a00 become 0x00 0x07 0xc1 0xff

    The invariant: ``reached`` units have at least the rank found so far (filled up with zeros),
    ``beyond`` at least the next one, and ``beyond <= wanted <= reached``. It stops as soon as
    ``reached`` is what is wanted; only where scores are equal does it come to the precedence.

    Args:
      ranks: makes the rank of each unit from the data, for each leaf.
      data: the leaves.
      wanted: units to keep, int32 `[n]`.
      competitions: the `n` of them.
      shards: for each leaf which part of it this device has.

    Returns:
      Ranks `[n]`.
    """
    sizes = competitions.sizes([stored(leaf) for leaf in data.leaves], shards)
    dtype = jax.eval_shape(lambda: ranks(data)[0].key).dtype
    position_bits = max(sizes).bit_length()
    key_bytes, all_bytes = dtype.itemsize, dtype.itemsize + -(-position_bits // 8)

    def next_byte(state: _State) -> _State:
        last, reached, beyond, byte = state
        in_key = byte < key_bytes
        below = jnp.where(in_key, 8 * key_bytes, position_bits + 8 * key_bytes)
        shift = jnp.maximum(below - 8 * (byte + 1), 0)
        # Tied to the loop, or XLA computes the ranks once and keeps them: a score-sized buffer.
        # One by one, since what passes a barrier together varies over mesh axes together.
        inside = jax.tree.map(lambda x: lax.optimization_barrier((x, byte))[0], data)
        digits = [
            _digit(rank, Rank(*(competitions.over(x, i) for x in last)), in_key, shift)
            for i, rank in enumerate(ranks(inside))
        ]
        even = byte > 0
        digit, reached, beyond = _find_byte(
            digits, wanted, (reached, beyond), even, competitions=competitions, shards=shards
        )
        key = last.key + (jnp.where(in_key, digit, 0).astype(dtype) << shift.astype(dtype))
        place = jnp.where(in_key, 0, digit).astype(jnp.uint32) << shift.astype(jnp.uint32)
        return Rank(key, last.precedence + place), reached, beyond, byte + 1

    def searching(state: _State) -> jax.Array:
        _, reached, _, byte = state
        return jnp.any(reached != wanted) & (byte < all_bytes)

    # Under shard_map what a loop carries must vary over the axes that the counts vary over.
    shapes = [competitions.shapes[r] for r in competitions.of_leaf]
    none = [count_none(stored(x), s) for x, s in zip(data.leaves, shapes, strict=True)]
    nothing = competitions.total(none, shards)
    nothing = nothing + sum(nothing)  # a ranking's loop goes on until all are settled
    zero = Rank(nothing.astype(dtype), nothing.astype(jnp.uint32))
    reached, beyond = jnp.asarray(sizes, jnp.int32) + nothing, nothing
    return lax.while_loop(searching, next_byte, (zero, reached, beyond, jnp.int32(0)))[0]


def _digit(unit: Rank, last: Rank, in_key: jax.Array, shift: jax.Array) -> jax.Array:
    """The byte that a unit has where the search is: 0 for what is below, 255 for what is beyond.

    Args:
      unit: ranks `[...]`.
      last: what has been found of the rank that is looked for; broadcasts over them.
      in_key: whether the search is in the key, `[]`.
      shift: how many bits come after the byte, `[]`.

    Returns:
      uint8 `[...]`.
    """
    by_key = _byte_above(unit.key, last.key, shift)
    by_precedence = _byte_above(unit.precedence, last.precedence, shift)
    decided = jnp.where(unit.key > last.key, np.uint8(255), np.uint8(0))
    tied = jnp.where(unit.key == last.key, by_precedence, decided)
    return jnp.where(in_key, by_key, tied)


def _byte_above(x: jax.Array, low: jax.Array, shift: jax.Array) -> jax.Array:
    """The byte at ``shift`` of ``x - low`` `[...]`, saturated on both sides."""
    offset = (jnp.maximum(x, low) - low) >> shift.astype(x.dtype)
    return jnp.minimum(offset, np.asarray(255, x.dtype)).astype(jnp.uint8)


def _find_byte(
    digits: Sequence[jax.Array],
    wanted: jax.Array,
    around: tuple[jax.Array, jax.Array],
    even: jax.Array,
    *,
    competitions: Competitions,
    shards: Sequence[Shard],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find the largest byte that ``wanted`` units reach, by counting.

    Args:
      digits: for each leaf uint8 `[...]`.
      wanted: units to keep, `[n]`.
      around: units that reach byte 0, and that are beyond byte 255, `[n]` each.
      even: whether units spread evenly over the byte, `[]`: not so for the one with the exponent.
      competitions: the `n` of them.
      shards: for each leaf which part of it this device has.

    Returns:
      The byte, and how many units reach it and the next one; int32 `[n]` each.
    """
    # Two leaves at a time, or XLA keeps what it compares of all leaves at once. Not where counts
    # travel between devices, which they do better together.
    in_turns = all(most_shards(x) == 1 and not s.names for x, s in zip(digits, shards, strict=True))

    def look(state: _Bracket) -> _Bracket:
        low, high, reached, beyond, turn = state
        # Two guesses by the counts at both ends, which mostly do, then by halves: many units may
        # be equal.
        share = (reached - wanted) / jnp.maximum(reached - beyond, 1)
        guess = jnp.where(even & (turn < 2), jnp.int32(share * (high - low)), (high - low) // 2)
        guess = low + jnp.clip(guess, 1, jnp.maximum(high - low - 1, 1))
        reach: list[jax.Array] = []
        for i, digit in enumerate(digits):
            after = reach[-2:-1] if in_turns else []
            now, _ = lax.optimization_barrier((digit, after))
            bound = competitions.over(guess, i).astype(jnp.uint8)
            reach.append(count_true(now >= bound, competitions.shapes[competitions.of_leaf[i]]))
        # A competition that is settled guesses `high` until the others are, and stays as it is.
        count = jnp.where(guess < high, competitions.total(reach, shards), beyond)
        enough = (guess < high) & (count >= wanted)
        return _Bracket(
            low=jnp.where(enough, guess, low),
            high=jnp.where(enough, high, guess),
            reached=jnp.where(enough, count, reached),
            beyond=jnp.where(enough, beyond, count),
            turn=turn + 1,
        )

    def is_open(state: _Bracket) -> jax.Array:
        return jnp.any((state.high - state.low > 1) & (state.reached != wanted))

    reached, beyond = around
    none = beyond * 0
    start = _Bracket(none, none + 256, reached, beyond, jnp.int32(0))
    found = lax.while_loop(is_open, look, start)
    return found.low, found.reached, found.beyond
