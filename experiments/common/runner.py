"""Run folders: who is killed goes on with the same command, and ends with the same bytes.

A folder holds ``config.json``, ``metrics.jsonl`` (a record a line, one for each training run),
``summary.json`` once all is done, and whatever files the experiment keeps beside them.
"""

import contextlib
import dataclasses
import json
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import tyro
from tqdm import tqdm

import jaxprune as jp
from experiments.common import files

Record = dict[str, Any]  # of JSON types
Key = tuple[Any, ...]  # values of the fields that tell training runs apart


@dataclasses.dataclass
class Run:
    """An opened run folder.

    Attributes:
      folder: where it lies.
      fields: of a record; together they tell which training run it is of.
      records: what is finished, by these fields.
    """

    folder: Path
    fields: Sequence[str]
    records: dict[Key, Record]

    def fill(
        self,
        planned: Sequence[Key],
        make: Callable[[list[Key]], Iterable[Record]],
        *,
        is_saved: Callable[[Key], bool] = lambda key: True,
    ) -> list[Record]:
        """Give the records of planned training runs, of which what is missing is made first.

        Each record is written down as soon as it is there. Who is killed loses what comes after.

        Args:
          planned: training runs, in the order in which they are to be listed.
          make: from those that are missing to their records. It may give others too, such as of
            seeds that train side by side with a missing one; what is finished stays as it is.
          is_saved: whether the files of a finished training run are there.
        """
        missing = [key for key in planned if key not in self.records or not is_saved(key)]
        done = len(planned) - len(missing)
        with tqdm(total=len(planned), initial=done, unit="run", disable=not missing) as bar:
            for record in make(missing) if missing else ():
                key = self.key_of(record)
                if key not in self.records:
                    self.add(record)
                if key in missing:
                    bar.set_postfix(dict(zip(self.fields, key, strict=True)), refresh=False)
                    bar.update()
        if list(self.records) != list(planned) and set(self.records) == set(planned):
            self._settle(planned)
        return [self.records[key] for key in planned]

    def add(self, record: Record) -> None:
        """Write a record down; whoever is killed from here on has it."""
        files.append(self.folder / "metrics.jsonl", _line(record))
        self.records[self.key_of(record)] = json.loads(_line(record))

    def key_of(self, record: Record) -> Key:
        """Tell which training run a record is of."""
        return tuple(record[field] for field in self.fields)

    def _settle(self, planned: Sequence[Key]) -> None:
        """Bring the records into the order of the plan, whatever order they were made in."""
        self.records = {key: self.records[key] for key in planned}
        lines = "".join(map(_line, self.records.values()))
        files.write(self.folder / "metrics.jsonl", lines)


@contextlib.contextmanager
def open_run(folder: Path, config: Record, fields: Sequence[str]) -> Iterator[Run]:
    """Start a run in a folder or go on with it, and keep the folder until the block ends.

    Args:
      folder: made if need be.
      config: settings that the results depend on, as ``settings.recorded`` gives them.
      fields: of a record; together they tell which training run it is of.

    Raises:
      RuntimeError: another process is at work in the folder.
      ValueError: the folder holds a run of other settings, or a damaged one.
      OSError: nothing can be written there.
    """
    config = json.loads(json.dumps(config))
    with files.locked(folder):
        path, metrics = folder / "config.json", folder / "metrics.jsonl"
        files.sweep(folder)
        if path.exists():
            _refuse_another_config(folder, read_config(folder), config)
        elif metrics.exists():
            raise ValueError(
                f"`out={str(folder)!r}` holds a metrics.jsonl but no config.json, so nobody can "
                f"tell which settings gave it. Choose another `out`, or delete the folder."
            )
        else:
            files.write(path, json.dumps(config, indent=2) + "\n")
        files.truncate(metrics, _scan(metrics)[1])  # without the torn line, if there was one
        run = Run(folder, fields, {})
        run.records = {run.key_of(record): record for record in read_records(folder)}
        yield run


def save(path: Path, params: Any, masks: Any = None) -> None:
    """Save arrays, and maybe masks, as ``jp.checkpoint.save`` does: all or nothing.

    Raises:
      OSError: the disk is full, or else the file cannot be written.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    with files.told(path, size):
        jp.checkpoint.save(path, params, masks)


def load(path: Path) -> tuple[Any, Any]:
    """Load what :func:`save` saved: arrays, zero where a mask is False, and masks.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        return jp.checkpoint.load(path)
    except ValueError as error:
        raise ValueError(f"{error} Or delete it: the same command computes it again.") from error


def read_config(folder: Path) -> Record:
    """Read the settings of the run in ``folder``."""
    return _read_json(folder, "config.json")


def read_summary(folder: Path) -> Record:
    """Read the summary of the run in ``folder``, which is there once it has finished."""
    return _read_json(folder, "summary.json")


def read_records(folder: Path) -> list[Record]:
    """Read ``metrics.jsonl``; a last line that was cut short counts as never written.

    Raises:
      ValueError: a line before the last cannot be read.
    """
    return _scan(folder / "metrics.jsonl")[0]


def start(config: type, main: Callable[[Any], Any]) -> None:
    """Run an experiment from the command line; programs that it compiles outlive the process."""
    keep_programs()
    main(tyro.cli(config))


def keep_programs() -> None:
    """Let jax keep what it compiles in the user's cache, unless it has been told where already.

    A program that comes from there is, byte for byte, the one that was compiled, so its numbers
    are the same. It fits one kind of processor: every machine has a folder of its own.
    """
    import pooch

    if jax.config.jax_compilation_cache_dir is None:
        folder = pooch.os_cache("jaxprune") / "programs" / platform.node()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _read_json(folder: Path, name: str) -> Record:
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {name} in {str(folder)!r}, so it is no finished run. Point to a run "
            f"folder, or run the experiment again: it goes on where it stopped."
        )
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
            shown = line.decode(errors="replace").strip()[:60]
            raise ValueError(
                f"Line {number} of {str(path)!r} is not JSON: {shown!r}. Only the last line "
                f"may be cut short. Delete that line; its result is then computed again."
            ) from error
        end += len(line)
    return records, end


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
