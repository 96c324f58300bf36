"""Checks of what an optimizer wrapper is handed: at the call, at ``init``, at ``update``."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._evidence import check_names
from jaxprune._state import PruneState, without_variables
from jaxprune._tree import align, mirrored, narrow
from jaxprune.criteria import magnitude
from jaxprune.typing import Criterion, Params


def check_extra(user: str, inner: Any, extra: Any, criterion: Criterion = magnitude) -> None:
    """Refuse keywords of an update that nobody knows, unless the optimizer might."""
    if not isinstance(inner, optax.GradientTransformationExtraArgs):
        check_names(f"{user}(...).update", criterion, extra, ("value", "grad", "value_fn"))


def check_inner(inner: Any, user: str) -> None:
    """Refuse to wrap what is no optimizer."""
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"`{user}` wraps an optax optimizer, but got {inner!r}. Pass one, such as "
            "`optax.adam(1e-3)`."
        )


def check_grads(grads: Params, params: Params, part: Params) -> Params:
    """Give gradients the structure of the params, or say by path how they differ."""
    mirror = align(grads, params)
    if mirror is not None:
        _check_per_example(narrow(mirror, part), part)
    if mirror is None:
        return mirrored(grads, params, "grads")  # which says what is missing
    mirrored(narrow(mirror, part), part, "grads")  # whatever else may be None, these are needed
    return mirror


def _check_per_example(grads: Params, part: Params) -> None:
    """Refuse a gradient for each example with what takes them."""
    shapes = [jnp.shape(g) for g in jax.tree.leaves(grads)]
    wanted = [p.shape for p in jax.tree.leaves(part)]
    if wanted and [s[1:] for s in shapes if s] == wanted and shapes != wanted:
        raise ValueError(
            f"`grads` have a leading axis of {shapes[0][0]} that the params do not have: gradients "
            "of single examples, as `optax.contrib.dpsgd` takes them. Let them be averaged before "
            "the pruner: `optax.chain(optax.contrib.differentially_private_aggregate(...), "
            "jp.prune(optax.sgd(...), ...))`."
        )


def check_start(user: str, params: Params) -> None:
    """Refuse the pair of params that ``optax.lookahead`` trains."""
    if isinstance(params, optax.LookaheadParams):
        raise ValueError(
            f"`{user}` got the fast and the slow params of `optax.lookahead`, but gradients are "
            f"for the fast ones alone. Put it inside, `optax.lookahead(jp.{user}(...), ...)`, and "
            "mask both after each step, or each synchronization brings weights back: `params = "
            "optax.LookaheadParams(*(jp.apply_masks(p, jp.get_masks(state)) for p in params))`."
        )


def check_update(state: Any, params: Params | None, kind: type = PruneState) -> None:
    """Refuse an update without params, or with something else in the place of the state."""
    if not isinstance(state, kind):
        raise TypeError(
            f"`tx.update` got a {type(state).__name__} in the place of the state, a "
            f"`{kind.__name__}` that `tx.init(params)` makes. The order is "
            "`tx.update(grads, state, params)`."
        )
    inside: Any = getattr(state, "masked", state)  # what straight_through wraps
    masks = without_variables(inside.masks)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(masks)} - {"bool", "uint8"}
    if kinds:
        raise TypeError(
            f"The masks in the state have become {', '.join(sorted(kinds))}: something around the "
            "pruner blends its old and its new state by arithmetic, as `optax.contrib.sam` and "
            "`optax.lookahead(reset_state=True)` do, and zeros would not stay exact. Let the "
            "pruner be the outermost, `jp.prune(optax.contrib.sam(...), ...)`; sam with "
            "`opaque_mode=True` may be around it."
        )
    if params is None:
        raise ValueError(
            "`tx.update(grads, state)` was called without params, but masks are made from them and "
            "act on them. Call `tx.update(grads, state, params)`."
        )
