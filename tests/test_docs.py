"""What the docs show runs, and the quickstart notebook is one with its script."""

import re
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxprune as jp

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "coming_from" / "jaxpruner.md"
CHECKPOINTS = ROOT / "docs" / "guides" / "checkpoints.md"
DEVICES = ROOT / "docs" / "guides" / "devices.md"
COMPRESSOR = ROOT / "docs" / "coming_from" / "llm_compressor.md"
LAYOUTS = ROOT / "docs" / "guides" / "layouts.md"
TRAINED = ROOT / "docs" / "guides" / "post_training.md"
COMPACT = ROOT / "docs" / "guides" / "compact.md"
ZEROS = ROOT / "docs" / "guides" / "zeros.md"


OURS = "```python\n", "```{code-cell} python\n"


def snippets(lines):
    """List ``(line number, mode, source)``: our blocks, and the code in our column of tables."""
    block, ours = None, False
    for number, line in enumerate(lines, start=1):
        if line.startswith("```"):
            if block:
                yield number - len(block), "exec", "".join(block)
            block = [] if line in OURS else None
        elif block is not None:
            block.append("\n" if line.startswith(":tags:") else line)
        elif line.startswith("|"):
            cells = line.split("|")[1:-1]
            if [cell.strip() for cell in cells][1:] == ["jaxprune"]:
                ours = True
            elif ours:
                yield from ((number, "eval", code) for code in re.findall(r"`([^`]+)`", cells[1]))
        else:
            ours = False


def run(names, number, mode, source, page=PAGE):
    """Run a snippet; what fails is reported at its line of the page."""
    code = compile("\n" * (number - 1) + source, str(page), mode)
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


def test_what_the_page_for_llm_compressor_users_shows_runs():
    names, kinds = {}, []
    for number, mode, source in snippets(COMPRESSOR.read_text().splitlines(keepends=True)):
        kinds.append(mode)
        run(names, number, mode, source, COMPRESSOR)
    assert kinds.count("exec") == 2 and kinds.count("eval") == 11
    assert jp.sparsity(names["masks"], names["params"]) == 0.5


def test_what_the_page_of_checkpoints_shows_runs_and_its_reader_reads(tmp_path, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.chdir(tmp_path)
    names, (setup, loop, *rest) = {}, snippets(CHECKPOINTS.read_text().splitlines(keepends=True))
    run(names, *setup, CHECKPOINTS)
    for stop in (4, 6):  # a run that is stopped goes on
        source = loop[2].replace('config["steps"]', str(stop))
        run(names, *loop[:2], source, CHECKPOINTS)
        assert names["state"]["step"] == stop
    for snippet in rest:
        run(names, *snippet, CHECKPOINTS)
    params, arrays = names["params"], names["arrays"]
    assert set(arrays) == set(params) and (arrays["kernel"] != 0).sum() == 205
    assert all((arrays[name] == params[name]).all() for name in params)


def test_what_the_page_of_devices_shows_runs_on_eight_of_them():
    names, found = {}, list(snippets(DEVICES.read_text().splitlines(keepends=True)))
    for snippet in found:
        run(names, *snippet, DEVICES)
    assert len(found) == 4 and names["masks"]["in"].shape == (64, 128)


def test_what_the_page_of_layouts_shows_runs(capsys):
    names, found = {}, list(snippets(LAYOUTS.read_text().splitlines(keepends=True)))
    for snippet in found:
        run(names, *snippet, LAYOUTS)
    assert len(found) >= 6
    shown = LAYOUTS.read_text().split("```text\n")[1:]
    printed = capsys.readouterr().out
    assert all(block.split("```")[0] in printed for block in shown)


def test_what_the_page_of_compacted_networks_shows_runs(capsys):
    names, found = {}, list(snippets(COMPACT.read_text().splitlines(keepends=True)))
    for snippet in found:
        run(names, *snippet, COMPACT)
    (shown,) = COMPACT.read_text().split("```text\n")[1:]
    assert shown.split("```")[0] in capsys.readouterr().out
    assert len(found) == 2 and not jp.check(names["params"], names["masks"])


def test_what_the_page_of_zeros_shows_runs(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    names, found = {}, list(snippets(ZEROS.read_text().splitlines(keepends=True)))
    for snippet in found:
        run(names, *snippet, ZEROS)
    assert len(found) == 1 and (tmp_path / "up.gguf").is_file()


def test_what_the_page_of_trained_networks_shows_runs(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    names, found = {}, list(snippets(TRAINED.read_text().splitlines(keepends=True)))
    for snippet in found:
        run(names, *snippet, TRAINED)
    assert len(found) >= 8 and jp.sparsity(names["masks"], names["pruned"]) == 0.25


def test_the_readme_is_short_and_all_that_it_shows_runs(capsys):
    lines = README.read_text().splitlines(keepends=True)
    assert len(lines) <= 130
    names, found = {}, list(snippets(lines))
    with jax.numpy_rank_promotion("allow"):  # as users have it
        for snippet in found:
            run(names, *snippet, README)
    assert len(found) == README.read_text().count("```python\n") == 3
    (shown,) = README.read_text().split("```text\n")[1:]
    assert capsys.readouterr().out == shown.split("```")[0]


def unfused(file, images):
    """Outputs of an ONNX file with every operator as it is written."""
    import onnxruntime as runtime

    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(images)})[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(flax|qwix)")
def test_what_the_page_on_deploying_shows_runs(tmp_path, monkeypatch):
    for package in ("jax2onnx", "onnxruntime", "qwix", "sklearn"):
        pytest.importorskip(package)
    page = ROOT / "docs" / "guides" / "deploying.md"
    blocks = list(snippets(page.read_text().splitlines(keepends=True)))
    assert len(blocks) >= 10
    monkeypatch.chdir(tmp_path)
    names, left = {}, {"jp.export.coreml(": "stablehlo_coreml"}  # no wheel for Python 3.14
    if not find_spec("ai_edge_litert"):
        left |= {"benchmarks import litert": "ai_edge_litert"}
        left |= {"jp.export.sparsify_tflite(": "ai_edge_litert"}
    for number, mode, source in blocks:
        if not any(call in source and not find_spec(needs) for call, needs in left.items()):
            run(names, number, mode, source, page)
    if find_spec("stablehlo_coreml"):
        assert names["package"].zeros_kept == 1 and names["package"].parity < 2**-10
        assert names["palettes"].bytes < names["package"].bytes < names["package"].dense_bytes / 4
    if find_spec("ai_edge_litert"):
        assert names["sparse"].bytes < 0.15 * names["sparse"].dense_bytes
    dense = names["dense_accuracy"]
    assert dense > 0.9 and names["small_accuracy"] > dense - 0.03
    assert names["int8_accuracy"] > dense - 0.05
    assert names["report"].parity < 1e-5
    # As quantized, not as computed: without VNNI sums of integers saturate.
    float_file, int8_file = (
        unfused(name, names["test"][0]) for name in ("small.onnx", "int8.onnx")
    )
    assert (float_file.argmax(1) == int8_file.argmax(1)).mean() >= 0.98
    assert names["small_int8"].bytes < names["report"].bytes / 2
    assert names["logits"].shape == (397, 10)
    assert 0 <= names["sparsity"] <= 0.9 and float(names["match"]) >= 0


def test_the_quickstart_and_its_script_are_one_and_hold_no_outputs():
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.read(ROOT / "notebooks" / "quickstart.ipynb")
    script = jupytext.read(ROOT / "notebooks" / "quickstart.py")
    assert [c.source for c in notebook.cells] == [c.source for c in script.cells]
    assert sum(cell.cell_type == "code" for cell in notebook.cells) == 10
    for cell in notebook.cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
