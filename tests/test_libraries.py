"""The recipes of docs/guides/libraries.md run, each in a process of its own."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guides" / "libraries.md"
NEEDS = {
    "Keras": ("keras",),
    "HGQ2": ("keras", "hgq"),
    "numpyro": ("numpyro",),
    "flowjax and paramax": ("flowjax", "paramax"),
    "tunix": ("tunix",),
    "FPGA": ("da4ml",),
}


def recipes():
    """What each section of the page shows, as a program whose lines are where the page has them."""
    found, section, shown, ours = {}, "", [], False
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section, shown = line.removeprefix("## "), [""] * len(shown)
        elif line.startswith("```"):
            ours = line == "```python"
        shown.append(line if ours and not line.startswith("```") else "")
        if "".join(shown):
            found[section] = "\n".join(shown) + "\n"
    return found


def test_every_recipe_of_the_page_is_run():
    assert set(recipes()) == set(NEEDS)


@pytest.mark.parametrize("name", NEEDS)
def test_the_recipe_runs(name, tmp_path):
    for module in NEEDS[name]:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    program = tmp_path / "libraries.md"
    program.write_text(recipes()[name])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)  # one device, as most users have
    ran = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert not re.search("PruneWarning|Traceback", ran.stderr), ran.stderr[-3000:]
