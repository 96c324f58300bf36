"""Pruning around any optax optimizer: masks live in its state and act through its updates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._errors import check_living
from jaxprune._event import (
    PruneState,
    Search,
    check_grads,
    check_inner,
    check_params,
    enforce,
    if_due,
    is_packed,
    is_placeholder,
    live,
    storage,
)
from jaxprune._tree import align, is_hole, is_matrix, map_leaves, narrow
from jaxprune._types import Criterion, Masks, Params, Pattern, Schedule, Scope, Where
from jaxprune.criteria import magnitude
from jaxprune.masks import check_masks, dense_masks, pack, unpack
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf


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
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that it prunes while it trains.

    At update t (from 0), if the schedule is due, masks are re-found from the params and gradients
    handed to that update. Removed weights get the update ``-param``, so that they are exactly
    zero after ``optax.apply_updates``, whatever momentum or weight decay did. The inner optimizer
    sees zero gradients for them: clipping by a global norm, orthogonalization or a line search
    work on the network that is left. Weights never come back, unless the schedule falls.

    Three cautions. It goes outermost: a transformation chained after it rescales the ``-param``
    update and pruned weights come back (gradient accumulation around it is fine). The state of
    other optimizers is reached through ``optax.tree.map_params``, never by type. Copies made of
    params elsewhere (an average, the evaluation params of a schedule-free optimizer) are masked
    by nobody: call ``apply_masks`` on them.

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
      packed: keep the masks as bits, an eighth of the memory.

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
    check_inner(inner, "prune")
    parts = Search("prune", schedule, criterion, pattern, scope, where, key)
    store = storage(packed)

    def refresh(grads: Params, state: PruneState, params: Params, extra: dict[str, Any]) -> Any:
        now, search = state.count, parts.on(params)
        memory = search.remember(state.criterion_state, params, grads)
        evidence = search.evidence(state, memory, grads, extra)
        falls = search.falls(now)

        def renew(stored: Masks) -> Masks:
            within = jax.tree.map(lambda m: m | falls, unpack(stored))
            return store(search.find(now, params, within, evidence))

        stored = store(search.fit(state.masks, params))
        return if_due(schedule.due(now), renew, stored), memory

    return _wrap(
        inner,
        init_masks=lambda params: parts.on(params).first_masks(params),
        init_criterion=lambda params: parts.on(params).first_memory(params),
        refresh=refresh,
        key=key,
        packed=packed,
    )


def hold(
    inner: optax.GradientTransformation, *, where: Where = is_matrix, packed: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that given masks hold: train a ticket.

    Dense until ``with_masks`` puts masks into the state; they never change by themselves.
    Removed weights are exactly zero after every ``optax.apply_updates``. It goes outermost, like
    ``prune``.

    Args:
      inner: any optax optimizer.
      where: which leaves the dense masks of ``init`` cover.
      packed: keep the masks as bits.

    Returns:
      An optax transformation with a ``PruneState``.

    Raises:
      TypeError: ``inner`` is no optax transformation.
      ValueError: at ``init``, nothing is prunable; at ``update``, the masks do not mirror the
        params, or params are missing.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> masks = {"kernel": jnp.array([[True, False], [True, True]])}
      >>> tx = jp.hold(optax.sgd(0.5))
      >>> state = jp.with_masks(tx.init(params), masks)
      >>> updates, state = tx.update(params, state, params)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[0.5, 0. ],
             [0.5, 0.5]], dtype=float32)
    """
    check_inner(inner, "hold")

    def refresh(grads: Params, state: PruneState, params: Params, extra: dict[str, Any]) -> Any:
        del grads, params, extra
        return state.masks, state.criterion_state

    return _wrap(
        inner,
        init_masks=lambda p: p if is_placeholder(p) else dense_masks(p, where=where),
        init_criterion=lambda _: (),
        refresh=refresh,
        key=None,
        packed=packed,
    )


def _wrap(
    inner: optax.GradientTransformation,
    *,
    init_masks: Callable[[Params], Masks],
    init_criterion: Callable[[Params], Any],
    refresh: Callable[..., Any],
    key: jax.Array | None,
    packed: bool,
) -> optax.GradientTransformationExtraArgs:
    """Put masks around an optimizer; ``refresh`` says which are in force at an update."""
    inner = optax.with_extra_args_support(inner)
    store = storage(packed)

    def init(params: Params) -> PruneState:
        return PruneState(
            count=jnp.zeros([], jnp.int32),
            masks=store(init_masks(params)),
            inner_state=inner.init(params),
            criterion_state=init_criterion(params),
            key=None if key is None else jnp.copy(key),
        )

    def update(
        updates: optax.Updates, state: PruneState, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, PruneState]:
        check_params(params)
        stored, criterion_state = refresh(updates, state, params, extra)
        masks = check_masks(unpack(stored), params, "masks")
        grads = live(check_grads(updates, params, narrow(params, masks)), masks)
        updates, inner_state = inner.update(grads, state.inner_state, params, **extra)
        new_state = PruneState(
            count=optax.safe_increment(state.count),
            masks=stored,
            inner_state=inner_state,
            criterion_state=criterion_state,
            key=state.key,
        )
        return map_leaves(enforce, updates, params, masks), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def get_masks(opt_state: optax.OptState) -> Masks:
    """Find the masks in an optimizer state, however deep they are nested.

    Args:
      opt_state: state of an optimizer that ``prune``, ``hold``, ``straight_through`` or one of
        ``dynamic`` is part of.

    Returns:
      The masks, unpacked and without nnx variables around them. They are copies: donating the
      state does not take them away.

    Raises:
      ValueError: there is no pruner in the state, or there are several.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = optax.chain(optax.clip(1.0), jp.hold(optax.adam(0.1)))
      >>> jp.get_masks(tx.init({"kernel": jnp.zeros((1, 2))}))
      {'kernel': Array([[ True,  True]], dtype=bool)}
    """
    masks = jax.tree.map(
        lambda v: v.get_value() if _is_variable(v) else v,
        _the_pruner(opt_state).masks,
        is_leaf=_is_variable,
    )
    check_living(masks, "opt_state")
    return jax.tree.map(jnp.copy, unpack(masks))


def with_masks(opt_state: optax.OptState, masks: Masks) -> optax.OptState:
    """Put masks into an optimizer state, however deep it is nested.

    Args:
      opt_state: state of an optimizer that ``prune``, ``hold``, ``straight_through`` or one of
        ``dynamic`` is part of.
      masks: masks like the params; copied, so that donating the state does not take them away.

    Returns:
      The same state with these masks in force from the next update on.

    Raises:
      ValueError: the masks do not mirror those of the state, or it has no or several pruners.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> state = jp.hold(optax.sgd(0.1)).init({"kernel": jnp.zeros((1, 2))})
      >>> jp.get_masks(jp.with_masks(state, {"kernel": jnp.array([[True, False]])}))
      {'kernel': Array([[ True, False]], dtype=bool)}
    """
    old = _the_pruner(opt_state).masks
    packed = any(map(is_packed, jax.tree.leaves(old, is_leaf=is_packed)))
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, bool), old, is_leaf=is_packed)
    mirror = align(masks, shapes)
    like = shapes if mirror is None else jax.tree.map(_fit, shapes, mirror, is_leaf=is_hole)
    mirror = check_masks(masks, like, "masks")
    copies = jax.tree.map(jnp.copy, mirror)
    new_masks = pack(copies) if packed else copies
    return jax.tree.map(
        lambda node: node._replace(masks=new_masks) if _is_pruner(node) else node,
        opt_state,
        is_leaf=_is_pruner,
    )


def _fit(old: Any, new: Any) -> Any:
    """What a new mask has to fit: the old one, widened where either stands for a whole axis."""
    if is_hole(old) or is_hole(new):
        return new
    if len(old.shape) != jnp.ndim(new):
        return old
    shape = tuple(b if a == 1 else a for a, b in zip(old.shape, new.shape, strict=True))
    return jax.ShapeDtypeStruct(shape, bool)


def _pruners(opt_state: optax.OptState) -> list[PruneState]:
    nodes = jax.tree.leaves(opt_state, is_leaf=_is_pruner)
    outer = [node for node in nodes if _is_pruner(node)]
    return outer + [inner for node in outer for inner in _pruners(node.inner_state)]


def _the_pruner(opt_state: optax.OptState) -> PruneState:
    found = _pruners(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"The optimizer state holds {len(found)} pruners, want one. "
            + (
                "Pass the state of an optimizer wrapped by `jp.prune`, `jp.hold` and the like."
                if not found
                else "Pass the part of the state that belongs to one of them."
            )
        )
    return found[0]


def _is_pruner(node: Any) -> bool:
    return isinstance(node, PruneState)


def _is_variable(node: Any) -> bool:
    """True for an nnx variable, known by what it can do: the core does not import flax."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")
