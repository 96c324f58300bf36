"""The one top-k of the library: exact, by counting; it never sorts, gathers or concatenates."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Ranking = tuple[int, ...]  # positions, in a list of leaves, of those that compete together


@functools.partial(jax.jit, static_argnames="rankings")
def keep_largest(
    leaves: Sequence[jax.Array],
    counts: Sequence[int | jax.Array],
    rankings: tuple[Ranking, ...],
    alive: Sequence[jax.Array | None] | None = None,
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

    Returns:
      For each leaf a bool array of its shape.
    """
    living = list(alive) if alive else [None] * len(leaves)
    sizes = [sum(leaves[i].size for i in ranking) for ranking in rankings]
    ranking_of = {i: r for r, ranking in enumerate(rankings) for i in ranking}
    # Widening is exact, so that leaves of several dtypes compare as the numbers they are.
    widest = jnp.result_type(*(x.dtype for x in leaves))
    dtype = widest if jnp.finfo(widest).bits > 8 else jnp.dtype(jnp.float32)
    keep = jnp.stack([jnp.asarray(count, jnp.int32) for count in counts])

    def images(data: _Data) -> list[jax.Array]:
        return [image(x.astype(dtype), a) for x, a in zip(data.leaves, living, strict=True)]

    data = _Data(list(leaves), jnp.uint32(1))
    threshold, reached = _kth_largest(images, data, keep, sizes, rankings)
    at = [threshold[ranking_of[i]] for i in range(len(leaves))]

    # Scores equal to the threshold may be too many; the last of them by position go.
    def positions(data: _Data) -> list[jax.Array]:
        order = _positions(data, rankings)
        return [jnp.where(x == t, o, 0) for x, t, o in zip(images(data), at, order, strict=True)]

    last, _ = _kth_largest(positions, data, reached - keep, sizes, rankings)
    # The dead, of image 0, can at most fill up the count: out with them.
    return [
        (x > 0) & ((x > at[i]) | ((x == at[i]) & (order < last[ranking_of[i]])))
        for i, (x, order) in enumerate(zip(images(data), _positions(data, rankings), strict=True))
    ]


_State = tuple[jax.Array, jax.Array, jax.Array]  # t so far, how many reach it, bits below it


class _Data(NamedTuple):
    """What images are made from. All of it passes the barrier of the search loop."""

    leaves: list[jax.Array]
    first: jax.Array  # uint32, position of the first unit


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


def _kth_largest(
    images: Callable[[_Data], list[jax.Array]],
    data: _Data,
    k: jax.Array,
    sizes: Sequence[int],
    rankings: Sequence[Ranking],
) -> tuple[jax.Array, jax.Array]:
    """Find the largest integer t that at least k images reach, and how many reach it.

    Eight bits of t at a time: an image is cut to the byte in question, saturated on both sides,
    so that the eight counting passes of a stage read one byte a unit instead of its score. Stops
    as soon as exactly k images reach t; t is then some integer that separates them. For k = 0 it
    is above every image.
    """
    dtype = jax.eval_shape(lambda: images(data)[0]).dtype
    bits = jnp.iinfo(dtype).bits
    all_ones = np.asarray(2**bits - 1, dtype)

    def byte(state: _State) -> _State:
        low, reached, shift = state
        # Tied to the loop, or XLA computes the images once and keeps them: a score-sized buffer.
        inside, _ = lax.optimization_barrier((data, low))
        scores = images(inside)
        digits: dict[int, jax.Array] = {}
        for r, ranking in enumerate(rankings):
            for i in ranking:
                offset = (jnp.maximum(scores[i], low[r]) - low[r]) >> shift
                digits[i] = jnp.minimum(offset, np.asarray(255, dtype)).astype(jnp.uint8)

        def bit(j: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            digit, reached = found
            trial = digit | (np.uint8(128) >> j.astype(jnp.uint8))
            count = jnp.stack(
                [
                    sum((_count(digits[i] >= trial[r]) for i in ranking), jnp.int32(0))
                    for r, ranking in enumerate(rankings)
                ]
            )
            enough = count >= k
            return jnp.where(enough, trial, digit), jnp.where(enough, count, reached)

        start = (jnp.zeros_like(low, jnp.uint8), reached)
        digit, reached = lax.fori_loop(0, 8, bit, start)
        return low + (digit.astype(dtype) << shift), reached, shift - np.asarray(8, dtype)

    def searching(state: _State) -> jax.Array:
        _, reached, shift = state
        return jnp.any(reached != k) & (shift < bits)  # below zero the shift wraps around

    # With k = 0 there is nothing to search: told so at once, it costs no pass.
    reached = jnp.where(k == 0, 0, jnp.asarray(sizes, jnp.int32))
    start = (jnp.zeros(k.shape, dtype), reached, jnp.asarray(bits - 8, dtype))
    low, reached, _ = lax.while_loop(searching, byte, start)
    return jnp.where(k == 0, all_ones, low), reached


def _positions(data: _Data, rankings: Sequence[Ranking]) -> list[jax.Array]:
    """Number the units of each ranking, leaf after leaf, without reshaping any."""
    positions: dict[int, jax.Array] = {}
    for ranking in rankings:
        before = 0
        for i in ranking:
            shape = data.leaves[i].shape
            position = jnp.broadcast_to(data.first + np.uint32(before), shape)
            for axis in range(len(shape)):
                stride = np.uint32(math.prod(shape[axis + 1 :]))
                position += lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
            positions[i] = position
            before += data.leaves[i].size
    return [positions[i] for i in range(len(positions))]


def _count(mask: jax.Array) -> jax.Array:
    """Count what is True, in int32."""
    return lax.platform_dependent(mask, cpu=_count_in_bytes, default=_count_plain)


def _count_plain(mask: jax.Array) -> jax.Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _count_in_bytes(mask: jax.Array) -> jax.Array:
    # XLA on CPU writes out what it sums, four bytes a unit in int32. Windows of at most 255 units
    # can be summed in bytes first, which is some ten times faster.
    if not mask.size:
        return jnp.int32(0)
    axis = max(range(mask.ndim), key=lambda i: (mask.shape[i] >= 64, i), default=None)
    if axis is not None:
        n = mask.shape[axis]
        size = max((d for d in range(64, 256) if n % d == 0), default=128)
        window = tuple(size if i == axis else 1 for i in range(mask.ndim))
        ones = mask.astype(jnp.uint8)
        mask = lax.reduce_window(ones, np.uint8(0), lax.add, window, window, "SAME")
    return jnp.sum(mask, dtype=jnp.int32)
