"""How each parameter of a function is used, and what each of its axes means."""

# Parameters are followed until they meet data, and the place where they do says what an axis is:
#
#     up: f32[8,4,12]                 scanned: axis 0 is a layer
#     h = dot_general x up_i          axis 1 is contracted with data, an input; axis 2 an output
#
# A leaf that meets data several times has several uses. Each of them says what it knows; where a
# part of an axis is taken for one thing and a part for another, it says nothing.

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxprune._layout import Entry, Layout, Use
from jaxprune._tree import list_paths
from jaxprune.graph._follow import Log, follow
from jaxprune.graph._meetings import NOBODY, Meeting, Role
from jaxprune.graph._network import Network, check_call, network
from jaxprune.graph._sources import DATA, Note, source_of, weights
from jaxprune.typing import Params


def find_layout(fn: Callable[..., Any], params: Params, *inputs: Any, **keywords: Any) -> Layout:
    """Find how each parameter is used and what each of its axes means, in any JAX function.

    Traces ``fn(params, *inputs)`` and follows every parameter, through reshapes, transposes,
    slices, casts, stacks, loops and calls, until it meets data. The place says what its axes are:
    ``"layer"`` if a scan or a ``fori_loop`` runs over it, ``"in"`` if it is contracted with data,
    ``"out"`` if it becomes an axis of the result, ``"window"`` for positions of a convolution's
    kernel, ``"group"`` for experts, batch axes of a product, groups, and members that ``vmap`` maps
    over. Nothing is computed, so shapes will do, and no module is looked at: flax, equinox, haiku
    and plain functions are all the same. Pass the forward function, or the loss: a gradient inside
    of ``fn`` uses each kernel a second time, transposed.

    Args:
      fn: function of params and inputs; what is no array among them (a flag, a function) is fixed.
      params: the whole tree of variables, arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs in the shapes that ``fn`` takes, arrays or ``jax.ShapeDtypeStruct``.
      **keywords: keyword arguments of ``fn``, such as ``train=True`` or ``rngs=``.

    Returns:
      A layout with an entry for each array of ``params``. ``print`` shows the uses, and why an axis
      has no role. That happens where a part of an axis is the one and a part the other (layers and
      inputs along one axis), where a Python loop reads layers one by one, and for biases and norms,
      which meet data element by element. It cannot tell members that are mapped over from outputs
      where only the weights have the axis, unless a later weight has it as a batch axis; nor what a
      loop runs over for another purpose than to apply layers.

    Raises:
      Exception: whatever ``fn`` raises for these inputs, with a note of what it was called with.
      ValueError: ``fn`` reads none of its params, as one that has closed over them.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def net(p, x):
      ...     x, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
      ...     return x @ p["head"].T
      >>> params = {"layers": jnp.ones((6, 4, 4)), "head": jnp.ones((2, 4))}
      >>> print(find_layout(net, params, jax.ShapeDtypeStruct((3, 4), jnp.float32)))
      head    2x4    matmul (out, in)
      layers  6x4x4  matmul (layer, in, out)
    """
    check_call(fn, keywords, find_layout)
    net = network(fn, params, inputs, keywords, exact=False, complain=False, solved=False)
    found = layout_of(net)
    if found and all(use.kind == "unused" for uses in found.values() for use in uses):
        raise ValueError(
            f"`find_layout` found that `fn` reads none of its params ({list_paths(net.paths, 4)}), "
            "as if it had closed over them. Pass a function that uses the params that it is given."
        )
    return found


def layout_of(net: Network) -> Layout:
    """The layout that the frames of a network tell."""
    found = _members(_meetings(net), net)
    by_leaf: dict[int, list[Meeting]] = collections.defaultdict(list)
    for meeting in found:
        by_leaf[meeting.leaf].append(meeting)
    return Layout(
        tuple(
            Entry(path, _uses(by_leaf[leaf], len(shape)), tuple(shape))
            for leaf, (path, shape) in enumerate(zip(net.paths, net.shapes, strict=True))
        )
    )


def _meetings(net: Network) -> list[Meeting]:
    """All places where parameters meet data, or are given back."""
    log = Log(net.analysis, [len(shape) for shape in net.shapes])
    given = [weights([source_of(i, shape)]) for i, shape in enumerate(net.shapes)]
    ins = [*given, *([DATA] * (len(net.frame.inputs) - len(given)))]
    for value in follow(log, net.frame, ins):
        log.finish(value)
    return _outcomes(log.meetings)


def _outcomes(meetings: Sequence[Meeting]) -> list[Meeting]:
    """Leave out sums of products that are read as products, too: ``h * gain`` and its mean."""
    gains = {m.number for m in meetings if m.number is not None and _is_product(m)}
    return [m for m in meetings if m.number not in gains or _is_product(m)]


def _is_product(meeting: Meeting) -> bool:
    return meeting.product and not meeting.summed


# Members that `vmap` maps over.
#
# Where data is the same for all members, as in a first layer, only the weight has their axis, so
# that it looks like one of outputs: w [5,3,7] with x [4,3] is a free axis of 5 and one of 7, be it
# a `vmap` over five members or an `einsum` to 5 x 7 outputs. What comes of it tells, if the next
# weight has it as a batch axis, at the same place; heads of attention lie behind the inputs.


def _members(meetings: Sequence[Meeting], net: Network) -> list[Meeting]:
    """Take outputs for groups that go on as groups of another weight; say nothing if unsure."""
    groups = [
        (m.leaf, axis, ids)
        for m in meetings
        for axis, role in enumerate(m.roles)
        if role == "group" and (ids := _ids(net, m.leaf, axis)) is not None
    ]
    return [_with_members(m, groups, net) for m in meetings]


def _with_members(
    meeting: Meeting, groups: Iterable[tuple[int, int, np.ndarray]], net: Network
) -> Meeting:
    outs = [i for i, role in enumerate(meeting.roles) if role == "out"]
    found = {
        axis: _as_member(meeting, axis, _same(meeting.leaf, axis, groups, net), net)
        for axis in outs
    }
    told = {axis: role for axis, role in found.items() if role is not None}
    roles = [told[i][0] if i in told else role for i, role in enumerate(meeting.roles)]
    why = [told[i][1] if i in told else note for i, note in enumerate(meeting.why)]
    return dataclasses.replace(meeting, roles=tuple(roles), why=tuple(why))


def _as_member(
    meeting: Meeting, axis: int, same: Sequence[tuple[int, int]], net: Network
) -> tuple[Role, Note] | None:
    """What an axis of outputs is instead, if it may be one of members; None if it cannot.

    Members have outputs of their own, or what cannot be told, behind the axis that counts them.
    """
    inputs = [i for i, role in enumerate(meeting.roles) if role == "in"]
    behind = meeting.roles[axis + 1 :]
    first = "out" not in meeting.roles[:axis] and axis < min(inputs, default=len(meeting.roles))
    if first and inputs and "out" in behind and any(i == axis for _, i in same):
        return "group", NOBODY
    if same and meeting.roles.count("out") > 1 and inputs:
        return None, Note(f"it goes on as a group of {net.paths[same[0][0]]!r}")
    if first and meeting.mapped and ("out" in behind or None in behind):
        return None, Note("outputs, or members that `vmap` maps over")
    return None


def _same(
    leaf: int, axis: int, groups: Iterable[tuple[int, int, np.ndarray]], net: Network
) -> list[tuple[int, int]]:
    """The groups of other parameters whose axis an axis goes on as."""
    ids = _ids(net, leaf, axis)
    if ids is None:
        return []
    return [(k, i) for k, i, theirs in groups if k != leaf and np.array_equal(ids, theirs)]


def _ids(net: Network, leaf: int, axis: int) -> np.ndarray | None:
    """The class of each index of an axis of a parameter; None for one of a single index."""
    found = net.axes[leaf][axis]
    return None if found is None else net.analysis.coupling.find(found.ids)


# Uses of one leaf.


def _uses(meetings: Sequence[Meeting], rank: int) -> tuple[Use, ...]:
    """All uses of a leaf, those that say the same once."""
    real = [m for m in meetings if m.kind != "table" and not m.aside]
    told: dict[tuple[Any, ...], Use] = {}
    for meeting in real or meetings:
        use = _use(meeting)
        told.setdefault((use.kind, use.axes, str(use.zero)), use)
    return tuple(told.values()) or (Use("unused", (None,) * rank, ("it is not used",) * rank),)


def _use(meeting: Meeting) -> Use:
    pairs = zip(meeting.roles, meeting.why, strict=True)
    why = tuple("" if role else str(note) or str(NOBODY) for role, note in pairs)
    return Use(
        meeting.kind,
        meeting.roles,
        why,
        meeting.zero,
        "" if meeting.through is None else str(meeting.through),
    )
