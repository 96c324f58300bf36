"""What the weights of a network meet on calibration data: norms of inputs, and Gram matrices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._batches import Batches, read_batches
from jaxprune._calibrate import Visit, Walk, calibrate, walk_of
from jaxprune._errors import check_parts
from jaxprune._help import readable
from jaxprune._layout import Layout
from jaxprune._mesh import plain_mesh
from jaxprune._progress import bar
from jaxprune._traced import Call, Traced, trace
from jaxprune._tree import is_matrix
from jaxprune.graph._linear import Part
from jaxprune.graph._product import Product
from jaxprune.graph._products import Weight, stops_of
from jaxprune.typing import Params, Tree, Where


@readable
def input_stats(
    fn: Callable[..., Any],
    params: Params,
    batches: Batches,
    *,
    gram: bool = False,
    where: Where = is_matrix,
    layout: Layout | None = None,
    progress: bool = True,
) -> Tree:
    """Measure what each weight of a network multiplies, over calibration data.

    Walks through ``fn(params, *batch)`` as ``prune_trained`` does and changes nothing. The norms
    are evidence for ``jp.criteria.wanda`` in ``find_masks`` and ``prune``, and what
    ``jp.scopes.owl`` shares a sparsity out by.

    Args:
      fn: function of params and inputs, in inference mode.
      params: the whole tree of variables.
      batches: a list of tuples of inputs, or of single arrays, all of one shape; or a function that
        gives a fresh iterator of them.
      gram: give Gram matrices in the place of norms.
      where: which leaves are wanted; by default kernels, by their use.
      layout: what each axis means; found from ``fn`` unless it is given.
      progress: show a bar, if ``tqdm`` is installed.

    Returns:
      A tree like ``params``, None for leaves that are not wanted or multiply no data. Norms are
      float32, the root of the sum of squares over all rows of data, of the rank of the weight, and
      broadcast over it: `[inputs, 1]` of a kernel, `[layers, inputs, 1]` of a stack. Gram matrices
      are `[inputs, inputs]`, or `[layers, inputs, inputs]`, with groups in front of the inputs;
      None as well for a leaf that several products share out among them.

    Raises:
      TypeError: batches are an iterator that is gone once it has been read, or one array for all;
        ``fn`` is no function; params or batches are shapes, or traced by ``jax.jit``.
      ValueError: batches are not alike, no weight that is wanted multiplies data, or activations
        are not finite: it says at which weight, and in which batch.

    Example:
      >>> import jax.numpy as jnp
      >>> data = [jnp.array([[3.0, 0.0], [4.0, 1.0]])]
      >>> input_stats(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 5))}, data, progress=False)
      {'w': Array([[5.],
             [1.]], dtype=float32)}
    """
    check_parts("input_stats", where=where)
    data = read_batches(batches, "input_stats")
    traced = trace(Call(fn, params, data, layout, input_stats), where)
    measure = Product.gram if gram else Product.squares
    walk = walk_of(traced.line, traced.leaves, data.arrays, measure=measure)
    found: dict[Weight, jax.Array] = {}

    def visit(at: Visit) -> None:
        found[at.weight] = at.sums

    stops = stops_of(traced.weights)
    shown = bar("input_stats", shown=progress)
    calibrate(walk, stops, visit, name=traced.name, progress=shown)
    with plain_mesh():
        read = _grams(traced, found) if gram else _norms(traced, walk, found)
        return traced.tree(params, read)


def _norms(traced: Traced, walk: Walk, found: dict[Weight, jax.Array]) -> dict[int, jax.Array]:
    """Of each leaf the norms that its entries multiply, with one index for all outputs."""
    world = walk.worlds[0]
    for weight, squares in found.items():
        norms = jnp.sqrt(squares)
        number = jnp.arange(norms.size).reshape(*norms.shape, 1)  # of the input, as it is scattered
        laid = weight.product.weight(jnp.broadcast_to(number, weight.product.of_matrix))
        parts = [_like(traced, p) for p in weight.view.parts]
        for p, one in zip(weight.view.parts, weight.view.scatter_numbers(parts, laid), strict=True):
            old = world.changed.get(p, jnp.zeros(one.shown.shape, jnp.float32))
            world.changed[p] = jnp.where(one.shown, norms.ravel()[one.values[0]], old)
    leaves = {part.leaf for weight in found for part in weight.view.parts}
    return {leaf: _narrow(traced, leaf, walk.leaf(leaf)) for leaf in sorted(leaves)}


def _like(traced: Traced, part: Part) -> jax.ShapeDtypeStruct:
    leaf = traced.leaves[part.leaf]
    return jax.ShapeDtypeStruct(leaf.shape[len(part.layer) :], leaf.dtype)


def _narrow(traced: Traced, leaf: int, norms: jax.Array) -> jax.Array:
    """Keep one index of the axes along which norms are all the same, which are those of outputs."""
    roles = traced.layout.roles(traced.paths[leaf], norms.ndim)
    for axis, role in enumerate(roles):
        if role == "out":
            first = jax.lax.slice_in_dim(norms, 0, 1, axis=axis)
            norms = first if bool(jnp.all(norms == first)) else norms
    return norms


def _grams(traced: Traced, found: dict[Weight, jax.Array]) -> dict[int, jax.Array]:
    """Of each leaf that is one matrix, or a stack of them, the Gram matrices."""
    by_leaf: dict[int, dict[tuple[int, ...], list[jax.Array]]] = {}
    for weight, gram in found.items():
        for part in weight.view.parts:
            one = by_leaf.setdefault(part.leaf, {}).setdefault(part.layer, [])
            one += [gram] * (1 if len(weight.view.parts) == 1 else 2)  # two: it is no matrix
    whole = {}
    for leaf, layers in by_leaf.items():
        depth = max(map(len, layers))
        lead = traced.leaves[leaf].shape[:depth]
        each = [layers.get(index, []) for index in np.ndindex(*lead)]
        if all(len(grams) == 1 for grams in each):
            stacked = jnp.stack([grams[0] for grams in each])
            whole[leaf] = stacked.reshape(*lead, *stacked.shape[1:])
    return whole
