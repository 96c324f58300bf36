"""What the docs show runs, and the quickstart notebook is one with its script."""

import re
from pathlib import Path

import optax
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "from_jaxpruner.md"


def snippets(lines):
    """List ``(line number, mode, source)``: our blocks, and the code in our column of tables."""
    block, ours = None, False
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            if block:
                yield number - len(block), "exec", "".join(block)
            block = [] if line == "```python\n" else None
        elif block is not None:
            block.append(line)
        elif line.startswith("|"):
            cells = line.split("|")[1:-1]
            if [cell.strip() for cell in cells] == ["jaxpruner", "jaxprune"]:
                ours = True
            elif ours:
                yield from ((number, "eval", code) for code in re.findall(r"`([^`]+)`", cells[1]))
        else:
            ours = False


def run(names, number, mode, source):
    """Run a snippet; what fails is reported at its line of the page."""
    code = compile("\n" * (number - 1) + source, str(PAGE), mode)
    return (exec if mode == "exec" else eval)(code, names)


def test_what_the_page_for_jaxpruner_users_shows_runs():
    names, optimizers, kinds = {}, 0, []
    for number, mode, source in snippets(PAGE.read_text().splitlines(keepends=True)):
        kinds.append(mode)
        value = run(names, number, mode, source)
        if isinstance(value, optax.GradientTransformation):
            value.init(names["params"])
            optimizers += 1
    assert kinds.count("exec") >= 8 and kinds.count("eval") >= 30 and optimizers >= 15


def test_the_quickstart_and_its_script_are_one_and_hold_no_outputs():
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(ROOT / "notebooks" / "quickstart.ipynb")
    script = jupytext.read(ROOT / "notebooks" / "quickstart.py")
    assert [c.source for c in notebook.cells] == [c.source for c in script.cells]
    assert sum(cell.cell_type == "code" for cell in notebook.cells) == 10
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
