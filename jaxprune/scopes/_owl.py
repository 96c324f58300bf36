"""Layers with more outlying scores stay denser: sparsities by outliers."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._errors import check_sparsity
from jaxprune._help import readable
from jaxprune._layout import Layout, check_layout
from jaxprune._tree import leaves_with_path, map_leaves, map_with_path, prunable, wide
from jaxprune._where import everything, with_layout
from jaxprune.scopes._allocation import as_leaves, lengths_of, whole_counts
from jaxprune.typing import Scores, Sparsity, Where


@readable
def owl(
    scores: Scores,
    sparsity: float,
    *,
    threshold: float = 5.0,
    deviation: float = 0.08,
    where: Where = everything,
    layout: Layout | None = None,
) -> Sparsity:
    r"""Keep relatively more of layers with many outliers among their scores (OWL).

    The share of a layer's scores that exceed ``threshold`` times their mean says how much denser
    than the others it stays: its sparsity lies below the mean in proportion. For trained networks
    pruned in one pass, where a few inputs are far larger than all others.

    Args:
      scores: any tree of scores, not traced: ``jp.criteria.wanda(params, norms=stats)`` is the
        paper's, with ``stats`` from ``jp.input_stats``. The norms alone, `[layers, inputs, 1]`,
        count outliers among inputs.
      sparsity: fraction to remove of all units that are scored, in [0, 1].
      threshold: how many times the mean makes an outlier; 5 as in the paper.
      deviation: how far the sparsity of a layer is from the mean, at most, and of one exactly;
        0.08 as in the paper. Less where the mean is nearer than that to 0 or 1.
      where: which of the scores count: as they are, or all of a network's, the ``where`` that
        ``find_masks`` or ``prune`` gets.
      layout: what each axis means; each layer of a stack then counts as a leaf.

    Returns:
      A tree of numbers like ``scores``, None where a leaf is not prunable. Where layers of a stack
      differ, an array `[layers]`. The counts ``round(s_l * n_l)`` of the layers sum to
      ``round(sparsity * n)``, with `n_l` scores of a layer. Of norms alone, which broadcast over
      weights, it is the weights that count if the layout was found and knows their shapes; without
      one the total is exact in inputs only, and in weights where all layers have as many outputs.

    Raises:
      ValueError: ``sparsity`` or ``deviation`` is outside [0, 1], ``threshold`` is not positive, or
        no leaf is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> even, spiky = jnp.ones((10, 10)), jnp.ones((10, 10)).at[0, 0].set(99.0)
      >>> owl({"even": even, "spiky": spiky}, 0.5)
      {'even': 0.58, 'spiky': 0.42}

    References:
      Yin et al., `Outlier Weighed Layerwise Sparsity (OWL)
      <https://arxiv.org/abs/2310.05175>`_, 2024. There the layers of a block share a number, the
      mean is over blocks, and twice ``deviation`` is between the lowest and the highest.
    """
    check_sparsity(sparsity, "owl")
    _check_settings(threshold, deviation)
    check_layout("owl", layout)
    weights = _weights_under(scores, layout)
    known = None if layout is None else layout.on(weights, "owl")
    weights = prunable(weights, where=with_layout(where, known))
    part = map_leaves(lambda _, s: s, weights, scores)
    lengths = [lengths_of(known, path, leaf.shape) for path, leaf in leaves_with_path(weights)]
    found = [_outliers(leaf, path, threshold, known) for path, leaf in leaves_with_path(part)]
    share = np.concatenate(found)
    sizes = np.concatenate(
        [
            np.full(each.shape, leaf.size / max(each.size, 1))
            for each, leaf in zip(found, jax.tree.leaves(weights), strict=True)
        ]
    )
    away = share - np.average(share, weights=sizes) if sizes.any() else share
    most = np.max(np.abs(away), initial=0.0)
    scale = min(deviation, sparsity, 1.0 - sparsity) / most if most else 0.0
    goal = round(float(sparsity) * int(sizes.sum()))
    gone = whole_counts((sparsity - scale * away) * sizes, sizes, goal)
    return jax.tree.unflatten(jax.tree.structure(part), as_leaves(gone, sizes, lengths))


def _weights_under(scores: Scores, layout: Layout | None) -> Scores:
    """Give the shapes of what scores broadcast over, where a layout knows; else their own."""
    shapes = {entry.path: entry.shape for entry in layout.entries} if layout else {}

    def under(path: str, score: jax.Array) -> jax.ShapeDtypeStruct:
        shape = shapes.get(path) or ()
        fits = len(shape) == score.ndim and all(
            n in (1, m) for n, m in zip(score.shape, shape, strict=True)
        )
        return jax.ShapeDtypeStruct(shape if fits else score.shape, score.dtype)

    return map_with_path(under, scores)


def _outliers(scores: jax.Array, path: str, threshold: float, layout: Layout | None) -> np.ndarray:
    """Give the share of outliers among the scores of each layer of a leaf, `[n]`."""
    layers = layout.layers(path, scores.ndim) if layout else ()
    inside = tuple(i for i in range(scores.ndim) if i not in layers)
    size = wide(scores)
    mean = jnp.mean(size, inside, keepdims=True)
    share = np.ravel(np.asarray(jnp.mean(size > threshold * mean, inside)))
    return np.nan_to_num(share)  # of no scores at all there are none


def _check_settings(threshold: float, deviation: float) -> None:
    """Refuse settings of which no sparsities come."""
    if not threshold > 0:
        raise ValueError(
            f"`owl(threshold={threshold!r})` makes an outlier of nothing or all. It is a multiple "
            "of the mean score; use 5 as in the paper."
        )
    if not 0 <= deviation <= 1:
        raise ValueError(
            f"`owl(deviation={deviation!r})` is outside [0, 1]. It is how far the sparsity of a "
            "layer may be from the mean; use 0.08 as in the paper."
        )
