"""Coupled groups compete with those that are built alike."""

import dataclasses
from typing import Any

import jax

from jaxprune._numbers import is_tree
from jaxprune._ranking import keep_largest
from jaxprune._tree import list_paths
from jaxprune.scopes._count import Counts, kept
from jaxprune.typing import Pattern, Sparsity, Units


@dataclasses.dataclass(frozen=True)
class Isomorphic:
    """The scope that ``isomorphic`` makes: pairs of a group and its class."""

    classes: tuple[tuple[str, str], ...]

    def __call__(self, units: Units, sparsity: Sparsity, *, within: Units = None) -> Units:
        counts = self.counts(units, sparsity).kept
        return keep_largest(units, counts, self._rankings(units), within)

    def refuses(self, pattern: Pattern) -> str | None:
        """Say why groups that layers choose for themselves cannot be ranked, else None."""
        names = getattr(pattern, "per_layer", ())
        if not names:
            return None
        return (
            "`isomorphic` lets groups of one kind compete, so that they would keep more and fewer "
            f"units, but each layer of {list_paths(list(names), 6)} chooses for itself, and all "
            "layers of a stack have one width. Use `scope=jp.scopes.per_leaf`, pass no layout, or "
            "unstack the layers into leaves of their own."
        )

    def counts(self, units: Units, sparsity: Sparsity) -> Counts:
        """How many units of each class stay."""
        if isinstance(sparsity, Counts):
            return sparsity
        if is_tree(sparsity):
            raise ValueError(
                "`isomorphic` takes one sparsity for all classes, but got a tree of "
                f"{len(jax.tree.leaves(sparsity))}. Pass a number."
            )
        rankings, names = self._rankings(units), sorted(units)
        sizes = [sum(units[names[i]].size for i in ranking) for ranking in rankings]
        return kept(sizes, [sparsity] * len(sizes))

    def _rankings(self, units: Units) -> tuple[tuple[int, ...], ...]:
        """Which groups, numbered in the order of their names, are of one class."""
        class_of = dict(self.classes)
        names = sorted(units) if isinstance(units, dict) else []
        unknown = [name for name in names if name not in class_of]
        if not names or unknown:
            raise ValueError(
                f"`isomorphic` ranks coupled groups, but got units of {list_paths(unknown)} that "
                "its groups do not name. Use it with `pattern=jp.patterns.Coupled(groups)` and the "
                "same groups."
            )
        classes = dict.fromkeys(class_of[name] for name in names)
        return tuple(
            tuple(i for i, name in enumerate(names) if class_of[name] == c) for c in classes
        )


def isomorphic(groups: Any) -> Isomorphic:
    """Let coupled groups compete with groups of the same kind of members only.

    Attention heads compete with heads and hidden units with hidden units of all layers, never one
    with the other, so that scores of different scales are not compared. Between ``per_leaf``,
    where each group keeps its share, and ``across``, where all compete.

    Args:
      groups: groups, as ``find_groups`` gives them. Two are alike if the same axes of the same
        paths belong to them, numbers in paths left out of account.

    Returns:
      A scope for ``Coupled(groups)``. Exactly ``round(sparsity * n)`` of the ``n`` units of each
      class go, less what groups need to keep one.

    Raises:
      ValueError: when used, units of other groups, or a tree of sparsities.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jaxprune as jp
      >>> net = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["w0"]) @ p["w1"]) @ p["out"]
      >>> params = {"w0": jnp.ones((1, 2)), "w1": 5 * jnp.ones((2, 2)), "out": jnp.ones((2, 1))}
      >>> groups = jp.find_groups(net, params, jnp.ones((1, 1)))
      >>> isomorphic(groups).classes
      (('w0:1', 'w0:1'), ('w1:1', 'w1:1'))

    References:
      Fang et al., `Isomorphic Pruning for Vision Models <https://arxiv.org/abs/2407.04616>`_, 2024.
    """
    return Isomorphic(tuple(groups.isomorphic().items()))
