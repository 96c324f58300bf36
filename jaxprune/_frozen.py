"""Leaves that an optimizer never moves: those whose update traces to a literal zero."""

# Which leaves `optax.masked`, `multi_transform` or `freeze` hold still is written in none of their
# states, but in the program of an update:
#
#     { lambda ; m0 m1 g0 g1 p0 p1. let
#         a = mul m0 0.9
#         ...
#         u0 = mul b -0.1                          depends on a gradient: leaf 0 moves
#         u1 = broadcast_in_dim[shape=(3,)] 0.0    zero whatever comes: leaf 1 never moves
#       in (u0, u1, b, m1) }
#
# So zeros are followed from literals to results. Only what is sure to be zero counts: a leaf that
# is taken to move is pruned as any other, while one that is wrongly left out would stay dense.

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from jaxprune._tree import leaves_with_path, list_paths, prunable
from jaxprune._where import by_default, with_layout
from jaxprune.graph._frames import Atom, Value, shape_of
from jaxprune.typing import Layout, Params, Where

# Zero where all operands are; the predicate of `select_n` is left out before.
_KEEP_ZERO = frozenset(
    (
        *("abs", "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type"),
        *("copy", "copy_p", "cumsum", "dynamic_slice", "expand_dims", "integer_pow", "max", "min"),
        *("neg", "pad", "pvary", "real", "reduce_max", "reduce_min", "reduce_precision"),
        *("reduce_sum", "reshape", "rev", "select_n", "sharding_constraint", "sign", "slice"),
        *("sqrt", "square", "squeeze", "sub", "transpose"),
    )
)
# Zero where one operand is.
_ABSORB = frozenset(("mul", "dot_general"))


@dataclasses.dataclass(frozen=True)
class Moving:
    """The default ``where`` without the leaves that are frozen.

    Attributes:
      where: predicate of path and array.
      frozen: paths that it takes no longer.
    """

    where: Where
    frozen: tuple[str, ...]

    def with_layout(self, layout: Layout) -> "Moving":
        """Let what it takes leaves out of decide by use."""
        return dataclasses.replace(self, where=with_layout(self.where, layout))

    def __call__(self, path: str, array: jax.Array) -> bool:
        return path not in self.frozen and self.where(path, array)


def moving(where: Where, inner: optax.GradientTransformation, params: Params, user: str) -> Where:
    """Leave what the optimizer freezes out of the default ``where``; another one is obeyed."""
    if not by_default(where):
        return where
    return without(where, frozen(inner, params) or (), params, user)


def without(where: Where, paths: Sequence[str], params: Params, user: str) -> Where:
    """Take paths of frozen leaves out of a predicate, if something is left then."""
    if not paths:
        return where
    chosen = [path for path, _ in leaves_with_path(prunable(params, where=where))]
    if set(chosen) <= set(paths):
        raise ValueError(
            f"`{user}` finds nothing to prune: the inner optimizer freezes {list_paths(chosen)} "
            "(their update is zero), and the default `where` takes no other leaf. Choose leaves "
            "with `where=jp.by_path(...)`, which is obeyed for frozen ones too."
        )
    return Moving(where, tuple(paths))


def frozen(inner: optax.GradientTransformation, params: Params) -> list[str] | None:
    """List the paths of the leaves whose update is zero whatever comes; None if none can tell.

    An optimizer that moves nothing at all freezes nothing: it stands still, as one with a
    learning rate of zero does.
    """
    try:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype), params)
        # State and gradients are inputs: what is zero at the first step only is no literal.
        first, state = jax.make_jaxpr(inner.init, return_shape=True)(shapes)
        step = jax.make_jaxpr(inner.update)(shapes, state, shapes)
    except Exception:  # an optimizer that wants more than gradients, or a mesh axis around it
        return None
    paths = [path for path, _ in leaves_with_path(params)]
    if len(step.jaxpr.outvars) != len(paths) + len(first.jaxpr.outvars):
        return None
    still = _never_moved(first, step, len(paths))
    return [] if all(still) else [p for p, zero in zip(paths, still, strict=True) if zero]


def _never_moved(first: core.ClosedJaxpr, step: core.ClosedJaxpr, n: int) -> list[bool]:
    """Say which of ``n`` updates are zero at every step.

    Moments that start from zero and stay there as long as they are zero are zero for good:
    ``optax.chain(optax.freeze(...), optax.adam(...))`` moves nothing that it freezes. Scalars are
    not taken for that: somebody may set a hyperparameter.
    """
    starts = _zeros(first.jaxpr, first.consts, [False] * n)
    arrays = [shape_of(v) != () for v in first.jaxpr.outvars]
    zero = [start and array for start, array in zip(starts, arrays, strict=True)]
    while True:  # entries of the state that were zero so far: each turn can only lose some
        out = _zeros(step.jaxpr, step.consts, [False] * n + zero + [False] * n)
        stays = [a and b for a, b in zip(zero, out[n:], strict=True)]
        if stays == zero:
            return out[:n]
        zero = stays


def _zeros(jaxpr: core.Jaxpr, consts: Sequence[Value], inputs: list[bool]) -> list[bool]:
    """Say which results of a program are zero by themselves."""
    known = dict(zip(jaxpr.constvars, map(_is_zero, consts), strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Atom) -> bool:
        return _is_zero(atom.val) if isinstance(atom, core.Literal) else known.get(atom, False)

    for eqn in jaxpr.eqns:
        known |= dict(zip(eqn.outvars, _results(eqn, list(map(read, eqn.invars))), strict=True))
    return list(map(read, jaxpr.outvars))


def _results(eqn: core.JaxprEqn, zero: list[bool]) -> list[bool]:
    """Say which results of one equation are zero, given which of its operands are."""
    name, n = eqn.primitive.name, len(eqn.outvars)
    if name == "cond":
        branches = [_zeros(b.jaxpr, b.consts, zero[1:]) for b in eqn.params["branches"]]
        return [all(each) for each in zip(*branches, strict=True)]
    body = eqn.params.get("jaxpr") or eqn.params.get("call_jaxpr")
    if body is not None and name not in ("scan", "while"):
        inner = getattr(body, "jaxpr", body)  # open, or closed over constants
        if len(inner.invars) == len(zero) and len(inner.outvars) == n:
            return _zeros(inner, getattr(body, "consts", ()), zero)
    if name == "integer_pow" and eqn.params["y"] <= 0:
        return [False]
    if name in _KEEP_ZERO:
        return [all(zero[name == "select_n" :])] * n
    if name in _ABSORB:
        return [any(zero)] * n
    return [name == "div" and zero[0]] * n


def _is_zero(value: Value) -> bool:
    """True for a known zero; what is large or no number is not looked at."""
    if not isinstance(value, int | float | np.ndarray | np.generic | jax.Array):
        return False
    if isinstance(value, jax.core.Tracer) or np.size(value) > 1024:
        return False
    numeric = jnp.issubdtype(jnp.result_type(value), np.number)
    return numeric and not np.any(np.asarray(value))
