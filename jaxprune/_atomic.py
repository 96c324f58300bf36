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
    back if that fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own for each writer: two that write one path do not meet before they are done.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        written = Path(folder) / path.name
        yield written
        for part in [x for x in written.rglob("*") if x.is_file()] or [written]:
            with part.open("rb+") as file:
                os.fsync(file.fileno())  # a name that outlives its bytes in a power cut is a lie
        if written.is_dir() and path.exists():
            _exchange(written, path, Path(folder) / "old")
        else:
            written.replace(path)


def _exchange(new: Path, path: Path, old: Path) -> None:
    """Put a folder in the place of another one, which no single stroke does."""
    path.replace(old)
    try:
        new.replace(path)
    except OSError:
        old.replace(path)
        raise


@contextlib.contextmanager
def told(what: str, advice: str) -> Iterator[None]:
    """Let an error of the file system say what could not be done, and what may help."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what}: {error.strerror}. {advice}") from error
