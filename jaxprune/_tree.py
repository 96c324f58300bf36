"""Trees of parameters: what leaves are called, holes, and trees that mirror one another."""

import collections
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._where import is_array, is_floating, is_matrix, matches, regexes_of
from jaxprune.typing import Params, Where

Keys = tuple[str, ...]


class Slot(NamedTuple):
    """A leaf or a hole of a tree, and what it is called.

    Attributes:
      keys: simple names of its key path, which tell leaves apart. A dict and a struct of the same
        fields have the same, and so have an nnx state with its variables and without.
      path: what people read, regexes match and files hold: ``Dense_0/kernel``.
      leaf: what lies there.
      key_path: the path as jax has it.
    """

    keys: Keys
    path: str
    leaf: Any
    key_path: tuple[Any, ...]


def is_hole(leaf: Any) -> bool:
    """True for a leaf outside the pruning problem: None, or what ``optax.masked`` leaves out."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def slots(tree: Any, is_leaf: Callable[[Any], bool] = is_hole) -> list[Slot]:
    """All leaves with their names, holes included.

    Variables and boxes around arrays (nnx, linen's metadata) add a ``.value`` of their own to each
    path. It is left out where nothing else lies beside it; a field that is called `value` has
    neighbours.
    """
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    paths = [path for path, _ in found]
    beside = zip([(), *paths], paths, [*paths[1:], ()], strict=False)
    return [
        _slot(path, leaf, alone=path[:-1] not in (before[: len(path) - 1], after[: len(path) - 1]))
        for (_, leaf), (before, path, after) in zip(found, beside, strict=True)
    ]


def _slot(path: tuple[Any, ...], leaf: Any, alone: bool) -> Slot:
    keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    boxed = alone and len(keys) > 1 and keys[-1] == "value"
    field = isinstance(path[-1], jax.tree_util.GetAttrKey) if path else False
    short = len(keys) - boxed
    n = short if field else len(keys)
    return Slot(keys[:short], "/".join(keys[:n]), leaf, path[:n])


def map_leaves(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map over ``tree`` with ``rest`` beside it. Holes of ``tree`` stay; ``rest`` may have more.

    Params come first and masks second: ``f(param, None)`` is a leaf that is not prunable.
    """
    return map_with_path(lambda _, *leaves: f(*leaves), tree, *rest)


def map_with_path(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Like ``map_leaves``, with the path as the first argument of ``f``."""
    treedef: Any = jax.tree.structure(tree, is_leaf=is_hole)
    beside = zip(*(treedef.flatten_up_to(other) for other in rest), strict=True)
    others = list(beside) if rest else [()] * treedef.num_leaves
    return jax.tree.unflatten(
        treedef,
        [
            s.leaf
            if is_hole(s.leaf)
            else f(s.path, s.leaf, *(None if is_hole(x) else x for x in more))
            for s, more in zip(slots(tree), others, strict=True)
        ],
    )


def leaves_with_path(tree: Any) -> list[tuple[str, Any]]:
    """The leaves that are not holes, each with its path."""
    return [(slot.path, slot.leaf) for slot in slots(tree) if not is_hole(slot.leaf)]


def leaves_by_keys(tree: Any) -> dict[Keys, Any]:
    """The leaves that are not holes, by what tells them apart."""
    return {slot.keys: slot.leaf for slot in slots(tree) if not is_hole(slot.leaf)}


def leaves_by_path(tree: Any, user: str) -> dict[str, Any]:
    """The leaves that are not holes, by path, for who selects by paths; refuse two of one path."""
    leaves = leaves_with_path(tree)
    check_paths([path for path, _ in leaves], user)
    return dict(leaves)


def check_paths(paths: list[str], user: str) -> None:
    """Refuse paths that meet once they are joined with slashes: selecting one takes the other."""
    twice = [path for path, n in collections.Counter(paths).items() if n > 1]
    if twice:
        raise ValueError(
            f"`{user}` got several leaves at {list_paths(twice)}: paths are joined with '/', and "
            "leaves are told apart by them. Rename a key that holds a '/'."
        )


def list_paths(paths: list[str], most: int = 12) -> str:
    """Paths for an error message, cut where there are too many to read."""
    shown = ", ".join(repr(path) for path in paths[:most])
    return f"{shown} and {len(paths) - most} more" if len(paths) > most else shown or "none"


def check_regexes_match(regexes: tuple[str, ...], tree: Any, user: str) -> None:
    """Refuse regexes that match no path of ``tree``: they are typing errors."""
    paths = list(leaves_by_path(tree, user)) if regexes else []
    unused = [r for r in regexes if not any(matches(r, path) for path in paths)]
    if unused:
        raise ValueError(
            f"`{user}` got {', '.join(map(repr, unused))}, which matches no parameter (a regex "
            f"has to match the whole path).{_hint(unused, paths)} The paths are "
            f"{list_paths(paths)}."
        )


def _hint(unused: list[str], paths: list[str]) -> str:
    """What a regex that matches nothing may have meant."""
    for regex in unused:
        optional = f"(.*/)?{regex.removeprefix('.*/')}"
        if any(matches(optional, path) for path in paths):
            return f" With {optional!r} it would."
    special = [path for path in paths if re.escape(path).replace("\\-", "-") != path]
    if special:
        return f" Paths hold special characters: write `re.escape({special[0]!r})`."
    return ""


def prunable(params: Params, *, where: Where = is_matrix) -> Params:
    """Keep the prunable leaves of a tree and put None in the place of all others.

    Args:
      params: parameters; any tree.
      where: predicate of path and array; leaves that are not floating are never prunable.

    Returns:
      The same tree with None where a leaf is not prunable.

    Raises:
      ValueError: no leaf is prunable, or a regex of ``by_path`` or ``exclude`` matches no
        parameter, or two parameters have one path.

    Example:
      >>> import jax.numpy as jnp
      >>> prunable({"kernel": jnp.ones((1, 2)), "bias": jnp.zeros(2)})
      {'bias': None, 'kernel': Array([[1., 1.]], dtype=float32)}
    """
    for regex, user in regexes_of(where):
        check_regexes_match((regex,), params, user)
    part = map_with_path(
        lambda path, leaf: leaf if is_floating(leaf) and where(path, leaf) else None, params
    )
    if not leaves_with_path(part):
        raise ValueError(
            f"No leaf of `params` is prunable with where={_name(where)}; {_what_there_is(params)}"
        )
    return part


def _what_there_is(params: Params) -> str:
    """The leaves of params of which none is prunable, and one next step."""
    leaves = leaves_with_path(params)
    objects = [(path, leaf) for path, leaf in leaves if not is_array(leaf)]
    if leaves and len(objects) == len(leaves):
        path, leaf = objects[0]
        return (
            f"its leaves are no arrays but objects, such as {type(leaf).__name__} at {path!r}. "
            "Pass the tree of arrays that these objects hold."
        )
    found = ", ".join(
        f"{path!r} {getattr(leaf, 'dtype', type(leaf).__name__)}{list(jnp.shape(leaf))}"
        if is_array(leaf)
        else f"{path!r} of type {type(leaf).__name__}"
        for path, leaf in leaves[:12]
    )
    return f"the leaves are {found or 'none'}. Choose floating arrays with `where=jp.by_path(...)`."


def fill(part: Params, params: Params) -> Params:
    """Put the leaves that ``prunable`` left out back in."""
    return map_leaves(lambda leaf, chosen: leaf if chosen is None else chosen, params, part)


def same_structure(a: Any, b: Any) -> bool:
    """True for trees that differ in nothing but their leaves and holes."""
    structures: list[Any] = [jax.tree.structure(tree, is_leaf=is_hole) for tree in (a, b)]
    return bool(structures[0] == structures[1])


def align(tree: Any, like: Any) -> Any | None:
    """Give ``tree`` the structure of ``like`` if both have the same leaves, else None.

    Trees that were made apart mirror one another although their containers differ: a dict and a
    FrozenDict, an nnx state with its variables and without. A hole of either may stand for a whole
    subtree of the other, as a label of ``optax.partition`` does.
    """
    if same_structure(tree, like):
        return tree
    given = {slot.keys: slot.leaf for slot in slots(tree)}
    holes = {keys for keys, leaf in given.items() if is_hole(leaf) and keys}
    left, leaves = set(given), []
    for keys, _, leaf, _ in slots(like):
        over = next((keys[:n] for n in range(1, len(keys)) if keys[:n] in holes), None)
        below = {k for k in left if k[: len(keys)] == keys} if is_hole(leaf) else None
        if keys in given:
            leaves.append(given[keys])
            left.discard(keys)
        elif over is not None:
            leaves.append(None)
            left.discard(over)
        elif below and keys:
            leaves.append(None)
            left -= below
        else:
            return None
    if left - holes:
        return None
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_hole), leaves)


def narrow(tree: Any, part: Params) -> Any:
    """Put None in ``tree`` wherever ``part`` has a hole, if the two mirror one another."""
    mirror = align(tree, part)
    if mirror is None:
        return tree
    return map_leaves(lambda _, leaf: leaf, part, mirror)


def wide(x: jax.Array) -> jax.Array:
    """Cast to at least float32, where products of small numbers do not underflow."""
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: Any) -> Any:
    """Float32 for narrower floats, eight bits included, which promote to nothing; else itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def mirrored(tree: Any, params: Params, name: str) -> Any:
    """Give evidence the structure of ``params``, or say by path how it differs from them."""
    mirror = align(tree, params)
    given = tree if mirror is None else mirror
    want, got = leaves_by_keys(params), leaves_by_keys(given)
    missing = ["/".join(keys) for keys in want if keys not in got]
    unknown = ["/".join(keys) for keys in got if keys not in want]
    shapes = [
        f"{'/'.join(keys)!r} has shape {jnp.shape(got[keys])}, the weights {jnp.shape(want[keys])}"
        for keys in want
        if keys in got and jnp.shape(got[keys]) != jnp.shape(want[keys])
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


def copy_arrays(tree: Any) -> Any:
    """Copy the arrays of a tree; functions and strings among its leaves stay what they are."""
    return jax.tree.map(lambda x: jnp.copy(x) if is_array(x) else x, tree)


def split_static(tree: Any) -> tuple[list[Any], Any]:
    """Take a tree apart into its arrays and what is not one, to be put together by ``join_static``.

    Modules hold functions and strings among their leaves; what jit does not take travels beside.
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    fixed = tuple(_Hole if is_array(leaf) else leaf for leaf in leaves)
    return arrays, (treedef, fixed, tuple(map(type, fixed)))  # True equals 1, but is not the same


def join_static(arrays: Any, static: Any) -> Any:
    """Put arrays back where ``split_static`` took them from."""
    treedef, leaves, _ = static
    left = iter(arrays)
    return jax.tree.unflatten(treedef, [next(left) if x is _Hole else x for x in leaves])


class _Hole:
    """Where an array was."""


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or repr(f)
