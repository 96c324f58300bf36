"""Rules for what is more than a value: references that are written to, and calls of the host."""

# A reference is written to behind the back of the equations that read it. Its axes pass as those of
# an array do, but what lies at a removed index is not known once it exists.

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np

from jaxprune.graph._axes import Axes, Axis, unknown
from jaxprune.graph._frames import Value
from jaxprune.graph._site import Rule, Site

Index: TypeAlias = int | slice | jax.Array


def host(at: Site) -> list[Axes]:
    """What the host computes from an array, it may compute from all of it."""
    return at.freeze_all(lambda: f"{at.name()} hands it to the host, whole")


def watched(at: Site) -> list[Axes]:
    """A callback for debugging gives nothing back: it sees what the small network has."""
    return at.whole_outs()


def passed(at: Site) -> list[Axes]:
    """A reference made from a value, or the value of one: who knows what was written meanwhile."""
    return [unknown(at.ins[0])]


def empty_ref(at: Site) -> list[Axes]:
    return [at.fresh(shape) for shape in at.out_shapes()]


def access(at: Site) -> list[Axes]:
    """Axes that are read or written whole pass; of an indexed one the reference keeps all."""
    ref, value = at.ins[0], at.ins[1] if at.primitive != "get" else None
    index = _index(at, at.eqn.invars)
    if index is None:
        for axis in (*ref, *(value or ())):
            at.freeze(axis)
        return at.whole_outs()
    out: list[Axis | None] = []
    for axis, part in zip(ref, index, strict=True):
        if part != slice(None):
            at.freeze(axis)
        if isinstance(part, slice):
            out.append(axis if part == slice(None) else None)
    for mine, theirs in zip(out, value or (), strict=False):
        at.join(mine, theirs)
    return [unknown(out)] * len(at.eqn.outvars)


def cut_access(at: Site, ref: Value, *values: Value) -> list[Value]:
    if all(kept is None for kept in at.kept_ins()[0]):
        return at.bind(ref, *values)
    index = tuple(_index(at, (ref, *values)) or ())
    if at.primitive == "get":
        return [jax.ref.get(ref, index)]
    if at.primitive == "swap":
        return [jax.ref.swap(ref, index, values[0])]
    jax.ref.addupdate(ref, index, values[0])
    return []


def _index(at: Site, operands: Sequence[Value]) -> list[Index] | None:
    """The index of each axis: numbers, and slices at fixed places. None if it is more than that."""
    first = 1 if at.primitive == "get" else 2
    steps = jax.tree.unflatten(at.params["tree"], list(operands[first:]))
    rank = len(at.ins[0])
    if len(steps) != 1 or not hasattr(steps[0], "indices"):
        return None if steps else list(itertools.repeat(slice(None), rank))
    found: list[Index] = []
    for part, n in zip(steps[0].indices, at.shape(), strict=True):
        if hasattr(part, "stride"):
            fixed = isinstance(part.start, int) and isinstance(part.size, int)
            if not fixed:
                return None
            whole = (part.start, part.size, part.stride) == (0, n, 1)
            end = part.start + part.size * part.stride
            found.append(slice(None) if whole else slice(part.start, end, part.stride))
        elif np.shape(getattr(part, "aval", part)) != ():
            return None
        else:
            found.append(getattr(part, "val", part))
    return found


RULES = {
    **{name: Rule(host) for name in ("pure_callback", "io_callback")},
    **{name: Rule(watched) for name in ("debug_callback", "debug_print", "free_ref")},
    **{name: Rule(passed) for name in ("new_ref", "freeze")},
    "empty_ref": Rule(empty_ref),
    **{name: Rule(access, cut_access) for name in ("get", "swap", "addupdate")},
}
