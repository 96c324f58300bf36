"""What a GGUF file says beside its tensors: architecture, sizes, tokenizer."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxprune._errors import short
from jaxprune.export._flat import is_text

Value: TypeAlias = str | bool | int | float | Sequence[str | bool | int | float]

ARCHITECTURE = "general.architecture"
FLOAT32 = float(np.finfo(np.float32).max)
# The writer's own business, which another file says of its own tensors.
OURS = {
    *(ARCHITECTURE, "general.file_type", "general.quantization_version", "general.alignment"),
    *("split.no", "split.count", "split.tensors.count"),
}


def fields_of(library: Any, like: Any) -> dict[str, Any]:
    """Read the metadata of a file; refuse what is none."""
    if like is None:
        return {}
    step = "Pass a GGUF file of the same model, or its `metadata=` as a dict."
    if not isinstance(like, str | os.PathLike):
        raise TypeError(f"`export.gguf` got like={short(like)}, which is no path of a file. {step}")
    if not Path(like).is_file():
        raise FileNotFoundError(f"`export.gguf(like={str(like)!r})` finds no such file. {step}")
    return dict(opened(library, Path(like), f"`export.gguf(like={str(like)!r})`", step).fields)


def opened(library: Any, path: str | Path, what: str, step: str) -> Any:
    """Open a file, or say what it is instead."""
    try:
        return library.GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{what} is no GGUF file, or damaged: {error}. {step}") from error


def check_metadata(library: Any, metadata: Any, fields: Mapping[str, Any]) -> None:
    """Refuse what GGUF has no type for, what another type is wanted for, and what is not theirs."""
    if metadata is None:
        return
    if not isinstance(metadata, Mapping):
        raise TypeError(
            f"`export.gguf` got metadata={short(metadata)}. Pass a dict such as "
            '`{"general.architecture": "llama", "llama.block_count": 30}`, or a file as `like=`.'
        )
    bad = [f"{k!r}: {short(v)}" for k, v in metadata.items() if not _is_value(v) or not _is_key(k)]
    if bad:
        raise TypeError(
            f"`export.gguf(metadata=...)` got {'; '.join(bad[:12])}. Pass strings, numbers, bools, "
            "or lists of one of these, by keys that are strings."
        )
    if not isinstance(metadata.get(ARCHITECTURE, ""), str):
        raise TypeError(
            f"`export.gguf(metadata=...)` got {ARCHITECTURE!r}: {short(metadata[ARCHITECTURE])}. "
            'Pass a name that llama.cpp knows, such as "llama".'
        )
    _check_ours(metadata)
    _check_range(metadata)
    _check_like(library, metadata, fields)


def _check_ours(metadata: Mapping[str, Value]) -> None:
    ours = [k for k in metadata if (k in OURS and k != ARCHITECTURE) or k.startswith("GGUF.")]
    if ours:
        raise ValueError(
            f"`export.gguf(metadata=...)` got {', '.join(map(repr, ours))}, which say how this "
            "very file is laid out: the type follows `quantization=`, the rest is the writer's. "
            "Leave them out."
        )


def _check_range(metadata: Mapping[str, Value]) -> None:
    """Refuse numbers and characters that no type of GGUF holds."""
    wide = []
    for key, value in metadata.items():
        rows = _rows(value)
        whole = [x for x in rows if isinstance(x, int)]
        # A list has one type: UINT64 reaches 2**64 from 0, INT64 has half of that on each side.
        most = 2**63 if whole and min(whole) < 0 else 2**64
        if any(not -(2**63) <= x < most for x in whole) or not all(map(_is_stored, [key, *rows])):
            wide.append(f"{key!r}: {short(value)}")
    if wide:
        raise ValueError(
            f"`export.gguf(metadata=...)` got {'; '.join(wide[:12])}, beyond what GGUF holds: "
            f"whole numbers of 64 bits, others up to {FLOAT32:.3g}, strings in UTF-8. Pass such "
            "ones, or write them as strings."
        )


def _is_stored(value: Any) -> bool:
    """Say whether a string is of whole characters, and a number within float32 or no number."""
    if isinstance(value, str):
        return is_text(value)
    return not isinstance(value, float) or not FLOAT32 < abs(value) < math.inf


def _check_like(library: Any, metadata: Mapping[str, Value], fields: Mapping[str, Any]) -> None:
    """Refuse what does not go into the type that its key has in the other file."""
    wrong = []
    for key in metadata.keys() & fields.keys():
        kind = _type_before(library, fields[key], metadata[key])
        if kind is not None and not _goes(library, _rows(metadata[key]), kind):
            wrong.append(f"{key!r}: {short(metadata[key])}, which is {kind.name} there")
    if wrong:
        raise ValueError(
            f"`export.gguf(metadata=..., like=...)` got {'; '.join(sorted(wrong)[:12])}. Pass "
            "values of the types that the file has, or leave out `like=`."
        )


def _type_before(library: Any, field: Any, value: Any) -> Any:
    """The type of a field, or of what it lists; None if it is empty, or one of both lists alone."""
    array = library.GGUFValueType.ARRAY
    same = (field.types[0] == array) == _is_list(value)
    return field.types[-1] if same and field.types[-1] != array else None


def _goes(library: Any, rows: list[Any], kind: Any) -> bool:
    """Say whether values go into a type of GGUF as what they are."""
    types = library.GGUFValueType
    if kind in (types.STRING, types.BOOL):
        return all(isinstance(x, str if kind == types.STRING else bool) for x in rows)
    if kind in (types.FLOAT32, types.FLOAT64):
        return all(isinstance(x, int | float) and not isinstance(x, bool) for x in rows)
    limits = np.iinfo(kind.name.lower())  # named as NumPy's are
    return all(type(x) is int and limits.min <= x <= limits.max for x in rows)


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and bool(key)


def _is_value(value: Any) -> bool:
    plain = str | bool | int | float | np.bool_ | np.integer | np.floating
    if isinstance(value, plain):
        return True
    rows = isinstance(value, list | tuple | np.ndarray) and len(value) > 0
    return rows and all(isinstance(x, plain) for x in value) and len({type(x) for x in value}) == 1


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _rows(value: Any) -> list[Any]:
    """A value, or all of a list, as Python has them."""
    rows = list(value) if _is_list(value) else [value]
    return [x.item() if isinstance(x, np.generic) else x for x in rows]


def begin(
    library: Any,
    path: Path,
    metadata: Mapping[str, Value],
    fields: Mapping[str, Any],
    kind: Any,
) -> Any:
    """Open a writer that has all metadata: those of another file, then those that were given."""
    known = fields[ARCHITECTURE].contents() if ARCHITECTURE in fields else "unknown"
    writer = library.GGUFWriter(path, str(metadata.get(ARCHITECTURE, known)))
    files = library.LlamaFileType.__members__
    names = (f"MOSTLY_{kind.name}", f"ALL_{kind.name}", f"MOSTLY_{kind.name}_MOE", "GUESSED")
    writer.add_file_type(next(files[name] for name in names if name in files))
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    for key, field in fields.items():
        value = field.contents()
        if key in metadata or key in OURS or key.startswith("GGUF.") or value in ([], None):
            continue  # an empty list is what the package reads, but refuses to write
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, value, field.types[0], sub_type=inner)
    for key, value in metadata.items():
        if key not in OURS:
            _put(library, writer, key, value, fields.get(key))
    return writer


def _put(library: Any, writer: Any, key: str, value: Any, before: Any) -> None:
    """Write a value in the type that its key had before, or in the one that llama.cpp expects."""
    rows = _rows(value)
    same = None if before is None else _type_before(library, before, value)
    kind = _type(library.GGUFValueType, rows) if same is None else same
    if _is_list(value):
        writer.add_key_value(key, rows, library.GGUFValueType.ARRAY, sub_type=kind)
    else:
        writer.add_key_value(key, rows[0], kind)


def _type(types: Any, rows: list[Any]) -> Any:
    if isinstance(rows[0], str):
        return types.STRING
    if isinstance(rows[0], bool):
        return types.BOOL
    if any(isinstance(x, float) for x in rows):
        return types.FLOAT32
    choices = [(types.UINT32, 0, 2**32)] if min(rows) >= 0 else []
    choices += [(types.INT32, -(2**31), 2**31), (types.INT64, -(2**63), 2**63)]
    fits = (t for t, low, high in choices if low <= min(rows) and max(rows) < high)
    return next(fits, types.UINT64)
