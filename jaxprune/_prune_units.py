"""Whole inputs of products removed over calibration data, and made up for by the others."""

# A unit of a group (a neuron, a head) is made by columns of some weights and read by rows of
# another. Whether it goes is decided where it is read:
#
#     h = silu(x @ gate) * (x @ up)       columns of gate and up own unit u
#     y = h @ down                        row u of down reads it: here the walk stops
#
# The Gram matrix of h says which units the others can make up for; what is left of `down` is refit,
# and a bias behind it takes over the means of what is gone. The columns of gate and up follow: as
# nothing reads them any more, the network computes the same with them zero.

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._advice import PruneWarning
from jaxprune._calibrate import Changed, Visit, calibrate, walk_of
from jaxprune._group import Group, Member
from jaxprune._groups import Groups
from jaxprune._keep import Keep
from jaxprune._masks import apply_masks, check_masks
from jaxprune._numbers import is_tree, plain
from jaxprune._parts import declared
from jaxprune._solve import moved, solver
from jaxprune._traced import Call, Traced, alive_in, few_rows, trace
from jaxprune._tree import leaves_by_path, map_leaves, prunable
from jaxprune.graph._behind import bias_of
from jaxprune.graph._frames import Value
from jaxprune.graph._linear import Part
from jaxprune.graph._product import Product, gram_of
from jaxprune.graph._products import Weight, operands, stops_of
from jaxprune.typing import Masks, Method, Params, Scope, Sparsity


class Job(NamedTuple):
    """Units that are chosen where one weight reads them.

    Attributes:
      group: whose units they are.
      layer: of a stack the layer that chooses; None for a group that is no stack.
      rows: of each unit a row of the weight.
      keep: what stays of the weight's rows.
    """

    group: Group
    layer: int | None
    rows: np.ndarray
    keep: Keep


class Jobs(NamedTuple):
    """Where units are chosen.

    Attributes:
      by_weight: what is chosen at which weight.
      reasons: why groups are left alone, by name.
    """

    by_weight: dict[Weight, Job]
    reasons: dict[str, str]


def jobs_of(
    traced: Traced, pattern: Any, scope: Scope, sparsity: Sparsity, within: Masks | None
) -> Jobs:
    """Find for each group the one weight that reads its units.

    Args:
      traced: the program; ``pattern`` is bound to its params.
      pattern: with ``groups``.
      scope: who competes among the units of a group.
      sparsity: a number, or one for each group by its name.
      within: earlier masks, or None.
    """
    alive = None if within is None else leaves_by_path(within, "prune_trained")
    numbers = pattern.of_units(sparsity) if is_tree(sparsity) else None
    found: dict[Weight, Job] = {}
    reasons: dict[str, str] = {}
    for group in pattern.groups:
        readers = _readers(traced, group)
        if why := _why_not(group, readers, found) or _read_elsewhere(traced, group, readers):
            reasons[group.name] = why
            continue
        number = float(plain(sparsity if numbers is None else numbers[group.name]))
        for weight, (layer, rows) in readers.items():
            keep = _keep(weight, rows, number, pattern, scope)
            if alive is not None:
                keep = keep.among(alive_in(traced, weight, alive))
            first = np.unique(rows[rows >= 0], return_index=True)[1]
            found[weight] = Job(group, layer, np.flatnonzero(rows >= 0)[first], keep)
    return Jobs(found, reasons)


def _why_not(group: Group, readers: dict[Weight, Any], taken: dict[Weight, Job]) -> str:
    """Why the units of a group cannot be chosen where they are read; nothing if they can."""
    if group.kind == "block":
        return "it is a block, of which no product reads units"
    if not readers:
        return "no product reads its units that is one matrix: experts and groups are several"
    if any(w in taken for w in readers):
        return "a product reads the units of another group as well"
    if len({layer for layer, _ in readers.values()}) < len(readers):
        return f"{len(readers)} products read its units, and each would choose others"
    if any(len(w.places) > 1 or w.places[0].order is not None for w in readers):
        return "a loop reads its units, or they are read at several places"
    return ""


def _read_elsewhere(traced: Traced, group: Group, readers: Mapping[Weight, Any]) -> str:
    """Say what else reads the units of a group: with them it would change what is behind it.

    Units are read where a value has them and nothing that is made of it does: sums over them, as
    in a norm, and products.
    """
    coupling, line = traced.net.analysis.coupling, traced.line
    axes = dict(zip(traced.paths, traced.net.axes, strict=True))
    mine = [(axes[m.path][m.axis], np.unique(m.indices)) for m in group.members]
    ids = [axis.ids[indices] for axis, indices in mine if axis is not None]
    roots = np.unique(coupling.units(np.concatenate(ids or [np.zeros(0, int)]))[1])
    has = lambda of: any(  # noqa: E731
        a is not None and np.isin(coupling.units(a.ids)[1], roots).any() for a in of
    )
    fine = {place.step for weight in readers for place in weight.places}
    for number, step in enumerate(line.steps):
        if step.at is None or number in fine:
            continue
        moving = [step.at.ins[i] for i, ref in operands(line, step) if ref in line.data]
        made = [step.at.frame.of(v) for v in step.at.eqn.outvars]
        if made and any(map(has, moving)) and not any(map(has, made)):
            return f"{step.at.name()} reads its units as well"
    return ""


def _readers(traced: Traced, group: Group) -> dict[Weight, tuple[int | None, np.ndarray]]:
    """The weights that read units of a group: of each the layer, and the unit of each row."""
    found = {}
    number = {path: i for i, path in enumerate(traced.paths)}
    for weight in traced.weights:
        for member in group.members:
            leaf = number[member.path]
            if leaf in weight.leaves and weight.product.features == 1 and not weight.product.groups:
                layer = _layer_of(weight, leaf, member, group)
                rows = _units_of_rows(traced, weight, leaf, member)
                if rows is not None:
                    found[weight] = layer, rows
    return found


def _layer_of(weight: Weight, leaf: int, member: Member, group: Group) -> int | None:
    if not group.layers or member.layer != 0:
        return None
    index = next(part.layer for part in weight.view.parts if part.leaf == leaf)
    return index[0] if index else None


def _units_of_rows(traced: Traced, weight: Weight, leaf: int, member: Member) -> np.ndarray | None:
    """Which unit each row `[inputs]` of a weight belongs to, -1 for none; None if columns do."""
    shape = traced.leaves[leaf].shape
    along = np.zeros(shape[member.axis], np.int32)
    along[member.indices] = np.arange(1, len(member.indices) + 1)[:, None]
    lead = [1] * len(shape)
    lead[member.axis] = -1
    numbers = np.broadcast_to(along.reshape(lead), shape)

    def part(p: Part) -> np.ndarray:
        other = np.zeros(traced.leaves[p.leaf].shape, np.int32)
        return (numbers if p.leaf == leaf else other)[p.layer]

    view = weight.view
    dtypes = [traced.leaves[p.leaf].dtype for p in view.parts]
    units = np.asarray(
        weight.product.matrix(view.read_numbers([part(p) for p in view.parts], dtypes))
    )
    if (units != units[:, :1]).any() or not units.any():
        return None
    return units[:, 0] - 1


def _keep(weight: Weight, rows: np.ndarray, sparsity: float, pattern: Any, scope: Scope) -> Keep:
    """What stays of the rows of a weight: units of one group, as the pattern scores them."""
    size = int(rows.max()) + 1
    order = np.argsort(rows, kind="stable")[(rows < 0).sum() :]
    indices = order.reshape(size, -1)
    group = Group("w", (Member("w", 0, indices),), size)
    alone = dataclasses.replace(pattern, groups=Groups((group,)), per_layer=())
    inputs, outputs = weight.product.of_matrix
    return Keep.of((inputs, outputs), sparsity, pattern=alone, scope=scope)


# On the walk.


def moments(product: Product, *data: Value) -> jax.Array:
    """The Gram matrix of the inputs with a one behind them: their sums, too, and their number."""
    rows = product.rows(data[0]).astype(jnp.float32)
    return gram_of(jnp.concatenate([rows, jnp.ones((*rows.shape[:-1], 1), jnp.float32)], axis=-1))


def prune_units(
    call: Call,
    pattern: Any,
    scope: Scope,
    sparsity: Sparsity,
    method: Method,
    *,
    dense: bool,
    within: Masks | None,
    progress: Callable[[Sequence[Any]], Any],
) -> tuple[Params, Masks]:
    """Choose the units of each group where they are read, and mask all that they own.

    Args:
      call: the function and its data.
      pattern: with ``groups``, bound to the params.
      scope: who competes among the units of a group.
      sparsity: a number, or one for each group by its name.
      method: of the weight that reads them.
      dense: whether what the dense network makes is the target.
      within: earlier masks of the same groups.
      progress: what the walk goes through its stops with.
    """
    params = call.params
    traced = trace(call, pattern.owns, units=True)
    earlier, whole = None, traced.leaves if dense else None
    if within is not None:
        earlier = check_masks(within, params, "within")
        params = apply_masks(params, earlier)
        traced = traced.on(params)
    jobs = jobs_of(traced, pattern, scope, sparsity, earlier)
    walk = walk_of(traced.line, traced.leaves, call.data.arrays, measure=moments, dense=whole)
    norms = declared(method, "diagonal")  # which can be had of few rows
    _warn(jobs, pattern.groups, "" if norms else few_rows(traced, walk, jobs.by_weight))
    solve = solver(method, traced.name)
    kept: dict[str, np.ndarray] = {}

    def visit(at: Visit) -> Changed:
        job, bias = jobs.by_weight[at.weight], bias_of(traced.line, at.weight.places[0])
        gram, sums, rows = at.sums[:-1, :-1], at.sums[-1, :-1], at.sums[-1, -1]
        w = at.matrix
        if bias is not None:  # it takes over all means: only what varies has to be met
            gram = gram - jnp.outer(sums, sums) / rows
        elif at.cross is not None:
            w = moved(w, gram, at.cross)
        new, mask = solve(at, w, gram, job.keep)
        if bias is not None:
            walk.shift(bias, (sums / rows) @ (at.matrix - new).astype(jnp.float32))
        _note(kept, job, np.asarray(mask[:, 0])[job.rows])
        return new, mask

    stops = stops_of(list(jobs.by_weight))
    calibrate(walk, stops, visit, name=traced.name, progress=progress)
    all_units = {g.name: jnp.ones(g.size, bool) for g in pattern.groups}
    units = all_units | {name: jnp.asarray(stays) for name, stays in kept.items()}
    masks = pattern.expand(units, like=prunable(params, where=pattern.owns))
    if earlier is not None:
        masks = map_leaves(lambda new, old: new if old is None else new & old, masks, earlier)
    return apply_masks(traced.results(params, walk), masks), masks


def _note(kept: dict[str, np.ndarray], job: Job, left: np.ndarray) -> None:
    """Note which units of a group, or of a layer of it, are left."""
    if job.layer is None:
        kept[job.group.name] = left
        return
    shape = (job.group.layers, job.group.size)
    kept.setdefault(job.group.name, np.ones(shape, bool))[job.layer] = left


def _warn(jobs: Jobs, groups: Sequence[Group], few: str) -> None:
    """Name the groups that are left alone, and say ``few``; refuse to go on if all are."""
    listed = "".join(f"\n- {name!r}: {why}" for name, why in list(jobs.reasons.items())[:12])
    if len(jobs.reasons) == len(groups):
        raise ValueError(
            f"`prune_trained` can choose the units of none of the {len(groups)} groups:{listed}\n"
            "Score them with `jp.find_masks(..., pattern=Coupled(groups))`, which looks at all "
            "that a unit owns."
        )
    lines = [f"it leaves groups alone:{listed}"] * bool(listed) + [few] * bool(few)
    if lines:
        told = "".join(f"\n- {line}" for line in lines)
        warnings.warn(f"`prune_trained`:{told}", PruneWarning, stacklevel=4)
