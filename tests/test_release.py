"""What a release promises: versions that agree, a light import, extras that are named."""

import itertools
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

import jaxprune as jp

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(PROJECT["optional-dependencies"])


def run(code, *arguments):
    """Run a program in a process of its own and give back what it prints."""
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        env={**env, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


# Versions.


def test_the_changelog_and_the_citation_speak_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (\d+\.\d+\.\d+) \((unreleased|\d{4}-\d\d-\d\d)\)$", text, re.MULTILINE)
    version, day = heads[0]
    assert jp.__version__ == (f"{version}.dev0" if day == "unreleased" else version)
    version, day = next(head for head in heads if head[1] != "unreleased")
    citation = (ROOT / "CITATION.cff").read_text()
    assert f'\nversion: {version}\ndate-released: "{day}"\n' in citation


def test_the_table_of_support_has_the_bounds_of_the_project():
    page = (ROOT / "docs" / "support.md").read_text()
    oldest = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", page, re.MULTILINE))
    lists = (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    bounds = dict(
        re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(itertools.chain(*lists)), re.MULTILINE)
    )
    assert oldest.pop("Python") == PROJECT["requires-python"].removeprefix(">=")
    assert {"jax", "optax", "numpy", "flax"} <= set(oldest)
    assert oldest == {name: bounds[name] for name in oldest}


# Import.


def test_importing_jaxprune_imports_nothing_but_the_core():
    new = run(
        """
        import sys
        import jax, numpy, optax
        before = {name.partition(".")[0] for name in sys.modules}
        import jaxprune
        for name in jaxprune.__all__:
            getattr(jaxprune, name)
        print(*{name.partition(".")[0] for name in sys.modules} - before)
        """
    )
    assert set(new.split()) <= {"jaxprune", *sys.stdlib_module_names}


# Extras. One process in which nothing but the core can be imported says what is missing.

ALONE = """
import importlib.machinery
import json
import pathlib
import sys

CORE = {"absl", "jax", "jaxlib", "jaxprune", "ml_dtypes", "numpy", "opt_einsum", "optax", "scipy"}
real = importlib.machinery.PathFinder


class CoreAlone:
    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = real.find_spec(name, path, target)
        places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec else []
        if any("site-packages" in place for place in places) and name.partition(".")[0] not in CORE:
            return None
        return spec


sys.meta_path[:] = [CoreAlone if finder is real else finder for finder in sys.meta_path]
folder = pathlib.Path(sys.argv[1])
"""

FUNCTIONS = """
import jax.numpy as jnp
import numpy as np

import jaxprune as jp

params, x = {"up": jnp.ones((32, 32))}, jnp.ones((2, 32))
masks = jp.find_masks(params, 0.5)


def net(p, x):
    return x @ p["up"]


tflite, gguf, onnx, tensors = (folder / f"net.{end}" for end in ("tflite", "gguf", "onnx", "st"))
gguf.write_bytes(b"GGUF")
for path in (tflite, onnx):
    path.write_bytes(b"not read")
jp.checkpoint.save(tensors, params, masks)
calls = {
    "checkpoint.save_run": lambda: jp.checkpoint.save_run(folder / "run", 0, params),
    "checkpoint.restore_run": lambda: jp.checkpoint.restore_run(folder / "run", params),
    "checkpoint.latest_step": lambda: jp.checkpoint.latest_step(folder),
    "export.check_zeros of ONNX": lambda: jp.export.check_zeros(onnx, params, masks),
    "export.check_zeros of GGUF": lambda: jp.export.check_zeros(gguf, params, masks),
    "export.check_zeros of safetensors": lambda: jp.export.check_zeros(tensors, params, masks),
    "export.coreml": lambda: jp.export.coreml(folder / "net.mlpackage", net, params, x),
    "export.gguf": lambda: jp.export.gguf(folder / "out.gguf", params, masks=masks),
    "export.onnx": lambda: jp.export.onnx(folder / "out.onnx", net, params, x),
    "export.quantize_onnx": lambda: jp.export.quantize_onnx(folder / "int8.onnx", onnx, x),
    "export.quantize_onnx by nncf": lambda: jp.export.quantize_onnx(
        folder / "int8.onnx", onnx, x, tool="nncf"
    ),
    "export.safetensors": lambda: jp.export.safetensors(folder / "out.safetensors", params),
    "export.sparsify_tflite": lambda: jp.export.sparsify_tflite(folder / "out.tflite", tflite),
    "export.stablehlo": lambda: jp.export.stablehlo(folder / "net.stablehlo", net, params, x),
}
told = {}
for name, call in calls.items():
    try:
        call()
        told[name] = "works"
    except ImportError as error:
        told[name] = str(error)
print(json.dumps(told))
"""

NEEDS = {
    "checkpoint.latest_step": "checkpoint",
    "checkpoint.restore_run": "checkpoint",
    "checkpoint.save_run": "checkpoint",
    "export.check_zeros of GGUF": "gguf",
    "export.check_zeros of ONNX": "export",
    "export.check_zeros of safetensors": "checkpoint",
    "export.coreml": "coreml",
    "export.gguf": "gguf",
    "export.onnx": "export",
    "export.quantize_onnx": "export",
    "export.quantize_onnx by nncf": "nncf",
    "export.safetensors": "checkpoint",
    "export.sparsify_tflite": "litert",
    "export.stablehlo": "export",
}
# Functions of the same modules that need no extra; the rest of the library has none to need.
CORE_ONLY = {"checkpoint.load", "checkpoint.save", "export.bake", "export.replay"}


def test_a_missing_extra_is_named_with_the_command_that_brings_it(tmp_path):
    told = json.loads(run(ALONE + FUNCTIONS, str(tmp_path)))
    assert set(told) == set(NEEDS)
    for name, extra in NEEDS.items():
        command = f"pip install 'jaxprune[{extra}]'"
        assert command in told[name], f"{name}: {told[name]}"
        assert name.partition(" ")[0].partition(".")[2] in told[name]


def test_every_function_that_reads_or_writes_files_is_known_to_need_an_extra_or_none():
    functions = {
        f"{module.__name__.partition('.')[2]}.{name}"
        for module in (jp.checkpoint, jp.export)
        for name in module.__all__
        if not isinstance(getattr(module, name), type)
    }
    assert functions == {name.partition(" ")[0] for name in NEEDS} | CORE_ONLY


def modules(folder):
    """The scripts of a folder that have a command line."""
    scripts = (ROOT / folder).glob("*.py")
    return sorted(p.stem for p in scripts if 'if __name__ == "__main__"' in p.read_text())


def test_experiments_and_benchmarks_name_what_is_missing_at_the_door(tmp_path):
    code = """
    import importlib

    told = {}
    for name in sys.argv[2:]:
        try:
            importlib.import_module(name)
            told[name] = "works"
        except ImportError as error:
            told[name] = str(error)
    print(json.dumps(told))
    """
    names = [f"{f}.{name}" for f in ("experiments", "benchmarks") for name in modules(f)]
    assert len(names) > 20
    told = json.loads(run(ALONE + textwrap.dedent(code), str(tmp_path), *names))
    for name in names:
        assert "need flax, " in told[name] and "pip install -e '.[experiments]'" in told[name], name


@pytest.mark.parametrize(
    "call, extra",
    [
        ("experiments.edge_deployment.load", "export"),
        ("experiments.fast_zeros.load_task", "export"),
        ("benchmarks.checkpoint.contestants", "checkpoint"),
        ("benchmarks.tflite.main", "litert"),
    ],
)
def test_experiments_and_benchmarks_name_further_extras_before_they_begin(call, extra, monkeypatch):
    pytest.importorskip("tyro")
    module = pytest.importorskip(call.rpartition(".")[0])
    monkeypatch.setattr("experiments.find_spec", lambda name: None)
    few = [None] * (2 if "load_task" in call else 1)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install -e '\.\[{extra}\]'"):
        getattr(module, call.rpartition(".")[2])(*few)


# Extras that no error of ours speaks of, and why.
UNTOLD = {
    "dev": "what the tests are run with; `make` installs it",
    "docs": "what the site is built with; `make docs` installs it",
    "interop": "tunix is imported by the code of its user, never by ours",
    "language": "its package brings a tool that is compiled; the error says how to do without",
    "libraries": "Keras and others are imported by the code of their users, never by ours",
    "notebooks": "Jupyter is what opens a notebook; none of our code imports it",
    "quantization": "qwix is imported by the code of its user, never by ours",
}
BY_BENCHMARKS = {"fpga": "fpga.py", "tpu-aot": "tpu.py"}


def test_every_extra_is_named_by_an_error_or_listed_with_the_reason():
    by_doors = {"experiments", "export", "checkpoint", "litert"}
    for extra, script in BY_BENCHMARKS.items():
        assert f"pip install -e '.[{extra}]'" in (ROOT / "benchmarks" / script).read_text()
    told = set(NEEDS.values()) | by_doors | set(BY_BENCHMARKS)
    assert not told & set(UNTOLD) and told | set(UNTOLD) == EXTRAS


def test_every_extra_is_tried_before_a_release():
    script = (ROOT / ".ci" / "extras").read_text()
    lists = re.findall(r"^(?:light|heavy)=\((.*)\)$", script, re.MULTILINE)
    assert set(" ".join(lists).split()) == EXTRAS - {"dev", "docs"}


# What a release holds.


def test_a_distribution_holds_the_library_alone():
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert targets["targets"]["wheel"]["packages"] == ["jaxprune"]
    only = set(targets["targets"]["sdist"]["only-include"])
    assert only == {"jaxprune", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"}
    assert all((ROOT / name).exists() for name in only)
