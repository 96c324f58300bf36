"""Dense weights, sparse forward pass: pruning that can change its mind at every event."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._checks import check_update
from jaxprune._help import readable, scheduled
from jaxprune._layout import Layout
from jaxprune._masks import check_masks, unpack
from jaxprune._parts import Parts
from jaxprune._pruner import Pruner
from jaxprune._serial import serialize_tuple
from jaxprune._state import PruneState
from jaxprune._states import get_masks
from jaxprune._tree import is_matrix, map_leaves
from jaxprune._wrap import Done, Inner, Step, Store, wrap
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Criterion, Params, Pattern, Schedule, Scope, Where


class StraightThroughState(NamedTuple):
    """State of ``straight_through``.

    Attributes:
      masked: the masks of the next forward pass, and the state of the wrapped optimizer.
    """

    masked: PruneState


serialize_tuple(StraightThroughState)


@scheduled
@readable
def straight_through(
    inner: optax.GradientTransformation,
    *,
    schedule: Schedule,
    criterion: Criterion = magnitude,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    where: Where = is_matrix,
    key: jax.Array | None = None,
    packed: bool = False,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it trains dense weights through a sparse forward pass.

    The gradient is taken at ``forward_params(params, opt_state)`` and moves all weights, also
    those that the forward pass does not see: a weight that was removed by mistake grows back.
    At update t (from 0), if the schedule is due, masks are found anew among all of the weights
    handed to that update. The sparse network is ``forward_params`` at the end of training::

        schedule = jp.schedules.constant(0.9, end=10_000, every=10)
        tx = jp.straight_through(optax.adam(1e-3), schedule=schedule)
        grads = jax.grad(loss)(jp.forward_params(params, opt_state), batch)
        updates, opt_state = tx.update(grads, opt_state, params)

    The forward pass is dense until the first event.

    Args:
      inner: any optax optimizer; it sees dense gradients and dense weights.
      schedule: how much the forward pass leaves out, and when masks are re-found.
      criterion: scores the weights, as for ``prune``.
      pattern: what is removed together.
      scope: who competes with whom.
      where: predicate of path and array: which leaves are prunable.
      key: random key for criteria that ask for one; folded with the step at every event.
      packed: keep the masks as bits, for ``patterns.Blocks`` one a block.
      layout: what each axis means, from ``jp.find_layout`` or declared: layers of a stack are then
        ranked one by one, and parts may name axes by their roles; see ``find_masks``.

    Returns:
      An optax transformation. Its state is a ``StraightThroughState``; ``get_masks`` reads it.

    Raises:
      TypeError: ``inner`` or ``schedule`` is of the wrong kind, or the criterion lacks evidence.
      ValueError: at ``init``, nothing is prunable or the parts do not fit the params; at
        ``update``, params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.straight_through(optax.sgd(1.0), schedule=jp.schedules.constant(0.5))
      >>> params = {"kernel": jnp.array([[1.0, 4.0]])}
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.array([[-5.0, 1.0]])}
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["kernel"], jp.forward_params(params, state)["kernel"]
      (Array([[6., 3.]], dtype=float32), Array([[0., 3.]], dtype=float32))

    References:
      Bengio et al., `Estimating or Propagating Gradients Through Stochastic Neurons
      <https://arxiv.org/abs/1308.3432>`_, 2013. Lin et al., `Dynamic Model Pruning with Feedback
      <https://arxiv.org/abs/2006.07253>`_, 2020.
    """
    user = "straight_through"
    pruner = Pruner(Parts(user, criterion, pattern, scope, where, layout), schedule, key, inner)

    def step(inner: Inner, now: Step, store: Store) -> Done:
        bound, count = pruner.on(now.params, now.state.masks), now.state.count
        memory = bound.remember(now.state.criterion_state, now.grads)
        evidence = pruner.evidence(now, memory)
        held = store(bound.widened(now.state.masks), now.state.masks)
        stored = bound.renewed(count, held, evidence, store)
        # Weights are dense: neither gradients nor updates know of masks.
        updates, inner_state = inner.update(
            now.grads, now.state.inner_state, now.params, **now.extra
        )
        return Done(updates, stored, inner_state, memory)

    masked = wrap(
        user,
        inner,
        first=pruner.first,
        step=step,
        key=key,
        packed=packed,
        schedule=schedule,
        by_default=pruner.by_default,
    )

    def init(params: Params) -> StraightThroughState:
        return StraightThroughState(masked.init(params))

    def update(
        grads: optax.Updates,
        state: StraightThroughState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, StraightThroughState]:
        check_update(state, params, StraightThroughState)
        updates, after = masked.update(grads, state.masked, params, **extra)
        return updates, StraightThroughState(after)

    return optax.GradientTransformationExtraArgs(init, update)


def forward_params(params: Params, opt_state: optax.OptState) -> Params:
    """Give the weights that the forward pass sees: masked by the masks in force.

    Gradients pass straight through: with respect to ``params`` they are those with respect to
    the result, also for weights that are masked.

    Args:
      params: the dense parameters.
      opt_state: optimizer state with one ``straight_through`` in it, however deep.

    Returns:
      Parameters like ``params``, exactly zero where a mask is False.

    Raises:
      ValueError: there is no ``straight_through`` in the state, or its masks do not mirror
        ``params``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.straight_through(optax.sgd(1.0), schedule=jp.schedules.constant(0.5))
      >>> params = {"kernel": jnp.array([[1.0, 4.0]])}
      >>> state = jp.with_masks(tx.init(params), {"kernel": jnp.array([[False, True]])})
      >>> loss = lambda params: jp.forward_params(params, state)["kernel"].sum()
      >>> jax.value_and_grad(loss)(params)
      (Array(4., dtype=float32), {'kernel': Array([[1., 1.]], dtype=float32)})
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_straight_through)
    if not any(map(_is_straight_through, nodes)):
        raise ValueError(
            "`forward_params` got an optimizer state without `jp.straight_through` in it: the "
            "params of every other wrapper are what the forward pass sees. Use the params as they "
            "are, or wrap the optimizer in `jp.straight_through`."
        )
    masks = check_masks(unpack(get_masks(opt_state)), params, "masks")
    return map_leaves(
        lambda p, m: p if m is None else jnp.where(m, p, _zero_but_for_gradients(p)), params, masks
    )


@jax.custom_jvp
def _zero_but_for_gradients(x: jax.Array) -> jax.Array:
    return jnp.zeros_like(x)


@_zero_but_for_gradients.defjvp
def _pass_on(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(primals[0]), tangents[0]


def _is_straight_through(node: Any) -> bool:
    return isinstance(node, StraightThroughState)
