"""Residual branches: what lies between a value and a sum with it."""

# A branch is found at the sum that ends it. One of the operands goes around, the other is made from
# it; what only the other depends on is the branch:
#
#     a = dot_general x w0
#     b = tanh a                equations 0 to 2 are what `c` depends on and `x` does not
#     c = dot_general b w1
#     y = add x c               without them it is `x`
#
# Invariant: leaving the equations of a branch out changes nothing but the sum. So whatever they
# make is read among them or by the sum, or it is the new value of a state (running statistics),
# which goes with its branch. What `x` has no part in, such as a causal mask that several branches
# read, is not of the branch. A parameter belongs to it if nobody else reads it.

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from jax.extend import core

from jaxprune.graph._frames import Frame, shape_of
from jaxprune.graph._network import Network, mirrored_outputs
from jaxprune.graph._vanishing import PLAIN_CALLS

Owners: TypeAlias = Mapping[core.Var, str]  # inputs of a frame that are parameters, and their paths
State: TypeAlias = Sequence[int | None]  # for each result the parameter whose new value it is


class Branch(NamedTuple):
    """A residual branch: the sum that ends it, and the operand that goes around it.

    Attributes:
      frame: the frame that holds it.
      add: number of the equation of the sum.
      skip: which operand of the sum goes around.
      equations: numbers of its equations.
      paths: parameters that only it reads.
      outputs: results of the whole function that are new values of its state.
    """

    frame: Frame
    add: int
    skip: int
    equations: set[int]
    paths: tuple[str, ...]
    outputs: frozenset[int]


class Flow(NamedTuple):
    """Who makes and who reads the variables of a jaxpr.

    Attributes:
      past: what a variable depends on, as bits of one large integer: a bit for each input, then
        one for each equation. Unions and differences of such sets take no time.
      readers: numbers of the equations that read a variable; -1 - i for result i.
      maker: number of the equation that makes it.
      inputs: how many inputs there are.
    """

    past: dict[core.Var, int]
    readers: dict[core.Var, set[int]]
    maker: dict[core.Var, int]
    inputs: int

    def bit(self, v: core.Var) -> int:
        """The bit of what makes a variable: whose past has it depends on the variable."""
        return 1 << (self.inputs + self.maker[v]) if v in self.maker else self.past[v]

    def between(self, x: core.Var, y: core.Var) -> set[int]:
        """Numbers of the equations that ``y`` depends on and ``x`` does not."""
        bits = (self.past[y] & ~self.past[x]) >> self.inputs
        return {n for n in range(bits.bit_length()) if bits >> n & 1}


def _flow(jaxpr: core.Jaxpr) -> Flow:
    lead = len(jaxpr.invars)
    past = {v: 1 << i for i, v in enumerate(jaxpr.invars)}
    readers: dict[core.Var, set[int]] = {}
    for number, eqn in enumerate(jaxpr.eqns):
        own = 1 << (lead + number)
        for v in eqn.invars:
            if isinstance(v, core.Var):
                own |= past[v]
                readers.setdefault(v, set()).add(number)
        past.update(dict.fromkeys(eqn.outvars, own))
    for i, v in enumerate(jaxpr.outvars):
        if isinstance(v, core.Var):
            readers.setdefault(v, set()).add(-1 - i)
    maker = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in eqn.outvars}
    return Flow(past, readers, maker, lead)


def find_branches(net: Network) -> list[Branch]:
    """Residual branches of a network, innermost only, in the order of the program."""
    owners = dict(zip(net.frame.inputs, net.paths, strict=False))
    state = mirrored_outputs(net.outputs, net.paths, net.shapes_and_types)
    return list(_in_frame(net.frame, owners, state))


def _in_frame(frame: Frame, owners: Owners, state: State) -> Iterator[Branch]:
    """Branches of one frame and of those inside."""
    flow = _flow(frame.jaxpr)
    covered: set[int] = set()  # equations of branches so far: one around them is not innermost
    for number in range(len(frame.jaxpr.eqns)):
        branch = _ending_at(frame, number, flow, owners=owners, state=state)
        if branch is not None:
            if not branch.equations & covered:
                yield branch
            covered |= branch.equations | {number}
        inside = list(_in_call(frame, number, flow, owners))
        if inside:
            covered.add(number)
        yield from inside


def _in_call(frame: Frame, number: int, flow: Flow, owners: Owners) -> Iterator[Branch]:
    """Branches of the jaxpr that a plain call holds.

    Parameters are its own if no other equation reads them. What it returns is no result of the
    whole function, so that nothing in it is a state.
    """
    eqn = frame.jaxpr.eqns[number]
    if eqn.primitive.name not in PLAIN_CALLS:
        return
    for inner in frame.inner.get(number, [])[:1]:
        passed = {
            inside: owners[v]
            for inside, v in zip(inner.inputs, eqn.invars, strict=True)
            if isinstance(v, core.Var) and v in owners and flow.readers[v] == {number}
        }
        yield from _in_frame(inner, passed, [None] * len(inner.jaxpr.outvars))


def _ending_at(
    frame: Frame, number: int, flow: Flow, *, owners: Owners, state: State
) -> Branch | None:
    """The branch that ends in a sum, if one of the operands is made from the other."""
    eqn = frame.jaxpr.eqns[number]
    if eqn.primitive.name not in ("add", "add_any"):
        return None
    for skip in (0, 1):
        x, y = eqn.invars[skip], eqn.invars[1 - skip]
        if not (isinstance(x, core.Var) and isinstance(y, core.Var) and y in flow.maker):
            continue
        if shape_of(x) != shape_of(y) or x in owners or not flow.past[y] & flow.bit(x):
            continue
        found = _closed(frame.jaxpr, number, flow, ends=(x, y), state=state)
        if found is None or not any(_multiplies(frame, n) for n in found[0]):
            continue
        equations, outputs = found
        paths = tuple(p for v, p in owners.items() if _is_own(v, equations, flow, state))
        if paths:
            return Branch(frame, number, skip, equations, paths, frozenset(outputs))
    return None


def _closed(
    jaxpr: core.Jaxpr, number: int, flow: Flow, *, ends: tuple[core.Var, core.Var], state: State
) -> tuple[set[int], set[int]] | None:
    """Equations between ``ends`` that serve nothing else, and results that are its state.

    None if something made from the first of the ends is needed elsewhere as well.
    """
    x, y = ends
    inside = flow.between(x, y)
    inside |= _updates_of_state(jaxpr, inside, flow, state)
    outputs: set[int] = set()
    for n in sorted(inside, reverse=True):  # the readers of what an equation makes come before it
        read = {(v, r) for v in jaxpr.eqns[n].outvars for r in flow.readers.get(v, ())}
        outside = {r for v, r in read if r not in inside and (v is not y or r != number)}
        stateful = {-1 - r for r in outside if _is_state(r, state)}
        if len(stateful) == len(outside):
            outputs |= stateful
        elif any(flow.past[v] & flow.bit(x) for v in jaxpr.eqns[n].outvars):
            return None
        else:
            inside.remove(n)  # made beside it for several branches, such as a causal mask
    return inside, outputs


def _is_state(reader: int, state: State) -> bool:
    """Tell whether a variable is read as the new value of a state."""
    return reader < 0 and state[-1 - reader] is not None


def _is_own(v: core.Var, inside: set[int], flow: Flow, state: State) -> bool:
    """Tell whether a parameter is read by a branch and by nobody else."""
    readers = flow.readers.get(v, set())
    return bool(readers & inside) and all(r in inside or _is_state(r, state) for r in readers)


def _updates_of_state(jaxpr: core.Jaxpr, inside: set[int], flow: Flow, state: State) -> set[int]:
    """Equations that serve nothing but new values of the state made inside of a branch.

    The sum does not depend on them, so that they are not between its ends:

        m = reduce_sum a          a: made inside of the branch
        s = mul 0.9 mean          mean: the old value, a parameter
        t = add s m               t: the new value, a result
    """
    reads = [{r for v in eqn.outvars for r in flow.readers.get(v, ())} for eqn in jaxpr.eqns]
    serving: set[int] = set()  # nothing but the state, of whatever branch
    for n in reversed(range(len(jaxpr.eqns))):
        if reads[n] and all(r in serving or _is_state(r, state) for r in reads[n]):
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
