"""What axes look like to who gave no layout, and which zeros are none of the network."""

# Nothing is decided here. A shape may be a stack of layers or a convolution, a square kernel may be
# laid out either way; but a bias beside a kernel, or a name of a library, tell enough to ask.

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from jaxprune._layout import Layout
from jaxprune._tree import leaves_with_path, list_paths, map_with_path
from jaxprune._use import Use
from jaxprune._where import is_array, name_of
from jaxprune.typing import Masks, Params

Shape: TypeAlias = tuple[int, ...]

_BIAS = ("bias", "b")
_HEADS = r"(?i:q|k|v|query|key|value)(_?proj|_?kernel)?"
_STACK = r"(?i:.*(layers?|blocks?|stack|scan|repeat)(_?\w*[a-z])?)"  # not `layers_0`, which is one
_CONV = r"(?i:.*conv.*|.*patch.*)"


def advice_on_axes(params: Params, masks: Masks, layout: Layout | None) -> list[str]:
    """Say what looks odd about the axes of leaves that have a mask: a sentence for each kind."""
    covered: dict[str, Shape] = {}

    def visit(path: str, p: Any, m: Any) -> None:
        if m is not None:
            covered[path] = tuple(p.shape)

    map_with_path(visit, params, masks)
    shapes = {path: tuple(x.shape) for path, x in leaves_with_path(params) if is_array(x)}
    unknown = {
        path: shape
        for path, shape in covered.items()
        if layout is None or not any(layout.roles(path, len(shape)))
    }
    return [*_derived(covered, layout), *_looks(unknown, shapes)]


def _derived(covered: Mapping[str, Shape], layout: Layout | None) -> Iterator[str]:
    """Leaves whose zeros are no zeros of the network."""
    for path, shape in covered.items():
        for use in () if layout is None else layout.uses(path, len(shape)):
            if use.kind == "derived":
                yield f"{path!r} goes through {use.through or 'a function'}: {_becomes(use)}"


def _becomes(use: Use) -> str:
    if use.zero is None:
        return "what becomes of a removed weight depends on others; it is no zero of the network"
    return f"a removed weight becomes {use.zero:.3g}, and is no zero of the network"


def _looks(unknown: Mapping[str, Shape], shapes: Mapping[str, Shape]) -> Iterator[str]:
    biases = {path: _bias(path, shapes) for path in unknown}
    heads = [p for p, s in unknown.items() if _like_heads(p, s, biases[p])]
    stacks = [
        p for p, s in unknown.items() if p not in heads and _like_stack(p, s, biases[p], unknown)
    ]
    turned = [
        p for p, s in unknown.items() if p not in [*heads, *stacks] and _like_rows(p, s, biases[p])
    ]
    if stacks:
        n = unknown[stacks[0]][0]
        yield (
            f"{list_paths(stacks, 3)} look like stacks of {n} layers, and each counts as one leaf. "
            "With `layout=jp.find_layout(fn, params, *inputs)` layers are ranked one by one."
        )
    if turned:
        yield (
            f"{list_paths(turned, 3)} look like [out, in], where numbers of axes count for "
            "[in, out]. Name axes by their roles, with `layout=jp.layouts.torch` or "
            "`jp.find_layout`."
        )
    if heads:
        yield (
            f"{list_paths(heads, 3)} look like [in, heads, parts], where `windows(m)` ranks heads "
            'along axis -2. Use `windows(m, axis="in")` with a `layout=`.'
        )


def _bias(path: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the bias beside a kernel."""
    owner = path.rpartition("/")[0]
    found = (f"{owner}/{name}" if owner else name for name in _BIAS)
    return next((shapes[p] for p in found if p in shapes and p != path), None)


def _owner(path: str) -> str:
    words = path.split("/")
    return words[-2] if len(words) > 1 else ""


def _like_heads(path: str, shape: Shape, bias: Shape | None) -> bool:
    named = re.fullmatch(_HEADS, _owner(path)) is not None
    return len(shape) == 3 and (named if bias is None else bias == shape[1:])


def _like_stack(path: str, shape: Shape, bias: Shape | None, others: Mapping[str, Shape]) -> bool:
    if len(shape) < 3 or re.fullmatch(_CONV, _owner(path)) or re.fullmatch(_CONV, name_of(path)):
        return False
    if bias is not None:
        return len(bias) > 1 and bias[0] == shape[0] and bias[-1] in shape[1:]
    named = any(re.fullmatch(_STACK, word) for word in path.split("/")[:-1])
    beside = [s for p, s in others.items() if p != path and s[:1] == shape[:1] and s != shape]
    return named and len(shape) == 3 and bool(beside)


def _like_rows(path: str, shape: Shape, bias: Shape | None) -> bool:
    if len(shape) < 2:
        return False
    if bias is not None and len(bias) == 1 and shape[0] != shape[-1]:
        return bias[0] == shape[0] and name_of(path) != "kernel"
    return name_of(path) == "weight"
