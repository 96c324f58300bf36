"""Whole channels along one axis."""

import dataclasses
from typing import ClassVar

import jax

from jaxprune._axes import axes_of, check_named, check_role
from jaxprune._layout import Layout
from jaxprune._tree import leaves_with_path, map_with_path, prunable
from jaxprune.patterns._reduce import check_reduce, reduce_scores
from jaxprune.typing import Masks, Params, Scores, Units, Where


@dataclasses.dataclass(frozen=True)
class Channels:
    """All weights that share one index along ``axis`` live or die together.

    A mask has the size of the leaf along ``axis`` and 1 everywhere else: ``[1, 300]`` for the
    output channels of a ``[784, 300]`` kernel. With a layout each layer of a stack has channels of
    its own, ``[8, 1, 300]``, and numbers count the axes of one layer.

    Attributes:
      axis: axis of the channels; negative counts from the end. Or its role, ``"out"`` or ``"in"``,
        which takes a ``layout=`` where the pattern is used: where several axes have it, a channel
        is one index over all of them, and each group (an expert, say) has channels of its own.
      reduce: how a channel is scored from its weights: ``"mean"``, ``"sum"`` or ``"norm"``.
      layout: what each axis means; filled in by whoever uses the pattern.

    Raises:
      TypeError: ``axis`` is neither an integer nor a role.
      ValueError: ``reduce`` or the role is unknown; when used, a leaf has no such axis.

    Example:
      >>> import jax.numpy as jnp
      >>> Channels(-1).pool({"w": jnp.array([[1.0, 2.0], [3.0, 4.0]])})
      {'w': Array([[2., 3.]], dtype=float32)}
    """

    axis: int | str = -1
    reduce: str = "mean"
    layout: Layout | None = dataclasses.field(default=None, repr=False)
    neighbours: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_role(self.axis, f"Channels(axis={self.axis!r})")
        if not isinstance(self.axis, int | str) or isinstance(self.axis, bool):
            raise TypeError(
                f"`Channels(axis={self.axis!r})` needs an integer axis, such as -1 for the output "
                "channels of a flax kernel."
            )
        check_reduce(self.reduce, "Channels")

    def bind(self, params: Params, *, where: Where, layout: Layout | None = None) -> "Channels":
        """Settle it on params: which axes of each leaf tell channels apart."""
        part = leaves_with_path(prunable(params, where=where))
        shapes = {path: leaf.shape for path, leaf in part}
        check_named(layout, shapes, (self.axis,), repr(self), single=False)
        return self if layout == self.layout else dataclasses.replace(self, layout=layout)

    def pool(self, scores: Scores) -> Units:
        """Score each channel: leaves of shape ``[1, ..., channels, ..., 1]``."""
        self._check(scores)

        def pool(path: str, s: jax.Array) -> jax.Array:
            apart = self._apart(path, s.ndim)
            return reduce_scores(self.reduce, s, tuple(i for i in range(s.ndim) if i not in apart))

        return map_with_path(pool, scores)

    def expand(self, keep: Units, *, like: Params) -> Masks:
        """Return ``keep``: it broadcasts over the weights already."""
        return jax.tree.map(lambda _, k: k, like, keep)

    def _apart(self, path: str, rank: int) -> tuple[int, ...]:
        """The axes of a leaf that tell its channels apart; none if it has no such channels."""
        channels = axes_of(self.layout, path, rank, self.axis)
        if self.layout is None or not channels:
            return channels
        groups = axes_of(self.layout, path, rank, "group") if isinstance(self.axis, str) else ()
        return (*self.layout.layers(path, rank), *groups, *channels)

    def _check(self, scores: Scores) -> None:
        check_named(self.layout, {}, (self.axis,), repr(self), single=False)
        bad: list[str] = []

        def visit(path: str, s: jax.Array) -> None:
            if not self._apart(path, s.ndim):
                bad.append(f"{path!r} of shape {s.shape}")

        map_with_path(visit, scores)
        if bad:
            raise ValueError(
                f"`Channels(axis={self.axis!r})` is out of range for {', '.join(bad)}. Choose "
                "another `axis`, or exclude what does not have it with `where`."
            )
