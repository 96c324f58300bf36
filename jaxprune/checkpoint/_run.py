"""A pruned run on disk: steps that survive a kill, to go on with as if nothing had happened."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxprune
from jaxprune._tree import is_array, list_paths
from jaxprune.checkpoint._frame import FORMAT, check_format
from jaxprune.checkpoint._leaves import (
    Kind,
    differences,
    digest,
    fill_in,
    from_bits,
    kind_of,
    list_lines,
    named,
    on_host,
    place,
    sharding_of,
    to_bits,
    words,
)

Folder = str | os.PathLike[str]
BARE = "(root)"  # the name of a state that is a single array
BYTES = ("uint2", "uint4")  # what tensorstore has no dtype for


def save_run(
    folder: Folder,
    step: int,
    state: Any,
    *,
    config: Mapping[str, Any] | None = None,
    keep: int = 3,
) -> None:
    """Save a step of a run, to go on from there with ``restore_run``.

    The state is any tree: params, optimizer state with its masks, keys, a ``TrainState``, an nnx
    state, numbers. Bool arrays, which masks are, take one bit an element. Orbax writes the arrays,
    sharded ones from the devices that hold them, and a step appears in the folder once it is
    complete: whoever is killed on the way leaves the steps before it.

    Args:
      folder: folder of the run; made if need be. One process writes to it at a time.
      step: number of the step, above those that are there.
      state: arrays, typed random keys and numbers in any tree.
      config: what the run depends on, in JSON types; restoring with another one is refused.
      keep: how many of the latest steps stay.

    Raises:
      ValueError: the folder holds this step or a later one, or steps of another config; ``step`` or
        ``keep`` is out of range; two leaves have one path.
      TypeError: a leaf is no array or number, or ``config`` does not consist of JSON types.
      OSError: the folder cannot be written.
      ImportError: orbax-checkpoint is not installed.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.prune(optax.adam(0.1), schedule=jp.schedules.constant(0.5))
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state = {"params": params, "opt_state": tx.init(params)}
      >>> folder = tempfile.mkdtemp()
      >>> jp.checkpoint.save_run(folder, 100, state, config={"learning_rate": 0.1})
      >>> jp.checkpoint.latest_step(folder)
      100
    """
    step = _whole(step)
    if type(step) is not int or step < 0 or type(keep) is not int or keep < 1:
        raise ValueError(
            f"`save_run` got step={step!r} and keep={keep!r}. Steps are integers from 0 on, and at "
            "least one is kept."
        )
    leaves = named(state, "save_run(state)")
    manifest = {"jaxprune": jaxprune.__version__, "config": _checked(config, "save_run")}
    kinds = {path: kind_of(leaf) for path, leaf in leaves.items()}
    stored = {path: _store(leaves[path], kind) for path, kind in kinds.items() if kind}
    manifest["leaves"] = {path: _record(kind, stored.get(path)) for path, kind in kinds.items()}
    arrays = {path or BARE: array for path, array in stored.items() if array.size}
    if not arrays:
        raise ValueError("`save_run` got a state without arrays. Pass what the run goes on from.")
    args = _orbax("save_run").args
    items = {"state": args.StandardSave(arrays), "manifest": args.JsonSave(_seal(manifest))}
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with _manager(folder, max_to_keep=keep, cleanup_tmp_directories=True) as manager:
            _refuse_another_run(manager, step, manifest["config"])
            manager.save(step, args=args.Composite(**items), force=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"`save_run` cannot write step {step} to {str(folder)!r}: {error.strerror}. The steps "
            "that were there are as they were; choose a folder that can be written",
        ) from error


def _whole(step: Any) -> Any:
    """An integer array of one element, such as a ``TrainState`` counts in, as a number."""
    one = is_array(step) and not step.shape and np.issubdtype(step.dtype, np.integer)
    return int(step) if one else step


def restore_run(
    folder: Folder,
    like: Any,
    *,
    config: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> Any:
    """Give back the state of a run as ``save_run`` got it.

    It has the structure of ``like``, on the devices and shardings of ``like``, masks as bits or as
    bools as they are there, numbers as numbers: a step that was jitted for ``like`` goes on without
    a retrace. How many devices the run had when it was saved does not matter.

    Args:
      folder: folder of the run.
      like: a state of the same run, such as the one that it starts from, or its shapes. Its values
        do not matter.
      config: refuse a run of another config, naming the fields; None takes any.
      step: which step; the latest complete one by default.

    Returns:
      The state.

    Raises:
      ValueError: the step is not there, is damaged or of a newer format, its config is another one,
        or its leaves are not those of ``like``: then all differences, path by path.
      FileNotFoundError: the folder holds no complete step.
      TypeError: a leaf of ``like`` is no array or number.
      ImportError: orbax-checkpoint is not installed.

    Example:
      >>> import tempfile
      >>> import jax
      >>> import jaxprune as jp
      >>> folder, state = tempfile.mkdtemp(), {"level": 0, "key": jax.random.key(0)}
      >>> if jp.checkpoint.latest_step(folder) is not None:  # the head of a script that goes on
      ...     state = jp.checkpoint.restore_run(folder, state)
      >>> jp.checkpoint.save_run(folder, 1, state | {"level": 1})
      >>> jp.checkpoint.restore_run(folder, state)["level"]
      1
    """
    leaves = named(like, "restore_run(like)")
    config = None if config is None else _checked(config, "restore_run")
    _orbax("restore_run")
    if latest_step(folder) is None:
        raise FileNotFoundError(
            f"`restore_run` got {str(folder)!r}, which holds no complete step of a run. Save one "
            "with `jp.checkpoint.save_run`, or start anew."
        )
    with _manager(folder) as manager:
        step = _existing(manager, step)
        manifest = _read_manifest(manager, step)
        if config is not None:
            _refuse_another_config(manager, manifest["config"], config, "restore_run")
        kinds = _kinds(manifest["leaves"])
        _refuse_other_leaves(manager, step, kinds, leaves)
        arrays = _read_state(manager, step, kinds, leaves)
        _refuse_damaged(manager, step, arrays, manifest["leaves"])
    values = {path: _load(kind, arrays.get(path), leaves[path]) for path, kind in kinds.items()}
    return fill_in(like, values)


def latest_step(folder: Folder) -> int | None:
    """Say which complete step of a run is the latest.

    Args:
      folder: folder of the run.

    Returns:
      The number of the step, or None if there is none, or no folder.

    Raises:
      ImportError: orbax-checkpoint is not installed.

    Example:
      >>> import jaxprune as jp
      >>> jp.checkpoint.latest_step("a_run_that_nobody_started") is None
      True
    """
    _orbax("latest_step")
    if not Path(folder).is_dir():
        return None
    with _manager(folder) as manager:
        return manager.latest_step()


def _orbax(user: str) -> Any:
    """Import orbax, or say how to get it."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            f"`{user}` needs orbax-checkpoint, which is not installed. Install it with "
            "`pip install 'jaxprune[checkpoint]'`."
        ) from error
    return ocp


def _manager(folder: Folder, **options: Any) -> Any:
    """Open a folder. Synchronous: a save that returned is on disk."""
    ocp = _orbax("save_run")
    settings = {"create": False, "enable_async_checkpointing": False, **options}
    path = Path(folder).absolute()
    return ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**settings))


def _store(leaf: Any, kind: Kind) -> Any:
    """What orbax gets to write: masks as bits, keys as their words, numbers as arrays."""
    if kind.dtype == "bool":
        return to_bits(on_host(leaf))
    if kind.dtype in BYTES:
        return words(on_host(leaf))
    if isinstance(leaf, jax.Array) and not kind.key:
        return leaf
    return np.ascontiguousarray(on_host(leaf), np.dtype(kind.dtype)).reshape(kind.shape)


def _target(kind: Kind, like: Any) -> Any:
    """How orbax is to give back what ``_store`` gave it: on its devices, or to the host first."""
    if kind.dtype == "bool":
        return np.empty(-(-math.prod(kind.shape) // 8), np.uint8)
    if kind.dtype in BYTES:
        return np.empty((math.prod(kind.shape), 1), np.uint8)
    sharding = sharding_of(like)
    if sharding is None or not kind.shape or kind.key:
        return np.empty(kind.shape, np.dtype(kind.dtype))
    return jax.ShapeDtypeStruct(kind.shape, np.dtype(kind.dtype), sharding=sharding)


def _load(kind: Kind | None, array: Any, like: Any) -> Any:
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


def _record(kind: Kind | None, stored: Any) -> dict[str, Any] | None:
    """A leaf in the manifest; None for a hole."""
    return kind and {**kind._asdict(), "sha256": _digest(stored)}


def _digest(array: Any) -> str | None:
    """The checksum of what is stored, where one process sees all of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return digest(np.asarray(array))


def _seal(manifest: dict[str, Any], form: Any = FORMAT) -> dict[str, Any]:
    """Put a format and a checksum around a manifest."""
    text = json.dumps([form, manifest], sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"format": form, "sha256": sha256, "manifest": manifest}


def _read_manifest(manager: Any, step: int) -> dict[str, Any]:
    """Read what ``_seal`` made, and see that it is whole and of our format."""
    if not (manager.directory / str(step) / "manifest").is_dir():
        raise ValueError(
            f"Step {step} in {str(manager.directory)!r} has no manifest of jaxprune: something "
            "else wrote it. Choose a folder of `jp.checkpoint.save_run`."
        )
    sealed = _read(manager, step, "manifest", _orbax("restore_run").args.JsonRestore())
    found = {"manifest": None, "format": None} | (sealed if isinstance(sealed, dict) else {})
    if not found["manifest"] or found != _seal(found["manifest"], found["format"]):
        raise _damaged(manager, step, "its manifest does not match its checksum")
    check_format(found["format"], str(manager.directory), "restore_run")
    return found["manifest"]


def _read_state(
    manager: Any, step: int, kinds: dict[str, Kind | None], like: dict[str, Any]
) -> dict[str, Any]:
    """Read the arrays of a step, by path."""
    target = {
        path or BARE: _target(kind, like[path])
        for path, kind in kinds.items()
        if kind is not None and 0 not in kind.shape
    }
    args = _orbax("restore_run").args.StandardRestore(target)
    arrays = _read(manager, step, "state", args)
    return {path: arrays[path or BARE] for path in kinds if (path or BARE) in target}


def _read(manager: Any, step: int, item: str, args: Any) -> Any:
    """Read one item of a step."""
    composite = _orbax("restore_run").args.Composite(**{item: args})
    try:
        return manager.restore(step, args=composite)[item]
    except Exception as error:  # orbax has no type of its own for what it cannot read
        why = f"its {item} cannot be read ({str(error).partition(chr(10))[0]:.200})"
        raise _damaged(manager, step, why) from error


def _kinds(records: dict[str, Any]) -> dict[str, Kind | None]:
    """The leaves that a manifest speaks of."""
    return {
        path: record and Kind(record["dtype"], tuple(record["shape"]), record["key"])
        for path, record in records.items()
    }


def _existing(manager: Any, step: int | None) -> int:
    """The step that was asked for, or the latest."""
    step = _whole(step)
    if step is None:
        return manager.latest_step()
    steps = sorted(manager.all_steps())
    if step not in steps:
        raise ValueError(
            f"`restore_run` got step={step!r}, but {str(manager.directory)!r} holds {steps}. "
            "Choose one of them, or none for the latest."
        )
    return step


def _checked(config: Mapping[str, Any] | None, user: str) -> Any:
    """Give a config the form in which it comes back from JSON."""
    bad = []
    for name, value in dict(config or {}).items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            bad.append(f"{name!r} is {value!r:.80}")
    if bad:
        raise TypeError(
            f"`{user}(config=...)` got what JSON does not know: {', '.join(bad)}. Use strings, "
            "finite numbers, bools, None, lists and dicts."
        )
    return None if config is None else json.loads(json.dumps(dict(config)))


def _refuse_another_config(manager: Any, there: Any, here: Any, user: str) -> None:
    lines = list(_changes(there or {}, here or {}))
    if lines:
        raise ValueError(
            f"`{user}` got {str(manager.directory)!r}, which holds a run of another config: "
            f"{', '.join(lines)}. Go on with the same config, or choose another folder."
        )


def _changes(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """The fields in which two configs differ."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        if there != here:
            yield f"{name} ({there!r} there, {here!r} here)"
        return
    for key in {**there, **here}:
        yield from _changes(there.get(key), here.get(key), f"{name}.{key}" if name else key)


def _refuse_another_run(manager: Any, step: int, config: Any) -> None:
    """Refuse to mix runs in a folder, or to put a step before later ones."""
    latest = manager.latest_step()
    if latest is None:
        return
    if step <= latest:
        raise ValueError(
            f"`save_run` got step={step}, but {str(manager.directory)!r} holds step {latest} "
            "already. Go on from there with `restore_run`, or choose another folder."
        )
    there = _read_manifest(manager, latest)["config"]
    _refuse_another_config(manager, there, config, "save_run")


def _refuse_other_leaves(
    manager: Any, step: int, kinds: dict[str, Kind | None], like: dict[str, Any]
) -> None:
    lines = differences(kinds, {path: kind_of(leaf) for path, leaf in like.items()})
    if lines:
        raise ValueError(
            f"`restore_run` got a state unlike that of step {step} in "
            f"{str(manager.directory)!r}: {list_lines(lines)}\nBuild `like` as the run that was "
            "saved did."
        )


def _refuse_damaged(
    manager: Any, step: int, arrays: dict[str, Any], records: dict[str, Any]
) -> None:
    """Compare with the checksums, where one process can see the array."""
    bad = []
    for path, array in arrays.items():
        found = _digest(array)
        if None not in (found, records[path]["sha256"]) and found != records[path]["sha256"]:
            bad.append(path)
    if bad:
        raise _damaged(manager, step, f"{list_paths(bad)} do not match their checksum")


def _damaged(manager: Any, step: int, what: str) -> ValueError:
    others = [other for other in sorted(manager.all_steps()) if other != step]
    hint = f"Restore another step: {others}" if others else "There is no other step: start anew"
    return ValueError(f"Step {step} in {str(manager.directory)!r} is damaged: {what}. {hint}.")
