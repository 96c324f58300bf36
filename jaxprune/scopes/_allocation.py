"""How a total sparsity is shared out among the leaves: trees of sparsities."""

import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxprune._errors import check_sparsity
from jaxprune._help import readable
from jaxprune._layers import by_rules, check_rules
from jaxprune._layout import Layout, check_layout
from jaxprune._tree import (
    is_matrix,
    leaves_with_path,
    map_leaves,
    map_with_path,
    prunable,
)
from jaxprune._where import compile_regex, with_layout
from jaxprune.typing import Params, Sparsity, Where


@readable
def uniform(
    params: Params, sparsity: float, *, where: Where = is_matrix, layout: Layout | None = None
) -> Sparsity:
    """Give every prunable leaf the same sparsity.

    Args:
      params: parameters; only shapes and paths are read.
      sparsity: fraction to remove, in [0, 1].
      where: which leaves are prunable; the same as for ``find_masks`` or ``prune``.
      layout: what each axis means; each layer of a stack then counts as a leaf.

    Returns:
      A tree of numbers, None where a leaf is not prunable. Where layers of a stack differ, an
      array `[layers]`.

    Raises:
      ValueError: ``sparsity`` is outside [0, 1], or no leaf is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> uniform({"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, 0.9)
      {'a': {'bias': None, 'kernel': 0.9}}
    """
    check_sparsity(sparsity, "uniform")
    return map_leaves(lambda _: sparsity, _covered(params, where, layout, "uniform")[0])


@readable
def erk(
    params: Params, sparsity: float, *, where: Where = is_matrix, layout: Layout | None = None
) -> Sparsity:
    r"""Keep relatively more of small layers: Erdos-Renyi-Kernel allocation.

    The density of a leaf is proportional to :math:`\sum_i d_i / \prod_i d_i` over its axes
    :math:`d_i`. Leaves whose density would pass 1 stay dense and the others make up for it. The
    total is exact: the counts ``round(s_l * n_l)`` of the leaves sum to ``round(sparsity * n)``.

    Args:
      params: parameters; only shapes and paths are read.
      sparsity: fraction to remove of all prunable weights, in [0, 1].
      where: which leaves are prunable; the same as for ``find_masks`` or ``prune``.
      layout: what each axis means; each layer of a stack then counts as a leaf.

    Returns:
      A tree of numbers, None where a leaf is not prunable. Where layers of a stack differ, an
      array `[layers]`.

    Raises:
      ValueError: ``sparsity`` is outside [0, 1], or no leaf is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> erk({"wide": jnp.ones((100, 100)), "thin": jnp.ones((100, 10))}, 0.9)
      {'thin': 0.61, 'wide': 0.929}

    References:
      Evci et al., `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020. There the
      total is approximate.
    """
    check_sparsity(sparsity, "erk")
    part, known = _covered(params, where, layout, "erk")
    leaves = leaves_with_path(part)
    lengths = [lengths_of(known, path, leaf.shape) for path, leaf in leaves]
    shapes = [
        known.of_layer(path, leaf.shape) if known else tuple(leaf.shape)
        for (path, leaf), layers in zip(leaves, lengths, strict=True)
        for _ in range(math.prod(layers))
    ]
    sizes = np.array([math.prod(shape) for shape in shapes], float)
    total = sizes.sum()
    goal = total - round(float(sparsity) * int(total))  # weights that stay
    raw = np.array([sum(s) / math.prod(s) if math.prod(s) else 0.0 for s in shapes])

    dense = np.zeros(len(sizes), bool)
    while True:
        open_ = ~dense & (sizes > 0)
        mass = (raw * sizes)[open_].sum()
        scale = (goal - sizes[dense].sum()) / mass if mass else 0.0
        too_dense = open_ & (raw * scale > 1.0)
        if not too_dense.any():
            break
        dense |= too_dense
    wanted = np.where(dense, sizes, np.clip(raw * scale * sizes, 0.0, sizes))
    gone = sizes - whole_counts(wanted, sizes, goal)
    return jax.tree.unflatten(jax.tree.structure(part), as_leaves(gone, sizes, lengths))


def whole_counts(wanted: np.ndarray, sizes: np.ndarray, goal: float) -> np.ndarray:
    """Round what each layer should have, `[n]` up to its size, so that the total is the goal."""
    counts = np.floor(wanted)
    # Largest remainders first, until the total is what was asked for.
    order = np.argsort(-(wanted - counts) + (counts >= sizes), kind="stable")
    counts[order[: round(goal - counts.sum())]] += 1
    return counts


def lengths_of(layout: Layout | None, path: str, shape: tuple[int, ...]) -> list[int]:
    """How many layers a stack has along each axis of them."""
    return [shape[i] for i in layout.layers(path, len(shape))] if layout else []


def as_leaves(
    gone: np.ndarray, sizes: np.ndarray, lengths: list[list[int]]
) -> list[float | np.ndarray]:
    """Give for each leaf its sparsity, or those of its layers where they differ.

    Args:
      gone: weights to remove of each layer, leaf after leaf, `[n]`.
      sizes: of the layers, `[n]`.
      lengths: of each leaf how many layers it has along each axis of them.
    """
    each = iter([float(k / n) if n else 0.0 for k, n in zip(gone, sizes, strict=True)])
    numbers = [[next(each) for _ in range(math.prod(n))] for n in lengths]
    return [
        (s[0] if s else 0.0) if len(set(s)) <= 1 else np.array(s).reshape(n)
        for s, n in zip(numbers, lengths, strict=True)
    ]


def _covered(
    params: Params, where: Where, layout: Layout | None, user: str
) -> tuple[Params, Layout | None]:
    """The prunable leaves, and the layout settled on the params."""
    check_layout(user, layout)
    known = None if layout is None else layout.on(params, user)
    return prunable(params, where=with_layout(where, known)), known


@readable
def custom(
    params: Params,
    rules: Mapping[str, float],
    *,
    default: float = 0.0,
    where: Where = is_matrix,
    layout: Layout | None = None,
) -> Sparsity:
    """Give leaves their sparsity by rules over their paths.

    Args:
      params: parameters; only shapes and paths are read.
      rules: from regex (matching the whole path) to sparsity; the first that matches counts. With
        a layout, ``path[3]`` is the layer 3 of a stack.
      default: sparsity of the prunable leaves that no rule matches.
      where: which leaves are prunable; the same as for ``find_masks`` or ``prune``.
      layout: what each axis means; each layer of a stack then counts as a leaf.

    Returns:
      A tree of numbers, None where a leaf is not prunable. Where layers of a stack differ, an
      array `[layers]`.

    Raises:
      ValueError: a sparsity is outside [0, 1], or a regex matches no prunable leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> custom({"in": jnp.ones((2, 2)), "out": jnp.ones((2, 2))}, {"out": 0.5}, default=0.9)
      {'in': 0.9, 'out': 0.5}
    """
    check_sparsity(dict(rules), "custom", layers=False)
    check_sparsity(default, "custom(default)")
    for regex in rules:
        compile_regex(regex, "custom")
    part, known = _covered(params, where, layout, "custom")
    check_rules(rules, part, known, "custom")
    return map_with_path(lambda path, leaf: by_rules(rules, default, path, leaf, known), part)
