"""Units compete inside of their own output: each output keeps its own best inputs."""

import math

from jaxprune._axes import describe, ways_out
from jaxprune._layout import Layout
from jaxprune._ranking import keep_largest, named_leaves, shape_of_counts
from jaxprune._tree import leaves_with_path, prunable
from jaxprune.scopes._count import (
    Counts,
    counted_by,
    each_layer,
    kept,
    leaves_of,
    one_each,
    over,
    read_kept,
)
from jaxprune.typing import Params, Pattern, Sparsity, Units, Where


def _apart(units: Units, layout: Layout | None = None) -> list[tuple[int, ...]]:
    """For each leaf the axes that tell outputs apart: all that are no input and no window's."""
    return [_outputs(layout, slot.path, slot.leaf.ndim) for slot in named_leaves(units)]


def _outputs(layout: Layout | None, path: str, rank: int) -> tuple[int, ...]:
    if layout is None:
        return (rank - 1,) if rank else ()
    return tuple(i for i, r in enumerate(layout.roles(path, rank)) if r not in ("in", "window"))


def _shapes(units: Units, layout: Layout | None) -> list[tuple[tuple[int, ...], int]]:
    """For each leaf the shape of its counts, and how many units an output has."""
    leaves = leaves_of(units)
    apart = _apart(units, layout)
    shapes = [shape_of_counts(x.shape, axes) for x, axes in zip(leaves, apart, strict=True)]
    sizes = [x.size // max(math.prod(s), 1) for x, s in zip(leaves, shapes, strict=True)]
    return list(zip(shapes, sizes, strict=True))


def _counts(units: Units, sparsity: Sparsity, *, layout: Layout | None = None) -> Counts:
    """How many units of each output stay."""
    if isinstance(sparsity, Counts):
        return sparsity
    shapes = _shapes(units, layout)
    _, numbers = each_layer(units, one_each(units, sparsity, "per_output"), layout, "per_output")
    counts = kept([n for _, n in shapes], numbers).kept
    return Counts(tuple(over(n, shape) for n, (shape, _) in zip(counts, shapes, strict=True)))


def _lazily(
    units: Units, sparsity: Sparsity, *, within: Units = None, layout: Layout | None = None
) -> Units:
    """What stays; where units are lazy, so is that, and may have what is gone already."""
    kept = _counts(units, sparsity, layout=layout).kept
    return keep_largest(units, kept, tuple((i,) for i in range(len(kept))), within)


def _refuses(pattern: Pattern) -> str | None:
    """Refuse patterns that leave an output nothing to choose from."""
    if getattr(pattern, "neighbours", True):
        return None
    return (
        f"`per_output` lets the inputs of each output compete, and `{type(pattern).__name__}` "
        "leaves no inputs to rank. Use it with `Weights` or `Blocks`, or rank channels with "
        "`per_leaf` or `across`."
    )


def _fits(params: Params, where: Where, layout: Layout | None) -> None:
    """Refuse leaves of which nobody knows what is an output."""
    bad, first = [], ""
    for path, leaf in leaves_with_path(prunable(params, where=where)):
        shape = tuple(leaf.shape)
        if layout is None and len(shape) < 2:
            bad.append(f"{path!r} of shape {shape}, which has no inputs")
        elif layout is not None:
            roles = layout.roles(path, len(shape))
            if "out" not in roles or None in roles:
                name = "in" if "out" in roles else "out"
                bad.append(describe(layout, path, shape, name))
                first = first or ways_out(layout, path, len(shape), name)
    if bad:
        raise ValueError(
            f"`per_output` has to know what inputs and outputs are, and cannot tell for "
            f"{'; '.join(bad[:6])}. {first or 'Leave them out with `where=jp.exclude(...)`.'}"
        )


@counted_by(_counts, _lazily, refuses=_refuses, fits=_fits, apart=_apart)
def per_output(
    units: Units, sparsity: Sparsity, *, within: Units = None, layout: Layout | None = None
) -> Units:
    """Remove the same fraction of the inputs of every output, the lowest first.

    The comparison group of Wanda: an output is never left without inputs while another keeps all
    of its own. With ``Blocks`` every column of blocks loses as many of them, which is what
    block-sparse products need.

    Args:
      units: scores of the units; any shapes, None where not prunable.
      sparsity: fraction to remove from each output: a number, or a tree of numbers like ``units``.
        Exactly ``round(sparsity * n)`` of ``n`` units go, the later ones first among equals.
      within: bool tree like ``units``; units outside of it are gone already and count as removed.
      layout: what the outputs are. The units at one index of all axes but ``"in"`` and
        ``"window"`` compete, so that outputs, layers and groups are told apart. Without it all
        axes but the last are inputs, as in a kernel of flax.

    Returns:
      A bool tree like ``units``, True for what stays.

    Raises:
      ValueError: a tree of sparsities does not mirror ``units``, or, through ``find_masks`` and
        the like, the layout does not know the outputs of a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> per_output({"kernel": jnp.array([[1.0, 9.0], [2.0, 8.0]])}, 0.5)["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2024.
    """
    return read_kept(_lazily(units, sparsity, within=within, layout=layout), within)
