"""Training at one sparsity while masks move: what RigL and SET share."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._checks import check_extra, check_inner
from jaxprune._enforce import common, enforce, live
from jaxprune._errors import check_key, check_sparsity, short
from jaxprune._find import find
from jaxprune._frozen import Moving, moving
from jaxprune._layout import Layout
from jaxprune._masks import check_masks, is_packed, unpack
from jaxprune._mesh import in_auto_mode, is_explicit
from jaxprune._numbers import is_tree
from jaxprune._parts import Parts, declared
from jaxprune._pruner import as_tree, lazy_masks, widen
from jaxprune._ranking import Lazy, is_lazy, read
from jaxprune._state import is_placeholder
from jaxprune._tree import map_leaves, narrow
from jaxprune._where import by_default, everything, with_layout
from jaxprune._wrap import Done, First, Inner, Step, Store, at_most_once, wrap
from jaxprune.dynamic._drop_and_grow import Moves, drop_and_grow
from jaxprune.dynamic._moments import check_moments, reset_moments
from jaxprune.scopes import erk
from jaxprune.typing import (
    Criterion,
    Masks,
    Params,
    Pattern,
    Schedule,
    Scope,
    Scores,
    Sparsity,
    Where,
)


def sparse_training(
    inner: optax.GradientTransformation,
    *,
    user: str,
    promise: Callable[[Params, jax.Array | None], Scores],
    start: Criterion,
    sparsity: Sparsity,
    events: Schedule,
    pattern: Pattern,
    scope: Scope,
    where: Where,
    key: jax.Array | None,
    packed: bool,
    layout: Layout | None = None,
    at_random: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an optimizer so that at an event units are dropped by size and grown by ``grow``.

    Args:
      inner: an optax optimizer whose moments can be mapped over the params.
      user: the public wrapper, for messages.
      promise: from gradients, and a key, to lazy scores of what may grow.
      start: scores the weights for the first masks; may ask for ``key``.
      sparsity: a number, shared out by ``erk``, or a tree of numbers.
      events: what fraction of the kept units moves, and when.
      pattern: what moves together; units lie within a leaf.
      scope: which units of a leaf compete; one that says ``apart``.
      where: which leaves are prunable.
      key: for the two criteria.
      packed: keep the masks as bits.
      layout: what each axis means.
      at_random: whether ``promise`` draws.
    """
    check_inner(inner, user)
    check_sparsity(sparsity, user)
    parts = Parts(user, start, pattern, scope, where, layout)
    check_key(user, key)
    _check_parts(parts, sparsity)

    def first(params: Params) -> First:
        if is_placeholder(params):
            return First(params)
        check_moments(inner, params, user)
        chosen = _chosen(parts, inner, params)
        each = _each(chosen, params, sparsity, narrowed=isinstance(chosen.where, Moving))
        masks = find(chosen, params, each, {"key": key})
        return First(masks, block_of=chosen.bind(params).block_of)

    def step(optimizer: Inner, now: Step, store: Store) -> Done:
        check_extra(user, inner, now.extra)
        params, count = now.params, now.state.count
        folded = None if now.state.key is None else jax.random.fold_in(now.state.key, count)
        grads, old = live(now.grads, now.masks), now.masks
        updates, moments = optimizer.update(grads, now.state.inner_state, params, **now.extra)
        updates = map_leaves(enforce, updates, params, old)
        moved = map_leaves(_moved, params, updates)

        scores = (
            map_leaves(_worth, now.part, narrow(updates, now.part)),
            promise(narrow(now.grads, now.part), folded),
            events(count),
        )
        # What has a mask has been chosen before, whatever `where` says of it alone.
        bound = dataclasses.replace(parts, where=everything).bind(now.part)
        event = _Event(scores, events.due(count), now.part, bound, at_random)
        stored = event.renewed(now.state.masks, store)
        masks = check_masks(unpack(stored), params, "masks")
        # Elementwise at every step, beside what the optimizer does anyway: updates and moments that
        # went through the loop of the event would be copied for it.
        grown = jax.tree.map(lambda new, was: new & ~was, masks, old)
        moments = reset_moments(optimizer, moments, optimizer.init(moved), params, grown)
        # What grows was zero and stays so for now: no update but that of what is removed.
        return Done(map_leaves(enforce, updates, params, masks), stored, moments, ())

    return wrap(
        f"dynamic.{user}",
        inner,
        first=first,
        step=step,
        key=key,
        packed=packed,
        by_default=by_default(where),
    )


def _chosen(parts: Parts, inner: optax.GradientTransformation, params: Params) -> Parts:
    """The parts without what the inner optimizer freezes, the layout settled on the params."""
    known = None if parts.layout is None else parts.layout.on(params, parts.user)
    asked = with_layout(parts.where, known)
    where = moving(asked, inner, params, parts.user)
    return dataclasses.replace(parts, where=where, layout=known)


def _each(parts: Parts, params: Params, sparsity: Sparsity, *, narrowed: bool) -> Sparsity:
    """A sparsity for each leaf; a tree that is given may have numbers for frozen leaves, too."""
    if not is_tree(sparsity):
        return erk(params, sparsity, where=parts.where, layout=parts.layout)
    return narrow(sparsity, parts.prunable(params)) if narrowed else sparsity


class _Event(NamedTuple):
    """Masks that move, if there is an event.

    Attributes:
      scores: lazy ones of what is kept and of what may grow, and the fraction that moves.
      due: bool `[]`.
      part: the prunable leaves.
      parts: bound to them.
      at_random: whether what may grow is drawn, at every pass of a search over it.
    """

    scores: tuple[Scores, Scores, jax.Array]
    due: jax.Array
    part: Params
    parts: Parts
    at_random: bool

    def renewed(self, masks: Masks, store: Store) -> Masks:
        """Give what becomes of masks, in the form of the state; ``masks`` as they lie in it."""
        stored = store(widen(masks, self.part, self.parts), masks)
        before, within = partial(self._before, store), partial(self._within, store)
        if is_explicit(self.part) or not self.parts.of_weights:
            return within(stored)
        if not self.at_random:
            return before(stored)
        # Draws cost a CPU more than what it reads: there they are made once, and stored.
        return jax.lax.platform_dependent(stored, cpu=within, default=before)

    def _before(self, store: Store, stored: Masks) -> Masks:
        """Search before the loops, which have nothing left but to compare.

        One loop a leaf, so that what a leaf needs for it is free again when the next one comes.
        """
        masks = lazy_masks(stored, self.part, unpack)
        moves = drop_and_grow(
            masks, *self.scores, like=self.part, parts=self.parts, due=jnp.asarray(self.due)
        )
        leaves, treedef = jax.tree.flatten(stored, is_leaf=is_packed)
        after: Any = [x for x in jax.tree.leaves(moves) if x.ndim <= 1]  # thresholds
        new = []
        for mask, stay, grow in zip(leaves, *map(_lazy_leaves, moves), strict=True):
            tied, _ = jax.lax.optimization_barrier((mask, after))
            after = at_most_once(self.due, partial(_compare, Moves(stay, grow), store), tied)
            new.append(after)
        return jax.tree.unflatten(treedef, new)

    def _within(self, store: Store, stored: Masks) -> Masks:
        """Do all of it in the loop of the event, with scores that are stored."""

        def move(masks: Masks, part: Params, *scores: Any) -> Masks:
            here = jax.tree.map(read, scores, is_leaf=is_lazy)
            return drop_and_grow(masks, *here, like=part, parts=self.parts).of(masks)

        def move_all(stored: Masks) -> Masks:
            masks = as_tree(unpack(stored), self.part)
            moved = in_auto_mode(move, masks, self.part, *self.scores, like=self.part)
            return store(as_tree(moved, unpack(stored)), stored)

        return at_most_once(self.due, move_all, stored)


def _lazy_leaves(tree: Masks) -> list[Lazy]:
    return jax.tree.leaves(tree, is_leaf=is_lazy)


def _compare(moves: Moves, store: Store, stored: Masks) -> Masks:
    return store(moves.of(unpack(stored)), stored)


def _worth(weight: jax.Array, update: jax.Array) -> Lazy:
    """The size of a weight after its update."""
    return Lazy((weight, update), _size, weight.dtype)


def _size(weight: jax.Array, update: jax.Array) -> jax.Array:
    return jnp.abs(_moved(weight, update))


def _check_parts(parts: Parts, sparsity: Sparsity) -> None:
    # What `partial` binds, such as mesh axes to rank over, a scope would mind and drops not.
    if isinstance(parts.scope, partial) or declared(parts.scope, "apart") is None:
        name = getattr(parts.scope, "__name__", None) or short(parts.scope)
        raise ValueError(
            f"`{parts.user}` grows what it drops among the same competitors inside of a leaf, and "
            f"`{name}` does not say who they are (`jp.typing.WithinLeaf`). Use `scope=jp.scopes."
            "per_leaf` or `per_output` here, or `jp.prune`, which takes any scope."
        )
    if parts.crosses_leaves:
        name = type(parts.pattern).__name__
        raise ValueError(
            f"`{parts.user}` grows what it drops within a leaf, and `{name}` groups own parts of "
            "many leaves. Use `jp.prune` for them, or `pattern=jp.patterns.Channels(-1)` here."
        )
    parts.check(sparsity, exact=False)
    if isinstance(sparsity, jax.core.Tracer):
        raise TypeError(
            f"`{parts.user}` got a traced sparsity, which `jp.scopes.erk` cannot share out among "
            "the leaves. Pass a tree with one traced number for each leaf, or a plain number."
        )


def _moved(param: jax.Array, update: jax.Array) -> jax.Array:
    """A weight after its update; also where the two types do not promote by themselves."""
    dtype = common(param.dtype, update.dtype)
    return (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)
