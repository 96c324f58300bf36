"""What makes two stretches of programs the same: forms, which compare equal."""

# Each layer of a network is a program of its own in a jaxpr, equal to that of the next but for the
# names of its variables. What is compiled for one serves all, if it can be told that they are
# equal: everything that an equation holds becomes a tuple, in which variables are numbered as they
# come.

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core


def form_of(value: Any) -> Hashable:  # noqa: PLR0911  # a table of kinds
    """A value that a primitive is given, as something that compares equal to its like.

    Numbers of different types are different, and so are zeros of different signs; arrays compare by
    what they hold, and what cannot be compared is equal to itself alone.
    """
    if isinstance(value, core.ClosedJaxpr):  # newer jax has no other jaxprs
        return "closed", form_of_jaxpr(value.jaxpr), tuple(map(form_of, value.consts))
    if isinstance(value, core.Jaxpr):
        return form_of_jaxpr(value)
    if isinstance(value, dict):
        return tuple((name, form_of(value[name])) for name in sorted(value, key=str))
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(map(form_of, value))
    if isinstance(value, np.ndarray | np.generic):
        return "array", value.dtype.name, _is_weak(value), value.shape, value.tobytes()
    if isinstance(value, jax.Array):
        return "array", id(value)
    if isinstance(value, int | float | complex):  # jax has its own, which tell their dtype
        return type(value), repr(value)
    try:
        hash(value)
    except TypeError:
        return "object", id(value)
    return type(value), value


def _is_weak(value: np.ndarray | np.generic) -> bool:
    return bool(getattr(value, "weak_type", False))


def form_of_jaxpr(jaxpr: core.Jaxpr) -> Hashable:
    """The form of a program: its equations, and which variable goes where."""
    number: dict[core.Var, int] = {}

    def name(atom: Any) -> Hashable:
        if not isinstance(atom, core.Var):
            return form_of(atom.val), str(atom.aval)
        return number.setdefault(atom, len(number))

    def names(atoms: Sequence[Any]) -> Hashable:
        return tuple(map(name, atoms))

    ins = names([*jaxpr.constvars, *jaxpr.invars])
    eqns = tuple(
        (names(e.invars), e.primitive.name, form_of(e.params), names(e.outvars)) for e in jaxpr.eqns
    )
    shapes = tuple(str(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars))
    return ins, shapes, eqns, names(jaxpr.outvars)
