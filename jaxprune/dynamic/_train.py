"""Training at one sparsity while masks move: what RigL and SET share."""

import functools
from typing import Any

import jax
import optax

from jaxprune._checks import check_extra, check_inner
from jaxprune._enforce import common, enforce, live
from jaxprune._errors import check_key, check_sparsity
from jaxprune._find import find
from jaxprune._frozen import moving
from jaxprune._masks import check_masks, unpack
from jaxprune._numbers import is_tree
from jaxprune._parts import Parts
from jaxprune._pruner import widen
from jaxprune._state import is_placeholder
from jaxprune._tree import map_leaves, narrow, prunable
from jaxprune._where import by_default
from jaxprune._wrap import Done, Inner, Step, Store, at_most_once, wrap
from jaxprune.criteria import magnitude
from jaxprune.dynamic._drop_and_grow import drop_and_grow
from jaxprune.dynamic._moments import check_moments, reset_moments
from jaxprune.scopes import erk, per_leaf
from jaxprune.typing import Criterion, Masks, Params, Pattern, Schedule, Sparsity, Where


def sparse_training(
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
    """Wrap an optimizer so that at an event units are dropped by size and grown by ``grow``.

    Args:
      inner: an optax optimizer whose moments can be mapped over the params.
      user: the public wrapper, for messages.
      grow: scores gradients; may ask for ``key``.
      start: scores the weights for the first masks; may ask for ``key``.
      sparsity: a number, shared out by ``erk``, or a tree of numbers.
      events: what fraction of the kept units moves, and when.
      pattern: what moves together; units lie within a leaf.
      where: which leaves are prunable.
      key: for the two criteria.
      packed: keep the masks as bits.
    """
    check_inner(inner, user)
    check_sparsity(sparsity, user)
    parts = Parts(user, start, pattern, per_leaf, where)
    check_key(user, key)
    _check_parts(parts, sparsity)

    settings: dict[str, Any] = {"grow": grow, "fraction": events}

    def first(params: Params) -> tuple[Masks, Any]:
        if is_placeholder(params):
            return params, ()
        check_moments(inner, params, user)
        chosen = moving(where, inner, params, user)
        frozen = chosen is not where
        given = narrow(sparsity, prunable(params, where=chosen)) if frozen else sparsity
        each = given if is_tree(given) else erk(params, given, where=chosen)
        return find(Parts(user, start, pattern, per_leaf, chosen), params, each, {"key": key}), ()

    def step(optimizer: Inner, now: Step, store: Store) -> Done:
        check_extra(user, inner, now.extra)
        params, count = now.params, now.state.count
        folded = None if now.state.key is None else jax.random.fold_in(now.state.key, count)
        grads = live(now.grads, now.masks)
        updates, moments = optimizer.update(grads, now.state.inner_state, params, **now.extra)
        updates = map_leaves(enforce, updates, params, now.masks)

        bound = parts.bind(now.part)
        renew = functools.partial(
            _event, now=now, key=folded, optimizer=optimizer, store=store, parts=bound, **settings
        )
        # All that an event changes goes through the loop. What were changed outside of it, fused
        # with the optimizer, would make XLA copy the moments at every step.
        stored = store(widen(now.state.masks, now.part, bound.pattern))
        loop = at_most_once(events.due(count), renew, (stored, updates, moments))
        stored, updates, moments = loop
        return Done(updates, stored, moments, ())

    return wrap(
        f"dynamic.{user}",
        inner,
        first=first,
        step=step,
        key=key,
        packed=packed,
        by_default=by_default(where),
    )


def _event(
    loop: tuple[Masks, optax.Updates, optax.OptState],
    *,
    now: Step,
    key: jax.Array | None,
    optimizer: Inner,
    store: Store,
    grow: Criterion,
    fraction: Schedule,
    parts: Parts,
) -> tuple[Masks, optax.Updates, optax.OptState]:
    """Move masks after the inner update: what they, the updates and the moments become."""
    stored, updates, moments = loop
    params, part = now.params, now.part
    # From what the loop carries: the masks beside it would be copied at every step.
    old = check_masks(unpack(stored), params, "masks")
    moved = map_leaves(_moved, params, updates)
    new = drop_and_grow(
        old,
        worth=magnitude(narrow(moved, part)),
        promise=grow(narrow(now.grads, part), key=key),
        fraction=fraction(now.state.count),
        parts=parts,
    )
    grown = jax.tree.map(lambda n, o: n & ~o, new, old)
    fresh = optimizer.init(moved)
    # What grows was zero and stays so for now: no update but that of what is removed.
    return (
        store(new),
        map_leaves(enforce, updates, params, new),
        reset_moments(optimizer, moments, fresh, params, grown),
    )


def _check_parts(parts: Parts, sparsity: Sparsity) -> None:
    if parts.crosses_leaves:
        name = type(parts.pattern).__name__
        raise ValueError(
            f"`{parts.user}` grows what it drops within a leaf, and `{name}` groups own parts of "
            "many leaves. Use `jp.prune` for them, or `pattern=jp.patterns.Channels(-1)` here."
        )
    if isinstance(sparsity, jax.core.Tracer):
        raise TypeError(
            f"`{parts.user}` got a traced sparsity, which `jp.scopes.erk` cannot share out among "
            "the leaves. Pass a tree with one traced number for each leaf, or a plain number."
        )


def _moved(param: jax.Array, update: jax.Array) -> jax.Array:
    """A weight after its update; also where the two types do not promote by themselves."""
    dtype = common(param.dtype, update.dtype)
    return (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)
