"""Layers of a stack as leaves of their own, for parts that know nothing of layouts, and back."""

# What holds of stacks is defined by a tree in which each stacked leaf is replaced, in its place, by
# the list of its layers:
#
#     {"up": f32[3,8,8], "head": f32[8,4]}    {"up": [f32[8,8], f32[8,8], f32[8,8]], "head": ...}
#
# Parts of ours get the same result from the stack itself. A part of somebody else's, who has never
# heard of layouts, is shown the list: more leaves to compile, but nothing to know.

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._layout import Layout
from jaxprune._tree import (
    align,
    check_regexes_match,
    is_hole,
    leaves_by_path,
    leaves_with_path,
    map_with_path,
    slots,
)
from jaxprune._use import Entry
from jaxprune._where import matches
from jaxprune.typing import Params, Tree


def apart(tree: Tree, layout: Layout) -> Tree:
    """Replace each stacked leaf by the list of its layers.

    Args:
      tree: params, scores or units; leaves `[..., layers, ...]`.
      layout: settled on them.

    Returns:
      A tree with lists of `[...]`; along several axes of layers the last one runs fastest. A stack
      of no layers stays as it is.
    """
    return map_with_path(lambda path, x: _layers(x, _axes(layout, path, x)), tree)


def apart_layout(layout: Layout, like: Params) -> Layout:
    """The layout of what ``apart`` makes of a tree."""
    seen = iter(leaves_with_path(apart(like, layout)))
    entries: list[Entry] = []
    for path, leaf in leaves_with_path(like):
        axes, shape = _axes(layout, path, leaf), tuple(leaf.shape)
        own = [i for i in range(len(shape)) if i not in axes]
        uses = tuple(
            dataclasses.replace(
                use,
                axes=tuple(use.axes[i] for i in own),
                why=tuple(use.why[i] for i in own),
            )
            for use in layout.uses(path, len(shape))
        )
        for _ in range(math.prod(shape[i] for i in axes)):
            name, layer = next(seen)
            entries += [Entry(name, uses, tuple(layer.shape))] if uses else []
    return Layout(tuple(entries))


def _axes(layout: Layout, path: str, leaf: Any) -> tuple[int, ...]:
    """The axes of a leaf that count layers, if there are any layers."""
    axes = layout.layers(path, len(leaf.shape))
    return axes if all(leaf.shape[i] for i in axes) else ()


def beside(tree: Tree, like: Params, layout: Layout) -> Tree:
    """Do the same to what lies beside params, if it mirrors them; all else stays as it is.

    A number for a leaf is one for each layer. An array as long as there are layers has one each.
    """
    mirror = align(tree, like)
    if mirror is None:
        return tree
    alone = jax.tree_util.treedef_is_leaf(jax.tree.structure(like))  # anything is like one array

    def one(path: str, leaf: jax.Array, x: Any) -> Any:
        axes = _axes(layout, path, leaf)
        if x is None or not axes:
            return x
        lengths = tuple(leaf.shape[i] for i in axes)
        if _fits(jnp.shape(x), leaf.shape):
            full = [leaf.shape[i] if i in axes else n for i, n in enumerate(x.shape)]
            return _layers(jnp.broadcast_to(x, full), axes)
        if jnp.shape(x) == lengths:
            return list(x.reshape(-1))
        return x if alone else [x] * math.prod(lengths)

    return map_with_path(one, like, mirror)


def _fits(shape: Sequence[int], leaf: Sequence[int]) -> bool:
    return len(shape) == len(leaf) and all(m in (1, n) for m, n in zip(shape, leaf, strict=True))


def together(tree: Tree, like: Params, layout: Layout) -> Tree:
    """Stack the layers of leaves again: the inverse of ``apart``; holes of ``tree`` stay."""
    treedef: Any = jax.tree.structure(like, is_leaf=is_hole)
    leaves = [
        _stacked(x, slot.leaf, _axes(layout, slot.path, slot.leaf)) if isinstance(x, list) else x
        for slot, x in zip(slots(like), treedef.flatten_up_to(tree), strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def _layers(x: jax.Array, axes: tuple[int, ...]) -> Any:
    if not axes:
        return x
    lengths = [range(x.shape[i]) for i in axes]
    return [_at(x, axes, index) for index in itertools.product(*lengths)]


def _at(x: Any, axes: tuple[int, ...], index: tuple[int, ...]) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct([n for i, n in enumerate(x.shape) if i not in axes], x.dtype)
    where: list[Any] = [slice(None)] * x.ndim
    for axis, i in zip(axes, index, strict=True):
        where[axis] = i
    return x[tuple(where)]


def _stacked(layers: list[Any], like: Any, axes: tuple[int, ...]) -> Any:
    if any(x is None for x in layers):
        return None
    lengths = tuple(like.shape[i] for i in axes)
    rows = jnp.stack(layers)
    rows = rows.reshape(*lengths, *rows.shape[1:])
    return jnp.moveaxis(rows, range(len(axes)), axes)


# Layers by name: `path[3]`.


def names_of(path: str, shape: Sequence[int], axes: Sequence[int]) -> list[str]:
    """What the layers of a leaf are called, in their order; the leaf itself if it is no stack."""
    if not axes:
        return [path]
    lengths = [range(shape[i]) for i in axes]
    return [f"{path}[{','.join(map(str, index))}]" for index in itertools.product(*lengths)]


def by_rules(
    rules: Mapping[str, float], default: float, path: str, leaf: Any, layout: Layout | None
) -> Any:
    """What rules over paths say of a leaf: the first that matches it, or one of its layers.

    Returns:
      A number, or an array `[layers]` where layers differ.
    """
    axes = () if layout is None else layout.layers(path, len(leaf.shape))
    chosen = [
        next(
            (v for regex, v in rules.items() if matches(regex, path) or matches(regex, name)),
            default,
        )
        for name in names_of(path, leaf.shape, axes)
    ]
    if len(set(chosen)) <= 1:
        return chosen[0] if chosen else default
    return np.array(chosen, float).reshape([leaf.shape[i] for i in axes])


def check_rules(rules: Mapping[str, float], part: Params, layout: Layout | None, user: str) -> None:
    """Refuse regexes that match no leaf and no layer."""
    leaves = leaves_by_path(part, user) if rules and layout is not None else {}
    names = [
        name
        for path, x in leaves.items()
        for name in names_of(path, x.shape, layout.layers(path, len(x.shape)) if layout else ())
    ]
    check_regexes_match(tuple(rules), part, user, also=names)
