"""A layout: how each parameter is used, and what each of its axes means, as plain data."""

# A leaf may be used several times, and each use says what it takes each axis for:
#
#     blocks/up     [8, 32, 128]   matmul (layer, in, out)
#     embedding     [50k, 32]      embedding (None, out)      the rows are looked up
#                                  matmul (out, in)           and make the logits again
#
# An axis has the role that all uses agree on, and none where they do not. Whoever asks for an axis
# by its meaning is told why it has none; nothing is guessed.

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from jaxprune._errors import short
from jaxprune._kept import name_part, path_in
from jaxprune._tree import is_hole, leaves_by_path, list_paths, slots
from jaxprune._use import Entry, Role, Use, plain_entry, read_entries
from jaxprune._where import is_array, matches
from jaxprune.typing import Params

UNSAID = "the layout says nothing of it"


@dataclasses.dataclass(frozen=True)
class Layout(Mapping[str, tuple[Use, ...]]):
    """What each axis of each parameter means: found by ``find_layout``, or declared.

    A mapping from paths (or regexes, where it was declared) to uses. Hand it to ``find_masks``,
    ``prune`` and the like as ``layout=``: layers of a stack are then ranked one by one, and parts
    may name axes by their roles, as ``Channels("out")`` does. In ``a | b`` what ``b`` says counts,
    where it says something.

    Layouts are hashable, and equal where they say the same. They go through JSON and back:
    ``jp.Layout(json.loads(json.dumps(layout.json)))``.

    Args:
      entries: from regex (matching the whole path) to the roles of the axes, None where there is
        none: ``{".*/kernel": ("layer", "in", "out")}``. Leaves with a ``"window"`` count as
        convolutions, others with ``"in"`` and ``"out"`` as matrix products. Or what ``json`` gave.

    Raises:
      TypeError: roles are no tuple of strings.
      ValueError: a role is unknown, or a regex cannot be compiled; when used, a regex matches no
        parameter, or its roles do not fit a shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import jaxprune as jp
      >>> params = {"up": jnp.arange(1.0, 9.0).reshape(2, 1, 4)}
      >>> layout = Layout({"up": ("layer", "in", "out")})
      >>> jp.find_masks(params, 0.5, layout=layout)["up"][:, 0]
      Array([[False, False,  True,  True],
             [False, False,  True,  True]], dtype=bool)
    """

    entries: Any = ()  # of `Entry`, once it is built

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", tuple(read_entries(self.entries)))

    # As a mapping. What comes later counts.

    @cached_property
    def _found(self) -> dict[str, Entry]:
        return {entry.path: entry for entry in self.entries if entry.shape is not None}

    @cached_property
    def _hash(self) -> int:
        return hash(self.entries)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self.entries == other.entries)

    def __getitem__(self, path: str) -> tuple[Use, ...]:
        found = (entry.uses for entry in reversed(self.entries) if entry.path == path)
        uses = next(found, None)
        if uses is None:
            raise KeyError(path)
        return uses

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(entry.path for entry in self.entries))

    def __len__(self) -> int:
        return len(set(self))

    def __contains__(self, path: object) -> bool:
        return any(entry.path == path for entry in self.entries)

    def __or__(self, other: "Layout | Mapping[str, Any]") -> "Layout":
        if not isinstance(other, Mapping):
            return NotImplemented
        return Layout((*self.entries, *Layout(other).entries))

    # As questions about a leaf.

    def uses(self, path: str, rank: int) -> tuple[Use, ...]:
        """How a leaf of so many axes is used; nothing where the layout says nothing of it."""
        if len(self.entries) == len(self._found):
            return self._found[path].uses if path in self._found else ()
        covers = [entry for entry in reversed(self.entries) if entry.covers(path, rank)]
        says = (entry.uses for entry in covers if not entry.is_at_a_loss)
        return next(says, covers[0].uses if covers else ())

    def roles(self, path: str, rank: int) -> tuple[Role, ...]:
        """The roles that all uses of a leaf agree on, None for the other axes."""
        each = zip(*(use.axes for use in self.uses(path, rank)), strict=True)
        return tuple(roles[0] if len(set(roles)) == 1 else None for roles in each) or (None,) * rank

    def layers(self, path: str, rank: int) -> tuple[int, ...]:
        """The axes of a leaf that count layers."""
        return tuple(i for i, role in enumerate(self.roles(path, rank)) if role == "layer")

    def of_layer(self, path: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of one layer of a leaf, or of the leaf if it is no stack."""
        layers = self.layers(path, len(shape))
        return tuple(n for i, n in enumerate(shape) if i not in layers)

    def why(self, path: str, rank: int) -> str:
        """Why some axes of a leaf have no role; nothing where all have one."""
        uses = self.uses(path, rank)
        if not uses:
            return UNSAID
        reasons = [w for use in uses for role, w in zip(use.axes, use.why, strict=True) if not role]
        if not reasons and None in self.roles(path, rank):
            reasons = [f"it is used as {' and as '.join(map(str, uses))}"]
        return "; ".join(dict.fromkeys(reasons))

    # As data.

    @property
    def json(self) -> list[dict[str, Any]]:
        """All that it says in plain lists and numbers, which ``jp.Layout`` reads again."""
        return [plain_entry(entry) for entry in self.entries]

    def at(self, part: str | Params) -> "Layout":
        """Give the layout as an optimizer sees it that gets only a part of the whole tree.

        Args:
          part: the prefix of a subtree, which is taken off the paths: ``layout.at("params")`` of
            flax variables. Or a tree with the same paths but fewer leaves. Regexes stay, without
            the prefix where they begin with it.

        Raises:
          ValueError: nothing of the layout is in that part.

        Example:
          >>> layout = Layout({"params/w": ("in", "out"), "params/v": ("out", "in")})
          >>> list(layout.at("params"))
          ['w', 'v']
        """
        inside = path_in(part)
        entries = []
        for entry in self.entries:
            path = inside(entry.path)
            if path is None and entry.shape is None:  # a regex may mean leaves in there
                path = entry.path
            if path is not None:
                entries.append(dataclasses.replace(entry, path=path))
        if self.entries and not entries:
            raise ValueError(
                f"`layout.at({name_part(part)})` finds nothing below it. The paths are "
                f"{list_paths(list(self))}."
            )
        return Layout(tuple(entries))

    def on(self, params: Params, user: str) -> "Layout":
        """Settle it on the params of a function: one entry for each array, checked.

        Args:
          params: arrays or shapes.
          user: the public function that was given the layout, for messages.

        Raises:
          ValueError: a regex matches nothing, roles do not fit a shape, or it is the layout of
            another tree.
        """
        leaves = {p: tuple(x.shape) for p, x in leaves_by_path(params, user).items() if is_array(x)}
        _check_matches(self, leaves, params, user)
        found = {path: self.uses(path, len(shape)) for path, shape in leaves.items()}
        _check_found(self, leaves, found, user)
        said = {path: uses or _nothing(len(leaves[path])) for path, uses in found.items()}
        return Layout(tuple(Entry(path, uses, leaves[path]) for path, uses in said.items()))

    def __repr__(self) -> str:
        shown = [f"{path}: {' and '.join(map(str, self[path]))}" for path in list(self)[:8]]
        more = [f"and {len(self) - 8} more"] if len(self) > 8 else []
        return f"Layout({'; '.join([*shown, *more])})"

    def __str__(self) -> str:
        rows = [
            (entry.path, "x".join(map(str, entry.shape or ())), str(use))
            for entry in self.entries
            for use in entry.uses
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2]]) for row in rows
        ]
        reasons = [
            f"  {entry.path} axis {_places(use.why, why)}: {why}"
            for entry in self.entries
            for use in entry.uses
            for why in dict.fromkeys(use.why)
            if why
        ]
        through = [
            f"  {entry.path}: goes through {use.through}"
            for entry in self.entries
            for use in entry.uses
            if use.through
        ]
        notes = [*dict.fromkeys(reasons), *dict.fromkeys(through)]
        return "\n".join([*lines, *(["cannot be told:", *notes] if notes else [])])


def _nothing(rank: int) -> tuple[Use, ...]:
    """What is known of a leaf that a layout does not name."""
    return (Use("unknown", (None,) * rank, (UNSAID,) * rank),)


def check_layout(user: str, layout: Any) -> None:
    """Refuse what is no layout, before it is asked."""
    if layout is not None and not isinstance(layout, Layout):
        raise TypeError(
            f"`{user}` got layout={short(layout)}. Pass `jp.find_layout(fn, params, *inputs)`, a "
            'convention such as `jp.layouts.flax`, or `jp.Layout({".*/kernel": ("in", "out")})`.'
        )


def _places(reasons: Sequence[str], why: str) -> str:
    return ", ".join(str(i) for i, reason in enumerate(reasons) if reason == why)


def _check_matches(
    layout: Layout, leaves: Mapping[str, Sequence[int]], params: Params, user: str
) -> None:
    """Refuse regexes that match nothing, and roles of another rank than a leaf."""
    holes = [slot.path for slot in slots(params) if is_hole(slot.leaf)]
    unused, wrong = [], []
    for entry in layout.entries:
        if entry.shape is not None or entry.optional:
            continue
        mine = [path for path in leaves if matches(entry.path, path)]
        if not mine and not any(_touches(entry.path, hole) for hole in holes):
            unused.append(entry.path)
        for path in mine:
            last = next(e for e in reversed(layout.entries) if e.covers(path, len(leaves[path])))
            if last is entry and len(leaves[path]) != entry.rank:
                roles, shape = entry.uses[0].axes, tuple(leaves[path])
                wrong.append(f"{path!r} of shape {shape} by the {len(roles)} roles {roles}")
    if unused:
        raise ValueError(
            f"`{user}(layout=...)` got {list_paths(unused)}, which matches no parameter (a regex "
            f"has to match the whole path). The paths are {list_paths(list(leaves))}."
        )
    if wrong:
        raise ValueError(
            f"`{user}(layout=...)` declares {'; '.join(wrong[:6])}: there has to be a role for "
            "each axis, None where there is none. Declare these leaves apart, a stack with its "
            'axis of layers: `("layer", "in", "out")`.'
        )


def _touches(regex: str, hole: str) -> bool:
    """Say whether a rule may mean what a hole stands for; a hole may cover a whole subtree."""
    return matches(regex, hole) or regex.startswith(f"{hole}/")


def _check_found(
    layout: Layout,
    leaves: Mapping[str, Sequence[int]],
    found: Mapping[str, tuple[Use, ...]],
    user: str,
) -> None:
    """Refuse a layout that was found for another tree: path by path what differs."""
    if not layout._found:
        return
    missing = [path for path, uses in found.items() if not uses]
    shapes = [
        f"{path!r} has shape {tuple(shape)}, in the layout {layout._found[path].shape}"
        for path, shape in leaves.items()
        if path in layout._found and layout._found[path].shape != tuple(shape)
    ]
    if missing or shapes:
        unknown = [path for path in layout._found if path not in leaves]
        parts = [f"it says nothing of {list_paths(missing, 6)}"] * bool(missing) + shapes[:6]
        parts += [f"it knows {list_paths(unknown, 6)}, which the params lack"] * bool(unknown)
        raise ValueError(
            f"`{user}(layout=...)` got the layout of another tree: {'; '.join(parts)}. Find it for "
            "these params, or take the part of it that they are: `layout.at(prefix)`."
        )
