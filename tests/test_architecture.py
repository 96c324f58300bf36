"""The layers of the library: who may import whom, and what every public name has."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import jaxprune as jp

ROOT = Path(jp.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
CORE = {"jax", "optax", "numpy", "jaxprune", *sys.stdlib_module_names}
PARTS = ("criteria", "patterns", "scopes", "schedules", "methods")
# What a module may use beyond the core: extras inside its functions, files.
EXTRAS = {"checkpoint": {"orbax"}, "_progress": {"tqdm"}}
FILES_ARE_ITS_BUSINESS = {"_atomic", "checkpoint", "export"}
# From top to bottom; a file imports from above, and within its layer from what is listed before.
LAYERS = (
    (
        "typing",
        "_serial",
        "_where",
        "_tree",
        "_mesh",
        "_numbers",
        "_errors",
        "_help",
        "_html",
    ),
    ("_ranking",),
    (
        "_kept",
        "_use",
        "_layout",
        "_axes",
        "_layers",
        "layouts",
        "_group",
        "_units",
        "_groups",
        *PARTS,
    ),
    (
        "_values",
        "_evidence",
        "_parts",
        "_score",
        "_bits",
        "_masks",
        "_amount",
        "_find",
        "_make",
        "_keep",
        "_looks",
        "_report",
    ),
    ("graph",),
    (
        "_frozen",
        "_state",
        "_enforce",
        "_checks",
        "_states",
        "_advice",
        "_wrap",
        "_pruner",
        "_prune",
        "dynamic",
        "_straight_through",
        "_check",
    ),
    (
        "_cut_state",
        "_cut",
        "_shrink",
        "_verify",
        "_block_form",
        "_compaction",
        "_compact",
        "_compact_plan",
        "_budget",
        "_distill",
    ),
    (
        "_batches",
        "_progress",
        "_calibrate",
        "_traced",
        "_solve",
        "_prune_units",
        "_prune_trained",
        "_input_stats",
    ),
    (
        "_level",
        "_imp",
        "_find_sparsity",
        "_atomic",
        "checkpoint",
        "export",
    ),
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


def names_of_parts(tree):
    """What a file imports from the folders of parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[1:2] in [[p] for p in PARTS]:
            yield from (alias.asname or alias.name for alias in node.names)


def asked_by_name(tree):
    """Names that a file compares with something, or asks whether something is made by."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            asked = [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "isinstance",
            "issubclass",
        ):
            asked = node.args[1:]
        else:
            continue
        yield from (n.id for part in asked for n in ast.walk(part) if isinstance(n, ast.Name))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_part_is_known_by_name_outside_of_its_folder(file):
    if module_of(file) in PARTS:
        return
    tree = ast.parse(file.read_text())
    private = [n for n in imports(file) if n.split(".")[1:2] in [[p] for p in PARTS] and "._" in n]
    assert not private, "a part is what its folder exports; let it declare what it can do"
    assert not set(names_of_parts(tree)) & set(asked_by_name(tree))


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


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_module_is_private_or_lists_its_names(file):
    names = {
        target.id
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    private = file.stem.startswith("_") and file.stem != "__init__"
    assert private or "__all__" in names


MOST_LINES = 60
# Functions that are longer, to be split; nothing is to be added.
STILL_LONGER: set[str] = set()


def lines_of_code(function, lines):
    """Count the lines of a function without docstrings, comments and empty lines."""
    strings = [
        node.body[0]
        for node in ast.walk(function)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None
    ]
    words = {n for node in strings for n in range(node.lineno, node.end_lineno + 1)}
    code = set(range(function.lineno, function.end_lineno + 1)) - words
    texts = [lines[n - 1].strip() for n in code]
    return sum(bool(text) and not text.startswith("#") for text in texts)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_no_function_is_longer_than_a_screen(file):
    text = file.read_text()
    lines, name = text.splitlines(), file.relative_to(ROOT).as_posix()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    longer = {f"{name} {f.name}" for f in functions if lines_of_code(f, lines) > MOST_LINES}
    assert longer <= STILL_LONGER


def test_lines_of_code_are_those_that_run():
    text = """def f(x):
        'Words.'
        # why

        def g():
            '''More
            words.'''
            return x
        return g()
    """
    assert lines_of_code(ast.parse(text).body[0], text.splitlines()) == 4


def test_the_table_of_layers_names_every_file_and_folder_in_the_order_of_the_layers():
    table = re.findall(r"^\| \d, .*", (ROOT.parent / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rows = [re.findall(r"`([\w/.]+)`", row.split("|")[2]) for row in table]
    assert [[name.removesuffix(".py").strip("/") for name in row] for row in rows] == [
        list(layer) for layer in LAYERS
    ]
    folders = {f"{path.name}/" for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in ROOT.glob("*.py")} - {"__init__.py"}
    assert {name for row in rows for name in row} == files | folders


def public():
    """Every public name, families opened."""
    for name in jp.__all__:
        value = getattr(jp, name)
        if value is jp.typing:  # words, not things
            continue
        if isinstance(value, types.ModuleType):
            yield from ((f"{name}.{n}", getattr(value, n)) for n in value.__all__)
        else:
            yield name, value


# Made by functions that show one.
RESULTS = (
    *("Check", "CompactPlan", "Group", "Level", "Overlap", "Packed", "PruneState", "PruneWarning"),
    *("StraightThroughState", "Summary"),
    *("export.Report", "export.Zeros", "graph.Axis", "graph.Site"),
)


PUBLIC = list(public())


@pytest.mark.parametrize("name, value", PUBLIC, ids=[name for name, _ in PUBLIC])
def test_every_public_name_is_documented_with_an_example(name, value):
    text = inspect.getdoc(value)
    assert text and text.splitlines()[0].endswith(".")
    assert name in RESULTS or "Example:\n  >>>" in text


def test_names_are_listed_in_order_and_once():
    families = (jp.criteria, jp.patterns, jp.scopes, jp.schedules, jp.methods)
    for module in (jp, jp.checkpoint, jp.dynamic, jp.export, jp.graph, *families):
        assert list(module.__all__) == sorted(set(module.__all__))


def test_names_that_are_imported_when_asked_for_are_those_that_type_checkers_see():
    told = ast.parse((ROOT / "__init__.pyi").read_text())
    lines = [node for node in told.body if isinstance(node, ast.ImportFrom)]
    stub = {node.names[0].asname: node.module for node in lines}
    assert sorted(stub) == sorted(jp.__all__) and set(dir(jp)) == {*jp.__all__, "__version__"}
    for name, module in stub.items():
        defined = importlib.import_module(module if module != "jaxprune" else f"jaxprune.{name}")
        wanted = defined if module == "jaxprune" else getattr(defined, name)
        assert getattr(jp, name) is wanted
    with pytest.raises(AttributeError, match="module 'jaxprune' has no attribute 'prun'"):
        jp.prun  # noqa: B018


def test_importing_the_library_in_the_middle_of_a_trace_leaves_no_tracers_behind():
    program = """
import importlib, pkgutil, sys
import jax, jax.numpy as jnp

@jax.jit
def masks(x):
    import jaxprune as jp
    for each in pkgutil.walk_packages(jp.__path__, "jaxprune."):
        importlib.import_module(each.name)
    return jp.find_masks({"w": x}, 0.5)["w"]

with jax.checking_leaks():
    assert masks(jnp.arange(12.0).reshape(3, 4)).sum() == 6
mine = [vars(m) for name, m in sys.modules.items() if name.startswith("jaxprune")]
assert len(mine) > 200
assert not any(isinstance(v, jax.Array) for module in mine for v in module.values())
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
