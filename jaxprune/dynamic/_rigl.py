"""Sparse training that grows where the gradient is largest."""

import jax
import jax.numpy as jnp
import optax

from jaxprune._help import readable
from jaxprune._layout import Layout
from jaxprune._ranking import Lazy
from jaxprune._tree import is_matrix
from jaxprune.criteria import magnitude, random
from jaxprune.dynamic._drop_and_grow import decay
from jaxprune.dynamic._train import sparse_training
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Params, Pattern, Scope, Scores, Sparsity, Where


@readable
def rigl(
    inner: optax.GradientTransformation,
    *,
    sparsity: Sparsity,
    begin: int,
    end: int,
    every: int,
    drop_fraction: float = 0.3,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    where: Where = is_matrix,
    key: jax.Array | None = None,
    packed: bool = False,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that it trains sparse, and grow where the gradient is largest (RigL).

    At an event the inner update comes first. Then, in each leaf, the
    :math:`\lfloor \alpha_t n \rfloor` smallest of the :math:`n` kept weights are dropped, and as
    many of those that were zero before grow: the ones with the largest :math:`|g|`. With
    :math:`t` from 0 at ``begin`` to 1 at ``end``, :math:`\alpha_t` is ``drop_fraction`` times
    :math:`\frac{1}{2}(1 + \cos \pi t)`. A leaf with fewer zeros than that moves as many as it
    has. Grown weights start from zero, and their moments in the state of the inner optimizer
    from where they start, which is zero for nearly all. Hand in the full gradient: removed
    weights are found by theirs. Updates cannot be differentiated in reverse mode (they pass
    through a loop).

    Masks are there from ``init`` on, and the first update makes them hold. To start sparse:
    ``params = jp.apply_masks(params, jp.get_masks(opt_state))``.

    Args:
      inner: an optax optimizer with state that ``optax.tree.map_params`` can map, which is any
        but those that remember several steps or search a line, such as L-BFGS. The wrapper goes
        outermost, like ``prune``.
      sparsity: fraction removed, for the whole time. A number is shared out by
        ``jp.scopes.erk``; a tree of numbers, as ``jp.scopes.uniform`` makes, gives one a leaf.
      begin: step of the first event; steps count from 0.
      end: step of the last event.
      every: steps between events.
      drop_fraction: fraction of the kept weights that moves at ``begin``, in [0, 1]; 0.3 is the
        paper's.
      pattern: what is dropped and grown together; units are counted and scored instead of weights.
      scope: within which units the number kept never changes: ``per_leaf``, or ``per_output`` for
        masks that ``jp.compact`` takes. The worst of the leaf are dropped in either case, and in
        each output as many grow as it has lost, or as it had zeros. Then each output of a leaf
        loses ``round(s * n)`` of its ``n`` units, of whatever ``erk`` says that the leaf loses, and
        the total is exact for each output only. Any other scope that says what competes inside of
        a leaf will do (``jp.typing.WithinLeaf``).
      where: predicate of path and array: which leaves are prunable.
      key: random key for the start; without it the largest weights start.
      packed: keep the masks as bits, for ``patterns.Blocks`` one a block.
      layout: what each axis means, from ``jp.find_layout`` or declared: what moves is then counted
        in each layer of a stack, and outputs are those that it knows; see ``find_masks``.

    Returns:
      An optax transformation with a ``PruneState``.

    Raises:
      TypeError: ``inner`` is no optimizer, or ``init`` finds that its state cannot be mapped.
      ValueError: a sparsity or ``drop_fraction`` is outside [0, 1], a step is no integer from 0
        on, ``end`` is before ``begin``, the scope ranks leaves together or does not go with the
        pattern, or nothing is prunable; at ``update``, params are missing or gradients are not
        like them.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.dynamic.rigl(
      ...     optax.sgd(0.1), sparsity=0.5, begin=0, end=10, every=5, drop_fraction=0.5)
      >>> params = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.array([[0.0, 0.0, 1.0, -5.0]])}
      >>> updates, state = tx.update(grads, state, params)
      >>> jp.get_masks(state)["kernel"]  # 3 was dropped, the last has the largest gradient
      Array([[ True, False, False,  True]], dtype=bool)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[4., 0., 0., 0.]], dtype=float32)

      As many inputs of every output:

      >>> tx = jp.dynamic.rigl(
      ...     optax.sgd(0.1), sparsity=0.5, begin=0, end=10, every=5, scope=jp.scopes.per_output)
      >>> jp.get_masks(tx.init({"kernel": jnp.array([[4.0, 3.0], [5.0, 1.0]])}))["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)

    References:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020. There a dropped weight may grow back at once.
      Dropping by the leaf and growing by the output is from Lasby et al., `Dynamic Sparse Training
      with Structured Sparsity <https://arxiv.org/abs/2305.02299>`_, 2024, who also remove outputs
      that have lost most of their weights; here all stay.
    """
    return sparse_training(
        inner,
        user="rigl",
        promise=_gradients,
        start=magnitude if key is None else random,
        sparsity=sparsity,
        events=decay("rigl", drop_fraction, begin, end, every),
        pattern=pattern,
        scope=scope,
        where=where,
        key=key,
        packed=packed,
        layout=layout,
    )


def _gradients(grads: Params, key: jax.Array | None) -> Scores:
    """Promise of a weight: the size of its gradient."""
    del key
    return jax.tree.map(lambda g: Lazy((g,), jnp.abs, g.dtype), grads)
