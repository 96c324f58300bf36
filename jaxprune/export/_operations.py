"""Operations that jax2onnx refuses or gets wrong, in words that it knows."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

Value: TypeAlias = Any  # of an operand: a traced array, or a constant, which NumPy may hold
Rewritten = Value | None  # None where the operation may stay as it is


def rewrite(eqn: core.JaxprEqn, values: Sequence[Value]) -> Rewritten:
    """Compute an operation with a single result by others, where it cannot stay as it is."""
    rule = RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, *values)


# Pools


class Window(NamedTuple):
    """What a pool looks at, for each axis."""

    size: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    dilation: Sequence[int]

    def over(self, axes: Sequence[int]) -> "Window":
        """The window over some of the axes."""
        taken: Any = ([setting[i] for i in axes] for setting in self)
        return Window(*taken)

    def moves(self, axis: int) -> bool:
        """Tell an axis that is pooled."""
        return (self.size[axis], self.strides[axis], *self.padding[axis]) != (1, 1, 0, 0)


def _pool(eqn: core.JaxprEqn, x: Value) -> Value:
    kind = eqn.primitive.name.removeprefix("reduce_window_")
    half = x.dtype == np.float16 and kind == "sum"  # jax2onnx mixes it with float32
    return pool(kind, x.astype(np.float32) if half else x, eqn.params).astype(x.dtype)


def _pool_from(eqn: core.JaxprEqn, x: Value, init: Value) -> Rewritten:
    """A pool that starts from a value: every window has it as one entry more."""
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    kind = body.eqns[0].primitive.name if len(body.eqns) == 1 else ""
    if kind not in POOLS or eqn.params.get("consts"):
        return None
    return POOLS[kind](pool("sum" if kind == "add" else kind, x, eqn.params), init)


POOLS = {"max": lax.max, "min": lax.min, "add": lax.add, "sum": lax.add}


def pool(kind: str, x: Value, params: Any) -> Value:
    """Pool over at most three axes, behind two others as ONNX has them: jax2onnx pools over all."""
    window = Window(
        params["window_dimensions"],
        params["window_strides"],
        params["padding"],
        params["window_dilation"],
    )
    if any(n > 1 for n in params["base_dilation"]):
        x = pad(x, _neutral(kind, x.dtype), [(0, 0, n - 1) for n in params["base_dilation"]])
    axes = [i for i in range(x.ndim) if window.moves(i)]
    rest = [i for i in range(x.ndim) if i not in axes]
    if len(axes) > 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        return _pool_by_entries(kind, x, window)
    moved = jnp.transpose(x, (*rest, *axes))
    lead, spatial = moved.shape[: len(rest)], moved.shape[len(rest) :]
    if len(lead) != 2:
        moved = lax.reshape(moved, (*_two(lead), *spatial))
    out = _pool_behind(kind, moved, window.over(axes))
    out = lax.reshape(out, (*lead, *out.shape[2:])) if len(lead) != 2 else out
    return jnp.transpose(out, [int(i) for i in np.argsort([*rest, *axes])])


def _two(lead: Sequence[Any]) -> tuple[Any, Any]:
    return (1, 1) if not lead else (lead[0], math.prod(lead[1:]))


def _pool_behind(kind: str, x: Value, window: Window) -> Value:
    """Pool ``[batch, channels, ...]`` over all but the first two axes."""
    if kind == "min":
        return -_pool_behind("max", -x, window)
    return lax.reduce_window(
        x,
        _neutral(kind, x.dtype),
        POOLS[kind],
        (1, 1, *window.size),
        (1, 1, *window.strides),
        ((0, 0), (0, 0), *window.padding),
        window_dilation=(1, 1, *window.dilation),
    )


def _pool_by_entries(kind: str, x: Value, window: Window) -> Value:
    """Go through the window, for integers and for more axes than ONNX pools over."""
    x = pad(x, _neutral(kind, x.dtype), [(*both, 0) for both in window.padding])
    size, dilation = np.asarray(window.size), np.asarray(window.dilation)
    parts = []
    for place in np.ndindex(*size):
        first = [int(i) for i in place * dilation]
        left = [int(i) for i in (size - 1 - place) * dilation]
        last = [n - i for n, i in zip(x.shape, left, strict=True)]
        parts.append(lax.slice(x, first, last, window.strides))
    return functools.reduce(POOLS[kind], parts)


def _neutral(kind: str, dtype: Any) -> Value:
    """What a pool may be padded with."""
    if kind == "sum":
        return np.zeros((), dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(-np.inf if kind == "max" else np.inf, dtype)
    if dtype == jnp.bool_:
        return np.asarray(kind == "min")
    return np.asarray(getattr(jnp.iinfo(dtype), "min" if kind == "max" else "max"), dtype)


# Padding, shapes and indices


def _pad(eqn: core.JaxprEqn, x: Value, value: Value) -> Rewritten:
    if isinstance(value, jax.core.Tracer):
        return None
    return pad(x, value, eqn.params["padding_config"])


def pad(x: Value, value: Value, config: Sequence[tuple[int, int, int]]) -> Value:
    """Pad with a constant by ``jnp.pad``, for which jax2onnx knows axes of any size."""
    value = np.asarray(value)
    for axis, (_, _, interior) in enumerate(config):
        if interior and isinstance(x.shape[axis], int) and x.shape[axis] > 1:
            x = _spread(x, value, axis, interior)
    for axis, (low, high, _) in enumerate(config):
        if low < 0 or high < 0:
            x = lax.slice_in_dim(x, max(-low, 0), x.shape[axis] - max(-high, 0), axis=axis)
    wide = [(max(low, 0), max(high, 0)) for low, high, _ in config]
    return jnp.pad(x, wide, constant_values=value.item()) if any(map(any, wide)) else x


def _spread(x: Value, value: np.ndarray, axis: int, interior: int) -> Value:
    """Put padding between the entries of an axis."""
    wide = [(0, 0)] * (x.ndim + 1)
    wide[axis + 1] = (0, interior)
    size = x.shape[axis] * (interior + 1)
    x = jnp.pad(jnp.expand_dims(x, axis + 1), wide, constant_values=value.item())
    x = lax.reshape(x, (*x.shape[:axis], size, *x.shape[axis + 2 :]))
    return lax.slice_in_dim(x, 0, size - interior, axis=axis)


def _gather(eqn: core.JaxprEqn, x: Value, places: Any) -> Rewritten:
    """Drop places along axes that are taken whole, where there is but one: the start.

    Places that are known to lie inside are promised to, or the file would clip them at each call.
    """
    dims, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    mode, promised = eqn.params["mode"], lax.GatherScatterMode.PROMISE_IN_BOUNDS
    if x.dtype == np.float16:  # which jax2onnx would fill with a float32
        return eqn.primitive.bind(x.astype(np.float32), places, **eqn.params).astype(x.dtype)
    if mode != promised and _are_inside(x.shape, places, eqn.params):
        return _simplest_gather(x, places, dims, sizes, promised)
    if mode == lax.GatherScatterMode.FILL_OR_DROP or not _droppable(x, dims, sizes):
        return None
    return _simplest_gather(x, places, dims, sizes, mode)


def _are_inside(shape: Sequence[Any], places: Any, params: Any) -> bool:
    """Tell constant places `[..., axes]` of which none reaches beyond the array."""
    axes, sizes = params["dimension_numbers"].start_index_map, params["slice_sizes"]
    ends = [shape[axis] for axis in axes]
    if isinstance(places, jax.core.Tracer) or not all(isinstance(n, int) for n in ends):
        return False
    last = np.asarray(ends) - [sizes[axis] for axis in axes]
    found = np.asarray(places)
    return bool((found >= 0).all() and (found <= last).all())


def _droppable(x: Value, dims: Any, sizes: Sequence[Any]) -> int:
    """Count the first axes with places, if all others that have some are taken whole; else 0."""
    axes = dims.start_index_map
    free = [i for i, axis in enumerate(axes) if sizes[axis] != x.shape[axis]]
    return len(free) if free == list(range(len(free))) and len(free) < len(axes) else 0


def _simplest_gather(x: Value, places: Any, dims: Any, sizes: Sequence[Any], mode: Any) -> Value:
    kept = _droppable(x, dims, sizes)
    if kept:
        places = lax.slice_in_dim(places, 0, kept, axis=places.ndim - 1)
        dims = dims._replace(start_index_map=dims.start_index_map[:kept])
    return lax.gather(x, places, dims, sizes, mode=mode)


def _choose(eqn: core.JaxprEqn, which: Value, *cases: Value) -> Rewritten:
    """Choose between truths by logic: onnxruntime has no ``Where`` for them."""
    if cases[0].dtype != np.bool_ or len(cases) != 2:
        return None
    no, yes = cases
    return jnp.logical_or(jnp.logical_and(which, yes), jnp.logical_and(~which, no))


def _narrowed(eqn: core.JaxprEqn, x: Value) -> Rewritten:
    """Keep floats inside of what a narrow integer holds: a file would wrap what JAX saturates."""
    kind = np.dtype(eqn.params["new_dtype"])
    if kind.kind not in "iu" or kind.itemsize > 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    inside = jnp.clip(x, np.iinfo(kind).min, np.iinfo(kind).max)
    return lax.convert_element_type(inside, kind)


def _cumprod(eqn: core.JaxprEqn, x: Value) -> Value:
    """Multiply with what lies 1, 2, 4, ... entries before: ONNX has but sums that run."""
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]
    size, step, one = x.shape[axis], 1, np.ones((), x.dtype)
    while step < size:
        ends = (step, 0) if not reverse else (0, step)
        first = 0 if not reverse else step
        near = lax.slice_in_dim(x, first, first + size - step, axis=axis)
        x = x * pad(near, one, [(*ends, 0) if i == axis else (0, 0, 0) for i in range(x.ndim)])
        step *= 2
    return x


# jax2onnx stumbles over axes of any size in these, not in what jax.numpy calls them.
SAME: dict[str, Callable[..., Any]] = {
    "rem": lambda _, x, y: jnp.fmod(x, y),
    "shift_left": lambda _, x, y: jnp.left_shift(x, y),
    "clamp": lambda _, low, x, high: lax.min(lax.max(x, low), high),
}
RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _pool),
    **{"reduce_window": _pool_from, "pad": _pad},
    **{"gather": _gather, "cumprod": _cumprod, "select_n": _choose},
    "convert_element_type": _narrowed,
    **SAME,
}
