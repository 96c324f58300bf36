"""Rules for linear algebra and transforms: matrices stay whole, batches of them pass."""

# An eigenvalue, an inverse or a Fourier coefficient depends on all of a matrix, so that nothing of
# it can go. Axes in front of the matrix count matrices, each of which is worked on by itself: they
# pass, and are joined over all operands.

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.graph._axes import ANYTHING, ZERO, Axes, Axis, Values, axis_of
from jaxprune.graph._frames import dtype_of, shape_of
from jaxprune.graph._site import Rule, Site

T = TypeVar("T")

_RANKS = {"tridiagonal_solve": 1, "lu_pivots_to_permutation": 1}  # of a first operand


def batched(at: Site, free: tuple[int, int] | None = None) -> list[Axes]:
    """Hold the axes of matrices, but for a free one of some operand; join those that count them."""
    rank = len(at.params["fft_lengths"]) if "fft_lengths" in at.params else None
    rank = rank if rank is not None else _RANKS.get(at.primitive, 2)
    count = len(at.ins[0]) - rank
    for operand, axes in enumerate(at.ins):
        for i in range(count, len(axes)):
            if (operand, i - len(axes)) != free:
                at.freeze(axes[i])
    batch = [_counting(at, [axes[i] for axes in at.ins], count) for i in range(count)]
    outs = []
    for number, shape in enumerate(at.out_shapes()):
        lead = [None if b is None else axis_of(b[0], b[1][number]) for b in batch]
        outs.append((*lead, *[None] * (len(shape) - count)))
    return outs


def _counting(
    at: Site, axes: Sequence[Axis | None], count: int
) -> tuple[np.ndarray, list[Values]] | None:
    """Ids of an axis that counts matrices, and what may be in each result at a removed one."""
    ids = at.join(*axes)
    if ids is None:
        return None
    zero = [axis is not None and axis.zero for axis in axes]
    values, finite = _of_zeros(at, zero, count)
    if not finite:
        at.blur(ids, lambda: f"{at.name()} is not finite where a unit is removed")
    return ids, values


def _of_zeros(at: Site, zero: Sequence[bool], count: int) -> tuple[list[Values], bool]:
    """What comes of matrices that are zero, and whether that is finite: tried on small ones.

    The QR decomposition of zeros has an identity, and solving with them is not finite: nobody says
    that as well as the primitive itself does, on matrices of 2 by 2.
    """
    unknown = [ANYTHING for _ in at.eqn.outvars]
    if not any(zero):
        return unknown, True
    if "fft_lengths" in at.params:
        return [ZERO], True
    dtypes = [dtype_of(v) for v in at.eqn.invars]
    shapes = [(2,) * (len(shape_of(v)) - count) for v in at.eqn.invars]
    try:
        with jax.ensure_compile_time_eval():
            whole = at.bind(*(_sample(s, t) for s, t in zip(shapes, dtypes, strict=True)))
            given = zip(shapes, dtypes, zero, strict=True)
            outs = at.bind(*(_sample(s, t, zero=z) for s, t, z in given))
            fine = [bool(jnp.isfinite(x).all()) for outs in (whole, outs) for x in outs]
            values = [ANYTHING if jnp.any(x) else ZERO for x in outs]
    except (TypeError, ValueError, NotImplementedError):  # not on this device, or not so small
        return unknown, True
    ours = fine[len(outs) :]
    return values, all(ours) or not all(fine[: len(outs)])


def _sample(shape: tuple[int, ...], dtype: np.dtype, *, zero: bool = False) -> jax.Array:
    """Zeros, or what any algebra copes with."""
    if zero or not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.zeros(shape, dtype)
    return (0.1 + jnp.eye(2) if len(shape) == 2 else jnp.full(shape, 0.4)).astype(dtype)


def triangular_solve(at: Site) -> list[Axes]:
    """The right-hand sides are free: each is solved for by itself."""
    free = -1 if at.params["left_side"] else -2
    (out,) = batched(at, (1, free))
    axis = at.ins[1][free]
    place = len(out) + free
    return [(*out[:place], None if axis is None else axis.mixed(), *out[place + 1 :])]


def linear_solve(at: Site) -> list[Axes]:
    """Follow the solver; the maps that its derivative is made from are cut alike."""
    names, jaxprs = at.params["jaxprs"]._fields, at.params["jaxprs"]
    consts, b = _split(at, at.ins)
    outs = at.walk(jaxprs.solve, [*consts["solve"], *b]).outs
    exact, at.analysis.exact = at.analysis.exact, False  # of derivatives nobody asks that
    for name in names:
        if name != "solve" and getattr(jaxprs, name) is not None:
            frame = at.walk(getattr(jaxprs, name), [*consts[name], *b])
            for mine, theirs, x in zip(frame.outs, b, outs, strict=False):
                for axes in zip(mine, theirs, x, strict=True):
                    at.join(*axes)
    at.analysis.exact = exact
    return outs


def cut_linear_solve(at: Site, *values: jax.Array) -> list[jax.Array]:
    jaxprs = at.params["jaxprs"]
    consts, b = _split(at, values)
    order = ["solve", *(n for n in jaxprs._fields if n != "solve" and getattr(jaxprs, n))]
    run = {
        name: lambda x, i=i, name=name: at.inner(i)(*consts[name], *x)
        for i, name in enumerate(order)
    }
    aux = len(at.eqn.outvars) > len(b)

    def solver(name: str) -> Callable[..., object]:
        if not aux:
            return lambda _, x: run[name](x)
        return lambda _, x: (run[name](x)[: len(b)], run[name](x)[len(b) :])

    back = solver("transpose_solve") if "transpose_solve" in run else None
    outs = lax.custom_linear_solve(run["matvec"], list(b), solver("solve"), back, has_aux=aux)
    return [*outs[0], *outs[1]] if aux else list(outs)


def _split(at: Site, operands: Sequence[T]) -> tuple[dict[str, Sequence[T]], Sequence[T]]:
    """Constants of each of the programs, and what is solved for."""
    lengths = at.params["const_lengths"]
    consts, place = {}, 0
    for name, n in zip(lengths._fields, lengths, strict=True):
        consts[name], place = operands[place : place + n], place + n
    return consts, operands[place:]


RULES = {
    **{
        name: Rule(batched)
        for name in (
            *(
                "fft",
                "cholesky",
                "cholesky_update",
                "lu",
                "lu_pivots_to_permutation",
                "qr",
                "geqrf",
            ),
            *("geqp3", "householder_product", "ormqr", "svd", "eig", "eigh", "schur", "hessenberg"),
            *("tridiagonal", "tridiagonal_solve", "symmetric_product"),
        )
    },
    "triangular_solve": Rule(triangular_solve),
    "custom_linear_solve": Rule(linear_solve, cut_linear_solve),
}
