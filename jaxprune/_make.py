"""Masks from scores that are ready."""

from jaxprune._errors import check_sparsity
from jaxprune._find import select
from jaxprune._help import readable
from jaxprune._layout import Layout
from jaxprune._numbers import plain
from jaxprune._parts import Parts
from jaxprune._score import check_floating
from jaxprune._where import everything
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Masks, Pattern, Scope, Scores, Sparsity


@readable
def make_masks(
    scores: Scores,
    sparsity: Sparsity,
    *,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    within: Masks | None = None,
    layout: Layout | None = None,
) -> Masks:
    """Make masks from ready scores: pool them into units, rank, expand again.

    Args:
      scores: floating scores, higher = keep; None where a leaf is not prunable.
      sparsity: fraction of units to remove: a number or a tree of numbers.
      pattern: what is removed together.
      scope: who competes with whom.
      within: earlier masks; a weight that they remove stays removed.
      layout: what each axis means, as for ``find_masks``.

    Returns:
      Masks like ``scores``.

    Raises:
      ValueError: the sparsity is outside [0, 1], a pattern or scope does not fit a leaf or the
        two do not fit one another, or ``within`` or the layout does not mirror ``scores``.
      TypeError: scores are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> make_masks({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.25)
      {'w': Array([ True, False,  True,  True], dtype=bool)}
    """
    parts = Parts("make_masks", magnitude, pattern, scope, everything, layout)
    check_sparsity(sparsity)
    check_floating(scores)
    parts.check(sparsity, exact=True)
    parts = parts.bind(scores)
    amount = parts.of_units(plain(sparsity), scores)
    return select(parts, scores, amount, within, like=scores)
