"""A finished sparse model in one file: kept values, mask bits, a manifest with checksums."""

import math
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from jaxprune._masks import check_masks, unpack
from jaxprune._tree import is_hole, list_paths, map_leaves
from jaxprune.checkpoint._frame import (
    Tensor,
    check_size,
    damaged,
    layout,
    make_head,
    put,
    read_head,
)
from jaxprune.checkpoint._leaves import (
    Kind,
    differences,
    digest,
    every_slot,
    fill_in,
    from_bits,
    is_key,
    is_number,
    is_static,
    kind_of,
    list_lines,
    named,
    on_host,
    place,
    sharding_of_mask,
    to_bits,
    words,
)
from jaxprune.typing import Masks, Params

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


def save(path: str | os.PathLike[str], params: Params, masks: Masks | None = None) -> None:
    """Save a finished sparse model as one small file.

    It holds the values that the masks keep and one bit a weight that says where they are: close to
    ``kept * itemsize + n / 8`` bytes. What the masks remove is not part of the model: bit for bit,
    whatever the dtype, ``jp.apply_masks(params, masks)`` comes back. It is a safetensors file with
    checksums over every byte, and needs nothing but NumPy to be written and read. The file is put
    in place in one stroke; one that is there already stays whole until then.

    Args:
      path: file to write, by custom ``*.safetensors``; its folder is made.
      params: arrays and numbers in any tree, typed random keys too. Functions and strings among
        the leaves, which modules have, stay in the code: ``load(path, like=module)``.
      masks: masks like ``params``, packed or not; None for leaves to store as they are, or for all
        of them, such as a small network that ``jp.shrink`` made.

    Raises:
      ValueError: the masks do not mirror the params, or two leaves have one path.
      TypeError: a leaf is no array of numbers, or a mask is not bool.
      OSError: the path cannot be written.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"kernel": jnp.ones((1000, 100), jnp.bfloat16), "bias": jnp.zeros(100)}
      >>> masks = jp.find_masks(params, 0.9)
      >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
      >>> jp.checkpoint.save(path, params, masks)
      >>> data = 10_000 * 2 + 100_000 // 8 + 100 * 4  # kept values, bits, bias
      >>> data, path.stat().st_size < data + 1024
      (32900, True)
      >>> params, masks = jp.checkpoint.load(path)
      >>> params["kernel"].dtype, masks["bias"], jp.sparsity(masks, params)
      (dtype(bfloat16), None, 0.9)
    """
    leaves = named(params, "save(params)")
    none = map_leaves(lambda _: None, params)
    aligned = none if masks is None else check_masks(unpack(masks), params, "masks")
    mask_at = {slot.path: _mask(slot.leaf) for slot in every_slot(aligned)}
    random = [path for path, leaf in leaves.items() if is_key(leaf) and mask_at[path] is not None]
    if random:
        raise TypeError(f"`save` got masks for random keys: {list_paths(random)}. Put None there.")
    keys = [_keys(slot.key_path) for slot in every_slot(params)]
    stored = [
        _encode(key, leaf, mask_at[name])
        for key, (name, leaf) in zip(keys, leaves.items(), strict=True)
    ]
    entries = [entry for entry, _ in stored]
    chunks = {name: chunk for _, parts in stored for name, chunk in parts.items()}
    head = make_head(_tensors(entries), [entry.record() for entry in entries])
    put(Path(path), [head, *(chunks[name].data for name in layout(_tensors(entries)))], "save")


def load(path: str | os.PathLike[str], like: Params | None = None) -> tuple[Params, Masks]:
    """Load a model that ``save`` saved: its params and its masks, bit for bit.

    Nothing in the file is executed, and every byte of it is checked. Without ``like`` the trees
    are nested dicts: keys as they were, fields of a NamedTuple by name, and a list as
    ``{0: ..., 1: ...}``; arrays are those of JAX, but for 64-bit ones while JAX has them disabled,
    which stay in NumPy. Leaves are read one by one: beside the result there is never more than one
    of them in memory.

    Args:
      path: file to read.
      like: params or their shapes (``jax.eval_shape``). The result has this structure; a leaf
        comes back on the sharding that its counterpart has, and in NumPy where that is.

    Returns:
      Params, zero where a mask is False, and masks; both of one structure, None where a leaf has
      no mask.

    Raises:
      ValueError: the file is damaged, cut short, of a newer format or no model at all, or its
        leaves are not those of ``like``: then all differences, path by path.
      TypeError: a leaf of ``like`` is no array.
      FileNotFoundError: there is no such file.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
      >>> params, masks = [jnp.array([0.0, 2.0])], [jnp.array([False, True])]
      >>> jp.checkpoint.save(path, params, masks)
      >>> jp.checkpoint.load(path)
      ({0: Array([0., 2.], dtype=float32)}, {0: Array([False,  True], dtype=bool)})
      >>> jp.checkpoint.load(path, like=params)
      ([Array([0., 2.], dtype=float32)], [Array([False,  True], dtype=bool)])
    """
    path = Path(path)
    manifest, places, start = read_head(path, "load")
    entries = _entries(manifest, places, path)
    check_size(path, start + sum(tensor.size for tensor in _tensors(entries).values()), "load")
    goals = {} if like is None else _wanted(entries, like, path)
    bad: list[str] = []
    leaves: dict[str, tuple[Any, Any]] = {}
    with path.open("rb") as file:
        for entry in entries:
            offsets = [places[name]["data_offsets"] for name in entry.tensors]
            parts = [_read(file, start + begin, end - begin) for begin, end in offsets]
            if entry.kind is None or digest(*parts) == entry.sha256:
                pair = _decode(entry, parts, goals.get(entry.path))
                # Copies to a device run behind; waiting lets go of one leaf before the next.
                leaves[entry.path] = jax.block_until_ready(pair)
            else:
                bad.append(entry.path)
    if bad:
        raise damaged(path, "load", f"the data of {list_paths(bad)} do not match their checksum")
    params, masks = ({name: pair[i] for name, pair in leaves.items()} for i in (0, 1))
    if like is None:
        return _nest(entries, params), _nest(entries, masks)
    return fill_in(like, params), fill_in(map_leaves(_unless_static, like), masks)


def _encode(keys: Keys, leaf: Any, mask: np.ndarray | None) -> tuple[Entry, dict[str, np.ndarray]]:
    """Describe a leaf, and say what goes into the file: all values, or the kept ones and bits."""
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


def _decode(entry: Entry, parts: list[np.ndarray], like: Any) -> tuple[Any, Any]:
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


def _unless_static(leaf: Any) -> Any:
    """A leaf that may have a mask."""
    return None if is_static(leaf) else leaf


def _like_mask(like: Any, mask: np.ndarray) -> Any:
    """Where a mask belongs: to its parameter."""
    if isinstance(like, np.ndarray | np.generic):
        return mask
    return jax.ShapeDtypeStruct(mask.shape, bool, sharding=sharding_of_mask(like, mask.shape))


def _mask(mask: Any) -> np.ndarray | None:
    return None if is_hole(mask) else on_host(mask)


def _keys(path: tuple[Any, ...]) -> Keys:
    """A key path as plain strings and integers."""
    parts = [jax.tree_util.keystr((key,), simple=True) for key in path]
    plain = [getattr(key, "key", getattr(key, "idx", None)) for key in path]
    return tuple(key if type(key) is int else part for key, part in zip(plain, parts, strict=True))


def _entries(manifest: dict[str, Any], places: dict[str, Any], path: Path) -> list[Entry]:
    """Read the leaves of a manifest, and see that it speaks of the data that are there."""
    try:
        entries = [_entry(record) for record in manifest["leaves"]]
        whole = layout(_tensors(entries)) == places
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, "load", "its manifest cannot be read") from error
    if not whole:
        raise damaged(path, "load", "its manifest does not describe its data")
    return entries


def _entry(record: dict[str, Any]) -> Entry:
    keys = tuple(record["path"])
    if "dtype" not in record:
        return Entry(keys)
    kind = Kind(record["dtype"], tuple(record["shape"]), record.get("key"))
    if not is_number(np.dtype(kind.dtype)):
        raise TypeError(kind.dtype)
    mask = tuple(record["mask"]) if "mask" in record else None
    if mask is not None and np.broadcast_shapes(mask, kind.shape) != kind.shape:
        raise ValueError(mask)
    return Entry(keys, kind, mask, record.get("kept", 0), record["sha256"])


def _tensors(entries: list[Entry]) -> dict[str, Tensor]:
    return {name: tensor for entry in entries for name, tensor in entry.tensors.items()}


def _read(file: BinaryIO, start: int, size: int) -> np.ndarray:
    """Read a stretch as bytes."""
    file.seek(start)
    return np.fromfile(file, np.uint8, size)


def _wanted(entries: list[Entry], like: Params, path: Path) -> dict[str, Any]:
    """The leaves of ``like``, once they are those of the file."""
    wanted = named(like, "load(like)")
    lines = differences(
        {entry.path: entry.kind for entry in entries},
        {name: None if leaf is None else kind_of(leaf) for name, leaf in wanted.items()},
    )
    if lines:
        raise ValueError(
            f"`load` got {str(path)!r}, a model whose leaves are not those of `like`: "
            f"{list_lines(lines)}\nPass params of the same model, or none to get nested dicts."
        )
    return wanted


def _nest(entries: list[Entry], leaves: dict[str, Any]) -> Any:
    """Build nested dicts from key paths."""
    root: dict[Any, Any] = {}
    for entry in entries:
        if not entry.keys:
            return leaves[entry.path]
        node = root
        for key in entry.keys[:-1]:
            node = node.setdefault(key, {})
        node[entry.keys[-1]] = leaves[entry.path]
    return root
