"""One skeleton for all that carries masks through training: a state, an init, an update."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxprune._advice import warn
from jaxprune._bits import Block
from jaxprune._checks import check_grads, check_inner, check_start, check_update
from jaxprune._masks import check_masks, pack_by, pack_like, unpack
from jaxprune._state import PruneState, is_placeholder, without_variables
from jaxprune._tree import Slot, narrow
from jaxprune.typing import Masks, Params, Schedule


class Step(NamedTuple):
    """What an update starts from, checked and aligned once a trace.

    Attributes:
      grads: gradients like ``params``, None where they may be missing.
      params: all params.
      state: as it came in.
      masks: those of ``state``, unpacked, like ``params``.
      part: the params that have a mask, None elsewhere.
      extra: further arguments of the update, by name.
    """

    grads: optax.Updates
    params: Params
    state: PruneState
    masks: Masks
    part: Params
    extra: dict[str, Any]


class Done(NamedTuple):
    """What a step came to.

    Attributes:
      updates: for ``optax.apply_updates``.
      masks: those of the new state, as ``store`` puts them.
      inner_state: of the wrapped optimizer.
      memory: what a criterion remembers.
    """

    updates: optax.Updates
    masks: Masks
    inner_state: optax.OptState
    memory: Any


class First(NamedTuple):
    """What a state starts from.

    Attributes:
      masks: like the params.
      memory: what a criterion remembers.
      block_of: says of a leaf how many weights share a bit along each axis.
    """

    masks: Masks
    memory: Any = ()
    block_of: Callable[[Slot], Block] = lambda slot: ()


Inner: TypeAlias = optax.GradientTransformationExtraArgs


class Store(Protocol):
    """Puts masks into the form in which they lie in the state."""

    def __call__(self, masks: Masks, like: Masks) -> Masks:
        """Pack them as those that lie there now are, or leave them as they are."""


def wrap(
    user: str,
    inner: optax.GradientTransformation,
    *,
    first: Callable[[Params], First],
    step: Callable[[Inner, Step, Store], Done],
    key: jax.Array | None = None,
    packed: bool = False,
    schedule: Schedule | None = None,
    by_default: bool = False,
    dense: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Put masks around an optimizer.

    Args:
      user: the public wrapper, for messages.
      inner: any optax optimizer.
      first: from params to what the state starts from.
      step: what one update does, given the inner optimizer, where it starts, and how masks lie.
      key: kept in the state.
      packed: keep the masks as bits.
      schedule: told to who warns of a new state; likewise ``by_default`` (leaves were chosen by
        the default ``where``) and ``dense`` (masks keep all and may be meant to be replaced).
      by_default: see there.
      dense: see there.
    """
    check_inner(inner, user)
    inner = optax.with_extra_args_support(inner)

    # Bits have no nnx variables around them: `nnx.Optimizer` gives it a variable for each array,
    # and what it keeps of a node inside of a variable is no node any more.
    def begin(start: First) -> Masks:
        return pack_by(without_variables(start.masks), start.block_of) if packed else start.masks

    def store(masks: Masks, like: Masks) -> Masks:
        return pack_like(without_variables(masks), like) if packed else masks

    def init(params: Params) -> PruneState:
        check_start(user, params)
        start = first(params)
        state = PruneState(
            count=jnp.zeros([], jnp.int32),
            masks=begin(start),
            inner_state=inner.init(params),
            criterion_state=start.memory,
            key=None if key is None else jnp.copy(key),
        )
        if not is_placeholder(params):
            warn(user, state, params, schedule=schedule, by_default=by_default, dense=dense)
        return state

    def update(
        updates: optax.Updates, state: PruneState, params: Params | None = None, **extra: Any
    ) -> tuple[optax.Updates, PruneState]:
        check_update(state, params)
        masks = check_masks(unpack(state.masks), params, "masks")
        part = narrow(params, masks)
        grads = check_grads(updates, params, part)
        done = step(inner, Step(grads, params, state, masks, part, extra), store)
        return done.updates, state._replace(
            count=optax.safe_increment(state.count),
            masks=done.masks,
            inner_state=done.inner_state,
            criterion_state=done.memory,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def at_most_once(due: Any, renew: Callable[[Any], Any], stored: Any) -> Any:
    """Renew what is stored if it is due, else pass it on.

    A loop of at most one round instead of a conditional: XLA passes what does not change through
    a loop without copying it, and under vmap it still skips the search.
    """
    due = jnp.asarray(due, bool)

    def once(loop: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        return jnp.zeros_like(loop[0]), renew(loop[1])

    return lax.while_loop(lambda loop: loop[0], once, (due, stored))[1]
