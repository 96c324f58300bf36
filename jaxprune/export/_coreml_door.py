"""What a Core ML package cannot be made of, told before anything is converted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune._tree import leaves_with_path, list_paths, split_static
from jaxprune.export._door import check_path, check_share, check_tolerance, is_whole
from jaxprune.typing import Params

PALETTES = (1, 2, 3, 4, 6, 8)


def check_package(user: str, path: Any) -> None:
    """Refuse paths that are none of a package."""
    if not isinstance(path, str | Path) or not Path(path).is_dir():
        check_path(user, path)
    if Path(path).suffix != ".mlpackage":
        raise ValueError(
            f"`export.{user}` got the path {str(path)!r}, and Core ML wants packages to be called "
            f"so. Pass {str(Path(path).with_suffix('.mlpackage'))!r}."
        )
    if Path(path).is_dir() and not (Path(path) / "Manifest.json").is_file():
        raise ValueError(
            f"`export.{user}` would replace the folder {str(path)!r}, which is no Core ML package. "
            "Pass another path."
        )


def check_settings(palettize: Any, precision: Any, min_sparsity: Any, tolerance: Any) -> None:
    """Refuse settings of other types and beyond their range."""
    if palettize is not None and not (is_whole(palettize) and palettize in PALETTES):
        raise ValueError(
            f"`export.coreml(palettize={palettize!r})` is no number of bits that Core ML has "
            f"palettes for. Use one of {list(PALETTES)}, or None for none."
        )
    if precision not in ("float16", "float32"):
        raise ValueError(
            f"`export.coreml(precision={precision!r})` is unknown. Use 'float16' or 'float32'."
        )
    check_share("coreml", min_sparsity)
    check_tolerance("coreml", tolerance)


def check_batch(batch: Any, max_batch: Any) -> None:
    """Refuse what is no name of an axis, and no size of one."""
    try:
        named = batch is None or (isinstance(batch, str) and jax.export.symbolic_shape(batch))
    except ValueError:
        named = False
    if not named:
        raise ValueError(
            f"`export.coreml(batch={batch!r})` is no name of an axis. Use one such as 'batch', or "
            "None for the shapes as given."
        )
    if not is_whole(max_batch) or max_batch < 1:
        raise ValueError(
            f"`export.coreml(max_batch={max_batch!r})` is no size of a batch. Use a number such as "
            "64."
        )


def check_inputs(inputs: Sequence[Any]) -> None:
    """Refuse examples without entries, of which nothing is computed."""
    arrays, _ = split_static(tuple(inputs))
    empty = [list(x.shape) for x in arrays if any(isinstance(n, int) and n < 1 for n in x.shape)]
    if empty:
        raise ValueError(
            f"`export.coreml` got an input of shape {empty[0]}, of which nothing is computed. Pass "
            "an example of one row or more."
        )


def matrices(params: Params, precision: str) -> Mapping[str, np.ndarray]:
    """Take the matrices by their paths, and refuse what is no number or none of float16."""
    floats = {
        path: np.asarray(x, np.float32)
        for path, x in leaves_with_path(params)
        if hasattr(x, "dtype") and jax.numpy.issubdtype(x.dtype, np.floating)
    }
    unknown = [path for path, x in floats.items() if not np.isfinite(x).all()]
    if unknown:
        raise ValueError(
            f"`export.coreml` got {list_paths(unknown)} with NaN or infinite entries. Look where "
            "the training broke, or close over what is infinite by design."
        )
    limit = float(np.finfo(np.float16).max)
    large = {path: float(np.abs(x).max(initial=0)) for path, x in floats.items()}
    beyond = [f"{path!r} ({most:.3g})" for path, most in large.items() if most > limit]
    if beyond and precision == "float16":
        raise ValueError(
            f"`export.coreml` got weights beyond {limit:g}, which float16 cannot hold: "
            f"{', '.join(beyond)}. Pass `precision='float32'`, or scale them."
        )
    return {path: x for path, x in floats.items() if x.ndim > 1 and x.size > 1}
