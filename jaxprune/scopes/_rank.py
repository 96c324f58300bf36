"""The one top-k of the library: exact, by counting; only many small vectors are sorted."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._mesh import names_of
from jaxprune.scopes._deferred import Deferred, score_of, stored
from jaxprune.scopes._shards import Shard

Ranking = tuple[int, ...]  # positions, in a list of leaves, of those that compete together


def keep_largest(
    leaves: Sequence[jax.Array | Deferred],
    counts: Sequence[int | jax.Array],
    rankings: tuple[Ranking, ...],
    alive: Sequence[jax.Array | None] | None = None,
    shards: Sequence[Shard] | None = None,
) -> list[jax.Array]:
    """Keep the ``counts[r]`` largest units over the leaves of each ranking.

    The k-th largest score is a threshold such that k scores reach it. Counting is a sum, a sum
    over several leaves or devices is a sum of sums, and so nothing but scalars ever leaves its
    leaf. NaN ranks below every number, units that are not ``alive`` below NaN. Among equals the
    earlier leaf, then the earlier position stays. The dead are never kept.

    Args:
      leaves: scores, any floating dtypes and shapes.
      counts: units to keep in each ranking, static or traced.
      rankings: which leaves compete with one another; every leaf in exactly one ranking.
      alive: for each leaf a bool array like it, or None where all are.
      shards: for each leaf how it is cut over mesh axes, inside of shard_map; None if not at all.

    Returns:
      For each leaf a bool array of its shape.
    """
    return _keep_largest(
        [stored(x) for x in leaves],
        counts,
        list(alive) if alive else [None] * len(leaves),
        rankings=rankings,
        score=tuple(score_of(x) for x in leaves),
        shards=tuple(shards or [Shard()] * len(leaves)),
    )


@functools.partial(jax.jit, static_argnames=("rankings", "score", "shards"))
def _keep_largest(
    leaves: list[jax.Array],
    counts: Sequence[int | jax.Array],
    living: list[jax.Array | None],
    *,
    rankings: tuple[Ranking, ...],
    score: tuple[Callable[[jax.Array], jax.Array], ...],
    shards: tuple[Shard, ...],
) -> list[jax.Array]:
    # Widening is exact, so that leaves of several dtypes compare as the numbers they are; those of
    # eight bits promote to nothing by themselves.
    kinds = {x.dtype if jnp.finfo(x.dtype).bits > 8 else jnp.dtype(jnp.float32) for x in leaves}
    dtype = jnp.result_type(*kinds)

    def images(leaves: list[jax.Array]) -> list[jax.Array]:
        return [
            image(read(x).astype(dtype), a)
            for read, x, a in zip(score, leaves, living, strict=True)
        ]

    def units(data: _Data) -> list[_Unit]:
        places = _precedence(data, rankings, shards)
        return [_Unit(x, p) for x, p in zip(images(data.leaves), places, strict=True)]

    wanted = jnp.stack([jnp.asarray(count, jnp.int32) for count in counts])
    if _many_and_small(leaves, shards):
        return _keep_sorted(images(leaves), wanted, rankings)
    data = _Data(leaves, jnp.uint32(0))
    last = _last_kept(units, data, wanted, rankings, shards)
    # The dead, of image 0, can at most fill up the count: out with them.
    return [
        (unit.image > 0)
        & (
            (unit.image > last.image[r])
            | ((unit.image == last.image[r]) & (unit.precedence >= last.precedence[r]))
        )
        for unit, r in zip(units(data), _ranking_of(rankings), strict=True)
    ]


def _many_and_small(leaves: Sequence[jax.Array], shards: Sequence[Shard]) -> bool:
    """True for the units of many coupled groups: vectors of some thousand scores each.

    A search loop with a body for each of them takes long to compile, and sorting them no time.
    """
    plain = all(x.ndim == 1 and not any(jax.typeof(x).sharding.spec) for x in leaves)
    plain = plain and not any(shard.names for shard in shards)
    return len(leaves) > 4 and plain and sum(x.size for x in leaves) <= 2**20


def _keep_sorted(
    images: Sequence[jax.Array], wanted: jax.Array, rankings: Sequence[Ranking]
) -> list[jax.Array]:
    """Keep the largest of each ranking by sorting: one row a ranking, filled up with the dead."""
    rows = [jnp.concatenate([images[i] for i in ranking]) for ranking in rankings]
    longest = max(row.size for row in rows)
    table = jnp.stack([jnp.pad(row, (0, longest - row.size)) for row in rows])
    place = jnp.argsort(jnp.argsort(~table, axis=1, stable=True), axis=1)
    keep = (place < wanted[:, None]) & (table > 0)
    kept: dict[int, jax.Array] = {}
    for row, ranking in zip(keep, rankings, strict=True):
        start = 0
        for i in ranking:
            kept[i] = row[start : start + images[i].size]
            start += images[i].size
    return [kept[i] for i in range(len(kept))]


class _Data(NamedTuple):
    """What units are made from. All of it passes the barrier of the search loop."""

    leaves: list[jax.Array]
    zero: jax.Array  # uint32, where positions are counted from


class _Unit(NamedTuple):
    """What a unit is ranked by: first its image, among equals its precedence. No two are equal."""

    image: jax.Array
    precedence: jax.Array  # uint32, from 1, higher for earlier leaves and positions


def image(x: jax.Array, alive: jax.Array | None = None) -> jax.Array:
    """Map floats to unsigned integers in the same order: 0 for dead, 1 for NaN, then -inf up."""
    bits = jnp.finfo(x.dtype).bits
    unsigned = jnp.dtype(f"uint{bits}")
    x = jnp.where(x == 0, jnp.zeros_like(x), x)  # -0.0 equals 0.0
    code = lax.bitcast_convert_type(x, unsigned)
    sign = np.asarray(1 << (bits - 1), unsigned)
    code = jnp.where(code >= sign, ~code, code | sign)
    code = jnp.where(jnp.isnan(x), np.asarray(1, unsigned), code)
    return code if alive is None else jnp.where(alive, code, np.asarray(0, unsigned))


def _last_kept(
    units: Callable[[_Data], list[_Unit]],
    data: _Data,
    wanted: jax.Array,
    rankings: Sequence[Ranking],
    shards: Sequence[Shard],
) -> _Unit:
    """Find for each ranking the unit that exactly ``wanted`` units reach (or what separates them).

    One byte of it at a time, from the highest of the image to the lowest of the precedence: each
    unit is cut to the byte in question, saturated on both sides, so that the counting passes over
    a byte read one byte a unit instead of its score. Stops as soon as the count is right; only
    where scores are equal does it come to the precedence.
    """
    sizes = [sum(shards[i].whole(data.leaves[i]) for i in ranking) for ranking in rankings]
    dtype = jax.eval_shape(lambda: units(data)[0].image).dtype
    position_bits = max(sizes).bit_length()
    image_bytes, all_bytes = dtype.itemsize, dtype.itemsize + -(-position_bits // 8)
    ranking_of = _ranking_of(rankings)
    # Two leaves at a time, or XLA keeps what it compares of all leaves at once. Not where counts
    # travel between devices, which they do better together.
    in_turns = all(_parts(x) == 1 and not s.names for x, s in zip(data.leaves, shards, strict=True))

    def next_byte(state: _State) -> _State:
        last, reached, beyond, byte = state
        in_image = byte < image_bytes
        below = jnp.where(in_image, 8 * image_bytes, position_bits + 8 * image_bytes)
        shift = jnp.maximum(below - 8 * (byte + 1), 0)
        # Tied to the loop, or XLA computes the units once and keeps them: a score-sized buffer.
        # One by one, since what passes a barrier together varies over mesh axes together.
        inside = jax.tree.map(lambda x: lax.optimization_barrier((x, byte))[0], data)

        def cut(unit: _Unit, image: jax.Array, precedence: jax.Array) -> jax.Array:
            by_image = _byte_above(unit.image, image, shift)
            by_precedence = _byte_above(unit.precedence, precedence, shift)
            decided = jnp.where(unit.image > image, np.uint8(255), np.uint8(0))
            tied = jnp.where(unit.image == image, by_precedence, decided)
            return jnp.where(in_image, by_image, tied)

        digits = [
            cut(unit, last.image[r], last.precedence[r])
            for unit, r in zip(units(inside), ranking_of, strict=True)
        ]

        def look(state: _Search) -> _Search:
            low, high, reached, beyond, turn = state
            # Within a byte units spread evenly, unless it is the one with the exponent or many are
            # equal. So two guesses by the counts at both ends, which mostly do, then by halves.
            share = (reached - wanted) / jnp.maximum(reached - beyond, 1)
            even = (byte > 0) & (turn < 2)
            guess = jnp.where(even, jnp.int32(share * (high - low)), (high - low) // 2)
            guess = low + jnp.clip(guess, 1, jnp.maximum(high - low - 1, 1))
            reach: list[jax.Array] = []
            for digit, r in zip(digits, ranking_of, strict=True):
                after = reach[-2:-1] if in_turns else []
                now, _ = lax.optimization_barrier((digit, after))
                reach.append(count_true(now >= guess[r].astype(jnp.uint8)))
            # A ranking that is settled guesses `high` until the others are, and stays as it is.
            count = jnp.where(guess < high, _totals(reach, rankings, shards), beyond)
            enough = (guess < high) & (count >= wanted)
            return _Search(
                low=jnp.where(enough, guess, low),
                high=jnp.where(enough, high, guess),
                reached=jnp.where(enough, count, reached),
                beyond=jnp.where(enough, beyond, count),
                turn=turn + 1,
            )

        def open_(state: _Search) -> jax.Array:
            return jnp.any((state.high - state.low > 1) & (state.reached != wanted))

        none = beyond * 0
        start = _Search(none, none + 256, reached, beyond, jnp.int32(0))
        digit, _, reached, beyond, _ = lax.while_loop(open_, look, start)
        image = last.image + (jnp.where(in_image, digit, 0).astype(dtype) << shift.astype(dtype))
        precedence = last.precedence + (
            jnp.where(in_image, 0, digit).astype(jnp.uint32) << shift.astype(jnp.uint32)
        )
        return _Unit(image, precedence), reached, beyond, byte + 1

    def searching(state: _State) -> jax.Array:
        _, reached, _, byte = state
        return jnp.any(reached != wanted) & (byte < all_bytes)

    # Under shard_map what a loop carries must vary over the axes that the counts vary over.
    nothing = _totals([_no_units(x) for x in data.leaves], rankings, shards)
    nothing = nothing + sum(nothing)  # a ranking's loop goes on until all are settled
    zero = _Unit(nothing.astype(dtype), nothing.astype(jnp.uint32))
    reached, beyond = jnp.asarray(sizes, jnp.int32) + nothing, nothing
    return lax.while_loop(searching, next_byte, (zero, reached, beyond, jnp.int32(0)))[0]


# The unit so far, how many units reach it, how many what comes after it, and bytes found.
_State = tuple[_Unit, jax.Array, jax.Array, jax.Array]


class _Search(NamedTuple):
    """Where a byte lies: ``reached`` units have at least ``low``, ``beyond`` at least ``high``."""

    low: jax.Array
    high: jax.Array
    reached: jax.Array
    beyond: jax.Array
    turn: jax.Array


def _byte_above(x: jax.Array, low: jax.Array, shift: jax.Array) -> jax.Array:
    """The byte at ``shift`` of ``x - low``, 0 for what is below and 255 for what is beyond."""
    offset = (jnp.maximum(x, low) - low) >> shift.astype(x.dtype)
    return jnp.minimum(offset, np.asarray(255, x.dtype)).astype(jnp.uint8)


def _totals(
    counts: Sequence[jax.Array], rankings: Sequence[Ranking], shards: Sequence[Shard]
) -> jax.Array:
    """Sum the counts of the leaves of each ranking, and over the devices that share a leaf."""
    total = jnp.zeros(len(rankings), jnp.int32)
    for names in dict.fromkeys(shard.names for shard in shards):  # one sum for all cut alike
        here = [
            sum((counts[i] for i in ranking if shards[i].names == names), jnp.int32(0))
            for ranking in rankings
        ]
        total += lax.psum(jnp.stack(here), names) if names else jnp.stack(here)
    return total


def _precedence(
    data: _Data, rankings: Sequence[Ranking], shards: Sequence[Shard]
) -> list[jax.Array]:
    """Number the units of each ranking downwards to 1, without reshaping any leaf."""
    numbers: dict[int, jax.Array] = {}
    for ranking in rankings:
        left = sum(shards[i].whole(data.leaves[i]) for i in ranking)
        for i in ranking:
            leaf = data.leaves[i]
            # Made from the leaf, so that the numbers lie where the leaf does.
            first = jnp.zeros_like(leaf, jnp.uint32) + (data.zero + np.uint32(left))
            numbers[i] = shards[i].count_down(first)
            left -= shards[i].whole(leaf)
    return [numbers[i] for i in range(len(numbers))]


def _no_units(leaf: jax.Array) -> jax.Array:
    """Count none of the units: 0, of the kind that counts of this leaf are."""
    none = lax.slice_in_dim(leaf, 0, 0, axis=0) if leaf.ndim else leaf[None][:0]
    return jnp.sum(none, dtype=jnp.int32)


def _ranking_of(rankings: Sequence[Ranking]) -> list[int]:
    """For each leaf the ranking that it takes part in."""
    of = {i: r for r, ranking in enumerate(rankings) for i in ranking}
    return [of[i] for i in range(len(of))]


def count_true(mask: jax.Array) -> jax.Array:
    """Count what is True, in int32."""
    return lax.platform_dependent(mask, cpu=_count_in_bytes, default=_count_plain)


def _count_plain(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _count_in_bytes(mask: jax.Array) -> jax.Array:
    # XLA on CPU writes out what it sums, four bytes a unit in int32. Windows of at most 255 units
    # can be summed in bytes first, which is some ten times faster.
    window = _window(mask)
    if window is None:
        return _count_plain(mask)
    ones = mask.astype(jnp.uint8)
    return _count_plain(lax.reduce_window(ones, np.uint8(0), lax.add, window, window, "SAME"))


def _window(mask: jax.Array) -> tuple[int, ...] | None:
    """Choose windows of 64 to 255 units along one axis, the last that is long enough.

    None if there is no such axis. A window that crossed the border of a shard would move data, so
    it fits into the smallest part that there can be.
    """
    if not mask.size:
        return None
    for axis in reversed(range(mask.ndim)):
        parts, n = _parts(mask, axis), mask.shape[axis]
        fits = [d for d in range(64, 256) if n % (parts * d) == 0]
        if n >= 64 and (fits or parts == 1):
            return tuple(max(fits, default=128) if i == axis else 1 for i in range(mask.ndim))
    return None


def _parts(x: jax.Array, *axes: int) -> int:
    """Into how many equal parts jit may cut some axes of an array, or all.

    Explicit mesh axes are in its type. What automatic ones will cut nobody knows yet, but no axis
    into more parts than they have devices.
    """
    sharding = jax.typeof(x).sharding
    sizes = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_sizes, strict=True))
    seen = [name for i in axes or range(x.ndim) for name in names_of(sharding.spec[i])]
    return math.prod(sizes[name] for name in (*sharding.mesh.auto_axes, *seen))
