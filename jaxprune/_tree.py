"""Trees of parameters: what leaves are called, holes, and trees that mirror one another."""

import collections
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._where import is_array, is_floating, is_matrix, matches, regexes_of
from jaxprune.typing import DType, Leaf, Params, Tree, Where

Keys = tuple[str, ...]
Shape = tuple[int, ...]


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
    leaf: Leaf
    key_path: tuple[Any, ...]


def is_hole(leaf: Leaf) -> bool:
    """True for a leaf outside the pruning problem: None, or what ``optax.masked`` leaves out."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def slots(tree: Tree, is_leaf: Callable[[Any], bool] = is_hole) -> list[Slot]:
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


def _slot(path: tuple[Any, ...], leaf: Leaf, alone: bool) -> Slot:
    keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
    boxed = alone and len(keys) > 1 and keys[-1] == "value"
    field = isinstance(path[-1], jax.tree_util.GetAttrKey) if path else False
    short = len(keys) - boxed
    n = short if field else len(keys)
    return Slot(keys[:short], "/".join(keys[:n]), leaf, path[:n])


def map_leaves(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Map over ``tree`` with ``rest`` beside it. Holes of ``tree`` stay; ``rest`` may have more.

    Params come first and masks second: ``f(param, None)`` is a leaf that is not prunable.
    """
    return map_with_path(lambda _, *leaves: f(*leaves), tree, *rest)


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
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


def leaves_with_path(tree: Tree) -> list[tuple[str, Any]]:
    """The leaves that are not holes, each with its path."""
    return [(slot.path, slot.leaf) for slot in slots(tree) if not is_hole(slot.leaf)]


def leaves_by_keys(tree: Tree) -> dict[Keys, Leaf]:
    """The leaves that are not holes, by what tells them apart."""
    return {slot.keys: slot.leaf for slot in slots(tree) if not is_hole(slot.leaf)}


def leaves_by_path(tree: Tree, user: str) -> dict[str, Leaf]:
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


def check_regexes_match(
    regexes: tuple[str, ...], tree: Tree, user: str, also: Sequence[str] = ()
) -> None:
    """Refuse regexes that match no path of ``tree``, and no other name: they are typing errors."""
    paths = list(leaves_by_path(tree, user)) if regexes else []
    unused = [r for r in regexes if not any(matches(r, path) for path in (*paths, *also))]
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
            f"No leaf of `params` is prunable with where={_name(where)}; "
            + (_uses_there_are(where, params) or _what_there_is(params))
        )
    return part


def _uses_there_are(where: Where, params: Params) -> str:
    """How the leaves are used of which a predicate by use takes none; nothing for any other."""
    layout = getattr(where, "layout", None)
    if layout is None:
        return ""
    used = [
        f"{path!r} as {' and as '.join(use.kind for use in layout.uses(path, len(leaf.shape)))}"
        for path, leaf in leaves_with_path(params)
        if is_array(leaf)
    ]
    return (
        f"they are used as follows: {', '.join(used[:12])}. Name all uses of a leaf, as in "
        '`jp.by_use("embedding", "matmul")` for a table that is both, or choose by path.'
    )


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


def same_structure(a: Tree, b: Tree) -> bool:
    """True for trees that differ in nothing but their leaves and holes."""
    structures: list[Leaf] = [jax.tree.structure(tree, is_leaf=is_hole) for tree in (a, b)]
    return bool(structures[0] == structures[1])


def align(tree: Tree, like: Tree) -> Tree | None:
    """Give ``tree`` the structure of ``like`` if both have the same leaves, else None.

    Trees that were made apart mirror one another although their containers differ: a dict and a
    FrozenDict, an nnx state with its variables and without. A hole of either may stand for a whole
    subtree of the other, as a label of ``optax.partition`` does.
    """
    if same_structure(tree, like):
        return tree
    leaves, unknown = _beside(tree, slots(like))
    return None if unknown or any(x is _Hole for x in leaves) else _built(like, leaves)


def _beside(tree: Tree, wanted: list[Slot]) -> tuple[list[Leaf], list[str]]:
    """What ``tree`` has for each wanted slot, ``_Hole`` where it says nothing; what else it has.

    A hole covers what lies below it: in ``{"a": None}`` beside ``{"a": {"b": x, "c": y}}`` both
    leaves are None, and in ``{"a": {"b": x}}`` beside ``{"a": None}`` nothing is left over.
    """
    given = {slot.keys: slot for slot in slots(tree)}
    holes = {keys for keys, slot in given.items() if is_hole(slot.leaf) and keys}
    left, leaves = set(given), []
    for keys, _, leaf, _ in wanted:
        over = next((keys[:n] for n in range(1, len(keys)) if keys[:n] in holes), None)
        below = {k for k in left if k[: len(keys)] == keys} if is_hole(leaf) and keys else set()
        found = keys in given
        leaves.append(given[keys].leaf if found else None if over or below else _Hole)
        left -= {keys} if found else {over} if over else below
    return leaves, [slot.path for keys, slot in given.items() if keys in left - holes]


def _leaves(tree: Tree) -> list[Leaf]:
    return jax.tree.leaves(tree, is_leaf=is_hole)


def _built(like: Tree, leaves: list[Leaf]) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_hole), leaves)


def match(
    tree: Tree,
    like: Tree,
    name: str,
    *,
    step: str,
    of: str = "the params",
    gaps: Literal["none", "holes", "any"] = "none",
    fits: Callable[[Shape, Shape], bool] | None = operator.eq,
) -> Any:
    """Give ``tree`` the structure of ``like``, or say by path all that differs.

    Args:
      tree: what somebody passed; its containers may be others, as for ``align``.
      like: what it has to mirror.
      name: what the reader calls ``tree``.
      step: what to do about a difference; a sentence.
      of: what the reader calls ``like``.
      gaps: what may be where ``like`` has a leaf: nothing but a leaf, a hole too, or no node at
        all (which makes a hole).
      fits: from the shape of a leaf and that of its counterpart, whether the two go together; None
        where any do.

    Raises:
      ValueError: leaves are missing or unknown, or shapes do not fit.
    """
    wanted = slots(like)
    same = same_structure(tree, like)
    leaves, unknown = (_leaves(tree), []) if same else _beside(tree, wanted)
    missing, shapes = [], []
    for (_, path, leaf, _), mine in zip(wanted, leaves, strict=True):
        if mine is _Hole:
            missing += [path] if gaps != "any" else []
        elif is_hole(mine) or is_hole(leaf):
            if gaps == "none" and is_hole(mine) != is_hole(leaf):
                (missing if is_hole(mine) else unknown).append(path)
        elif fits and not fits(_shape(mine), _shape(leaf)):
            shapes.append(f"{path!r} has shape {_shape(mine)}, in {of} {_shape(leaf)}")
    if missing or unknown or shapes:
        differs = _differences(tree, missing, unknown, [slot.path for slot in wanted])
        raise ValueError(
            f"`{name}` is not a tree like {of}: {'; '.join(differs + shapes[:12])}. {step}"
        )
    return _built(like, [None if mine is _Hole else mine for mine in leaves])


def _differences(
    tree: Tree, missing: list[str], unknown: list[str], wanted: list[str]
) -> list[str]:
    """Say what is missing and what nobody knows; the paths that there are, unless all are named."""
    words = [f"nothing at {list_paths(missing)}"] if missing else []
    if unknown == [""]:  # no tree at all
        return [f"got {'None' if tree is None else type(tree).__name__}", *words]
    if unknown:
        known = "" if missing else f" (its paths are {list_paths(wanted)})"
        words.append(f"unknown {list_paths(unknown)}{known}")
    return words


def _shape(leaf: Leaf) -> Shape:
    return tuple(getattr(leaf, "shape", ()))


def narrow(tree: Tree, part: Params) -> Tree:
    """Put None in ``tree`` wherever ``part`` has a hole, if the two mirror one another."""
    mirror = align(tree, part)
    if mirror is None:
        return tree
    return map_leaves(lambda _, leaf: leaf, part, mirror)


def wide(x: jax.Array) -> jax.Array:
    """Cast to at least float32, where products of small numbers do not underflow."""
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: DType) -> DType:
    """Float32 for narrower floats, eight bits included, which promote to nothing; else itself."""
    narrow = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32) if narrow else jnp.dtype(dtype)


def mirrored(tree: Tree, params: Params, name: str) -> Tree:
    """Give evidence the structure of ``params``, or say by path how it differs from them."""
    step = "Pass one array for each weight array, in a tree of the same structure."
    return match(tree, params, name, step=step)


def copy_arrays(tree: Tree) -> Tree:
    """Copy the arrays of a tree; functions and strings among its leaves stay what they are."""
    return jax.tree.map(lambda x: jnp.copy(x) if is_array(x) else x, tree)


def split_static(tree: Tree) -> tuple[list[Leaf], Any]:
    """Take a tree apart into its arrays and what is not one, to be put together by ``join_static``.

    Modules hold functions and strings among their leaves; what jit does not take travels beside.
    """
    leaves, treedef = jax.tree.flatten(tree)
    arrays = [leaf for leaf in leaves if is_array(leaf)]
    fixed = tuple(_Hole if is_array(leaf) else leaf for leaf in leaves)
    return arrays, (treedef, fixed, tuple(map(type, fixed)))  # True equals 1, but is not the same


def join_static(arrays: Tree, static: Any) -> Tree:
    """Put arrays back where ``split_static`` took them from."""
    treedef, leaves, _ = static
    left = iter(arrays)
    return jax.tree.unflatten(treedef, [next(left) if x is _Hole else x for x in leaves])


class _Hole:
    """Where something else was, or would be: an array, a leaf that a tree lacks."""


def _name(f: Any) -> str:
    return getattr(f, "__name__", None) or repr(f)
