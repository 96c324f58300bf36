"""Trees of parameters: paths, holes, and which leaves can be pruned."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune._types import Params, Where


def is_hole(leaf: Any) -> bool:
    """True for a leaf outside the pruning problem: None, or what ``optax.masked`` leaves out."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def path_str(path: tuple[Any, ...]) -> str:
    """Write a key path as ``Dense_0/kernel``; the ``.value`` that nnx adds is left out."""
    return jax.tree_util.keystr(own_path(path), simple=True, separator="/")


def own_path(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key path without the ``.value`` that nnx adds."""
    last = jax.tree_util.GetAttrKey("value")
    return path[:-1] if len(path) > 1 and path[-1] == last else path


def map_leaves(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map over ``tree`` with ``rest`` beside it. Holes of ``tree`` stay; ``rest`` may have more.

    Params come first and masks second: ``f(param, None)`` is a leaf that is not prunable.
    """
    return map_with_path(lambda _, *leaves: f(*leaves), tree, *rest)


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like ``map_leaves``, with the path as the first argument of ``f``."""

    def visit(path: tuple[Any, ...], leaf: Any, *others: Any) -> Any:
        if is_hole(leaf):
            return leaf
        return f(path_str(path), leaf, *(None if is_hole(other) else other for other in others))

    return jax.tree_util.tree_map_with_path(visit, tree, *rest, is_leaf=is_hole)


def leaves_with_path(tree: Any) -> list[tuple[str, Any]]:
    """The leaves that are not holes, each with its path."""
    return [(path, leaf) for path, leaf in _slots(tree) if not is_hole(leaf)]


def is_floating(leaf: Any) -> bool:
    """True for real floating arrays and what looks like one (numpy, abstract, traced)."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def is_matrix(path: str, array: jax.Array) -> bool:
    """Say whether a leaf is a weight matrix or kernel: the default of every ``where``.

    True for floating arrays of rank two or more that are not named ``bias`` or ``scale`` (layers
    stacked for a scan give those a rank of two as well).

    Args:
      path: path of the leaf, as in ``Dense_0/kernel``.
      array: the leaf.

    Returns:
      Whether to prune it.

    Example:
      >>> import jax.numpy as jnp
      >>> is_matrix("Dense_0/kernel", jnp.ones((3, 4))), is_matrix("Dense_0/bias", jnp.ones(4))
      (True, False)
    """
    named = path.rsplit("/", 1)[-1] in ("bias", "scale")
    return is_floating(array) and len(array.shape) >= 2 and not named


@dataclasses.dataclass(frozen=True)
class ByPath:
    """The predicate that ``by_path`` makes; compares equal by its regexes, so jit caches hit."""

    regexes: tuple[str, ...]

    def __call__(self, path: str, array: Any) -> bool:
        del array
        return any(re.fullmatch(regex, path) for regex in self.regexes)


def by_path(*regexes: str) -> Where:
    r"""Say by their path which leaves are prunable.

    A regex has to match the whole path. Leaves that are not floating arrays are left out whatever
    their path.

    Args:
      *regexes: regular expressions over paths such as ``Dense_0/kernel``; one has to match.

    Returns:
      A predicate for ``where``.

    Raises:
      ValueError: there is no regex, or one cannot be compiled. Where the predicate is used, a
        regex that matches no parameter is an error that lists the paths.

    Example:
      >>> where = by_path(r".*Dense_\d+/kernel", "head/.*")
      >>> where("encoder/Dense_0/kernel", None), where("Dense_0/bias", None)
      (True, False)
    """
    if not regexes:
        raise ValueError(
            "`by_path()` got no regex, so that nothing could match. Pass at least one, such as "
            "`by_path('.*/kernel')`."
        )
    for regex in regexes:
        compile_regex(regex, "by_path")
    return ByPath(regexes)


def compile_regex(regex: str, user: str) -> re.Pattern[str]:
    """Compile, or say which regex of which function is broken."""
    if not isinstance(regex, str):
        raise TypeError(
            f"`{user}` got {regex!r} of type {type(regex).__name__} as a regex. "
            "Pass a string, such as '.*/kernel'."
        )
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(
            f"`{user}` got {regex!r}, which is no regular expression: {error}. "
            "Escape special characters with a backslash."
        ) from error


def list_paths(paths: list[str], most: int = 12) -> str:
    """Paths for an error message, cut where there are too many to read."""
    shown = ", ".join(repr(path) for path in paths[:most])
    return f"{shown} and {len(paths) - most} more" if len(paths) > most else shown or "none"


def check_regexes_match(regexes: tuple[str, ...], tree: Any, user: str) -> None:
    """Refuse regexes that match no path of ``tree``: they are typing errors."""
    paths = [path for path, _ in leaves_with_path(tree)]
    unused = [r for r in regexes if not any(re.fullmatch(r, path) for path in paths)]
    if unused:
        raise ValueError(
            f"`{user}` got {', '.join(map(repr, unused))}, which matches no parameter (a regex "
            f"has to match the whole path). The paths are {list_paths(paths)}."
        )


def prunable(params: Params, *, where: Where = is_matrix) -> Params:
    """Keep the prunable leaves of a tree and put None in the place of all others.

    Args:
      params: parameters; any tree.
      where: predicate of path and array; leaves that are not floating are never prunable.

    Returns:
      The same tree with None where a leaf is not prunable.

    Raises:
      ValueError: no leaf is prunable, or a regex of ``by_path`` matches no parameter.

    Example:
      >>> import jax.numpy as jnp
      >>> prunable({"kernel": jnp.ones((1, 2)), "bias": jnp.zeros(2)})
      {'bias': None, 'kernel': Array([[1., 1.]], dtype=float32)}
    """
    if isinstance(where, ByPath):
        check_regexes_match(where.regexes, params, "by_path")
    part = map_with_path(
        lambda path, leaf: leaf if is_floating(leaf) and where(path, leaf) else None, params
    )
    if not leaves_with_path(part):
        found = ", ".join(
            f"{path!r} {getattr(leaf, 'dtype', type(leaf).__name__)}{list(jnp.shape(leaf))}"
            for path, leaf in leaves_with_path(params)[:12]
        )
        raise ValueError(
            f"No leaf of `params` is prunable with where={_name(where)}; the leaves are "
            f"{found or 'none'}. Choose floating arrays with `where=jp.by_path(...)`."
        )
    return part


def fill(part: Params, params: Params) -> Params:
    """Put the leaves that ``prunable`` left out back in."""
    return map_leaves(lambda leaf, chosen: leaf if chosen is None else chosen, params, part)


def same_structure(a: Any, b: Any) -> bool:
    """True for trees that differ in nothing but their leaves and holes."""
    structures: list[Any] = [jax.tree.structure(tree, is_leaf=is_hole) for tree in (a, b)]
    return bool(structures[0] == structures[1])


def align(tree: Any, like: Any) -> Any | None:
    """Give ``tree`` the structure of ``like`` if both have the same paths, else None.

    Trees that were made apart mirror one another although their containers differ: a dict and a
    FrozenDict, an nnx state with its variables and without.
    """
    if same_structure(tree, like):
        return tree
    given, wanted = dict(_slots(tree)), [path for path, _ in _slots(like)]
    if given.keys() != set(wanted):
        return None
    return jax.tree.unflatten(
        jax.tree.structure(like, is_leaf=is_hole), [given[path] for path in wanted]
    )


def narrow(tree: Any, part: Params) -> Any:
    """Put None in ``tree`` wherever ``part`` has a hole, if the two mirror one another."""
    mirror = align(tree, part)
    if mirror is None:
        return tree
    return map_leaves(lambda _, leaf: leaf, part, mirror)


def wide(x: jax.Array) -> jax.Array:
    """Cast to at least float32, where products of small numbers do not underflow."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def mirrored(tree: Any, params: Params, name: str) -> Any:
    """Give evidence the structure of ``params``, or say by path how it differs from them."""
    mirror = align(tree, params)
    want = dict(leaves_with_path(params))
    got = dict(leaves_with_path(tree if mirror is None else mirror))
    missing = [path for path in want if path not in got]
    unknown = [path for path in got if path not in want]
    shapes = [
        f"{path!r} has shape {jnp.shape(got[path])}, the weights {jnp.shape(want[path])}"
        for path in want
        if path in got and jnp.shape(got[path]) != jnp.shape(want[path])
    ]
    if mirror is None or missing or unknown or shapes:
        differs = [f"nothing at {list_paths(missing)}"] if missing else []
        differs += [f"unknown {list_paths(unknown)}"] if unknown else []
        differs += shapes or ([] if differs else [f"got {jax.tree.structure(tree)}"])
        raise ValueError(
            f"`{name}` is not a tree like the params: {'; '.join(differs)}. Pass one array for "
            "each weight array, in a tree of the same structure."
        )
    return mirror


def _slots(tree: Any) -> list[tuple[str, Any]]:
    """All leaves with their paths, holes included."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
    return [(path_str(path), leaf) for path, leaf in leaves]


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or repr(f)
