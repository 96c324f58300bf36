"""Means over axes that were cut: divide by what is left instead of by what there was."""

# A mean is a sum and a division by a number that is written in the program. Of 8 channels with 5
# left,
#
#     s = reduce_sum[axes=(1,)] x
#     m = div s 8.0               masked: a mean over 8, three of which are zero; `rescaled`: times
#                                 8 / 5, so that it is the mean over 5

import math
import warnings
from collections.abc import Iterator

import numpy as np
from jax.extend import core

from jaxprune.graph._axes import kept_indices
from jaxprune.graph._frames import Frame, all_frames, shape_of
from jaxprune.graph._network import Network
from jaxprune.graph._site import Site

_PASSING = ("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "copy", "neg")


def rescale(net: Network, alive: np.ndarray) -> None:
    """Note at each division of a sum by its number of terms how much smaller that is now.

    The number is written in the program (jaxprs are made for one shape), mostly right behind the
    sum; casts and reshapes may lie between. A variance may divide by one less.
    """
    for frame in all_frames(net.frame):
        for number, eqn in enumerate(frame.jaxpr.eqns):
            if eqn.primitive.name == "reduce_sum":
                n, left = _terms(net, alive, frame, eqn)
                if left != n and not _divides(net, frame, number, n, left) and n > 1:
                    site = Site(net.analysis, frame, number, eqn)
                    warnings.warn(
                        f"counts='rescaled' finds no division by {n} behind {site.name()}, which "
                        f"sums {left} of {n} terms now: it stays a sum.",
                        stacklevel=2,
                    )


def _terms(net: Network, alive: np.ndarray, frame: Frame, eqn: core.JaxprEqn) -> tuple[int, int]:
    """How many terms a sum has, and how many of them are left."""
    shape, places = shape_of(eqn.invars[0]), eqn.params["axes"]
    kept = kept_indices(net.analysis.coupling, alive, frame.of(eqn.invars[0]))
    sizes = [n if k is None else len(k) for n, k in zip(shape, kept, strict=True)]
    return math.prod(shape[i] for i in places), math.prod(sizes[i] for i in places)


def _divides(net: Network, frame: Frame, number: int, n: int, left: int) -> bool:
    """Note how much smaller the divisors of a sum of ``n`` terms are; tell if there are any."""
    found = False
    for division, divisor in _divisions(net, frame, number):
        less = n - divisor  # 1 where a variance is made unbiased
        if less in (0, 1) and left > less:
            frame.scale[division] = divisor / (left - less)
            found = True
    return found


def _divisions(net: Network, frame: Frame, number: int) -> Iterator[tuple[int, float]]:
    """Divisions of a result by a known number, or products with one, as the number divided by.

    A mean is ``div s 8.0`` in jax; others write ``mul s 0.125``.
    """
    values = set(frame.jaxpr.eqns[number].outvars)
    for later in range(number + 1, len(frame.jaxpr.eqns)):
        eqn = frame.jaxpr.eqns[later]
        ours = [isinstance(v, core.Var) and v in values for v in eqn.invars]
        if not any(ours):
            continue
        name = eqn.primitive.name
        if name in _PASSING:
            values.update(eqn.outvars)
        elif name in ("add", "sub") and any(math.prod(shape_of(v)) == 1 for v in eqn.invars):
            values.update(eqn.outvars)  # an epsilon
        elif name in ("div", "mul"):
            site = Site(net.analysis, frame, later, eqn)
            other = 1 if ours[0] else 0
            if name == "div" and other == 0:
                continue
            value = site.value(other) if math.prod(site.shape(other)) == 1 else None
            if value is not None and float(value.reshape(())) != 0:
                by = float(value.reshape(()))
                yield later, by if name == "div" else round(1 / by, 6)
