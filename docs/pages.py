"""Which pages of the site cannot be built here, for want of packages that their code imports."""

import ast
import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path

import nbformat


def cells(page: Path) -> list[str]:
    """List the code of a page that is run when the site is built."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        return [cell.source for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code"]
    found = re.findall(r"^```\{code-cell\}.*\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [re.sub(r"^:.*", "", cell, flags=re.MULTILINE) for cell in found]  # without tags


def packages(page: Path) -> set[str]:
    """List what the code of a page imports."""
    nodes = [node for cell in cells(page) for node in ast.walk(ast.parse(cell))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


def left_out(docs: Path, *, here: Collection[str] = ()) -> dict[str, list[str]]:
    """Give for each page what is missing; ``here`` is in the repository and needs no package."""
    found = {}
    for page in sorted([*docs.rglob("*.md"), *docs.rglob("*.ipynb")]):
        missing = [name for name in packages(page) if name not in here and not find_spec(name)]
        if missing and "_build" not in page.parts:
            found[page.relative_to(docs).as_posix()] = sorted(missing)
    return found


def told(pages: Mapping[str, list[str]]) -> str:
    """Say which pages are left out, why, and what to do."""
    lines = [f"  {page}: {', '.join(names)} cannot be imported" for page, names in pages.items()]
    step = "`pip install -e '.[dev,docs]'` installs what all of them need."
    return "\n".join(["Left out of the site:", *lines, step])
