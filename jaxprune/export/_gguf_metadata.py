"""What a GGUF file says beside its tensors: architecture, sizes, tokenizer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from jaxprune._errors import short

Value: TypeAlias = str | bool | int | float | Sequence[str | bool | int | float]

ARCHITECTURE = "general.architecture"
# The writer's own business, which another file says of its own tensors.
OURS = {
    *(ARCHITECTURE, "general.file_type", "general.quantization_version", "general.alignment"),
    *("split.no", "split.count", "split.tensors.count"),
}


def check_metadata(metadata: Any, like: Any) -> None:
    """Refuse what GGUF has no type for."""
    if like is not None and not Path(like).is_file():
        raise FileNotFoundError(
            f"`export.gguf(like={str(like)!r})` finds no such file. Pass a GGUF file of the same "
            "model, or its `metadata=` as a dict."
        )
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


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and bool(key)


def _is_value(value: Any) -> bool:
    plain = str | bool | int | float | np.generic
    if isinstance(value, plain):
        return True
    rows = isinstance(value, list | tuple | np.ndarray) and len(value) > 0
    return rows and all(isinstance(x, plain) for x in value) and len({type(x) for x in value}) == 1


def begin(
    library: Any,
    path: Path,
    metadata: Mapping[str, Value],
    like: str | Path | None,
    kind: Any,
) -> Any:
    """Open a writer that has all metadata: those of ``like``, then those that were given."""
    fields = {} if like is None else library.GGUFReader(like).fields
    known = fields[ARCHITECTURE].contents() if ARCHITECTURE in fields else "unknown"
    writer = library.GGUFWriter(path, str(metadata.get(ARCHITECTURE, known)))
    files = library.LlamaFileType.__members__
    names = (f"MOSTLY_{kind.name}", f"ALL_{kind.name}", f"MOSTLY_{kind.name}_MOE", "GUESSED")
    writer.add_file_type(next(files[name] for name in names if name in files))
    writer.add_quantization_version(library.GGML_QUANT_VERSION)
    for key, field in fields.items():
        if key not in metadata and key not in OURS and not key.startswith("GGUF."):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for key, value in metadata.items():
        if key not in OURS:
            _put(library, writer, key, value, fields.get(key))
    return writer


def _put(library: Any, writer: Any, key: str, value: Any, before: Any) -> None:
    """Write a value in the type that its key had before, or in the one that llama.cpp expects."""
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    rows = list(plain) if isinstance(plain, list | tuple) else [plain]
    same = before is not None and (len(before.types) > 1) == isinstance(plain, list | tuple)
    kind = before.types[-1] if same else _type(library.GGUFValueType, rows)
    if isinstance(plain, list | tuple):
        writer.add_key_value(key, rows, library.GGUFValueType.ARRAY, sub_type=kind)
    else:
        writer.add_key_value(key, plain, kind)


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
