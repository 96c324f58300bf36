"""Groups of coupled channels, read from the analysis of a network."""

# Data passes through the folder in this order:
#
#   _network                 traces `fn`, lets its program be walked, says what of the outputs stays
#   _lean _captured _carry   the program without dead code; inputs that nobody passed; what goes in
#                            and comes out again
#   _walk _frames _known     a frame for each call, axes for each variable; values that are constant
#   _site                    one equation, and what its rule may ask and do
#   _rules                   the rules of all primitives: _elementwise _contractions _reshape
#                            _shapes _indexing _linalg _random _effects _calls _loops
#                            _derivatives _collectives
#   _axes _coupling          what rules speak about: ids of indices, and which of them die together
#   _groups                  this file: what that says of the parameters
#   _per_layer               which of them each layer of a scan may choose for itself
#   _layout                  likewise for what their axes mean: _sources (what of which parameter a
#                            value shows) _views _mixtures _meetings _places _follow
#   _blocks                  likewise for what can be left out whole: _branches, _vanishing
#   _shrunk _alive _counts   the cut of a user, held against the coupling; means over fewer terms
#   _evaluate _take          the large program, evaluated on what is left
#   _flops _source           operations of a program; the line of code of an equation

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune._group import Group, Member
from jaxprune._groups import Groups
from jaxprune.graph._carry import Carry
from jaxprune.graph._network import Network, check_call, network
from jaxprune.graph._per_layer import stacked
from jaxprune.graph._site import Rule
from jaxprune.typing import Params, Where


def find_groups(
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    rules: Mapping[str, Rule] | None = None,
    frozen: Where | None = None,
    carry: Carry | None = None,
    **keywords: Any,
) -> Groups:
    """Find which indices of which parameters live and die together, in any JAX function.

    Traces ``fn(params, *inputs)`` and follows every axis of every value through the program:
    channels, neurons, heads and head dimensions, residual streams, experts' hidden units. Nothing
    is computed, so shapes will do, and no module is looked at: flax, equinox, haiku and plain
    functions are all the same. Axes of inputs and outputs stay whole, except that outputs that are
    new values of the state (statistics of BatchNorm in training) follow their state. Floating
    arrays that ``fn`` captures count as inputs, tables that it makes by itself do not. What no
    output depends on is left out before; a callback for debugging sees what the network has.

    Args:
      fn: function of params and inputs; what is no array among them (a flag, a function) is fixed.
      params: the whole tree of variables, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs in the shapes that ``fn`` takes, arrays or ``jax.ShapeDtypeStruct``.
      rules: rules for further primitives by name, as ``jp.graph.Rule``; they go before ours.
      frozen: predicate of path and array: parameters of which nothing may be removed.
      carry: what goes in beside the params and comes out again, as a pair of its place among the
        arguments (params are 0) and among the results: ``carry=(1, 0)`` for
        ``fn(params, carry, x) -> (carry, out)``. It is cut on both sides instead of freezing what
        it meets. A dict for several, ``{1: 0, "stats": None}``: keywords go by name, below a place
        a path (``"1/hidden"``), None for what does not come back. Groups are exact if it starts
        from zeros at removed units, or if what it starts from does not matter there.
      **keywords: keyword arguments of ``fn``, such as ``train=True`` or ``rngs=``.

    Returns:
      Groups of two units or more. ``print`` shows them, with what is frozen and why: a group of a
      single parameter axis has to be summed over together with data, or it is frozen, too. Groups
      of a scan over stacked layers say of how many layers (``layers``) each may keep other units.

    Raises:
      Exception: whatever ``fn`` raises for these inputs, with a note of what it was called with.

    Warns:
      UserWarning: a primitive without a rule (it freezes what it touches), parameters that are
        never read, arrays of integers or complex numbers among the params.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> mlp = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"]
      >>> params = {"w": jnp.ones((3, 8)), "b": jnp.ones(8), "v": jnp.ones((8, 2))}
      >>> print(find_groups(mlp, params, jax.ShapeDtypeStruct((1, 3), jnp.float32))[0])
      w:1: 8 units
        b axis 0
        v axis 0
        w axis 1

    References:
      Fang et al., `DepGraph: Towards Any Structural Pruning <https://arxiv.org/abs/2301.12900>`_,
      2023, for dependency groups. They come from the jaxpr here, index by index.
    """
    check_call(fn, keywords, find_groups)
    return groups_of(network(fn, params, inputs, keywords, rules=rules, frozen=frozen, carry=carry))


def groups_of(net: Network) -> Groups:
    """The groups of a network that has been analysed.

    Left out are layers of scans, groups of one unit, and units that own a single index of a single
    axis, unless data is summed over it; the reasons are beside the groups.
    """
    coupling = net.analysis.coupling
    layers = layer_roots(net)
    lone, stack = _why_alone(net), stacked(net)
    found, alone = [], []
    for places, roots, parts in unit_kinds(net):
        why = lone(roots) if len(places) == 1 and parts[0].shape[1] == 1 else ""
        if why:
            alone.append((*places[0], parts[0].size, why))
            continue
        if len(roots) < 2:
            continue
        n, axes = stack(places, roots) or (0, [None] * len(places))
        members = tuple(
            Member(*place, part, layer)
            for place, part, layer in zip(places, parts, axes, strict=True)
        )
        reason = coupling.why_inexact(roots)
        found.append(Group("", members, len(roots), not reason, reason, layers=n))
    sizes = dict(zip(net.paths, net.shapes, strict=True))
    alone = [(p, i, 0 if n == sizes[p][i] else n, why) for p, i, n, why in alone]
    return Groups(named(found, net), sorted([*_frozen(net, layers), *alone], key=_order(net)))


def unit_kinds(
    net: Network,
) -> Iterator[tuple[list[tuple[str, int]], np.ndarray, list[np.ndarray]]]:
    """Yield units that look alike: where they lie, their roots, which indices they own there."""
    triples, layers = owned(net), layer_roots(net)
    for slots, roots, parts in _by_signature(triples, net.analysis.coupling.kinds()):
        if not np.isin(roots, layers).any():
            yield [triples.places[slot] for slot in slots], roots, parts


def _why_alone(net: Network) -> Callable[[np.ndarray], str]:
    """Tell why units that own one index of one axis are no group; nothing if they are."""
    coupling = net.analysis.coupling
    results = [axis.ids for axes in net.frame.outs for axis in axes if axis is not None]
    states = coupling.find(np.concatenate([np.zeros(0, np.int64), *results]))

    def why(roots: np.ndarray) -> str:
        if np.isin(roots, states).any():
            return "`fn` returns its new value, and nothing else goes with it"
        if coupling.is_read(roots).any():
            return ""
        return (
            "inputs of these shapes do not reach it, or only what `fn` makes by itself does "
            "(one-hot vectors, padding, sums of weights)"
        )

    return why


def _order(net: Network) -> Callable[[tuple[str, int, int, str]], tuple[int, int]]:
    """Sort by parameter, in the order of the tree, and by axis."""
    place = {path: i for i, path in enumerate(net.paths)}
    return lambda entry: (place[entry[0]], entry[1])


def layer_roots(net: Network) -> np.ndarray:
    """Units of the axes that scans run along: layers, not channels."""
    ids = net.analysis.layers
    return net.analysis.coupling.find(np.concatenate(ids)) if ids else np.zeros(0, np.int64)


class Owned(NamedTuple):
    """Which unit owns which index of which axis: one entry for each such triple.

    Attributes:
      slot: `[triples]`, the number of the place; sorted.
      position: `[triples]`, the index along the axis.
      root: `[triples]`, the unit. An index of a cell has two owners or more.
      places: path and axis of each slot.
    """

    slot: np.ndarray
    position: np.ndarray
    root: np.ndarray
    places: list[tuple[str, int]]


def owned(net: Network) -> Owned:
    """List what each unit owns of the parameters."""
    places: list[tuple[str, int]] = []
    parts = []
    for path, axes in zip(net.paths, net.axes, strict=True):
        for i, axis in enumerate(axes):
            if axis is not None:
                index, root = net.analysis.coupling.units(axis.ids)
                parts.append((np.full(len(index), len(places)), index, root))
                places.append((path, i))
    columns = [np.concatenate(c) if parts else np.zeros(0, int) for c in zip(*parts, strict=True)]
    slot, index, root = columns or [np.zeros(0, int)] * 3
    return Owned(slot, index, root, places)


def _by_signature(
    owned: Owned, kinds: np.ndarray
) -> Iterator[tuple[list[int], np.ndarray, list[np.ndarray]]]:
    """Yield units that own as many indices of the same axes: slots, units, indices of each slot.

    Units are single channels, heads, ...; a group is all of those that look the same, so that they
    can be scored alike and compete. The signature of a unit is, for each place (an axis of a
    parameter), how many indices it owns there:

        w: [3, 8]  b: [8]  v: [8, 2]    each of 8 channels: one index of w:1, of b:0 and of v:0
        q: [5, 12] as 3 heads of 4      each head: four indices of q:1, and so for k, v and out

    ``kinds`` `[ids]` keep units apart that lie along other axes but look alike.

    Yields:
      slots: numbers of the places; ``roots`` `[units]`: the units, in the order in which their
        first place lists them; for each slot the indices `[units, owned there]`.
    """
    # A signature is never written down: a label starts as the kind of the unit, and each place
    # splits it by the number of indices that a unit owns there. Who owns nothing keeps its label.
    label, next_label = kinds.copy(), len(kinds) + 1
    bounds = np.searchsorted(owned.slot, np.arange(len(owned.places) + 1))
    for low, high in itertools.pairwise(bounds):
        if low == high:
            continue
        roots, count = np.unique(owned.root[low:high], return_counts=True)
        pairs = label[roots] * (count.max() + 1) + count  # one number for each pair of the two
        numbers = np.unique(pairs, return_inverse=True)[1]
        label[roots] = next_label + numbers  # new ones, that no unit of other places has
        next_label += len(roots)
    if not len(owned.root):
        return
    labels = label[owned.root]
    # Units in the order in which their first parameter lists them.
    order = np.lexsort((owned.position, owned.slot, labels))
    for part in np.split(order, np.nonzero(np.diff(labels[order]))[0] + 1):
        roots, first = np.unique(owned.root[part], return_index=True)
        ranking = np.argsort(first)
        roots = roots[ranking]
        place = np.empty(len(ranking), np.int64)
        place[ranking] = np.arange(len(ranking))
        slots, members = [], []
        for piece in np.split(part, np.nonzero(np.diff(owned.slot[part]))[0] + 1):
            unit = place[np.searchsorted(np.sort(roots), owned.root[piece])]
            by_unit = piece[np.lexsort((owned.position[piece], unit))]
            slots.append(int(owned.slot[piece[0]]))
            members.append(owned.position[by_unit].reshape(len(roots), -1))
        yield slots, roots, members


def named(groups: list[Group], net: Network) -> list[Group]:
    """Name each group by the member that makes its units: a last axis of a matrix, mostly."""
    rank = dict(zip(net.paths, map(len, net.shapes), strict=True))

    def makes(member: Member) -> tuple[bool, int]:
        last = member.axis == rank[member.path] - 1
        return rank[member.path] >= 2 and last, rank[member.path]

    best = [max(group.members, key=makes) for group in groups]
    names = unique([f"{member.path}:{member.axis}" for member in best])
    return [dataclasses.replace(g, name=name) for name, g in zip(names, groups, strict=True)]


def unique(names: Sequence[str]) -> list[str]:
    """Number what comes more than once: ``["a", "b", "a"]`` becomes ``["a", "b", "a~2"]``."""
    taken: collections.Counter[str] = collections.Counter()
    out = []
    for name in names:
        taken[name] += 1
        out.append(f"{name}~{taken[name]}" if taken[name] > 1 else name)
    return out


def _frozen(net: Network, layers: np.ndarray) -> list[tuple[str, int, int, str]]:
    """Path, axis, how many of its indices cannot be cut (0 for all), and why, in words."""
    coupling = net.analysis.coupling
    out = []
    for path, axes in zip(net.paths, net.axes, strict=True):
        for i, axis in enumerate(axes):
            if axis is None:
                continue
            held = coupling.frozen(axis.ids)
            if held.any():
                n = 0 if held.all() else int(held.sum())
                out.append((path, i, n, coupling.why_frozen(axis.ids[held])))
            elif np.isin(coupling.find(axis.ids), layers).all():
                out.append((path, i, 0, "layers of a scan; `jp.find_blocks` finds them"))
    return out
