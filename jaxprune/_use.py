"""One use of a parameter, and what a layout says of some leaves: declared, read, written."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jaxprune._errors import short
from jaxprune._where import compile_regex, matches

Role: TypeAlias = str | None  # what an axis means; None where nobody can tell

ROLES = ("layer", "in", "out", "window", "group")
KINDS = (
    *("matmul", "conv"),  # contracted with data
    *("embedding", "gain", "bias"),  # looked up by data; multiplied with it; added to it
    *("derived", "table", "unused", "unknown"),
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter.

    Attributes:
      kind: ``"matmul"`` or ``"conv"`` (contracted with data), ``"embedding"`` (looked up by data),
        ``"gain"`` or ``"bias"`` (elementwise with data), ``"derived"`` (goes through a function
        first, so that its zeros are no zeros of the network), ``"table"`` (meets no data),
        ``"unused"``, or ``"unknown"``.
      axes: for each axis ``"layer"`` (a loop runs over it), ``"in"`` (contracted with data),
        ``"out"``, ``"window"`` (spatial), ``"group"`` (experts, a batch axis of the product), or
        None where that cannot be told.
      why: for each axis the reason, where it has no role; else nothing.
      zero: what a removed weight becomes before it meets data: 0, unless it is derived; None where
        that depends on other weights.
      through: the function that it goes through, if it is derived.

    Example:
      >>> str(Use("matmul", ("layer", "in", "out")))
      'matmul (layer, in, out)'
    """

    kind: str
    axes: tuple[Role, ...]
    why: tuple[str, ...] = ()
    zero: float | None = 0.0
    through: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`Use(kind={self.kind!r})` is unknown. The kinds are {_list(KINDS)}.")
        object.__setattr__(self, "axes", _checked_roles(self.axes, "Use"))
        why = tuple(self.why) or tuple("" if role else "nobody knows" for role in self.axes)
        if len(why) != len(self.axes):
            raise ValueError(
                f"`Use(why={why!r})` has {len(why)} reasons for {len(self.axes)} axes. Give one "
                "for each axis, empty where it has a role."
            )
        object.__setattr__(self, "why", why)
        if self.zero is not None and math.isnan(self.zero):
            object.__setattr__(self, "zero", math.nan)  # the one that equals itself in a tuple

    def __reduce__(self) -> tuple[Any, ...]:
        return Use, (self.kind, self.axes, self.why, self.zero, self.through)

    def __str__(self) -> str:
        axes = ", ".join(role or "?" for role in self.axes)
        zero = "depends on others" if self.zero is None else f"becomes {self.zero:.3g}"
        return f"{self.kind} ({axes})" + (f", whose zero {zero}" if self.kind == "derived" else "")


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a layout says of some leaves.

    Attributes:
      path: regex over whole paths, or a path.
      uses: of each leaf; they have its rank.
      shape: of the one leaf that was looked at, None where a rule speaks of several.
      optional: whether it may match nothing, and passes over leaves of another rank, as the rules
        of a convention do.
    """

    path: str
    uses: tuple[Use, ...]
    shape: tuple[int, ...] | None = None
    optional: bool = False

    @property
    def is_at_a_loss(self) -> bool:
        """True for a rule of a convention that says that nobody can tell."""
        return self.optional and all(use.kind == "unknown" for use in self.uses)

    @property
    def rank(self) -> int:
        return len(self.uses[0].axes)

    def covers(self, path: str, rank: int) -> bool:
        """Say whether it speaks of a leaf."""
        if self.shape is not None:
            return path == self.path
        return matches(self.path, path) and (self.rank == rank or not self.optional)


def read_entries(given: Any) -> list[Entry]:
    """Read rules of a user, or what JSON gives back."""
    if hasattr(given, "entries"):  # a layout
        return list(given.entries)
    if isinstance(given, Mapping):
        return [_declared(regex, roles) for regex, roles in given.items()]
    if not isinstance(given, list | tuple) or not all(
        isinstance(e, Entry | Mapping) for e in given
    ):
        raise TypeError(
            f"`Layout` got {short(given)}. Pass a mapping from regexes to the roles of axes, such "
            'as `{".*/kernel": ("in", "out")}`, or what `layout.json` gave.'
        )
    return [e if isinstance(e, Entry) else _from_plain(e) for e in given]


def _declared(regex: str, roles: Any) -> Entry:
    compile_regex(regex, "Layout")
    axes = _checked_roles(roles, f"Layout({{{regex!r}: ...}})")
    kind = "unknown"
    if {"in", "out"} <= set(axes):
        kind = "conv" if "window" in axes else "matmul"
    return Entry(regex, (Use(kind, axes, tuple("" if r else "declared so" for r in axes)),))


def _checked_roles(roles: Any, user: str) -> tuple[Role, ...]:
    if isinstance(roles, str) or not isinstance(roles, tuple | list):
        raise TypeError(
            f"`{user}` got {short(roles)} as the roles of axes. Pass one for each axis, as in "
            '`("layer", "in", "out")`, None where there is none.'
        )
    for role in roles:
        if role is not None and role not in ROLES:
            raise ValueError(f"`{user}` got the role {role!r}. {nearest(role, ROLES)}")
    return tuple(roles)


def plain_entry(entry: Entry) -> dict[str, Any]:
    uses = [
        {
            "kind": use.kind,
            "axes": list(use.axes),
            "why": list(use.why),
            "zero": use.zero if use.zero is None or math.isfinite(use.zero) else str(use.zero),
            "through": use.through,
        }
        for use in entry.uses
    ]
    shape = None if entry.shape is None else list(entry.shape)
    return {"path": entry.path, "uses": uses, "shape": shape, "optional": entry.optional}


def _from_plain(entry: Mapping[str, Any]) -> Entry:
    try:
        uses = tuple(
            Use(
                use["kind"],
                tuple(use["axes"]),
                tuple(use["why"]),
                None if use["zero"] is None else float(use["zero"]),
                use["through"],
            )
            for use in entry["uses"]
        )
        shape = None if entry["shape"] is None else tuple(entry["shape"])
        return Entry(entry["path"], uses, shape, entry["optional"])
    except KeyError as error:
        raise ValueError(
            f"`Layout` got an entry without {error}: {short(dict(entry))}. Pass what "
            "`layout.json` gave, whole."
        ) from error


def nearest(name: Any, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, 1)
    return f"Did you mean {close[0]!r}?" if close else f"The roles are {_list(known)}."


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
