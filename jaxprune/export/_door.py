"""Arguments in the wrong places, told before or instead of what would come of them."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._masks import unpack
from jaxprune._tree import leaves_with_path
from jaxprune.graph._network import is_array, join_static, split_static
from jaxprune.typing import Params


def check_path(user: str, path: Any, what: str = "path") -> None:
    """Refuse what is no path of a file."""
    if isinstance(path, str | os.PathLike):
        if os.path.isdir(path):
            raise ValueError(f"{os.fspath(path)!r} is a folder. Pass the path of a file.")
        return
    raise TypeError(
        f"`export.{user}` got {_kind(path)} as {what}, which is no path of a file. The order is "
        f"`export.{user}({_order(user)})`."
    )


def check_call(user: str, fn: Any, params: Params, inputs: Sequence[Any]) -> None:
    """Refuse what is no function, and masks among the inputs."""
    if hasattr(fn, "apply") and hasattr(fn, "init"):
        raise TypeError(
            f"`export.{user}` got {_kind(fn)} as fn, which is no function of params and inputs. "
            "Pass its `apply`, with what its `init` gave as params."
        )
    if not callable(fn):
        raise TypeError(
            f"`export.{user}` got {_kind(fn)} as fn, which is no function, and {_kind(params)} as "
            f"params. The order is `export.{user}({_order(user)})`."
        )
    if not inputs and _is_module(fn):
        raise _module(user, fn)
    paths = {path for path, _ in leaves_with_path(params)} - {""}
    for i, given in enumerate(inputs):
        leaves = leaves_with_path(unpack(given))
        kinds = {getattr(leaf, "dtype", None) for _, leaf in leaves}
        if leaves and kinds == {jnp.dtype(bool)} and {path for path, _ in leaves} <= paths:
            raise TypeError(
                f"`export.{user}` got masks as input {i}: a tree like the params with bool "
                "leaves. Pass them as `masks=`."
            )


def explain(user: str, fn: Any, params: Params, inputs: Sequence[Any], error: Exception) -> None:
    """Say why a function fails for its arguments, if they are in the wrong places."""
    if _is_module(fn):
        raise _module(user, fn) from error
    if inputs and _goes(fn, (inputs[0], params, *inputs[1:])):
        raise TypeError(
            f"`export.{user}` got params and inputs the other way round: fn fails as given, and "
            "goes with the first input as its params. The order is "
            f"`export.{user}({_order(user)})`."
        ) from error


def _order(user: str) -> str:
    others = {
        "quantize_onnx": "path, source, calibration",
        "replay": "fn, params, *inputs",
        "gguf": "path, tensors",
        "safetensors": "path, params",
        "sparsify_tflite": "path, source",
    }
    return others.get(user, "path, fn, params, *inputs")


def _module(user: str, fn: Any) -> TypeError:
    return TypeError(
        f"`export.{user}` got {_kind(fn)} as fn, a module that holds its params itself. Pass a "
        "function of both: `graphdef, params = nnx.split(module)` and `lambda params, x: "
        "nnx.merge(graphdef, params)(x)`, or equinox's `partition` and `combine`."
    )


def _is_module(fn: Any) -> bool:
    """Tell a function that is a tree of arrays."""
    try:
        arrays = any(is_array(leaf) for leaf in jax.tree.leaves(fn))
    except Exception:  # a container that is no pytree
        return False
    return arrays and not isinstance(fn, functools.partial)


def _goes(fn: Any, args: Sequence[Any]) -> bool:
    arrays, static = split_static(args)
    canonical = functools.partial(jax.dtypes.canonicalize_dtype, allow_extended_dtype=True)
    specs = [jax.ShapeDtypeStruct(x.shape, canonical(x.dtype)) for x in arrays]
    try:
        jax.eval_shape(lambda *xs: fn(*join_static(xs, static)), *specs)
    except Exception:
        return False
    return True


def _kind(value: Any) -> str:
    if is_array(value):
        return f"an array {value.dtype}{list(value.shape)}"
    name = getattr(value, "__name__", None)
    return f"the function `{name}`" if name else f"an object of type `{type(value).__name__}`"


def check_share(user: str, min_sparsity: Any) -> None:
    """Refuse what is no share of zeros."""
    if not is_real(min_sparsity) or not 0 <= min_sparsity <= 1:
        raise ValueError(
            f"`export.{user}(min_sparsity={min_sparsity!r})` is no share of zeros. Use a number in "
            "[0, 1]."
        )


def check_tolerance(user: str, tolerance: Any) -> None:
    """Refuse what is no difference."""
    if not is_real(tolerance) or not tolerance >= 0:
        raise ValueError(
            f"`export.{user}(tolerance={tolerance!r})` is no difference to allow. Use a number "
            "such as 1e-4."
        )


def is_whole(x: Any) -> bool:
    """True for an integer that is no bool."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def is_real(x: Any) -> bool:
    """True for a number that is no bool."""
    return np.ndim(x) == 0 and np.asarray(x).dtype.kind in "fiu"
