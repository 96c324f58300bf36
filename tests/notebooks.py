"""What the tests of all experiments ask of the notebook over its results."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def assert_is_its_script(name):
    """The notebook and its script are one, and it holds no outputs."""
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.ipynb")
    script = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    assert [c.source for c in notebook.cells] == [c.source for c in script.cells]
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


def figures_in(name, folder):
    """Run a notebook in a folder of the project, and count the figures that it draws."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(ROOT / folder)}}
    nbclient.NotebookClient(notebook, resources=resources).execute()
    drawn = [out for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    return sum("image/png" in out["data"] for out in drawn)
