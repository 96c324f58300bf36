"""A program evaluated on weights by their blocks: products gather, and all else is as it was."""

# The sparse function is the program of the dense one, equation by equation. As long as a weight is
# moved about it stays what it is, `Blocked`; where it multiplies data the product is another one;
# calls and loops take it inside, a scan over layers row by row. Whatever else reads it gets the
# whole weight, made on the spot. What was done is noted, so that one may ask before.
#
#     v = convert_element_type w        Blocked, in another dtype
#     y = dot_general x v               a gather of blocks of x and a batched product
#     n = reduce_sum w                  of the whole weight: noted

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.sharding import auto_axes

from jaxprune.graph._blocked import Blocked
from jaxprune.graph._blocked_products import Met, blocked_conv, blocked_dot
from jaxprune.graph._calls import switch
from jaxprune.graph._frames import Value, shape_of
from jaxprune.graph._line import bind
from jaxprune.graph._loops import scan_sizes
from jaxprune.graph._source import describe

_ELEMENTWISE = (
    *("copy", "copy_p", "name", "reduce_precision", "stop_gradient", "neg", "abs", "sign"),
    *("round", "tanh", "sin", "square"),  # of zero they are zero
    *("pvary", "pcast"),  # what varies over the devices of a shard_map
)
_PAIRS = ("add", "add_any", "sub", "mul", "div", "max", "min")
_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_REMAT = ("remat", "remat2", "checkpoint")


class Seen(NamedTuple):
    """What happened to a weight at one equation.

    Attributes:
      leaves: numbers of its parameters.
      met: the product, if it was one of blocks.
      at: the primitive and its line.
    """

    leaves: tuple[int, ...]
    met: Met | None
    at: str


Note: TypeAlias = Callable[[Seen], None]


class Evaluation(NamedTuple):
    """What is the same all over a program.

    Attributes:
      note: is told what happens to weights.
      callers: the equations that call what is evaluated, the nearest first.
    """

    note: Note
    callers: tuple[core.JaxprEqn, ...] = ()

    def run(self, closed: core.ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
        """The results of a program, some of which may be weights by blocks."""
        consts = zip(closed.jaxpr.constvars, closed.consts, strict=True)
        env: dict[core.Var, Value] = dict(consts)
        env.update(zip(closed.jaxpr.invars, values, strict=True))
        for eqn in closed.jaxpr.eqns:
            ins = [env[v] if isinstance(v, core.Var) else v.val for v in eqn.invars]
            env.update(zip(eqn.outvars, self._equation(eqn, ins), strict=True))
        return [env[v] if isinstance(v, core.Var) else v.val for v in closed.jaxpr.outvars]

    def whole(self, closed: core.ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
        """The same, with weights that are given back as they are made whole."""
        outs = self.run(closed, values)
        return [self._made_whole(x, "the result, as it is,") for x in outs]

    def inside(self, eqn: core.JaxprEqn) -> "Evaluation":
        """What goes on inside of an equation."""
        return self._replace(callers=(eqn, *self.callers))

    def _equation(self, eqn: core.JaxprEqn, ins: Sequence[Value]) -> Sequence[Value]:
        if not any(isinstance(x, Blocked) for x in ins):
            return bind(eqn, *ins)
        name = eqn.primitive.name
        with eqn.ctx.manager:
            outs: Sequence[Value] | None = self._calls(name, eqn, ins)
            outs = _moved(name, eqn, ins) if outs is None else outs
            outs = self._product(name, eqn, ins) if outs is None else outs
        if outs is not None:
            return outs
        return bind(eqn, *(self._made_whole(x, self._at(eqn)) for x in ins))

    def _at(self, eqn: core.JaxprEqn) -> str:
        return describe([eqn, *self.callers])

    def _made_whole(self, x: Value, at: str) -> Value:
        if not isinstance(x, Blocked):
            return x
        self.note(Seen(x.leaves, None, at))
        return x.expand()

    def _product(
        self, name: str, eqn: core.JaxprEqn, ins: Sequence[Value]
    ) -> Sequence[Value] | None:
        product = {"dot_general": blocked_dot, "conv_general_dilated": blocked_conv}.get(name)
        kind: Any = eqn.outvars[0].aval
        met: list[Met] = []

        def run(*ins: Value) -> Value:
            found = product(eqn, *ins) if product is not None else None
            met.extend([] if found is None else [found.met])
            return None if found is None else found.value.astype(kind.dtype)

        # Rows are joined and blocks are gathered, whatever the mesh: explicit axes refuse that.
        explicit = product is not None and kind.sharding.mesh.explicit_axes
        value = auto_axes(run, out_sharding=kind.sharding)(*ins) if explicit else run(*ins)
        if value is None:
            return None
        weight = next(x for x in ins if isinstance(x, Blocked))
        self.note(Seen(weight.leaves, met[0], self._at(eqn)))
        return [value]

    # Calls and loops.

    def _calls(self, name: str, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value] | None:
        if name in _CALLS:
            return self.inside(eqn).run(eqn.params[_CALLS[name]], ins)
        if name in _REMAT:
            again = jax.checkpoint(
                lambda *x: self.inside(eqn).whole(_closed(eqn.params["jaxpr"]), x),
                prevent_cse=eqn.params["prevent_cse"],
                policy=eqn.params["policy"],
            )
            return again(*ins)
        if name == "scan":
            return self._scan(eqn, ins)
        if name == "while":
            return self._while(eqn, ins)
        if name == "cond":
            bodies = [lambda *x, b=b: self.inside(eqn).whole(b, x) for b in eqn.params["branches"]]
            return list(switch(eqn.params, bodies, ins[0], ins[1:]))
        return None

    def _scan(self, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
        """A scan, whose layers may be weights by blocks, and its constants."""
        params, (n, k) = eqn.params, scan_sizes(eqn.params)
        consts, at = ins[:n], self._at(eqn)
        init = [self._made_whole(x, at) for x in ins[n : n + k]]
        xs = [self._layers(x, at) for x in ins[n + k :]]

        def step(carry: Sequence[Value], x: Sequence[Value]) -> tuple[list[Value], list[Value]]:
            rows = [r.row() if isinstance(r, Blocked) else r for r in x]
            outs = self.inside(eqn).whole(params["jaxpr"], [*consts, *carry, *rows])
            return outs[:k], outs[k:]

        carry, ys = lax.scan(
            step,
            init,
            xs,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*carry, *ys]

    def _layers(self, x: Value, at: str) -> Value:
        first = x.layers_first() if isinstance(x, Blocked) else x
        return self._made_whole(x, at) if first is None else first

    def _while(self, eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
        """A loop of unknown length, whose constants may be weights by blocks."""
        params, inside = eqn.params, self.inside(eqn)
        m, n = params["cond_nconsts"], params["body_nconsts"]
        init = [self._made_whole(x, self._at(eqn)) for x in ins[m + n :]]
        return lax.while_loop(
            lambda carry: inside.whole(params["cond_jaxpr"], [*ins[:m], *carry])[0],
            lambda carry: inside.whole(params["body_jaxpr"], [*ins[m : m + n], *carry]),
            init,
        )


def _closed(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


# What only moves a weight.


def _moved(name: str, eqn: core.JaxprEqn, ins: Sequence[Value]) -> Sequence[Value] | None:
    """What an equation makes of a weight that it moves; None if it does more."""
    if name == "optimization_barrier":
        return list(ins)
    if name in _SEVERAL:
        return _listed(_SEVERAL[name](eqn, *ins))
    first, *others = ins
    if not isinstance(first, Blocked) or any(isinstance(x, Blocked) for x in others):
        return None
    if name == "split":
        return _split(first, eqn.params)
    move = _MOVES.get(name)
    return None if move is None else _listed(move(eqn, first, *others))


def _listed(value: Value | None) -> list[Value] | None:
    return None if value is None else [value]


def _elementwise(eqn: core.JaxprEqn, w: Blocked) -> Blocked:
    return w.each(lambda x: bind(eqn, x)[0])


def _converted(eqn: core.JaxprEqn, w: Blocked) -> Blocked | None:
    dtype = eqn.params["new_dtype"]
    floats = jnp.issubdtype(dtype, jnp.floating)
    return w.each(lambda x: x.astype(dtype)) if floats else None


def _combined(eqn: core.JaxprEqn, a: Value, b: Value) -> Blocked | None:
    """A weight times a number, or two values of one weight, such as it and its rounded self."""
    if not (isinstance(a, Blocked) and isinstance(b, Blocked)):
        return _scaled(eqn.primitive.name, a, b)
    # One array of indices means one part of one weight: each slice makes an array of its own.
    same = a.index is b.index and a.axes == b.axes and eqn.primitive.name != "div"
    return a.each(lambda x: bind(eqn, x, b.blocks)[0]) if same else None


def _scaled(name: str, a: Value, b: Value) -> Blocked | None:
    """A weight times a number, or divided by one."""
    w, number = (a, b) if isinstance(a, Blocked) else (b, a)
    if name not in ("mul", "div") or jnp.size(number) != 1 or (name == "div" and w is b):
        return None
    number = jnp.reshape(number, ())
    return w.each(lambda x: x * number if name == "mul" else x / number)


def _resized(eqn: core.JaxprEqn, w: Blocked) -> Blocked | None:
    """After a reshape, or with axes of a single index put in or left out."""
    if eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        return None
    return w.reshape(shape_of(eqn.outvars[0]))


def _sliced(eqn: core.JaxprEqn, w: Blocked) -> Blocked | None:
    if any(s != 1 for s in eqn.params["strides"] or ()):
        return None
    starts, ends = eqn.params["start_indices"], eqn.params["limit_indices"]
    return _parts(w, starts, [b - a for a, b in zip(starts, ends, strict=True)])


def _sliced_at(eqn: core.JaxprEqn, w: Blocked, *starts: jax.Array) -> Blocked | None:
    return _parts(w, starts, eqn.params["slice_sizes"])


def _parts(w: Blocked, starts: Sequence[Any], sizes: Sequence[int]) -> Blocked | None:
    """A part along some axes; along all others it has to be the whole."""
    found: Blocked | None = w
    for i, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if found is not None and size != w.shape[i]:
            found = found.slice(i, start, size)
    return found


def _split(w: Blocked, params: Mapping[str, Any]) -> list[Value] | None:
    found, start = [], 0
    for size in params["sizes"]:
        part = w.slice(params["axis"], start, size)
        if part is None:
            return None
        found.append(part)
        start += size
    return found


def _concatenated(eqn: core.JaxprEqn, *ins: Value) -> Blocked | None:
    """Weights side by side along their outputs, if they have lost as many blocks."""
    axis = eqn.params["dimension"]
    if not all(isinstance(x, Blocked) for x in ins):
        return None
    first, rest = ins[0], [(*x.axes[:axis], *x.axes[axis + 1 :]) for x in ins]
    k = first.index.ndim - 2
    alike = all(
        others == rest[0]
        and x.axes[axis].kind == "out"
        and x.axes[axis].size == x.size("out")
        and x.blocks.shape[k + 1 :] == first.blocks.shape[k + 1 :]
        for x, others in zip(ins, rest, strict=True)
    )
    if not alike:
        return None
    joined = first.axes[axis]._replace(size=sum(x.axes[axis].size for x in ins))
    return Blocked(
        jnp.concatenate([x.blocks for x in ins], axis=k),
        jnp.concatenate([x.index for x in ins], axis=k),
        (*first.axes[:axis], joined, *first.axes[axis + 1 :]),
        tuple(leaf for x in ins for leaf in x.leaves),
    )


def _transposed(eqn: core.JaxprEqn, w: Blocked) -> Blocked:
    return w.transpose(eqn.params["permutation"])


_SEVERAL: dict[str, Callable[..., Blocked | None]] = {
    **dict.fromkeys(_PAIRS, _combined),
    "concatenate": _concatenated,
}
_MOVES: dict[str, Callable[..., Blocked | None]] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    "convert_element_type": _converted,
    "transpose": _transposed,
    "reshape": _resized,
    "squeeze": _resized,
    "expand_dims": _resized,
    "broadcast_in_dim": _resized,
    "slice": _sliced,
    "dynamic_slice": _sliced_at,
}
