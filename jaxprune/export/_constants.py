"""Params found again among the constants of a converted program."""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

Constants = Mapping[str, np.ndarray]
EXACT = 1e-5  # of the largest value: what a converter computes with may be rounded otherwise


class Place(NamedTuple):
    """Where the values of a param are.

    Attributes:
      name: of the constant.
      axes: of the param, in the order of the constant.
      exact: whether the values are those of the param, as the type holds them; else they were
        changed on the way, as by a norm that goes into the weights.
    """

    name: str
    axes: tuple[int, ...]
    exact: bool


def read_as(place: Place, shape: tuple[int, ...], constants: Constants) -> np.ndarray:
    """Read the values of a place in the shape that the param has."""
    laid = constants[place.name].reshape([shape[axis] for axis in place.axes])
    return laid.transpose(np.argsort(place.axes)).astype(np.float32)


def locate(
    param: np.ndarray, constants: Constants, sums: Mapping[str, float] | None = None
) -> list[tuple[np.ndarray, Place]]:
    """Find a param, whole or layer by layer; nothing where it is not among the constants.

    The constant with its zeros in the same places is the one, and among several the one with the
    closest values. Each comes with the part of the param that it holds.
    """
    sums = _sums(constants) if sums is None else sums
    found = []
    for name in _alike(param, constants, sums):
        rounded = param.astype(constants[name].dtype).astype(np.float32)
        for axes in _orders(param.shape):
            place = Place(name, axes, False)
            now = read_as(place, param.shape, constants)
            gap = _gap(now, rounded)
            score = (int(np.sum((now == 0) != (rounded == 0))), gap)
            found.append((score, place._replace(exact=gap <= EXACT)))
    best = min(found, key=lambda pair: pair[0], default=None)
    if (best is None or best[0][0]) and param.ndim > 2:  # layers that are stacked
        layers = [locate(layer, constants, sums) for layer in param]
        if all(layers) and (best is None or all(p.exact for part in layers for _, p in part)):
            return [pair for part in layers for pair in part]
    return [] if best is None else [(param, best[1])]


def _sums(constants: Constants) -> Mapping[str, float]:
    """Add up the values of each constant, in whatever order they are."""
    return {name: float(np.sum(x, dtype=np.float64)) for name, x in constants.items()}


def _alike(param: np.ndarray, constants: Constants, sums: Mapping[str, float]) -> list[str]:
    """Name the constants that may be a param: those with its sum, else all of its size.

    Layers of a network are alike, and to look at each of them in each order would take minutes.
    """
    sized = [name for name, x in constants.items() if x.size == param.size]
    wanted = {
        dtype: float(np.sum(param.astype(dtype), dtype=np.float64))
        for dtype in {constants[name].dtype for name in sized}
    }
    same = [n for n in sized if np.isclose(sums[n], wanted[constants[n].dtype], 1e-6, 1e-6)]
    return same or sized


def _orders(shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Orders of the axes that are not all alike: where axes of size 1 stand is the same."""
    long = [axis for axis, n in enumerate(shape) if n > 1]
    short = tuple(axis for axis, n in enumerate(shape) if n <= 1)
    if len(long) > 4:
        return [tuple(range(len(shape)))]
    return [(*order, *short) for order in itertools.permutations(long)]


def _gap(now: np.ndarray, before: np.ndarray) -> float:
    """The largest difference, as a fraction of the largest value."""
    scale = float(np.max(np.abs(before), initial=0.0)) or 1.0
    return float(np.max(np.abs(now - before), initial=0.0)) / scale


class Found(NamedTuple):
    """What became of params in a file.

    Attributes:
      parity: the largest difference of a weight, as a fraction of the largest of its matrix.
      zeros_kept: the share of zeros that are still some; None without zeros.
      zeroed: how many others became 0.
    """

    parity: float
    zeros_kept: float | None
    zeroed: int


def compare_constants(params: Iterable[np.ndarray], dense: Constants, back: Constants) -> Found:
    """Compare params with the constants of a file, which are found by those before compression."""
    parity, zeros, kept, zeroed = 0.0, 0, 0, 0
    dense = {name: values for name, values in dense.items() if name in back}
    sums = _sums(dense)
    for param in params:
        for part, place in locate(param, dense, sums):
            now = read_as(place, part.shape, back)
            want = part if place.exact else read_as(place, part.shape, dense)
            parity = max(parity, _gap(now, want))
            removed = part == 0
            zeros, kept = zeros + int(removed.sum()), kept + int((removed & (now == 0)).sum())
            zeroed += int((~removed & (now == 0)).sum())
    return Found(parity, kept / zeros if zeros else None, zeroed)
