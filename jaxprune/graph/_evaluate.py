"""A program on operands that were cut: the same equations, each on what is left."""

# The small network is no new program: it is the jaxpr of the large one, interpreted. Of each value
# the same indices are left as of all values that its ids are joined with, so that shapes fit by
# themselves, and most primitives compute the right thing as they are:
#
#     y = dot_general x w     w: f32[3,5] of f32[3,8]; nothing to change
#     z = reshape[new_sizes=(1, 4, 2)] y     its params speak of the large shape: `Rule.cut` has to
#                                            bind it anew, with what is left
#
# Under `jit` the interpretation happens once, while it is traced.

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune.graph._axes import kept_indices
from jaxprune.graph._frames import Atom, Frame, Value
from jaxprune.graph._site import Site
from jaxprune.graph._take import take

if TYPE_CHECKING:
    from jaxprune.graph._walk import Analysis


def evaluate(
    analysis: "Analysis", frame: Frame, alive: np.ndarray, values: Sequence[Value]
) -> list[Value]:
    """Compute the results of a frame from operands that have been cut.

    What no result depends on is left out: a residual branch that is skipped, for one.

    Args:
      analysis: the walk that the frame is of.
      frame: the frame, of the large program.
      alive: `[ids]`, of every root of the coupling whether it is left.
      values: its inputs but for constants, of each the indices that are left.

    Returns:
      Its results, likewise; None for one that is dropped.
    """
    consts = [
        take(c, kept_indices(analysis.coupling, alive, frame.of(v)))
        for c, v in zip(frame.consts, frame.jaxpr.invars, strict=False)
    ]
    env: dict[core.Var, Value] = dict(zip(frame.jaxpr.invars, [*consts, *values], strict=True))

    def read(atom: Atom) -> Value:
        return env[atom] if isinstance(atom, core.Var) else atom.val

    for number in _needed(frame):
        eqn = frame.jaxpr.eqns[number]
        if number in frame.skip:
            env[eqn.outvars[0]] = read(eqn.invars[frame.skip[number]])
            continue
        cut = analysis.rule(eqn).cut or Site.bind
        with eqn.ctx.manager:
            outs = cut(Site(analysis, frame, number, eqn, alive), *map(read, eqn.invars))
        if number in frame.scale:
            outs = [x * jnp.asarray(frame.scale[number], x.dtype) for x in outs]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [None if i in frame.drop else read(v) for i, v in enumerate(frame.jaxpr.outvars)]


def _needed(frame: Frame) -> list[int]:
    """Numbers of the equations that results depend on, in order.

    Backwards, so that all who read a variable have been seen before the equation that makes it.
    """
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
