"""Run folders: a checked config, one line a result, and files that are whole or absent."""

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.common import files
from experiments.common.files import write

Record = dict[str, Any]
Cut = dict[str, dict[int, list[int]]]  # path: axis: indices that stay


def open_run(folder: Path, config: Record) -> list[Record]:
    """Start a run in ``folder``, or go on with the one that is there.

    Args:
      folder: made if need be.
      config: settings that the results depend on, as JSON types.

    Returns:
      The records that are finished already.

    Raises:
      ValueError: the folder holds a run of other settings, or a damaged one.
      OSError: nothing can be written there.
    """
    path, metrics = folder / "config.json", folder / "metrics.jsonl"
    if path.exists():
        _refuse_another_config(folder, read_config(folder), json.loads(json.dumps(config)))
    elif metrics.exists():
        raise ValueError(
            f"`out={str(folder)!r}` holds a metrics.jsonl but no config.json, so nobody can tell "
            f"which settings gave it. Choose another `out`, or delete the folder."
        )
    else:
        write(path, json.dumps(config, indent=2) + "\n")
    files.cut(metrics, _scan(metrics)[1])  # without the torn line, if there was one
    records = read_records(folder)
    if _parts(folder):
        settle(folder, records)
    return records


def append_record(folder: Path, record: Record, part: str = "") -> None:
    """Add a line to ``metrics.jsonl``, or to a process's part of it.

    Raises:
      OSError: it cannot be written; the lines before it are still there.
    """
    files.append(folder / f"metrics{part}.jsonl", _line(record))


def settle(folder: Path, records: list[Record]) -> None:
    """Make ``records`` all of ``metrics.jsonl``; parts of it are done with.

    Raises:
      OSError: it cannot be written; it and its parts are as they were.
    """
    lines, path = "".join(map(_line, records)), folder / "metrics.jsonl"
    if path.read_text() != lines:
        write(path, lines)
    for part in _parts(folder):
        part.unlink()


def read_config(folder: Path) -> Record:
    """Read the settings of the run in ``folder``."""
    return _read_json(folder, "config.json")


def read_summary(folder: Path) -> Record:
    """Read the summary of the run in ``folder``, which is there once it has finished."""
    return _read_json(folder, "summary.json")


def read_records(folder: Path) -> list[Record]:
    """Read ``metrics.jsonl`` and what several processes have not yet put into it.

    A last line that was cut short counts as never written.

    Raises:
      ValueError: a line before the last cannot be read.
    """
    records = _scan(folder / "metrics.jsonl")[0]
    for part in _parts(folder):  # a kill may have left what is in both
        records += [record for record in _scan(part)[0] if record not in records]
    return records


def save_level(folder: Path, seed: int, level: int, masks: Any, trained: Any) -> None:
    """Save the masks of a level, a bit a weight, and the weights trained under them."""
    masks = {path: np.packbits(mask) for path, mask in _arrays(masks).items()}
    _save(_level(folder, seed, level), masks=masks, trained=_arrays(trained))


def has_level(folder: Path, seed: int, level: int) -> bool:
    """Tell whether a level has been saved; what is there is whole."""
    return _level(folder, seed, level).exists()


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


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("metrics.p*of*.jsonl"))


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
    groups: dict[str, dict[str, np.ndarray]] = {}
    try:
        with open(_existing(path.parent, path.name), "rb") as file, np.load(file) as arrays:
            for name in arrays:
                group, _, rest = name.partition("/")
                groups.setdefault(group, {})[rest] = arrays[name]
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error}. Delete it, and the same command computes it again."
        ) from error
    return groups


def _read_json(folder: Path, name: str) -> Record:
    path = _existing(folder, name)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is damaged: {error}. Put back what was there, or delete the folder and "
            f"run the experiment again."
        ) from error


def _scan(path: Path) -> tuple[list[Record], int]:
    """Read lines of JSON, and tell at which byte the last whole one ends."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records: list[Record] = []
    end = 0
    for number, line in enumerate(lines, start=1):
        try:
            if not line.endswith(b"\n"):
                break
            records.append(json.loads(line.decode()))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"Line {number} of {str(path)!r} is not JSON: {_shown(line)!r}. Only the last line "
                f"may be cut short. Delete that line; its result is then computed again."
            ) from error
        end += len(line)
    return records, end


def _shown(line: bytes) -> str:
    return line.decode(errors="replace").strip()[:60]


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
