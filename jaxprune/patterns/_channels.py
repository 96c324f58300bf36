"""Whole channels along one axis."""

import dataclasses
from typing import ClassVar

import jax

from jaxprune._tree import map_with_path
from jaxprune.patterns._reduce import check_reduce, reduce_scores
from jaxprune.typing import Masks, Params, Scores, Units


@dataclasses.dataclass(frozen=True)
class Channels:
    """All weights that share one index along ``axis`` live or die together.

    A mask has the size of the leaf along ``axis`` and 1 everywhere else: ``[1, 300]`` for the
    output channels of a ``[784, 300]`` kernel.

    Attributes:
      axis: axis of the channels; negative counts from the end.
      reduce: how a channel is scored from its weights: ``"mean"``, ``"sum"`` or ``"norm"``.

    Raises:
      TypeError: ``axis`` is not an integer.
      ValueError: ``reduce`` is unknown; when used, a leaf has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> Channels(-1).pool({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
      {'w': Array([[2., 3.]], dtype=float32)}
    """

    axis: int = -1
    reduce: str = "mean"
    neighbours: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise TypeError(
                f"`Channels(axis={self.axis!r})` needs an integer axis, such as -1 for the output "
                "channels of a flax kernel."
            )
        check_reduce(self.reduce, "Channels")

    def pool(self, scores: Scores) -> Units:
        """Score each channel: leaves of shape ``[1, ..., channels, ..., 1]``."""
        self._check(scores)
        return jax.tree.map(
            lambda s: reduce_scores(
                self.reduce, s, tuple(i for i in range(s.ndim) if i != self.axis % s.ndim)
            ),
            scores,
        )

    def expand(self, keep: Units, *, like: Params) -> Masks:
        """Return ``keep``: it broadcasts over the weights already."""
        return jax.tree.map(lambda _, k: k, like, keep)

    def _check(self, scores: Scores) -> None:
        bad: list[str] = []

        def visit(path: str, s: jax.Array) -> None:
            if not -s.ndim <= self.axis < s.ndim:
                bad.append(f"{path!r} of shape {s.shape}")

        map_with_path(visit, scores)
        if bad:
            raise ValueError(
                f"`Channels(axis={self.axis})` is out of range for {', '.join(bad)}. Choose "
                "another `axis`, or exclude what does not have it with `where`."
            )
