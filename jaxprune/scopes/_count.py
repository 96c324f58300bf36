"""How many units go: ``round(sparsity * n)`` as Python computes it, traced or not."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_UNITS = 2**31 - 1  # counts are int32 on every device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """A sparsity in units of 2**-62, as two words: a float64 that survives a jit without x64.

    A traced sparsity is a float32 there, and float32(0.7) is not 0.7. Where the number is known
    outside of the jit it travels as this, and every count comes out as in Python. A scope of
    somebody else's can take it for the float32 that it stands for.
    """

    high: Any  # uint32, up to 2**31
    low: Any  # uint32, below 2**31
    digits: Any  # int32, binary digits of the format that the number came in

    def __jax_array__(self) -> jax.Array:
        return self.high.astype(jnp.float32) * 2.0**-31 + self.low.astype(jnp.float32) * 2.0**-62

    def __mul__(self, other: Any) -> Any:
        return self.__jax_array__() * other

    def __rsub__(self, other: Any) -> Any:
        return other - self.__jax_array__()

    __rmul__ = __mul__


def is_fixed(leaf: Any) -> bool:
    """True for what ``fix`` makes: for ``is_leaf``."""
    return isinstance(leaf, Fixed)


def is_number(sparsity: Any) -> bool:
    """True for a sparsity known now in double precision; a float32 array counts as traced does."""
    if isinstance(sparsity, np.ndarray):
        return sparsity.dtype == np.float64
    return isinstance(sparsity, int | float | np.integer)  # np.float64 is a float


def fix(sparsity: Any) -> Fixed:
    """Write a sparsity, known or traced, in fixed point. Exact down to 2**-62."""
    if isinstance(sparsity, Fixed):
        return sparsity
    if is_number(sparsity):
        words = divmod(round(math.ldexp(float(sparsity), 62)), 2**31)
        return Fixed(np.uint32(words[0]), np.uint32(words[1]), np.int32(53))
    digits = jnp.finfo(jnp.result_type(sparsity)).nmant + 1
    scaled = jnp.asarray(sparsity) * 2.0**31
    high = jnp.floor(scaled)
    low = ((scaled - high) * 2.0**31).astype(jnp.uint32)
    return Fixed(high.astype(jnp.uint32), low, jnp.int32(digits))


def settle(sparsity: Any, final: Any) -> Fixed:
    """Write a traced sparsity in fixed point; where it is ``final``, as the number that is."""
    traced, known = fix(jnp.asarray(sparsity)), fix(final)
    arrived = jnp.asarray(sparsity) == jnp.asarray(final, jnp.result_type(sparsity))
    return jax.tree.map(lambda k, t: jnp.where(arrived, k, t), known, traced)


def removed(sparsity: Any, n: int) -> int | jax.Array:
    """Count the units to remove out of ``n``: ``round(sparsity * n)``, the product in float64.

    Exact for numbers and for ``Fixed``. A traced float32 is taken for the decimal that it was
    written as: what lies within half of its step from a tie is a tie. So it counts as Python does
    too, except that it may be one unit off where ``n`` passes some ten million.
    """
    if is_number(sparsity):
        return round(float(sparsity) * n)
    fixed = jax.tree.map(jnp.asarray, fix(sparsity))  # numpy would warn that words wrap

    # sparsity * n = whole + part * 2**-62, multiplied word by word; a word of `part` has 31 bits.
    upper_high, upper_low = _multiply(fixed.high, n)
    lower_high, lower_low = _multiply(fixed.low, n)
    middle_low = upper_low + ((lower_high << 1) | (lower_low >> 31))
    middle_high = upper_high + (middle_low < upper_low)
    whole = (middle_high << 1) | (middle_low >> 31)
    part_high, part_low = middle_low & _WORD, lower_low & _WORD

    # The distance of `part` from one half, and half a step of the product in its floating format.
    above = part_high >= _HALF
    borrow = (part_low > 0).astype(jnp.uint32)
    gap_high = jnp.where(above, part_high - _HALF, _HALF - part_high - borrow)
    gap_low = jnp.where(above, part_low, (_WORD + np.uint32(1) - part_low) & _WORD)
    exponent = jnp.where(
        whole > 0, 31 - jax.lax.clz(whole).astype(jnp.int32), jnp.where(above, -1, -2)
    )
    bit = jnp.minimum(exponent + 62 - fixed.digits, 59)  # never more than an eighth of a unit
    one = jnp.ones_like(whole)
    step_high = jnp.where(bit >= 31, one << jnp.maximum(bit - 31, 0).astype(jnp.uint32), 0)
    step_low = jnp.where(bit < 31, one << jnp.clip(bit, 0, 30).astype(jnp.uint32), 0)
    tie = (gap_high < step_high) | ((gap_high == step_high) & (gap_low <= step_low))
    return (whole + jnp.where(tie, whole & 1, above)).astype(jnp.int32)


_WORD = np.uint32(2**31 - 1)
_HALF = np.uint32(2**30)


def _multiply(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The 64-bit product of two 32-bit words, as (high, low)."""
    half = np.uint32(0xFFFF)
    a, b, c, d = x >> 16, x & half, np.uint32(n >> 16), np.uint32(n & 0xFFFF)
    cross = a * d + ((b * d) >> 16)
    other = b * c + (cross & half)
    return a * c + (cross >> 16) + (other >> 16), x * np.uint32(n)
