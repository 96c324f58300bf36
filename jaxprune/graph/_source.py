"""The line of code that an equation is from."""

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import core

_JAX = Path(jax.__file__ or "").parent
_INSIDE = (_JAX, _JAX.with_name("jaxlib"))  # what nobody who uses jax wrote
_OURS = Path(__file__).parents[1]
_STANDARD = Path(functools.__file__).parent
_PACKAGES = re.compile(r".*(?:site|dist)-packages[/\\]")


def describe(chain: Sequence[core.JaxprEqn]) -> str:
    """Name a primitive and the line it is from, the user's own if there is one.

    The equation comes first, then those that call it, the nearest first: what jax caches has lost
    who called it, so that a jitted function of a package is found by the line of its caller.
    """
    lines = [line for own in (True, False) for eqn in chain if (line := source_line(eqn, own))]
    return f"`{chain[0].primitive.name}` at {lines[0] if lines else 'an unknown line'}"


def source_line(eqn: core.JaxprEqn, own: bool = False) -> str | None:
    """Name the file and line of whoever called a primitive: the user's, or else a package's.

    Of the traceback counts what the function itself called; whoever asked us about it comes last.
    """
    traceback = eqn.source_info.traceback
    frames: Sequence[Any] = [] if traceback is None else traceback.frames
    inner = list(itertools.takewhile(lambda f: _whose(f.file_name) != "ours", frames))
    found = _lines(inner, "user")
    if not own:
        found = [*found, *_lines(inner, "package"), *_lines(frames, "user")]
    return found[0] if found else None


def _lines(frames: Sequence[Any], whose: str) -> list[str]:
    """File and line of some frames, the file as short as it can be found by."""
    lines = [(f.file_name, f.line_num) for f in frames if _whose(f.file_name) == whose]
    if whose == "package":
        return [f"{_PACKAGES.sub('', name)}:{line}" for name, line in lines]
    return [f"{Path(name).name}:{line}" for name, line in lines]


@functools.cache
def _whose(file_name: str) -> str:
    """Tell who wrote a file: jax or Python, us, a package, or the user."""
    folders = set(Path(file_name).parents)
    if _OURS in folders:
        return "ours"
    if not folders.isdisjoint(_INSIDE) or file_name.startswith("<frozen"):
        return "inside"
    if _PACKAGES.match(file_name):
        return "package"
    return "inside" if _STANDARD in folders else "user"
