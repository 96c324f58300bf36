"""Units compete inside their own leaf."""

from typing import Any

from jaxprune._layout import Layout
from jaxprune._ranking import AxisName, keep_largest, named_leaves, shards
from jaxprune.scopes._count import (
    Counts,
    counted_by,
    kept_in_layers,
    leaves_of,
    one_each,
    read_kept,
)
from jaxprune.typing import Sparsity, Units


def _counts(
    units: Units,
    sparsity: Sparsity,
    *,
    axis_name: AxisName | None = None,
    specs: Any = None,
    layout: Layout | None = None,
) -> Counts:
    """How many units of each leaf stay, or of each layer of a stack."""
    if isinstance(sparsity, Counts):
        return sparsity
    parts = shards(units, axis_name, specs, user="per_leaf")
    sizes = [part.whole(leaf) for part, leaf in zip(parts, leaves_of(units), strict=True)]
    each = one_each(units, sparsity, "per_leaf")
    return kept_in_layers(units, sizes, each, layout, "per_leaf")


def _lazily(
    units: Units,
    sparsity: Sparsity,
    *,
    within: Units = None,
    layout: Layout | None = None,
    **mesh: Any,
) -> Units:
    """What stays; where units are lazy, so is that, and may have what is gone already."""
    parts = shards(units, **mesh, user="per_leaf")
    kept = _counts(units, sparsity, layout=layout, **mesh).kept
    return keep_largest(units, kept, tuple((i,) for i in range(len(parts))), within, parts)


def _apart(units: Units, layout: Layout | None = None) -> list[tuple[int, ...]]:
    """For each leaf the axes that count layers."""
    return [layout.layers(s.path, s.leaf.ndim) if layout else () for s in named_leaves(units)]


@counted_by(_counts, _lazily, apart=_apart)
def per_leaf(
    units: Units,
    sparsity: Sparsity,
    *,
    within: Units = None,
    axis_name: AxisName | None = None,
    specs: Any = None,
    layout: Layout | None = None,
) -> Units:
    """Remove the same fraction of the units of every leaf, the lowest first.

    Inside of ``shard_map`` a leaf is the shard that a device holds, unless ``axis_name`` says over
    which devices to rank it; see ``across``.

    Args:
      units: scores of the units; any shapes, None where not prunable.
      sparsity: fraction to remove from each leaf: a number, or a tree of numbers like ``units``.
        Exactly ``round(sparsity * n)`` of ``n`` units go, the later ones first among equals.
      within: bool tree like ``units``; units outside of it are gone already and count as removed.
      axis_name: mesh axes to rank over, inside of ``shard_map``.
      specs: how the leaves are sharded over those axes, as for ``across``.
      layout: with it, each layer of a stack is ranked by itself and loses its own fraction: the
        number of its leaf, or one of an array `[layers]`.

    Returns:
      A bool tree like ``units``, True for what stays.

    Raises:
      ValueError: a tree of sparsities does not mirror ``units`` or its layers, ``axis_name`` names
        no axis, or ``specs`` do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> per_leaf({"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}, 0.5)
      {'a': Array([False,  True], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """
    mesh = {"axis_name": axis_name, "specs": specs}
    keep = _lazily(units, sparsity, within=within, layout=layout, **mesh)
    return read_kept(keep, within)
