"""The walk over a jaxpr: what every axis of every value is coupled with."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune._mesh import fitting
from jaxprune.graph._coupling import Coupling, Ids, Why
from jaxprune.graph._source import source_line
from jaxprune.graph._take import take

Values = frozenset[Any]  # numbers that may lie somewhere; None stands for any number
ANYTHING: Values = frozenset((None,))
ZERO: Values = frozenset((0.0,))


class Axis(NamedTuple):
    """An axis that can be cut.

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


def axis_of(ids: Ids, *values: Values) -> Axis:
    """An axis at whose removed indices one of the given values lies.

    To know one number is enough, or that it may be zero; sets of numbers would never be stable.
    """
    found = frozenset.union(*values)
    if len(found) > 1:
        found = (found & ZERO) | ANYTHING
    return Axis(ids, found == ZERO, found)


Axes = tuple[Axis | None, ...]  # one for each axis of a value; None where it cannot be cut
Known = Callable[[], np.ndarray]  # computes a value that does not depend on inputs


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
    cut: Callable[..., Sequence[Any]] | None = None


@dataclasses.dataclass
class Frame:
    """The axes of all values of one jaxpr at one place where it is called."""

    jaxpr: Any  # core.Jaxpr; `Any`, as jax does not say what its values are
    axes: dict[core.Var, Axes]
    known: dict[core.Var, Known]
    inner: dict[int, list["Frame"]]  # frames of the jaxprs inside of an equation, by its number
    consts: Sequence[Any] = ()  # values of its first inputs, where they are constants
    caller: "Site | None" = None  # the equation that calls it
    skip: dict[int, int] = dataclasses.field(default_factory=dict)  # equation: operand to pass on
    drop: set[int] = dataclasses.field(default_factory=set)  # results that nobody wants
    weights: set[core.Var] = dataclasses.field(default_factory=set)  # made of parameters alone
    scale: dict[int, float] = dataclasses.field(default_factory=dict)  # equation: factor

    def of(self, atom: Any) -> Axes:
        """Axes of a variable or literal."""
        return self.axes[atom] if isinstance(atom, core.Var) else (None,) * len(atom.aval.shape)

    @property
    def outs(self) -> list[Axes]:
        return [self.of(v) for v in self.jaxpr.outvars]


class Constant(NamedTuple):
    """An array that is part of a program."""

    value: Any
    axes: Axes
    program: core.ClosedJaxpr


@dataclasses.dataclass
class Analysis:
    """What all frames of a walk share."""

    rules: Mapping[str, Rule]
    coupling: Coupling = dataclasses.field(default_factory=Coupling)
    layers: list[Ids] = dataclasses.field(default_factory=list)  # axes that scans run along
    scans: list["Site"] = dataclasses.field(default_factory=list)  # the scans of those axes
    exact: bool = True  # whether to note where cutting differs from masking
    deriving: int = 0  # how many derivatives of custom functions it is inside of
    warned: set[str] = dataclasses.field(default_factory=set)
    own: int = 0  # ids below are those of parameters
    taught: frozenset[str] = frozenset()  # primitives with a rule of the user's
    constants: list["Constant"] = dataclasses.field(default_factory=list)

    def fresh(self, shape: Sequence[Any], zero: bool = False, values: Values = ANYTHING) -> Axes:
        """Axes of a value that nothing is known of. An axis of one index is never cut."""
        values = ZERO if zero else values
        return tuple(
            axis_of(self.coupling.fresh(n), values) if isinstance(n, int) and n > 1 else None
            for n in shape
        )

    def walk(
        self,
        jaxpr: Any,
        ins: Sequence[Axes],
        known: Sequence[Known | None] | None = None,
        caller: "Site | None" = None,
        weights: Sequence[bool] = (),
    ) -> Frame:
        """Give axes to every value of a jaxpr, from those of its inputs.

        ``known`` are what computes inputs that are constant, ``weights`` says which of them are
        made of parameters alone.
        """
        consts = list(jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else []
        fixed_axes = [self._constant(c) for c in consts]
        self.constants += [Constant(*c, jaxpr) for c in zip(consts, fixed_axes, strict=True)]
        jaxpr = hoist(jaxpr) if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
        ins = [*fixed_axes, *ins]
        frame = Frame(jaxpr, dict(zip(jaxpr.invars, ins, strict=True)), {}, {}, consts, caller)
        fixed = [functools.partial(np.asarray, c) if is_known(c) else None for c in consts]
        for var, value in zip(jaxpr.invars, [*fixed, *(known or ())], strict=False):
            if value is not None:
                frame.known[var] = value
        given = zip(jaxpr.invars[len(consts) :], weights, strict=False)
        frame.weights.update(v for v, own in given if own)
        for number, eqn in enumerate(jaxpr.eqns):
            site = Site(self, frame, number, eqn)
            if all(site.weights()):
                frame.weights.update(eqn.outvars)
            if eqn.primitive.name in self.taught:
                for axis in (axis for axes in site.ins for axis in axes if axis is not None):
                    self.coupling.read(axis.ids)
            rule = self.rules.get(eqn.primitive.name, Rule(_unknown))
            for var, axes in zip(eqn.outvars, rule.couple(site), strict=True):
                frame.axes[var] = axes
            site.remember()
        return frame

    def _constant(self, value: Any) -> Axes:
        """Axes of an array in a program; a reference to one that lives outside keeps all."""
        return self.fresh(value.shape) if is_array(value) else (None,) * len(value.shape)


def is_array(value: Any) -> bool:
    """True for an array or number, false for a reference to one."""
    return not hasattr(jax.typeof(value), "inner_aval")


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

    analysis: Analysis
    frame: Frame
    number: int
    eqn: Any
    alive: np.ndarray | None = None  # of every root of the coupling, once it is known

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def ins(self) -> list[Axes]:
        """Axes of each operand."""
        return [self.frame.of(v) for v in self.eqn.invars]

    def shape(self, i: int = 0) -> tuple[int, ...]:
        """Shape of an operand."""
        return self.eqn.invars[i].aval.shape

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """Shape of a result."""
        return self.eqn.outvars[i].aval.shape

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

    def layout(self) -> Any:
        """How the program lays the result out on a mesh, as far as what is left of it can be."""
        given = [self.params.get(name) for name in ("sharding", "out_sharding")]
        return next((fitting(s, self.small_shape()) for s in given if s is not None), None)

    def bind(self, *values: Any, **params: Any) -> list[Any]:
        """Evaluate the primitive, with some of its params replaced."""
        layout = {n: self.layout() for n in ("sharding", "out_sharding") if self.params.get(n)}
        out = self.eqn.primitive.bind(*values, **{**self.params, **layout, **params})
        return list(out) if self.eqn.primitive.multiple_results else [out]

    def name(self) -> str:
        """The primitive and the line that called it, the user's own if there is one."""
        chain: list[Any] = [self.eqn]  # what jax caches has lost who called it
        site = self.frame.caller
        while site is not None:
            chain, site = [*chain, site.eqn], site.frame.caller
        lines = [line for own in (True, False) for eqn in chain if (line := source_line(eqn, own))]
        return f"`{self.eqn.primitive.name}` at {lines[0] if lines else 'an unknown line'}"

    def join(self, *axes: Axis | None) -> Ids | None:
        """Couple axes of the same size index by index; one that cannot be cut holds all."""
        held = [axis for axis in axes if axis is None]
        free = [axis for axis in axes if axis is not None]
        if held:
            for axis in free:
                self.freeze(axis, lambda: f"{self.name()} joins it with an axis that stays whole")
            return None
        for axis in free[1:]:
            self.analysis.coupling.join(free[0].ids, axis.ids)
        return free[0].ids if free else None

    def contract(self, *axes: Axis | None) -> None:
        """Couple axes that are summed over, and note if what is removed was not zero."""
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

    def blur(self, ids: Ids, why: Why) -> None:
        """Note that cutting an axis differs from masking it."""
        if self.analysis.exact:
            self.analysis.coupling.blur(ids, why)

    def fresh(self, shape: Sequence[Any], zero: bool = False, values: Values = ANYTHING) -> Axes:
        """Axes of a value that nothing is known of."""
        return self.analysis.fresh(shape, zero, values)

    def product(self, rows: Axis, columns: Axis) -> Axis:
        """Lay two axes out along one, the first of them outermost."""
        cells = self.analysis.coupling.fresh(len(rows.ids) * len(columns.ids))
        self.analysis.coupling.product(cells, rows.ids, columns.ids)
        return axis_of(cells, rows.values, columns.values)

    def inner(self, i: int = 0) -> Callable[..., list[Any]]:
        """The function of a jaxpr inside of the equation, on cut operands."""
        frame, alive = self.frame.inner[self.number][i], self.kept_roots()
        return lambda *values: evaluate(self.analysis, frame, alive, values)

    def walk(
        self,
        jaxpr: Any,
        ins: Sequence[Axes],
        known: Sequence[Known | None] | None = None,
        weights: Sequence[bool] = (),
    ) -> Frame:
        """Walk a jaxpr inside of the equation; its frame is kept, in the order of the calls."""
        frame = self.analysis.walk(jaxpr, ins, known, self, weights)
        self.frame.inner.setdefault(self.number, []).append(frame)
        return frame

    def forget(self) -> None:
        """Throw away the frames of this equation: they are walked again."""
        self.frame.inner.pop(self.number, None)

    def known(self) -> list[Known | None]:
        """For each operand what computes it, if it depends on no input."""
        return [
            self.frame.known.get(v)
            if isinstance(v, core.Var)
            else functools.partial(np.asarray, v.val)
            if is_known(v.val)
            else None
            for v in self.eqn.invars
        ]

    def weights(self) -> list[bool]:
        """For each operand whether it is made of parameters and numbers alone."""
        own = self.frame.weights
        return [not isinstance(v, core.Var) or v in own for v in self.eqn.invars]

    def value(self, i: int) -> np.ndarray | None:
        """The value of an operand, if it depends on no input."""
        value = self.known()[i]
        return None if value is None else value()

    def scalar(self, i: int) -> Any:
        """The operand's value if it is one known number, else None."""
        one = math.prod(self.eqn.invars[i].aval.shape) == 1
        value = self.value(i) if one else None
        return None if value is None else value.item()

    def is_zero(self, i: int) -> bool:
        """Tell whether an operand is a zero that is written in the program."""
        value = self.eqn.invars[i]
        known = self.known()[i] is not None
        return known and math.prod(value.aval.shape) == 1 and not np.any(self.value(i))

    def remember(self) -> None:
        """Let small results that depend on no input be computed where somebody asks for them."""
        known = self.known()
        shapes = [getattr(v.aval, "shape", ()) for v in self.eqn.outvars]
        fixed = all(isinstance(n, int) for shape in shapes for n in shape)  # or symbolic
        small = fixed and all(math.prod(shape) <= 65536 for shape in shapes)
        if not small or any(k is None for k in known) or self.number in self.frame.inner:
            return
        name = self.eqn.primitive.name
        if name in ("pvary", "pcast"):  # the same number on every device
            self.frame.known[self.eqn.outvars[0]] = known[0]  # type: ignore[assignment]
            return
        if self.eqn.effects or name in ("random_bits", "random_seed", "ppermute"):
            return

        @functools.cache
        def compute() -> list[np.ndarray]:
            with jax.ensure_compile_time_eval(), self.eqn.ctx.manager:
                values = [k() for k in known if k is not None]
                out = self.eqn.primitive.bind(*values, **self.params)
            return [np.asarray(x) for x in (out if self.eqn.primitive.multiple_results else [out])]

        for i, var in enumerate(self.eqn.outvars):
            self.frame.known[var] = functools.partial(lambda i: compute()[i], i)


def is_known(value: Any) -> bool:
    """True for a number or array that can be looked at: no tracer and no key."""
    key = jnp.issubdtype(getattr(value, "dtype", np.dtype(float)), jax.dtypes.extended)
    return not isinstance(value, jax.core.Tracer) and not key and is_array(value)


def evaluate(
    analysis: Analysis, frame: Frame, alive: np.ndarray, values: Sequence[Any]
) -> list[Any]:
    """Compute the results of a frame from operands that have been cut.

    What no result depends on is left out: a residual branch that is skipped, for one.
    """
    kept = functools.partial(kept_indices, analysis.coupling, alive)
    first = zip(frame.consts, frame.jaxpr.invars, strict=False)
    consts = [take(c, kept(frame.of(v))) for c, v in first]
    env = dict(zip(frame.jaxpr.invars, [*consts, *values], strict=True))

    def read(atom: Any) -> Any:
        return env[atom] if isinstance(atom, core.Var) else atom.val

    for number in _needed(frame):
        eqn = frame.jaxpr.eqns[number]
        if number in frame.skip:
            env[eqn.outvars[0]] = read(eqn.invars[frame.skip[number]])
            continue
        site = Site(analysis, frame, number, eqn, alive)
        cut = analysis.rules.get(eqn.primitive.name, Rule(_unknown)).cut or _as_it_is
        with eqn.ctx.manager:
            outs = cut(site, *map(read, eqn.invars))
        if number in frame.scale:
            outs = [x * jnp.asarray(frame.scale[number], x.dtype) for x in outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [None if i in frame.drop else read(v) for i, v in enumerate(frame.jaxpr.outvars)]


def _needed(frame: Frame) -> list[int]:
    """Numbers of the equations that results depend on, in order."""
    outs = [v for i, v in enumerate(frame.jaxpr.outvars) if i not in frame.drop]
    needed = {v for v in outs if isinstance(v, core.Var)}
    numbers = []
    for number in reversed(range(len(frame.jaxpr.eqns))):
        eqn = frame.jaxpr.eqns[number]
        if needed.intersection(eqn.outvars) or eqn.effects:
            read = [eqn.invars[frame.skip[number]]] if number in frame.skip else eqn.invars
            needed.update(v for v in read if isinstance(v, core.Var))
            numbers.append(number)
    return numbers[::-1]


def kept_indices(coupling: Coupling, alive: np.ndarray, axes: Axes) -> list[np.ndarray | None]:
    """For each axis the indices that are left, None where it is never cut."""
    return [a if a is None else np.nonzero(alive[coupling.find(a.ids)])[0] for a in axes]


def _as_it_is(at: Site, *values: Any) -> list[Any]:
    return at.bind(*values)


def hoist(closed: core.ClosedJaxpr) -> core.Jaxpr:
    """Make the constants of a jaxpr its first inputs."""
    inner = closed.jaxpr
    if not inner.constvars:
        return inner
    return inner.replace(constvars=[], invars=[*inner.constvars, *inner.invars])


def _unknown(at: Site) -> list[Axes]:
    """Hold whatever an unknown primitive touches, and say so where that matters."""
    for axes in at.ins:
        for axis in axes:
            at.freeze(axis, lambda: f"{at.name()} is unknown to jaxprune")
    touched = any(axis is not None for axes in at.ins for axis in axes)
    if touched and at.name() not in at.analysis.warned:
        at.analysis.warned.add(at.name())
        warnings.warn(
            f"{at.name()} is a primitive without a rule: whatever it touches cannot be pruned. "
            f"Pass `rules={{{at.eqn.primitive.name!r}: jp.graph.Rule(...)}}` to teach it.",
            stacklevel=2,
        )
    return [(None,) * len(getattr(v.aval, "shape", ())) for v in at.eqn.outvars]
