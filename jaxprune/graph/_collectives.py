"""Rules for programs on several devices, and for axes that ``vmap`` and ``shard_map`` name."""

# Inside of `shard_map` each device sees a shard of an axis, and all devices run one program on one
# shape: of an axis in shards each shard has to lose as many indices.
#
#     w: f32[8] over 2 devices     inside: f32[4]; its index 1 is the index 1 of `w` on one device
#                                  and 5 on the other, so that 1 and 5 are joined
#
# Outside the ids are those of all shards, one after another: `_repeated`.

import math
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import numpy as np
from jax.extend import core
from jax.sharding import PartitionSpec

from jaxprune._mesh import names_of, sharding_for
from jaxprune.graph._axes import Axes, Axis
from jaxprune.graph._elementwise import same
from jaxprune.graph._frames import Value
from jaxprune.graph._site import Rule, Site

Specs: TypeAlias = tuple[PartitionSpec, ...]
F = TypeVar("F", bound=Callable)


def cut_moved(at: Site, x: jax.Array) -> list[jax.Array]:
    """Lay it out as it was, but for mesh axes that no longer divide what is left."""
    return at.bind(x, dst_sharding=sharding_for(at.params["dst_sharding"], x.shape))


def reduce_names(at: Site) -> list[Axes]:
    """Sum or compare over devices, index by index; an axis that ``vmap`` had named goes."""
    places = [i for i in at.params["axes"] if isinstance(i, int)]
    for axes in at.ins:
        for i in places:
            if at.primitive.startswith("psum"):
                at.contract(axes[i])
            else:
                at.freeze(axes[i])
    return [tuple(a for i, a in enumerate(axes) if i not in places) for axes in at.ins]


def all_gather(at: Site) -> list[Axes]:
    """Put those of all devices side by side, each of which has lost the same units."""
    place, n = at.params["all_gather_dimension"], at.params["axis_size"]
    outs = []
    for axes in at.ins:
        if at.params["tiled"]:
            outs.append((*axes[:place], _repeated(axes[place], n), *axes[place + 1 :]))
        else:
            outs.append((*axes[:place], None, *axes[place:]))
    return outs


def hold(*names: str) -> Rule:
    """Rule of a primitive that needs some axes whole and passes all others on."""

    def couple(at: Site) -> list[Axes]:
        places = [at.params[name] for name in names]
        for axes in at.ins:
            for place in places:
                at.freeze(axes[place])
        if not at.params["tiled"]:  # ranks may differ: nothing is sure to be at its place
            return at.freeze_all()
        return [tuple(None if i in places else a for i, a in enumerate(x)) for x in at.ins]

    return Rule(couple)


def shard_map(at: Site) -> list[Axes]:
    """Walk what one device does. Of an axis that is cut into shards all lose the same units."""
    mesh = dict(at.params["mesh"].shape)
    cuts = [_shards(s, x, mesh) for s, x in zip(at.params["in_specs"], at.ins, strict=True)]
    ins = [
        tuple(_shard(at, axis, n) for axis, n in zip(axes, cut, strict=True))
        for axes, cut in zip(at.ins, cuts, strict=True)
    ]
    # What is known as a whole says nothing of a shard.
    known = [k if set(cut) <= {1} else None for k, cut in zip(at.known(), cuts, strict=True)]
    frame = at.walk(at.params["jaxpr"], ins, known)
    return [
        tuple(_repeated(a, n) for a, n in zip(axes, _shards(spec, axes, mesh), strict=True))
        for axes, spec in zip(frame.outs, at.params["out_specs"], strict=True)
    ]


def cut_shard_map(at: Site, *values: Value) -> list[Value]:
    """Cut what one device does; each shard is smaller, the mesh is as it was."""
    inside = lambda *values: tuple(at.inner()(*values))  # noqa: E731
    specs = tuple(at.params["in_specs"]), tuple(at.params["out_specs"])
    return list(on_devices(at.eqn, inside, *specs)(*values))


def on_devices(eqn: core.JaxprEqn, f: F, in_specs: Specs, out_specs: Specs) -> F:
    """Map a function over devices as a ``shard_map`` equation does."""
    return jax.shard_map(
        f,
        mesh=eqn.params["mesh"],
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(eqn.params["newly_manual_axes"]),
        check_vma=eqn.params["check_vma"],
    )


def _shards(spec: PartitionSpec, axes: Axes, mesh: dict[str, int]) -> list[int]:
    """Into how many shards a spec cuts each axis."""
    entries = [*spec, *([None] * (len(axes) - len(spec)))]
    return [math.prod(mesh[name] for name in names_of(entry)) for entry in entries]


def _shard(at: Site, axis: Axis | None, n: int) -> Axis | None:
    """The axis as each device sees it: one unit is an index of every shard."""
    if axis is None or n == 1:
        return axis
    first, *others = axis.ids.reshape(n, -1)
    if len(first) == 1:
        at.freeze(axis, lambda: f"{at.name()} leaves one index of it to each device")
        return None
    for ids in others:
        at.analysis.coupling.join(first, ids)
    return Axis(first, axis.zero)


def _repeated(axis: Axis | None, n: int) -> Axis | None:
    """The axis of shards side by side, which all have the same ids."""
    return axis if axis is None else Axis(np.tile(axis.ids, n), axis.zero)


# They give what they get, each device its own, all the same, or that of its neighbour.
MOVES = ("reshard", "pvary", "pcast", "ppermute", "pbroadcast", "preduced", "vary_unreduced_cast")
SUMS = ("psum", "psum_invariant")

RULES = {
    **{name: Rule(same) for name in MOVES},
    **{name: Rule(same, cut_moved) for name in ("reshard", "mesh_cast")},
    "shard_map": Rule(shard_map, cut_shard_map),
    **{name: Rule(reduce_names) for name in (*SUMS, "pmax", "pmin")},
    **{name: Rule(all_gather) for name in ("all_gather", "all_gather_invariant")},
    "reduce_scatter": hold("scatter_dimension"),
    "all_to_all": hold("split_axis", "concat_axis"),
}
