"""Tests of experiments/fast_zeros.py and its parts, and of the notebook over its results."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console

import jaxprune as jp
from experiments import fast_zeros, fast_zeros_clocks, fast_zeros_kinds
from experiments import fast_zeros_figures as figures
from experiments import fast_zeros_networks as networks
from experiments.common import data, files, runner, show
from experiments.fast_zeros import Config, Run, main, resolve
from tests import crash, notebooks

TOY = Config(
    models=("mlp",),
    kinds=("unstructured", "blocks_16"),
    levels=(0.75,),
    seeds=1,
    width=64,
    steps=4,
    prune_steps=4,
    batch_size=8,
    rows=(1, 64),
    turns=2,
)
MEASURE = fast_zeros_clocks.measure


def told(ratio=1.0, size=1000):
    clock = {"ms": ratio, "ratio": {"median": ratio, "low": ratio, "high": ratio}}
    clocks = {runtime: {"1": clock, "64": clock} for runtime in ("xla", "onnxruntime")}
    return {"bytes": size, "gzip_bytes": size // 2, **clocks}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A few random images in place of the digits, and times in place of clocks."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(90, 16)).astype(np.float32), rng.integers(0, 10, 90)
    split = data.Examples(images, labels.astype(np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_digits", lambda: data.Dataset(split, split, split))
        patch.setattr(
            fast_zeros_clocks,
            "measure",
            lambda task, networks, **_: dict.fromkeys(networks, told()),
        )
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of an undisturbed toy run, to be read only."""
    folder = tmp_path_factory.mktemp("toy")
    main(dataclasses.replace(TOY, out=folder))
    return folder


@pytest.fixture(scope="module")
def task():
    return fast_zeros.load_task(resolve(TOY), "mlp")


def masks_of(task, kind, level):
    params = task.start(jax.random.key(0))
    sparsity, parts = fast_zeros_kinds.parts(task, kind, level, params)
    masks = jp.find_masks(params, sparsity, **parts)
    return jp.apply_masks(params, masks), masks


def test_a_run_leaves_its_files(toy):
    names = {str(path.relative_to(toy)) for path in toy.rglob("*") if path.is_file()}
    saved = "trained", "dense_0", "unstructured_0.75", "blocks_16_0.75"
    assert names == {
        *("config.json", "metrics.jsonl", "summary.json", "clocks_mlp.json"),
        *("worth.png", "answer.md"),
        *(f"mlp/seed_0/{name}.safetensors" for name in saved),
    }
    config = runner.read_config(toy)
    assert config["sizes"] == {"mlp": [64, 4, 4, 8, 1e-3]} and "turns" not in config


def test_gradual_pruning_ends_with_as_many_blocks_in_every_column(toy):
    run = Run("mlp", "blocks_16", 0.75, 0)
    params, masks = runner.load(fast_zeros.file_of(dataclasses.replace(TOY, out=toy), run))
    assert masks["hidden_0"]["kernel"] is None and masks["out"]["kernel"] is None
    for name in ("hidden_1", "hidden_2"):
        blocks = np.asarray(params[name]["kernel"]).reshape(4, 16, 4, 16)
        assert np.all(np.any(blocks != 0, axis=(1, 3)).sum(0) == 1)


def test_the_summary_has_a_row_for_each_condition(toy):
    rows = runner.read_summary(toy)["rows"]
    assert [(row["kind"], row["level"]) for row in rows] == [
        *(("dense", 0.0), ("unstructured", 0.75), ("blocks_16", 0.75))
    ]
    assert [row["left"] for row in rows] == [1.0, 0.25, 0.25]
    for row, record in zip(rows, runner.read_records(toy), strict=True):
        assert row["accuracy"]["mean"] == 100 * record["accuracy"] and row["accuracy"]["std"] == 0.0
        assert row["bits"]["mean"] == pytest.approx(record["loss"] / np.log(2))
        assert row["bytes"] == 1000 and row["xla"]["1"]["ms"] == 1.0


def test_a_finished_run_is_read_and_told_again(toy, capsys, monkeypatch):
    monkeypatch.setattr(fast_zeros, "go_on", None)
    monkeypatch.setattr(fast_zeros_clocks, "measure", None)
    assert main(dataclasses.replace(TOY, out=toy)) == runner.read_summary(toy)
    assert "Which zeros make it faster" in capsys.readouterr().out


def test_what_is_missing_is_computed_again(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "png", lambda figure: b"png")  # drawing takes longest here
    state = crash.contents(toy)
    gone = "mlp/seed_0/blocks_16_0.75.safetensors", "summary.json", "clocks_mlp.json"
    crash.restore({name: state[name] for name in state if name not in gone}, tmp_path)
    main(dataclasses.replace(TOY, out=tmp_path))
    after = crash.contents(tmp_path)
    assert after == {**state, "worth.png": b"png"}


def test_a_folder_in_use_and_another_config_are_refused(toy, tmp_path):
    with files.locked(tmp_path), pytest.raises(RuntimeError, match="is in use by process"):
        main(dataclasses.replace(TOY, out=tmp_path))
    with pytest.raises(ValueError, match=r"another config: sizes"):
        main(dataclasses.replace(TOY, steps=5, out=toy))


@pytest.mark.parametrize(
    "kind, level, blocks",
    [
        ("unstructured", 0.75, None),
        ("n:m", 0.5, (2, 4)),
        ("n:m", 0.875, (1, 8)),
        ("blocks_16", 0.75, None),
        ("blocks_16_unbalanced", 0.75, None),
        ("channels", 0.75, None),
    ],
)
def test_each_kind_leaves_as_many_weights_and_runs_as_what_is_deployed(task, kind, level, blocks):
    params, masks = masks_of(task, kind, level)
    fn, small = fast_zeros_kinds.deployed(task, kind, params, masks)
    x = task.rows(5)
    np.testing.assert_allclose(fn(small, x), task.fn(params, x), rtol=1e-4, atol=1e-5)
    total = sum(leaf.size for leaf in task.pruned(params))
    if kind == "channels":
        whole, left = (sum(p.size for p in jax.tree.leaves(tree)) for tree in (params, small))
        assert left <= whole - level * total < left + 0.05 * total
    else:
        assert sum(np.count_nonzero(w) for w in task.pruned(params)) == (1 - level) * total
    if kind == "blocks_16":
        assert small["hidden_1"]["kernel"].size == 64 * 16
    if blocks:
        kept, m = blocks
        windows = np.asarray(params["hidden_1"]["kernel"]).reshape(-1, m, 64)
        assert np.all(np.count_nonzero(windows, axis=1) == kept)


@pytest.mark.parametrize(
    "kind, level, fits",
    [
        ("blocks_16", 0.75, True),  # of 4 blocks one stays
        ("blocks_16", 0.875, False),  # half a one
        ("blocks_128", 0.75, False),  # they do not divide 64 inputs
        ("blocks_64_unbalanced", 0.875, True),
        ("n:m", 0.9375, True),
        ("channels", 0.9375, True),
    ],
)
def test_what_no_column_can_keep_is_not_run(task, kind, level, fits):
    assert fast_zeros_kinds.fits(task, kind, level) == fits
    config = resolve(dataclasses.replace(TOY, kinds=(kind,), levels=(level,)))
    planned = fast_zeros.plan(config, lambda model: task)
    assert (Run("mlp", kind, level, 0) in planned) == fits
    assert (Run("mlp", "n:m", 0.5, 0) in planned) == (kind == "n:m")


def test_files_and_clocks_of_what_is_deployed(task):
    product = lambda weights, x: x @ weights
    named = {
        name: (product, np.ones((16, n), np.float32)) for name, n in (("dense", 64), ("cut", 8))
    }
    found = MEASURE(task, named, rows=(1,), turns=2)
    assert found["dense"]["bytes"] - found["cut"]["bytes"] == pytest.approx(4 * 16 * 56, abs=20)
    for runtime in ("xla", "onnxruntime"):
        assert found["dense"][runtime]["1"]["ratio"]["median"] == 1.0
        assert found["cut"][runtime]["1"]["ms"] > 0


def test_rows_of_the_transformer_are_characters_in_windows():
    task = networks.load("transformer", "digits", None, width=128)
    assert [task.rows(n).shape for n in (1, 16, 64, 512)] == [(1, 1), (1, 16), (1, 64), (8, 64)]
    np.testing.assert_array_equal(task.test.inputs[:, 1:], task.test.targets[:, :-1])
    assert len(task.pruned(task.shapes_of_params)) == 7 and task.test.inputs.shape == (128, 64)


@pytest.mark.slow
def test_channels_of_the_transformer_are_cut_and_heads_stay_whole():
    task = networks.load("transformer", "digits", None, width=64)
    params, masks = masks_of(task, "channels", 0.75)
    fn, small = fast_zeros_kinds.deployed(task, "channels", params, masks)
    x = task.rows(64)
    np.testing.assert_allclose(fn(small, x), task.fn(params, x), rtol=1e-3, atol=1e-4)
    assert small["layers"]["attention"]["q"]["kernel"].shape[-1] % 8 == 0


def row(kind, level, seeds, *, ratio=1.0, size=1000, model="mlp"):
    bits = show.spread([3 - value / 100 for value in seeds])
    measured = told(ratio, size)
    key = {"model": model, "kind": kind, "level": level, "left": 1 - level}
    return {**key, "accuracy": show.spread(seeds), "bits": bits, **measured}


ROWS = [
    row("dense", 0.0, [98.0, 96.0]),
    row("unstructured", 0.75, [98.5, 96.5]),
    row("n:m", 0.5, [97.0, 97.0]),
    row("n:m", 0.75, [96.9, 96.9]),
    row("blocks_64", 0.75, [97.0, 96.0], ratio=0.5, size=300),
    row("channels", 0.75, [90.0, 92.0], ratio=0.2, size=200),
]


def test_the_answer_is_read_off_the_rows():
    lines = figures.answer(ROWS, dataset="digits").splitlines()
    assert "Dense: 97.00±1.00 accuracy [%]." in lines
    assert (
        "- Fastest of what loses at most 0.5 points: blocks of 64, balanced, 75 % removed (+0.50 "
        "points, 30% of the bytes): times XLA 1: 2.0, XLA 64: 2.0, ort 1: 2.0, ort 64: 2.0."
    ) in lines
    slow = row("blocks_64_unbalanced", 0.75, [97.0, 97.0])
    lines = figures.answer([*ROWS[:3], slow], dataset="digits").splitlines()
    assert "- Nothing that loses at most 2 points is faster." in lines
    lines = figures.answer([*ROWS, slow], dataset="digits").splitlines()
    assert "- What balance costs of blocks of 64: +0.50 at 75 %." in lines


def test_bits_are_better_when_they_are_fewer():
    rows = [{**each, "model": "transformer"} for each in ROWS[:3]]
    assert figures.lost(rows[1], rows[0])[0] == pytest.approx(-0.005)
    assert "bits per character" in figures.answer(rows, dataset="digits")


def test_the_table_loses_nothing_in_125_columns(capsys):
    rich.console.Console(width=125).print(figures.table(ROWS, "mlp"))
    shown = capsys.readouterr().out
    for cell in ("blocks of 64, balanced", "2:4", "1:4", "97.00±1.00", "5.00", "XLA 64", "ort 1"):
        assert cell in shown, cell
    assert "…" not in shown


def test_the_figure_has_a_panel_for_each_network_and_clock():
    both = [*ROWS, *({**each, "model": "transformer"} for each in ROWS)]
    figure = figures.worth_figure(both)
    assert len(figure.axes) == 2 * 3
    above, below = figure.axes[0], figure.axes[3]
    assert above.get_title() == "XLA: 1 row" and above.get_xscale() == "log"
    assert below.yaxis_inverted() and not above.yaxis_inverted()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "channels, cut" in labels and "50 % removed" in labels


@pytest.mark.parametrize(
    "change, words",
    [
        ({"levels": (0.4,)}, r"`levels=\(0.4,\)` must lie between 0.5 and 1"),
        ({"kinds": ("dense",)}, r"but not \['dense'\]"),
        ({"rows": (100,)}, r"`rows=\(100,\)` must be at most 64, or times 64"),
        ({"seeds": "3:3"}, "must be positive, or a range"),
        ({"turns": 0, "steps": -1}, "`turns=0` must be positive; `steps=-1` must be positive"),
        ({"data_path": Path("x.npz")}, "goes with dataset='mnist'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        resolve(dataclasses.replace(TOY, **change))


def test_the_notebook_and_its_script_are_one_and_hold_no_outputs():
    notebooks.assert_is_its_script("fast_zeros")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_the_notebook_runs_on_toy_results(toy, monkeypatch, folder):
    monkeypatch.setenv("JAXPRUNE_RESULTS", str(toy))
    assert notebooks.figures_in("fast_zeros", folder) == 3
