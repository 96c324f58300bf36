"""A leaf in a model file: its entry in the manifest, its kept values and the bits of its mask."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.checkpoint._frame import Tensor
from jaxprune.checkpoint._leaves import (
    Kind,
    Leaf,
    digest,
    from_bits,
    is_number,
    kind_of,
    on_host,
    place,
    sharding_of_mask,
    to_bits,
    words,
)

Keys = tuple[str | int, ...]


class Entry(NamedTuple):
    """What the manifest says of one leaf.

    Attributes:
      keys: its key path; keys of dicts, fields, positions in sequences.
      kind: dtype and shape; None for a hole.
      mask: shape of its mask, None without one.
      kept: how many of its elements are in the file, in C order.
      sha256: checksum over kept values and mask bits.
    """

    keys: Keys
    kind: Kind | None = None
    mask: tuple[int, ...] | None = None
    kept: int = 0
    sha256: str = ""

    @property
    def path(self) -> str:
        """The key path as the rest of the library writes it."""
        return "/".join(map(str, self.keys))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stretches of the file that hold the leaf, by name."""
        if self.kind is None:
            return {}
        dtype = np.dtype(self.kind.dtype)
        if self.mask is None:
            return {f"dense/{self.path}": Tensor(dtype, self.kind.shape)}
        bits = Tensor(np.dtype(np.uint8), (-(-math.prod(self.mask) // 8),))
        return {f"kept/{self.path}": Tensor(dtype, (self.kept,)), f"bits/{self.path}": bits}

    def record(self) -> dict[str, Any]:
        """The entry as JSON."""
        if self.kind is None:
            return {"path": self.keys}
        key = {"key": self.kind.key} if self.kind.key else {}
        mask = {} if self.mask is None else {"mask": self.mask, "kept": self.kept}
        what = {"dtype": self.kind.dtype, "shape": self.kind.shape}
        return {"path": self.keys, **what, **key, **mask, "sha256": self.sha256}


def encode(keys: Keys, leaf: Leaf, mask: np.ndarray | None) -> tuple[Entry, dict[str, np.ndarray]]:
    """Describe a leaf, and say what goes into the file: all values, or the kept ones and bits.

    ``[[1, 0], [2, 3]]`` under the mask ``[[True, False]]`` becomes the values ``1, 2`` and one byte
    of bits, ``10``: a mask is stored in its own shape, before it is broadcast.
    """
    if leaf is None:
        return Entry(keys), {}
    array = on_host(leaf)
    if mask is None:
        parts = [words(array)]
    else:
        parts = [words(array)[_flat(mask, array.shape)], to_bits(mask)]
    shape = None if mask is None else mask.shape
    entry = Entry(keys, kind_of(leaf), shape, len(parts[0]), digest(*parts))
    return entry, dict(zip(entry.tensors, parts, strict=True))


def decode(entry: Entry, parts: list[np.ndarray], like: Leaf) -> tuple[Leaf, Leaf]:
    """Put a leaf together again, and its mask."""
    if entry.kind is None:
        return None, None
    dtype, shape = np.dtype(entry.kind.dtype), entry.kind.shape
    if entry.mask is None:
        value = place(parts[0].view(dtype).reshape(shape), like, entry.kind.key)
        of_python = like is None and entry.kind.dtype in ("int", "float", "complex")
        return value.item() if of_python else value, None
    array, mask = np.zeros(shape, dtype), from_bits(parts[1], entry.mask)
    words(array)[_flat(mask, shape)] = words(parts[0].view(dtype))  # through a view, into the array
    return place(array, like), place(mask, _like_mask(like, mask))


def _flat(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask over all elements, in C order."""
    return np.broadcast_to(mask, shape).reshape(-1)


def _like_mask(like: Leaf, mask: np.ndarray) -> np.ndarray | jax.ShapeDtypeStruct:
    """Where a mask belongs: to its parameter."""
    if isinstance(like, np.ndarray | np.generic):
        return mask
    return jax.ShapeDtypeStruct(mask.shape, bool, sharding=sharding_of_mask(like, mask.shape))


def keys_of(path: jax.tree_util.KeyPath) -> Keys:
    """A key path as plain strings and integers."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    plain = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
    return tuple(key if type(key) is int else part for key, part in zip(plain, parts, strict=True))


def read_entry(record: dict[str, Any]) -> Entry:
    """The entry that ``record`` made; what does not make sense is raised, not read."""
    keys = tuple(record["path"])
    if "dtype" not in record:
        return Entry(keys)
    kind = Kind(record["dtype"], tuple(record["shape"]), record.get("key"))
    if not is_number(np.dtype(kind.dtype)):
        raise TypeError(kind.dtype)
    mask, kept = tuple(record["mask"]) if "mask" in record else None, record.get("kept", 0)
    if not all(type(n) is int and n >= 0 for n in (*kind.shape, *(mask or ()), kept)):
        raise ValueError(kind, mask, kept)
    if mask is not None and np.broadcast_shapes(mask, kind.shape) != kind.shape:
        raise ValueError(mask)
    return Entry(keys, kind, mask, kept, record["sha256"])


def tensors_of(entries: list[Entry]) -> dict[str, Tensor]:
    """The stretches of the file that hold all leaves."""
    return {name: tensor for entry in entries for name, tensor in entry.tensors.items()}
