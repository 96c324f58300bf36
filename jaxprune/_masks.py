"""Masks: applied to params, compared, counted and packed into bits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._bits import (
    Block,
    axis_of,
    first_of_blocks,
    pack_bits,
    packed_axis,
    shape_of_units,
    unpack_bits,
)
from jaxprune._errors import check_living
from jaxprune._help import readable
from jaxprune._mesh import all_true, reshard_like
from jaxprune._serial import serialize_shaped
from jaxprune._tree import (
    Slot,
    align,
    is_hole,
    is_matrix,
    leaves_with_path,
    list_paths,
    map_leaves,
    map_with_path,
    match,
    prunable,
    slots,
)
from jaxprune._values import count_true, is_concrete
from jaxprune.typing import Leaf, Masks, Params, Tree, Where


def apply_masks(params: Params, masks: Masks) -> Params:
    """Set the removed weights to zero and leave all others as they are.

    Args:
      params: parameters; any tree.
      masks: masks of the same tree; None for leaves to leave alone.

    Returns:
      Parameters like ``params``, exactly zero where a mask is False, be the weight inf or NaN.

    Raises:
      ValueError: ``masks`` does not mirror ``params``.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_masks({"w": jnp.array([1.0, jnp.inf])}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    masks = check_masks(masks, params, "masks")
    return map_leaves(
        lambda p, m: p if m is None else jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks
    )


def combine_masks(*masks: Masks) -> Masks:
    """Combine masks: a weight stays where all of them keep it.

    For channels and blocks found apart, say. None stands for a leaf that a mask says nothing of;
    where all are None the leaf is left alone.

    Args:
      *masks: masks of the same tree.

    Returns:
      Masks like the first, each axis full where any of them is.

    Raises:
      ValueError: there are no masks, or they do not mirror one another.

    Example:
      >>> import jax.numpy as jnp
      >>> rows, columns = jnp.array([[True], [False]]), jnp.array([[True, False]])
      >>> combine_masks({"w": rows, "b": None}, {"w": columns, "b": None})
      {'b': None, 'w': Array([[ True, False],
             [False, False]], dtype=bool)}
    """
    if not masks:
        raise ValueError("`combine_masks()` got nothing to combine. Pass trees of masks.")
    for one in masks:
        check_living(one)
    first, *others = masks
    step = "Pass `combine_masks` masks of one tree; None stands for a leaf without a mask."
    for i, other in enumerate(others, start=1):
        same = match(
            other, first, f"masks[{i}]", of="`masks[0]`", gaps="holes", fits=None, step=step
        )
        first = jax.tree.map(_both, first, same, is_leaf=is_hole)
    return first


def _both(a: Tree, b: Tree) -> Any:
    if is_hole(a) or is_hole(b):
        return b if is_hole(a) else a
    return a & b


@readable
def dense_masks(params: Params, *, where: Where = is_matrix) -> Masks:
    """Make masks that remove nothing.

    Args:
      params: parameters; any tree.
      where: which leaves are prunable.

    Returns:
      Full masks, all True, with the sharding of their parameter; None elsewhere.

    Raises:
      ValueError: nothing is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> dense_masks({"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)})
      {'bias': None, 'kernel': Array([[ True,  True]], dtype=bool)}
    """
    return map_leaves(all_true, prunable(params, where=where))


@readable
def masks_from_zeros(params: Params, *, where: Where = is_matrix) -> Masks:
    """Make masks that remove the weights that are zero: those of a network pruned before.

    To train it further: ``jp.hold(inner, masks=jp.masks_from_zeros)``. A leaf that is zero as a
    whole keeps nothing, be it collapsed or not trained yet; ``jp.summary`` warns of it.

    Args:
      params: parameters; any tree.
      where: which leaves are prunable.

    Returns:
      Full masks, False where a weight is zero, with the sharding of their parameter; None
      elsewhere.

    Raises:
      ValueError: nothing is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> masks_from_zeros({"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(2)})
      {'bias': None, 'kernel': Array([[False,  True]], dtype=bool)}
    """
    return map_leaves(lambda p: jnp.asarray(p != 0), prunable(params, where=where))


def sparsity(masks: Masks, params: Params) -> float | jax.Array:
    """Measure the fraction of the prunable weights that masks remove.

    Args:
      masks: masks; prunable is where they are not None.
      params: the parameters they belong to.

    Returns:
      The exact fraction as a Python float; inside a trace a float array.

    Raises:
      ValueError: ``masks`` does not mirror ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> sparsity({"w": jnp.array([[True, False, False]])}, {"w": jnp.ones((8, 3))})
      0.6666666666666666
    """
    masks = check_masks(masks, params, "masks")
    counts = count_kept(masks, params)
    total = max(sum(c.size for c in counts), 1)
    if any(isinstance(c.kept, jax.core.Tracer) for c in counts):
        # Fractions, since nobody says that an int32 holds the number of weights.
        wholes = [float(max(c.entries, 1)) for c in counts]
        gone = [c.size / total * ((n - c.kept) / n) for c, n in zip(counts, wholes, strict=True)]
        return jnp.sum(jnp.stack(gone))
    return sum(c.size - c.weights for c in counts) / total


class Count(NamedTuple):
    """What a mask keeps of one leaf.

    Attributes:
      path: path of the leaf.
      kept: entries of the mask that are True; a float inside of a trace.
      entries: entries of the mask; an axis of size 1 speaks for the whole axis of the leaf.
      size: weights of the leaf.
    """

    path: str
    kept: Any
    entries: int
    size: int

    @property
    def weights(self) -> int:
        """Weights that stay."""
        return self.kept * (self.size // self.entries if self.entries else 0)


def count_kept(masks: Masks, params: Params) -> list[Count]:
    """Count for each prunable leaf what its mask keeps."""
    counts: list[Count] = []

    def visit(path: str, p: jax.Array, m: jax.Array | None) -> None:
        if m is not None:
            counts.append(Count(path, count_true(m), m.size, p.size))

    map_with_path(visit, params, masks)
    return counts


class _Fields(NamedTuple):
    """What ``Packed`` holds."""

    bits: jax.Array
    shape: tuple[int, ...]
    block: tuple[int, ...] = ()


class Packed(_Fields):
    """A mask in bits: eight neighbours along one axis in a byte, the first in its highest bit.

    Neighbours are weights, or the blocks of weights that live or die together: ``prune`` and the
    like keep one bit a block for ``patterns.Blocks``. The axis is the longest one but the last, the
    one nearest to the last among equals; another one, the last too, only where the bytes are fewer
    by more than a ninth, as for masks of one input channel. So a mask `[784, 300]` has bits
    `[98, 300]`, and weight ``[i, j]`` is bit ``128 >> i % 8`` of ``bits[i // 8, j]``; in blocks of
    ``(8, 4)`` it has bits `[13, 75]`, and weight ``[i, j]`` is bit ``128 >> i // 8 % 8`` of
    ``bits[i // 64, j // 4]``. Bits along the last axis, as all once were, are read as well;
    ``pack`` packs them anew.

    Attributes:
      bits: uint8, of the shape of the mask, or of its blocks, but for the axis of n neighbours,
        which is ceil(n / 8).
      shape: shape of the mask.
      block: how many weights share a bit along each axis, the last block of an axis maybe fewer;
        () where each has its own.
    """

    __slots__ = ()

    @property
    def _fields(self) -> tuple[str, ...]:  # type: ignore[override]
        # `flax.serialization` writes the fields, and reads what has the same. A mask without blocks
        # is written as it was before there were any.
        return _Fields._fields if self.block else _Fields._fields[:2]


# A node of its own, since shape and block are no leaves. A named tuple all the same: those are what
# `flax.serialization` writes and reads without being told, and the core does not import flax.
jax.tree_util.register_pytree_with_keys(
    Packed,
    lambda packed: (((jax.tree_util.GetAttrKey("bits"), packed.bits),), packed[1:]),
    lambda fixed, children: Packed(next(iter(children)), *fixed),
)


serialize_shaped(Packed)


def pack(masks: Masks, *, block: tuple[int, ...] = ()) -> Any:
    """Store masks with one bit a weight, or a block of weights, instead of one byte a weight.

    Args:
      masks: masks; None stays None, what is packed stays packed, as ``Packed`` says.
      block: sizes along the last axes of blocks that share a bit, as ``patterns.Blocks`` has them.

    Returns:
      The same tree with a ``Packed`` in the place of each mask. It is a pytree node that knows
      its shape, so it can be jitted, stacked, donated and saved like any array.

    Raises:
      ValueError: a block holds weights that are kept and others that are not, or has more axes
        than a mask. Inside of a trace, which cannot tell, its first weight speaks for all.

    Example:
      >>> import jax.numpy as jnp
      >>> packed = pack({"w": jnp.ones((16, 3), bool)})
      >>> packed["w"].bits.shape, packed["w"].shape
      ((2, 3), (16, 3))
      >>> pack({"w": jnp.ones((1024, 1024), bool)}, block=(8, 8))["w"].bits.shape
      (16, 128)
    """
    if not block:
        return jax.tree.map(_pack, masks, is_leaf=is_packed)
    short = [s.path for s in slots(masks, _is_mask) if 0 <= _rank(s.leaf) < len(block)]
    if short:
        raise ValueError(
            f"`pack(block={block})` needs masks of at least {len(block)} axes, which "
            f"{list_paths(short)} lack. Pack them apart, with a shorter `block`."
        )
    tile = lambda slot: (1,) * (_rank(slot.leaf) - len(block)) + tuple(block)  # noqa: E731
    torn = torn_blocks(masks, tile)
    if torn:
        raise ValueError(
            f"`pack(block={block})` got masks that keep a part of a block at {list_paths(torn)}. "
            "Pack them without `block`, one bit a weight."
        )
    return pack_by(masks, tile)


def unpack(packed: Any) -> Masks:
    """Give back the masks that ``pack`` stored, bit for bit.

    Args:
      packed: a tree with ``Packed`` nodes; masks that are not packed pass.

    Returns:
      Bool masks.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack(pack({"w": jnp.array([True, False, True])}))
      {'w': Array([ True, False,  True], dtype=bool)}
    """
    return jax.tree.map(_unpack, packed, is_leaf=is_packed)


def is_packed(node: Leaf) -> bool:
    """True for a mask in bits: for ``is_leaf``."""
    return isinstance(node, Packed)


def pack_by(masks: Masks, block_of: Callable[[Slot], Block]) -> Masks:
    """Pack masks, with a block for each; what is packed stays packed as it is."""
    packed = [
        slot.leaf if is_hole(slot.leaf) else _pack(slot.leaf, block_of(slot))
        for slot in slots(masks, _is_mask)
    ]
    return jax.tree.unflatten(jax.tree.structure(masks, is_leaf=_is_mask), packed)


def blocks_in(packed: Masks) -> dict[tuple[str, ...], Block]:
    """The blocks of packed masks, by the keys of a leaf."""
    return {s.keys: s.leaf.block for s in slots(packed, _is_mask) if is_packed(s.leaf)}


def units_of(packed: Packed) -> jax.Array:
    """A bool for each bit, of the shape that ``shape_of_units`` says."""
    return unpack_bits(packed.bits, shape_of_units(packed.shape, packed.block))


def pack_like(masks: Masks, like: Masks) -> Masks:
    """Pack masks in the blocks of other ones, one bit a weight where those have none."""
    blocks = blocks_in(like)
    return pack_by(masks, lambda slot: blocks.get(slot.keys, ()))


def torn_blocks(masks: Masks, block_of: Callable[[Slot], Block]) -> list[str]:
    """Paths of masks of which a block keeps a part; values inside of a trace are taken on trust."""
    return [
        slot.path
        for slot in slots(masks, _is_mask)
        if not is_hole(slot.leaf) and is_torn(slot.leaf, block_of(slot))
    ]


def is_torn(mask: jax.Array | Packed, block: Block) -> bool:
    """Say whether a concrete mask keeps a part of a block."""
    if not block or is_packed(mask) or not is_concrete(mask):
        return False
    return bool(jnp.any(_unpack(_pack(mask, block)) != mask))


def _pack(mask: jax.Array | Packed, block: Block = ()) -> Packed:
    """Pack a mask, or anew what was packed along another axis than today."""
    if not isinstance(mask, Packed):
        shared = block if any(size > 1 for size in block) else ()
        units = first_of_blocks(mask, shared)
        return Packed(pack_bits(units, packed_axis(units.shape)), mask.shape, shared)
    units = shape_of_units(mask.shape, mask.block)
    axis = packed_axis(units)
    if axis_of(mask.bits.shape, mask.shape, mask.block) == axis:
        return mask
    return mask._replace(bits=pack_bits(unpack_bits(mask.bits, units), axis))


def _unpack(mask: jax.Array | Packed) -> jax.Array:
    return unpack_bits(*mask) if isinstance(mask, Packed) else mask


def _is_mask(node: Leaf) -> bool:
    return is_hole(node) or is_packed(node)


def _rank(mask: Leaf) -> int:
    return -1 if is_hole(mask) else len(mask.shape)


def check_masks(masks: Masks, params: Params, name: str) -> Masks:
    """Give masks the structure of ``params``, or say how they differ: all that is wrong at once."""
    check_living(masks, name)
    if align(masks, params) is None:
        _refuse_state(masks, name)
    step = (
        "Make it with `jp.find_masks` or `jp.dense_masks`, with None where a leaf is not prunable."
    )
    mirror = match(masks, params, name, gaps="holes", fits=None, step=step)
    _check_bool(mirror, params, name)
    step = "A mask has the rank of its parameter, each axis full or 1."
    return reshard_like(
        match(mirror, params, name, gaps="holes", fits=_broadcasts, step=step), params
    )


def _broadcasts(mask: tuple[int, ...], leaf: tuple[int, ...]) -> bool:
    return len(mask) == len(leaf) and all(m in (1, n) for m, n in zip(mask, leaf, strict=True))


def _check_bool(masks: Masks, params: Params, name: str) -> None:
    """Refuse masks that are not bool; masks and params have one structure."""
    is_bool = lambda m: getattr(m, "dtype", None) == jnp.bool_  # noqa: E731
    if not all(map(is_bool, jax.tree.leaves(masks))):
        kinds = [
            f"{path!r} is {getattr(m, 'dtype', type(m).__name__)}"
            for path, m in leaves_with_path(masks)
            if not is_bool(m)
        ]
        first = jax.tree.leaves(params)[:1]
        step = (
            "The other tree is bool: were the two swapped?"
            if getattr(first[0], "dtype", None) == jnp.bool_
            else "Convert with `mask.astype(bool)`; True keeps a weight."
        )
        raise TypeError(f"`{name}` holds masks that are not bool: {', '.join(kinds)}. {step}")


def _refuse_state(tree: Tree, name: str) -> None:
    """Say of an optimizer state in the place of masks whether there are masks in it."""
    if not _nodes(tree, lambda node: type(node).__name__.endswith("State")):
        return
    if _nodes(tree, lambda node: "masks" in node._fields):
        raise ValueError(
            f"`{name}` is an optimizer state, no tree of masks. Take the masks out of it with "
            "`jp.get_masks(opt_state)`."
        )
    raise ValueError(
        f"`{name}` is an optimizer state, and there is no pruner in this state that would hold "
        "masks. Wrap the optimizer by `jp.prune`, `jp.hold` and the like, or pass masks."
    )


def _nodes(tree: Tree, wanted: Callable[[Any], bool]) -> list[Leaf]:
    """The named tuples of a tree that are wanted, the outermost of those that are nested."""
    is_one = lambda node: isinstance(node, tuple) and hasattr(node, "_fields") and wanted(node)  # noqa: E731
    return [node for node in jax.tree.leaves(tree, is_leaf=is_one) if is_one(node)]
