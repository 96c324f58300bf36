"""A finished sparse model in one file: kept values, mask bits, a manifest with checksums."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jaxprune._masks import check_masks, unpack
from jaxprune._tree import is_hole, list_paths, map_leaves
from jaxprune.checkpoint._entry import Entry, decode, encode, keys_of, read_entry, tensors_of
from jaxprune.checkpoint._frame import (
    Manifest,
    Places,
    check_size,
    damaged,
    layout,
    make_head,
    put,
    read_head,
)
from jaxprune.checkpoint._leaves import (
    Leaf,
    differences,
    digest,
    every_slot,
    fill_in,
    is_key,
    is_static,
    kind_of,
    list_lines,
    named,
    on_host,
)
from jaxprune.typing import Masks, Params


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
    keys = [keys_of(slot.key_path) for slot in every_slot(params)]
    stored = [
        encode(key, leaf, mask_at[name])
        for key, (name, leaf) in zip(keys, leaves.items(), strict=True)
    ]
    entries = [entry for entry, _ in stored]
    chunks = {name: chunk for _, parts in stored for name, chunk in parts.items()}
    head = make_head(tensors_of(entries), [entry.record() for entry in entries])
    put(Path(path), [head, *(chunks[name].data for name in layout(tensors_of(entries)))], "save")


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
    check_size(path, start + sum(tensor.size for tensor in tensors_of(entries).values()), "load")
    goals = {} if like is None else _wanted(entries, like, path)
    bad: list[str] = []
    leaves: dict[str, tuple[Leaf, Leaf]] = {}
    with path.open("rb") as file:
        for entry in entries:
            offsets = [places[name]["data_offsets"] for name in entry.tensors]
            parts = [_read(file, start + begin, end - begin) for begin, end in offsets]
            if entry.kind is None or digest(*parts) == entry.sha256:
                pair = decode(entry, parts, goals.get(entry.path))
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


def _entries(manifest: Manifest, places: Places, path: Path) -> list[Entry]:
    """Read the leaves of a manifest, and see that it speaks of the data that are there."""
    try:
        entries = [read_entry(record) for record in manifest["leaves"]]
        whole = layout(tensors_of(entries)) == places
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, "load", "its manifest cannot be read") from error
    if not whole:
        raise damaged(path, "load", "its manifest does not describe its data")
    return entries


def _read(file: BinaryIO, start: int, size: int) -> np.ndarray:
    """Read a stretch as bytes."""
    file.seek(start)
    return np.fromfile(file, np.uint8, size)


def _wanted(entries: list[Entry], like: Params, path: Path) -> dict[str, Leaf]:
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


def _unless_static(leaf: Leaf) -> Leaf:
    """A leaf that may have a mask."""
    return None if is_static(leaf) else leaf


def _mask(mask: Leaf) -> np.ndarray | None:
    return None if is_hole(mask) else on_host(mask)


def _nest(entries: list[Entry], leaves: dict[str, Leaf]) -> Params:
    """Build nested dicts from key paths."""
    root: dict[str | int, Any] = {}
    for entry in entries:
        if not entry.keys:
            return leaves[entry.path]
        node = root
        for key in entry.keys[:-1]:
            node = node.setdefault(key, {})
        node[entry.keys[-1]] = leaves[entry.path]
    return root
