"""How much goes: a sparsity, counts of it, or one that is still on its way to another."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._masks import apply_masks, check_masks
from jaxprune._mesh import reshard_like
from jaxprune._numbers import is_known, plain
from jaxprune._parts import Parts
from jaxprune._tree import join_static, map_leaves, split_static
from jaxprune._values import is_concrete
from jaxprune.typing import DType, Masks, Params, Sparsity, Tree, Units

Amount: TypeAlias = Any  # a Sparsity, what a scope made of one by `counts`, or OnTheWay


class OnTheWay(NamedTuple):
    """A sparsity that grows to a number that is known: exact from when it has arrived.

    Attributes:
      arrived: bool `[]`.
      final: where it goes, numbers or counts.
      now: where it is, float32 each.
    """

    arrived: jax.Array
    final: Any
    now: Sparsity


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vector:
    """A tree of numbers as one array: each array that a program takes costs its call something.

    Attributes:
      values: the leaves one after another, `[n]`.
      treedef: of the tree.
      shapes: of its leaves.
    """

    values: np.ndarray | jax.Array
    treedef: Any = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def tree(self) -> Tree:
        """The numbers where they belong."""
        ends = list(itertools.accumulate(map(math.prod, self.shapes)))
        parts = zip([0, *ends], ends, self.shapes, strict=False)
        leaves = [self.values[start:end].reshape(shape) for start, end, shape in parts]
        return jax.tree.unflatten(self.treedef, leaves)


def vector(tree: Tree, dtype: DType) -> Vector:
    """Put known numbers into one array."""
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [np.asarray(leaf, dtype) for leaf in leaves]
    values = np.concatenate([np.zeros(0, dtype), *(x.ravel() for x in arrays)])
    return Vector(values, treedef, tuple(x.shape for x in arrays))


class Counted(NamedTuple):
    """What a scope counted before the program runs, and the sparsity that it stands for.

    Attributes:
      counts: integers, as the scope declares.
      sparsity: float32 each, for rounds that lead there.
    """

    counts: Vector
    sparsity: Vector


def counted(parts: Parts, params: Params, sparsity: Sparsity) -> tuple[Parts, Amount]:
    """Bind parts to params, and let the scope count before the program runs.

    There Python multiplies in double precision. The counts travel as arrays: one program for all
    sparsities. Inside of somebody's trace a known number stays one, and is counted there; so does
    that of a scope that cannot count.
    """
    arrays, static = split_static(params)
    shapes = tuple((tuple(x.shape), x.dtype) for x in arrays)
    parts, _ = _bound(parts, static, shapes)
    sparsity = parts.of_units(plain(sparsity), parts.prunable(params))
    if not (parts.can_count and is_known(sparsity) and is_concrete(arrays)):
        return parts, sparsity
    leaves, treedef = jax.tree.flatten(sparsity)
    numbers = tuple((np.shape(x), tuple(np.ravel(x).tolist())) for x in leaves)
    return parts, _counts(parts, static, shapes, numbers, treedef)


@functools.lru_cache(maxsize=256)
def _bound(
    parts: Parts, static: Any, shapes: tuple[tuple[tuple[int, ...], DType], ...]
) -> tuple[Parts, Units]:
    """Bind parts, and find the shapes of their units by a trace: once for params that are alike."""
    params = join_static([jax.ShapeDtypeStruct(*shape) for shape in shapes], static)
    parts = parts.bind(params)
    return parts, jax.eval_shape(parts.pool, parts.prunable(params))


@functools.lru_cache(maxsize=256)
def _counts(
    parts: Parts, static: Any, shapes: Any, numbers: tuple[Any, ...], treedef: Any
) -> Counted:
    """Count once for a sparsity and params that are alike; the parts are bound to them."""
    leaves = [np.reshape(x, shape) if shape else x[0] for shape, x in numbers]
    sparsity = jax.tree.unflatten(treedef, leaves)
    counts = parts.counts(_bound(parts, static, shapes)[1], sparsity)
    return Counted(vector(counts, np.int32), vector(sparsity, np.float32))


def resolved(parts: Parts, amount: Amount, units: Units) -> Any:
    """What the scope takes in the place of a sparsity, now that its units are there."""
    if isinstance(amount, Counted):
        return amount.counts.tree
    if not isinstance(amount, OnTheWay):
        return amount
    final, now = (
        side.counts.tree if isinstance(side, Counted) else parts.counts(units, side)
        for side in (amount.final, amount.now)
    )
    return jax.tree.map(lambda f, n: jnp.where(amount.arrived, f, n), final, now)


def if_due(parts: Parts, amount: Any, units: Units, due: jax.Array) -> Any:
    """What the scope takes where masks are not to be found at every call: all, if not ``due``.

    Args:
      parts: with a scope that counts.
      amount: what ``resolved`` gave.
      units: of which shapes suffice.
      due: bool `[]`.
    """
    counts, everything = parts.counts(units, amount), parts.counts(units, 0.0)
    return jax.tree.map(lambda n, whole: jnp.where(due, n, whole), counts, everything)


def in_rounds(
    once: Callable[[Params, Amount, Masks | None], Any],
    params: Params,
    amount: Amount,
    within: Masks | None,
    *,
    rounds: int,
) -> Any:
    """Find masks in one go, or again and again on the masked params.

    Round i brings the sparsity ``1 - (1 - sparsity)**(i / rounds)``, geometric in what is kept,
    and the last one exactly the whole.

    Args:
      once: from params, amount and earlier masks to masks, and for each leaf a bool `[]`.
      params: all of them.
      amount: of the last round.
      within: masks from before the first.
      rounds: from 1 on.

    Returns:
      Masks, and which leaves were fine in all rounds.
    """
    if rounds == 1:
        return once(params, amount, within)
    whole = amount.sparsity.tree if isinstance(amount, Counted) else amount

    def share(s: Any, i: jax.Array) -> jax.Array:
        return -jnp.expm1(i / rounds * jnp.log1p(-jnp.asarray(s, jnp.float32)))

    def again(i: jax.Array, found: tuple[Masks, Any]) -> tuple[Masks, Any]:
        masks, fine = found
        now = OnTheWay(i == rounds, amount, jax.tree.map(lambda s: share(s, i), whole))
        masks, still = once(apply_masks(params, masks), now, masks)
        return masks, jax.tree.map(jnp.logical_and, fine, still)

    shapes = jax.eval_shape(once, params, amount, within)
    masks, fine = jax.tree.map(lambda s: jnp.ones(s.shape, bool), shapes)
    masks = reshard_like(masks, params)
    if within is not None:
        masks = map_leaves(jnp.logical_and, masks, check_masks(within, masks, "within"))
    return lax.fori_loop(1, rounds + 1, again, (masks, fine))
