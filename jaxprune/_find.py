"""Masks found: weights scored, units ranked, in one go or in rounds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._errors import check_key, check_parts, check_sparsity
from jaxprune._evidence import (
    check_data,
    check_evidence,
    check_names,
    criterion_name,
    is_function,
    required_evidence,
)
from jaxprune._groups import Groups
from jaxprune._help import readable
from jaxprune._masks import apply_masks, check_masks
from jaxprune._mesh import in_auto_mode, is_explicit, lay_out
from jaxprune._tree import (
    fill,
    is_floating,
    is_matrix,
    join_static,
    leaves_by_path,
    leaves_with_path,
    list_paths,
    map_leaves,
    narrow,
    prunable,
    split_static,
)
from jaxprune._where import refuses
from jaxprune.criteria import magnitude
from jaxprune.patterns import Channels, Coupled, Weights
from jaxprune.scopes import across, per_leaf
from jaxprune.scopes._count import fix, is_fixed, is_number
from jaxprune.scopes._deferred import Deferred, on_weights, stored
from jaxprune.scopes._rank import keep_largest
from jaxprune.scopes._spread import is_tree
from jaxprune.scopes._windows import Windows
from jaxprune.typing import Criterion, Masks, Params, Pattern, Scope, Scores, Sparsity, Where

SETTINGS = (
    "criterion",
    "sparsity",
    "pattern",
    "scope",
    "where",
    "within",
    "rounds",
)  # of find_masks


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
      rounds: score the masked weights again in so many rounds, of which number i brings the
        sparsity ``1 - (1 - sparsity)**(i / rounds)``. For scores that depend on what else is
        left: SynFlow wants 100.
      **evidence: what the criterion asks for by keyword: ``grads``, ``key``, ``loss_fn`` ...
        Trees that mirror ``params`` are narrowed to the prunable leaves, and functions of the
        params get all leaves.

    Returns:
      A tree like ``params``: None where a leaf is not prunable, elsewhere a bool array of the
      leaf's rank that broadcasts over it, True for what stays. Exactly ``round(sparsity * n)``
      of the ``n`` units of each competition go.

    Raises:
      ValueError: the sparsity is outside [0, 1], nothing is prunable, a pattern or scope does not
        fit a leaf, ``within`` or evidence does not mirror ``params``, ``rounds`` is below 1, or a
        function in the evidence leads to scores that are not finite, such as a loss that is NaN
        (not seen inside a trace).
      TypeError: the criterion lacks evidence or cannot take what is offered, its ``loss_fn`` gives
        no scalar, or ``rounds`` is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.zeros(2)}
      >>> find_masks(params, 0.5)["kernel"]
      Array([[False,  True],
             [ True, False]], dtype=bool)
    """
    check_parts("find_masks", criterion=criterion, pattern=pattern, scope=scope, where=where)
    check_sparsity(sparsity)
    check_names("find_masks", criterion, evidence, SETTINGS)
    check_key("find_masks", evidence.get("key"))
    check_scope(scope, sparsity, exact=True)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        wrong = ValueError if isinstance(rounds, int) else TypeError
        raise wrong(
            f"`find_masks` got rounds={rounds!r}. Use an integer from 1 on; 100 for SynFlow."
        )
    return find_compiled(
        params,
        sparsity,
        evidence,
        criterion=criterion,
        pattern=pattern,
        scope=scope,
        where=where,
        within=within,
        rounds=rounds,
    )


def find_compiled(
    params: Params,
    sparsity: Sparsity,
    evidence: dict[str, Any],
    *,
    criterion: Criterion,
    pattern: Pattern,
    scope: Scope,
    where: Where,
    within: Masks | None,
    rounds: int = 1,
) -> Masks:
    """Find masks in a program of their own; settings have been checked."""
    check_evidence(criterion, evidence)
    functions = {name: evidence[name] for name in evidence if is_function(name)}
    arrays = {name: value for name, value in evidence.items() if name not in functions}
    check_data(arrays, "find_masks")
    values, static = split_static((params, within, arrays))
    masks, finite = _find_jit(
        values,
        _exact(sparsity),
        static=static,
        criterion=criterion,
        pattern=pattern,
        scope=scope,
        where=where,
        rounds=rounds,
        functions=tuple(sorted(functions.items())),
    )
    asked = [name for name in functions if name in required_evidence(criterion)]
    if asked:
        _check_finite(finite, criterion, asked)
    return masks


@functools.partial(
    jax.jit,
    static_argnames=("static", "criterion", "pattern", "scope", "where", "rounds", "functions"),
)
def _find_jit(
    values: list[jax.Array],
    sparsity: Sparsity,
    *,
    static: Any,
    criterion: Criterion,
    pattern: Pattern,
    scope: Scope,
    where: Where,
    rounds: int,
    functions: tuple[tuple[str, Callable[..., Any]], ...],
) -> tuple[Masks, Any]:
    """Find masks, and tell for each leaf whether the scores of its finite weights were finite."""
    params, within, evidence = join_static(values, static)
    pattern, where = fit_parts(pattern, where, params)
    _check_pair(pattern, scope)  # before scores are computed for nothing
    evidence = {**evidence, **dict(functions)}

    def once(params: Params, sparsity: Sparsity, within: Masks | None) -> tuple[Masks, Any]:
        scores = score(params, evidence, criterion=criterion, where=where)
        if not functions:  # nothing that could spoil a score
            ready = defer(scores, params, criterion=criterion, pattern=pattern, scope=scope)
            return rank(ready, sparsity, pattern=pattern, scope=scope, within=within), ()
        finite = map_leaves(
            lambda s, w: jnp.all(jnp.isfinite(s) | ~jnp.isfinite(w)), scores, params
        )
        return rank(scores, sparsity, pattern=pattern, scope=scope, within=within), finite

    if rounds == 1:
        return once(params, sparsity, within)

    def again(i: jax.Array, found: tuple[Masks, Any]) -> tuple[Masks, Any]:
        masks, finite = found
        now = jax.tree.map(lambda s: _on_the_way(s, i, rounds), sparsity, is_leaf=is_fixed)
        masks, still = once(apply_masks(params, masks), now, masks)
        return masks, jax.tree.map(jnp.logical_and, finite, still)

    shapes = jax.eval_shape(once, params, sparsity, within)
    masks, finite = jax.tree.map(lambda s: jnp.ones(s.shape, bool), shapes)
    masks = lay_out(masks, params)
    if within is not None:
        masks = map_leaves(jnp.logical_and, masks, check_masks(within, masks, "within"))
    return lax.fori_loop(1, rounds + 1, again, (masks, finite))


def _on_the_way(sparsity: Any, i: jax.Array, rounds: int) -> Any:
    """Sparsity of round ``i``: geometric in what is kept, and exactly the whole in the last."""
    final = fix(sparsity)
    part = fix(-jnp.expm1(i / rounds * jnp.log1p(-final.__jax_array__())))
    return jax.tree.map(lambda f, p: jnp.where(i == rounds, f, p), final, part)


def find(
    params: Params,
    sparsity: Sparsity,
    evidence: dict[str, Any],
    *,
    criterion: Criterion,
    pattern: Pattern,
    scope: Scope,
    where: Where,
    within: Masks | None,
) -> Masks:
    """Find masks inside somebody's trace: score, then rank."""
    scores = score(params, evidence, criterion=criterion, where=where)
    scores = defer(scores, params, criterion=criterion, pattern=pattern, scope=scope)
    return rank(scores, sparsity, pattern=pattern, scope=scope, within=within)


def score(
    params: Params, evidence: dict[str, Any], *, criterion: Criterion, where: Where
) -> Scores:
    """Score the prunable leaves; evidence is cut down to what the criterion may see."""
    part = lax.stop_gradient(prunable(params, where=where))

    def offer(name: str, value: Any) -> Any:
        if is_function(name) and callable(value):  # of all params, offered as one of the part
            return lambda p, *args, **kwargs: value(fill(p, params), *args, **kwargs)
        return narrow(value, part)

    scores = criterion(part, **{name: offer(name, value) for name, value in evidence.items()})
    _check_scores(scores, part, criterion)
    return scores


def defer(
    scores: Scores, params: Params, *, criterion: Criterion, pattern: Pattern, scope: Scope
) -> Scores:
    """Leave it to the ranking to take magnitudes of single weights, where it reads them.

    Or XLA would keep them all in a buffer of the size of the params while it searches.
    """
    by_counting = getattr(scope, "func", scope) in (across, per_leaf)  # axis_name may be bound
    if not (criterion is magnitude and isinstance(pattern, Weights) and by_counting):
        return scores
    return map_leaves(lambda s, w: Deferred(lax.stop_gradient(w), jnp.abs), scores, params)


@readable
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
    check_parts("make_masks", pattern=pattern, scope=scope)
    check_sparsity(sparsity)
    check_scope(scope, sparsity, exact=True)
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
    if isinstance(pattern, Coupled) and is_tree(sparsity):
        sparsity = pattern.of_groups(sparsity)
    if within is not None:
        within = check_masks(within, scores, "within")
    # Deferred scores are no arrays: their weights cross into the other mode, and there they are
    # put together again.
    weights = jax.tree.map(stored, scores)

    def ranked(weights: Any, sparsity: Any, within: Masks | None) -> Masks:
        ready = jax.tree.map(on_weights, scores, weights)
        return _rank(ready, sparsity, within, pattern=pattern, scope=scope)

    sparsity = _exact(sparsity) if is_explicit(weights) else sparsity
    return in_auto_mode(ranked, weights, sparsity, within, like=weights)


def _rank(
    scores: Scores, sparsity: Any, within: Masks | None, *, pattern: Pattern, scope: Scope
) -> Masks:
    units = jax.tree.map(
        lambda u: u if isinstance(u, Deferred) else lax.stop_gradient(u), pattern.pool(scores)
    )
    if within is None:
        keep = scope(units, sparsity)
        return pattern.expand(_enough(pattern, units, keep, None), like=scores)
    alive = living(pattern, scores, within)
    keep = scope(units, sparsity, within=alive)
    found = pattern.expand(_enough(pattern, units, keep, alive), like=scores)
    return map_leaves(lambda new, old: new if old is None else new & old, found, within)


def _enough(pattern: Pattern, units: Any, keep: Any, alive: Any) -> Any:
    """Let groups of coupled units keep as many as they need, the best of those alive."""
    if not isinstance(pattern, Coupled):
        return keep
    living = [None] * len(units) if alive is None else jax.tree.leaves(alive)
    groups = {group.name: group for group in pattern.groups}
    counts = []
    for name, here in zip(sorted(units), living, strict=True):
        kept = jnp.maximum(jnp.sum(keep[name], dtype=jnp.int32), pattern.least(groups[name]))
        rounded = -(-kept // pattern.round_to) * pattern.round_to
        most = units[name].size if here is None else jnp.sum(here, dtype=jnp.int32)
        counts.append(jnp.minimum(rounded, most))
    rankings = tuple((i,) for i in range(len(units)))
    best = keep_largest([units[name] for name in sorted(units)], counts, rankings, living)
    return dict(zip(sorted(units), best, strict=True))


@dataclasses.dataclass(frozen=True)
class _At:
    """A ``where`` that takes the leaves at some paths."""

    paths: frozenset[str]

    def __call__(self, path: str, array: Any) -> bool:
        del array
        return path in self.paths


def fit_parts(pattern: Pattern, where: Where, params: Params) -> tuple[Pattern, Where]:
    """Settle what a pattern of coupled groups covers: all members of the groups that may go.

    The default ``where`` lets all of them go; another one protects a group if it refuses a member.
    """
    if not isinstance(pattern, Coupled):
        return pattern, where
    leaves = leaves_by_path(params, "Coupled")
    free = []
    for group in pattern.groups:
        missing = [m.path for m in group.members if m.path not in leaves]
        if missing:
            raise ValueError(
                f"The params have nothing at {list_paths(missing)}, which the group "
                f"{group.name!r} owns a part of; their paths are {list_paths(list(leaves))}. Use "
                "the groups of these params: `groups.at(params)`, or `groups.at(prefix)` for a "
                "subtree of flax variables."
            )
        if not any(refuses(where, m.path, leaves[m.path]) for m in group.members):
            free.append(group)
    if not free:
        raise ValueError(
            f"`where` refuses a member of each of the {len(pattern.groups)} groups, so that "
            "nothing could be removed. Let it take all members of a group, biases and scales too."
        )
    paths = frozenset(m.path for group in free for m in group.members)
    return dataclasses.replace(pattern, groups=Groups(free, pattern.groups.frozen)), _At(paths)


def living(pattern: Pattern, scores: Scores, masks: Masks) -> Any:
    """Say which units are alive: those of which at least one weight is."""
    weights = map_leaves(
        lambda s, m: jnp.broadcast_to(m is None or m, s.shape).astype(jnp.float32), scores, masks
    )
    return jax.tree.map(lambda share: share > 0, pattern.pool(weights))


def _check_scores(scores: Scores, part: Params, criterion: Criterion) -> None:
    want = [(path, jnp.shape(leaf)) for path, leaf in leaves_with_path(part)]
    got = [(path, jnp.shape(leaf)) for path, leaf in leaves_with_path(scores)]
    if got != want:
        raise ValueError(
            f"The criterion `{criterion_name(criterion)}` returned scores {got}, but the prunable "
            f"leaves are {want}. Return one score for each weight, in a tree like its params."
        )


def _check_finite(finite: Any, criterion: Criterion, functions: list[str]) -> None:
    """Refuse scores that a function spoilt. Inside a trace nobody can look."""
    bad = [
        path
        for path, good in leaves_with_path(finite)
        if not isinstance(good, jax.core.Tracer) and not good
    ]
    if bad:
        raise ValueError(
            f"The criterion `{criterion_name(criterion)}` gives scores that are not finite at "
            f"{list_paths(bad)}: {' or '.join(f'`{name}`' for name in functions)}, or its "
            "gradient, is NaN or infinite on the batch. Look at its value and at the batch; "
            "smaller inputs or a smaller learning rate may do."
        )


def check_scope(scope: Scope, sparsity: Sparsity, *, exact: bool = False) -> None:
    """Refuse windows of which nothing would be left, or that cannot have a known sparsity."""
    if isinstance(scope, Windows):
        scope.check_sparsity(sparsity)
        if exact:
            scope.check_exact(sparsity)


def _check_pair(pattern: Pattern, scope: Scope) -> None:
    if isinstance(scope, Windows) and isinstance(pattern, Channels | Coupled):
        name = type(pattern).__name__
        raise ValueError(
            f"`windows(m={scope.m})` ranks neighbours along an axis, and `{name}` leaves no "
            "neighbours to rank. Use it with `Weights` or `Blocks`, or rank channels with "
            "`per_leaf` or `across`."
        )


def _exact(sparsity: Sparsity) -> Any:
    """Numbers in fixed point, so that the compiled program counts as Python does."""
    return jax.tree.map(lambda s: fix(s) if is_number(s) else s, sparsity)
