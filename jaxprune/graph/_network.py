"""A function traced: its jaxpr, analysed, with the paths of its parameters."""

import collections
import difflib
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxprune._mesh import is_explicit
from jaxprune._tree import (
    is_array,
    is_floating,
    join_static,
    leaves_with_path,
    list_paths,
    split_static,
)
from jaxprune.graph._axes import Axes
from jaxprune.graph._captured import hold_captured
from jaxprune.graph._carry import Carry, carry_pairs
from jaxprune.graph._frames import Frame
from jaxprune.graph._lean import lean
from jaxprune.graph._rules import RULES
from jaxprune.graph._site import Rule
from jaxprune.graph._walk import Analysis
from jaxprune.typing import Params, Where


class Network(NamedTuple):
    """A traced function and what its analysis found.

    Attributes:
      analysis: the relations between all axes.
      frame: the axes of every value of the jaxpr.
      paths: path of each array of the params, in order; they are the first inputs.
      shapes: their shapes.
      shapes_and_types: the same with dtypes.
      axes: their axes.
      outputs: tree of the results.
      carried: axes of each array of a carry, by its number among all arrays that go in.
    """

    analysis: Analysis
    frame: Frame
    paths: list[str]
    shapes: list[tuple[int, ...]]
    shapes_and_types: list[jax.ShapeDtypeStruct]
    axes: list[Axes]
    outputs: Any
    carried: dict[int, Axes]


class Program(NamedTuple):
    """A function traced for inputs of some shapes.

    Attributes:
      fn: the same on the arrays among the arguments, in order.
      arguments: positional ones, the params first, and keywords.
      specs: shape and dtype of each array that goes in; those of the params come first.
      closed: its jaxpr.
      outputs: tree of the results.
    """

    fn: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    specs: list[jax.ShapeDtypeStruct]
    closed: core.ClosedJaxpr
    outputs: Any


class Walk(NamedTuple):
    """What a walk through a program found.

    Attributes:
      analysis: the relations between all axes.
      frame: the axes of every value of the jaxpr.
      axes: axes of each parameter.
      carried: axes of each array of a carry, by its number among all arrays that go in.
    """

    analysis: Analysis
    frame: Frame
    axes: list[Axes]
    carried: dict[int, Axes]


def network(
    fn: Callable[..., Any],
    params: Params,
    inputs: Sequence[Any],
    keywords: Mapping[str, Any] | None = None,
    *,
    rules: Mapping[str, Rule] | None = None,
    frozen: Where | None = None,
    carry: Carry | None = None,
    exact: bool = True,
    complain: bool = True,
    whole_outputs: bool = True,
    solved: bool = True,
) -> Network:
    """Trace ``fn(params, *inputs, **keywords)`` and analyse it.

    ``exact`` asks for the places where cutting differs from masking, ``complain`` for warnings of
    what is strange about the params, ``whole_outputs`` for results that are never cut. Without
    ``solved`` only the frames are wanted and what is joined: derivatives are not walked, and no
    conclusions are drawn.
    """
    leaves = _arrays_of(params)
    paths = [path for path, _ in leaves]
    program = program_of(fn, (params, *inputs), dict(keywords or {}), len(leaves))
    pairs = carry_pairs(carry, program.arguments, program.outputs)
    walk = _walk(
        program,
        leaves,
        pairs,
        rules=rules or {},
        frozen=frozen,
        exact=exact,
        complain=complain,
        derivatives=solved,
    )
    analysis, frame, axes, carried = walk
    if complain:
        _warn_of_types(leaves)
        _warn_of_unread(frame, leaves)
        bare = functools.partial(program.fn, bare=True)
        hold_captured(analysis, lambda: _traced(bare, program.specs, 0)[0])
    first = program.specs[: len(leaves)]
    states: list[Axes | None] = [
        None if m is None else axes[m] for m in mirrored_outputs(program.outputs, paths, first)
    ]
    for i, back in pairs.items():
        if back is not None:
            states[back] = carried[i]
    _close_outputs(analysis, frame, states, whole_outputs)
    if solved:
        analysis.coupling.solve()
    shapes = [spec.shape for spec in first]
    return Network(analysis, frame, paths, shapes, first, axes, program.outputs, carried)


def _arrays_of(params: Params) -> list[tuple[str, Any]]:
    """The arrays of params by path; refuse paths that nobody could tell apart."""
    leaves = [(path, leaf) for path, leaf in leaves_with_path(params) if is_array(leaf)]
    twice = [path for path, n in collections.Counter(path for path, _ in leaves).items() if n > 1]
    if twice:
        raise ValueError(
            f"Several parameters have the path {list_paths(twice)}, so that nobody could tell them "
            "apart. Rename keys that hold a slash."
        )
    return leaves


def program_of(fn: Any, positional: tuple[Any, ...], keywords: dict[str, Any], n: int) -> Program:
    """Trace a function of trees as one of arrays, of which the first ``n`` are its params."""
    arguments = positional, keywords
    arrays, static = split_static(arguments)
    specs = [spec_of(x) for x in arrays]

    def flat(*arrays: Any, bare: bool = False) -> Any:
        positional, named = join_static(arrays, static)
        jitted = bare and hasattr(fn, "lower")  # of which jax remembers the program
        return (fn.__wrapped__ if jitted else fn)(*positional, **named)

    return Program(flat, arguments, specs, *_traced(flat, specs, n))


def _walk(
    program: Program,
    leaves: Sequence[tuple[str, Any]],
    pairs: Mapping[int, int | None],
    *,
    rules: Mapping[str, Rule],
    frozen: Where | None,
    exact: bool,
    complain: bool,
    derivatives: bool,
) -> Walk:
    """Follow the axes of params and of a carry through a program.

    ``pairs`` says of each array of a carry which result is its new value, by their numbers.

    Whether what a unit computes is zero where it is masked depends on the carry, and what a carry
    becomes on whether it was zero. It is taken for zero, as it is at the start, until the program
    makes something else of it: then that one is not, and the walk begins again. So
    ``h + tanh(x @ w)`` leaves a zero one, and ``sigmoid(h)`` does not.
    """
    specs = program.specs
    zero = {i for i, back in pairs.items() if back is not None}
    silent = not complain
    while True:
        analysis = Analysis({**RULES, **rules}, exact=exact, taught=frozenset(rules))
        analysis.deriving = 0 if derivatives else 2  # deeper than that nobody asks
        axes = [_param_axes(analysis, path, leaf, frozen) for path, leaf in leaves]
        analysis.own = analysis.coupling.size
        carried = {i: analysis.fresh(specs[i].shape, zero=i in zero) for i in pairs}
        plain = [(None,) * len(spec.shape) for spec in specs]
        inside = [*axes, *(carried.get(i, plain[i]) for i in range(len(axes), len(specs)))]
        with warnings.catch_warnings():
            if silent:
                warnings.simplefilter("ignore")
            frame = analysis.walk(program.closed, inside, weights=[True] * len(axes))
        silent = True  # the same would be told again
        filled = {i for i in zero if _fills(carried[i], frame.outs[pairs[i] or 0])}
        if not exact or not filled:
            return Walk(analysis, frame, axes, carried)
        zero -= filled


def _fills(old: Axes, new: Axes) -> bool:
    """Tell whether the new value of a carry is not zero where the old one was."""
    return any(
        a is not None and b is not None and not b.zero for a, b in zip(old, new, strict=True)
    )


def spec_of(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, how explicit mesh axes cut it, and over which it varies."""
    if _varying(x):
        return _on_devices(jnp.shape(x), x.dtype, x)
    layout = jax.typeof(x).sharding if is_explicit(x) else getattr(x, "sharding", None)
    keep = isinstance(x, jax.ShapeDtypeStruct) or is_explicit(x)
    return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=layout if keep else None)


def specs_beside(whole: Params, params: Params) -> Params:
    """The shapes of whole params, with all else as some given ones have it in the same place.

    Those may be of another dtype by now, and hold numbers where arrays were, or the other way
    round, as inside of ``jit``. Inside of a ``shard_map`` each varies over its devices as the given
    one does: nothing may be traced that mixes what varies with what does not.
    """

    def one(spec: Any, x: Any) -> Any:
        if not is_array(x):
            return x
        shape = spec.shape if is_array(spec) else jnp.shape(x)
        if _varying(x):
            return _on_devices(shape, x.dtype, x)
        sharding = spec.sharding if is_array(spec) else None
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding)

    return jax.tree.map(one, whole, params)


def _varying(x: Any) -> frozenset[str]:
    """Over which mesh axes an array varies, inside of a ``shard_map``."""
    kind = None if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    return getattr(getattr(kind, "manual_axis_type", None), "varying", frozenset())


def _on_devices(shape: tuple[int, ...], dtype: Any, like: Any) -> jax.ShapeDtypeStruct:
    """A shape that varies over the devices of a ``shard_map`` as an array does."""
    kind: Any = jax.typeof(like)
    whole = jax.NamedSharding(kind.sharding.mesh, jax.P(*[None] * len(shape)))
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=whole, manual_axis_type=kind.manual_axis_type
    )


def check_call(fn: Any, keywords: Mapping[str, Any], user: Callable[..., Any]) -> None:
    """Refuse modules in the place of functions, and keywords that look like typing errors."""
    name, kind = f"`{user.__qualname__}`", type(fn).__name__
    if hasattr(fn, "init") and hasattr(fn, "apply"):
        raise TypeError(
            f"{name} got a {kind} instead of a function of its parameters. Pass its `apply`."
        )
    held = [] if isinstance(fn, jax.tree_util.Partial) else jax.tree.leaves(fn)
    if not callable(fn) or any(map(is_array, held)):
        holds = "" if not callable(fn) else ", which holds its parameters itself,"
        raise TypeError(
            f"{name} got a {kind}{holds} instead of a function `fn(params, *inputs)`. Pass one of "
            "its parameters: `lambda model, x: model(x)` with the model as params, or "
            "`lambda state, x: nnx.merge(graph, state)(x)` for nnx."
        )
    ours = [p.name for p in inspect.signature(user).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for word in keywords:
        near = difflib.get_close_matches(word, ours, 1, 0.85)
        if near and word not in _parameters(fn):
            raise TypeError(
                f"{name} got {word}=, which `fn` does not name. Did you mean {near[0]}=? For a "
                "keyword of `fn` wrap it: `lambda params, x: fn(params, x, ...)`."
            )


def _parameters(fn: Any) -> Sequence[str]:
    try:
        return list(inspect.signature(fn).parameters)
    except (TypeError, ValueError):  # nobody can tell: a builtin
        return []


def _traced(flat: Any, specs: Sequence[Any], n: int) -> tuple[Any, Any]:
    try:
        closed, outputs = jax.make_jaxpr(flat, return_shape=True)(*specs)
    except Exception as error:
        given = ", ".join(f"{s.dtype}{list(s.shape)}" for s in specs[n:]) or "no inputs"
        error.add_note(
            f"jaxprune traced `fn(params, *inputs)` with {n} parameter arrays and {given}. Pass "
            "inputs of the shapes that `fn` takes, arrays or jax.ShapeDtypeStruct."
        )
        raise
    return lean(closed), outputs


def _param_axes(analysis: Analysis, path: str, leaf: Any, frozen: Where | None) -> Axes:
    """Axes of a parameter. What is removed of it is zero in the masked network."""
    axes = analysis.fresh(jnp.shape(leaf), zero=True)
    floating = is_floating(leaf)
    if floating and not (frozen is not None and frozen(path, leaf)):
        return axes
    why = f"{path!r} is {leaf.dtype}" if not floating else f"{path!r} is protected"
    for axis in axes:
        if axis is not None:
            analysis.coupling.freeze(axis.ids, why)
    return axes


def _warn_of_types(params: Sequence[tuple[str, Any]]) -> None:
    """Name the parameters that are no floating numbers: they hold what they are joined with."""
    for path, leaf in params:
        number = jnp.issubdtype(leaf.dtype, np.number)
        if number and not is_floating(leaf) and len(jnp.shape(leaf)):
            warnings.warn(
                f"{path!r} is {leaf.dtype}{list(leaf.shape)}: only floating arrays are pruned, so "
                "its axes stay whole, and whatever is joined with them.",
                stacklevel=4,
            )


def _warn_of_unread(frame: Frame, params: Sequence[tuple[str, Any]]) -> None:
    """Name the parameters that nothing depends on: no group can hold them."""
    read = {v for eqn in frame.jaxpr.eqns for v in eqn.invars if not hasattr(v, "val")}
    read |= {v for v in frame.jaxpr.outvars if not hasattr(v, "val")}
    first = frame.jaxpr.invars[len(frame.consts) :]
    unread = [
        path
        for (path, leaf), v in zip(params, first, strict=False)
        if v not in read and is_floating(leaf)
    ]
    if unread:
        warnings.warn(
            f"`fn` never reads {list_paths(unread)}, or for nothing that it returns: nothing "
            "couples them, so that they are in no group. Leave them out of `params`, or pass the "
            "function that uses them.",
            stacklevel=4,
        )


def _close_outputs(
    analysis: Analysis, frame: Frame, states: Sequence[Axes | None], whole: bool
) -> None:
    """Results stay whole, but for new values of the state: they are cut as the state is."""
    for out, state in zip(frame.outs, states, strict=True):
        lead = 0 if state is None else len(out) - len(state)  # a new value for each of several
        for j, axis in enumerate(out):
            mine = None if state is None or j < lead else state[j - lead]
            if axis is not None and mine is not None:
                analysis.coupling.join(axis.ids, mine.ids)
            elif axis is not None and whole:
                analysis.coupling.freeze(axis.ids, f"it is axis {j} of an output")
            elif mine is not None:
                analysis.coupling.freeze(mine.ids, "its new value stays whole")


def mirrored_outputs(
    outputs: Any, paths: Sequence[str], specs: Sequence[jax.ShapeDtypeStruct]
) -> list[int | None]:
    """For each result the number of the parameter whose new value it is, if any.

    A function that trains, or that updates running statistics, gives back a part of what it got.
    Those results are cut as the parameters are, while all others stay whole. Nothing in a program
    says which they are; their names do. A result is the new value of a parameter of its shape and
    dtype whose path ends as its own does: of ``(logits, {"batch_stats": {"norm": {"mean": ...}}})``
    the path is ``1/batch_stats/norm/mean``, and that of the parameter ``batch_stats/norm/mean``.
    Under ``vmap`` and ``pmap`` there is one for each of several, along leading axes.

    The parameter with the longest common end wins, then the one of more axes, then the first.
    """
    by_end = collections.defaultdict(list)  # a network has many, and few of one name
    for number, (path, spec) in enumerate(zip(paths, specs, strict=True)):
        by_end[path.split("/")[-1]].append((number, path.split("/"), spec))
    found: list[int | None] = []
    for path, out in leaves_with_path(outputs):
        words = path.split("/")
        ranks = [
            (_common_end(words, theirs), len(spec.shape), -number)
            for number, theirs, spec in by_end[words[-1]]
            if spec.dtype == out.dtype
            and spec.shape == out.shape[len(out.shape) - len(spec.shape) :]
            and _ends_as(words, theirs)
        ]
        found.append(-max(ranks)[2] if ranks else None)
    return found


def _common_end(words: Sequence[str], theirs: Sequence[str]) -> int:
    """How many words two paths have in common, counted from their ends."""
    pairs = zip(reversed(words), reversed(theirs), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _ends_as(words: Sequence[str], theirs: Sequence[str]) -> bool:
    """Say whether a result may be called what a parameter is called.

    All but a leading place in a tuple, or a leading collection, has to agree. One word alone, such
    as ``out``, will do only if it is all of the parameter's path and a tuple's part: ``1/out``.
    """
    common = _common_end(words, theirs)
    whole = common >= max(len(words) - 1, 1) or common == len(theirs)
    apart = common == len(theirs) == len(words) - 1 and words[0].isdigit()
    named = any(not word.isdigit() for word in words[len(words) - common :])
    return whole and named and (common >= 2 or apart)
