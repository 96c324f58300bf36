"""What a schedule is: how much to remove, and when to look again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune._errors import check_sparsity
from jaxprune._types import Sparsity


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Sparsity as a function of the step, with the steps at which masks are re-found.

    Events fall on ``begin``, then every ``every`` steps, and always on ``end``, whether or not
    the period divides the range. Steps count from 0.

    Attributes:
      value: from step to sparsity.
      begin: step of the first event.
      end: step of the last event.
      every: steps between events.
      final: sparsity from ``end`` on as the number that was asked for; None where not known.
    """

    value: Callable[[ArrayLike], Any]
    begin: int
    end: int
    every: int = 1
    final: Sparsity = None

    def __post_init__(self) -> None:
        for name in ("begin", "end", "every"):
            check_step(name, getattr(self, name))
        if self.every < 1:
            raise ValueError(f"A schedule got every={self.every}. Use 1 to prune at each step.")
        check_range(self.begin, self.end)
        check_sparsity(self.final, "schedule")

    def __call__(self, step: ArrayLike) -> Any:
        """Give the sparsity at ``step``: a float array, or a tree of them."""
        return self.value(step)

    def due(self, step: ArrayLike) -> jax.Array:
        """Say whether masks are re-found at ``step``."""
        step = jnp.asarray(step)
        on_beat = (step - self.begin) % self.every == 0
        return (step >= self.begin) & (step <= self.end) & (on_beat | (step == self.end))

    def before(self, step: ArrayLike) -> jax.Array:
        """Give the step of the last event before one at ``step``."""
        past_beat = (jnp.asarray(step) - self.begin) % self.every
        return jnp.asarray(step) - jnp.where(past_beat == 0, self.every, past_beat)


def check_step(name: str, step: Any) -> None:
    """Refuse what cannot count updates."""
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(
            f"A schedule got {name}={step!r}. Steps are integers from 0 on; pass the number of "
            "the update."
        )


def check_range(begin: int, end: int) -> None:
    """Refuse a range that runs backwards."""
    if end < begin:
        raise ValueError(
            f"A schedule got end={end} before begin={begin}. The last event cannot come before "
            "the first; swap them."
        )


def ramp(
    shape: Callable[[jax.Array], jax.Array],
    *,
    final: Sparsity,
    initial: float,
    begin: int,
    end: int,
    every: int,
) -> Schedule:
    """Go from ``initial`` to ``final``; ``shape`` maps time in [0, 1] to what is left to go."""
    check_sparsity(initial, "initial")

    def value(step: ArrayLike) -> Any:
        time = jnp.clip((jnp.asarray(step) - begin) / max(end - begin, 1), 0.0, 1.0)
        time = jnp.where(jnp.asarray(step) >= end, 1.0, time)
        left = jnp.where(jnp.asarray(step) < begin, 1.0, shape(time))
        start = jnp.where(jnp.asarray(step) < begin, 0.0, initial)
        # At the end nothing is left to go: exactly `final`, not one rounding beside it.
        return jax.tree.map(lambda s: jnp.where(left == 0.0, s, s + (start - s) * left), final)

    return Schedule(value, begin, end, every, final)
