"""Tests of experiments/edge_deployment.py, what only it uses, and the notebook over its results."""

import dataclasses
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import jaxprune as jp
from experiments import edge_deployment as edge
from experiments import edge_deployment_figures as figures
from experiments import edge_deployment_training as training
from experiments.common import data, device, runner, show, small_networks, timing, train
from experiments.common.models import ResidualNet
from experiments.edge_deployment import Config, Run, main, resolve
from experiments.edge_deployment_training import Removal
from tests import crash, notebooks
from tests.helpers import sums_int8_exactly

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")
TOY = Config(
    channels=0.5,
    blocks=0.5,
    rounds=2,
    tolerance=50.0,
    resolution=0.5,
    seeds=1,
    steps=20,
    fine_tune_steps=12,
    search_steps=6,
    batch_size=16,
)
WHOLE = dataclasses.replace(TOY, seeds=2, method="one_shot", tolerance=2.0, resolution=0.2)
STAGES = (
    *("dense", "quantized", "pruned_one_shot", "pruned", "pruned_distilled"),
    *("pruned_distilled_quantized", "thin_from_scratch", "distilled"),
    *("searched", "searched_quantized"),
)


class Tiny:
    """Two residual branches after a normalisation; in plain JAX, which traces in no time."""

    def init(self, key, images):
        sizes = {"in": (images.shape[-1], 8), "out": (8, 10)}
        sizes |= {"up_0": (8, 6), "down_0": (6, 8), "up_1": (8, 6), "down_1": (6, 8)}
        draw, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, 6)
        kernels = {n: {"kernel": draw(k, sizes[n])} for n, k in zip(sizes, keys, strict=True)}
        return {"params": kernels, "batch_stats": {"mean": jnp.zeros((1, 8))}}

    def apply(self, variables, images, train=False, mutable=None):
        kernel = {name: layer["kernel"] for name, layer in variables["params"].items()}
        stream, mean = images @ kernel["in"], variables["batch_stats"]["mean"]
        now = stream.mean(0, keepdims=True) if train else mean
        stream = stream - now
        for i in range(2):
            stream += jax.nn.relu(stream @ kernel[f"up_{i}"]) @ kernel[f"down_{i}"]
        logits = stream @ kernel["out"]
        return (logits, {"batch_stats": {"mean": 0.9 * mean + 0.1 * now}}) if train else logits


def stand_in(monkeypatch):
    """Put a tiny network and data that it can learn in place of the CNN's, and times of clocks."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 90).astype(np.int32)
    images = rng.normal(size=(10, 16))[labels] + 0.3 * rng.normal(size=(90, 16))
    split = data.Examples(images.astype(np.float32), labels)
    monkeypatch.setattr(edge, "model_of", lambda config: Tiny())
    monkeypatch.setattr(data, "load_digits", lambda: data.Dataset(split, split, split))
    monkeypatch.setattr(timing, "in_turns", timed)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Small, and compiled once."""
    programs = train.compiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compiler", lambda: programs)  # who goes on compiles nothing again
        stand_in(patch)
        yield


def timed(calls, turns):
    """A call takes as many milliseconds as it gives rows, and dense twice as many."""
    return {
        name: np.full(turns, 1e-3 * len(call()) * (2 if name == "dense" else 1))
        for name, call in calls.items()
    }


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of an undisturbed toy run, to be read only."""
    folder = tmp_path_factory.mktemp("toy")
    main(dataclasses.replace(TOY, out=folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same with two seeds, the other method and a longer search; for slow tests."""
    folder = tmp_path_factory.mktemp("whole")
    main(dataclasses.replace(WHOLE, out=folder))
    return folder


@pytest.fixture(scope="module")
def bench():
    return edge.load(resolve(TOY))


def test_a_run_leaves_its_files(toy):
    names = {str(path.relative_to(toy)) for path in toy.rglob("*") if path.is_file()}
    found = runner.read_summary(toy)["search"]["sparsity"]
    float_ = [stage for stage in STAGES if not stage.startswith("search") and "quant" not in stage]
    assert names == {
        *("config.json", "metrics.jsonl", "latency.json"),
        *("summary.json", "pareto.png", "answer.md"),
        *(f"seed_0/{stage}.onnx" for stage in STAGES),
        *(
            f"seed_0/{name}.safetensors"
            for name in (*float_, "trained", "teacher", f"search_{found:g}")
        ),
    }
    config = runner.read_config(toy)
    assert config["steps"] == 20 and config["data_path"] is None and "out" not in config


def test_tables_lose_nothing_in_80_columns(toy, capsys):
    rows = runner.read_summary(toy)["rows"]
    large = {"parameters": 696_042.0, "flops": 44_123_456.0, "bytes": 2_784_200.0}
    console = rich.console.Console(width=80)
    for table in figures.tables([{**row, **large} for row in rows], title="digits"):
        console.print(table)
    shown = capsys.readouterr().out
    for cell in ("pruned_distilled_quantized", "696,042", "44.12", "2,784.2", "batch 64"):
        assert cell in shown
    assert "…" not in shown


def test_the_summary_has_a_row_for_each_stage(toy):
    rows = runner.read_summary(toy)["rows"]
    assert tuple(row["stage"] for row in rows) == STAGES
    for row in rows:
        seeds = row["accuracy"]["seeds"]
        assert len(seeds) == 1 and 0 <= seeds[0] <= 1
        assert row["accuracy"]["mean"] == np.mean(seeds) and row["accuracy"]["std"] == 0
        assert row["bytes"] == (toy / "seed_0" / f"{row['stage']}.onnx").stat().st_size
        assert 0 < row["gzip_bytes"] < row["bytes"]
        slow = 2 if row["stage"] == "dense" else 1
        assert row["latency_ms"] == pytest.approx({"1": slow, "64": 64 * slow})
        assert row["latency_ratio"]["1"]["median"] == pytest.approx(slow / 2)
        assert row["int8"] == row["stage"].endswith("quantized")
        assert row["int8"] or row["parity"] < 1e-4


def test_stages_have_the_size_that_was_asked_for(toy):
    rows = {row["stage"]: row for row in runner.read_summary(toy)["rows"]}
    # 16-8, two branches 8-6-8, 8-10; then one branch, and half of every width.
    dense, small = 128 + 2 * 96 + 80, 64 + 24 + 40
    flops = 2 * dense, 2 * small
    for stage in ("dense", "quantized"):
        assert (rows[stage]["parameters"], rows[stage]["flops"]) == (dense, flops[0])
        assert rows[stage]["channels_removed"] == 0
    for stage in STAGES[2:8]:
        assert (rows[stage]["parameters"], rows[stage]["flops"]) == (small, flops[1])
        assert rows[stage]["channels_removed"] == 0.5
    methods = [rows[stage]["method"] for stage in STAGES]
    assert methods[:5] == ["none", "none", "one_shot", "iterative", "iterative"]
    assert methods[5:] == ["iterative", "scratch", "scratch", "one_shot", "one_shot"]


def test_files_compute_what_the_small_networks_do(toy, bench):
    folder, (images, labels) = toy / "seed_0", bench.data.test
    trained = small_networks.load(folder / "trained.safetensors", bench.dense)
    assert trained.cut == {}
    for record in runner.read_records(toy):
        if record["stage"] in ("pruned", "distilled"):
            small = small_networks.load(folder / f"{record['stage']}.safetensors", bench.dense)
            infer, _ = jp.shrink(bench.dense.infer, trained.variables, cut=small.cut)
            ours = infer(small.variables, images)
            theirs = device.predict(folder / f"{record['stage']}.onnx", images)
            np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())
            assert record["accuracy"] == np.mean(theirs.argmax(-1) == labels)
            assert record["agreement"] == np.mean(theirs.argmax(-1) == ours.argmax(-1))


def test_an_int8_file_is_compared_with_its_float_file(toy, bench):
    images, labels = bench.data.test
    small, large = (
        device.predict(toy / "seed_0" / f"{stage}.onnx", images) for stage in ("quantized", "dense")
    )
    record = next(r for r in runner.read_records(toy) if r["stage"] == "quantized")
    assert record["accuracy"] == np.mean(small.argmax(-1) == labels)
    assert record["agreement"] == np.mean(small.argmax(-1) == large.argmax(-1))
    apart = np.abs(small - large).max() / np.abs(large).max()
    assert apart > 0 and (apart < 0.1 or not sums_int8_exactly())


def test_int8_convolutions_are_computed_in_integers(tmp_path, key):
    model = ResidualNet((4, 8), 10, blocks=1)
    images = np.random.default_rng(0).normal(size=(8, 36)).astype(np.float32)
    variables = jax.jit(model.init)(key, images)
    variables = jax.tree.map(lambda x: x + 0.1, variables)  # norms that do something
    float_, int8, optimised = (
        tmp_path / f"{name}.onnx" for name in ("float", "int8", "as_it_runs")
    )
    jp.export.onnx(float_, jax.jit(model.apply), variables, images, latency=())
    jp.export.quantize_onnx(int8, float_, images, latency=())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(optimised), 3
    onnxruntime.InferenceSession(str(int8), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(optimised).graph.node]
    assert kinds.count("QLinearConv") == 6 and "Conv" not in kinds


def test_a_thin_network_starts_as_if_drawn_at_its_size(key):
    kernel, gone = jax.nn.initializers.lecun_normal()(key, (3, 3, 64, 64)), jnp.ones((0, 64))
    whole = {"a": {"kernel": kernel, "bias": jnp.ones(64)}, "b": {"kernel": jnp.ones((64, 64))}}
    small = {"a": {"kernel": kernel[:, :, ::4, ::2], "bias": jnp.ones(32)}, "b": {"kernel": gone}}
    thin = training.rescale(small, whole)
    np.testing.assert_allclose(thin["a"]["kernel"], 2 * small["a"]["kernel"], rtol=1e-6)
    assert thin["a"]["kernel"].std() == pytest.approx((3 * 3 * 16) ** -0.5, rel=0.02)
    assert thin["a"]["bias"] is small["a"]["bias"] and thin["b"]["kernel"] is gone


def test_a_finished_run_is_read_and_told_again(toy, capsys, monkeypatch):
    monkeypatch.setattr(edge, "load", None)  # neither data nor training are needed
    (toy / "pareto.png").unlink()
    assert main(dataclasses.replace(TOY, out=toy)) == runner.read_summary(toy)
    assert (toy / "pareto.png").read_bytes().startswith(b"\x89PNG")
    printed, answer = capsys.readouterr().out, (toy / "answer.md").read_text()
    for word in ("From a trained network to a small device", "pruned_distilled_quantized"):
        assert word in printed and word in answer


def test_a_killed_run_goes_on_to_the_same_bytes(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "png", lambda figure: b"png")  # drawing takes longest here
    state = crash.contents(toy)
    lines = state["metrics.jsonl"].splitlines(keepends=True)
    torn = {**state, "metrics.jsonl": b"".join(lines[:7]) + lines[7][:40]}
    gone = "summary.json", "answer.md", "seed_0/distilled.safetensors", "seed_0/teacher.safetensors"
    gone = *gone, "seed_0/quantized.onnx"  # whose record is there
    crash.restore({name: torn[name] for name in torn if name not in gone}, tmp_path)
    main(dataclasses.replace(TOY, out=tmp_path))
    assert crash.contents(tmp_path) == {**state, "pareto.png": b"png"}


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    config = dataclasses.replace(TOY, steps=2, out=tmp_path)
    crash.assert_any_kill_is_survived(main, config, monkeypatch, files=25, at_least=100, every=15)


@pytest.mark.slow
def test_a_process_killed_at_random_goes_on_to_the_same_bytes(tmp_path):
    arguments = ["--channels", "0.5", "--blocks", "0.5", "--rounds", "2", "--tolerance", "2"]
    arguments += ["--resolution", "0.2", "--seeds", "2", "--steps", "20", "--fine-tune-steps", "12"]
    arguments += ["--search-steps", "6", "--batch-size", "16", "--out"]
    delays = np.random.default_rng(0).uniform(0, 20.0, 16).tolist()
    for name, kills in (("killed", delays), ("whole", [])):
        lines = [[*arguments, str(tmp_path / name)]]
        codes, _ = crash.run_processes("edge_deployment", lines, kills, timeout=1200)
        assert codes.count([-signal.SIGKILL]) >= len(kills) // 2 and codes[-1] == [0]
    assert crash.contents(tmp_path / "killed") == crash.contents(tmp_path / "whole")


@pytest.mark.slow
def test_the_search_tries_networks_until_it_knows(whole):
    search = runner.read_summary(whole)["search"]
    tried = {trial["sparsity"]: trial["accuracy"]["mean"] for trial in search["trials"]}
    limit = tried[0.0] - 0.02
    assert tried[search["sparsity"]] >= limit
    assert all(accuracy < limit for s, accuracy in tried.items() if s > search["sparsity"])
    records = [r for r in runner.read_records(whole) if r["stage"] == "search"]
    assert len(records) == 2 * (len(tried) - 1)
    rows = {row["stage"]: row for row in runner.read_summary(whole)["rows"]}
    assert rows["searched"]["channels_removed"] == search["sparsity"]


def test_the_search_asks_for_the_mean_of_the_seeds_beside_dense():
    asked = []

    def ensure(trials):
        asked.append(trials)
        lost = 0.1 * (trials[0].channels_removed > 0.6)
        return [{"validation_accuracy": 0.9 - lost + 0.01 * trial.seed} for trial in trials]

    settings = resolve(dataclasses.replace(TOY, seeds=2, tolerance=5.0, resolution=0.05))
    found = edge.search(settings, ensure)
    assert 0.55 <= found <= 0.6
    assert asked[0] == [Run("dense", 0, 0.0), Run("dense", 1, 0.0)]
    assert all(run.stage == "search" for trials in asked for run in trials if run.channels_removed)


def test_a_search_that_finds_nothing_exports_the_dense_network():
    settings = resolve(TOY)
    assert edge.search(settings, fall) == 0.0
    run = edge.plan_searched(settings, 0.0)[0]
    assert edge.network_of(settings, run).name == "dense.safetensors"


def fall(trials):
    """Whatever is removed, everything is lost."""
    return [{"validation_accuracy": float(trial.stage == "dense")} for trial in trials]


def test_channels_go_before_branches_at_once_or_over_a_quarter():
    cuts = training.removals_of("one_shot", 0.75, 0.25, 3, 400)
    assert cuts == [Removal(0, "channels", 0.75), Removal(0, "branches", 0.25)]
    cuts = training.removals_of("iterative", 0.75, 0.25, 2, 400)
    assert cuts == [
        *(Removal(0, "channels", 0.5), Removal(50, "channels", 0.75)),
        Removal(100, "branches", 0.25),
    ]
    assert [cut.step for cut in training.removals_of("iterative", 0.5, 0.0, 3, 400)] == [0, 50, 100]


def test_a_student_learns_from_the_teacher_and_the_labels(toy, bench):
    config = resolve(dataclasses.replace(TOY, out=toy))
    lesson = edge.by_teacher(config, bench, edge.begin(config, bench, 0))
    _, (labels, teacher) = lesson.take(np.array([3, 5]))
    np.testing.assert_array_equal(labels, bench.data.train.targets[[3, 5]])
    dense = small_networks.load(toy / "seed_0" / "dense.safetensors", bench.dense)
    asked = dense.infer(dense.variables, bench.data.train.inputs[[3, 5]])
    np.testing.assert_allclose(teacher, asked, atol=1e-5)
    student = jnp.asarray(teacher) + 1.0
    expected = jp.distillation_loss(student, teacher, labels, temperature=4.0, alpha=0.9)
    assert lesson.loss(student, (labels, teacher)) == expected


def test_training_minimises_the_loss_that_it_is_given(bench, key):
    start = bench.draw(key)

    def push(logits, targets):
        return (targets * logits).mean()

    def take(indices):
        return data.Examples(bench.data.train.inputs[indices], np.float32(-1.0))

    end = training.fit(bench, training.Lesson(take, push), start, np.arange(40).reshape(5, 8))
    before, after = (n.learn(n.variables, bench.data.train.inputs)[0].mean() for n in (start, end))
    assert after > before


def test_predictions_are_the_same_in_parts(bench, key, monkeypatch):
    network, images = bench.draw(key), bench.data.test.inputs
    whole = network.infer(network.variables, images)
    monkeypatch.setattr(train, "AT_ONCE", 40)
    parts = train.predict(network.infer, network.variables, images, bench.compile_)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_a_file_answers_the_same_in_parts(toy, bench, monkeypatch):
    path, images = toy / "seed_0" / "dense.onnx", bench.data.test.inputs
    whole = device.predict(path, images)
    monkeypatch.setattr(device, "RUN_AT_ONCE", 40)
    np.testing.assert_allclose(device.predict(path, images), whole, atol=1e-6)
    np.testing.assert_allclose(device.call(path, images[:2])(), whole[:2], atol=1e-6)


def test_another_config_is_refused(toy):
    with pytest.raises(ValueError, match=r"another config: alpha \(0.9 there, 0.7 now\)"):
        main(dataclasses.replace(TOY, alpha=0.7, out=toy))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "cifar"}, "`dataset='cifar'` is not known. Choose one of digits, mnist"),
        ({"widths": ()}, r"`widths=\(\)` must name a positive number for each stage"),
        ({"widths": (8, 0)}, r"`widths=\(8, 0\)` must name a positive number"),
        ({"channels": 1.0}, "`channels=1.0` must lie between 0 and 1"),
        ({"blocks": -0.1}, "`blocks=-0.1` must be 0 or more and below 1"),
        ({"method": "lucky"}, "`method='lucky'` must be one_shot or iterative"),
        ({"rounds": 1}, "`rounds=1` must be 2 or more, or iterative is one_shot"),
        ({"temperature": 0.0}, "`temperature=0.0` must be positive and finite"),
        ({"temperature": float("inf")}, "`temperature=inf` must be positive and finite"),
        ({"alpha": 0.0}, "`alpha=0.0` must be above 0, or nothing is distilled, and at most 1"),
        ({"tolerance": -0.5}, "`tolerance=-0.5` must be 0 or more.*even the dense network misses"),
        ({"tolerance": float("nan")}, "`tolerance=nan` must be 0 or more"),
        ({"resolution": 0.0}, "`resolution=0.0` must lie between 0 and 1"),
        ({"seeds": 0}, "`seeds=0` must be positive"),
        ({"steps": 0}, "`steps=0` must be positive"),
        ({"fine_tune_steps": 15}, "`fine_tune_steps=15` must be 16 or more"),
        ({"search_steps": 301}, "`search_steps=301` must be positive and no more than `fine_tune"),
        ({"batch_size": -1}, "`batch_size=-1` must be positive"),
        ({"data_path": Path("mnist.npz")}, "goes with dataset='mnist'"),
        ({"seeds": 0, "alpha": 2.0}, r"`alpha=2.0` must.*; `seeds=0` must be positive\. Change it"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        resolve(Config(**changes))


def test_fractions_that_remove_nothing_are_refused_before_anything_is_trained(tmp_path):
    config = dataclasses.replace(TOY, channels=0.05, blocks=0.2, out=tmp_path / "run")
    words = "`channels=0.05` removes none of the 6 channels.*`blocks=0.2` removes none of 2 branch"
    with pytest.raises(ValueError, match=words):
        main(config)
    assert not (tmp_path / "run").exists()


def test_the_data_decide_what_is_left_out():
    settings = resolve(Config(dataset="mnist", steps=7))
    assert settings.out == Path("results/edge_deployment_mnist") and settings.steps == 7
    left_out = {**edge.DEFAULTS["mnist"], "steps": 7}
    assert {name: getattr(settings, name) for name in left_out} == left_out


def row(stage, seeds, *, bytes=1000.0, speed=1.0, method="none", int8=False):
    ratio = {"median": 1 / speed, "low": 1 / speed, "high": 1 / speed}
    return {
        "stage": stage,
        "method": method,
        "taught": False,
        "channels_removed": 0.0 if method == "none" else 0.75,
        "int8": int8,
        "accuracy": {"mean": np.mean(seeds), "std": np.std(seeds), "seeds": seeds},
        "parameters": bytes / 4,
        "flops": 1e6 / speed,
        "bytes": bytes,
        "gzip_bytes": bytes / 2,
        "parity": None if int8 else 1e-6,
        "agreement": 0.996 if int8 else 1.0,
        "latency_ms": {"1": 0.2 / speed, "64": 9 / speed},
        "latency_ratio": {"1": ratio, "64": ratio},
    }


ROWS = [
    row("dense", [0.99, 0.98]),
    row("quantized", [0.99, 0.97], bytes=250.0, speed=2.0, int8=True),
    row("pruned_one_shot", [0.96, 0.96], bytes=100.0, speed=5.0, method="one_shot"),
    row("pruned", [0.97, 0.96], bytes=100.0, speed=5.0, method="iterative"),
    row("pruned_distilled", [0.98, 0.965], bytes=100.0, speed=5.0, method="iterative"),
    row(
        "pruned_distilled_quantized",
        [0.97, 0.965],
        bytes=50.0,
        speed=6.0,
        method="iterative",
        int8=True,
    ),
    row("thin_from_scratch", [0.95, 0.95], bytes=100.0, speed=5.0, method="scratch"),
    row("distilled", [0.96, 0.95], bytes=100.0, speed=5.0, method="scratch"),
    row("searched", [0.985, 0.975], bytes=200.0, speed=3.0, method="one_shot"),
    row("searched_quantized", [0.98, 0.975], bytes=80.0, speed=4.0, method="one_shot", int8=True),
]
SUMMARY = {
    "dataset": "digits",
    "rows": ROWS,
    "search": {"sparsity": 0.5, "tolerance": 0.5, "trials": []},
}


def test_the_answer_is_read_off_the_rows():
    answer = figures.answer(SUMMARY).splitlines()
    for line in (
        "| pruned | 96.50±0.50 | 2.00±0.00 | 25 | 0.20 | 0.1 | 0.1 | 0.040 | 1.80 |",
        "- The dense network is too heavy: within 0.5 points of it, on the validation set, 50 % of "
        "the channels can go. As a file in int8 that has 1/12.5 of the bytes and 4.00 times the "
        "speed at batch 1 (4.00 at batch 64), and loses 0.75±0.25 points on the test set. By the "
        "same measure, after as short a fine-tuning, a network without 75 % of them is too light.",
        "- pruned_distilled_quantized has 1/20.0 of the bytes and 6.00 times the speed at batch 1 "
        "(6.00 at batch 64), and loses 1.75±0.25 points on the test set.",
        "- Of the 2.00±0.00 points that pruning loses, distillation gives back 38 % (seed by seed: "
        "50, 25).",
        "- A trained network that was cut beats a thin one from fresh weights, in points, by "
        "1.50±0.50 without and 1.75±0.25 with the teacher.",
        "- iterative minus one_shot, in points: 0.50±0.50.",
        "- On the whole test set logits of the float files differ from those of JAX by at most "
        "1.0e-06 of the largest, and their classes agree for 100.00 % or more; classes of the int8 "
        "files agree with those of their float file for 99.60 % or more.",
    ):
        assert line in answer


def test_the_answer_says_when_more_could_go_and_when_nothing_can():
    answer = figures.answer({**SUMMARY, "search": {"sparsity": 0.9, "tolerance": 0.5}})
    assert "90 % of the channels can go" in answer
    assert "a network without 75 % of them is too heavy, too." in answer
    answer = figures.answer({**SUMMARY, "search": {"sparsity": 0.0, "tolerance": 0.5}})
    assert "- The dense network is as light as it can be: no fraction of the channels" in answer


def test_distillation_gives_back_nothing_where_nothing_is_lost():
    rows = [
        row("dense", [0.9, 0.9]),
        row("pruned", [0.9, 0.91], method="iterative"),
        row("pruned_distilled", [1, 1]),
    ]
    share, seeds = figures.recovered(rows)
    assert np.isnan(share) and np.isnan(seeds).all()
    rows[1] = row("pruned", [0.9, 0.7], method="iterative")
    share, seeds = figures.recovered(rows)
    assert share == pytest.approx(2.0) and np.isnan(seeds[0]) and seeds[1] == pytest.approx(1.5)
    lines = [*rows, *ROWS[2:3], *ROWS[5:]]
    assert "(seed by seed: -, 150)" in figures.answer({**SUMMARY, "rows": lines})


def test_the_front_is_what_nothing_cheaper_is_as_accurate_as():
    found = figures.front(ROWS, lambda row: row["bytes"])
    assert [row["stage"] for row in found] == [
        *("pruned_distilled_quantized", "searched_quantized", "searched", "dense"),
    ]


def test_the_figure_shows_each_stage_in_both_panels():
    figure = figures.pareto_figure(ROWS, tolerance=0.5)
    time, size = figure.axes
    assert time.get_xscale() == size.get_xscale() == "log"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[-len(ROWS) :] == [row["stage"] for row in ROWS]
    for axes, costs in ((time, [0.2, 0.1]), (size, [1.0, 0.25])):
        assert [bar.lines[0].get_xdata()[0] for bar in axes.containers[:2]] == costs
    assert show.png(figure).startswith(b"\x89PNG")


def test_the_notebook_and_its_script_are_one_and_hold_no_outputs():
    notebooks.assert_is_its_script("edge_deployment")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_the_notebook_runs_on_toy_results(whole, monkeypatch, folder):
    monkeypatch.setenv("JAXPRUNE_RESULTS", str(whole))
    assert notebooks.figures_in("edge_deployment", folder) == 4
