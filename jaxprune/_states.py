"""Masks inside of optimizer states: found however deep they are, merged, and put in."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._errors import check_living
from jaxprune._masks import (
    blocks_in,
    check_masks,
    is_packed,
    pack_by,
    torn_blocks,
    unpack,
)
from jaxprune._state import PruneState, without_variables
from jaxprune._tree import align, is_hole, leaves_by_keys, list_paths
from jaxprune._values import is_concrete
from jaxprune.typing import Leaf, Masks, Tree


def get_masks(opt_state: optax.OptState) -> Masks:
    """Find the masks in an optimizer state, however deep they are nested.

    Several pruners, each in its part of ``optax.partition`` or ``optax.masked``, give one tree.

    Args:
      opt_state: state of an optimizer that ``prune``, ``hold``, ``straight_through`` or one of
        ``dynamic`` is part of.

    Returns:
      The masks, unpacked and without nnx variables around them. They are copies: donating the
      state does not take them away. A hole may stand for a subtree that no pruner sees.

    Raises:
      ValueError: there is no pruner in the state, or two of them have masks for the same leaf.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = optax.chain(optax.clip(1.0), jp.hold(optax.adam(0.1)))
      >>> jp.get_masks(tx.init({"kernel": jnp.zeros((1, 2))}))
      {'kernel': Array([[ True,  True]], dtype=bool)}
    """
    held = [state.masks for state in _the_pruners(opt_state)]
    for masks in held:
        check_living(without_variables(masks), "opt_state")
    found = list(map(_plain, held))
    return jax.tree.map(jnp.copy, functools.reduce(_merge, found))


def with_masks(opt_state: optax.OptState, masks: Masks) -> optax.OptState:
    """Put masks into an optimizer state, however deep it is nested.

    Args:
      opt_state: state of an optimizer that ``prune``, ``hold``, ``straight_through`` or one of
        ``dynamic`` is part of. Of several pruners each takes the masks of its part.
      masks: masks like the params; copied, so that donating the state does not take them away.

    Returns:
      The same state with these masks in force from the next update on.

    Raises:
      ValueError: the masks do not mirror those of the state, name leaves that no pruner sees, or
        there is no pruner, or two of them have masks for the same leaf; or the state has one bit
        for each block, and a mask keeps a part of one.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> state = jp.hold(optax.sgd(0.1)).init({"kernel": jnp.zeros((1, 2))})
      >>> jp.get_masks(jp.with_masks(state, {"kernel": jnp.array([[True, False]])}))
      {'kernel': Array([[ True, False]], dtype=bool)}
    """
    pruners = _the_pruners(opt_state)
    new = [_share(state.masks, masks) for state in pruners]
    taken = {keys for share in new for keys in leaves_by_keys(unpack(share))}
    unseen = ["/".join(keys) for keys in leaves_by_keys(unpack(masks)) if keys not in taken]
    if unseen:
        raise ValueError(
            f"`with_masks` got masks for {list_paths(unseen)}, which no pruner of this state sees: "
            "`optax.masked` or `optax.partition` keeps them from it. Leave them out (None)."
        )
    given = iter(new)
    return jax.tree.map(
        lambda node: node._replace(masks=next(given)) if is_pruner(node) else node,
        opt_state,
        is_leaf=is_pruner,
    )


def is_pruner(node: Leaf) -> bool:
    """True for the state of a pruner: for ``is_leaf``."""
    return isinstance(node, PruneState)


def pruners(opt_state: optax.OptState) -> list[PruneState]:
    """All states of pruners, an outer one before those that are nested in it."""
    nodes = jax.tree.leaves(opt_state, is_leaf=is_pruner)
    outer = [node for node in nodes if is_pruner(node)]
    return outer + [inner for node in outer for inner in pruners(node.inner_state)]


def _the_pruners(opt_state: optax.OptState) -> list[PruneState]:
    """The pruners of a state; at least one, and each leaf is masked by one of them alone."""
    found = pruners(opt_state)
    if not found:
        raise ValueError(
            "The optimizer state holds 0 pruners, want one. Pass the state of an optimizer wrapped "
            "by `jp.prune`, `jp.hold` and the like."
        )
    seen: set[Any] = set()
    for state in found:
        mine = set(leaves_by_keys(_plain(state.masks)))
        if mine & seen:
            both = sorted("/".join(keys) for keys in mine & seen)
            raise ValueError(
                f"The optimizer state holds {len(found)} pruners, want one for each leaf, but "
                f"several mask {list_paths(both)}. Wrap the optimizer once, or pass the part of "
                "the state that belongs to one of them."
            )
        seen |= mine
    return found


def _plain(masks: Masks) -> Masks:
    """Masks unpacked and without nnx variables around them."""
    return unpack(without_variables(masks))


def _merge(a: Tree, b: Tree) -> Any:
    """Put two trees of masks together, of which each has holes where the other has masks."""
    if is_hole(a) or is_hole(b):
        return b if is_hole(a) else a
    (left, treedef), (right, _) = _children(a), _children(b)
    return jax.tree.unflatten(treedef, [_merge(x, y) for x, y in zip(left, right, strict=True)])


def _children(node: Leaf) -> tuple[list[Leaf], Any]:
    """A node taken apart by one level."""
    return jax.tree.flatten(node, is_leaf=lambda x: x is not node)


def _share(old: Masks, masks: Masks) -> Masks:
    """The masks that a pruner takes of those given: checked, copied and stored as its own are."""
    shapes = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, bool), old, is_leaf=is_packed)
    mirror = align(masks, shapes)
    if mirror is not None:
        mirror = jax.tree.map(
            lambda mine, new: mine if isinstance(mine, optax.MaskedNode) else new,
            shapes,
            mirror,
            is_leaf=is_hole,
        )
    like = shapes if mirror is None else jax.tree.map(_fit, shapes, mirror, is_leaf=is_hole)
    mirror = check_masks(masks if mirror is None else mirror, like, "masks")
    return _stored_like(old, jax.tree.map(jnp.copy, mirror))


def _stored_like(old: Masks, masks: Masks) -> Masks:
    """Pack masks if the old ones are, in their blocks, each array in an nnx variable if those are.

    Inside of a trace nobody can tell whether masks are constant within blocks, and each weight gets
    a bit of its own.
    """
    bits = [m.bits for m in jax.tree.leaves(old, is_leaf=is_packed) if is_packed(m)]
    if not bits:
        return masks
    blocks = blocks_in(old) if is_concrete(masks) else {}
    block_of = lambda slot: blocks.get(slot.keys, ())  # noqa: E731
    if torn := torn_blocks(masks, block_of):
        raise ValueError(
            f"`with_masks` got masks that keep a part of a block at {list_paths(torn)}, where this "
            "state has one bit for each block. Find them with the pattern of the optimizer, or "
            "make it with `packed=False`."
        )
    wrapping = jax.tree.structure(bits[0])
    return jax.tree.map(
        lambda m: m._replace(bits=jax.tree.unflatten(wrapping, [m.bits])),
        pack_by(masks, block_of),
        is_leaf=is_packed,
    )


def _fit(old: Tree, new: Tree) -> Any:
    """What a new mask has to fit: the old one, widened where either stands for a whole axis."""
    if is_hole(old) or is_hole(new):
        return new
    if len(old.shape) != jnp.ndim(new):
        return old
    shape = tuple(b if a == 1 else a for a, b in zip(old.shape, new.shape, strict=True))
    return jax.ShapeDtypeStruct(shape, bool)
