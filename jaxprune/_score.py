"""Scores: a criterion called with what it may see, now or where a ranking reads them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._evidence import (
    asks_for_layout,
    criterion_name,
    is_function,
    named_evidence,
    required_evidence,
)
from jaxprune._mesh import in_auto_mode
from jaxprune._parts import Parts, is_elementwise, reads_lazily
from jaxprune._ranking import Lazy, is_lazy, read
from jaxprune._tree import (
    align,
    fill,
    is_array,
    is_floating,
    join_static,
    leaves_with_path,
    list_paths,
    map_leaves,
    narrow,
    split_static,
)
from jaxprune.typing import Criterion, Params, Scores


def score(parts: Parts, part: Params, params: Params, evidence: Mapping[str, Any]) -> Scores:
    """Score the prunable leaves; the scores are lazy where all parts agree to that.

    Args:
      parts: bound to the params.
      part: the prunable leaves of ``params``, None elsewhere.
      params: all of them, for functions of the params.
      evidence: by name, as it was given for ``params``.

    Returns:
      Scores like ``part``, arrays or ``Lazy``.
    """
    lazy = lazy_scores(parts, part, params, evidence)
    if lazy is not None:
        return lazy
    part = lax.stop_gradient(part)
    if not parts.shows_layers:
        return _scored(parts, part, params, evidence)
    values, static = split_static((part, params, dict(evidence)))

    def of_layers(values: list[jax.Array]) -> Scores:
        return _scored(parts, *join_static(values, static))

    try:  # layers are slices, which explicit mesh axes refuse where they split a stack
        return in_auto_mode(of_layers, values, like=part)
    except Exception as error:
        error.add_note(_NOTE.format(criterion_name(parts.criterion)))
        raise


def _scored(parts: Parts, part: Params, params: Params, evidence: Mapping[str, Any]) -> Scores:
    """Call the criterion on what it is shown."""
    seen = parts.shown(part, part)
    scores = parts.criterion(seen, **_offered(parts, evidence, part, params))
    _check_scores(scores, seen, parts.criterion)
    return parts.as_shown(scores, part)


_NOTE = (
    "With a layout, the criterion `{}` is shown the list of the layers in the place of each stack. "
    "If its score of a weight needs the evidence of that weight only, mark it with "
    "`jp.elementwise`; if it minds stacks itself, let it name `layout` among its keywords."
)


def lazy_scores(
    parts: Parts, part: Params, params: Params, evidence: Mapping[str, Any]
) -> Scores | None:
    """Score the prunable leaves where a ranking reads them; None if a part needs them stored."""
    if parts.shows_layers:
        return None
    criterion, part = parts.criterion, lax.stop_gradient(part)
    offered = _offered(parts, evidence, part, params)
    named = {name: offered[name] for name in named_evidence(criterion, offered)}
    if not _may_be_lazy(parts, named):
        return None
    # What is wrong is told by path, and so of the whole tree.
    shapes = jax.eval_shape(lambda p: criterion(p, **offered), part)
    _check_scores(shapes, part, criterion)
    lazy = _lazy(criterion, part, named, shapes)
    return lazy if _can_be_read(lazy) else None


def _offered(
    parts: Parts, evidence: Mapping[str, Any], part: Params, params: Params
) -> dict[str, Any]:
    offered = {name: _offer(parts, name, value, part, params) for name, value in evidence.items()}
    told = {"layout": parts.layout} if asks_for_layout(parts.criterion) else {}
    return {**offered, **told}


def _may_be_lazy(parts: Parts, named: Mapping[str, Any]) -> bool:
    single = is_elementwise(parts.criterion) and is_elementwise(parts.pattern.pool)
    arrays = all(map(is_array, jax.tree.leaves(named)))  # numbers and strings are not traced
    return single and reads_lazily(parts.scope) and arrays and not any(map(is_function, named))


def _can_be_read(scores: Scores) -> bool:
    """Try the first leaf: evidence may be a tree in which the params' tree lies deeper."""
    first = jax.tree.leaves(scores, is_leaf=is_lazy)[0]
    try:
        return jax.eval_shape(read, first).shape == first.shape
    except Exception:  # whatever a criterion does with evidence that it does not know
        return False


def _offer(parts: Parts, name: str, value: Any, part: Params, params: Params) -> Any:
    """Evidence cut down to what a criterion may see: the prunable part."""
    if is_function(name) and callable(value):  # of all params, offered as one of the part

        def of_part(p: Params, *args: Any, **kwargs: Any) -> Any:
            return value(fill(parts.as_shown(p, part), params), *args, **kwargs)

        return of_part
    return parts.shown(narrow(value, part), part)


@dataclasses.dataclass(frozen=True)
class _OfOneLeaf:
    """An elementwise criterion of a leaf: to it a single array is a tree like any other."""

    criterion: Criterion
    names: tuple[str, ...]

    def __call__(self, weights: jax.Array, *evidence: Any) -> jax.Array:
        return self.criterion(weights, **dict(zip(self.names, evidence, strict=True)))


def _lazy(
    criterion: Criterion, part: Params, evidence: Mapping[str, Any], shapes: Scores
) -> Scores:
    """Hand each leaf its weights and its evidence, to be scored where it is read."""
    of_leaf = _OfOneLeaf(criterion, tuple(evidence))
    n = len(jax.tree.leaves(part))
    columns = [_one_each(lax.stop_gradient(value), part, n) for value in evidence.values()]
    rows = list(zip(*columns, strict=True)) if columns else [()] * n
    given = iter(rows)
    return map_leaves(
        lambda w, s: Lazy((w, *next(given)), of_leaf, jnp.dtype(s.dtype)), part, shapes
    )


def _one_each(value: Any, part: Params, n: int) -> list[Any]:
    """Evidence for each leaf: its own of a tree like the params, else all that there is."""
    mirror = align(value, part) if jax.tree.leaves(value) else None
    leaves = [] if mirror is None else jax.tree.leaves(mirror)
    return leaves if len(leaves) == n else [value] * n


def _check_scores(scores: Scores, part: Params, criterion: Criterion) -> None:
    want = [(path, jnp.shape(leaf)) for path, leaf in leaves_with_path(part)]
    got = [(path, jnp.shape(leaf)) for path, leaf in leaves_with_path(scores)]
    named = {path for path, _ in got}
    unscored = [path for path, _ in want if path not in named]
    if unscored and got == [(path, shape) for path, shape in want if path in named]:
        raise ValueError(
            f"The criterion `{criterion_name(criterion)}` gives no scores for "
            f"{list_paths(unscored)}: its evidence is None there. Leave these out with "
            "`where=jp.exclude(...)`, or pass evidence for all that is prunable."
        )
    if got != want:
        raise ValueError(
            f"The criterion `{criterion_name(criterion)}` returned scores {got}, but the prunable "
            f"leaves are {want}. Return one score for each weight, in a tree like its params."
        )
    check_floating(scores)


def check_floating(scores: Scores) -> None:
    """Refuse scores that cannot be ranked."""
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


def asks_functions(criterion: Criterion, evidence: Mapping[str, Any]) -> bool:
    """True if scores come from a function of the params, which could spoil them."""
    return any(is_function(name) for name in required_evidence(criterion) if name in evidence)


def all_finite(scores: Scores, params: Params) -> Any:
    """Tell for each leaf whether the scores of its finite weights are finite: bools `[]`."""
    return map_leaves(lambda s, w: jnp.all(jnp.isfinite(s) | ~jnp.isfinite(w)), scores, params)


def check_finite(finite: Any, criterion: Criterion, functions: tuple[tuple[str, Any], ...]) -> None:
    """Refuse scores that a function spoilt. Inside a trace nobody can look."""
    asked = [name for name, _ in functions if name in required_evidence(criterion)]
    bad = [
        path
        for path, good in leaves_with_path(finite)
        if not isinstance(good, jax.core.Tracer) and not good
    ]
    if bad:
        raise ValueError(
            f"The criterion `{criterion_name(criterion)}` gives scores that are not finite at "
            f"{list_paths(bad)}: {' or '.join(f'`{name}`' for name in asked)}, or its "
            "gradient, is NaN or infinite on the batch. Look at its value and at the batch; "
            "smaller inputs or a smaller learning rate may do."
        )
