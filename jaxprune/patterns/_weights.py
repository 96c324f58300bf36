"""Every weight is on its own."""

import dataclasses

import jax

from jaxprune.typing import Masks, Params, Scores, Units, elementwise


@dataclasses.dataclass(frozen=True)
class Weights:
    """Each single weight lives or dies on its own (unstructured pruning).

    Example:
      >>> import jax.numpy as jnp
      >>> Weights().pool({"w": jnp.array([1.0, 2.0])})
      {'w': Array([1., 2.], dtype=float32)}
    """

    @elementwise
    def pool(self, scores: Scores) -> Units:
        """Return the scores: a unit is a weight."""
        return scores

    @elementwise
    def expand(self, keep: Units, *, like: Params) -> Masks:
        """Return ``keep``: a weight is a unit."""
        return jax.tree.map(lambda _, k: k, like, keep)
