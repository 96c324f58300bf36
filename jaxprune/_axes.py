"""Axes of leaves by their role or by number, for parts whose settings name them."""

from collections.abc import Mapping, Sequence

from jaxprune._layout import Layout
from jaxprune._use import ROLES, nearest


def axes_of(layout: Layout | None, path: str, rank: int, axis: int | str) -> tuple[int, ...]:
    """The axes of a leaf that one setting means: those of a role, or a number counted in a layer.

    A number counts the axes of one layer, as it would if the layers were leaves of their own.
    """
    if isinstance(axis, str):
        roles = () if layout is None else layout.roles(path, rank)
        return tuple(i for i, role in enumerate(roles) if role == axis)
    own = own_axes(layout, path, rank)
    return (own[axis],) if -len(own) <= axis < len(own) else ()


def own_axes(layout: Layout | None, path: str, rank: int) -> tuple[int, ...]:
    """The axes of one layer of a leaf: all that count no layers."""
    layers = () if layout is None else layout.layers(path, rank)
    return tuple(i for i in range(rank) if i not in layers)


def check_role(axis: object, part: str, *, known: Sequence[str] = ROLES[1:]) -> None:
    """Refuse what names no role that an axis of a unit may have."""
    if isinstance(axis, str) and axis not in known:
        raise ValueError(f"`{part}` names no role of an axis. {nearest(axis, known)}")


def check_named(
    layout: Layout | None,
    shapes: Mapping[str, Sequence[int]],
    axes: Sequence[int | str],
    part: str,
    *,
    single: bool,
) -> None:
    """Refuse names of axes that some leaves do not have, or have twice where one is meant.

    Args:
      layout: settled on the leaves; None where nobody gave one.
      shapes: of the leaves that are pruned, by path.
      axes: names and numbers, of which numbers pass.
      part: who names them, as its user wrote it.
      single: whether an axis has to be one.

    Raises:
      ValueError: which leaves, what their axes are, and what to do.
    """
    names = [axis for axis in axes if isinstance(axis, str)]
    if not names:
        return
    if layout is None:
        raise ValueError(
            f"`{part}` names axes by their roles, which only a layout knows. Pass "
            "`layout=jp.find_layout(fn, params, *inputs)`, or a convention such as "
            "`layout=jp.layouts.flax`."
        )
    bad, first = [], ""
    for path, shape in shapes.items():
        found = {name: axes_of(layout, path, len(shape), name) for name in names}
        if wrong := [n for n, i in found.items() if not i or (single and len(i) > 1)]:
            bad.append(describe(layout, path, shape, wrong[0], len(found[wrong[0]])))
            first = first or ways_out(layout, path, len(shape), wrong[0])
    if bad:
        more = f" and {len(bad) - 6} more" if len(bad) > 6 else ""
        raise ValueError(f"`{part}` does not fit {'; '.join(bad[:6])}{more}. {first}")


def describe(layout: Layout, path: str, shape: Sequence[int], name: str, times: int = 0) -> str:
    """Say of a leaf what it has in the place of one axis of some name, and why."""
    roles = ", ".join(role or "?" for role in layout.roles(path, len(shape)))
    has = f"{path!r} of shape {tuple(shape)}, whose axes are ({roles})"
    if times > 1:
        return f"{has}: there are {times} axes {name!r}"
    why = layout.why(path, len(shape))
    return f"{has}: none is {name!r}" + (f" ({why})" if why else "")


def ways_out(layout: Layout | None, path: str, rank: int, name: str) -> str:
    """What to do about a leaf without an axis of some name, or with several."""
    roles = layout.roles(path, rank) if layout is not None else (None,) * rank
    last = max((i for i, role in enumerate(roles) if role == name), default=rank)
    wanted = [None if role == name and i < last else role for i, role in enumerate(roles)]
    shown = ", ".join("..." if role is None else repr(role) for role in wanted)
    return (
        "Leave them out with `where=jp.exclude(...)`, or say what their axes are, with one role or "
        f"None for each, such as `layout | jp.Layout({{{path!r}: ({shown})}})`."
    )
