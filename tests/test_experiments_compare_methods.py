"""Tests of experiments/compare_methods.py, what it shares, and the notebook over its results."""

import dataclasses
import signal
from pathlib import Path
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments import compare_methods
from experiments import compare_methods_figures as figures
from experiments.common import data, runner, show
from experiments.common import train as training
from experiments.common.models import MLP, LeNet5, PatchConv
from experiments.compare_methods import METHODS, Config, main, resolve
from tests import crash, notebooks

TOY = Config(methods=("one_shot", "rigl"), sparsities=(0.8, 0.95), seeds=2, steps=20)
TINY = MLP((8,), 4)
ACROSS = ("random_init", "magnitude_init", "snip", "grasp", "synflow")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of an undisturbed toy run, to be read only."""
    folder = tmp_path_factory.mktemp("toy")
    main(dataclasses.replace(TOY, out=folder))
    return folder


@pytest.fixture(scope="module")
def tiny():
    """A data set of 16 pixels and 4 classes, and two seeds of a tiny network on it."""
    rng = np.random.default_rng(0)

    def split(count):
        labels = rng.integers(0, 4, count).astype(np.int32)
        images = rng.normal(size=(count, 16)) + np.eye(16)[4 * labels]
        return data.Examples(images.astype(np.float32), labels)

    dataset = data.Dataset(train=split(256), validation=split(8), test=split(40))
    settings = resolve(Config(steps=24, batch_size=16))
    seeds = [compare_methods.make_seed(settings, TINY, dataset, seed) for seed in range(2)]
    return dataset, seeds


def train(tiny, method, sparsity, *, seeds=1, together=False):
    dataset, starts = tiny
    found = training.each_seed(
        compare_methods.train_method,
        starts[:seeds],
        compare_methods.share_out(starts[0].start, sparsity),
        dataset,
        together=together,
        method=method,
        model=TINY,
        learning_rate=0.01,
    )
    return next(found) if seeds == 1 else list(found)


# To compile a method takes seconds, so one of each kind is quick.
QUICK = ("dense", "one_shot", "straight_through", "rigl", "synflow")
EACH = [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("method", EACH)
def test_every_method_ends_at_exactly_the_sparsity_asked_for(tiny, method):
    before = training._alone._cache_size()
    for sparsity in (0.0,) if method == "dense" else (0.5, 0.83):
        outcome = train(tiny, method, sparsity)
        masks = jax.tree.leaves(outcome.masks)
        counts = [int(mask.sum()) for mask in masks]
        assert sum(counts) == 160 - round(160 * sparsity)
        assert outcome.kept.shape == (24, 2) and outcome.kept[-1].tolist() == counts
        for layer in ("hidden_0", "out"):
            removed = ~outcome.masks[layer]["kernel"]
            assert not np.any(outcome.params[layer]["kernel"][removed])
        if method not in ACROSS:
            layers = jp.scopes.erk(tiny[1][0].start, sparsity)
            shares = [1 - count / mask.size for count, mask in zip(counts, masks, strict=True)]
            assert shares == pytest.approx(jax.tree.leaves(layers))
    assert training._alone._cache_size() == before + 1  # one program for all


def kept(tiny, method, sparsity=0.8):
    return np.asarray(train(tiny, method, sparsity).kept).sum(1)


def test_methods_take_the_way_that_their_name_says(tiny):
    # Of 160 weights 32 stay. What a step sees is what the event of the step before left.
    assert kept(tiny, "dense", 0.0).tolist() == [160] * 24
    assert kept(tiny, "one_shot").tolist() == [160] * 13 + [32] * 11
    for method in ("rigl", "synflow"):
        assert set(kept(tiny, method).tolist()) == {32}


@pytest.mark.slow
def test_all_methods_take_the_way_that_their_name_says(tiny):
    iterative = kept(tiny, "iterative")
    assert sorted(set(iterative.tolist()), reverse=True) == pytest.approx(
        [160 * 0.2 ** (n / 5) for n in range(6)], abs=1.5
    )
    mixed = kept(tiny, "iterative_one_shot")
    assert mixed[15] == pytest.approx(160 * 0.2**0.5, abs=1.5) and mixed[16] == 32
    gradual = kept(tiny, "gradual")
    assert gradual[0] == 160 and gradual[19] == 32 and np.all(np.diff(gradual) <= 0)
    turns = np.flatnonzero(np.diff(kept(tiny, "ac_dc")))
    assert turns.tolist() == [3, 6, 9, 12, 15]
    for method in ("set", "static"):
        assert set(kept(tiny, method).tolist()) == {32}


def test_seeds_side_by_side_train_as_they_do_alone(tiny):
    alone, together = (train(tiny, "one_shot", 0.5, seeds=2, together=t) for t in (False, True))
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for one, other in zip(alone, together, strict=True):
        assert one.hits == other.hits


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["on", "off"])
def test_records_that_are_missing_are_made_as_they_were(tmp_path, parallel):
    config = dataclasses.replace(TOY, methods=("one_shot",), sparsities=(0.8,), steps=16)
    config = dataclasses.replace(config, parallel_seeds=parallel, out=tmp_path)
    main(config)
    before = crash.contents(tmp_path)
    lines = before["metrics.jsonl"].splitlines(keepends=True)
    for kept in (lines[:1], lines[:3], lines[1:], lines[:1] + lines[2:]):
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(kept))
        main(config)
        assert crash.contents(tmp_path) == before


def test_a_run_leaves_its_files(toy):
    names = {str(path.relative_to(toy)) for path in toy.rglob("*")}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "accuracy.png", "answer.md"}
    config = runner.read_config(toy)
    assert config["steps"] == 20 and config["methods"] == ["one_shot", "rigl"]
    assert config["data_path"] is None and "out" not in config


def test_metrics_have_a_line_for_each_method_sparsity_and_seed(toy):
    records = runner.read_records(toy)
    assert [tuple(record[f] for f in compare_methods.FIELDS) for record in records] == [
        (method, sparsity, seed)
        for method, sparsity in (
            ("dense", 0.0),
            *((m, s) for m in TOY.methods for s in TOY.sparsities),
        )
        for seed in range(2)
    ]
    for record in records:
        assert record["kept"] == 11_900 - round(record["sparsity"] * 11_900)
        layers = record["densities"]
        assert list(layers) == ["hidden_0/kernel", "hidden_1/kernel", "out/kernel"]
        sizes = np.array([6400, 5000, 500])
        assert sizes @ list(layers.values()) == pytest.approx(record["kept"], abs=0.01)


def test_the_summary_has_a_row_for_each_method_and_sparsity(toy):
    summary = runner.read_summary(toy)
    assert summary["dataset"] == "digits" and summary["steps"] == 20
    rows = summary["rows"]
    assert [(row["method"], row["sparsity"]) for row in rows] == [
        ("dense", 0.0),
        ("one_shot", 0.8),
        ("one_shot", 0.95),
        ("rigl", 0.8),
        ("rigl", 0.95),
    ]
    for row in rows:
        seeds = row["accuracy"]["seeds"]
        assert len(seeds) == 2 and all(0 <= accuracy <= 1 for accuracy in seeds)
        assert row["accuracy"]["mean"] == np.mean(seeds) and row["accuracy"]["std"] == np.std(seeds)
        assert row["inference_share"] == pytest.approx(1 - row["sparsity"], abs=1e-3)
        assert row["collapsed"] == 0
    # A step of the dense network: 64 examples, a forward pass and twice as much backward.
    assert rows[0]["flops"] == 20 * 64 * 3 * 2 * 11_900
    assert rows[0]["bytes"] == 4 * (11_900 + 160)
    # Sparse from the step after the event of step 10 on.
    assert rows[1]["flops"] == rows[0]["flops"] / 20 * (11 + 9 * 0.2)
    assert rows[1]["bytes"] == 4 * (2380 + 160) + 800 + 625 + 63


def test_the_answer_is_written_and_printed(toy, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", None)  # neither data nor training are needed
    (toy / "accuracy.png").unlink()
    summary = main(dataclasses.replace(TOY, out=toy))
    assert summary == runner.read_summary(toy)
    assert (toy / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    answer = (toy / "answer.md").read_text()
    for word in ("Which approach when", "training may be dense", "one_shot", "rigl", "95 %"):
        assert word in printed and word in answer
    assert "mask is fixed" not in answer  # nobody ran who could say


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["on", "off"])
def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, parallel
):
    config = dataclasses.replace(TOY, methods=("one_shot",), sparsities=(0.8,), steps=16)
    config = dataclasses.replace(config, parallel_seeds=parallel, out=tmp_path)
    crash.assert_any_kill_is_survived(main, config, monkeypatch, files=5, at_least=35)


@pytest.mark.slow
def test_a_process_killed_at_random_goes_on_to_the_same_bytes(tmp_path):
    options = ["--methods", "one_shot", "rigl", "--sparsities", "0.5", "0.7", "0.8", "0.9", "0.95"]
    arguments = [*options, "--seeds", "2", "--steps", "20", "--out"]
    delays = np.random.default_rng(0).uniform(0, 2.0, 40).tolist()
    for name, kills in (("killed", delays), ("whole", [])):
        lines = [[*arguments, str(tmp_path / name)]]
        codes, _ = crash.run_processes("compare_methods", lines, kills, timeout=1200)
        assert codes.count([-signal.SIGKILL]) >= 20 * len(kills) // 40 and codes[-1] == [0]
    assert crash.contents(tmp_path / "killed") == crash.contents(tmp_path / "whole")


def test_another_config_is_refused(toy):
    with pytest.raises(ValueError, match=r"another config: steps \(20 there, 30 now\)\. Go on"):
        main(dataclasses.replace(TOY, steps=30, out=toy))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "cifar"}, "`dataset='cifar'` is not known. Choose one of digits, mnist"),
        ({"methods": ("gradual", "lucky")}, r"may name one_shot, .*, but not \['lucky'\]"),
        ({"methods": ("set", "set")}, "must name each once, and one at least"),
        ({"methods": ()}, r"`methods=\(\)` must name each once, and one at least"),
        ({"sparsities": (0.5, 1.0)}, r"`sparsities=\(0.5, 1.0\)` must lie between 0 and 1"),
        ({"sparsities": (float("nan"),)}, "must lie between 0 and 1"),
        ({"sparsities": (0.5, 0.5)}, "must be distinct, and one at least"),
        ({"seeds": 0}, "`seeds=0` must be positive"),
        ({"steps": 15}, "`steps=15` must be 16 or more"),
        ({"batch_size": 0}, "`batch_size=0` must be positive"),
        ({"learning_rate": float("inf")}, "`learning_rate=inf` must be positive and finite"),
        ({"parallel_seeds": "maybe"}, "`parallel_seeds='maybe'` must be auto, on or off"),
        ({"data_path": Path("mnist.npz")}, "goes with dataset='mnist'"),
        (
            {"steps": 0, "seeds": -1},
            "`seeds=-1` must be positive, or a range such as 3:6; `steps=0` must be 16",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        resolve(Config(**changes))


def test_the_dataset_decides_what_is_left_out():
    assert resolve(Config()).steps == 1000 and resolve(Config(dataset="mnist")).steps == 2000
    assert resolve(Config()).out == Path("results/compare_methods_digits")
    assert compare_methods.together(Config())
    assert not compare_methods.together(Config(parallel_seeds="off"))


def test_every_method_has_a_name_a_family_and_a_style():
    names = ["dense", *get_args(compare_methods.Name)]
    assert list(METHODS) == names == list(figures.STYLES)
    assert [name for family in figures.FAMILIES.values() for name in family] == names[1:]
    for family in figures.FAMILIES.values():
        for part in (0, 1):
            assert len({figures.STYLES[name][part] for name in family}) == len(family)


def test_flops_can_be_counted_by_hand():
    # Two layers of 4 and 2 weights, the first applied at 3 positions, two steps of 5 examples.
    # Dense forward: 2 * (4 * 3 + 2) = 28; sparse forward: 2 * (1 * 3 + 2) = 10.
    count = {"sizes": np.array([4, 2]), "positions": np.array([3, 1]), "batch_size": 5}
    kept, never = np.array([[4, 2], [1, 2]]), np.array([False, False])
    assert compare_methods.training_flops(kept, dense_gradients=never, **count) == 5 * 3 * (28 + 10)
    at_the_last = np.array([False, True])
    assert compare_methods.training_flops(kept, dense_gradients=at_the_last, **count) == 5 * (
        3 * 28 + 2 * 10 + 28
    )
    assert compare_methods.inference_flops(kept[1], positions=count["positions"]) == 10


def test_gradients_are_dense_where_a_method_looks_at_removed_weights():
    # Every third step of 200 up to step 150, which is one of them.
    rigl = compare_methods.dense_gradients("rigl", 200)
    assert np.flatnonzero(rigl).tolist() == list(range(3, 151, 3))
    assert compare_methods.dense_gradients("straight_through", 20).all()
    for method in set(METHODS) - {"rigl", "straight_through"}:
        assert not compare_methods.dense_gradients(method, 20).any()


def test_bytes_are_values_and_the_bits_that_say_where_they_are(tiny):
    start = tiny[1][0].start  # 16-8-4: 128 and 32 weights, and 12 biases
    pruned = jp.summary(start, jp.find_masks(start, 0.7))
    kept = 160 - 90 - 22  # 70 % of each layer, rounded
    assert compare_methods.model_bytes(pruned) == 4 * (kept + 12) + 128 // 8 + 32 // 8
    assert compare_methods.model_bytes(jp.summary(start, jp.dense_masks(start))) == 4 * 172


def test_positions_are_those_of_the_feature_maps(key):
    images = jnp.zeros((2, 784))
    params = jax.eval_shape(LeNet5(10).init, key, images)["params"]
    assert compare_methods.output_positions(LeNet5(10), params, images) == {
        "conv_0/kernel": 24 * 24,
        "conv_1/kernel": 8 * 8,
        "hidden_0/kernel": 1,
        "hidden_1/kernel": 1,
        "out/kernel": 1,
    }
    sizes = [leaf.size for leaf in jax.tree.leaves(jp.prunable(params))]
    assert sizes == [150, 2400, 30_720, 10_080, 840]


@pytest.mark.parametrize("size", [(5, 5), (2, 3)])
def test_patch_conv_is_a_valid_convolution(key, size):
    images = jax.random.normal(key, (2, 7, 9, 3))
    params = PatchConv(4, size).init(key, images)["params"]
    params["bias"] = jnp.arange(4.0)
    with jax.numpy_rank_promotion("allow"):  # of flax's own bias
        expected = nn.Conv(4, size, padding="VALID").apply({"params": params}, images)
    found = PatchConv(4, size).apply({"params": params}, images)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def row(method, seeds, *, sparsity=0.9, flops=1.0, collapsed=0):
    return {
        "method": method,
        "sparsity": sparsity,
        "accuracy": {"mean": np.mean(seeds), "std": np.std(seeds), "seeds": seeds},
        "flops": flops,
        "flops_share": flops,
        "collapsed": collapsed,
    }


ROWS = [
    row("dense", [0.99, 0.97], sparsity=0.0),
    row("gradual", [0.96, 0.98], flops=0.6),
    row("rigl", [0.97, 0.96], flops=0.2),
    row("set", [0.93, 0.95], flops=0.1),
    row("static", [0.40, 0.50], flops=0.1),
    row("snip", [0.80, 0.90], flops=0.1, collapsed=1),
]


def test_as_good_is_what_the_spread_of_the_gap_covers():
    assert show.gap(ROWS[1], ROWS[2]) == pytest.approx((0.005, 0.015))
    assert show.gap(ROWS[1], ROWS[3]) == pytest.approx((0.03, 0.0))
    assert [r["method"] for r in figures.as_good(ROWS, 0.9)] == ["gradual", "rigl"]


def test_the_cheapest_is_within_a_point_of_the_best():
    assert figures.cheapest(ROWS, 0.9)["method"] == "rigl"
    assert figures.cheapest(ROWS, 0.9, within=0.05)["method"] == "set"
    assert figures.cheapest(ROWS, 0.9, within=0.001)["method"] == "gradual"


def test_a_lost_layer_or_half_of_the_accuracy_is_a_collapse():
    assert [r["method"] for r in figures.collapses(ROWS, 0.9)] == ["snip", "static"]


def test_the_answer_is_read_off_the_rows():
    answer = figures.answer(ROWS, dataset="toy", steps=7)
    for line in (
        "toy, 7 steps, seeds: 2. Test accuracy in percent, mean±std over the seeds; dense: "
        "98.00±1.00.",
        "| 90 % | gradual 97.00±1.00 | rigl 96.50±0.50 | snip 85.00±5.00 |",
        "- If training may be dense: gradual or rigl, the best or as good at 1 of 1 sparsities.",
        "- If the mask is fixed before training: snip, the best or as good at 1 of 1 sparsities.",
        "- Within one point of the dense network, of 5 methods: 1 at 90 %. The last are, at 90 %, "
        "gradual.",
        "- rigl minus set, in points seed by seed: +2.50±1.50 at 90 %.",
        "| 90 % | gradual | rigl | rigl (20 %) | snip, static |",
    ):
        assert line in answer.splitlines()


def test_rows_gather_the_seeds_and_count_lost_layers():
    record = {"method": "dense", "sparsity": 0.0, "flops": 4, "inference_flops": 2, "bytes": 8}
    record |= {"kept": 2, "densities": {"a": 1.0, "b": 1.0}}
    pruned = record | {"method": "snip", "sparsity": 0.5, "kept": 1}
    records = [
        record | {"seed": 0, "accuracy": 1.0},
        pruned | {"seed": 1, "accuracy": 0.5, "flops": 1, "densities": {"a": 1.0, "b": 0.0}},
        pruned | {"seed": 0, "accuracy": 0.7, "flops": 2},
    ]
    dense, snip = figures.summarise(records)
    assert dense["method"] == "dense" and dense["flops_share"] == 1.0
    assert snip["accuracy"]["seeds"] == [0.7, 0.5] and snip["collapsed"] == 1
    assert snip["flops"] == 1.5 and snip["flops_share"] == 0.375


@pytest.mark.slow
def test_mnist_comes_from_the_data_path(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "mnist.npz"
    arrays = {
        "x_train": rng.integers(0, 256, (140, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 140),
        "x_test": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 20),
    }
    np.savez(path, **arrays)
    config = dataclasses.replace(TOY, dataset="mnist", data_path=path, seeds=1, steps=16)
    rows = main(dataclasses.replace(config, out=tmp_path / "run"))["rows"]
    assert [row["kept"] for row in rows] == [44_190, 8838, 2210, 8838, 2210]
    assert rows[0]["flops"] == 16 * 64 * 3 * 2 * (150 * 576 + 2400 * 64 + 41_640)


@pytest.mark.slow
def test_regrown_weights_beat_static_ones_on_the_digits(tmp_path):
    config = Config(methods=("rigl", "static", "gradual"), sparsities=(0.95,), out=tmp_path)
    rows = main(config)["rows"]
    assert show.gap(*(figures.row_at(rows, m, 0.95) for m in ("rigl", "static")))[0] > 0.03
    assert figures.at_sparsity(rows, 0.95)[0]["method"] == "gradual"


def test_the_notebook_and_its_script_are_one_and_hold_no_outputs():
    notebooks.assert_is_its_script("compare_methods")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_the_notebook_runs_on_toy_results(toy, monkeypatch, folder):
    monkeypatch.setenv("JAXPRUNE_RESULTS", str(toy))
    assert notebooks.figures_in("compare_methods", folder) == 4
