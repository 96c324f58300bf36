"""Files that are whole or absent: written beside their place, and moved there in one stroke."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces ``path`` if all went well.

    Readers see the old file or the new one, whole. Where something is raised the old one stays and
    nothing else does; where the process is killed, what was written lies in a hidden folder. The
    name is that of ``path``: some writers go by its suffix, or put files of their own beside it,
    which go with the folder. It may become a folder: one that it replaces is moved aside first, and
    back if that fails. That takes two strokes: of two writers of one folder who meet in between the
    last one tries again once, and who reads then may find no folder.

    Raises:
      NotADirectoryError: a part of the path is a file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            f"{str(path)!r} cannot be written: {str(path.parent)!r} is no folder, it or a part of "
            "it is a file. Pass another path."
        ) from error
    # A folder of its own for each writer: two that write one path do not meet before they are done.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        yield written
        for part in [x for x in written.rglob("*") if x.is_file()] or [written]:
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # a name that outlives its bytes in a power cut is a lie
        try:
            _put(written, path, Path(folder) / "old")
        except OSError:
            if not written.is_dir():
                raise
            _put(written, path, Path(folder) / "older")


def _put(new: Path, path: Path, old: Path) -> None:
    if new.is_dir() and path.exists():
        _exchange(new, path, old)
    else:
        new.replace(path)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Put a folder in the place of another one, which no single stroke does."""
    path.replace(old)
    try:
        new.replace(path)
    except OSError:
        if not path.exists():  # else another writer was faster
            old.replace(path)
        raise


@contextlib.contextmanager
def told(what: str, advice: str) -> Iterator[None]:
    """Let an error of the file system say what could not be done, and what may help."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}. {advice}") from error
