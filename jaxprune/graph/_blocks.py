"""Parts of a network that can be left out whole: residual branches and scanned layers."""

import os.path
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxprune._group import Group, Member
from jaxprune._groups import Groups
from jaxprune._tree import list_paths
from jaxprune.graph._analysis import Frame, Rule, Site
from jaxprune.graph._calls import clocks, scan_sizes
from jaxprune.graph._carry import Carry
from jaxprune.graph._collectives import MOVES, SUMS
from jaxprune.graph._elementwise import ELEMENTWISE, stays_zero
from jaxprune.graph._groups import layer_roots, owned
from jaxprune.graph._network import Network, check_call, mirrored_outputs, network
from jaxprune.typing import Params


def find_blocks(
    fn: Any,
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
    taken: dict[str, int] = {}
    named = []
    for block in blocks:
        taken[block.name] = taken.get(block.name, 0) + 1
        number = f"~{taken[block.name]}" if taken[block.name] > 1 else ""
        named.append(
            Group(block.name + number, block.members, 1, not block.reason, block.reason, "block")
        )
    return Groups(named)


class Branch(NamedTuple):
    """A residual branch: the sum that ends it, and the operand that goes around it."""

    frame: Frame
    add: int
    skip: int
    equations: set[int]
    paths: tuple[str, ...]
    outputs: frozenset[int]  # results of the whole function that are new values of its state


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


def find_branches(net: Network) -> list[Branch]:
    """Residual branches of a network, innermost only, in the order of the program."""
    count = len(net.paths)
    first = net.frame.jaxpr.invars[len(net.frame.consts) :][:count]
    state = mirrored_outputs(net.outputs, net.paths, net.shapes_and_types)
    return list(_in_frame(net.frame, dict(zip(first, net.paths, strict=True)), state))


def _in_frame(
    frame: Frame, owners: dict[core.Var, str], state: Sequence[int | None]
) -> Iterator[Branch]:
    """Branches of one frame and of those inside; ``owners`` are its inputs that are parameters."""
    jaxpr = frame.jaxpr
    bit: dict[core.Var, int] = {v: 1 << i for i, v in enumerate(jaxpr.invars)}
    lead = len(jaxpr.invars)
    readers: dict[core.Var, set[int]] = {}
    before = dict(bit)
    found: list[Branch] = []
    covered = 0
    for number, eqn in enumerate(jaxpr.eqns):
        past = 1 << (lead + number)
        for v in eqn.invars:
            if isinstance(v, core.Var):
                past |= before[v]
                readers.setdefault(v, set()).add(number)
        before.update(dict.fromkeys(eqn.outvars, past))
    for i, v in enumerate(jaxpr.outvars):
        if isinstance(v, core.Var):
            readers.setdefault(v, set()).add(-1 - i)
    for number, eqn in enumerate(jaxpr.eqns):
        branch = _ending_at(
            frame, number, before=before, readers=readers, owners=owners, state=state
        )
        if branch is not None:
            mask = sum(1 << n for n in branch.equations)
            if not mask & covered:
                found.append(branch)
            covered |= mask | 1 << number
        for inner in frame.inner.get(number, [])[:1]:
            if eqn.primitive.name in _PLAIN_CALLS:
                consts = len(inner.consts)
                passed = {
                    inside: owners[v]
                    for inside, v in zip(inner.jaxpr.invars[consts:], eqn.invars, strict=True)
                    if isinstance(v, core.Var) and v in owners and readers[v] == {number}
                }
                inside = list(_in_frame(inner, passed, [None] * len(inner.jaxpr.outvars)))
                if inside:
                    covered |= 1 << number
                found += inside
    yield from found


_PLAIN_CALLS = (*("jit", "closed_call", "composite", "remat", "remat2", "checkpoint", "shard_map"),)


def _ending_at(
    frame: Frame,
    number: int,
    *,
    before: Mapping[core.Var, int],
    readers: Mapping[core.Var, set[int]],
    owners: Mapping[core.Var, str],
    state: Sequence[int | None],
) -> Branch | None:
    """The branch that ends in a sum, if one of the operands is made from the other."""
    jaxpr = frame.jaxpr
    eqn, lead = jaxpr.eqns[number], len(jaxpr.invars)
    if eqn.primitive.name not in ("add", "add_any"):
        return None
    made = {v: n for n, e in enumerate(jaxpr.eqns[:number]) for v in e.outvars}
    for skip, branch in ((0, 1), (1, 0)):
        x: Any = eqn.invars[skip]
        y: Any = eqn.invars[branch]
        both = isinstance(x, core.Var) and isinstance(y, core.Var) and y in made
        if not both or x.aval.shape != y.aval.shape:
            continue
        own = before[x] if x not in made else 1 << (lead + made[x])
        if x in owners or not before[y] & own:
            continue
        past = (before[y] & ~before[x]) >> lead
        inside = {n for n in range(past.bit_length()) if past >> n & 1}
        inside |= _updates_of_state(jaxpr, inside, readers=readers, state=state)
        outputs: set[int] = set()
        leaks = False
        for n in sorted(inside, reverse=True):
            read = {(v, r) for v in jaxpr.eqns[n].outvars for r in readers.get(v, ())}
            outside = {r for v, r in read if r not in inside and (v is not y or r != number)}
            stateful = {-1 - r for r in outside if r < 0 and state[-1 - r] is not None}
            if len(stateful) == len(outside):
                outputs |= stateful
            elif any(before[v] & own for v in jaxpr.eqns[n].outvars):
                leaks = True  # what is made of `x` inside of the branch is needed elsewhere
            else:
                inside.remove(n)  # made beside it for several branches, such as a causal mask
        if not any(_multiplies(frame, n) for n in inside):
            continue
        paths = tuple(
            path
            for v, path in owners.items()
            if readers.get(v)
            and all(r in inside or (r < 0 and state[-1 - r] is not None) for r in readers[v])
            and any(r in inside for r in readers[v])
        )
        if paths and not leaks:
            return Branch(frame, number, skip, inside, paths, frozenset(outputs))
    return None


def _updates_of_state(
    jaxpr: Any,
    inside: set[int],
    *,
    readers: Mapping[core.Var, set[int]],
    state: Sequence[int | None],
) -> set[int]:
    """Equations that serve nothing but new values of the state made inside of a branch."""
    reads = [{r for v in eqn.outvars for r in readers.get(v, ())} for eqn in jaxpr.eqns]
    serving: set[int] = set()  # nothing but the state, of whatever branch
    for n in reversed(range(len(jaxpr.eqns))):
        if reads[n] and all(
            r in serving or (r < 0 and state[-1 - r] is not None) for r in reads[n]
        ):
            serving.add(n)
    found: set[int] = set()
    for n in sorted(serving):  # those that read what the branch makes, and what comes of it
        made = {v for m in inside | found for v in jaxpr.eqns[m].outvars}
        if made.intersection(v for v in jaxpr.eqns[n].invars if isinstance(v, core.Var)):
            found.add(n)
    for n in sorted(serving - found, reverse=True):  # and what is made for them alone
        if reads[n] <= found:
            found.add(n)
    return found


def _multiplies(frame: Frame, number: int) -> bool:
    """Tell whether an equation, or one inside of it, is a product of matrices."""
    if frame.jaxpr.eqns[number].primitive.name in ("dot_general", "conv_general_dilated"):
        return True
    return any(
        _multiplies(inner, n)
        for inner in frame.inner.get(number, ())[:1]
        for n in range(len(inner.jaxpr.eqns))
    )


class _Block(NamedTuple):
    name: str
    members: tuple[Member, ...]
    reason: str


def _branches(net: Network) -> Iterator[_Block]:
    shapes = dict(zip(net.paths, net.shapes, strict=True))
    for branch in find_branches(net):
        members = tuple(
            Member(path, 0, np.arange(shapes[path][0])[None])
            for path in branch.paths
            if shapes[path]
        )
        jaxpr = branch.frame.jaxpr
        add = jaxpr.eqns[branch.add]
        zero: dict[core.Var, Any] = {
            v: _ZERO
            for v, path in _owners(net, branch.frame).items()
            if path in branch.paths and shapes[path]
        }
        y = add.invars[1 - branch.skip]
        vanishes = _outcomes(net, branch.frame, zero, sorted(branch.equations)).get(y) == _ZERO
        site = Site(net.analysis, branch.frame, branch.add, add)
        reason = f"{site.name()} adds a branch that is not zero when its parameters are"
        if members:
            yield _Block(_name(net, branch.paths), members, "" if vanishes else reason)


def _owners(net: Network, frame: Frame) -> dict[core.Var, str]:
    """Inputs of a frame that are parameters, however deep it is called."""
    if frame.caller is None:
        first = frame.jaxpr.invars[len(frame.consts) :]
        return dict(zip(first, net.paths, strict=False))
    outer = _owners(net, frame.caller.frame)
    inside = frame.jaxpr.invars[len(frame.consts) :]
    return {
        v: outer[w]
        for v, w in zip(inside, frame.caller.eqn.invars, strict=False)
        if isinstance(w, core.Var) and w in outer
    }


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
    coupling = net.analysis.coupling
    triples = owned(net)
    reasons: dict[int, str] = {}
    for ids, reason in zip(net.analysis.layers, _scan_reasons(net), strict=True):
        for root in coupling.find(ids).tolist():
            reasons[root] = reasons.get(root) or reason or coupling.why_inexact(np.array([root]))
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
        yield _Block(name, tuple(members), reasons[root])


def _scan_reasons(net: Network) -> list[str]:
    """For each scan whose layers can go: why leaving one out is not exact, or nothing."""
    reasons = []
    for site in net.analysis.scans:
        (body,) = site.frame.inner[site.number]
        n, k = scan_sizes(site.params)
        inputs = body.jaxpr.invars[len(body.consts) :]
        states: dict[core.Var, Any] = {v: v for v in inputs[n : n + k]}
        leads = [x[0] for x in site.ins[n + k :]]
        zero = zip(inputs[n + k :], leads, strict=True)  # a layer's number, say, is not
        states |= {v: _ZERO for v, lead in zero if lead is not None and lead.zero}
        after = _outcomes(net, body, states, range(len(body.jaxpr.eqns)))
        counted = clocks(site)  # each layer that is left gets what it got
        passes = all(
            i in counted or after.get(out) is v
            for i, (out, v) in enumerate(zip(body.jaxpr.outvars, inputs[n : n + k], strict=False))
            if isinstance(out, core.Var)
        )
        text = f"{site.name()}: a layer whose parameters are zero changes what it is given"
        reasons.append("" if passes else text)
    return reasons


_ZERO = "zero"
_PASSING = (
    *("reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "rev", "reduce_sum"),
    *("reduce_max", "reduce_min", "cumsum", "gather", "dynamic_slice", "split", "copy", "name"),
    *("reduce_window_sum", "reduce_window_max", "convert_element_type", "reduce_precision"),
)


def _outcomes(
    net: Network, frame: Frame, states: dict[core.Var, Any], numbers: Sequence[int]
) -> dict[Any, Any]:
    """Follow through some equations what is zero and what is a value that was given."""
    states = dict(states)
    for number in numbers:
        eqn = frame.jaxpr.eqns[number]
        site = Site(net.analysis, frame, number, eqn)
        name = eqn.primitive.name
        ins = [states.get(v) if isinstance(v, core.Var) else None for v in eqn.invars]
        zero = [s == _ZERO or site.is_zero(i) for i, s in enumerate(ins)]
        outs: list[Any] = [None] * len(eqn.outvars)
        inner = frame.inner.get(number, ())[:1]
        if name in ("add", "add_any") and any(zero) and not all(zero):
            outs = [ins[1] if zero[0] else ins[0]]
        elif name in ELEMENTWISE and any(zero) and stays_zero(site, zero):
            outs = [_ZERO] * len(outs)
        elif name in ("dot_general", "conv_general_dilated") and any(zero):
            outs = [_ZERO]
        elif name in (*_PASSING, *SUMS) and zero[0]:
            outs = [_ZERO] * len(outs)
        elif name in ("copy", "name", "optimization_barrier", *MOVES):
            outs = ins
        elif name in ("concatenate", "pad") and all(zero):
            outs = [_ZERO]
        elif inner and name in (*_PLAIN_CALLS, "custom_jvp_call", "custom_vjp_call"):
            body = inner[0]
            given = dict(zip(body.jaxpr.invars[len(body.consts) :], ins, strict=True))
            after = _outcomes(net, body, given, range(len(body.jaxpr.eqns)))
            outs = [after.get(v) if isinstance(v, core.Var) else None for v in body.jaxpr.outvars]
        states.update(zip(eqn.outvars, outs, strict=True))
    return states
