"""Parts of a network that can be left out whole: residual branches and scanned layers."""

# Both are groups of one unit, so that masks, criteria and scopes treat them as they treat channels:
#
#     x -> x + f(x) -> ...      a branch: without `f` the sum is `x`; its unit owns all parameters
#                               that nobody else reads, whole (by an axis of theirs)
#     scan over w: f32[4,8,8]   four layers: the unit of layer 2 owns index 2 of the first axis of
#                               all that is stacked with `w`
#
# A branch is left out by an edit of its frame: the sum passes on the other operand, and equations
# that nothing depends on any more are not evaluated. A layer is left out as any index is: the scan
# runs along an axis that was cut.

import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxprune._group import Group, Member
from jaxprune._groups import Groups
from jaxprune._tree import list_paths
from jaxprune.graph._branches import Branch, find_branches
from jaxprune.graph._carry import Carry
from jaxprune.graph._frames import parameters
from jaxprune.graph._groups import layer_roots, owned, unique
from jaxprune.graph._loops import clocks, scan_sizes
from jaxprune.graph._network import Network, check_call, network
from jaxprune.graph._site import Rule, Site
from jaxprune.graph._vanishing import ZERO, Outcome, outcomes
from jaxprune.typing import Params


def find_blocks(
    fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    rules: Mapping[str, Rule] | None = None,
    carry: Carry | None = None,
    **keywords: Any,
) -> Groups:
    """Find the parts of a network that can be left out: residual branches and scanned layers.

    A branch is what lies between ``x`` and the sum ``x + f(x)``, if ``f`` multiplies matrices or
    convolves; without it the sum is ``x``. Of branches within branches the innermost are given. A
    layer of a scan is one index of the axis that the scan runs along. Each is a group of one unit
    that owns whatever only it reads, in the order of the program.

    Rank blocks with ``scope=jp.scopes.across``, by any criterion; ``blocks.without(names, params)``
    drops those of a given order. ``shrink`` takes the masks, alone or combined with others.

    Args:
      fn: function of params and inputs.
      params: the whole tree of variables, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs in the shapes that ``fn`` takes.
      rules: rules for further primitives by name.
      carry: as for ``find_groups``.
      **keywords: keyword arguments of ``fn``.

    Returns:
      Groups of one unit and kind ``"block"``. One is not exact if zeros in its parameters do not
      make it pass on what it is given (a sum after the norm, or no sum at all).

    Example:
      >>> import jax.numpy as jnp
      >>> def net(p, x):
      ...     for w in p["layers"]:
      ...         x = x + jnp.tanh(x @ w)
      ...     return x @ p["out"]
      >>> params = {"layers": [jnp.ones((3, 3)), jnp.ones((3, 3))], "out": jnp.ones((3, 1))}
      >>> [block.name for block in find_blocks(net, params, jnp.ones((1, 3)))]
      ['layers/0', 'layers/1']
    """
    check_call(fn, keywords, find_blocks)
    net = network(fn, params, inputs, keywords, rules=rules, carry=carry)
    blocks = [*_branches(net), *_layers(net)]
    return Groups(
        Group(name, block.members, 1, not block.reason, block.reason, "block")
        for name, block in zip(unique([block.name for block in blocks]), blocks, strict=True)
    )


def drop_blocks(net: Network, empty: set[str]) -> set[str]:
    """Leave out the branches of which nothing is left; give the paths of their parameters."""
    dropped: set[str] = set()
    rank = dict(zip(net.paths, map(len, net.shapes), strict=True))
    for branch in find_branches(net):
        maskable = {path for path in branch.paths if rank[path]}  # a scalar has no axis to cut
        if maskable and maskable <= empty:
            branch.frame.skip[branch.add] = branch.skip
            net.frame.drop.update(branch.outputs)
            dropped |= maskable
    left = sorted(empty - dropped)
    if left:
        raise ValueError(
            f"The masks remove all of {list_paths(left)}, which are not all the parameters of a "
            "residual branch, so that nothing would be left to compute with. Keep at least one "
            "unit of a group and one layer of a scan; `jp.find_blocks` gives what can be left out."
        )
    return dropped


class _Block(NamedTuple):
    """A block before it has a name of its own; ``reason`` is why it is not exact, or nothing."""

    name: str
    members: tuple[Member, ...]
    reason: str


def _branches(net: Network) -> Iterator[_Block]:
    """A block for each residual branch that owns something to mask."""
    shapes = dict(zip(net.paths, net.shapes, strict=True))
    for branch in find_branches(net):
        paths = [path for path in branch.paths if shapes[path]]
        members = tuple(Member(path, 0, np.arange(shapes[path][0])[None]) for path in paths)
        if members:
            yield _Block(_name(net, branch.paths), members, _why_inexact(net, branch, paths))


def _why_inexact(net: Network, branch: Branch, masked: Sequence[str]) -> str:
    """Why masking the parameters of a branch differs from leaving it out, or nothing."""
    add = branch.frame.jaxpr.eqns[branch.add]
    own = parameters(branch.frame, net.paths)
    zero: dict[core.Var, Outcome] = {v: ZERO for v, path in own.items() if path in masked}
    after = outcomes(net.analysis, branch.frame, zero, sorted(branch.equations))
    y = add.invars[1 - branch.skip]
    if isinstance(y, core.Var) and after.get(y) == ZERO:
        return ""
    site = Site(net.analysis, branch.frame, branch.add, add)
    return f"{site.name()} adds a branch that is not zero when its parameters are"


def _name(net: Network, paths: Sequence[str]) -> str:
    """Name a block by the first and the last of the modules that its matrices belong to."""
    rank = dict(zip(net.paths, map(len, net.shapes), strict=True))
    matrices = [path for path in paths if rank[path] >= 2] or list(paths)
    modules = list(dict.fromkeys(path.rpartition("/")[0] for path in matrices))
    if len(matrices) == 1:
        return matrices[0]
    shared = os.path.commonpath(modules) if all(modules) else ""
    if len(modules) == 1 or shared in modules:
        return shared or matrices[0]
    first, last = (os.path.relpath(modules[i], shared or ".") for i in (0, -1))
    return f"{shared}/{first}..{last}".lstrip("/")


def _layers(net: Network) -> Iterator[_Block]:
    """A block for each layer of each scan; scans over the same parameters share their layers."""
    triples = owned(net)
    why = _why_inexact_layers(net)
    for root in dict.fromkeys(layer_roots(net).tolist()):
        here = triples.root == root
        if not here.any():
            continue
        members = []
        for slot in np.unique(triples.slot[here]):
            path, axis = triples.places[slot]
            indices = triples.position[here & (triples.slot == slot)]
            members.append(Member(path, axis, indices[None]))
        name = f"{_name(net, [m.path for m in members])}[{members[0].indices[0, 0]}]"
        yield _Block(name, tuple(members), why(root))


def _why_inexact_layers(net: Network) -> Callable[[int], str]:
    """Tell of the root of a layer why leaving it out is not exact; nothing if it is."""
    coupling = net.analysis.coupling
    reasons: dict[int, str] = {}
    for ids, site in zip(net.analysis.layers, net.analysis.scans, strict=True):
        reason = "" if _passes_on(net, site) else _CHANGES.format(site.name())
        for root in coupling.find(ids).tolist():
            reasons[root] = reasons.get(root) or reason or coupling.why_inexact(np.array([root]))
    return reasons.__getitem__


_CHANGES = "{}: a layer whose parameters are zero changes what it is given"


def _passes_on(net: Network, site: Site) -> bool:
    """Tell whether a layer whose parameters are zero gives what it is given."""
    (body,) = site.frame.inner[site.number]
    n, k = scan_sizes(site.params)
    carry, slices = body.inputs[n : n + k], body.inputs[n + k :]
    given: dict[core.Var, Outcome] = {v: v for v in carry}
    leads = [x[0] for x in site.ins[n + k :]]
    pairs = zip(slices, leads, strict=True)  # what is zero at a removed layer; its number is not
    given |= {v: ZERO for v, lead in pairs if lead is not None and lead.zero}
    after = outcomes(net.analysis, body, given)
    counted = clocks(site)  # each layer that is left gets what it got
    return all(
        i in counted or after.get(out) is v
        for i, (out, v) in enumerate(zip(body.jaxpr.outvars, carry, strict=False))
        if isinstance(out, core.Var)
    )
