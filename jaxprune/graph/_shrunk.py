"""The small function: the program of the large one, evaluated on parameters that were cut."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree import is_array, join_static, leaves_with_path, split_static
from jaxprune.graph._analysis import Rule, evaluate, kept_indices
from jaxprune.graph._blocks import drop_blocks
from jaxprune.graph._counts import rescale
from jaxprune.graph._network import (
    Network,
    mirrored_outputs,
    network,
)

Kept = Mapping[str, Mapping[int, np.ndarray]]  # path: axis: indices that stay


def small_function(
    fn: Any,
    params: Any,
    kept: Kept,
    *,
    counts: str,
    rules: Mapping[str, Rule] | None,
    cut_outputs: bool,
) -> Callable[..., Any]:
    """Make the function that takes small params. ``params`` say what the whole ones look like."""
    whole = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) if is_array(x) else x, params
    )

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays: Sequence[Any], static: Any) -> Any:
        small, *inputs = join_static(arrays, static)
        net = network(
            fn,
            whole,
            inputs,
            rules=rules,
            exact=False,
            complain=False,
            whole_outputs=not cut_outputs,
        )
        dropped = drop_blocks(net, {path for path, cut in kept.items() if _is_empty(cut)})
        alive = _alive(net, kept, dropped)
        if counts == "rescaled":
            rescale(net, alive)
        values, _ = split_static((small, *inputs))
        outs = evaluate(net.analysis, net.frame, alive, values)
        if net.frame.drop:  # new values of a state that went with its block: none, as the old
            states = mirrored_outputs(net.outputs, net.paths, net.shapes_and_types)
            outs = [
                values[s] if s is not None and i in net.frame.drop else x
                for i, (x, s) in enumerate(zip(outs, states, strict=True))
            ]
        return jax.tree.unflatten(jax.tree.structure(net.outputs), outs)

    def small_fn(params: Any, *inputs: Any) -> Any:
        _check_small(params, whole, kept)
        arrays, static = split_static((params, *inputs))
        return run(arrays, static)

    return small_fn


def _is_empty(cut: Mapping[int, np.ndarray]) -> bool:
    return any(len(indices) == 0 for indices in cut.values())


def _alive(net: Network, kept: Kept, dropped: set[str]) -> np.ndarray:
    """Say of every root whether it is alive; refuse cuts that the function contradicts."""
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
    alive = coupling.alive(_dead(owned))
    _check_cut(net, kept, dropped, alive)
    return alive


def _dead(owned: np.ndarray) -> np.ndarray:
    """Units that are gone, from triples of an index, a unit that owns it, and whether it is gone.

    Candidates have lost all that they own. Of several that own an index one is enough to explain
    that it is gone: those that are needed for nothing are alive, with what else they couple.
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
    coupling = net.analysis.coupling
    for path, axes in zip(net.paths, net.axes, strict=True):
        if path in dropped:
            continue
        want = kept_indices(coupling, alive, axes)
        for i, axis in enumerate(axes):
            if axis is None:
                if i in kept.get(path, {}):
                    raise ValueError(
                        f"Axis {i} of {path!r} has a single index, which cannot be removed."
                    )
                continue
            size = len(axis.ids)
            have = kept.get(path, {}).get(i, np.arange(size))
            left: Any = want[i]
            if np.array_equal(have, left):
                continue
            index = int(np.setxor1d(have, left)[0])
            why = coupling.why_frozen(axis.ids[index : index + 1])
            if why:
                reason = f"that index cannot be removed: {why}"
            else:
                reason = f"what it is coupled with stays: {_coupled_with(net, axis.ids[index])}"
            if index in have:
                reason = "all that it is coupled with is gone"
            raise ValueError(
                f"The masks {'keep' if index in have else 'remove'} index {index} of axis {i} of "
                f"{path!r}, but {reason}. Make masks with `pattern=jp.patterns.Coupled(groups)` "
                "for groups of this very function, or carry them over to all members with "
                "`groups.spread(masks, params)`."
            )


def _coupled_with(net: Network, one: Any) -> str:
    """Name other places of a unit, for a message."""
    coupling = net.analysis.coupling
    mine = set(coupling.units(np.array([one]))[1].tolist())
    places = []
    for path, axes in zip(net.paths, net.axes, strict=True):
        for i, axis in enumerate(axes):
            if axis is not None and mine & set(coupling.units(axis.ids)[1].tolist()):
                places.append(f"{path!r} axis {i}")
    return ", ".join(places[:6]) + (" and more" if len(places) > 6 else "")


def _check_small(params: Any, whole: Any, kept: Kept) -> None:
    """Refuse params of other shapes than the cut leaves."""
    got: Any = jax.tree.structure(params)
    wanted: Any = jax.tree.structure(whole)
    if got != wanted:
        raise ValueError(
            f"The small function wants params of the structure {wanted}, but got {got}. Pass "
            "those that `jp.shrink` gave, or that were trained from them."
        )
    wrong = []
    leaves = leaves_with_path(params)
    for (name, leaf), full in zip(leaves, jax.tree.leaves(whole), strict=True):
        if is_array(full):
            want = list(full.shape)
            for axis, indices in kept.get(name, {}).items():
                want[axis] = len(indices)
            if tuple(want) != jnp.shape(leaf):
                wrong.append(f"{name!r} has shape {jnp.shape(leaf)}, wanted {tuple(want)}")
    if wrong:
        raise ValueError(
            f"The small function got params that it was not cut for: {'; '.join(wrong[:6])}. Pass "
            "those that `jp.shrink` gave, or that were trained from them."
        )
