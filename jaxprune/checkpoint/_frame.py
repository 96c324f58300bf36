"""The frame of a model file: a safetensors head under a seal, and files whole or absent."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import jaxprune
from jaxprune._atomic import in_place, told

# Why the frame is written by hand, though the safetensors library writes the same: it checks no
# byte of the data (a flipped bit comes back without a word), has no float8 or int4 of NumPy's
# (0.8), and wants all tensors in memory at once; and a model is to be read where NumPy is all there
# is. The library reads what is written here, which a test sees to.

Manifest = dict[str, Any]  # in JSON: what the file is, and a record of each leaf
Places = dict[str, dict[str, Any]]  # in JSON: dtype, shape and offsets of each tensor

FORMAT = 1
MOST = 100_000_000  # bytes of a head; what the safetensors library accepts
NO_SEAL = "0" * 64

# What every release of the safetensors library knows; all other dtypes travel as bytes.
CODES = {
    **{"bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64"},
    **{"int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64", "bfloat16": "BF16"},
    **{"float16": "F16", "float32": "F32", "float64": "F64"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}
MAGIC = {
    b"PK": "a zip archive, such as npz",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"\x93NUMPY": "an npy file",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
}


class Tensor(NamedTuple):
    """A stretch of the file.

    Attributes:
      dtype: of the elements.
      shape: of the elements.
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def layout(tensors: Mapping[str, Tensor]) -> Places:
    """Lay tensors out one behind the other: wide elements first, so that all are aligned."""
    places: Places = {}
    end = 0
    for name, t in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        code = CODES.get(t.dtype.name)
        start, end = end, end + t.size
        shape = list(t.shape) if code else [t.size]
        places[name] = {"dtype": code or "U8", "shape": shape, "data_offsets": [start, end]}
    return places


def make_head(tensors: Mapping[str, Tensor], leaves: list[dict[str, Any]]) -> bytes:
    """Write a safetensors head with a manifest of the leaves in its metadata, and seal it."""
    version = jaxprune.__version__
    manifest = {"format": FORMAT, "jaxprune": version, "sha256": NO_SEAL, "leaves": leaves}
    metadata = {"__metadata__": {"jaxprune": _json(manifest)}}
    text = _json(metadata | layout(tensors)).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head.replace(NO_SEAL.encode(), _seal(head).encode(), 1)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _seal(head: bytes) -> str:
    """The checksum of a head that has zeros in the place of its checksum."""
    return hashlib.sha256(head).hexdigest()


def read_head(path: Path, user: str) -> tuple[Manifest, Places, int]:
    """Read and check the head of a model file: its manifest, its tensors, where their data starts.

    Raises:
      ValueError: the file is no model, is damaged, or is of a newer format.
    """
    if path.is_dir():
        raise ValueError(
            f"`{user}` got {str(path)!r}, which is a folder; a model is one file. Steps of a run "
            "come back with `jp.checkpoint.restore_run`."
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        head = file.read(min(start, 8 + MOST))
    if len(head) < start or head[8:9] != b"{":
        raise ValueError(f"`{user}` got {str(path)!r}, which {_what(head, start, size)}.")
    return *_open_head(head, path, user), start


def check_size(path: Path, end: int, user: str) -> None:
    """Refuse a file that ends before its data or goes on after it."""
    size = path.stat().st_size
    if size != end:
        state = f"is cut short: {size:,} of {end:,} bytes are there"
        state = state if size < end else f"has {size - end:,} bytes behind its end"
        raise ValueError(f"`{user}` got {str(path)!r}, which {state}. Copy it again.")


def _open_head(head: bytes, path: Path, user: str) -> tuple[Manifest, Places]:
    """Take a head apart, after its checksum."""
    try:
        places = json.loads(head[8:].decode())
        metadata = places.pop("__metadata__", {})
        manifest = json.loads(metadata.get("jaxprune", "null"))
        seal = str((manifest or {}).get("sha256"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, user, "its head cannot be read") from error
    if manifest is None:
        raise ValueError(
            f"`{user}` got {str(path)!r}, a safetensors file without a manifest of jaxprune. Read "
            "it with `safetensors.numpy.load_file`, or write one with `jp.checkpoint.save`."
        )
    bare = head.replace(seal.encode(), NO_SEAL.encode()) if len(seal) == len(NO_SEAL) else b""
    if _seal(bare) != seal:
        raise damaged(path, user, "its head does not match its checksum")
    check_format(manifest.get("format"), str(path), user)
    return manifest, places


def _what(head: bytes, start: int, size: int) -> str:
    """Say what a file is that cannot be a model."""
    for magic, name in MAGIC.items():
        if head.startswith(magic) and head[8:9] != b"{":
            return f"is {name}, no model of `jp.checkpoint.save`; nothing of it was loaded"
    if head[8:9] == b"{":
        return f"is cut short or damaged: its head should end at byte {start:,} of {size:,}"
    return "is empty" if not head else "is no model of `jp.checkpoint.save`, or damaged"


def damaged(path: Path, user: str, what: str) -> ValueError:
    """Say that a file is not what was written."""
    return ValueError(
        f"`{user}` got {str(path)!r}, which is damaged: {what}. Copy it again, or save it anew."
    )


def check_format(found: object, path: str, user: str) -> None:
    """Refuse what a newer jaxprune wrote."""
    if found != FORMAT:
        raise ValueError(
            f"`{user}` got {path!r}, written by a newer jaxprune (format {found}, this one reads "
            f"{FORMAT}): upgrade."
        )


def put(path: Path, chunks: Iterable[bytes | memoryview], user: str) -> None:
    """Write a file in one stroke: who is killed or fails on the way leaves the old one, or none."""
    advice = "What was there is as it was; choose a path that can be written"
    cannot = f"`{user}` cannot write {str(path)!r}"
    # The file is closed before `in_place` moves it.
    with told(cannot, advice), in_place(path) as written, written.open("xb") as file:
        file.writelines(chunks)
