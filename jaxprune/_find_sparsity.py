"""How far a network can be pruned before it gets worse."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def find_sparsity(
    evaluate: Callable[[float], Any],
    low: float = 0.0,
    high: float = 0.95,
    tolerance: float = 0.005,
    baseline: float | None = None,
    *,
    resolution: float = 0.01,
) -> float:
    """Find the largest sparsity whose metric stays within a tolerance, by bisection.

    ``evaluate`` may be as much as prune, fine-tune and test: it is called for ``low``, for ``high``
    and ``log2((high - low) / resolution)`` times in between, nine times in all by default, never
    twice for the same sparsity.

    Bisection takes for granted that the metric falls as the sparsity grows. Where it goes up and
    down, as it does by chance once differences are as small as the noise, what is returned is
    still a sparsity that was evaluated and found within the tolerance, but a larger one may be so
    too. Average over seeds in ``evaluate`` where that matters.

    Args:
      evaluate: from a sparsity to a metric, higher is better. NaN, of a network that diverged, is
        not within any tolerance.
      low: the smallest sparsity to consider, which has to be within the tolerance.
      high: the largest.
      tolerance: how much of the metric may be lost, in its own units: 0.005 of an accuracy in
        [0, 1] is half a point.
      baseline: the metric to compare with, of the dense network; None for ``evaluate(low)``.
      resolution: how close to come to the largest sparsity within the tolerance.

    Returns:
      The largest sparsity that was found within the tolerance.

    Raises:
      ValueError: at ``low`` the metric is not within the tolerance; settings out of range. What
        ``evaluate`` raises passes with a note of the sparsity and of what was found until then.
      TypeError: a metric is no number.

    Example:
      >>> find_sparsity(lambda sparsity: 1 - max(0, sparsity - 0.8), resolution=1e-3)
      0.804...
    """
    _check_settings(low, high, tolerance, resolution)
    found: dict[float, float] = {}
    first = _metric(evaluate, low, found)
    least = (first if baseline is None else float(baseline)) - tolerance
    if not first >= least:
        raise ValueError(
            f"`find_sparsity` got a metric of {first:g} at low={low:g}, but {least:g} is the least "
            f"within tolerance={tolerance:g} of baseline={first if baseline is None else baseline}"
            ". Raise `tolerance`, lower `low`, or see why the dense network does not reach the "
            "baseline."
        )
    if _metric(evaluate, high, found) >= least:
        return float(high)
    while high - low > resolution:
        middle = (low + high) / 2
        if _metric(evaluate, middle, found) >= least:
            low = middle
        else:
            high = middle
    return float(low)


def _metric(evaluate: Callable[[float], Any], sparsity: float, found: dict[float, float]) -> float:
    """Evaluate, and keep what was found."""
    try:
        value = evaluate(float(sparsity))
    except Exception as error:
        known = ", ".join(f"{s:g}: {m:g}" for s, m in found.items()) or "nothing"
        error.add_note(f"`find_sparsity` called evaluate({sparsity:g}); found before: {known}.")
        raise
    if np.ndim(value) or (not isinstance(value, int | float) and not hasattr(value, "dtype")):
        raise TypeError(
            f"`find_sparsity` got {value!r} from evaluate({sparsity:g}). Return one number, higher "
            "is better."
        )
    found[sparsity] = float(value)
    return found[sparsity]


def _check_settings(low: float, high: float, tolerance: float, resolution: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"`find_sparsity` got low={low} and high={high}. Sparsities are fractions removed, "
            "0 <= low < high <= 1."
        )
    if not tolerance >= 0 or math.isinf(tolerance):
        raise ValueError(
            f"`find_sparsity` got tolerance={tolerance}. It is how much of the metric may be "
            "lost, 0 or more."
        )
    if not resolution > 0:
        raise ValueError(
            f"`find_sparsity` got resolution={resolution}. Pass a positive number such as 0.01."
        )
