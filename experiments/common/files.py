"""Files that are whole or absent whatever happens, and a lock on the folder that they lie in."""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


def write(path: Path, content: bytes | str) -> None:
    """Write a file in one stroke: whoever is killed on the way leaves the old one, or none.

    Args:
      path: its folder is made if need be.
      content: text is written as UTF-8.

    Raises:
      OSError: the disk is full, or else the file cannot be written; the old one is still there.
    """
    content = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.draft")
    with told(path, len(content)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as file:
                _write_through(file, content)
            os.replace(draft, path)
            _sync_names(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise


def append(path: Path, line: str) -> None:
    """Add a line to a file of whole lines; whoever is killed on the way leaves part of it.

    Raises:
      OSError: the disk is full, or else the file cannot be written; its old lines are still there.
    """
    end = None
    with told(path, len(line)):
        try:
            with open(path, "ab") as file:
                end = file.tell()
                _write_through(file, line.encode())
        except OSError:
            if end is not None:
                with contextlib.suppress(OSError):
                    os.truncate(path, end)
            raise


def truncate(path: Path, end: int) -> None:
    """Shorten a file to ``end`` bytes, or make an empty one; a full disk has room for both.

    Raises:
      OSError: the file cannot be written.
    """
    with told(path, 0), open(path, "ab") as file:
        file.truncate(end)


def sweep(folder: Path) -> None:
    """Remove what those who were killed had begun to write; only for who holds the lock.

    The library writes its files in hidden folders beside them, ``.a.safetensors.1x2y3z4w``.
    """
    for draft in list(folder.rglob(".*.draft")):
        draft.unlink()
    for draft in list(folder.rglob(".*.*.????????")):
        shutil.rmtree(draft)


@contextlib.contextmanager
def told(path: Path, size: int) -> Iterator[None]:
    """Say of an error which file could not be written, and what that means for the run.

    Raises:
      OSError: that of the block, with its number.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno,
            f"{str(path)!r} cannot be written: {os.strerror(error.errno or 0)}; {size:,} bytes are "
            f"to be written, and {_free(path)} are free there. Nothing that was finished is lost: "
            f"put that right, and the same command goes on where it stopped.",
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process until the block ends.

    The lock is the system's: whatever ends the process opens it at once, even ``kill -9``. Those
    who only read need no lock. Windows has none, and there nobody is kept out.

    Args:
      folder: made if need be.

    Raises:
      RuntimeError: another process is at work in the folder, which is left as it is.
      OSError: the folder cannot be made or written to.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"`out={str(folder)!r}` cannot be written to: {error.strerror}; {_free(folder)} bytes "
            f"are free there. Nothing was trained. Choose another `out`, or put that right.",
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _take(path: Path) -> int:
    """Lock a file and leave a note in it of who holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is None:
        return handle
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise RuntimeError(_in_use(path)) from error
    if not os.fstat(handle).st_nlink:  # its last holder has just removed it
        os.close(handle)
        return _take(path)
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    return handle


def _in_use(path: Path) -> str:
    try:
        holder = "process {pid} on {host!r}".format(**json.loads(path.read_text()))
    except (OSError, ValueError, KeyError):  # the note is not written yet, or not any more there
        holder = "another process"
    return (
        f"`out={str(path.parent)!r}` is in use by {holder}. Wait until that run ends, stop it, or "
        f"choose another `out`."
    )


def _write_through(file: BinaryIO, content: bytes) -> None:
    """Write to the disk and not only to the system's cache: a power cut must not change the order.

    A record says that its arrays are saved, so it must not outlive them.
    """
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _sync_names(folder: Path) -> None:
    """Write the names in a folder to the disk, where the system has a way to do so."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _free(path: Path) -> str:
    """Count the bytes that are free where a file or a folder is to lie."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f"{shutil.disk_usage(folder).free:,}"
