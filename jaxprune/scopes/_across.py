"""Units compete across the whole tree."""

from typing import Any

import jax

from jaxprune._layout import Layout
from jaxprune._numbers import is_tree
from jaxprune._ranking import AxisName, keep_largest, shards
from jaxprune._tree import list_paths
from jaxprune.scopes._count import Counts, counted_by, in_order, kept, leaves_of, read_kept
from jaxprune.typing import Pattern, Sparsity, Units


def _counts(
    units: Units,
    sparsity: Sparsity,
    *,
    axis_name: AxisName | None = None,
    specs: Any = None,
    layout: Layout | None = None,
) -> Counts:
    """How many units of the whole tree stay."""
    del layout  # layers are ranked together, as leaves are
    if isinstance(sparsity, Counts):
        return sparsity
    if is_tree(sparsity):
        raise ValueError(
            "`across` ranks all leaves together and takes one sparsity, but got a tree of "
            f"{len(jax.tree.leaves(sparsity))} of them. Pass a number, or rank with "
            "`scope=jp.scopes.per_leaf`."
        )
    parts = shards(units, axis_name, specs, user="across")
    n = sum(part.whole(leaf) for part, leaf in zip(parts, leaves_of(units), strict=True))
    return kept([n], [sparsity])


def _lazily(
    units: Units,
    sparsity: Sparsity,
    *,
    within: Units = None,
    layout: Layout | None = None,
    **mesh: Any,
) -> Units:
    """What stays; where units are lazy, so is that, and may have what is gone already."""
    parts = in_order(shards(units, **mesh, user="across"), units, layout)
    kept = _counts(units, sparsity, **mesh).kept
    return keep_largest(units, kept, (tuple(range(len(parts))),), within, parts)


def _refuses(pattern: Pattern) -> str | None:
    """Refuse units of which every layer of a stack has to keep as many."""
    names = getattr(pattern, "per_layer", ())
    if not names:
        return None
    return (
        f"`across` would keep more units in one layer of a stack than in another, and the layers "
        f"of {list_paths(list(names), 4)} have one width. Rank with `scope=jp.scopes.per_leaf`, or "
        "unstack the layers into leaves of their own."
    )


@counted_by(_counts, _lazily, refuses=_refuses)
def across(
    units: Units,
    sparsity: Sparsity,
    *,
    within: Units = None,
    axis_name: AxisName | None = None,
    specs: Any = None,
    layout: Layout | None = None,
) -> Units:
    """Remove a fraction of the units of the whole tree, the lowest first (global pruning).

    Scores of different leaves are compared as they are. Nothing is gathered: over sharded leaves
    the ranking costs some dozens of all-reduces of a few bytes. A leaf may lose all of its units;
    ``summary`` warns of it.

    Under ``jit`` a sharded array is one array, and is ranked whole. Inside of ``shard_map`` (and
    ``pmap``) a function sees a part only: by itself this ranks the units of that part, and each
    device keeps its own share. Bind ``axis_name`` to rank the whole over the devices of that axis:

        scope = functools.partial(jp.scopes.across, axis_name="model", specs=param_specs)

    Args:
      units: scores of the units; any shapes, None where not prunable.
      sparsity: fraction to remove of all units: one number. Exactly ``round(sparsity * n)`` of
        ``n`` units go; among equals the later leaf, then the later position goes first.
      within: bool tree like ``units``; units outside of it are gone already and count as removed.
      axis_name: mesh axes to rank over, inside of ``shard_map``: counts are summed over them.
      specs: how the leaves are sharded over those axes: a ``PartitionSpec`` for all, or a tree of
        them like the params, as in ``in_specs``. Then masks are bit for bit those of the whole
        tree. Left out, a leaf counts as sharded if it varies over the axis (``check_vma=True``) or
        always (``check_vma=False``), and among equals the shards of the first device stay.
      layout: with it, each layer of a stack counts as a leaf: among equals the earlier layer
        stays, wherever the axis of layers is.

    Returns:
      A bool tree like ``units``, True for what stays.

    Raises:
      ValueError: ``sparsity`` is a tree, ``axis_name`` names no axis, or ``specs`` do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> across({"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}, 0.25)
      {'a': Array([False,  True], dtype=bool), 'b': Array([ True,  True], dtype=bool)}
    """
    mesh = {"axis_name": axis_name, "specs": specs}
    keep = _lazily(units, sparsity, within=within, layout=layout, **mesh)
    return read_kept(keep, within)
