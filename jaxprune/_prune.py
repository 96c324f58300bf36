"""Pruning around any optax optimizer: masks live in its state and act through its updates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._checks import check_extra
from jaxprune._enforce import enforce, live
from jaxprune._errors import check_parts
from jaxprune._frozen import moving
from jaxprune._help import readable, scheduled
from jaxprune._layout import Layout
from jaxprune._masks import blocks_in, check_masks, dense_masks, unpack
from jaxprune._parts import Parts
from jaxprune._pruner import Pruner
from jaxprune._state import is_placeholder, without_variables
from jaxprune._tree import is_matrix, map_leaves
from jaxprune._where import by_default
from jaxprune._wrap import Done, First, Inner, Step, Store, wrap
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import Criterion, Masks, Params, Pattern, Schedule, Scope, Where


@scheduled
@readable
def prune(
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
    """Wrap an optimizer so that it prunes while it trains.

    At update t (from 0), if the schedule is due, masks are re-found from the params and gradients
    handed to that update. Removed weights get the update ``-param``, so that they are exactly
    zero after ``optax.apply_updates``, whatever momentum or weight decay did. The inner optimizer
    sees zero gradients for them: clipping by a global norm, orthogonalization or a line search
    work on the network that is left. Weights never come back, unless the schedule falls.

    Three cautions. It goes outermost: a transformation chained after it rescales the ``-param``
    update and pruned weights come back (gradient accumulation around it is fine;
    ``optax.contrib.sam`` goes inside). The state of other optimizers is reached through
    ``optax.tree.map_params``, never by type. Copies made of params elsewhere (an average, the
    evaluation params of a schedule-free optimizer) are masked by nobody: call ``apply_masks`` on
    them.

    Updates never look at what they leave behind: ``jp.check(params, opt_state, schedule=...)``
    does, at the end of a run. Steps are updates, so a loop that ends early leaves pruning undone:
    the minimisers of optimistix and jaxopt stop when they have converged, before the first event
    if it is late. Trainers that return the best params seen (flowjax does) return those of before
    the last event. Tried and fine without more: plain loops, ``lax.scan``, linen's ``TrainState``,
    ``nnx.Optimizer``, numpyro's SVI, Keras's ``stateless_call``, tunix's trainer.

    Leaves that ``inner`` freezes (``optax.freeze``, ``optax.set_to_zero`` in a partition) are left
    out by the default ``where``; another one is obeyed.

    Args:
      inner: any optax optimizer. Extra arguments of ``update`` reach it and the criterion.
      schedule: how much to remove, and when.
      criterion: scores the weights. It is offered ``grads``, ``key`` and ``state``, and whatever
        else is passed to ``tx.update(..., name=value)``. One with memory also has
        ``init(params)`` and ``update(state, params, grads)``; it is updated at every step.
      pattern: what is removed together.
      scope: who competes with whom.
      where: predicate of path and array: which leaves are prunable.
      key: random key for criteria that ask for one; folded with the step at every event.
      packed: keep the masks as bits: an eighth of the memory, and for ``patterns.Blocks`` one bit
        a block.
      layout: what each axis means, from ``jp.find_layout`` or declared: layers of a stack are then
        ranked one by one, and parts may name axes by their roles; see ``find_masks``.

    Returns:
      An optax transformation. Its state is a ``PruneState``; read it with ``get_masks``.

    Raises:
      TypeError: ``inner`` or ``schedule`` is of the wrong kind, or the criterion lacks evidence.
      ValueError: at ``init``, nothing is prunable or the parts do not fit the params; at
        ``update``, params are missing or gradients are not like them.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.prune(optax.sgd(0.5), schedule=jp.schedules.constant(0.5))
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)  # the params as their own gradient
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[ 0. , -2. ],
             [ 1.5,  0. ]], dtype=float32)
    """
    pruner = Pruner(Parts("prune", criterion, pattern, scope, where, layout), schedule, key, inner)

    def step(inner: Inner, now: Step, store: Store) -> Done:
        bound, count = pruner.on(now.params, now.state.masks), now.state.count
        memory = bound.remember(now.state.criterion_state, now.grads)
        evidence = pruner.evidence(now, memory)
        stored = bound.renewed(
            count,
            store(bound.widened(now.state.masks), now.state.masks),
            evidence,
            store,
            falls=bound.falls(count),
        )
        masks = check_masks(unpack(stored), now.params, "masks")
        grads = live(now.grads, masks)
        updates, inner_state = inner.update(grads, now.state.inner_state, now.params, **now.extra)
        return Done(map_leaves(enforce, updates, now.params, masks), stored, inner_state, memory)

    return wrap(
        "prune",
        inner,
        first=pruner.first,
        step=step,
        key=key,
        packed=packed,
        schedule=schedule,
        by_default=pruner.by_default,
    )


@readable
def hold(
    inner: optax.GradientTransformation,
    *,
    masks: Masks | Callable[[Params], Masks] | None = None,
    where: Where = is_matrix,
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that given masks hold: train a ticket.

    Dense until masks are given, here or by ``with_masks``; they never change by themselves.
    Removed weights are exactly zero after every ``optax.apply_updates``. It goes outermost, like
    ``prune``.

    Args:
      inner: any optax optimizer.
      masks: masks like the params, or a function that makes them from the params at ``init``:
        ``jp.masks_from_zeros`` goes on with a network that was pruned before. Arrays are kept in
        the state and travel with it.
      where: which leaves the dense masks of ``init`` cover, if no masks are given.
      packed: keep the masks as bits: one a weight, or a block where ``masks`` come packed so.

    Returns:
      An optax transformation with a ``PruneState``.

    Raises:
      TypeError: ``inner`` is no optax transformation; at ``init``, a mask is not bool.
      ValueError: at ``init``, nothing is prunable, or the masks do not mirror the params; at
        ``update``, they do not, or params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> masks = {"kernel": jnp.array([[True, False], [True, True]])}
      >>> tx = jp.hold(optax.sgd(0.5), masks=masks)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[0.5, 0. ],
             [0.5, 0.5]], dtype=float32)
    """
    check_parts("hold", where=where)
    given_inner = inner
    # A module with masks in the place of its weights can be called as well.
    from_params = callable(masks) and not any(map(_is_mask, jax.tree.leaves(masks)))

    def first(params: Params) -> First:
        if is_placeholder(params):
            return First(params)
        if masks is None:
            return First(dense_masks(params, where=moving(where, given_inner, params, "hold")))
        given = without_variables(masks(params) if from_params else masks)
        mirror = check_masks(unpack(given), params, "masks")
        blocks = blocks_in(given)
        return First(
            map_leaves(_as_params, params, mirror),
            block_of=lambda slot: blocks.get(slot.keys, ()),
        )

    def step(inner: Inner, now: Step, store: Store) -> Done:
        del store
        check_extra("hold", given_inner, now.extra)
        grads, state = live(now.grads, now.masks), now.state
        updates, inner_state = inner.update(grads, state.inner_state, now.params, **now.extra)
        updates = map_leaves(enforce, updates, now.params, now.masks)
        return Done(updates, state.masks, inner_state, state.criterion_state)

    return wrap(
        "hold",
        inner,
        first=first,
        step=step,
        packed=packed,
        by_default=by_default(where) and masks is None,
        dense=masks is None,
    )


def _as_params(param: jax.Array, mask: Any) -> Any:
    """A mask of one's own in the place of a weight: donating the state must not take it away."""
    del param
    return None if mask is None else jnp.copy(mask)


def _is_mask(leaf: Any) -> bool:
    return getattr(leaf, "dtype", None) in (jnp.bool_, jnp.uint8)
