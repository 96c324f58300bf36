"""How many units go: ``round(sparsity * n)``, counted by Python where the number is known."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._numbers import is_number, is_tree
from jaxprune._ranking import floor, in_words, is_lazy, read, where
from jaxprune._tree import Keys, is_hole, leaves_by_keys, list_paths, slots
from jaxprune.typing import Sparsity, Units

MOST_UNITS = 2**31 - 1  # that an int32 counts; beyond it counts are ``Whole``


class Counts(NamedTuple):
    """What our scopes take in the place of a sparsity: how many units each ranking keeps.

    Attributes:
      kept: integers, or ``Whole``, known or traced, in an order that the scope knows.
    """

    kept: tuple[Any, ...]


F = TypeVar("F", bound=Callable[..., Any])


def counted_by(counts: Callable[..., Any], lazily: Callable[..., Units]) -> Callable[[F], F]:
    """Let a scope that is a plain function declare how it counts, and how it keeps lazily."""

    def declare(scope: F) -> F:
        scope.counts = counts  # type: ignore[attr-defined]
        scope.lazily = lazily  # type: ignore[attr-defined]
        scope.lazy = True  # type: ignore[attr-defined]
        return scope

    return declare


def read_kept(keep: Units, within: Units) -> Units:
    """Bools of what a scope keeps lazily, without what is gone already."""
    if within is None:
        return jax.tree.map(read, keep, is_leaf=is_lazy)
    return jax.tree.map(lambda k, alive: read(k) & read(alive), keep, within, is_leaf=is_lazy)


def removed(sparsity: Any, n: int) -> Any:
    """Count the units to remove out of ``n``: ``round(sparsity * n)``, ties to even.

    A number that is known now is multiplied in float64. A traced one is the float32 that it is,
    and so is the product: within 1 + n / 2**23 of the count for the number that was meant, which
    is exact but for ties up to some hundred thousand units. Where the number is known, ask here
    outside of the trace, and let the count be what is traced.

    Args:
      sparsity: a number in [0, 1], or a traced one `[]`.
      n: units.

    Returns:
      An integer of Python, or a traced one `[]`: int32, or ``Whole`` from 2**31 units on.
    """
    if is_number(sparsity):
        return round(float(sparsity) * n)
    share = jnp.asarray(sparsity)
    wide = share.astype(jnp.promote_types(share.dtype, jnp.float32))  # an integer is 0 or 1
    # Above 2**24 a float32 may round up to more than there are.
    most = np.nextafter(wide.dtype.type(n), 0) if wide.dtype.type(n) > n else wide.dtype.type(n)
    count = jnp.round(jnp.minimum(wide * float(n), most))
    if n <= MOST_UNITS:
        return jnp.where(wide >= 1, n, count.astype(jnp.int32))
    return where(wide >= 1, in_words(n), floor(count))


def leaves_of(units: Units) -> list[Any]:
    """The units of each leaf, lazy ones as they are."""
    return jax.tree.leaves(units, is_leaf=is_lazy)


def one_each(units: Units, sparsity: Sparsity, user: str) -> list[Any]:
    """List the sparsity of each leaf of ``units``, in order, from a number or a tree of them."""
    if not is_tree(sparsity):
        return [sparsity] * len(leaves_of(units))
    wanted = [slot.keys for slot in _named(units)]
    given: dict[Keys, Any] = leaves_by_keys(sparsity)
    missing = ["/".join(keys) for keys in wanted if keys not in given]
    extra = ["/".join(keys) for keys in given if keys not in wanted]
    if missing or extra:
        raise ValueError(
            f"`{user}` got a tree of sparsities that does not mirror the prunable leaves: none "
            f"for {list_paths(missing)}; not prunable {list_paths(extra)}. Make it with "
            "`jp.scopes.uniform`, `erk` or `custom` and the same `where`."
        )
    return [given[keys] for keys in wanted]


def _named(units: Units) -> list[Any]:
    found = slots(units, lambda x: is_hole(x) or is_lazy(x))
    return [slot for slot in found if not is_hole(slot.leaf)]


def kept(sizes: Sequence[int], sparsities: Sequence[Any]) -> Counts:
    """Count what stays of each ranking."""
    # Once for all rankings of a size: as traced operations they are the most of a trace.
    pairs = [(id(s), n) for s, n in zip(sparsities, sizes, strict=True)]
    distinct = {(id(s), n): (s, n) for s, n in zip(sparsities, sizes, strict=True)}
    counts = {pair: _kept(*given) for pair, given in distinct.items()}
    return Counts(tuple(counts[pair] for pair in pairs))


def _kept(sparsity: Any, n: int) -> Any:
    out = removed(sparsity, n)
    if n <= MOST_UNITS:
        return n - out
    return in_words(n - out) if isinstance(out, int) else in_words(n) - out
