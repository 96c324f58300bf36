"""The example in CONTRIBUTING is complete: done as it says, the suites pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = "relative_importance"


def test_a_criterion_is_one_file_one_line_and_one_row(tmp_path):
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## A criterion, from nothing")[1]
    file, line, row = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    copy(tmp_path)
    (tmp_path / f"jaxprune/criteria/_{NAME}.py").write_text(file)
    list_name(tmp_path / "jaxprune/criteria/__init__.py", line)
    add_row(tmp_path / "tests/contract/tables.py", row)

    product = "tests/contract/test_product.py"  # the others run over the criteria when it is slow
    suites = [product, "tests/test_architecture.py", "jaxprune/criteria"]
    report = run_pytest(tmp_path, *suites, "-k", f"{NAME} and not Blocks or listed")
    assert report.returncode == 0, report.stdout + report.stderr
    for node in (f"[{NAME}-Weights-per_leaf]", f"[{NAME}-Channels-across]", f"_{NAME}.{NAME}"):
        assert re.search(re.escape(node) + " PASSED", report.stdout), report.stdout


def copy(tmp_path):
    """Copy what the suites need, and nothing that is built or cached."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "jaxprune", tmp_path / "jaxprune", ignore=ignore)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)


def list_name(path, line):
    """Add an import and its name to ``__all__``, both in order."""
    head, imports, rest = re.fullmatch(
        r"(.*?\n\n)((?:from .*\n)+)(\n.*)", path.read_text(), re.DOTALL
    ).groups()
    names = re.findall(r'"(\w+)"', rest)
    lines = sorted([*imports.splitlines(), line.strip()])
    listed = ", ".join(f'"{name}"' for name in sorted([*names, NAME]))
    path.write_text(head + "\n".join(lines) + f"\n\n__all__ = ({listed})\n")


def add_row(path, row):
    table, *rest = re.split(r"(?<=\nCRITERIA = \{\n)", path.read_text())
    path.write_text(table + row + "".join(rest))


def run_pytest(tmp_path, *args):
    """Run tests on the copy: its folder goes before whatever jaxprune is installed."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", *args],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
