"""Frames: a jaxpr at one place where it is called, and what is known of its variables there."""

# An equation may hold jaxprs of its own (jit, scan, cond, ...), and jax shares those: a layer that
# is jitted and called twice is one jaxpr, whose variables mean other axes in each of the calls.
#
#     { lambda ; x w0 w1. let
#         y = jit[jaxpr=layer] x w0        frame of `layer`: its inputs have the axes of x and w0
#         z = jit[jaxpr=layer] y w1        another frame of `layer`, with those of y and w1
#       in (z,) }
#
# So what is found is kept by call, as a tree of frames. Invariants: a frame knows every variable
# of its jaxpr once it has been walked; the frames inside of an equation are in the order in which
# its rule walked them, and the rule that cuts it asks for them by that number. A loop has one frame
# for all of its steps.
#
# Whoever has another question about a program follows the frames that are there (`_branches`,
# `_counts`) instead of walking jaxprs again: what is a constant, what is a parameter and how a
# caller's operands go in is told by them, whatever the question.

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend import core

from jaxprune.graph._axes import Axes

Atom: TypeAlias = core.Var | core.Literal
Value: TypeAlias = Any  # what flows through a program: an array, a key, a reference, a token
Known: TypeAlias = Callable[[], np.ndarray]  # computes a value that does not depend on inputs


def shape_of(atom: Atom) -> tuple[int, ...]:
    """Shape of a variable or literal; that of a token is empty."""
    return getattr(atom.aval, "shape", ())


def dtype_of(atom: Atom) -> np.dtype:
    """Type of the entries of a variable or literal."""
    return atom.aval.dtype  # type: ignore[attr-defined]  # jax types all kinds of values as one


class Call(NamedTuple):
    """The equation that a frame is called by, and the frame that holds it."""

    frame: "Frame"
    eqn: core.JaxprEqn


@dataclasses.dataclass
class Frame:
    """A jaxpr at one place where it is called.

    Attributes:
      jaxpr: its equations; constants are its first inputs.
      axes: the axes of each variable.
      known: what computes the variables that depend on no input.
      inner: frames of the jaxprs inside of an equation, by its number.
      consts: values of the first inputs.
      caller: the equation that calls it, none for the whole program.
      weights: variables that are made of parameters and numbers alone, and of no data.
      skip: what is left out of the small program: for the number of an equation that of the
        operand that takes the place of its result.
      drop: numbers of the results that nobody wants in the small program.
      scale: by the number of an equation, what its results are multiplied with there.
    """

    jaxpr: core.Jaxpr
    axes: dict[core.Var, Axes]
    known: dict[core.Var, Known]
    inner: dict[int, list["Frame"]]
    consts: Sequence[Value] = ()
    caller: Call | None = None
    weights: set[core.Var] = dataclasses.field(default_factory=set)
    skip: dict[int, int] = dataclasses.field(default_factory=dict)
    drop: set[int] = dataclasses.field(default_factory=set)
    scale: dict[int, float] = dataclasses.field(default_factory=dict)

    def of(self, atom: Atom) -> Axes:
        """Axes of a variable or literal."""
        return self.axes[atom] if isinstance(atom, core.Var) else (None,) * len(shape_of(atom))

    @property
    def inputs(self) -> Sequence[core.Var]:
        """The inputs that are no constants: what the caller hands in."""
        return self.jaxpr.invars[len(self.consts) :]

    @property
    def outs(self) -> list[Axes]:
        """Axes of each result."""
        return [self.of(v) for v in self.jaxpr.outvars]


def all_frames(frame: Frame) -> Iterator[Frame]:
    """A frame and those inside of it, at any depth."""
    yield frame
    for inner in frame.inner.values():
        for one in inner:
            yield from all_frames(one)


def callers(frame: Frame) -> list[Call]:
    """The equations through which a frame is called, the nearest first."""
    found: list[Call] = []
    while frame.caller is not None:
        found.append(frame.caller)
        frame = frame.caller.frame
    return found


def parameters(frame: Frame, paths: Sequence[str]) -> dict[core.Var, str]:
    """Inputs of a frame that are parameters, through calls that hand their operands in as they are.

    Those are jit, remat, shard_map and scan, but not cond, whose first operand is the branch.
    ``paths`` are those of the first inputs of the whole program.
    """
    if frame.caller is None:
        return dict(zip(frame.inputs, paths, strict=False))
    outer = parameters(frame.caller.frame, paths)
    return {
        v: outer[w]
        for v, w in zip(frame.inputs, frame.caller.eqn.invars, strict=False)
        if isinstance(w, core.Var) and w in outer
    }


def hoist(closed: core.ClosedJaxpr) -> core.Jaxpr:
    """Make the constants of a jaxpr its first inputs, so that they have axes as inputs do."""
    inner = closed.jaxpr
    if not inner.constvars:
        return inner
    return inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])
