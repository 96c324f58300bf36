"""One step of a run as orbax keeps it: its arrays, and a manifest with checksums."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune._tree import list_paths
from jaxprune.checkpoint._frame import FORMAT, Manifest, check_format
from jaxprune.checkpoint._leaves import (
    Kind,
    Leaf,
    digest,
    from_bits,
    kind_of,
    on_host,
    place,
    sharding_of,
    to_bits,
    words,
)

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager

# Why there are checksums beside what orbax checks. Of a step it refuses what is missing or cut
# short, and a changed byte in its indices. A changed byte in the arrays comes back without a word:
# 23 of 25 in the file that holds them (orbax 0.11.36, one bit each, at equal distances), and 7 of
# 25 in the JSON. It also casts to the dtype that is asked for, so that kinds are compared here.

Folder = str | os.PathLike[str]
Stored = jax.Array | np.ndarray
Record = dict[str, Any]  # a Kind and a checksum, in JSON

BARE = "(root)"  # the name of a state that is a single array, which orbax does not take
BYTES = ("uint2", "uint4")  # what tensorstore has no dtype for


def orbax(user: str) -> Any:
    """Import orbax, or say how to get it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"`{user}` needs orbax-checkpoint, which is not installed. Install it with "
            "`pip install 'jaxprune[checkpoint]'`."
        ) from error
    return ocp


def opened(folder: Folder, user: str, **options: int) -> "CheckpointManager":
    """Open a folder. Synchronous: a save that returned is on disk."""
    ocp = orbax(user)
    settings = {"create": False, "enable_async_checkpointing": False, **options}
    path = Path(folder).absolute()
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**settings))


def encode(leaves: dict[str, Leaf]) -> tuple[dict[str, Stored], dict[str, Record | None]]:
    """Make of the leaves of a state, by path, what orbax writes, and a record of each."""
    kinds = {path: kind_of(leaf) for path, leaf in leaves.items()}
    stored = {path: _store(leaves[path], kind) for path, kind in kinds.items() if kind}
    records = {
        path: kind and {**kind._asdict(), "sha256": _digest(stored[path])}
        for path, kind in kinds.items()
    }
    # Arrays without elements, which orbax does not take, are a record alone.
    return {path: array for path, array in stored.items() if array.size}, records


def write(
    manager: "CheckpointManager", step: int, arrays: dict[str, Stored], manifest: Manifest
) -> None:
    """Write a step: it is there as a whole, or not at all."""
    args = orbax("save_run").args
    state = args.StandardSave({path or BARE: array for path, array in arrays.items()})
    items = {"state": state, "manifest": args.JsonSave(_seal(manifest))}
    manager.save(step, args=args.Composite(**items), force=True)


def read_manifest(manager: "CheckpointManager", step: int) -> Manifest:
    """Read what ``_seal`` made, and see that it is whole and of our format."""
    if not (manager.directory / str(step) / "manifest").is_dir():
        raise ValueError(
            f"Step {step} in {str(manager.directory)!r} has no manifest of jaxprune: something "
            "else wrote it. Choose a folder of `jp.checkpoint.save_run`."
        )
    sealed = _read(manager, step, "manifest", orbax("restore_run").args.JsonRestore())
    found = {"manifest": None, "format": None} | (sealed if isinstance(sealed, dict) else {})
    if not found["manifest"] or found != _seal(found["manifest"], found["format"]):
        raise _damaged(manager, step, "its manifest does not match its checksum")
    check_format(found["format"], str(manager.directory), "restore_run")
    return found["manifest"]


def read_leaves(
    manager: "CheckpointManager", step: int, manifest: Manifest, like: dict[str, Leaf]
) -> dict[str, Leaf]:
    """Read the leaves of a step, by path, each as its counterpart in ``like`` is."""
    kinds = kinds_of(manifest)
    arrays = _read_arrays(manager, step, kinds, like)
    bad = [path for path, x in arrays.items() if _differs(x, manifest["leaves"][path]["sha256"])]
    if bad:
        raise _damaged(manager, step, f"{list_paths(bad)} do not match their checksum")
    return {path: _load(kind, arrays.get(path), like[path]) for path, kind in kinds.items()}


def kinds_of(manifest: Manifest) -> dict[str, Kind | None]:
    """What the leaves are that a manifest speaks of."""
    return {
        path: record and Kind(record["dtype"], tuple(record["shape"]), record["key"])
        for path, record in manifest["leaves"].items()
    }


def _store(leaf: Leaf, kind: Kind) -> Stored:
    """What orbax gets to write: masks as bits, keys as their words, numbers as arrays."""
    if kind.dtype == "bool":
        return to_bits(on_host(leaf))
    if kind.dtype in BYTES:
        return words(on_host(leaf))
    if isinstance(leaf, jax.Array) and not kind.key:
        return leaf  # orbax takes it from the devices that hold it, each process its part
    return np.ascontiguousarray(on_host(leaf), np.dtype(kind.dtype)).reshape(kind.shape)


def _target(kind: Kind, like: Leaf) -> np.ndarray | jax.ShapeDtypeStruct:
    """How orbax is to give back what ``_store`` gave it: on its devices, or to the host first."""
    if kind.dtype == "bool":
        return np.empty(-(-math.prod(kind.shape) // 8), np.uint8)
    if kind.dtype in BYTES:
        return np.empty((math.prod(kind.shape), 1), np.uint8)
    sharding = sharding_of(like)
    if sharding is None or not kind.shape or kind.key:
        return np.empty(kind.shape, np.dtype(kind.dtype))
    return jax.ShapeDtypeStruct(kind.shape, np.dtype(kind.dtype), sharding=sharding)


def _load(kind: Kind | None, array: Stored | None, like: Leaf) -> Leaf:
    """Make of a stored array what ``like`` is."""
    if kind is None or isinstance(array, jax.Array):
        return array
    if array is None:  # without elements, and so not stored
        array = np.zeros(kind.shape, np.dtype(kind.dtype))
    elif kind.dtype == "bool":
        array = from_bits(array, kind.shape)
    elif kind.dtype in BYTES:
        array = array.view(np.dtype(kind.dtype)).reshape(kind.shape)
    return place(array, like, kind.key)


def _digest(array: Stored) -> str | None:
    """The checksum of what is stored, where one process sees all of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return digest(np.asarray(array))


def _differs(array: Stored, sha256: str | None) -> bool:
    """True where a checksum was made, can be made here, and is another."""
    found = _digest(array)
    return None not in (found, sha256) and found != sha256


def _seal(manifest: Manifest, form: int = FORMAT) -> Manifest:
    """Put a format and a checksum around a manifest."""
    text = json.dumps([form, manifest], sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"format": form, "sha256": sha256, "manifest": manifest}


def _read_arrays(
    manager: "CheckpointManager", step: int, kinds: dict[str, Kind | None], like: dict[str, Leaf]
) -> dict[str, Stored]:
    """Read the arrays of a step, by path."""
    target = {
        path or BARE: _target(kind, like[path])
        for path, kind in kinds.items()
        if kind is not None and 0 not in kind.shape
    }
    args = orbax("restore_run").args.StandardRestore(target)
    arrays = _read(manager, step, "state", args)
    return {path: arrays[path or BARE] for path in kinds if (path or BARE) in target}


def _read(manager: "CheckpointManager", step: int, item: str, args: object) -> Any:
    """Read one item of a step."""
    composite = orbax("restore_run").args.Composite(**{item: args})
    try:
        return manager.restore(step, args=composite)[item]
    except Exception as error:  # orbax has no type of its own for what it cannot read
        why = f"its {item} cannot be read ({str(error).partition(chr(10))[0]:.200})"
        raise _damaged(manager, step, why) from error


def _damaged(manager: "CheckpointManager", step: int, what: str) -> ValueError:
    others = [other for other in sorted(manager.all_steps()) if other != step]
    hint = f"Restore another step: {others}" if others else "There is no other step: start anew"
    return ValueError(f"Step {step} in {str(manager.directory)!r} is damaged: {what}. {hint}.")
