"""Signatures as one would write them, and what to write instead of common wrong calls."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def readable(f: Callable[P, R]) -> Callable[P, R]:
    """Let ``help`` show the parts among the defaults of a function as one writes them."""
    signature = inspect.signature(f)
    shown = [p.replace(default=_shown(p.default)) for p in signature.parameters.values()]
    f.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return f


def scheduled(f: Callable[P, R]) -> Callable[P, R]:
    """Let a wrapper that is called with a sparsity say which schedule takes it."""

    @functools.wraps(f)
    def call(*args: P.args, **settings: P.kwargs) -> R:
        if len(args) > 1 or "sparsity" in settings:
            given = settings.get("sparsity", args[-1])
            raise TypeError(f"`{f.__name__}` got {given!r}. " + schedule_for(f.__name__, given))
        return f(*args, **settings)

    return call


def schedule_for(user: str, given: Any) -> str:
    """Say how a wrapper is told how much to remove, and when."""
    if hasattr(given, "due"):
        return f"Pass the schedule by its name: `jp.{user}(inner, schedule=...)`."
    number = f"{given:g}" if isinstance(given, int | float) else "0.9"
    return (
        f"It takes a schedule, which says when as well as how much: "
        f"`schedule=jp.schedules.constant({number})` prunes at the first update and holds, "
        f"`jp.schedules.one_shot({number}, at=1000)` at a later one, and `jp.schedules.cubic(...)` "
        "little by little; `jp.schedules.custom(fn, begin, end, every)` takes any function."
    )


class _Shown:
    """A default that is shown as the code that names it."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __repr__(self) -> str:
        return self.words


def _shown(default: Any) -> Any:
    # Functions and parts of ours; numbers and None are readable as they are.
    named = default if isinstance(default, types.FunctionType) else type(default)
    module = str(named.__module__).split(".")
    if module[0] != "jaxprune":
        return default
    name = default.__name__ if named is default else repr(default)
    return _Shown(".".join(["jp", *(m for m in module[1:] if not m.startswith("_")), name]))
