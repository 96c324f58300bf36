"""The site: every public name is on it, every link leads somewhere, every task is near."""

import json
import re
import sys
import types
from pathlib import Path

import pytest

import jaxprune as jp

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
pages = pytest.importorskip("pages")
SOURCES = [p for p in sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")]) if "_build" not in p.parts]


def links(page):
    """Files of the repository that a page links to, its tables of contents included."""
    text = page.read_text()
    shown = re.sub(r"^```(?!\{).*\n(?:.*\n)*?```$|`[^`\n]*`", "", text, flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", shown):
        if "://" not in target and not target.startswith("#"):
            yield (page.parent / target.partition("#")[0]).resolve()
    for target in re.findall(r"^:link: ([^#\n]*?)(?:\.html#.*)?$", text, re.MULTILINE):
        names = [page.parent / f"{target}{ending}" for ending in (".md", ".ipynb")]
        yield next((name for name in names if name.exists()), names[0]).resolve()


@pytest.mark.parametrize("page", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(page):
    lost = [str(target) for target in links(page) if not target.exists()]
    assert not lost


@pytest.mark.parametrize("page", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_line_of_text_is_a_comment(page):
    """A line that begins with a percent sign is a comment in MyST, and not on the site."""
    text = re.sub(r"^(`{3,}).*\n(?:.*\n)*?\1$", "", page.read_text(), flags=re.MULTILINE)
    assert not re.findall(r"^ *%.*", text, re.MULTILINE)


@pytest.mark.parametrize("page", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_to_a_part_of_a_page_leads_to_a_heading(page):
    shown = page.read_text()
    parts = re.findall(r"\]\(([^)\s:]*)#([^)\s]+)\)", shown)
    parts += [
        (f"{to}.md", part) for to, part in re.findall(r"^:link: (.*)\.html#(.*)$", shown, re.M)
    ]
    for target, part in parts:
        text = ((page.parent / target) if target else page).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = [
            re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings
        ]
        assert part in anchors, f"{target}#{part}"


def documented():
    """Objects that the reference names, families opened."""
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    for name in re.findall(r"auto(?:function|class|exception):: jaxprune\.([\w.]+)", text):
        value = jp
        for part in name.split("."):
            value = getattr(value, part)
        yield name, value
    for name in re.findall(r"automodule:: jaxprune\.(\w+)", text):
        module = getattr(jp, name)
        yield from ((f"{name}.{each}", getattr(module, each)) for each in module.__all__)


def test_every_public_name_is_in_the_reference_once():
    found = [name for name, _ in documented()]
    assert sorted(set(found)) == sorted(found)
    objects = [value for _, value in documented()]
    for name in jp.__all__:
        value = getattr(jp, name)
        if isinstance(value, types.ModuleType):
            for each in value.__all__:
                known = any(getattr(value, each) is other for other in objects)
                assert f"{name}.{each}" in found or known, f"{name}.{each}"
        else:
            assert name in found


TASKS = {
    "exclude layers": "guides/exclude.md",
    "per-layer sparsity": "guides/sparsities.md",
    "N:M": "guides/nm.md",
    "cut channels": "guides/cut_channels.md",
    "ticket on own data": "guides/tickets.md",
    "resume": "guides/checkpoints.md",
    "plot": "guides/plot.md",
    "EMA": "guides/optimizers.md",
    "compare criteria": "guides/compare.md",
    "export": "guides/deploying.md",
}


def clicks(start):
    """How many clicks each page is away from one, by the links in the text."""
    away, todo = {start: 0}, [start]
    while todo:
        page = todo.pop(0)
        for target in links(page) if page.suffix == ".md" and page.is_file() else ():
            if target not in away:
                away[target] = away[page] + 1
                todo.append(target)
    return away


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_at_most_two_clicks_from_the_front(task):
    for front in (DOCS / "index.md", ROOT / "README.md"):
        assert clicks(front)[DOCS / TASKS[task]] <= 2


def test_every_page_is_in_the_contents():
    listed = set()
    for page in [DOCS / "index.md", DOCS / "api" / "index.md"]:
        for entries in re.findall(r"```\{toctree\}\n((?:.*\n)*?)```", page.read_text()):
            names = [line for line in entries.splitlines() if line and not line.startswith(":")]
            listed |= {page.parent / name for name in names}
    inside = [*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]
    inside = {p.with_suffix("") for p in inside if "_build" not in p.parts} - {DOCS / "index"}
    assert listed == inside


@pytest.mark.parametrize(
    "page, folder", [("findings", "findings/*.sh"), ("benchmarks", "benchmarks/*.py")]
)
def test_scripts_have_a_line_each(page, folder):
    rows = re.findall(r"^\| (`.*?`) \|", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    makefile = (ROOT / "Makefile").read_text()
    there = {path.stem for path in ROOT.glob(folder)}
    if page == "benchmarks":  # those that one can run
        there = {name for name in there if f"benchmarks.{name}\n" in makefile}
    assert listed >= there
    assert all(list(ROOT.glob(folder.replace("*", name))) for name in listed & there)


def test_every_figure_is_in_the_gallery_with_the_command_that_made_it():
    text = (DOCS / "gallery.md").read_text()
    for figure in (DOCS / "figures").iterdir():
        card = text[text.index(f"figures/{figure.name}") :].split(":::")[0]
        (module,) = re.findall(r"`python -m (experiments\.\w+)", card)
        (notebook,) = re.findall(r"`(notebooks/\w+\.ipynb)`", card)
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() and (ROOT / notebook).is_file()


def write(folder, name, source):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(source)


def test_a_page_whose_packages_are_missing_is_left_out_and_named(tmp_path):
    cell = "```{code-cell} python\n:tags: [hide-input]\n\nimport %s\n```\n"
    write(tmp_path, "fine.md", cell % "json" + "```python\nimport nowhere\n```\n")
    write(tmp_path, "guides/own.md", cell % "here.inside")
    write(tmp_path, "guides/lost.md", cell % "json" + cell % "nowhere.deeper as n, elsewhere")
    cells = [{"cell_type": "code", "source": "from nowhere import x", "metadata": {}}]
    for each in cells:
        each |= {"outputs": [], "execution_count": None, "id": "a"}
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    write(tmp_path, "start.ipynb", json.dumps(notebook))
    left = pages.left_out(tmp_path, here=["here"])
    assert left == {"guides/lost.md": ["elsewhere", "nowhere"], "start.ipynb": ["nowhere"]}
    told = pages.told(left)
    assert "guides/lost.md: elsewhere, nowhere cannot be imported" in told
    assert "pip install -e '.[dev,docs]'" in told


def test_the_quickstart_of_the_site_is_the_notebook():
    page = DOCS / "start" / "quickstart.ipynb"
    assert page.resolve() == ROOT / "notebooks" / "quickstart.ipynb"
    assert len(pages.cells(page)) == 10
