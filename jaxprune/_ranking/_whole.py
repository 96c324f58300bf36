"""Whole numbers beyond an int32, in two words: how many units, where there are billions."""

import dataclasses
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

WORD = 16  # bits of the low word

X = TypeVar("X")
Array: TypeAlias = Any  # of jax, or of NumPy where it is known


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """An array of numbers of up to 31 + 16 bits: ``high * 2**16 + low``.

    Devices count in 32 bits, and the largest leaves have more units than that. Sums of both words
    are exact for up to 2**15 numbers, and then ``carried`` brings the low one back into its range.

    Attributes:
      high: int32 `[...]`; negative in differences.
      low: int32 `[...]`, in [0, 2**16).
    """

    high: Array
    low: Array

    def __add__(self, other: "Whole") -> "Whole":
        return carried(self.high + other.high, self.low + other.low)

    def __sub__(self, other: "Whole") -> "Whole":
        return carried(self.high - other.high, self.low - other.low)

    def __ge__(self, other: "Whole") -> jax.Array:
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))

    def differs(self, other: "Whole") -> jax.Array:
        """Say where two numbers are not the same: bools `[...]`."""
        return (self.high != other.high) | (self.low != other.low)

    def __int__(self) -> int:
        """The exact number, of one whose values are known."""
        return int(self.high.item()) * 2**WORD + int(self.low.item())

    @property
    def float(self) -> jax.Array:
        """The nearest float32 `[...]`."""
        low: jax.Array = jnp.asarray(self.low, jnp.float32)
        return jnp.asarray(self.high, jnp.float32) * 2**WORD + low


def in_words(n: "int | Array | Whole") -> Whole:
    """Split a number into its words: an integer of any size, or an array of int32."""
    if isinstance(n, Whole):
        return n
    if isinstance(n, int):
        return Whole(np.int32(n >> WORD), np.int32(n & (2**WORD - 1)))
    return Whole(n >> WORD, n & (2**WORD - 1))


def floor(x: jax.Array) -> Whole:
    """Round floats in [0, 2**47) down."""
    high = jnp.floor(x / 2**WORD)
    return Whole(high.astype(jnp.int32), jnp.floor(x - high * 2**WORD).astype(jnp.int32))


def carried(high: Array, low: Array) -> Whole:
    """Bring the low word back into its range; it may be negative."""
    return Whole(high + (low >> WORD), low & (2**WORD - 1))


def where(condition: jax.Array, yes: X, no: X) -> X:
    """Choose between whole numbers, or any other trees of arrays."""
    return jax.tree.map(lambda y, n: jnp.where(condition, y, n), yes, no)


def least(a: Whole, b: Whole) -> Whole:
    """The smaller one of each two."""
    return where(a >= b, b, a)
