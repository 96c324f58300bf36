"""One equation at one place, and all that its rule may ask and do."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jaxprune._mesh import sharding_for
from jaxprune.graph._axes import ANYTHING, Axes, Axis, Entry, Values, axis_of, kept_indices
from jaxprune.graph._coupling import Ids, Why
from jaxprune.graph._frames import Call, Frame, Known, Value, callers, shape_of
from jaxprune.graph._known import known_operands
from jaxprune.graph._source import describe

if TYPE_CHECKING:  # the walk calls rules, and the rules of calls walk what is inside
    from jaxprune.graph._walk import Analysis


class Rule(NamedTuple):
    """What is known of a primitive.

    Attributes:
      couple: says how the axes of its results hang together with those of its operands, joins and
        freezes what has to be; ``(Site) -> [Axes of each result]``.
      cut: evaluates it on cut operands; ``(Site, *values) -> [result, ...]``. None where the
        primitive computes the right thing as it is.

    Example:
      >>> def fft(at):  # works along the last axes, which stay whole, and passes the others on
      ...     n = len(at.params["fft_lengths"])
      ...     for axis in at.ins[0][-n:]:
      ...         at.freeze(axis)
      ...     return [(*at.ins[0][:-n], *[None] * n)]
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> net = lambda p, x: jnp.abs(jnp.fft.rfft(p["w"] @ x)).T @ p["v"]
      >>> params = {"w": jnp.ones((6, 3)), "v": jnp.ones((6, 1))}
      >>> jp.find_groups(net, params, jnp.ones((3, 8)), rules={"fft": Rule(fft)})
      Groups(v:0 x 6)
    """

    couple: Callable[["Site"], Sequence[Axes]]
    cut: Callable[..., Sequence[Value]] | None = None


@dataclasses.dataclass(frozen=True)
class Site:
    """One equation, and what its rule may ask and do.

    While axes are coupled: ``ins`` are the axes of the operands, ``join``, ``contract``, ``freeze``
    and ``product`` say how they hang together, ``fresh`` makes new ones. When it is cut:
    ``kept_ins`` and ``kept_outs`` give the indices that are left, ``small_shape`` the shape of a
    result, and ``bind`` evaluates the primitive with some of its params replaced.

    Attributes:
      analysis: what is shared by the whole walk.
      frame: the axes of all values beside it.
      number: its place in the jaxpr.
      eqn: the equation of the jaxpr.
      alive: which roots are alive, once that is known.
    """

    analysis: "Analysis"
    frame: Frame
    number: int
    eqn: core.JaxprEqn
    alive: np.ndarray | None = None

    # The equation as it is written.

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Params of the primitive."""
        return self.eqn.params

    @property
    def ins(self) -> list[Axes]:
        """Axes of each operand."""
        return [self.frame.of(v) for v in self.eqn.invars]

    def shape(self, i: int = 0) -> tuple[int, ...]:
        """Shape of an operand."""
        return shape_of(self.eqn.invars[i])

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """Shape of a result."""
        return shape_of(self.eqn.outvars[i])

    def out_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all results."""
        return [shape_of(v) for v in self.eqn.outvars]

    def name(self) -> str:
        """The primitive and the line that called it, the user's own if there is one."""
        return describe([self.eqn, *(call.eqn for call in callers(self.frame))])

    # What can be told of the operands without computing anything that inputs have a say in.

    def known(self) -> list[Known | None]:
        """For each operand what computes it, if it depends on no input."""
        return known_operands(self.frame, self.eqn.invars)

    def value(self, i: int) -> np.ndarray | None:
        """The value of an operand, if it depends on no input."""
        value = self.known()[i]
        return None if value is None else value()

    def scalar(self, i: int) -> Entry:
        """The operand's value if it is one known number, else None."""
        one = math.prod(self.shape(i)) == 1
        value = self.value(i) if one else None
        return None if value is None else value.item()

    def is_zero(self, i: int) -> bool:
        """Tell whether an operand is a zero that is written in the program."""
        known = self.known()[i] is not None
        return known and math.prod(self.shape(i)) == 1 and not np.any(self.value(i))

    def weights(self) -> list[bool]:
        """For each operand whether it is made of parameters and numbers alone."""
        own = self.frame.weights
        return [not isinstance(v, core.Var) or v in own for v in self.eqn.invars]

    # Coupling.

    def join(self, *axes: Axis | None) -> Ids | None:
        """Couple axes of the same size index by index; one that cannot be cut holds all.

        Gives the ids of what has been joined, None if it is held.
        """
        # The other axis is one of an input, or has been held before: nothing of it can go, and so
        # nothing of what it is coupled with.
        held = [axis for axis in axes if axis is None]
        free = [axis for axis in axes if axis is not None]
        if held:
            for axis in free:
                self.freeze(axis, lambda: f"{self.name()} joins it with an axis that stays whole")
            return None
        for axis in free[1:]:
            self.analysis.coupling.join(free[0].ids, axis.ids)
        return free[0].ids if free else None

    def beside(self, *axes: Axis | None) -> Axis | None:
        """The axis of what is one of several values here, another there; they are cut alike."""
        ids = self.join(*axes)
        values = [axis.values for axis in axes if axis is not None]
        return None if ids is None else axis_of(ids, *values)

    def contract(self, *axes: Axis | None) -> None:
        """Couple axes that are summed over, and note if what is removed was not zero.

        A sum over a removed index loses a term. That changes nothing if the term was zero in the
        masked network, and one operand that is zero there is enough to make it so.
        """
        met = self._met(*axes)
        ids = self.join(*axes)
        if ids is None:
            return
        self.analysis.coupling.read(ids[met])
        if not any(axis.zero for axis in axes if axis is not None):
            self.blur(ids, lambda: f"{self.name()} sums what is not zero where a unit is removed")

    def _met(self, *axes: Axis | None) -> np.ndarray:
        """Tell at which indices what is summed was made along an axis of a parameter.

        What a program makes (padding, one-hot vectors) meets a parameter without being its product,
        and a sum of weights alone meets no data.
        """
        # Ids are numbered as they are made, those of parameters first, and the root of a class is
        # its lowest id: a root below `own` is that of a parameter.
        coupling, n = self.analysis.coupling, self.analysis.own
        made = [coupling.find(axis.ids) < n for axis in axes if axis is not None]
        if not made or (len(axes) == 1 and all(self.weights())):
            return np.zeros(0 if not made else len(made[0]), bool)
        return np.logical_and.reduce(made)

    def freeze(self, axis: Axis | None, why: Why | None = None) -> None:
        """Forbid to cut an axis."""
        if axis is not None:
            why = why or (lambda: f"{self.name()} needs the whole axis")
            self.analysis.coupling.freeze(axis.ids, why)

    def freeze_all(self, why: Why | None = None) -> list[Axes]:
        """Forbid to cut any axis of any operand; give axes of results that stay whole as well."""
        for axes in self.ins:
            for axis in axes:
                self.freeze(axis, why)
        return self.whole_outs()

    def whole_outs(self) -> list[Axes]:
        """Axes of results of which nothing can be cut."""
        return [(None,) * len(shape) for shape in self.out_shapes()]

    def blur(self, ids: Ids, why: Why) -> None:
        """Note that cutting an axis differs from masking it."""
        if self.analysis.exact:
            self.analysis.coupling.blur(ids, why)

    def fresh(self, shape: Sequence[int], zero: bool = False, values: Values = ANYTHING) -> Axes:
        """Axes of a value that nothing is known of."""
        return self.analysis.fresh(shape, zero, values)

    def product(self, rows: Axis, columns: Axis) -> Axis:
        """Lay two axes out along one, the first of them outermost.

        Ids `[rows]` and `[columns]` give `[rows * columns]`, as in a reshape that merges two axes.
        """
        cells = self.analysis.coupling.fresh(len(rows.ids) * len(columns.ids))
        self.analysis.coupling.product(cells, rows.ids, columns.ids)
        return axis_of(cells, rows.values, columns.values)

    # What is inside.

    def walk(
        self,
        jaxpr: core.Jaxpr | core.ClosedJaxpr,
        ins: Sequence[Axes],
        known: Sequence[Known | None] | None = None,
        weights: Sequence[bool] = (),
    ) -> Frame:
        """Walk a jaxpr inside of the equation; its frame is kept, in the order of the calls."""
        call = Call(self.frame, self.eqn)
        frame = self.analysis.walk(jaxpr, ins, known, call, weights)
        self.frame.inner.setdefault(self.number, []).append(frame)
        return frame

    def forget(self) -> None:
        """Throw away the frames of this equation: they are walked again."""
        self.frame.inner.pop(self.number, None)

    def inner(self, i: int = 0) -> Callable[..., list[Value]]:
        """The function of a jaxpr inside of the equation, on cut operands."""
        frame, alive = self.frame.inner[self.number][i], self.kept_roots()
        return lambda *values: self.analysis.evaluate(frame, alive, values)

    # Cutting.

    def kept(self, axes: Axes) -> list[np.ndarray | None]:
        """For each axis the indices that are left, None where it is never cut."""
        return kept_indices(self.analysis.coupling, self.kept_roots(), axes)

    def kept_roots(self) -> np.ndarray:
        """Say of every root of the coupling whether it is left."""
        if self.alive is None:
            raise RuntimeError("nothing is cut while axes are still being coupled")
        return self.alive

    def kept_ins(self) -> list[list[np.ndarray | None]]:
        """For each operand the indices that are left of each axis."""
        return [self.kept(axes) for axes in self.ins]

    def kept_outs(self) -> list[list[np.ndarray | None]]:
        """For each result the indices that are left of each axis."""
        return [self.kept(self.frame.of(v)) for v in self.eqn.outvars]

    def small_shape(self, i: int = 0) -> tuple[int, ...]:
        """Shape of a result once it is cut."""
        sizes = zip(self.out_shape(i), self.kept_outs()[i], strict=True)
        return tuple(n if kept is None else len(kept) for n, kept in sizes)

    def layout(self) -> jax.sharding.NamedSharding | None:
        """How the program lays the result out on a mesh, as far as what is left of it can be."""
        given = [self.params.get(name) for name in ("sharding", "out_sharding")]
        return next((sharding_for(s, self.small_shape()) for s in given if s is not None), None)

    def bind(self, *values: Value, **params: Any) -> list[Value]:
        """Evaluate the primitive, with some of its params replaced."""
        layout = {n: self.layout() for n in ("sharding", "out_sharding") if self.params.get(n)}
        out = self.eqn.primitive.bind(*values, **{**self.params, **layout, **params})
        return list(out) if self.eqn.primitive.multiple_results else [out]
