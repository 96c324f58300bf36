"""Leaves that are alike, as the layers of a network: one body of a program serves them all."""

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

T = TypeVar("T")
Stack: TypeAlias = tuple[int, ...]  # positions, in a list of leaves, of those that are alike

FEWEST = 4  # that share a body: each is copied when it is read, an n-th of what n leaves hold


def stacks(leaves: Sequence[Any], names: Sequence[str], kinds: Sequence[Hashable]) -> list[Stack]:
    """Group leaves of one shape, whose names differ in numbers at most.

    Names tell where types do not how leaves lie on a mesh: layers of one name are sharded alike.
    Those of one shape under two names may not be, and one body for both would move one of them.

    Args:
      leaves: arrays, or trees of them.
      names: for each leaf, such as ``"layers/3/kernel"``.
      kinds: for each leaf whatever else has to be equal.

    Returns:
      Every leaf in exactly one stack, by its position.
    """
    found: dict[Hashable, list[int]] = {}
    for i, (leaf, name, kind) in enumerate(zip(leaves, names, kinds, strict=True)):
        arrays, structure = jax.tree.flatten(leaf)
        types = tuple(map(jax.typeof, arrays))  # shapes, dtypes, and the mesh axes they vary over
        found.setdefault((re.sub(r"\d+", "#", name), types, structure, kind), []).append(i)
    return [
        part
        for stack in found.values()
        for part in ([tuple(stack)] if len(stack) >= FEWEST else [(i,) for i in stack])
    ]


def each(f: Callable[..., jax.Array], leaves: Sequence[T], *beside: Any) -> jax.Array:
    """Call a function with each leaf of a stack in turn, as one body in a loop.

    Args:
      f: from a leaf, and its entries of ``beside``, to an array `[...]`.
      leaves: `n` that are alike.
      *beside: trees of arrays `[n, ...]`.

    Returns:
      What came out, stacked `[n, ...]`.
    """
    at = lambda i: jax.tree.map(lambda x: x[i], beside)  # noqa: E731
    if len(leaves) == 1:
        return f(leaves[0], *at(0))[None]
    branches = [lambda leaf=leaf: leaf for leaf in leaves]
    return lax.map(lambda i: f(lax.switch(i, branches), *at(i)), jnp.arange(len(leaves)))
