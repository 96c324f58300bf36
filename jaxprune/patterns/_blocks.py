"""Small rectangles of weights."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxprune._tree import map_with_path
from jaxprune.patterns._reduce import check_reduce, reduce_scores
from jaxprune.typing import Masks, Params, Scores, Units


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rectangles of weights over the last axes live or die together.

    ``Blocks((4, 4))`` tiles the last two axes. Where a block does not divide the axis, the last
    one is smaller and is scored by the weights that it has.

    Attributes:
      shape: size of a block along the last ``len(shape)`` axes.
      reduce: how a block is scored from its weights: ``"mean"``, ``"sum"`` or ``"norm"``.

    Raises:
      TypeError: ``shape`` is not a tuple of integers.
      ValueError: a size below 1, or ``reduce`` is unknown; when used, a leaf has fewer axes.

    Example:
      >>> import jax.numpy as jnp
      >>> Blocks((1, 2)).pool({"w": jnp.array([[1.0, 3.0, 5.0]])})  # the last block is ragged
      {'w': Array([[2., 5.]], dtype=float32)}
    """

    shape: tuple[int, ...]
    reduce: str = "mean"

    def __post_init__(self) -> None:
        sizes = tuple(self.shape) if isinstance(self.shape, (tuple, list)) else ()
        if not sizes or not all(isinstance(s, int) and not isinstance(s, bool) for s in sizes):
            raise TypeError(
                f"`Blocks(shape={self.shape!r})` needs a tuple of integers, one for each of the "
                "last axes, such as (4, 4)."
            )
        if min(sizes) < 1:
            raise ValueError(
                f"`Blocks(shape={self.shape!r})` has a size below 1. Use 1 for an axis that is "
                "not blocked."
            )
        check_reduce(self.reduce, "Blocks")
        object.__setattr__(self, "shape", sizes)  # a list would not be hashable

    def pool(self, scores: Scores) -> Units:
        """Score each block: leaves of shape ``[..., ceil(a / shape[0]), ceil(b / shape[1])]``."""
        self._check(scores)
        return jax.tree.map(self._pool_leaf, scores)

    def expand(self, keep: Units, *, like: Params) -> Masks:
        """Repeat each block over its weights: full masks."""
        return jax.tree.map(lambda w, k: self._expand_leaf(k, w.shape), like, keep)

    def _pool_leaf(self, scores: jax.Array) -> jax.Array:
        axes, tiled = self._tiling(scores.shape)
        pooled = reduce_scores(self.reduce, self._split(scores, tiled), axes)
        if self.reduce == "mean":  # the padding took part as zeros; divide by what is really there
            lead = (1,) * (scores.ndim - len(self.shape))
            present = jnp.ones(lead + scores.shape[len(lead) :], jnp.float32)
            present = self._split(present, lead + tiled[len(lead) :])
            pooled = pooled / reduce_scores("mean", present, axes)
        return jnp.squeeze(pooled, axis=axes)

    def _expand_leaf(self, keep: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        axes, tiled = self._tiling(shape)
        full = jnp.broadcast_to(jnp.expand_dims(keep, axes), tiled)
        padded = [n * b for n, b in zip(keep.shape[-len(self.shape) :], self.shape, strict=True)]
        full = full.reshape(*shape[: -len(self.shape)], *padded)
        return full[(..., *(slice(n) for n in shape[-len(self.shape) :]))]

    def _tiling(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes inside a block, and the shape with every blocked axis split into (blocks, size)."""
        lead = len(shape) - len(self.shape)
        tiled = list(shape[:lead])
        for size, block in zip(shape[lead:], self.shape, strict=True):
            tiled += [-(-size // block), block]
        return tuple(range(lead + 1, len(tiled), 2)), tuple(tiled)

    def _split(self, x: jax.Array, tiled: tuple[int, ...]) -> jax.Array:
        """Pad the last axes with zeros to whole blocks and split them."""
        rank = len(self.shape)
        short = [-n % b for n, b in zip(x.shape[-rank:], self.shape, strict=True)]
        x = jnp.pad(x, [(0, 0)] * (x.ndim - rank) + [(0, n) for n in short])
        return x.reshape(tiled)

    def _check(self, scores: Scores) -> None:
        bad: list[str] = []

        def visit(path: str, s: jax.Array) -> None:
            if s.ndim < len(self.shape):
                bad.append(f"{path!r} of shape {s.shape}")

        map_with_path(visit, scores)
        if bad:
            raise ValueError(
                f"`Blocks({self.shape})` needs at least {len(self.shape)} axes, but has "
                f"{', '.join(bad)}. Choose a shorter `shape`, or exclude them with `where`."
            )
