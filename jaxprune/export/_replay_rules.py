"""What primitives do to somebody else's numbers, in the words of NumPy's protocols."""

# Of an array these rules ask no more than NumPy's functions do of their arguments: `reshape`,
# `transpose`, `concatenate`, `matmul`, `sum`, ufuncs, operators, an index. Constants beside it are
# plain NumPy arrays.

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from jaxprune.export._products import aval_of, bind

Array = Any  # of numbers that are not ours
Numbers = Callable[[np.ndarray], Array]  # makes such numbers of an array of ours


class Rule(NamedTuple):
    """How a primitive is computed.

    Attributes:
      apply: from the equation, what makes numbers, and its operands to the result.
      fits: whether that is right for the equation.
      fits_plain: whether it is for arrays of NumPy, whose integers wrap as those of JAX do.
    """

    apply: Callable[..., Any]
    fits: Callable[[core.JaxprEqn], bool] = lambda eqn: True
    fits_plain: Callable[[core.JaxprEqn], bool] = lambda eqn: False


def _kinds(eqn: core.JaxprEqn) -> str:
    """One letter for the dtype of each operand: `f` floats, `i` and `u` integers, `b` bools."""
    dtypes = [aval_of(v).dtype for v in eqn.invars]
    return "".join("f" if jnp.issubdtype(d, jnp.floating) else np.dtype(d).kind for d in dtypes)


def _plain(function: Callable[..., Any]) -> Rule:
    return Rule(lambda _eqn, _numbers, *xs: function(*xs))


def _compared(function: Callable[..., Any], turned: Callable[..., Any]) -> Rule:
    """Compare; the array that is not NumPy's has to stand in front for its operator to be asked."""

    def apply(eqn: core.JaxprEqn, numbers: Numbers, x: Array, y: Array) -> Array:
        del eqn, numbers
        first = type(x) is np.ndarray and type(y) is not np.ndarray
        return turned(y, x) if first else function(x, y)

    return Rule(apply)


def _logical(function: Callable[..., Any]) -> Rule:
    """Combine bools. Of integers the same primitives combine bits, which nobody else numbers."""
    return Rule(lambda _eqn, _numbers, *xs: function(*xs), lambda eqn: set(_kinds(eqn)) == {"b"})


def _power(eqn: core.JaxprEqn, numbers: Numbers, x: Array) -> Array:
    power = eqn.params["y"]
    if power >= 0:
        return np.power(x, power)
    return np.true_divide(numbers(np.ones(())), np.power(x, -power))


def _cast(eqn: core.JaxprEqn, numbers: Numbers, x: Array) -> Array:
    """Cast bools and integers of NumPy as JAX does; to all others a cast is nothing."""
    return _as_type(eqn.params["new_dtype"], numbers, x)


def _as_type(dtype: Any, numbers: Numbers, x: Array) -> Array:
    """Bools and integers of NumPy as what stands for a dtype of JAX.

    NumPy adds bools to bools, and int8 to int8, where JAX has float32 or int32 by then.
    """
    if type(x) is not np.ndarray or x.dtype.kind not in "iub":
        return x
    return numbers(x) if jnp.issubdtype(dtype, jnp.floating) else x.astype(dtype)


def _cast_fits(eqn: core.JaxprEqn) -> bool:
    """Tell casts that keep a number from those that are meant to change it.

    Rounding to bfloat16 is left out, as all rounding to floats is; eight bits are a quantizer, an
    integer in the place of a float has lost what was behind the point, and one that is negative
    is another number without a sign.
    """
    old, new = _kinds(eqn), np.dtype(eqn.params["new_dtype"])
    if old == "b":
        return True
    if jnp.issubdtype(new, jnp.floating):
        return new.itemsize >= 2
    more = new.itemsize - np.dtype(aval_of(eqn.invars[0]).dtype).itemsize
    return (old == new.kind and old in "iu" and more >= 0) or (old + new.kind == "ui" and more > 0)


def _cast_fits_plain(eqn: core.JaxprEqn) -> bool:
    """Integers of NumPy wrap as those of JAX do, whatever the width."""
    return _kinds(eqn) in ("i", "u") and np.dtype(eqn.params["new_dtype"]).kind in "iu"


def _arithmetic_fits(eqn: core.JaxprEqn) -> bool:
    return "b" not in _kinds(eqn)


ELEMENTWISE = {
    "add": Rule(lambda _eqn, _numbers, x, y: np.add(x, y), _arithmetic_fits),
    "add_any": Rule(lambda _eqn, _numbers, x, y: np.add(x, y), _arithmetic_fits),
    "sub": Rule(lambda _eqn, _numbers, x, y: np.subtract(x, y), _arithmetic_fits),
    "mul": Rule(lambda _eqn, _numbers, x, y: np.multiply(x, y), _arithmetic_fits),
    # JAX divides integers to an integer.
    "div": Rule(lambda _eqn, _numbers, x, y: np.true_divide(x, y), lambda eqn: _kinds(eqn) == "ff"),
    "neg": _plain(np.negative),
    "abs": _plain(np.abs),
    "square": _plain(lambda x: np.multiply(x, x)),
    "integer_pow": Rule(_power),
    "max": Rule(lambda _eqn, _numbers, x, y: np.maximum(x, y), _arithmetic_fits),
    "min": Rule(lambda _eqn, _numbers, x, y: np.minimum(x, y), _arithmetic_fits),
    "clamp": _plain(lambda low, x, high: np.minimum(np.maximum(x, low), high)),
    "lt": _compared(operator.lt, operator.gt),
    "le": _compared(operator.le, operator.ge),
    "gt": _compared(operator.gt, operator.lt),
    "ge": _compared(operator.ge, operator.le),
    "eq": _compared(operator.eq, operator.eq),
    "ne": _compared(operator.ne, operator.ne),
    "and": _logical(operator.and_),
    "or": _logical(operator.or_),
    "not": _logical(operator.invert),
    "select_n": Rule(
        lambda _eqn, _numbers, which, no, yes: np.where(which, yes, no),
        lambda eqn: len(eqn.invars) == 3 and _kinds(eqn)[0] == "b",
    ),
    "convert_element_type": Rule(_cast, _cast_fits, _cast_fits_plain),
    "stop_gradient": _plain(lambda x: x),
}

# Primitives that only move numbers, and which of their operands those are; the others have to be
# known. JAX moves the numbers of the places: of `[a, b, c][::-1]` it reverses `[0, 1, 2]`, and the
# values follow.
MOVES = {
    **dict.fromkeys(
        (
            *("reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice"),
            *("rev", "split", "copy", "copy_p", "dynamic_slice", "gather"),
        ),
        slice(0, 1),
    ),
    "concatenate": slice(0, None),
    "pad": slice(0, 2),
    "dynamic_update_slice": slice(0, 2),
    "scatter": slice(0, None, 2),
    "select_n": slice(1, None),
}


def move(
    eqn: core.JaxprEqn, values: Sequence[Any], which: slice, moved: Sequence[Array]
) -> list[Array]:
    """Move numbers as an equation does.

    Args:
      eqn: the equation.
      values: its operands; those that are known are as they are in JAX.
      which: of them are moved.
      moved: those, as numbers.

    Returns:
      Its results.
    """
    places, start = list(values), 0
    for i, x in zip(range(len(values))[which], moved, strict=True):
        count = int(np.prod(x.shape))
        places[i] = np.arange(start, start + count, dtype=np.int32).reshape(x.shape)
        start += count
    flat = [np.reshape(x, (-1,)) for x in moved]
    everything = flat[0] if len(flat) == 1 else np.concatenate(flat)
    outside = {"fill_value": -1} if "fill_value" in eqn.params else {}
    with jax.ensure_compile_time_eval():
        outs = bind(eqn.replace(params={**eqn.params, **outside}), places)
    found = [np.asarray(out) for out in outs]
    if any(out.size and out.min() < 0 for out in found):
        raise ValueError(
            f"`export.replay` met a `{eqn.primitive.name}` that reads outside of its operand, "
            "where JAX puts NaN. Index inside of it."
        )
    return [np.reshape(everything[out.reshape(-1)], out.shape) for out in found]


def _reduced(function: Callable[..., Any]) -> Rule:
    """Reduce an array with its axes kept, so that a number alone is an array, too."""

    def apply(eqn: core.JaxprEqn, numbers: Numbers, x: Array) -> Array:
        del numbers
        out = function(x, axis=tuple(eqn.params["axes"]), keepdims=True)
        return np.reshape(out, aval_of(eqn.outvars[0]).shape)

    return Rule(apply, _arithmetic_fits)


def _dot(eqn: core.JaxprEqn, numbers: Numbers, x: Array, y: Array) -> Array:
    """Multiply two-dimensional matrices, one for each index of the batch axes."""
    x, y = (_as_type(aval_of(eqn.outvars[0]).dtype, numbers, each) for each in (x, y))
    (left, right), (many, others) = eqn.params["dimension_numbers"]
    rows = [i for i in range(len(x.shape)) if i not in (*left, *many)]
    columns = [i for i in range(len(y.shape)) if i not in (*right, *others)]
    batch, summed = _size(x, many), _size(x, left)
    x = np.reshape(np.transpose(x, (*many, *rows, *left)), (batch, _size(x, rows), summed))
    y = np.reshape(np.transpose(y, (*others, *right, *columns)), (batch, summed, _size(y, columns)))
    return np.reshape(_matrices(x, y), aval_of(eqn.outvars[0]).shape)


def _size(x: Array, axes: Sequence[int]) -> int:
    return int(np.prod([x.shape[i] for i in axes], dtype=int))


def _matrices(x: Array, y: Array) -> Array:
    """Products of `[n, rows, summed]` and `[n, summed, columns]`."""
    return np.concatenate([np.matmul(x[i], y[i])[None] for i in range(x.shape[0])])


class Windows(NamedTuple):
    """Windows over an array, in the words of ``reduce_window``."""

    window_dimensions: Sequence[int]
    window_strides: Sequence[int]
    padding: Sequence[tuple[int, int]]
    base_dilation: Sequence[int]
    window_dilation: Sequence[int]


def _places(shape: Sequence[int], by: Windows) -> np.ndarray:
    """Places `[*windows, *window]` that windows of an array see; its size where they see padding.

    With ``shape`` (3,), a window of 2 and padding (0, 1): [[0, 1], [1, 2], [2, 3]].
    """
    size = int(np.prod(shape))
    places = np.arange(size, dtype=np.int32).reshape(shape)
    config = [
        (int(before), int(after), int(d) - 1)
        for (before, after), d in zip(by.padding, by.base_dilation, strict=True)
    ]
    with jax.ensure_compile_time_eval():
        places = np.asarray(lax.pad(places, np.int32(size), config))
    sizes = zip(by.window_dimensions, by.window_dilation, strict=True)
    seen = np.lib.stride_tricks.sliding_window_view(places, [(n - 1) * d + 1 for n, d in sizes])
    return seen[tuple(slice(None, None, n) for n in (*by.window_strides, *by.window_dilation))]


def _seen(x: Array, places: np.ndarray, numbers: Numbers) -> Array:
    """What windows see of an array, zeros of its kind for padding."""
    flat = np.reshape(x, (-1,))
    if places.size and places.max() == flat.shape[0]:
        ours = type(x) is np.ndarray and x.dtype != object
        flat = np.concatenate([flat, np.zeros(1, x.dtype) if ours else numbers(np.zeros(1))])
    return np.reshape(flat[places.reshape(-1)], places.shape)


def _convolution(eqn: core.JaxprEqn, numbers: Numbers, x: Array, w: Array) -> Array:
    """Multiply what each window sees with the kernel as a matrix, group by group."""
    x, w = (_as_type(aval_of(eqn.outvars[0]).dtype, numbers, each) for each in (x, w))
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    groups = params["feature_group_count"]
    x, w = np.transpose(x, spec.lhs_spec), np.transpose(w, spec.rhs_spec)
    kernel = w.shape[2:]  # behind outputs and channels of a group, as space behind batch, channels
    windows = Windows(
        window_dimensions=(1, 1, *kernel),
        window_strides=(1, 1, *params["window_strides"]),
        padding=((0, 0), (0, 0), *params["padding"]),
        base_dilation=(1, 1, *params["lhs_dilation"]),
        window_dilation=(1, 1, *params["rhs_dilation"]),
    )
    places = _places(x.shape, windows)
    batch, channels, *space = places.shape[: 2 + len(kernel)]
    places = places.reshape(batch, groups, channels // groups, *space, *kernel)
    here = tuple(range(3, 3 + len(space)))
    order = (1, 0, *here, 2, *range(3 + len(space), places.ndim))
    places = places.transpose(order).reshape(groups, batch * int(np.prod(space)), -1)
    matrix = np.reshape(w, (groups, w.shape[0] // groups, -1))
    seen = _seen(x, places, numbers)
    out = _matrices(seen, np.transpose(matrix, (0, 2, 1)))  # [groups, windows, outputs]
    out = np.reshape(np.transpose(out, (1, 0, 2)), (batch, *space, w.shape[0]))
    axes = (0, len(space) + 1, *range(1, len(space) + 1))  # those of [batch, outputs, *space]
    return np.transpose(out, [axes[list(spec.out_spec).index(i)] for i in range(len(axes))])


def _pooled(function: Callable[..., Any], padded: bool) -> Rule:
    def apply(eqn: core.JaxprEqn, numbers: Numbers, x: Array) -> Array:
        places = _places(x.shape, Windows(**{k: eqn.params[k] for k in Windows._fields}))
        shape = places.shape[: len(x.shape)]
        seen = _seen(x, places.reshape(*shape, -1), numbers)
        return np.reshape(function(seen, axis=-1), shape)

    def fits(eqn: core.JaxprEqn) -> bool:
        sides = [side for pair in eqn.params["padding"] for side in pair]
        return padded or not (any(sides) or any(d > 1 for d in eqn.params["base_dilation"]))

    return Rule(apply, fits)


RULES = {
    **ELEMENTWISE,
    "reduce_sum": _reduced(np.sum),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_window_sum": _pooled(np.sum, padded=True),
    # JAX pads with minus infinity, which few numbers have.
    "reduce_window_max": _pooled(np.max, padded=False),
    "dot_general": Rule(_dot),
    "conv_general_dilated": Rule(_convolution, lambda eqn: eqn.params["batch_group_count"] == 1),
}
