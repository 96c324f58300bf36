"""The walk over a program: a frame for each call, and axes for the results of each equation."""

# From the inputs on, equation by equation:
#
#     { lambda ; w:f32[3,8] x:f32[1,3]. let    w has ids of its own, x is an input and stays whole
#         y:f32[1,8] = dot_general x w         the rule holds axis 0 of w, as x does, and gives y
#         z:f32[1,8] = tanh y                  axes (None, ids of w's columns); so it goes on
#       in (z,) }
#
# Rules add to the coupling and give axes; nothing is computed, and no rule looks ahead. So every
# frame is walked once, but for bodies of loops, until what they carry is stable, and for what has a
# derivative of its own. What holds of the program itself (constants, parameters, calls) is kept in
# the frames, apart from what the rules make of it.

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

from jaxprune.graph._axes import ANYTHING, ZERO, Axes, Values, axis_of
from jaxprune.graph._coupling import Coupling, Ids
from jaxprune.graph._evaluate import evaluate
from jaxprune.graph._frames import Call, Frame, Known, Value, hoist
from jaxprune.graph._known import is_reference, known_constants, remember
from jaxprune.graph._site import Rule, Site


class Constant(NamedTuple):
    """An array that is part of a program, and its axes."""

    value: Value
    axes: Axes
    program: core.ClosedJaxpr


@dataclasses.dataclass
class Analysis:
    """What all frames of a walk share.

    Attributes:
      rules: rules of primitives by name.
      coupling: how ids hang together.
      layers: ids of each axis that a scan runs along.
      scans: the scans of those axes.
      runs: the same and those of which no step can be left out.
      exact: whether to note where cutting differs from masking.
      deriving: how many derivatives of custom functions it is inside of.
      warned: primitives that have been warned of, with their lines.
      own: ids below are those of parameters.
      taught: primitives with a rule of the user's.
      constants: arrays in any of the programs.
    """

    rules: Mapping[str, Rule]
    coupling: Coupling = dataclasses.field(default_factory=Coupling)
    layers: list[Ids] = dataclasses.field(default_factory=list)
    scans: list[Site] = dataclasses.field(default_factory=list)
    runs: list[Ids] = dataclasses.field(default_factory=list)
    exact: bool = True
    deriving: int = 0
    warned: set[str] = dataclasses.field(default_factory=set)
    own: int = 0
    taught: frozenset[str] = frozenset()
    constants: list[Constant] = dataclasses.field(default_factory=list)

    def fresh(self, shape: Sequence[int], zero: bool = False, values: Values = ANYTHING) -> Axes:
        """Axes of a value that nothing is known of. An axis of one index is never cut."""
        values = ZERO if zero else values
        return tuple(
            axis_of(self.coupling.fresh(n), values) if isinstance(n, int) and n > 1 else None
            for n in shape
        )

    def walk(
        self,
        jaxpr: core.Jaxpr | core.ClosedJaxpr,
        ins: Sequence[Axes],
        known: Sequence[Known | None] | None = None,
        caller: Call | None = None,
        weights: Sequence[bool] = (),
    ) -> Frame:
        """Give axes to every value of a jaxpr, from those of its inputs.

        ``known`` are what computes inputs that are constant, ``weights`` says which of them are
        made of parameters alone.
        """
        frame = self._enter(jaxpr, ins, known or (), caller)
        frame.weights.update(v for v, own in zip(frame.inputs, weights, strict=False) if own)
        for number, eqn in enumerate(frame.jaxpr.eqns):
            site = Site(self, frame, number, eqn)
            if all(site.weights()):
                frame.weights.update(eqn.outvars)
            frame.axes.update(zip(eqn.outvars, self._couple(site), strict=True))
            remember(frame, number)
        return frame

    def evaluate(self, frame: Frame, alive: np.ndarray, values: Sequence[Value]) -> list[Value]:
        """Compute the results of a frame from operands that have been cut."""
        return evaluate(self, frame, alive, values)

    def rule(self, eqn: core.JaxprEqn) -> Rule:
        """The rule of a primitive; one that nobody taught holds what it touches."""
        return self.rules.get(eqn.primitive.name, _UNKNOWN)

    def _enter(
        self,
        jaxpr: core.Jaxpr | core.ClosedJaxpr,
        ins: Sequence[Axes],
        known: Sequence[Known | None],
        caller: Call | None,
    ) -> Frame:
        """The frame of a call before any equation; constants become its first inputs."""
        consts: list[Value] = []
        if isinstance(jaxpr, core.ClosedJaxpr):
            consts = list(jaxpr.consts)
            axes = [self._of_constant(c) for c in consts]
            self.constants += [Constant(*c, jaxpr) for c in zip(consts, axes, strict=True)]
            jaxpr, ins = hoist(jaxpr), [*axes, *ins]
        thunks = zip(jaxpr.invars, [*known_constants(consts), *known], strict=False)
        computed = {v: k for v, k in thunks if k is not None}
        return Frame(jaxpr, dict(zip(jaxpr.invars, ins, strict=True)), computed, {}, consts, caller)

    def _of_constant(self, value: Value) -> Axes:
        """Axes of an array in a program; a reference to one that lives outside keeps all."""
        return (None,) * len(value.shape) if is_reference(value) else self.fresh(value.shape)

    def _couple(self, site: Site) -> Sequence[Axes]:
        """Let the rule of an equation say how axes hang together."""
        if site.primitive in self.taught:  # who knows what it sums over: its operands are read
            for axis in (axis for axes in site.ins for axis in axes if axis is not None):
                self.coupling.read(axis.ids)
        return self.rule(site.eqn).couple(site)


def _unknown(at: Site) -> list[Axes]:
    """Hold whatever an unknown primitive touches, and say so where that matters."""
    touched = any(axis is not None for axes in at.ins for axis in axes)
    if touched and at.name() not in at.analysis.warned:
        at.analysis.warned.add(at.name())
        warnings.warn(
            f"{at.name()} is a primitive without a rule: whatever it touches cannot be pruned. "
            f"Pass `rules={{{at.primitive!r}: jp.graph.Rule(...)}}` to teach it.",
            stacklevel=2,
        )
    return at.freeze_all(lambda: f"{at.name()} is unknown to jaxprune")


_UNKNOWN = Rule(_unknown)
