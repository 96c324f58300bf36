"""GGUF files, as llama.cpp reads them: quantized, read back, and what became of the zeros."""

import dataclasses
import importlib.metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._advice import PruneWarning
from jaxprune._atomic import in_place
from jaxprune._errors import check_parts
from jaxprune._layout import Layout
from jaxprune._tree import check_regexes_match, list_paths
from jaxprune._where import regexes_of
from jaxprune.export._compare import Comparison
from jaxprune.export._door import check_path
from jaxprune.export._extras import need
from jaxprune.export._flat import Names, Tensor, tensors_of, zeros_of
from jaxprune.export._gguf_metadata import Value, begin, check_metadata, fields_of, opened
from jaxprune.export._report import Report, describe
from jaxprune.typing import Masks, Params, Where

LONGEST = 63  # bytes of a name, and
MOST_AXES = 4  # of a tensor: what llama.cpp has room for; the package writes more without a word
PROBE = np.tile(np.array([0.0, 0.3, 1.0, -0.7], np.float32), (1, 64))  # zeros among other weights


def _is_matrix(path: str, x: Any) -> bool:
    """Take all but vectors: biases and gains are few, and llama.cpp wants them in float32."""
    del path
    return x.ndim > 1


def gguf(
    path: str | Path,
    tensors: Params,
    *,
    quantization: str = "Q8_0",
    layout: Layout | None = None,
    names: Names = None,
    masks: Masks | None = None,
    where: Where = _is_matrix,
    metadata: Mapping[str, Value] | None = None,
    like: str | Path | None = None,
    lose_zeros: bool = False,
) -> Report:
    """Write weights as a GGUF file, as llama.cpp reads them, and say what became of the zeros.

    Weights are quantized by the package ``gguf``, in blocks of neighbours along the last axis. A
    removed weight stays exactly 0 in ``"Q8_0"``, ``"Q5_0"``, ``"Q4_0"``, ``"MXFP4"``, ``"TQ1_0"``,
    ``"TQ2_0"`` and floats; not in ``"Q4_1"`` and ``"Q5_1"``, whose steps begin at the smallest
    weight of a block. The file is read back before it is put in place.

    What llama.cpp expects beside the weights is up to you: its names of tensors (``names``), its
    metadata (``like`` an existing file of the same model, or ``metadata``), and its order of rows.
    In the llama family it wants those of queries and keys for rotations of neighbours, each head's
    ``[2, n / 2, in]`` as ``[n / 2, 2, in]``; what Hugging Face has is the former.

    Args:
      path: where to write; a file that is there is replaced at once and whole.
      tensors: arrays, floating or integers of 8 to 64 bits: a dict or any other tree. As language
        models have them, `[out, in]`, unless there is a ``layout``.
      quantization: a type of GGUF, for what ``where`` takes.
      layout: what each axis means. Stacks then become a tensor for each layer, kernels `[in, out]`
        are turned, and several axes of outputs or inputs become one: of biases too, as
        ``jp.export.safetensors`` has it, so that those of attention are vectors.
      names: from paths of ``tensors`` to names in the file, a mapping or a function; None for the
        paths. Where layers are a stack ``{}`` stands for the number of the layer:
        ``"blk.{}.ffn_up.weight"``.
      masks: baked in first, by the paths of ``tensors``. None if what is removed is zero already.
      where: predicate of path and array: what is quantized; by default all that is no vector. The
        rest is float32. ``jp.exclude("token_embd.weight", where=lambda path, x: x.ndim > 1)``.
      metadata: from keys to strings, numbers, bools or lists of these, such as
        ``{"general.architecture": "llama", "llama.block_count": 30}``. Whole numbers are unsigned
        of 32 bits where they fit, as llama.cpp wants most, others float32. It goes before ``like``,
        whose types it keeps. How the file is laid out is not yours to say: ``general.file_type``.
      like: a GGUF file whose metadata to take, its tokenizer among them; not its empty lists,
        which the package cannot write.
      lose_zeros: write a type that does not keep all zeros.

    Returns:
      A ``Report`` whose parity is the largest error of a weight over the largest weight of its
      tensor, with zeros kept and kept weights that became zero. Without masks, all zeros count as
      removed.

    Raises:
      ValueError: the type is none that the package writes; zeros would be lost; weights are too
        large for the scales of the type; names that are too long or given twice; more than four
        axes; numbers in ``metadata`` beyond 64 bits or float32; ``like`` is no GGUF file.
      TypeError: leaves or metadata of a kind that GGUF has not.
      FileNotFoundError: there is no file ``like``.
      ImportError: the package ``gguf`` is missing (extra ``gguf``).

    Warns:
      PruneWarning: tensors that were to be quantized are float16, since their last axis is no
        multiple of the type's block. Or whole blocks of kept weights became 0, since they are too
        small for the type: in ``"Q8_0"`` where the largest of a block is below some 4e-6.

    Example:
      >>> import tempfile
      >>> import jaxprune as jp
      >>> folder = tempfile.TemporaryDirectory()
      >>> params = {"blk.0.ffn_up.weight": jnp.sin(jnp.arange(8192.0)).reshape(64, 128)}
      >>> masks = jp.find_masks(params, 0.5)
      >>> report = gguf(f"{folder.name}/net.gguf", params, masks=masks)
      >>> report.bytes / (4 * 8192) < 0.28, report.parity < 0.005, report.zeros_kept
      (True, True, 1.0)
      >>> folder.cleanup()

    References:
      `GGUF <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>`_. Measured with gguf 0.19.
    """
    check_path("gguf", path)
    check_parts("export.gguf", where=where)
    library = need("gguf", "gguf", "gguf")
    kind = _kind(library, quantization)
    found = tensors_of("gguf", tensors, layout=layout, names=names, masks=masks)
    for regex, user in regexes_of(where):
        check_regexes_match((regex,), tensors, user)
    fields = fields_of(library, like)
    check_metadata(library, metadata, fields)
    _check_fits(found)
    _check_finite([t for t in found if _is_quantized(t, where)])
    kinds = {t.name: _kind_of(library, t, kind, where) for t in found}
    _warn(library, [t for t in found if kinds[t.name] != kind and _is_quantized(t, where)], kind)
    with in_place(Path(path)) as written:
        writer = begin(library, written, metadata or {}, fields, kind)
        with np.errstate(all="ignore"):  # what overflows is found in what is read back
            for t in found:
                _add(library, writer, t, kinds[t.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        got = read_gguf(written)
        parity = _compare(found, got, quantization)
        kept, zeroed = zeros_of(found, got)
        if not lose_zeros:
            _check_zeros(library, kept, quantization)
        _warn_wiped(library, found, got, kinds)
        report = describe(path, written, (parity, None))
        return dataclasses.replace(report, zeros_kept=kept, zeroed=zeroed)


def _kind(library: Any, quantization: str) -> Any:
    """Find a type by its name; refuse what the package does not write, with what it does."""
    kinds = library.GGMLQuantizationType
    kind = kinds.__members__.get(str(quantization).upper())
    if kind is None or _written(library, kind) is None:
        known = [k.name for k in kinds if _written(library, k) is not None]
        what = "is no type of GGUF" if kind is None else "can be read, but not written"
        more = (
            ""
            if kind is None
            else " K and IQ types are made of an F16 or Q8_0 file by llama.cpp's `llama-quantize`."
        )
        raise ValueError(
            f"`export.gguf(quantization={quantization!r})` {what} by the package `gguf` "
            f"{importlib.metadata.version('gguf')}. Use one of {', '.join(known)}.{more}"
        )
    return kind


def _written(library: Any, kind: Any) -> np.ndarray | None:
    """What some weights, zeros among them, come back as; None if the package cannot write them."""
    try:
        return np.asarray(library.dequantize(library.quantize(PROBE, kind), kind))
    except NotImplementedError:
        return None


def _check_fits(tensors: list[Tensor]) -> None:
    """Refuse what has no place in a file, or that llama.cpp would not load; all of it at once."""
    wide = [f"{t.path!r} has {t.value.ndim} axes" for t in tensors if t.value.ndim > MOST_AXES]
    long = [f"{t.name!r} is a long name" for t in tensors if len(t.name.encode()) > LONGEST]
    integers = (np.int8, np.int16, np.int32, np.int64)
    other = [
        f"{t.path!r} is {t.value.dtype}"
        for t in tensors
        if not jnp.issubdtype(t.value.dtype, np.floating) and t.value.dtype not in integers
    ]
    if wide or long:
        raise ValueError(
            f"`export.gguf` got what GGUF has no room for: {'; '.join((wide + long)[:12])}. A "
            f"tensor has at most {MOST_AXES} axes, a name {LONGEST} bytes: reshape, or pass "
            "`names=`."
        )
    if other:
        raise TypeError(
            f"`export.gguf` got what GGUF has no type for: {'; '.join(other[:12])}. Pass floats, "
            "or integers of 8 to 64 bits with a sign."
        )


def _check_finite(tensors: list[Tensor]) -> None:
    bad = [t.path for t in tensors if not np.all(np.isfinite(t.value))]
    if bad:
        raise ValueError(
            f"`export.gguf` got weights that are inf or NaN in {list_paths(bad)}, of which one "
            "spoils its whole block. Look for where they come from, or leave them out with "
            "`where=`."
        )


def _is_quantized(tensor: Tensor, where: Where) -> bool:
    floating = jnp.issubdtype(tensor.value.dtype, np.floating)
    value: Any = tensor.value
    return bool(floating and value.size and where(tensor.path, value))


def _kind_of(library: Any, tensor: Tensor, kind: Any, where: Where) -> Any:
    """The type that a tensor is written in; None for integers, which stay what they are."""
    kinds = library.GGMLQuantizationType
    if not jnp.issubdtype(tensor.value.dtype, np.floating):
        return None
    if not _is_quantized(tensor, where):
        return kinds.F32
    shape = tensor.value.shape or (1,)
    return kind if shape[-1] % library.GGML_QUANT_SIZES[kind][0] == 0 else kinds.F16


def _warn(library: Any, tensors: list[Tensor], kind: Any) -> None:
    if tensors:
        block = library.GGML_QUANT_SIZES[kind][0]
        widths = sorted({t.value.shape[-1] if t.value.shape else 1 for t in tensors})
        warnings.warn(
            f"`export.gguf` writes {list_paths([t.name for t in tensors], 6)} as F16: {kind.name} "
            f"has blocks of {block} along the last axis, which is {', '.join(map(str, widths))} "
            f"here. Cut channels with `Coupled(groups, round_to={block})`, or leave these out with "
            "`where=`.",
            PruneWarning,
            stacklevel=3,
        )


def _add(library: Any, writer: Any, tensor: Tensor, kind: Any) -> None:
    if kind is None:
        writer.add_tensor(tensor.name, tensor.value)
        return
    data = library.quantize(tensor.value.astype(np.float32), kind)
    writer.add_tensor(tensor.name, data, raw_dtype=kind)


def _compare(tensors: list[Tensor], got: Mapping[str, np.ndarray], quantization: str) -> float:
    """Compare what was written with what comes back; refuse what is no number any more."""
    found = Comparison([t.name for t in tensors])
    found.add([got[t.name] for t in tensors], [t.value for t in tensors])
    lost = [t.path for t in tensors if np.any(~np.isfinite(got[t.name]) & np.isfinite(t.value))]
    if lost or not np.isfinite(found.parity):
        beyond = any(t.path in lost and _is_beyond(t.value) for t in tensors)
        why = "float32, which all numbers go through" if beyond else "scales in float16"
        more = "" if beyond else ", use 'BF16' or 'MXFP4', or leave them out with `where=`"
        raise ValueError(
            f"`export.gguf(quantization={quantization!r})` makes inf or NaN of weights in "
            f"{list_paths(list(dict.fromkeys(lost)))} ({found.where}): they are too "
            f"large for {why}. No file was written. Scale them down{more}."
        )
    return found.parity


def _is_beyond(x: np.ndarray) -> bool:
    """Say whether some numbers, of float64 then, are larger than any float32."""
    return bool(np.any(np.isfinite(x) & (np.abs(x) > np.finfo(np.float32).max)))


def _warn_wiped(
    library: Any, tensors: list[Tensor], got: Mapping[str, np.ndarray], kinds: Mapping[str, Any]
) -> None:
    """Tell of blocks that lost all they kept: a block's scale below 3e-8 is 0 in float16."""
    told = []
    for t in tensors:
        kind = kinds[t.name]
        block = 1 if kind is None else library.GGML_QUANT_SIZES[kind][0]
        weights, blocks = _wiped(t.value, got[t.name], block)
        if weights and kind is not None:
            what = f"{blocks:,} whole {'rows' if block == 1 else f'blocks of {block}'}"
            told.append(f"{t.name!r} ({weights:,} weights, {what} in {kind.name})")
    if told:
        warnings.warn(
            f"`export.gguf` makes kept weights 0, which are too small for their type: "
            f"{', '.join(told[:6])}{f' and {len(told) - 6} more' if told[6:] else ''}. Scale them "
            "up, use 'BF16' or 'MXFP4', or leave them out with `where=`.",
            PruneWarning,
            stacklevel=3,
        )


def _wiped(value: np.ndarray, got: np.ndarray, block: int) -> tuple[int, int]:
    """Count kept weights in blocks of the last axis that all became 0, and these blocks.

    Args:
      value: `[..., n]`, as it was to be written.
      got: `[..., n]`, as it was read.
      block: of neighbours with a scale; a row counts as one where each number stands for itself,
        since single weights that are nothing beside their neighbours are no loss.
    """
    width = block if block > 1 else max((value.shape or (1,))[-1], 1)
    kept = (value != 0).reshape(-1, width)
    wiped = kept.any(axis=1) & ~(got != 0).reshape(-1, width).any(axis=1)
    return int(kept[wiped].sum()), int(wiped.sum())


def _check_zeros(library: Any, kept: float | None, quantization: str) -> None:
    if kept is None or kept == 1:
        return
    probes = {k.name: _written(library, k) for k in library.GGMLQuantizationType}
    keeping = [n for n, y in probes.items() if y is not None and not np.any(y[PROBE == 0])]
    raise ValueError(
        f"`export.gguf(quantization={quantization!r})` would keep {kept:.1%} of the zeros: 0 is "
        "none of its steps. No file was written. Use a type that keeps them "
        f"({', '.join(keeping)}), or pass `lose_zeros=True`."
    )


def read_gguf(path: str | Path, user: str = "gguf") -> dict[str, np.ndarray]:
    """Read all tensors of a GGUF file: float32 `[out, in]`, as what quantized ones stand for.

    Raises:
      ValueError: the file is no GGUF file, or a tensor is of a type that cannot be read.
      FileNotFoundError: there is no such file.
      ImportError: the package ``gguf`` is missing.
    """
    library = need("gguf", user, "gguf")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {str(path)!r}. `jp.export.gguf` writes one.")
    found = opened(library, path, repr(str(path)), "Pass one of `jp.export.gguf`.").tensors
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
