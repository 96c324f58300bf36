"""What a schedule is: how much to remove, and when to look again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune._errors import check_sparsity, short, whole
from jaxprune.typing import Sparsity


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
      call: name and settings of the call that made it, to be shown.
    """

    value: Callable[[ArrayLike], Any]
    begin: int
    end: int
    every: int = 1
    final: Sparsity = None
    call: tuple[str, dict[str, Any]] | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("begin", "end", "every"):
            object.__setattr__(self, name, as_step(name, getattr(self, name)))
        if self.every < 1:
            raise ValueError(f"A schedule got every={self.every}. Use 1 to prune at each step.")
        check_range(self.begin, self.end)
        check_sparsity(self.final, "schedule")

    def __repr__(self) -> str:
        names = ("value", "begin", "end", "every")
        return spell(*self.call or ("Schedule", {name: getattr(self, name) for name in names}))

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


def as_step(name: str, step: Any) -> int:
    """Give a count of updates as an integer of Python, or refuse what is none."""
    number = whole(step)
    if number is None or number < 0:
        raise ValueError(
            f"A schedule got {name}={step!r}. Steps are integers from 0 on; pass the number of "
            "the update."
        )
    return number


def spell(name: str, settings: dict[str, Any]) -> str:
    """Write a schedule as the call that made it."""
    first, *rest = settings
    named = getattr(settings[first], "__name__", None) or short(settings[first])
    words = [named, *(f"{name}={settings[name]!r}" for name in rest)]
    return f"{name}({', '.join(words)})"


def check_range(begin: int, end: int) -> None:
    """Refuse a range that runs backwards."""
    if end < begin:
        raise ValueError(
            f"A schedule got end={end} before begin={begin}. The last event cannot come before "
            "the first; swap them."
        )


def ramp(
    name: str,
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
    begin, end, every = as_step("begin", begin), as_step("end", end), as_step("every", every)
    settings = {"final": final, "begin": begin, "end": end, "every": every}
    if isinstance(initial, jax.core.Tracer) or initial:
        settings["initial"] = initial

    def value(step: ArrayLike) -> Any:
        time = jnp.clip((jnp.asarray(step) - begin) / max(end - begin, 1), 0.0, 1.0)
        time = jnp.where(jnp.asarray(step) >= end, 1.0, time)
        left = jnp.where(jnp.asarray(step) < begin, 1.0, shape(time))
        start = jnp.where(jnp.asarray(step) < begin, 0.0, initial)
        # At the end nothing is left to go: exactly `final`, not one rounding beside it.
        return jax.tree.map(lambda s: jnp.where(left == 0.0, s, s + (start - s) * left), final)

    return Schedule(value, begin, end, every, final, (name, settings))
