"""A function on calibration data: its program in a line, and which weights are to be visited."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._batches import Calibration
from jaxprune._calibrate import Walk
from jaxprune._layout import Layout, check_layout
from jaxprune._mesh import laid_as
from jaxprune._tree import (
    is_array,
    leaves_with_path,
    list_paths,
    map_leaves,
    map_with_path,
    prunable,
)
from jaxprune._where import with_layout
from jaxprune.graph._collect import read_view
from jaxprune.graph._frames import all_frames
from jaxprune.graph._layout import layout_of
from jaxprune.graph._line import Line, line_of
from jaxprune.graph._linear import Part, View
from jaxprune.graph._network import Network, check_call, network
from jaxprune.graph._products import Weight, find_products
from jaxprune.graph._site import Site
from jaxprune.typing import Leaf, Params, Where

_DRAWS = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform")


class Traced(NamedTuple):
    """A function whose weights are visited where they multiply data.

    Attributes:
      net: the program and its frames.
      line: the same as one line.
      weights: what may be changed, in order, of those that are wanted.
      layout: what each axis means.
      where: which leaves are wanted.
      leaves: all parameters.
      paths: what they are called.
      reasons: why leaves that are wanted are left alone.
    """

    net: Network
    line: Line
    weights: list[Weight]
    layout: Layout
    where: Where
    leaves: list[Leaf]
    paths: list[str]
    reasons: dict[str, str]

    def name(self, weight: Weight) -> str:
        """What a weight is called: its parameters, and of stacks the layers."""
        each = (
            self.paths[part.leaf] + "".join(f"[{i}]" for i in part.layer)
            for part in weight.view.parts
        )
        return " and ".join(dict.fromkeys(each))

    def on(self, params: Params) -> "Traced":
        """The same for other values of the params."""
        leaves = [leaf for _, leaf in leaves_with_path(params) if is_array(leaf)]
        return self._replace(leaves=leaves)

    def draws(self) -> str:
        """The first place where random numbers are drawn; nothing if none are."""
        for frame in all_frames(self.net.frame):
            for number, eqn in enumerate(frame.jaxpr.eqns):
                if eqn.primitive.name in _DRAWS:
                    return Site(self.net.analysis, frame, number, eqn).name()
        return ""

    def results(self, params: Params, walk: Walk) -> Params:
        """The params as a walk has changed them."""
        leaves = {part.leaf for part in walk.worlds[0].changed}
        return map_leaves(
            lambda old, new: old if new is None else new,
            params,
            self.tree(params, {leaf: walk.leaf(leaf) for leaf in leaves}),
        )

    def tree(self, params: Params, found: dict[int, Any]) -> Params:
        """A tree like the params of what was found for leaves, sharded as they are; else None."""
        by_path = {self.paths[leaf]: x for leaf, x in found.items()}

        def one(path: str, leaf: Leaf) -> Leaf:
            x = by_path.get(path)
            fits = x is not None and jnp.shape(x) == jnp.shape(leaf)
            return laid_as(x, leaf) if fits else x  # type: ignore[arg-type]

        return map_with_path(one, params)


class Call(NamedTuple):
    """What is traced.

    Attributes:
      fn: function of params and inputs.
      params: the whole tree.
      data: its inputs.
      layout: what each axis means, if somebody said so.
      user: the public function that was given all that, for messages.
    """

    fn: Callable[..., Any]
    params: Params
    data: Calibration
    layout: Layout | None
    user: Callable[..., Any]


def trace(call: Call, where: Where, *, units: bool = False) -> Traced:
    """Trace a function for batches, and find the weights that are wanted and can be changed.

    ``units`` says whether one will ask what belongs to a unit.

    Raises:
      ValueError: no weight that is wanted multiplies data, or the layout is that of another tree.
    """
    params, user = call.params, call.user.__name__
    check_call(call.fn, {}, call.user)
    check_layout(user, call.layout)
    _check_values(params, call.data, user)
    inputs = call.data.inputs()
    try:
        net = network(call.fn, params, inputs, {}, exact=False, complain=False, solved=units)
    except Exception as error:
        error.add_note(_called(inputs, user))
        raise
    n = len(net.paths)
    views = [View((Part(i),)) if i < n else None for i in range(len(net.frame.inputs))]
    line = line_of(net.analysis, net.frame, views)
    found = find_products(line, net.shapes)
    known = layout_of(net) if call.layout is None else call.layout.on(params, user)
    where = with_layout(where, known)
    wanted = {path for path, _ in leaves_with_path(prunable(params, where=where))}
    weights = [w for w in found.weights if all(net.paths[leaf] in wanted for leaf in w.leaves)]
    covered = {net.paths[leaf] for w in weights for leaf in w.leaves}
    beside = "it goes into one product with a leaf that `where` refuses"
    reasons = {
        path: found.reasons.get(leaf, beside)
        for leaf, path in enumerate(net.paths)
        if path in wanted - covered
    }
    if not weights:
        told = "; ".join(f"{path!r}: {why}" for path, why in list(reasons.items())[:6])
        raise ValueError(
            f"`{user}` found no weight that could be pruned where it multiplies data: {told}. Pass "
            "the function that multiplies them, or choose others with `where`."
        )
    leaves = [leaf for _, leaf in leaves_with_path(params) if is_array(leaf)]
    return Traced(net, line, weights, known, where, leaves, net.paths, reasons)


def _check_values(params: Params, data: Calibration, user: str) -> None:
    """Refuse shapes and traced values, of which nothing can be measured."""
    leaves = [leaf for _, leaf in leaves_with_path(params)]
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TypeError(f"`{user}` got params that are shapes. Pass the trained arrays.")
    if any(isinstance(x, jax.core.Tracer) for x in leaves + data.arrays[0]):
        raise TypeError(
            f"`{user}` was called inside of a transformation such as `jax.jit`. Call it outside: "
            "it compiles its parts itself."
        )


def _called(inputs: Sequence[Any], user: str) -> str:
    """Say how the function was called that failed: labels among the inputs are easily seen."""
    kinds = ", ".join(
        f"{x.dtype}{list(jnp.shape(x))}" if is_array(x) else f"a {type(x).__name__}" for x in inputs
    )
    return (
        f"`{user}` called `fn(params, *batch)` with a batch of {kinds}. A tuple is several inputs, "
        "anything else is one; labels and flags are none, and `params` is the tree that `fn` takes."
    )


def alive_in(traced: Traced, weight: Weight, within: dict[str, Any]) -> jax.Array:
    """What earlier masks have left of a weight, as a matrix."""

    def part(p: Part) -> jax.Array:
        leaf = traced.leaves[p.leaf]
        mask = within.get(traced.paths[p.leaf], True)  # nothing is said of it: all of it is there
        whole = jnp.broadcast_to(mask, leaf.shape)
        return whole[p.layer].astype(leaf.dtype)

    return weight.product.matrix(read_view(weight.view, part)) != 0


def tied(traced: Traced) -> dict[str, str]:
    """Leaves that multiply data and are looked up as well, which by default nobody wants."""
    told = {}
    for path, uses in traced.layout.items():
        kinds = {use.kind for use in uses}
        if path not in traced.reasons and "embedding" in kinds and kinds & {"matmul", "conv"}:
            told[path] = " and as ".join(map(str, uses))
    return told


def few_rows(traced: Traced, walk: Walk, weights: Iterable[Weight]) -> str:
    """Say which weights meet fewer rows of data than they have inputs; nothing if none does."""
    few = {}
    for weight in weights:
        rows, inputs = walk.rows(weight), weight.product.of_matrix[-2]
        if rows is not None and rows < inputs:
            few[traced.name(weight)] = f"{rows} rows for {inputs} inputs"
    if not few:
        return ""
    return (
        f"there are fewer rows of data than inputs at {list_paths(list(few), 6)} "
        f"({next(iter(few.values()))}), so that damping decides a part: pass more batches"
    )


def left_alone(traced: Traced, *, by_default: bool) -> str:
    """Say which leaves are left alone that one might expect to be pruned; nothing if none is."""
    lines = [f"{path!r}: {why}" for path, why in traced.reasons.items()]
    if by_default:
        known = getattr(traced.where, "protects", lambda _: False)  # those who exclude it know
        uses = {path: said for path, said in tied(traced).items() if not known(path)}
        lines += [f"{path!r}: it is used as {said}" for path, said in uses.items()]
    return "".join(f"\n- {line}" for line in lines)
