"""How many units go: ``round(sparsity * n)`` as Python computes it, traced or not."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MOST_UNITS = 2**31 - 1  # counts are int32 on every device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """A sparsity in units of 2**-93, as three words: a float64 that survives a jit without x64.

    A traced sparsity is a float32 there, and float32(0.7) is not 0.7. Where the number is known
    outside of the jit it travels as this, and every count comes out as in Python. A scope of
    somebody else's can take it for the float32 that it stands for.
    """

    words: Any  # uint32 [3], highest first, 31 bits each (the first may be 2**31)
    digits: Any  # int32, binary digits of the format that the number came in

    def __jax_array__(self) -> jax.Array:
        return jnp.sum(self.words.astype(jnp.float32) * np.exp2([-31, -62, -93], dtype=np.float32))

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
    """Write a sparsity, known or traced, in fixed point."""
    if isinstance(sparsity, Fixed):
        return sparsity
    if is_number(sparsity):
        n = round(math.ldexp(float(sparsity), 93))
        words = np.array([n >> 62, (n >> 31) & int(_WORD), n & int(_WORD)], np.uint32)
        return Fixed(words, np.int32(53))
    rest = jnp.asarray(sparsity)
    wide = jnp.promote_types(rest.dtype, jnp.float32)  # an integer is 0 or 1
    narrow = rest.dtype if jnp.issubdtype(rest.dtype, jnp.floating) else wide
    digits, rest = jnp.finfo(narrow).nmant + 1, rest.astype(wide)
    parts = []
    for _ in range(3):  # every step is exact: a shift, a floor, and what the floor left over
        part = jnp.floor(rest * 2.0**31)
        rest = rest * 2.0**31 - part
        parts.append(part.astype(jnp.uint32))
    return Fixed(jnp.stack(parts), jnp.int32(digits))


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
    fixed = fix(sparsity)
    high, middle, low = (_multiply(jnp.asarray(fixed.words)[i], n) for i in range(3))

    # sparsity * n = whole + a fraction of three words, the carries passed on.
    part_low = low[1]
    sum_middle = middle[1] + low[0]
    sum_high = high[1] + middle[0] + (sum_middle >> 31)
    whole = high[0] + (sum_high >> 31)
    part_middle, part_high = sum_middle & _WORD, sum_high & _WORD

    # How far the fraction is from one half, on either side of it.
    above = part_high >= _HALF
    borrow = (part_low > 0).astype(jnp.uint32)
    less = part_middle + borrow
    gap_high = jnp.where(above, part_high - _HALF, _HALF - part_high - (less > 0))
    gap_middle = jnp.where(above, part_middle, (np.uint32(0) - less) & _WORD)

    # A tie is what float64 cannot tell from one: half a step of the product, 2**step of our units.
    exponent = jnp.where(whole > 0, 31 - lax.clz(whole).astype(jnp.int32), jnp.where(above, -1, -2))
    step = jnp.minimum(exponent + 93 - fixed.digits, 90)  # never more than an eighth of a unit
    one = jnp.ones_like(whole)
    step_high = jnp.where(step >= 62, one << jnp.maximum(step - 62, 0).astype(jnp.uint32), 0)
    step_middle = jnp.where(step < 62, one << jnp.clip(step - 31, 0, 30).astype(jnp.uint32), 0)
    within = (gap_middle < step_middle) | ((gap_middle == step_middle) & (part_low == 0))
    tie = (gap_high < step_high) | ((gap_high == step_high) & within)
    return (whole + jnp.where(tie, whole & 1, above)).astype(jnp.int32)


_WORD = np.uint32(2**31 - 1)
_HALF = np.uint32(2**30)


def _multiply(x: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
    """The product of two words, as (high, low) words of 31 bits."""
    half = np.uint32(0xFFFF)
    a, b, c, d = x >> 16, x & half, np.uint32(n >> 16), np.uint32(n & 0xFFFF)
    cross = a * d + ((b * d) >> 16)
    other = b * c + (cross & half)
    high, low = a * c + (cross >> 16) + (other >> 16), x * np.uint32(n)
    return (high << 1) | (low >> 31), low & _WORD
