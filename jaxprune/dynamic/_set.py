"""Sparse training that grows at random."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._help import readable
from jaxprune._layout import Layout
from jaxprune._mesh import all_true
from jaxprune._ranking import Lazy
from jaxprune._tree import is_matrix
from jaxprune.criteria import random
from jaxprune.dynamic._drop_and_grow import decay
from jaxprune.dynamic._train import sparse_training
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Params, Pattern, Scope, Scores, Sparsity, Where


@readable
def set(
    inner: optax.GradientTransformation,
    *,
    key: jax.Array,
    sparsity: Sparsity,
    begin: int,
    end: int,
    every: int,
    drop_fraction: float = 0.3,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    where: Where = is_matrix,
    packed: bool = False,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it trains sparse, and grow at random (SET).

    As ``rigl``, except that the weights that grow are drawn at random among those that were zero.

    Args:
      inner: an optax optimizer, as for ``rigl``.
      key: random key, for the start and, folded with the step, for every event.
      sparsity: fraction removed: a number (shared out by ``jp.scopes.erk``) or a tree of numbers.
      begin: step of the first event; steps count from 0.
      end: step of the last event.
      every: steps between events.
      drop_fraction: fraction of the kept weights that moves at ``begin``, in [0, 1]; falls to 0
        at ``end`` along a cosine.
      pattern: what is dropped and grown together.
      scope: within which units the number kept never changes, as for ``rigl``: ``per_leaf``, or
        ``per_output`` for as many in each output, ``round(s * n)`` of whose units go.
      where: predicate of path and array: which leaves are prunable.
      packed: keep the masks as bits, for ``patterns.Blocks`` one a block.
      layout: what each axis means, from ``jp.find_layout`` or declared: what moves is then counted
        in each layer of a stack, and outputs are those that it knows; see ``find_masks``.

    Returns:
      An optax transformation with a ``PruneState``.

    Raises:
      TypeError: ``key`` is None, ``inner`` is no optimizer, or ``init`` finds that its state
        cannot be mapped.
      ValueError: as for ``rigl``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.dynamic.set(
      ...     optax.sgd(0.1), key=jax.random.key(0), sparsity=0.5, begin=0, end=10, every=5)
      >>> state = tx.init({"kernel": jnp.ones((4, 8))})
      >>> int(jp.get_masks(state)["kernel"].sum())
      16

    References:
      Mocanu et al., `Scalable training of artificial neural networks with adaptive sparse
      connectivity inspired by network science <https://arxiv.org/abs/1707.04780>`_, 2018. There
      the smallest positive and the largest negative weights are dropped, and the fraction is
      fixed.
    """
    if key is None:
        raise TypeError(
            "`set` grows weights at random and there is no default key. Pass "
            "`key=jax.random.key(...)`, or grow by gradient with `jp.dynamic.rigl`."
        )
    return sparse_training(
        inner,
        user="set",
        promise=_draws,
        at_random=True,
        start=random,
        sparsity=sparsity,
        events=decay("set", drop_fraction, begin, end, every),
        pattern=pattern,
        scope=scope,
        where=where,
        key=key,
        packed=packed,
        layout=layout,
    )


def _draws(grads: Params, key: jax.Array | None) -> Scores:
    """Promise of a weight: what ``random`` draws for it, drawn where it is read."""
    leaves, treedef = jax.tree.flatten(grads)
    given: Any = key  # `set` has refused None
    keys = [jax.random.fold_in(given, i) for i in range(len(leaves))]
    lazy = [Lazy((g, k), _drawn, jnp.dtype(jnp.float32)) for g, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, lazy)


def _drawn(like: jax.Array, key: jax.Array) -> jax.Array:
    zero = (~all_true(like)).astype(jnp.float32)  # draws lie where the weights do
    return zero + jax.random.uniform(key, like.shape)
