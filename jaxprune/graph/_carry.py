"""What goes into a function and comes out again: a recurrent carry, running statistics."""

# A recurrent state is an input and an output at once, so that it would stay whole on both sides and
# hold all that it meets. Where the caller names it, what goes in has axes that can be cut, those of
# its new value are joined with them, and the small function takes and gives a small state.
#
#     fn(params, carry, x) -> (carry, out)     carry=(1, 0): argument 1 comes back as result 0

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp

from jaxprune._tree import is_array, leaves_with_path, list_paths

Place: TypeAlias = int | str
# Where it goes in among the arguments, and where it comes out among the results, or None.
Carry: TypeAlias = tuple[Place, Place | None] | Mapping[Place, Place | None]
Leaves = Sequence[tuple[str, Any]]


def carry_pairs(carry: Carry | None, arguments: Any, results: Any) -> dict[int, int | None]:
    """For each array of a carry, by its number among those given, the number of its new value.

    ``arguments`` are positional ones, the params first, and a dict of keywords.
    """
    given = _arrays(arguments)
    made = leaves_with_path(results)
    pairs: dict[int, int | None] = {}
    for place, old in _inputs(carry, given):
        back = _as_mapping(carry)[place]
        if back is None:
            pairs |= dict.fromkeys(old)
            continue
        new = _below(made, back)
        if _kinds(given, old) != _kinds(made, new):
            raise ValueError(
                f"`carry` says that the argument {place!r} comes back as the result {back!r}, but "
                f"{_kinds(given, old)} goes in and {_kinds(made, new) or 'nothing'} comes out; the "
                f"results are {list_paths([name for name, _ in made])}. Name the place of the new "
                "value, or None if there is none."
            )
        pairs.update(zip(old, new, strict=True))
    return pairs


def carry_inputs(carry: Carry | None, arguments: Any) -> list[int]:
    """The numbers of the arrays of a carry among those given."""
    return [number for _, numbers in _inputs(carry, _arrays(arguments)) for number in numbers]


def _arrays(arguments: Any) -> Leaves:
    found = [(path, leaf) for path, leaf in leaves_with_path(arguments) if is_array(leaf)]
    return [(path.partition("/")[2], leaf) for path, leaf in found]


def _inputs(carry: Carry | None, given: Leaves) -> Iterator[tuple[Place, list[int]]]:
    """For each carry its place and the numbers of its arrays."""
    for place in _as_mapping(carry):
        numbers = _below(given, place)
        if not numbers or str(place).split("/")[0] in ("", "0"):
            beside = [name for name, _ in given if name.split("/")[0] != "0"]
            raise ValueError(
                f"`carry` names the argument {place!r}, but the arrays beside the params are "
                f"{list_paths(beside)}. Count the arguments of `fn` from 0, which are the params, "
                "or give the name of a keyword."
            )
        yield place, numbers


def _as_mapping(carry: Carry | None) -> Mapping[Place, Place | None]:
    if carry is None:
        return {}
    if isinstance(carry, Mapping):
        return carry
    if isinstance(carry, tuple) and len(carry) == 2:
        return dict([carry])
    raise TypeError(
        f"`carry={carry!r}` is neither a pair nor a dict of pairs. Give the place among the "
        "arguments and the place among the results: `carry=(1, 0)` for "
        "`fn(params, carry, x) -> (carry, out)`."
    )


def _below(leaves: Leaves, place: Place) -> list[int]:
    """Numbers of the leaves at a place or below it; "" is everywhere."""
    start = str(place)
    return [
        i for i, (name, _) in enumerate(leaves) if not start or f"{name}/".startswith(f"{start}/")
    ]


def _kinds(leaves: Leaves, numbers: Sequence[int]) -> list[str]:
    found = [leaves[i][1] for i in numbers]
    return [f"{getattr(x, 'dtype', type(x).__name__)}{list(jnp.shape(x))}" for x in found]
