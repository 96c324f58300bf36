"""Units compete with their neighbours only: N:M sparsity."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._axes import axes_of, check_named, check_role
from jaxprune._layout import Layout
from jaxprune._numbers import is_number
from jaxprune._ranking import order_key
from jaxprune._tree import leaves_with_path, map_with_path, prunable
from jaxprune.scopes._count import Counts, each_layer, one_each, removed
from jaxprune.typing import Params, Pattern, Sparsity, Units, Where

TILE = 8  # rows of the second to last axis that lie together in the memory of a TPU


@dataclasses.dataclass(frozen=True)
class Windows:
    """The scope that ``windows`` makes."""

    m: int
    axis: int | str
    layout: Layout | None = None

    def __repr__(self) -> str:
        return f"windows({self.m})" if self.axis == -2 else f"windows({self.m}, axis={self.axis!r})"

    @property
    def window(self) -> int:
        """How many neighbours along the inputs of a matrix `[inputs, outputs]` compete."""
        return self.m if self.axis in ("in", -2, 0) else 1

    def bind(self, params: Params, *, where: Where, layout: Layout | None = None) -> "Windows":
        """Settle it on params: along which axis of each leaf the windows lie."""
        part = dict(leaves_with_path(prunable(params, where=where)))
        shapes = {path: leaf.shape for path, leaf in part.items()}
        check_named(layout, shapes, (self.axis,), repr(self), single=True)
        return self if layout == self.layout else dataclasses.replace(self, layout=layout)

    def __call__(self, units: Units, sparsity: Sparsity, *, within: Units = None) -> Units:
        counts = self.counts(units, sparsity).kept
        leaves, treedef = jax.tree.flatten(units)
        axes = [self._axis(path, u.ndim) for path, u in leaves_with_path(units)]
        alive = [None] * len(leaves) if within is None else jax.tree.leaves(within)
        keep = [
            _keep(u, n, a, self.m, axis)
            for u, n, a, axis in zip(leaves, counts, alive, axes, strict=True)
        ]
        return jax.tree.unflatten(treedef, keep)

    def _axis(self, path: str, rank: int) -> int:
        """The axis of a leaf along which its windows lie; -1 if it has none."""
        found = axes_of(self.layout, path, rank, self.axis)
        return found[0] if found else -1

    def counts(self, units: Units, sparsity: Sparsity) -> Counts:
        """How many units of each window of a leaf stay."""
        self._check(units)
        if isinstance(sparsity, Counts):
            return sparsity
        self.check_sparsity(sparsity)
        user = f"windows(m={self.m})"
        _, each = each_layer(units, one_each(units, sparsity, user), self.layout, user)
        return Counts(tuple(self.m - removed(s, self.m) for s in each))

    def refuses(self, pattern: Pattern) -> str | None:
        """Refuse patterns whose units have no neighbours along an axis."""
        if getattr(pattern, "neighbours", True):
            return None
        return (
            f"`windows(m={self.m})` ranks neighbours along an axis, and "
            f"`{type(pattern).__name__}` leaves no neighbours to rank. Use it with `Weights` or "
            "`Blocks`, or rank channels with `per_leaf` or `across`."
        )

    def check_sparsity(self, sparsity: Sparsity, *, exact: bool = False) -> None:
        """Refuse a sparsity short of 1 that rounds to whole windows; traced ones pass unseen.

        If ``exact``, for masks found in one shot, also one that no window of m can have.
        """
        bad = [
            f"{s:g}{f' at {path!r}' if path else ''}"
            for path, s in _numbers(sparsity)
            if s < 1.0 and removed(s, self.m) == self.m
        ]
        if bad:
            raise ValueError(
                f"`windows(m={self.m})` would keep none of {self.m} at a sparsity of "
                f"{', '.join(bad)}. Use at most {1 - 1 / self.m:g}, which keeps one, or a larger m."
            )
        if exact:
            self._check_exact(sparsity)

    def _check_exact(self, sparsity: Sparsity) -> None:
        bad = [
            f"{s:g}{f' at {path!r}' if path else ''} (there are {math.floor(s * self.m) / self.m:g}"
            f" and {math.ceil(s * self.m) / self.m:g})"
            for path, s in _numbers(sparsity)
            if abs(s * self.m - round(s * self.m)) > 1e-6
        ]
        if bad:
            raise ValueError(
                f"`windows(m={self.m})` keeps whole weights of {self.m}, so that no window has a "
                f"sparsity of {', '.join(bad)}. Choose one of the two. Schedules may pass "
                "through all numbers: there each window rounds."
            )

    def _check(self, units: Units) -> None:
        bad: list[str] = []

        def visit(path: str, u: jax.Array) -> None:
            axis = self._axis(path, u.ndim)
            if axis < 0:
                bad.append(
                    f"`windows(m={self.m}, axis={self.axis!r})` is out of range for {path!r} of "
                    f"shape {u.shape}."
                )
            elif u.shape[axis] % self.m:
                bad.append(
                    f"`windows(m={self.m})` needs axis {self.axis!r} of {path!r} to be a multiple "
                    f"of {self.m}, but its shape is {u.shape}."
                )

        check_named(self.layout, {}, (self.axis,), repr(self), single=True)
        map_with_path(visit, units)
        if bad:
            raise ValueError(" ".join(bad) + " Exclude it with `where`, or choose another `axis`.")


def _numbers(sparsity: Sparsity) -> list[tuple[str, float]]:
    """The sparsities that are known, by path; of a stack those of its layers."""
    known = [(path, s) for path, s in leaves_with_path(sparsity) if is_number(s)]
    return [(path, s) for path, given in known for s in np.ravel(given).tolist()]


@functools.partial(jax.jit, static_argnames=("m", "axis"))
def _keep(
    units: jax.Array, n: int | jax.Array, alive: jax.Array | None, m: int, axis: int
) -> jax.Array:
    """Keep the n best of every m neighbours: those that fewer than n others outrank."""
    if not units.size:
        return jnp.ones(units.shape, bool)
    codes = order_key(units, alive)
    by_rows = functools.partial(_rank_by_rows, m=m, axis=axis)
    by_tiles = functools.partial(_rank_by_tiles, m=m, axis=axis)
    if _fills_tiles(units.shape, m, axis):
        rank = lax.platform_dependent(codes, tpu=by_tiles, default=by_rows)
    else:
        rank = by_rows(codes)
    keep = rank < n
    return keep if alive is None else keep & alive


def _rank_by_rows(codes: jax.Array, *, m: int, axis: int) -> jax.Array:
    """Count how many of its window outrank each unit, one member of all windows after the other.

    Args:
      codes: order-preserving keys `[...]`; among equals the earlier one outranks the later.
      m: length of a window.
      axis: axis of the windows, from 0 on.

    Returns:
      int32 `[...]`.
    """
    rows = _split(codes, m, axis)
    place = lax.broadcasted_iota(jnp.int32, rows.shape, axis + 1)

    def outranked(j: jax.Array, rank: jax.Array) -> jax.Array:
        other = lax.dynamic_index_in_dim(rows, j, axis + 1)
        return rank + ((other > rows) | ((other == rows) & (j < place)))

    start = jnp.zeros_like(rows, jnp.int32)
    return lax.fori_loop(0, m, outranked, start, unroll=min(m, 16)).reshape(codes.shape)


def _rank_by_tiles(codes: jax.Array, *, m: int, axis: int) -> jax.Array:
    """Count the same on a TPU, whose memory has the second to last axis in tiles of eight.

    There windows of four are no rows that could be read alone: splitting the axis by four, or
    shifting it, copies the leaf, several times and in 32 bits. Splitting it by whole tiles copies
    nothing. What member j of each tile has is a reduction over the tile in which all others are
    zero, and all of them are one pass over the scores. They take as much as the codes of one leaf,
    and nothing else is stored.

    Args:
      codes: order-preserving keys `[..., n, k]`, n a multiple of whole tiles.
      m: length of a window, which divides a tile or is a multiple of it.
      axis: axis of the windows, from 0 on.

    Returns:
      int32 `[..., n, k]`.
    """
    size = max(m, TILE)
    tiles = _split(codes, size, axis)
    place = lax.broadcasted_iota(codes.dtype, tiles.shape, axis + 1)
    zero = np.zeros((), codes.dtype)
    members = [jnp.where(place == j, tiles, zero) for j in range(size)]
    found = lax.reduce(members, [zero] * size, _either, (axis + 1,))
    found = [jnp.expand_dims(x, axis + 1) for x in found]
    rank = jnp.zeros_like(tiles, jnp.int32)
    for j in range(m):
        other = found[j]
        for first in range(m, size, m):  # of the windows that share a tile
            other = jnp.where(place >= first, found[first + j], other)
        rank += (other > tiles) | ((other == tiles) & (j < place % m))
    return rank.reshape(codes.shape)


def _fills_tiles(shape: tuple[int, ...], m: int, axis: int) -> bool:
    """True where windows can be read by tiles, and no device has a part of one.

    Nobody knows here over how many devices the axis is sharded: up to 256 are fine.
    """
    fits = m <= 2 * TILE and (TILE % m == 0 or m % TILE == 0)
    return fits and axis == len(shape) - 2 and shape[axis] % (256 * max(m, TILE)) == 0


def _either(a: list[jax.Array], b: list[jax.Array]) -> list[jax.Array]:
    return [x | y for x, y in zip(a, b, strict=True)]


def _split(x: jax.Array, size: int, axis: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def windows(m: int, axis: int | str = -2) -> Windows:
    """Let each unit compete with its ``m`` neighbours along an axis only (N:M sparsity).

    Of every ``m`` consecutive units ``m - round(sparsity * m)`` stay, so that sparsity remains
    the one knob: 2:4 is ``windows(4)`` at 0.5, and a schedule walks it from 4:4 over 3:4 to 2:4.
    One-shot masks at a sparsity that is no multiple of ``1 / m`` are refused; inside of schedules,
    which pass through all numbers, each window rounds, and ``jp.summary`` shows what came out.
    Goes with ``Weights`` and, for N:M over vectors, ``Blocks``.

    Args:
      m: length of a window, at least 2.
      axis: axis of the windows; -2 is the input (contraction) axis of a flax kernel, along which
        sparse hardware multiplies. By its role, ``"in"``, it is that axis of any library's kernel;
        that takes a ``layout=`` where the scope is used. Numbers count the axes of one layer.

    Returns:
      A scope: a function of units, ``sparsity`` (a number or a tree of numbers) and ``within``.

    Raises:
      TypeError: ``m`` or ``axis`` is not an integer, nor ``axis`` a role.
      ValueError: ``m`` is below 2, or the role is unknown; when used, an axis is missing, there are
        two of its role, or it is not a multiple of ``m``, or a sparsity short of 1 would leave
        nothing of a window.

    Example:
      >>> import jax.numpy as jnp
      >>> windows(4, axis=-1)({"w": jnp.array([1.0, 4.0, 3.0, 2.0])}, 0.5)
      {'w': Array([False,  True,  True, False], dtype=bool)}

    References:
      Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch
      <https://arxiv.org/abs/2102.04010>`_, 2021.
    """
    check_role(axis, f"windows(axis={axis!r})")
    for name, value in (("m", m), *([] if isinstance(axis, str) else [("axis", axis)])):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"`windows({name}={value!r})` needs an integer, as in `windows(4, axis=-2)`."
            )
    if m < 2:
        raise ValueError(f"`windows(m={m})` leaves nobody to compete with. Use m >= 2, such as 4.")
    return Windows(m, axis)
