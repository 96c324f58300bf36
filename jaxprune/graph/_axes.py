"""One axis of a value: which ids its indices have, and what lies where one is removed."""

# What a program computes is of no interest here, only which indices have to be removed together.
# So every index of every axis has an id, a number, and a value is described by its axes alone:
#
#     w: f32[3,8]     (Axis(ids 0..2), Axis(ids 3..10))
#     b: f32[8]       (Axis(ids 11..18),)
#     y = x @ w + b   the last axis of `x @ w` has the ids of the last axis of `w`, and the sum
#                     joins 3 with 11, 4 with 12, ...: a column of `w` goes with its entry of `b`
#
# Values share ids where they share an index (a transpose passes them on in another order), and ids
# are joined where a primitive needs two indices to go together. `Coupling` keeps what is joined.

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxprune.graph._coupling import Coupling, Ids

Entry: TypeAlias = float | None  # a number that lies somewhere; None for any number
Values: TypeAlias = frozenset[Entry]  # what may lie somewhere
ANYTHING: Values = frozenset((None,))
ZERO: Values = frozenset((0.0,))


class Axis(NamedTuple):
    """An axis that can be cut.

    What lies at a removed index decides whether cutting it changes nothing. In the masked network
    a removed column of ``w`` is zero, so that ``relu(x @ w)`` is zero there, and a sum over it
    loses a zero; but ``exp(x @ w)`` is one there, and a mean over it would change.

    Attributes:
      ids: one id for each index along the axis.
      zero: whether what lies at a removed index is zero in the masked network.
      other: if not, what may lie there: ``{1.0}`` once zeros went through ``exp``, ``{0.0, None}``
        where it may be zero or anything.
    """

    ids: Ids
    zero: bool
    other: Values = ANYTHING

    @property
    def values(self) -> Values:
        """What may lie at a removed index."""
        return ZERO if self.zero else self.other

    def mixed(self) -> "Axis":
        """The same axis after a sum or product with what is not known: zeros alone stay zeros."""
        return self if self.zero else axis_of(self.ids, (self.values & ZERO) | ANYTHING)


Axes: TypeAlias = tuple[Axis | None, ...]  # of a value, in order; None where nothing can be cut


def axis_of(ids: Ids, *values: Values) -> Axis:
    """An axis at whose removed indices one of the given values lies.

    To know one number is enough, or that it may be zero: there are finitely many such sets, so
    that a loop whose body is walked again and again comes to an end.
    """
    found = frozenset.union(*values)
    if len(found) > 1:
        found = (found & ZERO) | ANYTHING
    return Axis(ids, found == ZERO, found)


def mixed(axes: Iterable[Axis | None]) -> Axes:
    """Axes that are left of a sum of products: of what lies there only zeros stay known."""
    return tuple(None if axis is None else axis.mixed() for axis in axes)


def unknown(axes: Iterable[Axis | None]) -> Axes:
    """The same axes, with anything at removed indices."""
    return tuple(None if axis is None else Axis(axis.ids, False) for axis in axes)


def kept_indices(coupling: Coupling, alive: np.ndarray, axes: Axes) -> list[np.ndarray | None]:
    """For each axis the indices that are left, None where it is never cut.

    ``alive`` `[ids]` says of each root of the coupling whether it is left.
    """
    return [a if a is None else np.nonzero(alive[coupling.find(a.ids)])[0] for a in axes]
