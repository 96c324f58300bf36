"""GGUF files, as llama.cpp reads them."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.export._extras import need


def read_gguf(path: str | Path) -> dict[str, np.ndarray]:
    """Read all tensors of a GGUF file: float32 `[out, in]`, as what quantized ones stand for.

    Raises:
      ValueError: the file is no GGUF file, or a tensor is of a type that cannot be read.
      FileNotFoundError: there is no such file.
      ImportError: the package ``gguf`` is missing.
    """
    library = need("gguf", "gguf", "gguf")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {str(path)!r}. `jp.export.gguf` writes one.")
    try:
        found = library.GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(
            f"{str(path)!r} is no GGUF file, or damaged: {error}. Pass one of `jp.export.gguf`."
        ) from error
    unknown = [f"{t.name!r} ({t.tensor_type.name})" for t in found if not _is_read(library, t)]
    if unknown:
        raise ValueError(
            f"{str(path)!r} holds tensors of types that the package `gguf` does not read: "
            f"{', '.join(unknown[:12])}. Convert them with `llama-quantize --allow-requantize`."
        )
    return {tensor.name: _values(library, tensor.data, tensor.tensor_type) for tensor in found}


def _is_read(library: Any, tensor: Any) -> bool:
    """Say whether the package knows a type, by one row of the tensor."""
    try:
        _values(library, np.atleast_1d(tensor.data)[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _values(library: Any, data: np.ndarray, kind: Any) -> np.ndarray:
    """The numbers that data stand for, in memory of their own."""
    if data.dtype != np.uint8:  # floats and integers lie there as they are
        return np.array(data, np.float32)
    with np.errstate(all="ignore"):  # a scale that overflowed: those who compare see inf and NaN
        return np.array(library.dequantize(data, kind), np.float32)
