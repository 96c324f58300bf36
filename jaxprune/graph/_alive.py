"""Which units of a network are alive once a cut is made; cuts that contradict it are refused."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from jaxprune._kept import Kept, at_layer, layer_axis, layers_in
from jaxprune.graph._axes import kept_indices
from jaxprune.graph._groups import unit_kinds
from jaxprune.graph._network import Network
from jaxprune.graph._per_layer import Stacked, stacked

Place: TypeAlias = tuple[str, int]  # path and axis of a parameter


def alive_roots(net: Network, kept: Kept, dropped: set[str]) -> np.ndarray:
    """Say of every root `[ids]` whether it is alive; refuse cuts that the function contradicts.

    Where layers keep units of their own the program is cut to as many units, the first ones: it
    does the same for any of them, which is refused where it does not.
    """
    each = [_dead_units(net, at_layer(kept, n), dropped) for n in range(layers_in(kept))]
    return net.analysis.coupling.alive(each[0] if len(each) == 1 else _for_all(net, kept, each))


def _for_all(net: Network, kept: Kept, each: Sequence[np.ndarray]) -> np.ndarray:
    """Units that are gone for all layers, from those that are gone in each: as many, the last."""
    dead, every = each[0], np.concatenate(each)
    units, times = np.unique(every, return_counts=True)
    differ = units[times < len(each)]
    find = stacked(net)
    for places, roots, _ in unit_kinds(net) if len(differ) else ():
        if not np.isin(roots, differ).any():
            continue
        stack = find(places, roots)
        counts = {int(np.isin(roots, gone).sum()) for gone in each}
        if stack is None or len(counts) > 1 or not _lie_along(kept, places, stack.axes):
            raise ValueError(_why_apart(places, stack, counts))
        dead = np.union1d(np.setdiff1d(dead, roots), roots[len(roots) - counts.pop() :])
    return dead


def _lie_along(kept: Kept, places: Sequence[Place], layers: Sequence[int]) -> bool:
    """Say whether the rows of all members lie along the axes that count their layers."""
    return all(
        axis not in kept.get(path, {}) or layer_axis(kept[path][axis], axis) in (None, layer)
        for (path, axis), layer in zip(places, layers, strict=True)
    )


def _why_apart(places: Sequence[Place], stack: Stacked | None, counts: set[int]) -> str:
    """Why layers cannot keep units of their own, and what to do."""
    path, axis = places[0]
    if stack is None:
        why = (
            "all layers have to keep the same there: its units meet what is no layer of the same "
            "scan, or the function tells them apart"
        )
    elif len(counts) > 1:
        why = f"they remove {sorted(counts)} units of it in the layers, which have one width"
    else:
        why = f"the layers lie along axis {stack.axes[0]}, in all members alike"
    return (
        f"The masks keep other indices of axis {axis} of {path!r} in each layer, but {why}. Find "
        "masks with `pattern=jp.patterns.Coupled(groups)` for groups of this very function."
    )


def _dead_units(net: Network, kept: Kept, dropped: set[str]) -> np.ndarray:
    """The units that are gone, by their roots; refuse cuts that the function contradicts."""
    coupling = net.analysis.coupling
    pairs, place = [], 0
    for path, axes in zip(net.paths, net.axes, strict=True):
        if path in dropped:
            continue
        for i, axis in enumerate(axes):
            if axis is None:
                continue
            index, root = coupling.units(axis.ids)
            gone = np.ones(len(axis.ids), bool)
            gone[kept.get(path, {}).get(i, np.arange(len(axis.ids)))] = False
            pairs.append(np.stack([place + index, root, gone[index]], 1))
            place += len(axis.ids)
    owned = np.concatenate(pairs) if pairs else np.zeros((0, 3), np.int64)
    dead = _dead(owned)
    _check_cut(net, kept, dropped, coupling.alive(dead))
    return dead


def _dead(owned: np.ndarray) -> np.ndarray:
    """Units that are gone, from triples `[n, 3]`: index, a unit that owns it, whether it is gone.

    Candidates have lost all that they own. Of several that own an index one is enough to explain
    that it is gone: those that are needed for nothing are alive, with what else they couple.

    In an outer product of 3 units by 3, flattened, each index belongs to a row and to a column.
    Without the middle row and the middle column both are needed: each has indices to itself, as all
    other candidates have none. With all nine gone no unit is needed more than another, and none of
    them is alive.
    """
    index, root, gone = owned.T
    stays = np.unique(root[gone == 0])
    candidate = (gone == 1) & ~np.isin(root, stays)
    index, root = index[candidate], root[candidate]
    _, inverse, owners = np.unique(index, return_inverse=True, return_counts=True)
    needed = np.unique(root[owners[inverse.reshape(-1)] == 1])
    explained = np.unique(index[np.isin(root, needed)])
    return np.union1d(needed, root[~np.isin(index, explained)])


def _check_cut(net: Network, kept: Kept, dropped: set[str], alive: np.ndarray) -> None:
    """Refuse a cut that is not that of the units that are alive, no index more and none less."""
    for path, axes in zip(net.paths, net.axes, strict=True):
        if path in dropped:
            continue
        want = kept_indices(net.analysis.coupling, alive, axes)
        for i, (axis, left) in enumerate(zip(axes, want, strict=True)):
            if axis is None or left is None:
                if i in kept.get(path, {}):
                    raise ValueError(
                        f"Axis {i} of {path!r} has a single index, which cannot be removed."
                    )
                continue
            have = kept.get(path, {}).get(i, np.arange(len(axis.ids)))
            if not np.array_equal(have, left):
                index = int(np.setxor1d(have, left)[0])
                raise ValueError(
                    f"The masks {'keep' if index in have else 'remove'} index {index} of axis {i} "
                    f"of {path!r}, but {_reason(net, axis.ids[index], index in have)}. Make masks "
                    "with `pattern=jp.patterns.Coupled(groups)` for groups of this very function, "
                    "or carry them over to all members with `groups.complete(masks, params)`."
                )


def _reason(net: Network, one: np.int64, stays: bool) -> str:
    """Why an index cannot stay or go alone."""
    if stays:
        return "all that it is coupled with is gone"
    why = net.analysis.coupling.why_frozen(np.array([one]))
    if why:
        return f"that index cannot be removed: {why}"
    return f"what it is coupled with stays: {_coupled_with(net, one)}"


def _coupled_with(net: Network, one: np.int64) -> str:
    """Name other places of a unit, for a message."""
    coupling = net.analysis.coupling
    mine = set(coupling.units(np.array([one]))[1].tolist())
    places = []
    for path, axes in zip(net.paths, net.axes, strict=True):
        for i, axis in enumerate(axes):
            if axis is not None and mine & set(coupling.units(axis.ids)[1].tolist()):
                places.append(f"{path!r} axis {i}")
    return ", ".join(places[:6]) + (" and more" if len(places) > 6 else "")
