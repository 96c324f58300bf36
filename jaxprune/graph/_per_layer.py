"""Groups of which each layer of a scan may keep other units, since nothing tells units apart."""

# A scan runs one body for all layers of a stack, so that in the small network all of them have one
# width. Which units a layer keeps is another matter:
#
#     layer 0 keeps 1 and 3 of 4, layer 1 keeps 0 and 2     small up: [2 layers, in, 2]
#
# The body computes the same, whichever units its slices hold, if it treats all of them alike: then
# the body that is cut to the units 0 and 1 serves any two of them. That holds where
#
#   - every member lies in the stack, and all stacks have their layers in one order;
#   - units never leave their layer: nothing that is carried round, nor what the scan gives, nor a
#     constant of all layers has an axis of theirs;
#   - no array of the program itself lies along them, which would hold other numbers for other
#     units: positions, random bits, tables;
#   - wherever they lie along an axis, removing one or another of them leaves the same order. Heads
#     `h0 h0 h1 h1` and halves `u0 u1 u0 u1` do, one side of a network that goes on in two ways
#     (`relu(x[:2])`, `tanh(x[2:])`) does not.
#
# Outside of the loop whole stacks may be cast, moved about and multiplied, as long as each layer is
# handled alone. All of it is asked of the frames that the walk left. Where in doubt, units are told
# apart.

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from jaxprune.graph._axes import Axes, Axis
from jaxprune.graph._coupling import Ids
from jaxprune.graph._elementwise import ELEMENTWISE
from jaxprune.graph._frames import Frame
from jaxprune.graph._loops import scan_sizes
from jaxprune.graph._network import Network
from jaxprune.graph._site import Site

# They have to be bound anew with the sizes that are left, and nothing else about what is left.
_SIZES = {
    *("reshape", "broadcast_in_dim", "tile", "conv_general_dilated"),
    *("jit", "closed_call", "composite", "custom_vmap_call", "remat", "remat2", "checkpoint"),
    *("cond", "scan", "while", "custom_jvp_call", "custom_vjp_call"),
    *("reshard", "mesh_cast"),
}
# They handle each layer of a stack alone.
_OF_STACKS = {
    *(*ELEMENTWISE, "optimization_barrier", "sharding_constraint", "device_put"),
    *("transpose", "squeeze", "slice", "split", "concatenate", "rev", "pad", "gather"),
    *("dynamic_slice", "dot_general", "reduce_sum", *_SIZES),
} - {"conv_general_dilated"}


class Stacked(NamedTuple):
    """Units that each layer may choose for itself.

    Attributes:
      layers: how many layers there are.
      axes: of each member the axis that counts them.
    """

    layers: int
    axes: tuple[int, ...]


Owners: TypeAlias = dict[int, tuple[Ids, np.ndarray, np.ndarray]]  # by the identity of the ids
Finder: TypeAlias = Callable[[Sequence[tuple[str, int]], np.ndarray], Stacked | None]


def stacked(net: Network) -> Finder:
    """Make what tells of units, given their places and roots, whether layers may choose them."""
    coupling = net.analysis.coupling
    runs = np.unique(
        np.concatenate([np.zeros(0, np.int64), *map(coupling.find, net.analysis.runs)])
    )
    axes_of = dict(zip(net.paths, net.axes, strict=True))
    owners: Owners = {}  # of ids; groups ask for the same ones

    def find(places: Sequence[tuple[str, int]], roots: np.ndarray) -> Stacked | None:
        if not len(runs) or len(roots) < 2:
            return None
        found = [_layers(net, axes_of[path], axis, runs) for path, axis in places]
        layers = found[0] and found[0][1]
        if layers is None or not all(f and np.array_equal(f[1], layers) for f in found):
            return None
        units = _Units(net, roots, layers, owners)
        if not units.are_alike():
            return None
        return Stacked(len(layers), tuple(f[0] for f in found if f))

    return find


def _layers(net: Network, axes: Axes, own: int, runs: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The one other axis of a parameter that a scan runs along, and its roots, no two equal."""
    coupling = net.analysis.coupling
    found = []
    for i, axis in enumerate(axes):
        if axis is not None and np.isin(roots := coupling.find(axis.ids), runs).any():
            found.append((i, roots))
    if len(found) != 1 or found[0][0] == own:
        return None
    i, roots = found[0]
    once = len(np.unique(roots)) == len(roots) and np.isin(roots, runs).all()
    return (i, roots) if once else None


class _Units:
    """Some units, and where they lie in a program. A cache: values share ids."""

    def __init__(self, net: Network, roots: np.ndarray, layers: np.ndarray, owners: Owners) -> None:
        self.net, self.layers = net, layers
        self.analysis, self.coupling = net.analysis, net.analysis.coupling
        self.number = np.full(self.coupling.size, -1)
        self.number[roots] = np.arange(len(roots))
        self.size = len(roots)
        self._owners = owners
        self._seen: dict[int, tuple[Axis, bool, np.ndarray | None]] = {}

    def are_alike(self) -> bool:
        """Say whether nothing in the program tells one from another, or takes it out of a layer."""
        frame, n = self.net.frame, len(self.net.axes)
        others = frame.inputs[n:]  # what else goes in and is cut: a carry
        if any(map(self.meets, [*map(frame.of, others), *frame.outs])):
            return False
        return self._alike(frame, False)

    def _alike(self, frame: Frame, inside: bool) -> bool:
        """Likewise of a frame; ``inside`` of a layer its axis is gone, elsewhere it has to be."""
        if any(
            self.meets(frame.axes[v])
            for v, _ in zip(frame.jaxpr.invars, frame.consts, strict=False)
        ):
            return False
        for axes in frame.axes.values():
            mine = [axis for axis in axes if axis is not None and self.meets((axis,))]
            if any(self.places(axis) is None for axis in mine):
                return False
            if mine and sum(map(self._counts_layers, axes)) != (not inside):
                return False
        for number, eqn in enumerate(frame.jaxpr.eqns):
            site = Site(self.analysis, frame, number, eqn)
            if not self._passes(site) or not (inside or self._keeps_layers_apart(site)):
                return False
            enters = None if inside else self._enters(site)
            inner = frame.inner.get(number, [])
            if enters is False or not all(self._alike(f, inside or bool(enters)) for f in inner):
                return False
        return True

    def _enters(self, at: Site) -> bool | None:
        """Say whether a scan goes into layers: None if it is none, False if units leave them."""
        if at.primitive != "scan":
            return None
        shared = sum(scan_sizes(at.params))
        stacks = [x for x in at.ins[shared:] if self.meets(x)]
        leads = [self._counts_layers(x[0]) for x in stacks]
        if not any(leads):
            return None
        outs = [at.frame.of(v) for v in at.eqn.outvars]
        return all(leads) and not any(map(self.meets, [*at.ins[:shared], *outs]))

    def _counts_layers(self, axis: Axis | None) -> bool:
        return axis is not None and bool(np.isin(self.coupling.find(axis.ids), self.layers).all())

    def meets(self, axes: Axes) -> bool:
        """Say whether units lie along one of some axes."""
        return any(axis is not None and self._look(axis)[1] for axis in axes)

    def places(self, axis: Axis) -> np.ndarray | None:
        """Where each unit lies along an axis, `[units, k]`; None if that tells them apart."""
        return self._look(axis)[2]

    def _look(self, axis: Axis) -> tuple[Axis, bool, np.ndarray | None]:
        key = id(axis.ids)
        if key not in self._seen or self._seen[key][0].ids is not axis.ids:
            if key not in self._owners or self._owners[key][0] is not axis.ids:
                self._owners[key] = (axis.ids, *self.coupling.units(axis.ids))
            _, index, root = self._owners[key]
            unit = self.number[root]
            own = unit >= 0
            where = _alike_along(index, root, unit, self.size) if own.any() else None
            self._seen[key] = (axis, bool(own.any()), where)
        return self._seen[key]

    # Equations.

    def _passes(self, at: Site) -> bool:
        """Say whether an equation is cut in the same way, whichever units are left."""
        axes = [*at.ins, *(at.frame.of(v) for v in at.eqn.outvars)]
        if not any(map(self.meets, axes)):
            return True
        rule, name = self.analysis.rules.get(at.primitive), at.primitive
        if rule is None or name in self.analysis.taught:
            return False
        if rule.cut is None or name in _SIZES:
            return True
        if name in ("slice", "split", "pad"):
            return self._takes_alike(at)
        return name in ("gather", "dynamic_slice") and self._reads_whole(at)

    def _keeps_layers_apart(self, at: Site) -> bool:
        """Say whether an equation handles each layer of stacks alone."""
        mine = [i for i, axes in enumerate(at.ins) if self.meets(axes)]
        if not mine or at.primitive != "dot_general":
            return not mine or at.primitive in _OF_STACKS
        batch = at.params["dimension_numbers"][1]
        return all(any(self._counts_layers(at.ins[i][j]) for j in batch[i]) for i in mine)

    def _takes_alike(self, at: Site) -> bool:
        """Say whether a slice takes the same part of each unit."""
        for out, starts in zip(at.eqn.outvars, _starts(at), strict=True):
            for i, (axis, (start, stride)) in enumerate(zip(at.frame.of(out), starts, strict=True)):
                source = at.ins[0][i]
                if axis is None or source is None or len(axis.ids) == len(source.ids):
                    continue
                if not self.meets((axis,)):
                    continue
                to, at_first = self.places(axis), self.places(source)
                if to is None or at_first is None or stride is None:
                    return False
                column = np.full(len(source.ids), -1)
                column[at_first] = np.arange(at_first.shape[1])
                taken = column[start + stride * to]
                if (taken != taken[:1]).any():
                    return False
        return True

    def _reads_whole(self, at: Site) -> bool:
        """Say whether units lie along axes alone that are read whole."""
        sizes, shape = at.params["slice_sizes"], at.shape()
        x, *indices = at.ins
        partly = [axis for axis, s, n in zip(x, sizes, shape, strict=True) if s != n]
        return not any(map(self.meets, [tuple(partly), *indices]))


def _starts(at: Site) -> list[list[tuple[int, int | None]]]:
    """For each result and axis where it starts in the operand, and its steps, None if unknown."""
    rank = len(at.shape())
    if at.primitive == "slice":
        strides = at.params["strides"] or (1,) * rank
        return [list(zip(at.params["start_indices"], strides, strict=True))]
    if at.primitive == "pad":
        return [[(0, None)] * rank]
    sizes, place = at.params["sizes"], at.params["axis"]
    starts = [0, *itertools.accumulate(sizes)][:-1]
    return [[(start if i == place else 0, 1) for i in range(rank)] for start in starts]


def _alike_along(
    index: np.ndarray, root: np.ndarray, unit: np.ndarray, n: int
) -> np.ndarray | None:
    """Places of units along an axis, if removing one or another of them leaves the same order.

    Args:
      index: `[pairs]`, an index of the axis; sorted.
      root: `[pairs]`, a unit that owns it, by its root.
      unit: `[pairs]`, its number among the ``n`` units; -1 for one of another group.
      n: how many units there are.

    Returns:
      `[n, k]`, increasing in each row.
    """
    own = unit >= 0
    at, mine = index[own], unit[own]
    each, rest = divmod(len(at), n)
    if rest or (at[1:] == at[:-1]).any() or (np.bincount(mine, minlength=n) != each).any():
        return None  # an index of two units, or units that own more and fewer
    places = at[np.lexsort((at, mine))].reshape(n, each)
    # What lies between others and a unit, in the order of the axis, must be so for its neighbour.
    # With both of a pair gone the first index of the one lies where that of the other does.
    pairs = np.concatenate([places[:-1], places[1:]], 1)
    behind = pairs - np.argsort(np.argsort(pairs, 1), 1)
    if (behind[:, :each] != behind[:, each:]).any():
        return None
    others = _other_owners(index[~own], root[~own], places)
    return None if others is None or (others != others[:1]).any() else places


def _other_owners(index: np.ndarray, root: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """Who else owns the places `[n, k]` of units, `[n, k, owners]`; None if not as many do."""
    if not len(index):
        return np.zeros((*places.shape, 0), np.int64)
    shared = np.isin(index, places)
    index, root = index[shared], root[shared]
    order = np.lexsort((root, index))
    index, root = index[order], root[order]
    owners, rest = divmod(len(index), places.size)
    if rest or (owners and (index.reshape(-1, owners) != np.sort(places, None)[:, None]).any()):
        return None
    table = np.zeros((int(places.max(initial=0)) + 1, owners), np.int64)
    if owners:
        table[index.reshape(-1, owners)[:, 0]] = root.reshape(-1, owners)
    return table[places]
