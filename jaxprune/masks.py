"""Masks: found from scores, applied to params, compared, counted and packed into bits."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune._errors import check_sparsity
from jaxprune._tree import (
    align,
    fill,
    is_floating,
    is_matrix,
    leaves_with_path,
    list_paths,
    map_leaves,
    map_with_path,
    narrow,
    prunable,
)
from jaxprune._types import Criterion, Masks, Params, Pattern, Scope, Scores, Sparsity, Where
from jaxprune.criteria import magnitude
from jaxprune.patterns import Channels, Weights
from jaxprune.scopes import per_leaf
from jaxprune.scopes._count import fix, is_number
from jaxprune.scopes._windows import Windows


def find_masks(
    params: Params,
    sparsity: Sparsity,
    *,
    criterion: Criterion = magnitude,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    where: Where = is_matrix,
    within: Masks | None = None,
    **evidence: Any,
) -> Masks:
    """Find the masks that remove a fraction of the weights worth least.

    Compiles itself, with the parts (``criterion``, ``pattern``, ``scope``, ``where``) as static
    arguments: parts that compare equal share a program for every sparsity, a new lambda is
    compiled anew.

    Args:
      params: parameters; any tree of arrays.
      sparsity: fraction to remove, in [0, 1]: a number (may be traced) or a tree of numbers, one
        for each prunable leaf, as ``jp.scopes.erk`` makes.
      criterion: scores the weights; sees only the prunable leaves, None elsewhere.
      pattern: what is removed together.
      scope: who competes with whom.
      where: predicate of path and array: which leaves are prunable.
      within: earlier masks; a weight that they remove stays removed and counts as such.
      **evidence: what the criterion asks for by keyword: ``grads``, ``key``, ``loss_fn`` ...
        Trees that mirror ``params`` are narrowed to the prunable leaves, and functions of the
        params get all leaves.

    Returns:
      A tree like ``params``: None where a leaf is not prunable, elsewhere a bool array of the
      leaf's rank that broadcasts over it, True for what stays. Exactly ``round(sparsity * n)``
      of the ``n`` units of each competition go.

    Raises:
      ValueError: the sparsity is outside [0, 1], nothing is prunable, a pattern or scope does not
        fit a leaf, or ``within`` does not mirror ``params``.
      TypeError: the criterion lacks evidence.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.zeros(2)}
      >>> find_masks(params, 0.5)["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)
    """
    check_sparsity(sparsity)
    check_evidence(criterion, evidence)
    functions = {name: value for name, value in evidence.items() if callable(value)}
    arrays = {name: value for name, value in evidence.items() if name not in functions}
    return _find_jit(
        params,
        _exact(sparsity),
        within,
        arrays,
        criterion=criterion,
        pattern=pattern,
        scope=scope,
        where=where,
        functions=tuple(sorted(functions.items())),
    )


@functools.partial(jax.jit, static_argnames=("criterion", "pattern", "scope", "where", "functions"))
def _find_jit(
    params: Params,
    sparsity: Sparsity,
    within: Masks | None,
    evidence: dict[str, Any],
    *,
    criterion: Criterion,
    pattern: Pattern,
    scope: Scope,
    where: Where,
    functions: tuple[tuple[str, Callable[..., Any]], ...],
) -> Masks:
    return find(
        params,
        sparsity,
        criterion=criterion,
        pattern=pattern,
        scope=scope,
        where=where,
        within=within,
        **evidence,
        **dict(functions),
    )


def find(
    params: Params,
    sparsity: Sparsity,
    *,
    criterion: Criterion,
    pattern: Pattern,
    scope: Scope,
    where: Where,
    within: Masks | None,
    **evidence: Any,
) -> Masks:
    """Find masks inside somebody's trace: score, then rank."""
    part = lax.stop_gradient(prunable(params, where=where))

    def offer(value: Any) -> Any:
        if callable(value):  # a function of all params, offered as one of the prunable part
            return lambda p, *args, **kwargs: value(fill(p, params), *args, **kwargs)
        return narrow(value, part)

    scores = criterion(part, **{name: offer(value) for name, value in evidence.items()})
    _check_scores(scores, part, criterion)
    return rank(scores, sparsity, pattern=pattern, scope=scope, within=within)


def make_masks(
    scores: Scores,
    sparsity: Sparsity,
    *,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    within: Masks | None = None,
) -> Masks:
    """Make masks from ready scores: pool them into units, rank, expand again.

    Args:
      scores: floating scores, higher = keep; None where a leaf is not prunable.
      sparsity: fraction of units to remove: a number or a tree of numbers.
      pattern: what is removed together.
      scope: who competes with whom.
      within: earlier masks; a weight that they remove stays removed.

    Returns:
      Masks like ``scores``.

    Raises:
      ValueError: the sparsity is outside [0, 1], a pattern or scope does not fit a leaf or the
        two do not fit one another, or ``within`` does not mirror ``scores``.
      TypeError: scores are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> make_masks({"w": jnp.array([3.0, 1.0, 2.0, 4.0])}, 0.25)
      {'w': Array([ True, False,  True,  True], dtype=bool)}
    """
    check_sparsity(sparsity)
    return rank(scores, sparsity, pattern=pattern, scope=scope, within=within)


def rank(
    scores: Scores, sparsity: Any, *, pattern: Pattern, scope: Scope, within: Masks | None
) -> Masks:
    """Make masks; the sparsity has been checked, or is traced."""
    _check_pair(pattern, scope)
    leaves = leaves_with_path(scores)
    if not leaves:
        raise ValueError(
            "There are no scores to rank: the tree has no leaf but None. Score at least one leaf."
        )
    wrong = [(path, s) for path, s in leaves if not is_floating(s)]
    if wrong:
        path, leaf = wrong[0]
        raise TypeError(
            f"A score of {getattr(leaf, 'dtype', type(leaf).__name__)} at {path!r} "
            "cannot be ranked. Scores are floating arrays: convert it, or put None where a leaf "
            "is not prunable."
        )
    units = lax.stop_gradient(pattern.pool(scores))
    if within is None:
        return pattern.expand(scope(units, sparsity), like=scores)
    within = check_masks(within, scores, "within")
    # A unit is alive as long as one of its weights is.
    alive = jax.tree.map(
        lambda part: part > 0,
        pattern.pool(
            map_leaves(
                lambda s, m: jnp.broadcast_to(m is None or m, s.shape).astype(jnp.float32),
                scores,
                within,
            )
        ),
    )
    found = pattern.expand(scope(units, sparsity, within=alive), like=scores)
    return map_leaves(lambda new, old: new if old is None else new & old, found, within)


def apply_masks(params: Params, masks: Masks) -> Params:
    """Set the removed weights to zero and leave all others as they are.

    Args:
      params: parameters; any tree.
      masks: masks of the same tree; None for leaves to leave alone.

    Returns:
      Parameters like ``params``, exactly zero where a mask is False, be the weight inf or NaN.

    Raises:
      ValueError: ``masks`` does not mirror ``params``.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> apply_masks({"w": jnp.array([1.0, jnp.inf])}, {"w": jnp.array([True, False])})
      {'w': Array([1., 0.], dtype=float32)}
    """
    masks = check_masks(masks, params, "masks")
    return map_leaves(
        lambda p, m: p if m is None else jnp.where(m, p, jnp.zeros((), p.dtype)), params, masks
    )


def dense_masks(params: Params, *, where: Where = is_matrix) -> Masks:
    """Make masks that remove nothing.

    Args:
      params: parameters; any tree.
      where: which leaves are prunable.

    Returns:
      Full masks, all True, with the sharding of their parameter; None elsewhere.

    Raises:
      ValueError: nothing is prunable.

    Example:
      >>> import jax.numpy as jnp
      >>> dense_masks({"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)})
      {'bias': None, 'kernel': Array([[ True,  True]], dtype=bool)}
    """
    return map_leaves(lambda p: jnp.ones_like(p, dtype=bool), prunable(params, where=where))


def sparsity(masks: Masks, params: Params) -> float | jax.Array:
    """Measure the fraction of the prunable weights that masks remove.

    Args:
      masks: masks; prunable is where they are not None.
      params: the parameters they belong to.

    Returns:
      The exact fraction as a Python float; inside a trace a float array.

    Raises:
      ValueError: ``masks`` does not mirror ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> sparsity({"w": jnp.array([[True, False, False]])}, {"w": jnp.ones((8, 3))})
      0.6666666666666666
    """
    masks = check_masks(masks, params, "masks")
    counts = kept_counts(masks, params)
    total = sum(n for _, n in counts.values())
    if any(isinstance(kept, jax.core.Tracer) for kept, _ in counts.values()):
        gone = sum(jnp.asarray(n - kept, float) for kept, n in counts.values())
        return jnp.asarray(gone / max(total, 1))
    return (total - sum(kept for kept, _ in counts.values())) / max(total, 1)


def kept_counts(masks: Masks, params: Params) -> dict[str, tuple[Any, int]]:
    """For each prunable path, how many weights stay and how many there are."""
    counts: dict[str, tuple[Any, int]] = {}

    def visit(path: str, p: jax.Array, m: jax.Array | None) -> None:
        if m is not None:
            kept: Any = jnp.sum(m, dtype=jnp.int32)
            if not isinstance(kept, jax.core.Tracer):
                kept = int(kept)
            # A size-1 axis of the mask speaks for the whole axis of the weights.
            counts[path] = (kept * (p.size // m.size if m.size else 0), p.size)

    map_with_path(visit, params, masks)
    return counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A mask in bits: ``bits`` holds the last axis of ``shape`` eight to a byte.

    Attributes:
      bits: uint8 ``[..., ceil(last / 8)]``; the first weight is the highest bit.
      shape: shape of the mask.
    """

    bits: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def pack(masks: Masks) -> Any:
    """Store masks with one bit a weight instead of one byte.

    Args:
      masks: masks; None stays None, what is packed stays packed.

    Returns:
      The same tree with a ``Packed`` in the place of each mask. It is a pytree node that knows
      its shape, so it can be jitted, stacked, donated and saved like any array.

    Example:
      >>> import jax.numpy as jnp
      >>> packed = pack({"w": jnp.ones((3, 16), bool)})
      >>> packed["w"].bits.shape, packed["w"].shape
      ((3, 2), (3, 16))
    """
    return jax.tree.map(
        lambda m: m if isinstance(m, Packed) else Packed(_pack_bits(m), m.shape),
        masks,
        is_leaf=lambda m: isinstance(m, Packed),
    )


def unpack(packed: Any) -> Masks:
    """Give back the masks that ``pack`` stored, bit for bit.

    Args:
      packed: a tree with ``Packed`` nodes; masks that are not packed pass.

    Returns:
      Bool masks.

    Example:
      >>> import jax.numpy as jnp
      >>> unpack(pack({"w": jnp.array([True, False, True])}))
      {'w': Array([ True, False,  True], dtype=bool)}
    """
    return jax.tree.map(
        lambda m: _unpack_bits(m) if isinstance(m, Packed) else m,
        packed,
        is_leaf=lambda m: isinstance(m, Packed),
    )


def _pack_bits(mask: jax.Array) -> jax.Array:
    return jnp.packbits(jnp.atleast_1d(mask), axis=-1)


def _unpack_bits(packed: Packed) -> jax.Array:
    last = packed.shape[-1] if packed.shape else 1
    # A byte beside its bit, elementwise: XLA fuses it into whatever uses the mask, which it does
    # not with jnp.unpackbits.
    place = np.arange(packed.bits.shape[-1] * 8)[:last]
    spread = jnp.repeat(packed.bits, 8, axis=-1)[..., :last]
    bit = np.uint8(128 >> place % 8).reshape(*[1] * (spread.ndim - 1), last)
    mask = (spread & bit) != 0
    # Leading axes are those of the bits: a stack of packed masks unpacks to a stack of masks.
    stack = packed.bits.shape[: packed.bits.ndim - max(len(packed.shape), 1)]
    return mask.reshape(*stack, *packed.shape)


def check_masks(masks: Masks, params: Params, name: str) -> Masks:
    """Give masks the structure of ``params``, or say how they differ: all that is wrong at once."""
    mirror = align(masks, params)
    if mirror is None:
        mine = [path for path, _ in leaves_with_path(params)]
        theirs = [path for path, _ in leaves_with_path(masks)]
        unknown = [path for path in theirs if path not in mine]
        detail = (
            f"it has {list_paths(unknown)}, the params have {list_paths(mine)}"
            if unknown
            else f"got {jax.tree.structure(masks)}, want {jax.tree.structure(params)}"
        )
        raise ValueError(
            f"`{name}` is not a tree like the params: {detail}. Make it with `jp.find_masks` or "
            "`jp.dense_masks`, with None where a leaf is not prunable."
        )
    kinds: list[str] = []
    shapes: list[str] = []

    def visit(path: str, p: Any, m: Any) -> None:
        if m is None:
            return
        if getattr(m, "dtype", None) != jnp.bool_:
            kinds.append(f"{path!r} is {getattr(m, 'dtype', type(m).__name__)}")
        elif len(m.shape) != len(p.shape) or any(
            a not in (1, b) for a, b in zip(m.shape, p.shape, strict=True)
        ):
            shapes.append(f"{path!r} has shape {m.shape} for a parameter of shape {p.shape}")

    map_with_path(visit, params, mirror)
    if kinds:
        raise TypeError(
            f"`{name}` holds masks that are not bool: {', '.join(kinds)}. Convert with "
            "`mask.astype(bool)`; True keeps a weight."
        )
    if shapes:
        raise ValueError(
            f"`{name}` does not fit: {', '.join(shapes)}. A mask has the rank of its parameter, "
            "each axis full or 1."
        )
    return mirror


def check_evidence(criterion: Criterion, evidence: Any) -> None:
    """Refuse to call a criterion without what its signature asks for by keyword."""
    missing = [name for name in required_evidence(criterion) if name not in evidence]
    if missing:
        asked = ", ".join(f"`{name}`" for name in missing)
        first = missing[0]
        raise TypeError(
            f"The criterion `{criterion_name(criterion)}` needs {asked}, which was not given. Pass "
            f"`{first}=...` to `jp.find_masks`, or to `tx.update` inside a training step; `jp.imp` "
            "gets it from `evidence=`."
        )


def required_evidence(criterion: Criterion) -> list[str]:
    """Names of the keyword-only arguments without default."""
    try:
        parameters = inspect.signature(criterion).parameters.values()
    except (TypeError, ValueError):  # a builtin or a wrapper that hides it
        return []
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]


def criterion_name(criterion: Criterion) -> str:
    """The name of a criterion for people."""
    return getattr(criterion, "__name__", None) or type(criterion).__name__


def _check_scores(scores: Scores, part: Params, criterion: Criterion) -> None:
    want = [(path, jnp.shape(leaf)) for path, leaf in leaves_with_path(part)]
    got = [(path, jnp.shape(leaf)) for path, leaf in leaves_with_path(scores)]
    if got != want:
        raise ValueError(
            f"The criterion `{criterion_name(criterion)}` returned scores {got}, but the prunable "
            f"leaves are {want}. Return one score for each weight, in a tree like its params."
        )


def _check_pair(pattern: Pattern, scope: Scope) -> None:
    if isinstance(scope, Windows) and isinstance(pattern, Channels):
        raise ValueError(
            f"`windows(m={scope.m})` ranks neighbours along an axis, and `Channels` leaves no "
            "neighbours to rank. Use it with `Weights` or `Blocks`, or rank channels with "
            "`per_leaf` or `across`."
        )


def _exact(sparsity: Sparsity) -> Any:
    """Numbers in fixed point, so that the compiled program counts as Python does."""
    return jax.tree.map(lambda s: fix(s) if is_number(s) else s, sparsity)
