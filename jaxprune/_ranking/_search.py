"""The search for the last unit that stays, a byte of its rank at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._ranking._alike import each
from jaxprune._ranking._competitions import Competitions
from jaxprune._ranking._order import Rank
from jaxprune._ranking._tally import count_none, count_true, most_shards
from jaxprune._ranking._whole import Whole, in_words
from jaxprune._ranking._whole import where as chosen

Unit: TypeAlias = Any  # what the rank of a leaf's units is made from: a tree of arrays


class _State(NamedTuple):
    """What is known of the rank that is looked for, `[n]` each.

    ``reached`` units have at least the rank so far, ``beyond`` at least what comes after it;
    ``byte`` counts the bytes that were found, `[]`; ``numbers`` are those of the leaves.
    """

    last: Rank
    reached: Whole
    beyond: Whole
    byte: jax.Array
    numbers: tuple[jax.Array, ...]


class _Bracket(NamedTuple):
    """Where a byte lies, `[n]`: ``reached`` units have at least ``low``, ``beyond`` ``high``."""

    low: jax.Array
    high: jax.Array
    reached: Whole
    beyond: Whole
    turn: jax.Array  # []


def last_kept(
    rank: Callable[[Unit, Rank, int], Rank],
    units: Sequence[Unit],
    wanted: Whole,
    competitions: Competitions,
) -> tuple[Rank, tuple[jax.Array, ...]]:
    """Find for each competition the rank that exactly ``wanted`` units reach.

    A rank is a number of some bytes, those of the key before those of the precedence, and so the
    number that is looked for is found a byte at a time, from the highest on. With all bytes before
    it settled, a unit can only be below, within or beyond what is still open; one byte says so,
    saturated at both ends, and the counting passes read that byte instead of the score:

        found so far 0x40....; units 0x3f12 0x4007 0x40c1 0x9a00 become 0x00 0x07 0xc1 0xff

    The invariant: ``reached`` units have at least the rank found so far (filled up with zeros),
    ``beyond`` at least the next one, and ``beyond <= wanted <= reached``. It stops as soon as
    ``reached`` is what is wanted; only where scores are equal does it come to the precedence. Where
    all units are wanted it does not even start: a caller who has nothing to do asks for that.

    Args:
      rank: makes the rank of each unit of a leaf from what it is made from, from where its
        precedence starts, `[]`, and from the position of a leaf that is like it.
      units: of each leaf.
      wanted: units to keep, `[n]`.
      competitions: the `n` of them.

    Returns:
      Ranks `[n]`, and the numbers of the leaves, int32 `[]` each: 0, 1, 2 and so on, of which a
      compiler does not know that they are.
    """
    starts = competitions.starts
    first = jax.eval_shape(lambda: rank(units[0], tuple(jnp.asarray(x[0]) for x in starts), 0))
    words = [word.dtype for word in first]
    bits = [8 * words[0].itemsize, *competitions.bits()]
    word_of, shift_of = map(np.array, zip(*_bytes(bits), strict=True))

    def next_byte(state: _State) -> _State:
        last, reached, beyond, byte, numbers = state
        word, shift = jnp.asarray(word_of)[byte], jnp.asarray(shift_of)[byte]

        def digit(unit: Unit, start: Rank, last: Rank) -> jax.Array:
            # Tied to the loop, or XLA computes the ranks once and keeps them: a score-sized buffer.
            # One by one, since what passes a barrier together varies over mesh axes together.
            tied = lambda x: lax.optimization_barrier((x, byte))[0]  # noqa: E731
            unit, start = jax.tree.map(tied, (unit, start))
            return _digit(rank(unit, start, stack[0]), last, word, shift)

        digits = []
        for stack in competitions.stacks:
            known = tuple(competitions.over(x, stack) for x in last)
            start = tuple(jnp.asarray(x[list(stack)]) for x in starts)
            digits.append(each(digit, [units[i] for i in stack], start, known))
        found, reached, beyond = _find_byte(
            digits, wanted, (reached, beyond), byte > 0, competitions=competitions
        )
        last = tuple(
            x + (jnp.where(word == i, found, 0).astype(x.dtype) << shift.astype(x.dtype))
            for i, x in enumerate(last)
        )
        return _State(last, reached, beyond, byte + 1, lax.optimization_barrier(numbers))

    def searching(state: _State) -> jax.Array:
        return jnp.any(state.reached.differs(wanted)) & (state.byte < len(word_of))

    # Under shard_map what a loop carries must vary over the axes that the counts vary over.
    none = [
        in_words(jnp.stack([count_none(_array(units[i]), competitions.shape(i)) for i in stack]))
        for stack in competitions.stacks
    ]
    nothing = competitions.total(none).low
    nothing += jnp.sum(nothing)  # a ranking's loop goes on until all are settled
    sizes = competitions.flat(
        [jax.tree.map(lambda x, n=n: jnp.full(n, x), in_words(k)) for k, n in competitions.sizes]
    )
    reached = sizes + in_words(nothing)
    last = tuple(nothing.astype(word) for word in words)
    numbers = tuple(map(jnp.int32, range(len(units))))
    start = _State(last, reached, in_words(nothing), jnp.int32(0), numbers)
    state = lax.while_loop(searching, next_byte, start)
    return state.last, state.numbers


def _count_reaching(digits: jax.Array, bound: jax.Array, keep: tuple[int, ...]) -> Whole:
    """Count the units of each leaf of a stack that reach a bound.

    Args:
      digits: `[k, ...]`.
      bound: broadcasts over them.
      keep: the axes of a leaf along which competitions differ.
    """

    def together(digits: jax.Array, bound: jax.Array) -> Whole:
        return count_true(digits >= bound, (0, *(axis + 1 for axis in keep)))

    def in_turns(digits: jax.Array, bound: jax.Array) -> Whole:
        return lax.map(lambda leaf: count_true(leaf[0] >= leaf[1], keep), (digits, bound))

    if len(digits) == 1:
        return together(digits, bound)
    # A CPU writes out what it compares, of which a leaf at a time is enough.
    return lax.platform_dependent(digits, bound, cpu=in_turns, default=together)


def _array(unit: Unit) -> jax.Array:
    """The weights, or the scores: the first array that a unit's rank is made from."""
    return jax.tree.leaves(unit)[0]


def _bytes(bits: Sequence[int]) -> list[tuple[int, int]]:
    """All bytes of the words of a rank, the highest first: which word, and the bits behind it."""
    return [
        (word, max(n - 8 * (i + 1), 0)) for word, n in enumerate(bits) for i in range(-(-n // 8))
    ]


def _digit(unit: Rank, last: Rank, word: jax.Array, shift: jax.Array) -> jax.Array:
    """The byte that a unit has where the search is: 0 for what is below, 255 for what is beyond.

    Args:
      unit: ranks `[...]`.
      last: what has been found of the rank that is looked for; broadcasts over them.
      word: the word of the rank that the search is in, `[]`.
      shift: how many bits come after the byte, `[]`.

    Returns:
      uint8 `[...]`.
    """
    digit = _byte_above(unit[0], last[0], shift)
    tied, decided = unit[0] == last[0], unit[0] > last[0]
    for i in range(1, len(unit)):
        more = jnp.where(decided, np.uint8(255), np.uint8(0))
        here = jnp.where(tied, _byte_above(unit[i], last[i], shift), more)
        digit = jnp.where(word < i, digit, here)
        decided |= tied & (unit[i] > last[i])
        tied &= unit[i] == last[i]
    return digit


def _byte_above(x: jax.Array, low: jax.Array, shift: jax.Array) -> jax.Array:
    """The byte at ``shift`` of ``x - low`` `[...]`, saturated on both sides."""
    offset = (jnp.maximum(x, low) - low) >> shift.astype(x.dtype)
    return jnp.minimum(offset, np.asarray(255, x.dtype)).astype(jnp.uint8)


def _find_byte(
    digits: Sequence[jax.Array],
    wanted: Whole,
    around: tuple[Whole, Whole],
    even: jax.Array,
    *,
    competitions: Competitions,
) -> tuple[jax.Array, Whole, Whole]:
    """Find the largest byte that ``wanted`` units reach, by counting.

    Args:
      digits: for each stack of leaves uint8 `[k, ...]`.
      wanted: units to keep, `[n]`.
      around: units that reach byte 0, and that are beyond byte 255, `[n]` each.
      even: whether units spread evenly over the byte, `[]`: not so for the one with the exponent.
      competitions: the `n` of them.

    Returns:
      The byte, int32 `[n]`, and how many units reach it and the next one, `[n]` each.
    """
    # Two stacks at a time, or XLA keeps what it compares of all leaves at once. Not where counts
    # travel between devices, which they do better together.
    in_turns = all(
        most_shards(x) == 1 and not competitions.shards[stack[0]].names
        for x, stack in zip(digits, competitions.stacks, strict=True)
    )

    def look(state: _Bracket) -> _Bracket:
        low, high, reached, beyond, turn = state
        # Two guesses by the counts at both ends, which mostly do, then by halves: many units may
        # be equal.
        share = (reached - wanted).float / jnp.maximum((reached - beyond).float, 1)
        guess = jnp.where(even & (turn < 2), jnp.int32(share * (high - low)), (high - low) // 2)
        guess = low + jnp.clip(guess, 1, jnp.maximum(high - low - 1, 1))
        reach: list[Whole] = []
        for stack, digit in zip(competitions.stacks, digits, strict=True):
            now, _ = lax.optimization_barrier((digit, reach[-2:-1] if in_turns else []))
            bound = competitions.over(guess, stack).astype(jnp.uint8)
            bound = bound.reshape(*bound.shape, *[1] * (now.ndim - bound.ndim))
            keep = tuple(i for i, n in enumerate(competitions.shape(stack[0])) if n > 1)
            reach.append(_count_reaching(now, bound, keep))
        # A competition that is settled guesses `high` until the others are, and stays as it is.
        count = chosen(guess < high, competitions.total(reach), beyond)
        enough = (guess < high) & (count >= wanted)
        return _Bracket(
            low=jnp.where(enough, guess, low),
            high=jnp.where(enough, high, guess),
            reached=chosen(enough, count, reached),
            beyond=chosen(enough, beyond, count),
            turn=turn + 1,
        )

    def is_open(state: _Bracket) -> jax.Array:
        return jnp.any((state.high - state.low > 1) & state.reached.differs(wanted))

    reached, beyond = around
    none = beyond.low * 0
    start = _Bracket(none, none + 256, reached, beyond, jnp.int32(0))
    found = lax.while_loop(is_open, look, start)
    return found.low, found.reached, found.beyond
