"""The library in four lines: score, pool, keep, expand."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._amount import Amount, counted, if_due, in_rounds, resolved
from jaxprune._evidence import split_functions
from jaxprune._help import readable
from jaxprune._layout import Layout
from jaxprune._masks import check_masks
from jaxprune._mesh import in_auto_mode
from jaxprune._parts import Parts, check_find
from jaxprune._ranking import read
from jaxprune._score import all_finite, asks_functions, check_finite, score
from jaxprune._tree import is_matrix, join_static, map_leaves, split_static
from jaxprune.criteria import magnitude
from jaxprune.patterns import Weights
from jaxprune.scopes import per_leaf
from jaxprune.typing import (
    Criterion,
    Lazy,
    Masks,
    Params,
    Pattern,
    Scope,
    Scores,
    Sparsity,
    Units,
    Where,
)


@readable
def find_masks(
    params: Params,
    sparsity: Sparsity,
    *,
    criterion: Criterion = magnitude,
    pattern: Pattern = Weights(),
    scope: Scope = per_leaf,
    where: Where = is_matrix,
    within: Masks | None = None,
    rounds: int = 1,
    layout: Layout | None = None,
    **evidence: Any,
) -> Masks:
    """Find the masks that remove a fraction of the weights worth least.

    Compiles itself, with the parts (``criterion``, ``pattern``, ``scope``, ``where``) as static
    arguments: parts that compare equal share a program, a new lambda is compiled anew. It is one
    program for every sparsity, unless a scope of one's own cannot count beforehand
    (``jp.typing.Counting``): then for each number one.

    Args:
      params: parameters; any tree of arrays.
      sparsity: fraction to remove, in [0, 1]: a number (may be traced) or a tree of numbers, one
        for each prunable leaf, as ``jp.scopes.erk`` makes.
      criterion: scores the weights; sees only the prunable leaves, None elsewhere.
      pattern: what is removed together.
      scope: who competes with whom.
      where: predicate of path and array: which leaves are prunable.
      within: earlier masks; a weight that they remove stays removed and counts as such.
      rounds: score the masked weights again in so many rounds, of which number i brings the
        sparsity ``1 - (1 - sparsity)**(i / rounds)``. For scores that depend on what else is
        left: SynFlow wants 100.
      layout: what each axis means, from ``jp.find_layout`` or declared. With it layers of a stack
        are layers: they are ranked, counted and normalised one by one, as if each were a leaf of
        its own; a leaf's sparsity may be an array `[layers]`, and parts may name axes by their
        roles. Without it a stack is one leaf.
      **evidence: what the criterion asks for by keyword: ``grads``, ``key``, ``loss_fn`` ...
        Trees that mirror ``params`` are narrowed to the prunable leaves, and functions of the
        params get all leaves.

    Returns:
      A tree like ``params``: None where a leaf is not prunable, elsewhere a bool array of the
      leaf's rank that broadcasts over it, True for what stays. Exactly ``round(sparsity * n)``
      of the ``n`` units of each competition go.

    Raises:
      ValueError: the sparsity is outside [0, 1], nothing is prunable, a pattern or scope does not
        fit a leaf, ``within``, evidence or the layout does not mirror ``params``, ``rounds`` is
        below 1, or a function in the evidence leads to scores that are not finite, such as a loss
        that is NaN (not seen inside a trace).
      TypeError: the criterion lacks evidence or cannot take what is offered, its ``loss_fn`` gives
        no scalar, or ``rounds`` is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.zeros(2)}
      >>> find_masks(params, 0.5)["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)
    """
    parts = Parts("find_masks", criterion, pattern, scope, where, layout)
    check_find(parts, sparsity, evidence, rounds)
    return find(parts, params, sparsity, evidence, within=within, rounds=rounds)


def find(
    parts: Parts,
    params: Params,
    sparsity: Sparsity,
    evidence: dict[str, Any],
    *,
    within: Masks | None = None,
    rounds: int = 1,
) -> Masks:
    """Find masks in a program of their own; the settings have been checked."""
    functions, data = split_functions(parts.user, parts.criterion, evidence)
    parts, amount = counted(parts, params, sparsity)
    values, static = split_static((params, amount, within, data))
    settings = {"static": static, "parts": parts, "functions": functions, "rounds": rounds}
    masks, finite = _compiled(values, **settings)
    check_finite(finite, parts.criterion, functions)
    return masks


@functools.partial(jax.jit, static_argnames=("static", "parts", "functions", "rounds"))
def _compiled(
    values: list[jax.Array], *, static: Any, parts: Parts, functions: Any, rounds: int
) -> tuple[Masks, Any]:
    """Find masks, and tell for each leaf whether functions gave it finite scores."""
    params, amount, within, data = join_static(values, static)
    evidence = {**data, **dict(functions)}

    def once(params: Params, amount: Amount, within: Masks | None) -> tuple[Masks, Any]:
        part = parts.prunable(params)
        scores = score(parts, part, params, evidence)
        finite = all_finite(scores, params) if asks_functions(parts.criterion, evidence) else ()
        return select(parts, scores, amount, within, like=part), finite

    return in_rounds(once, params, amount, within, rounds=rounds)


def select(
    parts: Parts,
    scores: Scores,
    amount: Amount,
    within: Masks | None,
    *,
    like: Params,
    alive: Units | None = None,
) -> Masks:
    """Make masks from scores that are like ``like``, the prunable leaves; stored or lazy.

    In the place of ``within`` may be bools of units, ``alive``, which are then not looked for.
    """
    within = None if within is None else check_masks(within, like, "within")
    values, static = split_static((scores, like, amount, within, alive))

    def ranked(values: list[jax.Array]) -> Masks:
        scores, like, amount, within, alive = join_static(values, static)
        masks = choose(parts, scores, amount, within, like=like, alive=alive)
        earlier = jax.tree.map(lambda _: None, like) if within is None else within
        return map_leaves(lambda _, new, old: among(new, old), like, masks, earlier)

    return in_auto_mode(ranked, values, like=like)


def choose(
    parts: Parts,
    scores: Scores,
    amount: Amount,
    within: Masks | None,
    *,
    like: Params,
    due: jax.Array | None = None,
    alive: Units | None = None,
) -> Masks:
    """Pool, keep and expand. Where scores are lazy, so are the masks, and may keep the dead."""
    units = jax.lax.stop_gradient(parts.pool(scores))
    alive = alive if within is None else parts.alive(like, within)
    counts = resolved(parts, amount, units)
    if due is not None:
        counts = if_due(parts, counts, units, due)
    keep = parts.keep(units, counts, alive)
    if within is None and alive is not None:  # a scope of one's own may keep what is dead
        keep = jax.tree.map(jnp.logical_and, keep, alive)
    return parts.expand(keep, like=like)


def among(new: jax.Array | Lazy, old: jax.Array | None) -> jax.Array:
    """Read a mask, and take away what an earlier one has removed."""
    return read(new) if old is None else read(new) & old
