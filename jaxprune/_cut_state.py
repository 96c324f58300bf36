"""What masks removed is cut out of the optimizer's state, to go on training the small network."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._bits import Block
from jaxprune._kept import layer_axis
from jaxprune._masks import blocks_in, is_packed, is_torn, pack_by, unpack
from jaxprune._pruner import pruners_in
from jaxprune._state import PruneState, without_variables
from jaxprune._states import is_pruner, pruners
from jaxprune._straight_through import StraightThroughState
from jaxprune._tree import (
    Slot,
    is_array,
    is_hole,
    leaves_with_path,
    list_paths,
    map_with_path,
    slots,
)
from jaxprune._values import is_concrete
from jaxprune.graph._take import take_kept
from jaxprune.typing import Leaf, Params, Tree

_OF_A_CUT = '; `cut.at("params")` of a cut.'


def cut_state(
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    whole: Params,
    small: Params,
    places: Callable[[str, tuple[int, ...]], "Place"],
    *,
    user: str = "shrink_state",
) -> optax.OptState:
    """Cut an optimizer state as the params were cut: what ``Cut.state`` does, told there.

    Args:
      tx: the optimizer to go on with.
      opt_state: the state for the whole params.
      whole: the whole params or their shapes, without variables around them.
      small: the same once they are cut.
      places: what to keep of a parameter of a path and shape.
      user: the public function, for messages.
    """
    if hasattr(opt_state, "opt_state"):
        raise TypeError(
            f"`{user}` got a {type(opt_state).__name__} instead of an optimizer state. Pass "
            "its `opt_state`, and `nnx.state(model, nnx.Param)` as params."
        )
    _refuse_events(tx, opt_state, user)
    beside = map_with_path(lambda path, leaf: places(path, jnp.shape(leaf)), whole)
    opt_state = adopted(tx, opt_state, whole)
    given = without_variables(opt_state)
    old = jax.tree.map(_unpacked, given, is_leaf=is_pruner)
    try:
        cut = optax.tree.map_params(tx, _cut_beside, old, beside, is_leaf=lambda _: True)
    except CannotCutError:
        raise
    except ValueError as error:
        raise ValueError(
            f"`{user}` got the state of another tree than its params, which have "
            f"{list_paths([path for path, _ in leaves_with_path(whole)])}. Pass `tx` as it made "
            "the state (or `jp.hold` of the same optimizer), and the tree that `tx.init` got with "
            'the masks of this tree: `variables["params"]` and `masks["params"]`, mostly'
            f"{_OF_A_CUT if user == 'shrink_state' else '.'}"
        ) from error
    cut = _settled(tx, jax.tree.map(_packed_like, given, cut, is_leaf=is_pruner), small)
    return _as_given(opt_state, cut)


def _refuse_events(tx: optax.GradientTransformation, opt_state: optax.OptState, user: str) -> None:
    """Refuse a pruner that would prune again: its groups and shares are those of the whole."""
    ends = [pruner.schedule.end for pruner in pruners_in(tx) if hasattr(pruner.schedule, "end")]
    counts = [node.count for node in pruners(without_variables(opt_state))]
    done = min((int(jnp.min(jnp.asarray(count))) for count in counts), default=0)
    if ends and done <= max(ends):
        raise ValueError(
            f"`{user}` got a pruner with events to come: its schedule ends at update "
            f"{max(ends)}, and {done} were made. It would look for groups of the whole network and "
            "take the same share of what is left once more. Go on with `tx = jp.hold(inner)`, "
            f"whose state is `jp.{user}(tx, opt_state, params, masks)`."
        )


def _cut_beside(value: Tree, places: Tree) -> Tree:
    """Cut what an optimizer keeps in the place of the params."""
    treedef: Any = jax.tree.structure(places)
    try:
        parts = treedef.flatten_up_to(value)
    except ValueError:  # one hole in the place of several params
        return jax.tree.map(_cut_one, value, places, is_leaf=is_hole)
    return treedef.unflatten(map(_cut_one, parts, jax.tree.leaves(places)))


def _cut_one(part: Any, place: "Place") -> Tree:
    """Cut what an optimizer keeps beside one parameter: an array, mostly like it."""
    if is_hole(part):
        return part
    if isinstance(part, list | tuple):  # one vector for each axis, in sm3
        vectors = [place.along(axis) for axis in range(len(place.shape))]
        return type(part)(map(_cut_one, part, vectors)) if len(part) == len(vectors) else part
    if not is_array(part):
        return part
    if part.ndim == len(place.shape) - 1:  # adafactor sums over one axis
        place = place.summed(part.shape)
    return place.take(part) if part.ndim == len(place.shape) else part


def adopted(tx: optax.GradientTransformation, state: Tree, params: Params) -> Tree:
    """Let ``hold`` take over from a pruner: all that it needs are the masks."""

    def adopt(want: Tree, got: Tree) -> Any:
        got = got.masked if isinstance(got, StraightThroughState) and is_pruner(want) else got
        if not (is_pruner(want) and is_pruner(got)):
            return got
        memory = got.criterion_state if jax.tree.leaves(want.criterion_state) else ()
        return got._replace(criterion_state=memory, key=None if want.key is None else got.key)

    try:
        return jax.tree.map(adopt, jax.eval_shape(tx.init, params), state, is_leaf=is_pruner)
    except ValueError:  # which is told below
        return state


def _settled(tx: optax.GradientTransformation, state: Tree, small: Params) -> Tree:
    """Give masks the shape that the optimizer makes; refuse what it would have made otherwise."""
    try:
        fresh = jax.eval_shape(tx.init, small)
    except ValueError:  # a pruner around it has the groups of the whole params
        return state
    try:
        state = jax.tree.map(_settle_masks, fresh, state, is_leaf=is_pruner)
    except ValueError as error:
        raise CannotCutError(
            "For the small params this optimizer keeps a state of another structure: the shape of "
            "an array decides what it does with it, as in Muon. Start anew: "
            "`tx.init(small_params)`, with masks of your own in the place of what looks at shapes."
        ) from error
    leaves = leaves_with_path(_without_masks(fresh))
    for (path, want), got in zip(leaves, jax.tree.leaves(_without_masks(state)), strict=True):
        if want.shape != jnp.shape(got):
            raise ValueError(
                f"The state at {path!r} has shape {jnp.shape(got)} once it is cut, but "
                f"for the small params the optimizer keeps one of {want.shape}. Start anew: "
                "`tx.init(small_params)`."
            )
    return state


def _settle_masks(want: Tree, got: Tree) -> Tree:
    if not is_pruner(want):
        return got
    packed = any(map(is_packed, jax.tree.leaves(want.masks, is_leaf=is_packed)))
    masks = dict(leaves_with_path(unpack(got.masks)))
    like = jax.eval_shape(unpack, want.masks)
    new = jax.tree.unflatten(
        jax.tree.structure(like, is_leaf=is_hole),
        [_settle(slot.leaf, masks.get(slot.path)) for slot in slots(like)],
    )
    if not packed:
        return got._replace(masks=new)
    return got._replace(masks=_packed(new, blocks_in(want.masks) | blocks_in(got.masks)))


def _settle(want: Tree, mask: Any) -> Tree:
    """A mask as ``want`` has it: none where nothing is removed, dense where there was none."""
    if is_hole(want):
        return want if mask is None or bool(jnp.all(mask)) else mask
    return jnp.broadcast_to(True if mask is None else mask, want.shape)


def _without_masks(state: Tree) -> Tree:
    return jax.tree.map(
        lambda node: node._replace(masks=()) if is_pruner(node) else node,
        state,
        is_leaf=is_pruner,
    )


def _is_variable(node: Leaf) -> bool:
    """True for an nnx variable, known by what it can do: the core does not import flax."""
    return hasattr(node, "get_value") and hasattr(node, "set_value")


def _as_given(old: Tree, new: Tree) -> Tree:
    """Put nnx variables back around the arrays that they held."""

    def put(old: Tree, new: Tree) -> Any:
        if not _is_variable(old):
            return new
        # A variable may hold a hole, for a leaf that a pruner leaves out, and so may a new one.
        return jax.tree.unflatten(jax.tree.structure(old, is_leaf=is_hole), [new])

    def visit(old: Tree, new: Tree) -> Any:
        if not is_pruner(old):
            return put(old, new)
        before = _leaves_by_path(old.masks)  # there may be others now

        def mask(slot: Slot) -> Any:
            if is_packed(slot.leaf):  # its bits are wrapped as all single arrays of the state are
                return slot.leaf._replace(bits=put(old.count, slot.leaf.bits))
            return put(before.get(slot.path), slot.leaf)

        masks = jax.tree.unflatten(
            jax.tree.structure(new.masks, is_leaf=_is_mask),
            list(map(mask, slots(new.masks, _is_mask))),
        )
        rest = _as_given(tuple(old._replace(masks=())), tuple(new._replace(masks=())))
        return PruneState(*rest)._replace(masks=masks)

    return jax.tree.map(visit, old, new, is_leaf=lambda v: is_pruner(v) or _is_variable_or_mask(v))


def _is_variable_or_mask(node: Leaf) -> bool:
    return _is_variable(node) or is_packed(node)


def _is_mask(node: Leaf) -> bool:
    return is_hole(node) or is_packed(node)


def _leaves_by_path(tree: Tree) -> dict[str, Leaf]:
    whole = lambda node: _is_variable_or_mask(node) or is_hole(node)  # noqa: E731
    return {slot.path: slot.leaf for slot in slots(tree, whole)}


def _unpacked(node: Leaf) -> Tree:
    return node._replace(masks=unpack(node.masks)) if isinstance(node, PruneState) else node


def _packed_like(old: Tree, new: Tree) -> Tree:
    """Pack the masks of a pruner that had them packed."""
    blocks = blocks_in(old.masks) if isinstance(old, PruneState) else {}
    return new._replace(masks=_packed(new.masks, blocks)) if blocks else new


def _packed(masks: Tree, blocks: Mapping[tuple[str, ...], Block]) -> Tree:
    """Pack masks in blocks, by keys; one bit a weight where a cut went through blocks."""

    def block_of(slot: Slot) -> Block:
        block = blocks.get(slot.keys, ())
        fits = len(block) == slot.leaf.ndim and is_concrete(slot.leaf)
        return block if fits and not is_torn(slot.leaf, block) else ()

    return pack_by(masks, block_of)


class CannotCutError(ValueError):
    """What an optimizer keeps cannot be cut as the params are."""


class Place(Protocol):
    """What to keep of a parameter of a shape: a leaf, whatever the tree around it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""

    def take(self, part: jax.Array) -> jax.Array:
        """Keep of an array of as many axes what is kept of the parameter."""

    def along(self, axis: int) -> "Place":
        """What to keep of a vector along one axis."""

    def summed(self, shape: tuple[int, ...]) -> "Place":
        """What to keep of a sum over one axis, by its shape."""


@dataclasses.dataclass(frozen=True, eq=False)
class Indices:
    """Some indices of some axes."""

    kept: Mapping[int, np.ndarray]
    shape: tuple[int, ...]

    def take(self, part: jax.Array) -> jax.Array:
        """Take them of the axes that are whole."""
        same = {i for i, n in enumerate(self.shape) if part.shape[i] == n}
        return take_kept(part, {i: k for i, k in self.kept.items() if i in same})

    def along(self, axis: int) -> "Indices":
        """What to keep of a vector along one axis."""
        k = self.kept.get(axis)
        if k is None:
            return Indices({}, (self.shape[axis],))
        if k.ndim > 1:  # the vector is shared by layers, of which each keeps others
            raise CannotCutError(
                f"The optimizer keeps one vector along axis {axis} of a parameter of shape "
                f"{self.shape}, of which each layer keeps other indices. Start anew: "
                "`tx.init(small_params)`."
            )
        return Indices({0: k}, (self.shape[axis],))

    def summed(self, shape: tuple[int, ...]) -> "Indices":
        """What to keep of a sum over one axis, if its shape tells which of them that was.

        Of a weight `[8, 3]` a sum of shape `[3]` was taken over axis 0, so that it is cut along
        what was axis 1. Of a square weight it may be either, which matters where they are cut
        differently.
        """
        found = []
        for gone in range(len(self.shape)):
            left = [i for i in range(len(self.shape)) if i != gone]
            if tuple(self.shape[i] for i in left) != shape:
                continue
            kept = {}
            for j, i in enumerate(left):
                if i in self.kept:
                    kept[j] = _without(self.kept[i], i, gone, self.shape)
            found.append(Indices(kept, shape))
        if len({str({i: k.tolist() for i, k in p.kept.items()}) for p in found}) > 1:
            raise CannotCutError(
                f"The optimizer keeps sums of shape {shape} for a parameter of shape {self.shape}, "
                "which do not tell the axis that was summed. Start anew: `tx.init(small_params)`."
            )
        return found[0] if found else Indices({}, ())


def _without(indices: np.ndarray, axis: int, gone: int, shape: tuple[int, ...]) -> np.ndarray:
    """Indices of an axis once another axis has been summed over."""
    if indices.ndim == 1:
        return indices
    if layer_axis(indices, axis) == gone:
        raise CannotCutError(
            f"The optimizer keeps sums over the layers, axis {gone} of a parameter of shape "
            f"{shape}, of which each layer keeps other indices along axis {axis}. Start anew: "
            "`tx.init(small_params)`."
        )
    return indices.squeeze(gone)
