"""Params found again among the constants of a converted program."""

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

Constants = Mapping[str, np.ndarray]
Params = Mapping[str, np.ndarray]  # by their paths
Sums = Mapping[str, float]
ROUNDING = 2.0**-11  # of the largest value: what float16 may change where params are not at hand
EXACT = 1e-5  # of the largest value: what a converter computes with may be rounded otherwise


class Place(NamedTuple):
    """Where the values of a param are.

    Attributes:
      name: of the constant.
      axes: of the param, in the order of the constant.
      exact: whether the values are those of the param, as the type holds them; else they were
        changed on the way, as by a norm that goes into the weights.
      turned: whether the window of a kernel is the other way round, as converters write transposed
        convolutions.
    """

    name: str
    axes: tuple[int, ...]
    exact: bool
    turned: bool = False


Parts = list[tuple[np.ndarray, Place]]


def read_as(place: Place, shape: tuple[int, ...], constants: Constants) -> np.ndarray:
    """Read the values of a place in the shape that the param has."""
    laid = constants[place.name].reshape([shape[axis] for axis in place.axes])
    values = laid.transpose(np.argsort(place.axes)).astype(np.float32)
    return np.flip(values, tuple(range(len(shape) - 2))) if place.turned else values


def locate(
    param: np.ndarray, constants: Constants, sums: Sums | None = None, *, exact: bool = True
) -> Parts:
    """Find a param, whole or layer by layer; nothing where it is not among the constants.

    Exact are those with its values. Else a constant is taken that is zero wherever the param is,
    and among several the one with the closest zeros and values. Each comes with the part of the
    param that it holds.
    """
    sums = _sums(constants) if sums is None else sums
    found, removed = [], param == 0
    for name in _alike(param, constants, sums, exact):
        rounded = param.astype(constants[name].dtype).astype(np.float32)
        for place in _places(name, constants[name].shape, param.shape):
            now = read_as(place, param.shape, constants)
            if np.any(now[removed]):  # most are told apart by this
                continue
            gap = gap_of(now, rounded)
            if gap <= EXACT or not exact:
                score = (int(np.sum((now == 0) != (rounded == 0))), gap)
                found.append((score, place._replace(exact=gap <= EXACT)))
    if found:
        return [(param, min(found, key=lambda pair: pair[0])[1])]
    if param.ndim < 3:
        return []
    layers = [locate(layer, constants, sums, exact=exact) for layer in param]  # that are stacked
    return [pair for part in layers for pair in part] if all(layers) else []


def _sums(constants: Constants) -> Sums:
    """Add up the values of each constant, in whatever order they are."""
    return {name: float(np.sum(x, dtype=np.float64)) for name, x in constants.items()}


def _alike(param: np.ndarray, constants: Constants, sums: Sums, exact: bool) -> list[str]:
    """Name the constants that may be a param: those of its size, and exact ones have its sum.

    Layers of a network are alike, and to look at each of them in each order would take minutes.
    """
    sized = [name for name, x in constants.items() if x.size == param.size]
    if not exact:
        return sized
    wanted = {
        dtype: float(np.sum(param.astype(dtype), dtype=np.float64))
        for dtype in {constants[name].dtype for name in sized}
    }
    return [n for n in sized if np.isclose(sums[n], wanted[constants[n].dtype], 1e-6, 1e-6)]


def _places(name: str, constant: tuple[int, ...], shape: tuple[int, ...]) -> Iterable[Place]:
    """List how a param may lie in a constant; where axes are merged any order may be meant."""
    long = [n for n in constant if n > 1]
    for axes in _orders(shape):
        laid = [shape[axis] for axis in axes if shape[axis] > 1]
        if len(laid) != len(long) or laid == long:
            yield Place(name, axes, False)
            if any(n > 1 for n in shape[:-2]):
                yield Place(name, axes, False, True)


def _orders(shape: tuple[int, ...]) -> Iterable[tuple[int, ...]]:
    """Orders of the axes that are not all alike: where axes of size 1 stand is the same."""
    long = [axis for axis, n in enumerate(shape) if n > 1]
    short = tuple(axis for axis, n in enumerate(shape) if n <= 1)
    if len(long) > 4:
        return [tuple(range(len(shape)))]
    return [(*order, *short) for order in itertools.permutations(long)]


def gap_of(now: np.ndarray, before: np.ndarray) -> float:
    """The largest difference, as a fraction of the largest value; infinite ones may stay so."""
    now, before = now.astype(np.float32), before.astype(np.float32)
    scale = float(np.max(np.abs(before), initial=0.0, where=np.isfinite(before))) or 1.0
    other = now != before
    return float(np.max(np.abs(now[other] - before[other]), initial=0.0)) / scale


def find_params(params: Params, constants: Constants) -> dict[str, Parts]:
    """Find each param by its path, exact ones first; a constant with other values belongs to one.

    Equal params may share a constant, as converters write it once.
    """
    sums = _sums(constants)
    found = {path: locate(x, constants, sums) for path, x in params.items()}
    taken = {place.name for parts in found.values() for _, place in parts}
    for path, param in params.items():
        left = {name: x for name, x in constants.items() if name not in taken}
        found[path] = found[path] or locate(param, left, sums, exact=False)
        taken |= {place.name for _, place in found[path]}
    return found


class Found(NamedTuple):
    """What became of params in a file.

    Attributes:
      parity: the largest difference of a weight, as a fraction of the largest of its matrix.
      zeros_kept: the share of zeros that are still some; None without zeros.
      zeroed: how many others became 0.
      missing: paths of params with zeros that are no constants.
    """

    parity: float
    zeros_kept: float | None
    zeroed: int
    missing: tuple[str, ...]


def compare_constants(params: Params, dense: Constants, back: Constants) -> Found:
    """Compare the constants of a file with those before it was compressed, and these with params.

    Each constant is compared with what has its name, whatever it was made of: so no weights are
    passed over that a function concatenates, slices or scales.
    """
    matrices = [name for name, x in dense.items() if x.ndim > 1]
    found = find_params(params, {name: dense[name] for name in matrices})
    exact = [pair for parts in found.values() for pair in parts if pair[1].exact]
    gaps = [gap_of(back[name], dense[name]) for name in matrices]
    gaps += [gap_of(read_as(place, part.shape, back), part) for part, place in exact]
    if not all(parts and all(p.exact for _, p in parts) for parts in (found or {"": []}).values()):
        gaps += [ROUNDING for name in matrices if dense[name].dtype == np.float16]
    zeros = sum(int(np.sum(dense[name] == 0)) for name in matrices)
    kept = sum(int(np.sum((dense[name] == 0) & (back[name] == 0))) for name in matrices)
    new = sum(int(np.sum((dense[name] != 0) & (back[name] == 0))) for name in matrices)
    new += sum(int(np.sum((w != 0) & (read_as(p, w.shape, dense) == 0))) for w, p in exact)
    pruned = [path for path, param in params.items() if not param.all()]
    return Found(
        parity=max(gaps, default=0.0),
        zeros_kept=kept / zeros if zeros and pruned else None,
        zeroed=new,
        missing=tuple(p for p in pruned if params[p].any() and not found[p]),
    )
