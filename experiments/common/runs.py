"""Run folders: a checked config, one line a result, and files that are whole or absent."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

Record = dict[str, Any]
Cut = dict[str, dict[int, list[int]]]  # path: axis: indices that stay


def write(path: Path, content: bytes | str) -> None:
    """Write a file in one stroke: whoever is killed on the way leaves the old one, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(draft, path)


def open_run(folder: Path, config: Record) -> list[Record]:
    """Start a run in ``folder``, or go on with the one that is there.

    Args:
      folder: made if need be.
      config: settings that the results depend on, as JSON types.

    Returns:
      The records that are finished already.

    Raises:
      ValueError: the folder holds a run of other settings.
    """
    path, metrics = folder / "config.json", folder / "metrics.jsonl"
    if path.exists():
        _refuse_another_config(folder, json.loads(path.read_text()), json.loads(json.dumps(config)))
    elif metrics.exists():
        raise ValueError(
            f"`out={str(folder)!r}` holds a metrics.jsonl but no config.json, so nobody can tell "
            f"which settings gave it. Choose another `out`, or delete the folder."
        )
    else:
        write(path, json.dumps(config, indent=2) + "\n")
    records = read_records(folder)
    write(metrics, "".join(map(_line, records)))  # without the torn line, if there was one
    return records


def append_record(folder: Path, record: Record) -> None:
    """Add a line to ``metrics.jsonl``."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(_line(record))


def read_config(folder: Path) -> Record:
    """Read the settings of the run in ``folder``."""
    return json.loads(_existing(folder, "config.json").read_text())


def read_summary(folder: Path) -> Record:
    """Read the summary of the run in ``folder``, which is there once it has finished."""
    return json.loads(_existing(folder, "summary.json").read_text())


def read_records(folder: Path) -> list[Record]:
    """Read ``metrics.jsonl``; a last line that was cut short counts as never written.

    Raises:
      ValueError: a line before the last cannot be read.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith("\n"):
                break
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"Line {number} of {str(path)!r} is not JSON: {line.strip()[:60]!r}. Only the last "
                f"line may be cut short. Delete that line; its result is then computed again."
            ) from error
    return records


def save_level(folder: Path, seed: int, level: int, masks: Any, trained: Any) -> None:
    """Save the masks of a level, a bit a weight, and the weights trained under them."""
    masks = {path: np.packbits(mask) for path, mask in _arrays(masks).items()}
    _save(_level(folder, seed, level), masks=masks, trained=_arrays(trained))


def load_level(folder: Path, seed: int, level: int) -> tuple[Any, Any]:
    """Load the masks and the trained weights that :func:`save_level` saved."""
    saved = _load(_level(folder, seed, level))
    trained, packed = saved["trained"], saved["masks"]
    masks = {
        path: _unpack(packed[path], array.shape) if path in packed else None
        for path, array in trained.items()
    }
    return unflatten_dict(masks, sep="/"), unflatten_dict(trained, sep="/")


def save_start(folder: Path, seed: int, start: Any) -> None:
    """Save the weights that every ticket of a seed is rewound to."""
    _save(_start(folder, seed), start=_arrays(start))


def load_start(folder: Path, seed: int) -> Any:
    """Load the weights that :func:`save_start` saved."""
    return unflatten_dict(_load(_start(folder, seed))["start"], sep="/")


def save_network(path: Path, variables: Any, cut: Cut) -> None:
    """Save a small network: its variables, and which indices of the dense ones they are."""
    kept = {
        f"{name}:{axis}": np.asarray(indices, np.int32)
        for name, axes in cut.items()
        for axis, indices in axes.items()
    }
    _save(path, variables=_arrays(variables), cut=kept)


def load_network(path: Path) -> tuple[Any, Cut]:
    """Load the variables and the cut that :func:`save_network` saved."""
    saved = _load(path)
    cut: Cut = {}
    for place, indices in saved.get("cut", {}).items():
        name, _, axis = place.rpartition(":")
        cut.setdefault(name, {})[int(axis)] = indices.tolist()
    return unflatten_dict(saved["variables"], sep="/"), cut


def _start(folder: Path, seed: int) -> Path:
    return folder / f"seed_{seed}" / "start.npz"


def _level(folder: Path, seed: int, level: int) -> Path:
    return folder / f"seed_{seed}" / f"level_{level:02d}.npz"


def _arrays(tree: Any) -> dict[str, np.ndarray]:
    """Flatten to ``path: array``, without the holes."""
    leaves = flatten_dict(tree, sep="/").items()
    return {path: np.asarray(leaf) for path, leaf in leaves if leaf is not None}


def _unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(bits, count=np.prod(shape, dtype=int)).astype(bool).reshape(shape)


def _save(path: Path, **groups: dict[str, np.ndarray]) -> None:
    """Save named groups of arrays; compressed, since most of a sparse ticket is zeros."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **flatten_dict(groups, sep="/"))
    write(path, buffer.getvalue())


def _load(path: Path) -> dict[str, dict[str, np.ndarray]]:
    groups = {}
    with np.load(_existing(path.parent, path.name)) as file:
        for name in file:
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = file[name]
    return groups


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"There is no {name} in {str(folder)!r}, so it is no finished run. Point to a run "
            f"folder, or run the experiment again: it goes on where it stopped."
        )
    return folder / name


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _refuse_another_config(folder: Path, there: Record, now: Record) -> None:
    names = [name for name in {**there, **now} if there.get(name) != now.get(name)]
    if names:
        fields = ", ".join(f"{n} ({there.get(n)!r} there, {now.get(n)!r} now)" for n in names)
        raise ValueError(
            f"`out={str(folder)!r}` holds a run with another config: {fields}. Go on with the same "
            f"settings, choose another `out`, or delete the folder."
        )
