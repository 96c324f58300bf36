"""The small function: the program of the large one, evaluated on parameters that were cut."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._kept import Kept, count, is_dropped
from jaxprune._tree import is_array, join_static, leaves_with_path, split_static
from jaxprune.graph._alive import alive_roots
from jaxprune.graph._axes import Axes, kept_indices
from jaxprune.graph._blocks import drop_blocks
from jaxprune.graph._carry import Carry, carry_inputs
from jaxprune.graph._counts import rescale
from jaxprune.graph._evaluate import evaluate
from jaxprune.graph._frames import shape_of
from jaxprune.graph._network import (
    Network,
    mirrored_outputs,
    network,
    specs_beside,
)
from jaxprune.graph._site import Rule
from jaxprune.graph._take import take
from jaxprune.typing import Params

CarryCut: TypeAlias = Sequence[
    Sequence[tuple[int, np.ndarray] | None]
]  # array: axis: whole size, what stays


@dataclasses.dataclass(frozen=True)
class Surgery:
    """What is cut out of a function.

    Attributes:
      fn: the whole function.
      whole: its params as shapes; what is no array among them as it is.
      kept: for each path and axis the indices that stay.
      counts, rules, cut_outputs, carry: settings of ``shrink``.
    """

    fn: Callable[..., Any]
    whole: Params
    kept: Kept
    counts: str = "masked"
    rules: Mapping[str, Rule] | None = None
    cut_outputs: bool = False
    carry: Carry | None = None

    def __post_init__(self) -> None:
        if self.counts not in ("masked", "rescaled"):
            raise ValueError(
                f"`counts={self.counts!r}` is unknown. Use 'masked' to equal the masked network, "
                "or 'rescaled' to equal the module built at the smaller width."
            )

    def plan(self, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> "Plan":
        """Analyse the whole function for inputs of these shapes, and say what of it stays."""
        net = network(
            self.fn,
            self.whole,
            inputs,
            keywords,
            rules=self.rules,
            carry=self.carry,
            exact=False,
            complain=False,
            whole_outputs=not self.cut_outputs,
        )
        dropped = drop_blocks(net, {path for path, axes in self.kept.items() if is_dropped(axes)})
        alive = alive_roots(net, self.kept, dropped)
        if self.counts == "rescaled":
            rescale(net, alive)
        return Plan(net, alive)


class Plan(NamedTuple):
    """A network and which of its units stay.

    Attributes:
      net: the whole network.
      alive: of every root of its coupling whether it stays.
    """

    net: Network
    alive: np.ndarray

    def left(self, axes: Axes) -> list[np.ndarray | None]:
        """For each axis the indices that are left, None where it is never cut."""
        return kept_indices(self.net.analysis.coupling, self.alive, axes)

    def left_of_carry(self) -> CarryCut:
        """For each array of a carry and each axis that is cut: its whole size and what is left."""
        return [
            [
                None if k is None or axis is None or len(k) == len(axis.ids) else (len(axis.ids), k)
                for axis, k in zip(axes, self.left(axes), strict=True)
            ]
            for axes in self.net.carried.values()
        ]

    def left_of_outputs(self) -> list[list[np.ndarray | None]]:
        """For each result what is left of each axis; nothing of a state that is dropped."""
        frame = self.net.frame
        return [
            [np.arange(0)] * len(axes) if i in frame.drop else self.left(axes)
            for i, axes in enumerate(frame.outs)
        ]

    def run(self, values: Sequence[Any]) -> Any:
        """Evaluate it on arrays that have been cut."""
        net = self.net
        outs = evaluate(net.analysis, net.frame, self.alive, values)
        states = mirrored_outputs(net.outputs, net.paths, net.shapes_and_types)
        for i in net.frame.drop:  # new values of a state that went with its block: none, as the old
            old = values[states[i] or 0]
            shape = shape_of(net.frame.jaxpr.outvars[i])
            outs[i] = jnp.broadcast_to(old, (*shape[: len(shape) - jnp.ndim(old)], *old.shape))
        return jax.tree.unflatten(jax.tree.structure(net.outputs), outs)


def small_function(surgery: Surgery, carried: CarryCut) -> Callable[..., Any]:
    """Make the function that takes small params; ``carried`` says what is left of a carry."""

    @functools.partial(jax.jit, static_argnums=1)
    def run(arrays: Sequence[Any], static: Any) -> Any:
        arguments = join_static(arrays, static)
        numbers = carry_inputs(surgery.carry, arguments)
        cuts = dict(zip(numbers, carried, strict=True))
        values = [_enter(x, cuts[i]) if i in cuts else x for i, x in enumerate(arrays)]
        specs = [_as_whole(x, cuts[i]) if i in cuts else x for i, x in enumerate(values)]
        (params, *inputs), keywords = join_static(specs, static)
        whole = specs_beside(surgery.whole, params)
        return dataclasses.replace(surgery, whole=whole).plan(inputs, keywords).run(values)

    def small_fn(params: Params, *inputs: Any, **keywords: Any) -> Any:
        _check_small(params, surgery.whole, surgery.kept)
        arrays, static = split_static(((params, *inputs), keywords))
        return run(arrays, static)

    return small_fn


def _enter(x: Any, cut: Sequence[tuple[int, np.ndarray] | None]) -> Any:
    """Cut an array of a carry that is whole, and pass one that has been cut."""
    indices: list[np.ndarray | None] = []
    for n, axis in zip(jnp.shape(x), cut, strict=True):
        if axis is not None and n not in (axis[0], len(axis[1])):
            raise ValueError(
                f"The small function got a carry of shape {jnp.shape(x)}, of which an axis of {n} "
                f"is cut from {axis[0]} to {len(axis[1])}. Pass the whole carry or the small one, "
                "which comes out of it."
            )
        indices.append(axis[1] if axis is not None and n == axis[0] else None)
    return take(x, indices)


def _as_whole(x: Any, cut: Sequence[tuple[int, np.ndarray] | None]) -> jax.ShapeDtypeStruct:
    shape = [n if axis is None else axis[0] for n, axis in zip(jnp.shape(x), cut, strict=True)]
    return specs_beside(jax.ShapeDtypeStruct(shape, x.dtype), x)


def _check_small(params: Params, whole: Params, kept: Kept) -> None:
    """Refuse params of other shapes than the cut leaves."""
    got: Any = jax.tree.structure(params)
    wanted: Any = jax.tree.structure(whole)
    if got != wanted:
        raise ValueError(
            f"The small function wants params of the structure {wanted}, but got {got}. Pass "
            "those that `jp.shrink` gave, or that were trained from them."
        )
    wrong = []
    leaves = leaves_with_path(params)
    for (name, leaf), full in zip(leaves, jax.tree.leaves(whole), strict=True):
        if is_array(full):
            want = list(full.shape)
            for axis, indices in kept.get(name, {}).items():
                want[axis] = count(indices, axis)
            if tuple(want) != jnp.shape(leaf):
                wrong.append(f"{name!r} has shape {jnp.shape(leaf)}, wanted {tuple(want)}")
    if wrong:
        raise ValueError(
            f"The small function got params that it was not cut for: {'; '.join(wrong[:6])}. Pass "
            "those that `jp.shrink` gave, or that were trained from them."
        )
