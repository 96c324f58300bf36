"""Leaves on their way to disk and back: what they are, their bits, and where they belong."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxprune._bits import axis_of, shape_of_units, stack_of
from jaxprune._masks import Packed
from jaxprune._tree import Slot, check_paths, is_hole, slots

# An array, its shape, a packed mask, random keys, a number of Python; None for a hole.
Leaf: TypeAlias = Any

NUMBERS = (bool, int, float, complex)


class Kind(NamedTuple):
    """What an array is, apart from its values.

    Attributes:
      dtype: its name; ``int``, ``float`` and ``complex`` are those of Python.
      shape: that of the words, where it holds random keys.
      key: the implementation of typed random keys, else None.
    """

    dtype: str
    shape: tuple[int, ...]
    key: str | None = None

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}" + (f" of {self.key} keys" if self.key else "")


def is_leaf(node: Any) -> bool:
    """True for holes and packed masks, beside what is a leaf anyway."""
    return is_hole(node) or isinstance(node, Packed)


def is_static(leaf: Leaf) -> bool:
    """True for functions and strings, which modules hold among their arrays."""
    return callable(leaf) or isinstance(leaf, str)


def named(tree: Any, user: str) -> dict[str, Leaf]:
    """List the leaves by path; refuse what has no name of its own or cannot be stored.

    Holes are None, and so are functions and strings: the code has them, not the disk.
    """
    found = every_slot(tree)
    check_paths([slot.path for slot in found], user)
    leaves = {s.path: None if is_hole(s.leaf) or is_static(s.leaf) else s.leaf for s in found}
    bad = [
        f"{path!r} is {_what(leaf)}"
        for path, leaf in leaves.items()
        if leaf is not None and kind_of(leaf) is None
    ]
    if bad:
        raise TypeError(
            f"`{user}` got leaves that are no arrays of numbers: {', '.join(bad)}. Make arrays of "
            "numbers with `jnp.asarray`, and keep all else outside of the tree."
        )
    _refuse_uneven_parts(leaves, user)
    return leaves


def _refuse_uneven_parts(leaves: dict[str, Leaf], user: str) -> None:
    """Refuse shapes that a mesh does not divide; an array that has one cannot be."""
    bad = []
    for path, leaf in leaves.items():
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            continue
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            sizes = ", ".join(f"{name}={size}" for name, size in sharding.mesh.shape.items())
            bad.append(f"{path!r} of shape {leaf.shape} by {sharding.spec} ({sizes})")
    if bad:
        raise ValueError(
            f"`{user}` wants leaves cut into parts that are not equal: {'; '.join(bad)}. Choose "
            "mesh axes that divide the axes of the leaf, or leave those whole."
        )


def every_slot(tree: Any) -> list[Slot]:
    """The leaves, holes and packed masks among them, each with its names."""
    return slots(tree, is_leaf)


def fill_in(like: Any, leaves: Mapping[str, Leaf]) -> Any:
    """Give a tree like ``like`` with these leaves, by path; holes and functions stay."""
    structure = jax.tree.structure(like, is_leaf=is_leaf)
    return jax.tree.unflatten(
        structure,
        [
            s.leaf if is_hole(s.leaf) or is_static(s.leaf) else leaves[s.path]
            for s in every_slot(like)
        ],
    )


def _what(leaf: Leaf) -> str:
    return str(getattr(leaf, "dtype", None) or f"of type {type(leaf).__name__}")


def kind_of(leaf: Leaf) -> Kind | None:
    """Describe an array, a shape, a packed mask or a number; None for all else."""
    if isinstance(leaf, Packed):
        return Kind("bool", (*stack_of(leaf.bits.shape, leaf.shape), *leaf.shape))
    if type(leaf) in NUMBERS:
        return Kind(type(leaf).__name__, ())
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct | np.ndarray | np.generic):
        return None
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, leaf)
        return Kind(data.dtype.name, data.shape, _key_impl(leaf))
    dtype = np.dtype(leaf.dtype)
    return Kind(dtype.name, tuple(leaf.shape)) if is_number(dtype) else None


def is_key(leaf: Leaf) -> bool:
    """True for typed random keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(keys: Leaf) -> str:
    """Name the implementation of typed random keys, be they abstract."""
    names: list[str] = []
    jax.eval_shape(lambda k: names.append(str(jax.random.key_impl(k))), keys)
    return names[0]


def is_number(dtype: np.dtype) -> bool:
    """True for dtypes whose bytes mean the same everywhere: not for objects or long doubles."""
    kinds = jnp.issubdtype(dtype, np.number) or dtype == np.bool_
    return kinds and (dtype.itemsize <= 8 or dtype == np.complex128)


def differences(there: Mapping[str, Kind | None], like: Mapping[str, Kind | None]) -> list[str]:
    """Say path by path how what is on disk differs from what was asked for."""
    pairs = {
        path: (there.get(path, "nothing"), like.get(path, "nothing")) for path in {**there, **like}
    }
    return [
        f"{path!r} is {a} there and {b} in `like`"
        for path, (a, b) in pairs.items()
        if not fits(a, b)
    ]


def fits(a: Kind | str | None, b: Kind | str | None) -> bool:
    """True for two of a kind; a number of Python goes with a scalar array of its sort."""
    if a == b:
        return True
    if not (isinstance(a, Kind) and isinstance(b, Kind)) or a.shape or b.shape:
        return False
    of_python = {kind.__name__ for kind in NUMBERS} & {a.dtype, b.dtype}
    return bool(of_python) and np.dtype(a.dtype).kind == np.dtype(b.dtype).kind


def list_lines(lines: list[str], most: int = 50) -> str:
    """One difference a line, cut where there are too many to read."""
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in lines[:most] + more)


def words(array: np.ndarray) -> np.ndarray:
    """View the elements as ``[size, words]`` of unsigned integers: their values mean nothing."""
    little = array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array
    flat = np.ascontiguousarray(little).reshape(-1)
    word = min(flat.dtype.itemsize, 8)
    return flat.view(f"<u{word}").reshape(flat.size, flat.dtype.itemsize // word)


def to_bits(mask: np.ndarray) -> np.ndarray:
    """Pack a mask in C order, eight to a byte; the first is the highest bit."""
    return np.packbits(mask.reshape(-1))


def from_bits(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Give back what ``to_bits`` packed."""
    return np.unpackbits(bits, count=int(np.prod(shape))).view(np.bool_).reshape(shape)


def digest(*arrays: np.ndarray) -> str:
    """SHA-256 over the bytes of arrays, as hexadecimal digits."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(words(array).data)
    return sha.hexdigest()


def on_host(leaf: Leaf) -> np.ndarray:
    """Bring what is to be stored of a leaf to the host: the words of keys, masks unpacked."""
    if isinstance(leaf, Packed):
        return _from_packed(on_host(leaf.bits), leaf)
    array = jax.random.key_data(leaf) if is_key(leaf) else leaf
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        array = process_allgather(array, tiled=True)  # from the devices of all processes
    return np.asarray(array)


def place(array: np.ndarray, like: Leaf = None, key: str | None = None) -> Leaf:
    """Turn what was read into what ``like`` is, where ``like`` is.

    That is a JAX array on its devices, a NumPy array, a packed mask or a number of Python. What JAX
    would cut to 32 bits stays in NumPy.
    """
    if key:
        keys = jax.random.wrap_key_data(jnp.asarray(array), impl=key)
        return keys if sharding_of(like) is None else jax.device_put(keys, sharding_of(like))
    if isinstance(like, Packed):
        return like._replace(bits=place(_to_packed(array, like), like.bits))
    if type(like) in NUMBERS:
        return type(like)(array.item())
    array = array.astype(getattr(like, "dtype", array.dtype), copy=False)
    if isinstance(like, np.ndarray | np.generic):
        return array if isinstance(like, np.ndarray) else array[()]
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    return _put(array, like)


# In a file a mask has a bit for each weight, whatever shares one in memory: so what was saved with
# one bit a weight comes back with one a block, and the other way round.


def _from_packed(bits: np.ndarray, like: Packed) -> np.ndarray:
    """A mask out of bits, whose shape and block are those of ``like``."""
    axis = axis_of(bits.shape, like.shape, like.block)
    units = shape_of_units(like.shape, like.block)
    wide = np.unpackbits(bits, axis=axis, count=(units or (1,))[axis]).view(np.bool_)
    for at, size in zip(range(-len(like.block), 0), like.block, strict=True):
        wide = wide.repeat(size, axis=at).take(np.arange(like.shape[at]), axis=at)
    return wide.reshape(*stack_of(bits.shape, like.shape), *like.shape)


def _to_packed(mask: np.ndarray, like: Packed) -> np.ndarray:
    """The bits of a mask, packed as ``like`` is."""
    stack = stack_of(like.bits.shape, like.shape)
    wide = units = mask.reshape(*stack, *(like.shape or (1,)))
    for at, size in zip(range(-len(like.block), 0), like.block, strict=True):
        units = units.take(np.arange(0, like.shape[at], size), axis=at)
    bits = np.packbits(units, axis=axis_of(like.bits.shape, like.shape, like.block))
    if like.block and not np.array_equal(_from_packed(bits, like), wide):
        raise ValueError(
            f"A stored mask of shape {like.shape} keeps a part of a block, where `like` has one "
            f"bit for each block of {like.block}. Restore it into a state with a bit for each "
            "weight: `state._replace(masks=jp.pack(jp.unpack(state.masks)))`."
        )
    return bits


def _put(array: np.ndarray, like: Leaf) -> jax.Array:
    """Move to where ``like`` is; committed to a device only if that is."""
    weak = getattr(like, "weak_type", False) and not array.shape
    # A strong type would trace the step anew.
    value = jnp.asarray(array.item()) if weak else array
    sharding = sharding_of(like)
    return jnp.array(value) if sharding is None else jax.device_put(value, sharding)


def sharding_of(like: Leaf) -> Sharding | None:
    """Where a leaf has been put; None if it just happens to be somewhere."""
    if isinstance(like, jax.Array) and not like.committed:
        return None
    return getattr(like, "sharding", None)


def sharding_of_mask(like: Leaf, shape: tuple[int, ...]) -> Sharding | None:
    """Where a mask goes: with its parameter, an axis of size 1 to all of its devices."""
    sharding = sharding_of(like)
    if sharding is None or sharding.is_fully_replicated or shape == like.shape:
        return sharding
    if not isinstance(sharding, NamedSharding):
        return None
    names = (*sharding.spec, *[None] * (len(shape) - len(sharding.spec)))
    spec = (None if n == 1 else name for n, name in zip(shape, names, strict=True))
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
