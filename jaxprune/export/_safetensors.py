"""Dense weights as other libraries read them: safetensors, a tensor for each layer."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxprune._atomic import in_place
from jaxprune._errors import short
from jaxprune._layout import Layout
from jaxprune._tree import list_paths
from jaxprune.checkpoint._frame import CODES
from jaxprune.checkpoint._frame import Tensor as Stretch
from jaxprune.checkpoint._frame import layout as places
from jaxprune.checkpoint._leaves import list_lines, words
from jaxprune.export._door import check_path
from jaxprune.export._extras import need
from jaxprune.export._flat import Names, Tensor, is_text, tensors_of, unequal_layers, zeros_of
from jaxprune.export._report import Report, describe
from jaxprune.typing import Masks, Params

# What else the files of others hold; numbers of 4 and 6 bits are packed, which NumPy has not.
OTHERS = {
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
    **{"F8_E8M0": "float8_e8m0fnu", "C64": "complex64"},
}
HEAD = "__metadata__"  # the one name that no tensor may have
DTYPES = {code: name for name, code in CODES.items()} | OTHERS


def safetensors(
    path: str | Path,
    params: Params,
    *,
    layout: Layout | None = None,
    names: Names = None,
    masks: Masks | None = None,
    equal_layers: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Report:
    """Write params as a safetensors file in the layout of Hugging Face and PyTorch.

    Kernels are `[out, in]` there, and each layer has tensors of its own. The file is dense, zeros
    and all, for libraries that know nothing of masks; ``jp.checkpoint.save`` writes a small one.
    It is read back by the package ``safetensors`` and compared bit by bit before it is put in
    place.

    Args:
      path: where to write; a file that is there is replaced at once and whole.
      params: arrays in any tree, of dtypes that safetensors has.
      layout: what each axis means, such as ``jp.find_layout(fn, params, *inputs)``. A stack
        `[layers, in, out]` becomes a tensor `[out, in]` for each layer, several axes of outputs or
        inputs become one, a convolution is `[out, in, ...]`. A bias goes with the outputs of
        a kernel in the same dict whose sizes it has: `[heads, size]` becomes `[heads * size]`;
        for others say so, as ``layout | jp.Layout({".*/bias": ("out", "out")})``. None to write
        arrays as they are.
      names: from paths to names in the file, a mapping or a function; None for the paths. Where
        layers are a stack ``{}`` stands for the number of the layer:
        ``"model.layers.{}.mlp.up_proj.weight"``. With a place for experts too, each gets a tensor.
      masks: baked in first, by the paths of ``params``.
      equal_layers: refuse tensors whose names differ in a number alone, and whose shapes differ:
        the config of most models has one width for all layers.
      metadata: strings to put in the head, beside ``{"format": "pt"}``, which transformers wants.

    Returns:
      A ``Report`` with a parity of 0.

    Raises:
      ValueError: layers of unequal widths, with which layer has which; nobody can tell what the
        axes of a kernel mean; names that do not fit, are given twice or are ``"__metadata__"``;
        masks of unknown paths.
      TypeError: leaves without values, or of dtypes that safetensors has not.
      ImportError: the package ``safetensors`` is missing (extra ``checkpoint`` or ``gguf``).

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> from safetensors.numpy import load_file
      >>> folder = tempfile.TemporaryDirectory()
      >>> params = {"up": jnp.arange(12.0).reshape(2, 2, 3)}
      >>> layout = jp.Layout({"up": ("layer", "in", "out")})
      >>> names = {"up": "model.layers.{}.mlp.up_proj.weight"}
      >>> path = f"{folder.name}/model.safetensors"
      >>> report = safetensors(path, params, layout=layout, names=names)
      >>> load_file(path)["model.layers.1.mlp.up_proj.weight"]
      array([[ 6.,  9.],
             [ 7., 10.],
             [ 8., 11.]], dtype=float32)
      >>> folder.cleanup()
    """
    check_path("safetensors", path)
    library = need("safetensors", "safetensors", "checkpoint")
    found = tensors_of("safetensors", params, layout=layout, names=names, masks=masks)
    _check_dtypes(found)
    _check_names(found)
    _check_metadata({} if metadata is None else metadata)
    if equal_layers:
        _check_equal(found)
    with in_place(Path(path)) as written:
        _write(written, found, {"format": "pt", **(metadata or {})})
        _check_back(library.deserialize(written.read_bytes()), found)
        report = describe(path, written, (0.0, None))
        kept, zeroed = zeros_of(found, {t.name: t.value for t in found})  # the bits of the file
        return dataclasses.replace(report, zeros_kept=kept, zeroed=zeroed)


def _check_dtypes(tensors: list[Tensor]) -> None:
    bad = [f"{t.path!r} is {t.value.dtype}" for t in tensors if t.value.dtype.name not in CODES]
    if bad:
        raise TypeError(
            f"`export.safetensors` got dtypes that such files have not: {'; '.join(bad[:12])}. "
            "Cast them, to bfloat16 say."
        )


def _check_names(tensors: list[Tensor]) -> None:
    taken = [t.path for t in tensors if t.name == HEAD]
    if taken:
        raise ValueError(
            f"`export.safetensors` would call {list_paths(taken)} {HEAD!r}, where such files have "
            "their metadata. Give it another name with `names=`."
        )


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if not isinstance(metadata, Mapping):
        raise TypeError(
            f"`export.safetensors` got metadata={short(metadata)}. Pass a dict of strings, such as "
            '`{"source": "a run"}`.'
        )
    items = metadata.items()
    bad = [f"{k!r}: {v!r}" for k, v in items if not isinstance(v, str) or not isinstance(k, str)]
    if bad:
        raise TypeError(
            f"`export.safetensors(metadata=...)` got {'; '.join(bad[:12])}, and such files hold "
            "strings alone. Write `str(...)` around them."
        )
    halves = [k for k, v in metadata.items() if not is_text(k + v)]
    if halves:
        raise ValueError(
            f"`export.safetensors(metadata=...)` got what UTF-8 has no place for in {halves[:12]}. "
            "Write it with `ascii(...)`."
        )


def _check_equal(tensors: list[Tensor]) -> None:
    unequal = unequal_layers(tensors)
    if unequal:
        raise ValueError(
            "`export.safetensors` got layers of unequal widths, where a config has one number for "
            f"all of them (`intermediate_size`, `num_attention_heads`):{list_lines(unequal)}\n"
            "Choose channels by `scope=jp.scopes.per_leaf` and "
            "`pattern=jp.patterns.Coupled(groups, round_to=64)`, so that all layers lose as many; "
            "or pass `equal_layers=False` for a model whose config has a number for each."
        )


def _write(path: Path, tensors: list[Tensor], metadata: Mapping[str, str]) -> None:
    """Write the head and the arrays, one behind the other, as ``jp.checkpoint`` lays them out."""
    by_name = {t.name: t.value for t in tensors}
    lies = places({name: Stretch(x.dtype, x.shape) for name, x in by_name.items()})
    text = json.dumps({HEAD: dict(metadata)} | lies, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(words(by_name[name]).data for name in lies)


def _check_back(read: list[tuple[str, dict]], tensors: list[Tensor]) -> None:
    """Compare what the library reads with what was to be written, bit by bit."""
    got = dict(read)
    wrong = [
        t.name
        for t in tensors
        if got[t.name]["dtype"] != CODES[t.value.dtype.name]
        or tuple(got[t.name]["shape"]) != t.value.shape
        or not np.array_equal(np.frombuffer(got[t.name]["data"], np.uint8), _bytes(t.value))
    ]
    if wrong or len(got) != len(tensors):
        raise ValueError(
            f"`export.safetensors` reads back other values than it wrote at {wrong[:12]}. No file "
            "was written. Try another version of the package `safetensors`."
        )


def _bytes(x: np.ndarray) -> np.ndarray:
    return words(x).reshape(-1).view(np.uint8)


def read_safetensors(path: str | Path, user: str = "safetensors") -> dict[str, np.ndarray]:
    """Read all tensors of a safetensors file, in the dtypes of the file.

    `safetensors.numpy.load_file` fails for float8 (0.8), which NumPy gets from ``ml_dtypes``.

    Raises:
      ValueError: the file is none of safetensors, is damaged or cut short, or a tensor is of a
        dtype that NumPy has not.
      FileNotFoundError: there is no such file.
      ImportError: the package ``safetensors`` is missing.
    """
    library = need("safetensors", user, "checkpoint")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no {str(path)!r}. `jp.export.safetensors` writes one.")
    try:
        found = library.deserialize(Path(path).read_bytes())
    except library.SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} is no safetensors file, or damaged or cut short: {error}. Copy it "
            "again, or write it anew with `jp.export.safetensors`."
        ) from error
    unknown = [f"{name!r} ({x['dtype']})" for name, x in found if x["dtype"] not in DTYPES]
    if unknown:
        raise ValueError(
            f"{str(path)!r} holds tensors of dtypes that NumPy has not: {', '.join(unknown[:12])}. "
            f"Those that can be read are {', '.join(DTYPES)}: convert the others."
        )
    return {name: _array(x["data"], x["dtype"], x["shape"]) for name, x in found}


def _array(data: bytes, code: str, shape: list[int]) -> np.ndarray:
    return np.frombuffer(data, jnp.dtype(DTYPES[code])).reshape(shape)
