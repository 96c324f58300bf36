"""Sparse training: from the first step to the last, the same number of weights moves around."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import schedules
from jaxprune._advice import warn
from jaxprune._errors import check_key, check_parts, check_sparsity, is_bool
from jaxprune._event import (
    PruneState,
    check_extra,
    check_grads,
    check_inner,
    check_start,
    check_update,
    common,
    enforce,
    if_due,
    is_placeholder,
    live,
    storage,
    widen,
)
from jaxprune._find import find, living
from jaxprune._frozen import moving
from jaxprune._help import readable
from jaxprune._masks import check_masks, unpack
from jaxprune._mesh import in_auto_mode
from jaxprune._tree import is_hole, is_matrix, map_leaves, narrow, prunable
from jaxprune._where import by_default
from jaxprune.criteria import magnitude, random
from jaxprune.patterns import Coupled, Weights
from jaxprune.schedules._schedule import as_step
from jaxprune.scopes import erk, per_leaf
from jaxprune.scopes._rank import count_true, keep_largest
from jaxprune.scopes._spread import is_tree
from jaxprune.typing import Criterion, Masks, Params, Pattern, Schedule, Scores, Sparsity, Where

__all__ = ("rigl", "set")


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
    where: Where = is_matrix,
    key: jax.Array | None = None,
    packed: bool = False,
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
      where: predicate of path and array: which leaves are prunable.
      key: random key for the start; without it the largest weights start.
      packed: keep the masks as bits.

    Returns:
      An optax transformation with a ``PruneState``.

    Raises:
      TypeError: ``inner`` is no optimizer, or ``init`` finds that its state cannot be mapped.
      ValueError: a sparsity or ``drop_fraction`` is outside [0, 1], a step is no integer from 0
        on, ``end`` is before ``begin``, or nothing is prunable; at ``update``, params are missing
        or gradients are not like them.

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

    References:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020. There a dropped weight may grow back at once.
    """
    return _drop_and_grow(
        inner,
        user="rigl",
        grow=magnitude,
        start=magnitude if key is None else random,
        sparsity=sparsity,
        events=_decay("rigl", drop_fraction, begin, end, every),
        pattern=pattern,
        where=where,
        key=key,
        packed=packed,
    )


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
    where: Where = is_matrix,
    packed: bool = False,
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
      where: predicate of path and array: which leaves are prunable.
      packed: keep the masks as bits.

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
    return _drop_and_grow(
        inner,
        user="set",
        grow=random,
        start=random,
        sparsity=sparsity,
        events=_decay("set", drop_fraction, begin, end, every),
        pattern=pattern,
        where=where,
        key=key,
        packed=packed,
    )


def _drop_and_grow(
    inner: optax.GradientTransformation,
    *,
    user: str,
    grow: Criterion,
    start: Criterion,
    sparsity: Sparsity,
    events: Schedule,
    pattern: Pattern,
    where: Where,
    key: jax.Array | None,
    packed: bool,
) -> optax.GradientTransformationExtraArgs:
    check_inner(inner, user)
    check_sparsity(sparsity, user)
    check_parts(user, pattern=pattern, where=where)
    check_key(user, key)
    if isinstance(pattern, Coupled):
        raise ValueError(
            f"`{user}` grows what it drops within a leaf, and `Coupled` groups own parts of many "
            "leaves. Use `jp.prune` for them, or `pattern=jp.patterns.Channels(-1)` here."
        )
    if isinstance(sparsity, jax.core.Tracer):
        raise TypeError(
            f"`{user}` got a traced sparsity, which `jp.scopes.erk` cannot share out among the "
            "leaves. Pass a tree with one traced number for each leaf, or a plain number."
        )
    given_inner, inner = inner, optax.with_extra_args_support(inner)
    store = storage(packed)

    def first_masks(params: Params) -> Masks:
        if is_placeholder(params):
            return params
        _check_state(inner, params, user)
        chosen = moving(where, inner, params, user)
        given = (
            narrow(sparsity, prunable(params, where=chosen)) if chosen is not where else sparsity
        )
        return find(
            params,
            given if is_tree(sparsity) else erk(params, sparsity, where=chosen),
            {"key": key},
            criterion=start,
            pattern=pattern,
            scope=per_leaf,
            where=chosen,
            within=None,
        )

    def init(params: Params) -> PruneState:
        check_start(f"dynamic.{user}", params)
        state = PruneState(
            count=jnp.zeros([], jnp.int32),
            masks=store(first_masks(params)),
            inner_state=inner.init(params),
            criterion_state=(),
            key=None if key is None else jnp.copy(key),
        )
        if not is_placeholder(params):
            warn(user, state, params, by_default=by_default(where))
        return state

    def update(
        grads: optax.Updates, state: PruneState, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, PruneState]:
        check_update(state, params)
        check_extra(user, given_inner, extra)
        old = check_masks(unpack(state.masks), params, "masks")
        part = narrow(params, old)
        grads = check_grads(grads, params, part)
        key = None if state.key is None else jax.random.fold_in(state.key, state.count)
        updates, inner_state = inner.update(live(grads, old), state.inner_state, params, **extra)
        updates = map_leaves(enforce, updates, params, old)

        def renew(now: tuple[Masks, optax.Updates, optax.OptState]) -> Any:
            stored, updates, inner_state = now
            # From what the loop carries: the masks beside it would be copied at every step.
            old = check_masks(unpack(stored), params, "masks")
            moved = map_leaves(_moved, params, updates)
            new = drop_and_grow(
                old,
                worth=magnitude(narrow(moved, part)),
                promise=grow(narrow(grads, part), key=key),
                fraction=events(state.count),
                pattern=pattern,
            )
            grown = jax.tree.map(lambda n, o: n & ~o, new, old)
            fresh = inner.init(moved)
            # What grows was zero and stays so for now: no update but that of what is removed.
            return (
                store(new),
                map_leaves(enforce, updates, params, new),
                _reset(inner, inner_state, fresh, params, grown),
            )

        # All that an event changes goes through the loop. What were changed outside of it, fused
        # with the optimizer, would make XLA copy the moments at every step.
        stored = store(widen(state.masks, part, pattern))
        stored, updates, inner_state = if_due(
            events.due(state.count), renew, (stored, updates, inner_state)
        )
        new_state = PruneState(
            count=optax.safe_increment(state.count),
            masks=stored,
            inner_state=inner_state,
            criterion_state=(),
            key=state.key,
        )
        return updates, new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(param: jax.Array, update: jax.Array) -> jax.Array:
    """A weight after its update; also where the two types do not promote by themselves."""
    dtype = common(param.dtype, update.dtype)
    return (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)


def drop_and_grow(
    masks: Masks, *, worth: Scores, promise: Scores, fraction: Any, pattern: Pattern
) -> Masks:
    """Move a fraction of the kept units of each leaf: the worst ones to the most promising zeros.

    As many grow as are dropped, at most as many as were zero: the number kept stays the same.
    """
    move = functools.partial(_move, pattern=pattern)
    return in_auto_mode(move, masks, worth, promise, jnp.asarray(fraction), like=worth)


def _move(
    masks: Masks, worth: Scores, promise: Scores, fraction: jax.Array, *, pattern: Pattern
) -> Masks:
    alive, treedef = jax.tree.flatten(living(pattern, worth, masks))
    kept = [count_true(a) for a in alive]
    moving = [
        jnp.minimum(_floor(fraction, k), a.size - k) for k, a in zip(kept, alive, strict=True)
    ]
    each = tuple((i,) for i in range(len(alive)))
    stay = keep_largest(
        jax.tree.leaves(pattern.pool(worth)),
        [k - m for k, m in zip(kept, moving, strict=True)],
        each,
        alive,
    )
    grow = keep_largest(jax.tree.leaves(pattern.pool(promise)), moving, each, [~a for a in alive])
    staying = pattern.expand(jax.tree.unflatten(treedef, stay), like=worth)
    growing = pattern.expand(jax.tree.unflatten(treedef, grow), like=worth)
    return jax.tree.map(lambda old, s, g: (old & s) | g, masks, staying, growing)


def _floor(fraction: Any, n: jax.Array) -> jax.Array:
    # A little more than the product, so that half of 30 % of 100 is 15 and not 14.999999.
    # Above some ten thousand, float32 may be off by some millionth of the product either way.
    floor = jnp.floor(fraction * n.astype(jnp.float32) + 1e-3).astype(jnp.int32)
    return jnp.minimum(floor, n)


def _reset(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    fresh: optax.OptState,
    params: Params,
    grown: Masks,
) -> optax.OptState:
    """Give the moments of weights that have just grown the value that they start from."""
    where = optax.tree.map_params(
        inner,
        # The sums that adafactor keeps have another shape than the weight, and stay.
        lambda leaf, p, g: False if is_hole(leaf) or is_hole(g) or leaf.shape != p.shape else g,
        state,
        params,
        grown,
        transform_non_params=lambda _: False,
        is_leaf=is_hole,
    )
    return jax.tree.map(
        lambda leaf, first, g: leaf if g is False else jnp.where(g, first, leaf),
        state,
        fresh,
        where,
        is_leaf=is_hole,
    )


def _decay(user: str, drop_fraction: float, begin: int, end: int, every: int) -> Schedule:
    """From drop_fraction to 0 along a cosine, and when."""
    number = isinstance(drop_fraction, int | float | jax.Array | np.generic)
    if not number or is_bool(drop_fraction):
        raise TypeError(
            f"`{user}(drop_fraction={drop_fraction!r})` is no number. Pass one in [0, 1], such as "
            "0.3."
        )
    if not isinstance(drop_fraction, jax.core.Tracer) and not 0.0 <= drop_fraction <= 1.0:
        raise ValueError(
            f"`{user}(drop_fraction={drop_fraction!r})` is outside [0, 1]. It is the fraction of "
            "the kept weights that moves at the first event; 0.3 is common."
        )

    begin, end, every = as_step("begin", begin), as_step("end", end), as_step("every", every)

    def value(step: Any) -> jax.Array:
        time = jnp.clip((jnp.asarray(step) - begin) / max(end - begin, 1), 0.0, 1.0)
        return drop_fraction * 0.5 * (1.0 + jnp.cos(jnp.pi * time))

    return schedules.custom(value, begin, end, every)


def _check_state(inner: optax.GradientTransformation, params: Params, user: str) -> None:
    """Refuse an optimizer whose moments could not be reset, before anything has been trained."""
    state = jax.eval_shape(inner.init, params)
    histories: list[Any] = []

    def visit(leaf: Any, param: Any) -> Any:
        if not is_hole(leaf) and len(leaf.shape) > len(param.shape):
            histories.append(leaf)
        return leaf

    try:
        optax.tree.map_params(inner, visit, state, params, is_leaf=is_hole)
        why = "remembers several steps of each weight" if histories else ""
    except Exception as error:  # whatever an optimizer does with placeholders for its params
        why = f"cannot be mapped over the params ({type(error).__name__} in `map_params`)"
    if why:
        names = dict.fromkeys(
            type(node).__name__ for node in _nodes(state) if hasattr(node, "_fields")
        )
        raise TypeError(
            f"`{user}` resets the moments of weights that grow, but the state of this optimizer "
            f"({', '.join(names)}) {why}. Use a first-order one, such as `optax.adamw`, or prune "
            "with `jp.prune`, which needs no reset."
        )


def _nodes(tree: Any) -> list[Any]:
    """All tuples of a state, the outer ones first."""
    if not isinstance(tree, tuple):
        return []
    return [tree, *(node for child in tree for node in _nodes(child))]
