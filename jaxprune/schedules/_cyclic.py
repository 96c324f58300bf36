"""Dense and sparse phases in turn."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxprune._errors import check_sparsity
from jaxprune.schedules._schedule import as_step, check_range, spell
from jaxprune.typing import Sparsity


@dataclasses.dataclass(frozen=True)
class Cyclic:
    """The schedule that ``cyclic`` makes."""

    final: Sparsity
    dense: int
    sparse: int
    begin: int
    end: int

    def __repr__(self) -> str:
        return spell("cyclic", dataclasses.asdict(self))

    def __call__(self, step: ArrayLike) -> Sparsity:
        """Give the sparsity at ``step``: ``final`` in sparse phases, else 0."""
        step = jnp.asarray(step)
        in_sparse = (step - self.begin) % (self.sparse + self.dense) < self.sparse
        on = (step >= self.end) | ((step >= self.begin) & in_sparse)
        return jax.tree.map(lambda s: jnp.where(on, s, 0.0), self.final)

    def due(self, step: ArrayLike) -> jax.Array:
        """Say whether a phase starts at ``step``."""
        step = jnp.asarray(step)
        into = (step - self.begin) % (self.sparse + self.dense)
        starts = (into == 0) | (into == self.sparse)
        return (step == self.end) | ((step >= self.begin) & (step < self.end) & starts)


def cyclic(final: Sparsity, dense: int, sparse: int, begin: int, end: int) -> Cyclic:
    """Alternate between dense and sparse training, and end sparse (AC/DC).

    Dense up to ``begin``, then a sparse phase, a dense phase and so on; sparse for good from
    ``end``. At the start of a sparse phase masks are found among all weights, at the start of a
    dense phase all weights are free again: removed ones start from zero, with what is left of
    their moments in the inner optimizer, which decayed meanwhile.

    Args:
      final: sparsity of the sparse phases: a number in [0, 1] or a tree of numbers.
      dense: steps of a dense phase.
      sparse: steps of a sparse phase.
      begin: step at which the first sparse phase starts.
      end: step from which on the network stays sparse; whatever phase it falls into is cut short.

    Returns:
      A schedule.

    Raises:
      ValueError: a sparsity is outside [0, 1], ``end`` is before ``begin``, a step is no integer
        from 0 on, or a phase has no steps.

    Example:
      >>> schedule = cyclic(0.9, dense=2, sparse=1, begin=1, end=7)
      >>> [round(float(schedule(step)), 1) for step in range(9)]
      [0.0, 0.9, 0.0, 0.0, 0.9, 0.0, 0.0, 0.9, 0.9]
      >>> [step for step in range(9) if schedule.due(step)]
      [1, 2, 4, 5, 7]

    References:
      Peste et al., `AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural Networks
      <https://arxiv.org/abs/2106.12379>`_, 2021. There momentum is set to zero when a dense phase
      starts.
    """
    check_sparsity(final, "cyclic")
    dense, sparse = as_step("dense", dense), as_step("sparse", sparse)
    begin, end = as_step("begin", begin), as_step("end", end)
    for name, steps in (("dense", dense), ("sparse", sparse)):
        if steps < 1:
            raise ValueError(f"`cyclic({name}={steps})` has an empty phase. Use 1 step or more.")
    check_range(begin, end)
    return Cyclic(final, dense, sparse, begin, end)
