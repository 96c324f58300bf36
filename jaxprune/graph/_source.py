"""The line of code that an equation is from."""

import functools
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

_JAX = Path(jax.__file__ or "").parent
_INSIDE = (_JAX, _JAX.with_name("jaxlib"))  # what nobody who uses jax wrote
_OURS = Path(__file__).parents[1]
_STANDARD = Path(functools.__file__).parent
_PACKAGES = re.compile(r".*(?:site|dist)-packages[/\\]")


def source_line(eqn: Any, own: bool = False) -> str | None:
    """Name the file and line of whoever called a primitive: the user's, or else a package's.

    Of the traceback counts what the function itself called; whoever asked us about it comes last.
    """
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
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
