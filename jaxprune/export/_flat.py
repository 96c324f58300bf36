"""Params as flat tensors with names, in the layout of other people's files."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np

from jaxprune._errors import short
from jaxprune._layers import names_of
from jaxprune._layout import Layout, check_layout
from jaxprune._masks import check_masks, unpack
from jaxprune._tree import list_paths, match
from jaxprune.checkpoint._leaves import every_slot, named, on_host
from jaxprune.export._turn import numbered_axes, turned, with_biases
from jaxprune.typing import Masks, Params

Names: TypeAlias = Mapping[str, str] | Callable[[str], str] | None


class Tensor(NamedTuple):
    """An array of a file.

    Attributes:
      name: in the file.
      path: of the leaf of the params that it is, or is a layer of.
      value: on the host, in C order, zero where the mask is False, and never a negative zero: a
        file of zeros of both signs compresses worse.
      removed: bool like ``value``, what its mask removes; None without a mask.
    """

    name: str
    path: str
    value: np.ndarray
    removed: np.ndarray | None


def tensors_of(
    user: str, params: Params, *, layout: Layout | None, names: Names, masks: Masks | None
) -> list[Tensor]:
    """List the arrays of params as a file is to have them: masked, by layers, turned and named."""
    leaves = {p: x for p, x in named(params, f"export.{user}(...)").items() if x is not None}
    _check_values(user, leaves)
    check_layout(f"export.{user}", layout)
    settled = None if layout is None else with_biases(layout.on(params, f"export.{user}"))
    mask_at = _masks(user, params, masks)
    templates = _templates(user, list(leaves), names)
    found: list[Tensor] = []
    for path, leaf in leaves.items():
        value, mask = on_host(leaf), mask_at.get(path)
        axes = numbered_axes(user, path, value.shape, templates.get(path), settled)
        called = _called(path, templates.get(path), value.shape, axes)
        removed = None if mask is None else ~np.broadcast_to(mask, value.shape)
        parts = turned(user, path, value, axes, settled)
        gone = (
            [None] * len(parts) if removed is None else turned(user, path, removed, axes, settled)
        )
        for name, part, out in zip(called, parts, gone, strict=True):
            found.append(Tensor(name, path, _clean(part, out), out))
    _check_text(user, found)
    _check_twice(user, found)
    return found


def _clean(value: np.ndarray, removed: np.ndarray | None) -> np.ndarray:
    """Write zeros where something is removed, and in the place of negative zeros."""
    zero = value == 0 if removed is None else (value == 0) | removed
    return np.asarray(np.where(zero, np.zeros((), value.dtype), value), order="C")


def _check_values(user: str, leaves: Mapping[str, Any]) -> None:
    kinds = jax.ShapeDtypeStruct | jax.core.Tracer
    bare = [path for path, leaf in leaves.items() if isinstance(leaf, kinds)]
    if bare:
        raise TypeError(
            f"`export.{user}` got {list_paths(bare)} without values. Pass arrays, outside of `jit`."
        )
    if not leaves or "" in leaves:
        what = "an array without a name" if leaves else "no arrays"
        raise ValueError(f"`export.{user}` got {what}. Pass a dict or another tree of arrays.")


def _masks(user: str, params: Params, masks: Masks | None) -> dict[str, np.ndarray]:
    if masks is None:
        return {}
    step = (
        "Nest the masks as the arrays are; `jp.get_masks` takes them out of an optimizer's state."
    )
    whole = match(unpack(masks), params, f"export.{user}(masks)", gaps="any", fits=None, step=step)
    slots = every_slot(check_masks(whole, params, "masks"))
    return {slot.path: np.asarray(slot.leaf) for slot in slots if slot.leaf is not None}


# Names.


def _templates(user: str, paths: list[str], names: Names) -> dict[str, str]:
    """What the user calls each leaf; nothing where names are to stay as they are."""
    if names is None:
        return {}
    if callable(names):
        found = {path: names(path) for path in paths}
        _check_names(user, found, "Let the function return a string for each path.")
        return found
    if not isinstance(names, Mapping):
        raise TypeError(
            f"`export.{user}` got names={short(names)}. Pass a mapping from paths to names in the "
            "file, or a function: `lambda path: table.get(path, path)`."
        )
    missing = [path for path in paths if path not in names]
    unknown = [path for path in names if path not in paths]
    if missing or unknown:
        parts = [f"says nothing of {list_paths(missing)}"] * bool(missing)
        parts += [f"knows {list_paths(unknown)}, which the params lack"] * bool(unknown)
        raise ValueError(
            f"`export.{user}(names=...)` {' and '.join(parts)}. Name each leaf by its path, or "
            "pass a function: `lambda path: table.get(path, path)`."
        )
    _check_names(user, names, "Pass a string for each path.")
    return dict(names)


def _check_names(user: str, names: Mapping[str, str], step: str) -> None:
    wrong = [path for path, name in names.items() if not isinstance(name, str) or not name]
    if wrong:
        raise TypeError(
            f"`export.{user}(names=...)` gives {short(names[wrong[0]])} for {list_paths(wrong)}. "
            f"{step}"
        )


def _called(
    path: str, template: str | None, shape: tuple[int, ...], axes: tuple[int, ...]
) -> list[str]:
    """Name each layer: numbers go where ``{}`` stands."""
    if template is None:
        return names_of(path, shape, axes)
    numbers = np.ndindex(*(shape[i] for i in axes))
    return [_filled(template, index) for index in numbers]


def _filled(template: str, index: Iterable[int]) -> str:
    for i in index:
        template = template.replace("{}", str(i), 1)
    return template


def is_text(value: str) -> bool:
    """Say whether a string can be written: halves of characters, of names of files, cannot."""
    return value.encode(errors="ignore").decode() == value


def _check_text(user: str, tensors: list[Tensor]) -> None:
    bad = [t.name for t in tensors if not is_text(t.name)]
    if bad:
        raise ValueError(
            f"`export.{user}` got names that UTF-8 has no place for: {list_paths(bad)}. Give them "
            "others with `names=`."
        )


def _check_twice(user: str, tensors: list[Tensor]) -> None:
    owners: dict[str, list[str]] = {}
    for tensor in tensors:
        owners.setdefault(tensor.name, []).append(tensor.path)
    twice = [f"{name!r} for {list_paths(paths)}" for name, paths in owners.items() if paths[1:]]
    if twice:
        raise ValueError(
            f"`export.{user}` would write several arrays of one name: {'; '.join(twice[:6])}. Give "
            "each its own with `names=`."
        )


# What a file has, beside what it was made of.


def zeros_of(tensors: list[Tensor], got: Mapping[str, np.ndarray]) -> tuple[float | None, int]:
    """The share of removed weights that are 0 in a file, and how many others became 0.

    Where no leaf has a mask all zeros count as removed.
    """
    masked = any(t.removed is not None for t in tensors)
    removed = kept = zeroed = 0
    for t in tensors:
        gone = t.removed if masked else t.value == 0
        zero = got[t.name] == 0
        zeroed += int(np.sum(zero & (t.value != 0)))
        if gone is not None:
            removed, kept = removed + int(np.sum(gone)), kept + int(np.sum(gone & zero))
    return (kept / removed if removed else None), zeroed


def unequal_layers(tensors: Iterable[Tensor]) -> list[str]:
    """Say which layers of one name have other shapes than the others: one line for each name."""
    found: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for t in tensors:
        numbers = re.findall(r"(?:^|[./])(\d+)(?=[./]|$)", t.name)
        if numbers:
            general = re.sub(r"(^|[./])\d+(?=[./]|$)", r"\1{}", t.name)
            shapes = found.setdefault(general, {})
            shapes.setdefault(t.value.shape, []).append(".".join(numbers))
    return [
        f"{name!r} is "
        + ", ".join(f"{list(s)} in {_layers(at)}" for s, at in sorted(shapes.items()))
        for name, shapes in found.items()
        if len(shapes) > 1
    ]


def _layers(numbers: list[str], most: int = 8) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"layer{'s' * (len(numbers) > 1)} {', '.join(numbers[:most])}{more}"
