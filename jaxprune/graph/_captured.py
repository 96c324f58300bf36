"""Arrays that a function captures: inputs that nobody passed."""

# A closure is no parameter: `lambda p, x: (x * mask) @ p["w"]` captures `mask`, which stays whole
# as an input does, and with it whatever it is joined with. In the jaxpr it is a constant, as is a
# table of rotations that the function makes whenever it is called, and that may well be cut. They
# differ in when they were made: before the call, or in it.

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune.graph._walk import Analysis, Constant


def hold_captured(analysis: Analysis, trace: Callable[[], core.ClosedJaxpr]) -> None:
    """Freeze the axes of floating arrays that live outside of the function, and say so.

    A table that the function makes whenever it is called is part of its program, and is cut with
    what it is joined with. So is what a scan runs along: a number for each of its layers.
    """
    coupling = analysis.coupling
    layers = coupling.find(np.concatenate([np.zeros(0, np.int64), *analysis.layers]))
    found = [
        c
        for c in analysis.constants
        if jnp.issubdtype(c.value.dtype, jnp.inexact) and any(axis is not None for axis in c.axes)
    ]
    for constant in _captured(found, trace):
        for axis in constant.axes:
            if axis is not None and not np.isin(coupling.find(axis.ids), layers).any():
                coupling.freeze(axis.ids, _why(constant.value))


def _captured(
    constants: list[Constant], trace: Callable[[], core.ClosedJaxpr]
) -> Iterator[Constant]:
    """Those of some constants that are there before the function is called.

    jax makes no array of its own while it traces. One of NumPy's that comes in two programs of the
    same function has not been made by it; of a program that jax remembered nobody can tell.
    """
    unsure = [c for c in constants if not isinstance(c.value, jax.Array)]
    seen = {id(c.program.jaxpr) for c in unsure}
    again = list(_arrays(trace(), seen)) if unsure else []
    for constant in constants:
        array = constant.value
        if isinstance(array, jax.Array) or any(
            np.shares_memory(np.asarray(array), other) for other in again
        ):
            yield constant


def _arrays(closed: core.ClosedJaxpr, seen: set[int]) -> Iterator[np.ndarray]:
    """Constants of NumPy's in a program and in those inside, but for programs already seen."""
    if id(closed.jaxpr) not in seen:
        yield from (np.asarray(c) for c in closed.consts if not isinstance(c, jax.Array))
    for eqn in closed.jaxpr.eqns:
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr):
                    yield from _arrays(inner, seen)


def _why(array: jax.Array | np.ndarray) -> str:
    return (
        f"`fn` captures {array.dtype}{list(np.shape(array))}, which it is joined with and which "
        "stays whole as inputs do; `params` are what is cut"
    )
