"""Calibration data: batches as somebody passes them, checked and taken apart into arrays."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from jaxprune._errors import short
from jaxprune._tree import join_static, split_static
from jaxprune.typing import Leaf

Batches: TypeAlias = Sequence[Any] | Callable[[], Any]  # of tuples of inputs, or of single arrays


class Calibration(NamedTuple):
    """Batches of inputs that are alike.

    Attributes:
      arrays: of each batch, in the order in which they go into the program.
      static: what else a batch holds, the same in all.
    """

    arrays: list[list[Leaf]]
    static: Any

    def inputs(self, number: int = 0) -> tuple[Any, ...]:
        """One batch as it was passed."""
        return join_static(self.arrays[number], self.static)


def read_batches(batches: Batches, user: str) -> Calibration:
    """Read batches, and refuse those that no program takes one after another.

    Raises:
      TypeError: an iterator that is gone once it has been read, one array for all, or shapes.
      ValueError: there are no batches, or they are not alike.
    """
    given: Any = batches() if callable(batches) else batches
    if not callable(batches) and isinstance(given, Iterator):
        raise TypeError(
            f"`{user}` got batches as {short(given)}, which is gone once it has been read. Pass a "
            "list of batches, or a function that gives a fresh iterator."
        )
    if hasattr(given, "dtype"):  # its rows would be taken for batches
        raise TypeError(
            f"`{user}` got an array of shape {given.shape} as batches. Pass a list of arrays, "
            "`[x]` if it is one batch, or tuples of inputs: `[(x, mask)]`."
        )
    if not isinstance(given, Iterable):
        raise TypeError(
            f"`{user}` got batches as {short(given)}. Pass a list of tuples of inputs of `fn`, or "
            "of arrays."
        )
    read = [batch if isinstance(batch, tuple) else (batch,) for batch in given]
    if not read:
        raise ValueError(
            f"`{user}` got no batches. Pass a list of tuples of inputs of `fn`, or of arrays."
        )
    split = [split_static(batch) for batch in read]
    first, static = split[0]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in first):
        raise TypeError(
            f"`{user}` got shapes as batches. Pass arrays: it looks at what is in them."
        )
    wanted = [_kind(x) for x in first]
    for number, (arrays, other) in enumerate(split):
        got = [_kind(x) for x in arrays]
        if other != static or got != wanted:
            differs = "holds other flags or numbers" if got == wanted else f"has {_listed(got)}"
            raise ValueError(
                f"`{user}` got batches that are not alike: batch {number} {differs}, where batch 0 "
                f"has {_listed(wanted)}. {_alike(wanted, got)}"
            )
    return Calibration([arrays for arrays, _ in split], static)


def _alike(wanted: Sequence[Any], got: Sequence[Any]) -> str:
    """What to do about batches that differ: one that is short, or inputs that are no batches."""
    ranks = lambda kinds: [len(shape) for shape, _ in kinds]  # noqa: E731
    if ranks(wanted) == ranks(got):
        return "Leave out the last one if it is smaller, or pad it."
    return "Inputs that go in together make one batch, a tuple: `[(x, mask), ...]`."


def _kind(x: Leaf) -> tuple[tuple[int, ...], Any]:
    return tuple(jnp.shape(x)), x.dtype


def _listed(kinds: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in kinds) or "no arrays"
