"""The layers of the library: who may import whom, and what every public name has."""

import ast
import inspect
import sys
import types
from pathlib import Path

import pytest

import jaxprune as jp

ROOT = Path(jp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CORE = {"jax", "optax", "numpy", "jaxprune", *sys.stdlib_module_names}
PARTS = ("criteria", "patterns", "scopes", "schedules")
# What a module may use beyond the core: extras inside its functions, files.
EXTRAS = {"checkpoint": {"orbax"}}
FILES_ARE_ITS_BUSINESS = {"checkpoint", "export"}
# From top to bottom; a file imports from above, and within its layer from what is listed before.
LAYERS = (
    ("typing", "_serial", "_where", "_tree", "_mesh", "_errors", "_help", "_values"),
    ("_kept", "_group", "_units", "_groups", *PARTS),
    ("_masks", "_evidence", "_find", "_report", "graph"),
    (
        "_frozen",
        "_event",
        "_states",
        "_advice",
        "_prune",
        "dynamic",
        "_straight_through",
        "_check",
        "_cut_state",
        "_cut",
        "_shrink",
        "_verify",
        "_budget",
        "_distill",
    ),
    ("_level", "_imp", "_find_sparsity", "checkpoint", "export"),
)
ORDER = [name for layer in LAYERS for name in layer]


def module_of(file):
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imports(file, nodes=None):
    """Full dotted names of what a file imports, wherever in it or among some of its nodes."""
    for node in nodes or ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_imports_only_from_the_layers_above_it(file):
    mine = module_of(file)
    for name in imports(file):
        top, *rest = name.split(".")
        assert top in CORE | EXTRAS.get(mine, set()), f"{name} is no dependency of the core"
        if top != "jaxprune" or mine == "__init__" or not rest or rest[0] == mine:
            continue
        assert ORDER.index(rest[0]) < ORDER.index(mine), f"{mine} imports {name}"
        assert not (mine in PARTS and rest[0] in PARTS), f"{mine} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_extras_are_imported_by_nobody_at_the_top(file):
    at_the_top = imports(file, ast.parse(file.read_text()).body)
    assert {name.split(".")[0] for name in at_the_top} <= CORE


def test_experiments_and_tests_are_imported_by_nobody():
    for file in FILES:
        assert not {name.split(".")[0] for name in imports(file)} & {"experiments", "tests"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_the_core_neither_prints_nor_asserts_nor_reads_its_surroundings(file):
    tree = ast.parse(file.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"print", "open", "input", "globals"}
    assert not any(isinstance(node, ast.Assert | ast.Global) for node in ast.walk(tree))
    files = {"os", "time", "logging"} if module_of(file) in FILES_ARE_ITS_BUSINESS else set()
    assert not set(imports(file)) & ({"os", "time", "logging", "random"} - files)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_every_file_is_short_and_says_what_it_is_in_one_line(file):
    text = file.read_text()
    assert text.count("\n") <= 500
    assert len(ast.get_docstring(ast.parse(text)).splitlines()) == 1


def public():
    """Every public name, families opened."""
    for name in jp.__all__:
        value = getattr(jp, name)
        if isinstance(value, types.ModuleType):
            yield from ((f"{name}.{n}", getattr(value, n)) for n in value.__all__)
        else:
            yield name, value


# Made by functions that show one.
RESULTS = (
    *("Check", "Group", "Level", "Overlap", "Packed", "PruneState", "PruneWarning"),
    *("StraightThroughState", "Summary"),
    *("export.Report", "graph.Axis", "graph.Site"),
)


PUBLIC = list(public())


@pytest.mark.parametrize("name, value", PUBLIC, ids=[name for name, _ in PUBLIC])
def test_every_public_name_is_documented_with_an_example(name, value):
    text = inspect.getdoc(value)
    assert text and text.splitlines()[0].endswith(".")
    assert name in RESULTS or "Example:\n  >>>" in text


def test_names_are_listed_in_order_and_once():
    families = (jp.criteria, jp.patterns, jp.scopes, jp.schedules)
    for module in (jp, jp.checkpoint, jp.dynamic, jp.export, jp.graph, *families):
        assert list(module.__all__) == sorted(set(module.__all__))
