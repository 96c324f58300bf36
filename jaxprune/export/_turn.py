"""Arrays laid out as PyTorch has them: a tensor for each layer, outputs before inputs."""

# By the roles of its axes a leaf becomes
#
#     (layer, in, out)             for each layer [out, in]
#     (in, out, out)               [out * out, in], as in attention: heads times features
#     (window, window, in, out)    [out, in, window, window]
#     (layer, group, in, out)      for each layer [group, out, in], or [out, in] for each expert,
#                                  by the places that its name has for numbers
#     (None, out), (None,), ...    as it is: tables, gains, biases
#
# A layout calls the axes of a bias nothing, since they are contracted with nothing. Beside a kernel
# (in, out, out) of [128, 2, 64] one of [2, 64] is (out, out) all the same, and becomes [128].

import dataclasses
import itertools
import math

import numpy as np

from jaxprune._layout import Layout
from jaxprune._use import Entry, Role, Use

ORDER: tuple[Role, ...] = ("group", "out", "in", "window")


def with_biases(layout: Layout) -> Layout:
    """Give each bias the roles of the outputs of kernels beside it, where the sizes fit."""
    kernels: dict[str, list[Entry]] = {}
    for entry in layout.entries:
        if {"in", "out"} <= set(_roles(layout, entry)):
            kernels.setdefault(_parent(entry.path), []).append(entry)
    beside = [kernels.get(_parent(entry.path), []) for entry in layout.entries]
    pairs = zip(layout.entries, beside, strict=True)
    return Layout(tuple(_like_outputs(layout, entry, others) for entry, others in pairs))


def _like_outputs(layout: Layout, bias: Entry, kernels: list[Entry]) -> Entry:
    """Name the axes of a bias as all kernels do that have these, beside inputs and windows."""
    found = set()
    for kernel in kernels:
        axes = zip(_roles(layout, kernel), kernel.shape or (), strict=True)
        outputs = [(role, n) for role, n in axes if role in ("layer", "group", "out")]
        if tuple(n for _, n in outputs) == bias.shape:
            found.add(tuple(role for role, _ in outputs))
    if len(found) != 1 or any(use.kind != "bias" for use in bias.uses):
        return bias
    (roles,) = found
    pairs = zip(_roles(layout, bias), roles, strict=True)
    if any(now != role and (now or role == "layer") for now, role in pairs):
        return bias  # known to be something else; loops over layers are always known
    return dataclasses.replace(bias, uses=(Use("bias", roles),))


def _roles(layout: Layout, entry: Entry) -> tuple[Role, ...]:
    return layout.roles(entry.path, entry.rank)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def numbered_axes(
    user: str, path: str, shape: tuple[int, ...], name: str | None, layout: Layout | None
) -> tuple[int, ...]:
    """The axes whose indices are tensors of their own: those of layers, and groups if so named."""
    roles = () if layout is None else layout.roles(path, len(shape))
    layers = tuple(i for i, role in enumerate(roles) if role == "layer")
    if name is None:
        return layers
    groups = tuple(i for i, role in enumerate(roles) if role in ("layer", "group"))
    places = name.count("{}")
    if places not in (len(layers), len(groups)):
        how = (
            f"its axes are ({', '.join(role or '?' for role in roles)})"
            if layout is not None
            else "nothing is known of its axes: pass `layout=`"
        )
        raise ValueError(
            f"`export.{user}(names=...)` calls {path!r} of shape {list(shape)} {name!r}, with "
            f"{places} places for numbers; {how}. Write one '{{}}' for each axis of layers "
            f"({len(layers)})."
        )
    return layers if places == len(layers) else groups


def turned(
    user: str, path: str, x: np.ndarray, numbered: tuple[int, ...], layout: Layout | None
) -> list[np.ndarray]:
    """Take a leaf apart along its numbered axes, and put the others of each part in order.

    Returns:
      Views where NumPy can, the last of the numbered axes running fastest.
    """
    if layout is None:
        return [x]
    own = [i for i in range(x.ndim) if i not in numbered]
    roles = layout.roles(path, x.ndim)
    own_roles = [roles[i] for i in own]
    if None in own_roles:
        _check_told(user, path, x.shape, own_roles, layout)
        order, shape = own, [x.shape[i] for i in own]
    else:
        order = sorted(own, key=lambda i: ORDER.index(roles[i]))
        shape = _merged([(roles[i], x.shape[i]) for i in order])
    parts = x.transpose(*numbered, *order)
    indices = itertools.product(*(range(x.shape[i]) for i in numbered))
    return [parts[index].reshape(shape) for index in indices]


def _merged(axes: list[tuple[Role, int]]) -> list[int]:
    """Sizes once several axes of outputs are one, and several of inputs."""
    runs = [(role, [n for _, n in run]) for role, run in itertools.groupby(axes, lambda a: a[0])]
    return [
        size
        for role, sizes in runs
        for size in ([math.prod(sizes)] if role in ("in", "out") else sizes)
    ]


def _check_told(
    user: str, path: str, shape: tuple[int, ...], roles: list[Role], layout: Layout
) -> None:
    """Refuse a kernel of whose axes nobody can tell which is what; tables and vectors may stay."""
    why = layout.why(path, len(shape))
    kinds = {use.kind for use in layout.uses(path, len(shape))}
    lost = len(roles) > 1 and not any(roles) and kinds == {"unknown"} and why != "declared so"
    if "in" in roles or lost:
        raise ValueError(
            f"`export.{user}` cannot lay out {path!r} of shape {list(shape)} as "
            f"({', '.join(role or '?' for role in layout.roles(path, len(shape)))}): {why}. "
            f"Declare all of its axes: `layout | jp.Layout({{{path!r}: (...)}})`, as "
            '("in", "out"), or ("out", "in") for what is to stay as it is.'
        )
