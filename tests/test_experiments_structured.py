"""Tests of experiments/structured.py, what it shares, and the notebook over its results."""

import dataclasses
import signal
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

import jaxprune as jp
from experiments import structured
from experiments import structured_figures as figures
from experiments.common import data, runner, show, small_networks, timing, train
from experiments.common.models import Transformer
from experiments.structured import Config, Run, main, resolve
from tests import crash, notebooks

TOY = Config(
    models=("cnn",),
    methods=("iterative",),
    channels=(0.5,),
    layers=(),
    rounds=2,
    seeds=1,
    steps=20,
    fine_tune_steps=8,
    batch_size=16,
)
WHOLE = dataclasses.replace(TOY, methods=("one_shot", "iterative"), layers=(0.5,), seeds=2)
COMPARE = timing.compare


class Tiny(nn.Module):
    """Two residual branches after batch normalisation; compiles in no time."""

    @nn.compact
    def __call__(self, images, train=False):
        stream = nn.Dense(8, name="in")(images)
        stream = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(stream)
        for i in range(2):
            inner = nn.relu(nn.Dense(6, name=f"up_{i}")(stream))
            stream += nn.Dense(8, name=f"down_{i}")(inner)
        return nn.Dense(10, name="out")(stream)


def stand_in(monkeypatch):
    """Put a tiny network and data in place of the CNN's, and times in place of clocks."""
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(90, 16)).astype(np.float32), rng.integers(0, 10, 90)
    split = data.Examples(images, labels.astype(np.int32))
    times = {"latency_ms": 1.0, "dense_ms": 2.0}
    times["latency_ratio"] = {"median": 0.5, "low": 0.4, "high": 0.6}
    monkeypatch.setitem(structured.MODELS, "digits", Tiny())
    monkeypatch.setattr(data, "load_digits", lambda: data.Dataset(split, split, split))
    monkeypatch.setattr(timing, "compare", lambda small, dense, turns: times)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Small, and compiled once."""
    programs = train.compiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compiler", lambda: programs)  # who goes on compiles nothing again
        stand_in(patch)
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of an undisturbed toy run, to be read only."""
    folder = tmp_path_factory.mktemp("toy")
    main(dataclasses.replace(TOY, out=folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same with all methods, with layers and two seeds; for slow tests."""
    folder = tmp_path_factory.mktemp("whole")
    main(dataclasses.replace(WHOLE, out=folder))
    return folder


@pytest.fixture(scope="module")
def task():
    return structured.load(resolve(TOY), "cnn")


@pytest.fixture(scope="module")
def network(task):
    start = jax.jit(task.model.init)(jax.random.key(0), task.test.inputs[:1])
    return task.dense._replace(variables=start)


def test_a_run_leaves_its_files(toy):
    names = {str(path.relative_to(toy)) for path in toy.rglob("*") if path.is_file()}
    networks = "trained", "dense_channels_0_layers_0", "iterative_channels_0.5_layers_0"
    assert names == {
        *("config.json", "metrics.jsonl", "latency.json"),
        *("summary.json", "tradeoff.png", "answer.md"),
        *(f"cnn/seed_0/{name}.safetensors" for name in networks),
    }
    config = runner.read_config(toy)
    assert config["trainings"]["cnn"]["steps"] == 20 and config["data_path"] is None
    assert "out" not in config and "transformer" not in config["trainings"]


def test_the_summary_has_a_row_for_each_network_and_cut(toy):
    rows = runner.read_summary(toy)["rows"]
    assert [figures.key_of(row) for row in rows] == [
        ("cnn", "dense", 0.0, 0.0),
        ("cnn", "iterative", 0.5, 0.0),
    ]
    # 16-8 and a norm, two branches 8-6-8, 8-10; then half of every width.
    assert [r["parameters"] for r in rows] == [136 + 16 + 2 * 110 + 90, 68 + 8 + 2 * 31 + 50]
    flops = 2 * (128 + 4 * 48 + 80), 2 * (64 + 4 * 12 + 40)
    for row, expected in zip(rows, flops, strict=True):
        seeds = row["accuracy"]["seeds"]
        assert len(seeds) == 1 and all(0 <= accuracy <= 1 for accuracy in seeds)
        assert row["accuracy"]["mean"] == np.mean(seeds) and row["accuracy"]["std"] == np.std(seeds)
        assert row["flops"] == expected and row["flops_ratio"] == expected / flops[0]
    assert rows[0]["latency_ms"] == 2.0 and rows[0]["latency_ratio"]["median"] == 1.0
    assert rows[1]["latency_ms"] == 1.0 and rows[1]["latency_ratio"]["high"] == 0.6
    dense, small = runner.read_records(toy)
    assert dense["left"] == {} and sorted(small["left"].values()) == [3, 3, 4]


def test_tables_lose_nothing_in_80_columns(toy, capsys):
    rows = runner.read_summary(toy)["rows"]
    large = {
        "model": "transformer",
        "parameters": 10_696_042.0,
        "flops": 44_123_456.0,
        "latency_ms": 140.25,
    }
    rows = [{**row, **large} for row in rows]
    console = rich.console.Console(width=80)
    console.print(figures.accuracy_table(rows, title="digits"))
    console.print(figures.cost_table(rows, batch=64))
    shown = capsys.readouterr().out
    for cell in ("iterative", "10,696,042", "44.12", "140.25", show.percent(rows[0])):
        assert shown.count(cell) >= 1, cell
    assert "…" not in shown


@pytest.mark.slow
def test_methods_end_at_the_same_size_and_layers_compete(whole):
    rows = runner.read_summary(whole)["rows"]
    cuts = (0.5, 0.0), (0.0, 0.5)
    assert [figures.key_of(row) for row in rows] == [
        ("cnn", "dense", 0.0, 0.0),
        *(("cnn", method, *cut) for method in WHOLE.methods for cut in cuts),
    ]
    # Without a branch 110 parameters and two products fewer.
    assert [row["parameters"] for row in rows] == [462, 188, 352, 188, 352]
    assert [row["flops"] for row in rows] == [800, 304, 608, 304, 608]
    for record in runner.read_records(whole):
        left = sorted(record["left"].values())
        if record["channels_removed"]:
            assert left == [3, 3, 4]
        elif record["layers_removed"]:
            assert left == [0, 1]


def test_small_networks_are_what_the_cuts_say(toy, task):
    config = resolve(dataclasses.replace(TOY, out=toy))
    trained = small_networks.load(structured.trained_of(config, "cnn", 0), task.dense)
    assert trained.cut == {}
    records = {Run(*(r[f] for f in Run._fields)): r for r in runner.read_records(toy)}
    run = structured.plan(config)[1]
    small = small_networks.load(structured.file_of(config, run), trained)
    infer, same = jp.shrink(task.dense.infer, trained.variables, cut=small.cut)
    assert jax.tree.map(jnp.shape, same) == jax.tree.map(jnp.shape, small.variables)
    found = train.evaluate(infer, small.variables, task.test, train.compiler())
    assert found["accuracy"] == records[run]["accuracy"]
    assert found["loss"] == pytest.approx(records[run]["loss"], rel=1e-5)


def test_a_finished_run_is_read_and_told_again(toy, capsys, monkeypatch):
    monkeypatch.setattr(structured, "load", None)  # neither data nor training are needed
    (toy / "tradeoff.png").unlink()
    assert main(dataclasses.replace(TOY, out=toy)) == runner.read_summary(toy)
    assert (toy / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    printed, answer = capsys.readouterr().out, (toy / "answer.md").read_text()
    for word in ("What cutting costs and buys", "iterative", "50 % channels"):
        assert word in printed and word in answer


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    config = dataclasses.replace(TOY, steps=2, out=tmp_path)
    crash.assert_any_kill_is_survived(main, config, monkeypatch, files=9, at_least=40)


def test_what_is_missing_is_computed_again(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "png", lambda figure: b"png")  # drawing takes longest here
    state = crash.contents(toy)
    gone = "cnn/seed_0/iterative_channels_0.5_layers_0.safetensors", "summary.json", "answer.md"
    crash.restore({name: state[name] for name in state if name not in gone}, tmp_path)
    main(dataclasses.replace(TOY, out=tmp_path))
    assert crash.contents(tmp_path) == {**state, "tradeoff.png": b"png"}


@pytest.mark.slow
def test_a_transformer_loses_heads_and_layers(tmp_path, monkeypatch):
    tiny = Transformer(data.SYMBOLS, structured.CONTEXT, width=16, layers=2, heads=2)
    monkeypatch.setitem(structured.MODELS, "text", tiny)
    config = dataclasses.replace(WHOLE, models=("transformer",), seeds=1, out=tmp_path)
    sizes = [row["parameters"] for row in main(config)["rows"]]
    # Symbols and positions; attention, feed-forward and their norms, twice; a norm and the output.
    attention, forward = 4 * (16 * 16 + 16) + 32, 2 * 16 * 64 + 64 + 16 + 32
    assert sizes[0] == (97 + 32) * 16 + 2 * (attention + forward) + 32 + 17 * 97
    # One head of 8, 32 of 64 inside, and the 8 best channels between the layers.
    attention_8, forward_8 = 4 * (8 * 8 + 8) + 16, 2 * 8 * 32 + 32 + 8 + 16
    half = (97 + 32) * 8 + 2 * (attention_8 + forward_8) + 16 + 9 * 97
    assert sizes[1] == sizes[3] == half
    for size in sizes[2], sizes[4]:
        assert sizes[0] - size in (2 * attention, attention + forward, 2 * forward)


@pytest.mark.slow
def test_a_process_killed_at_random_goes_on_to_the_same_bytes(tmp_path):
    arguments = ["--models", "cnn", "--channels", "0.25", "0.5", "0.75", "--layers", "0.5"]
    arguments += ["--rounds", "2", "--seeds", "2", "--steps", "20", "--fine-tune-steps", "8"]
    arguments += ["--batch-size", "16", "--out"]
    delays = np.random.default_rng(0).uniform(0, 3.0, 40).tolist()
    for name, kills in (("killed", delays), ("whole", [])):
        lines = [[*arguments, str(tmp_path / name)]]
        codes, _ = crash.run_processes("structured", lines, kills, timeout=1200)
        assert codes.count([-signal.SIGKILL]) >= 20 * len(kills) // 40 and codes[-1] == [0]
    assert crash.contents(tmp_path / "killed") == crash.contents(tmp_path / "whole")


def test_another_config_is_refused(toy):
    with pytest.raises(ValueError, match=r"another config: rounds \(2 there, 3 now\)"):
        main(dataclasses.replace(TOY, rounds=3, fine_tune_steps=12, out=toy))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "cifar"}, "`dataset='cifar'` is not known. Choose one of digits, mnist"),
        ({"models": ("cnn", "rnn")}, r"may name cnn, transformer, but not \['rnn'\]"),
        ({"models": ()}, r"`models=\(\)` must name each once, and one at least"),
        ({"methods": ("lucky",)}, r"may name one_shot, iterative, but not \['lucky'\]"),
        ({"methods": ("one_shot",) * 2}, "must name each once"),
        ({"channels": (0.5, 1.0)}, r"`channels=\(0.5, 1.0\)` must lie between 0 and 1"),
        ({"layers": (float("nan"),)}, "must lie between 0 and 1"),
        ({"layers": (0.5, 0.5)}, "must be distinct"),
        ({"channels": (), "layers": ()}, r"`channels=\(\)` leaves nothing to remove, as `layers`"),
        ({"rounds": 1}, "`rounds=1` must be 2 or more, or iterative is one_shot"),
        ({"criterion": "luck"}, "`criterion='luck'` must be one of taylor, magnitude, random"),
        ({"scope": "global"}, "`scope='global'` must be per-leaf or across"),
        ({"seeds": 0}, "`seeds=0` must be positive"),
        ({"steps": 0}, "`steps=0` must be positive"),
        ({"fine_tune_steps": 11}, "`fine_tune_steps=11` must be 12 or more"),
        ({"batch_size": -1}, "`batch_size=-1` must be positive"),
        ({"data_path": Path("mnist.npz")}, "goes with dataset='mnist'"),
        ({"seeds": 0, "steps": -1}, "`seeds=0` must be positive; `steps=-1` must be positive"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        resolve(Config(**changes))


def test_the_data_decide_what_is_left_out():
    config = resolve(Config(dataset="mnist"))
    assert config.out == Path("results/structured_mnist")
    assert structured.training_of(config, "cnn") == structured.TRAININGS["mnist"]
    assert structured.training_of(config, "transformer") == structured.TRAININGS["text"]
    given = structured.training_of(resolve(Config(steps=7)), "transformer")
    assert given == structured.TRAININGS["text"]._replace(steps=7)


def test_of_the_channels_of_attention_whole_heads_are_removed():
    task = structured.load(resolve(Config()), "transformer")
    groups = structured.find_units(task.dense, task.test.inputs[:1], layers=False)
    assert sorted(group.size for group in groups) == [*[4] * 4, 64, *[256] * 4]
    assert len(structured.find_units(task.dense, task.test.inputs[:1], layers=True)) == 8


def test_windows_of_text_are_asked_for_the_next_character():
    task = structured.load(resolve(Config()), "transformer")
    batch, codes = task.take(np.array([0, 5])), data.load_text().train
    np.testing.assert_array_equal(batch.inputs[1], codes[5:37])
    np.testing.assert_array_equal(batch.targets[1], codes[6:38])
    np.testing.assert_array_equal(task.test.inputs[1:, 0], task.test.targets[:-1, -1])


def test_programs_that_read_the_same_are_compiled_once():
    compile_, x = train.compiler(), jnp.arange(3.0)
    double = [compile_(lambda x: 2 * x, x) for _ in range(2)]
    assert double[0] is double[1] and double[0](x).tolist() == [0.0, 2.0, 4.0]
    assert compile_(lambda x: 3 * x, x) is not double[0]
    assert compile_(lambda x: 2 * x, x[:2]) is not double[0]


def test_learning_rates_rise_for_a_tenth_and_fall_to_nothing():
    rates = train.learning_rates(2.0, 100)
    assert rates.argmax() in (9, 10) and 1.8 < rates.max() <= 2.0
    assert np.all(np.diff(rates[10:]) < 0) and 0 < rates[-1] < 0.001 and rates[0] < 0.2


def test_the_gradient_is_the_mean_over_batches(task, network):
    batches, compile_ = [task.take(np.arange(n, n + 4)) for n in (0, 4)], train.compiler()
    parts = (batches, batches[:1], batches[1:])
    found = [
        train.mean_gradient(network.learn, network.variables, part, compile_) for part in parts
    ]
    for m, a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(m, (a + b) / 2, atol=1e-6)


def test_all_examples_are_tested_whatever_the_parts(task, network, monkeypatch):
    whole = train.evaluate(network.infer, network.variables, task.test, train.compiler())
    monkeypatch.setattr(train, "AT_ONCE", 40)
    parts = train.evaluate(network.infer, network.variables, task.test, train.compiler())
    assert parts == pytest.approx(whole, rel=1e-5)


def row(method, seeds, *, channels=0.0, layers=0.0, flops=1.0, latency=1.0):
    ratio = {"median": latency, "low": latency, "high": latency}
    return {
        "model": "cnn",
        "method": method,
        "channels_removed": channels,
        "layers_removed": layers,
        "accuracy": {"mean": np.mean(seeds), "std": np.std(seeds), "seeds": seeds},
        "loss": {"mean": 0.1, "std": 0.0, "seeds": [0.1, 0.1]},
        "parameters": 1e6 * flops,
        "flops": 1e7 * flops,
        "flops_ratio": flops,
        "latency_ms": 2 * latency,
        "latency_ratio": ratio,
    }


ROWS = [
    row("dense", [0.99, 0.97]),
    row("one_shot", [0.95, 0.95], channels=0.5, flops=0.25, latency=0.3),
    row("one_shot", [0.97, 0.97], layers=0.5, flops=0.5, latency=0.5),
    row("iterative", [0.985, 0.971], channels=0.5, flops=0.25, latency=0.35),
    row("iterative", [0.98, 0.96], layers=0.5, flops=0.5, latency=0.55),
]


def test_the_answer_is_read_off_the_rows():
    answer = figures.answer(ROWS, dataset="digits")
    for line in (
        "Dense: 98.00±1.00 %, 1,000,000 parameters, 10.00 MFLOPs, 2.00 ms.",
        "| 50 % channels | iterative | 97.80±0.70 | 0.20±0.30 | 25.0 % | 35.0 % | 1.40 |",
        "- Within 0.3 points of dense, the fewest FLOPs has iterative, 50 % channels removed: "
        "25.0 % of the FLOPs, 35.0 % of the latency.",
        "- iterative minus one_shot, in points: +2.80±0.70 at 50 % channels, +0.00±1.00 at "
        "50 % layers.",
        # Halfway between 25 and 100 % on a logarithmic axis: 96.5 and 97.9.
        "- Removing layers instead of channels, for as many FLOPs (accuracy interpolated along the "
        "logarithm of the FLOPs), in points: +0.50 for one_shot at 50 % layers, -0.90 for "
        "iterative at 50 % layers.",
        "- Latency is 1.00 (one_shot, 50 % layers removed) to 1.40 (iterative, 50 % channels "
        "removed) times what the FLOPs say.",
    ):
        assert line in answer.splitlines()


def test_the_answer_says_nothing_of_what_was_not_run():
    answer = figures.answer(ROWS[:2], dataset="digits")
    assert "Every network loses more than 0.3 points." in answer
    assert "iterative" not in answer and "layers" not in answer


def test_the_figure_has_two_panels_a_network():
    figure = figures.tradeoff_figure([*ROWS, *({**r, "model": "transformer"} for r in ROWS)])
    above, _, below, _ = figure.axes
    assert above.get_title() == "cnn"
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == [
        "dense",
        *(f"{m}, {k}" for m in ("one_shot", "iterative") for k in ("channels", "layers")),
    ]
    assert above.get_xlim() == below.get_xlim() and below.get_yscale() == "log"
    assert show.png(figures.tradeoff_figure(ROWS[:2])).startswith(b"\x89PNG")


def test_latency_is_compared_in_turns(monkeypatch):
    monkeypatch.setattr(timing, "_seconds", lambda run: 0.004)
    calls = []
    blocks = {}

    def interleave(tasks, repeats):
        for name, task in tasks.items():
            calls.clear()
            task()
            blocks[name] = list(calls)
        return {"small": [0.003, 0.006, 0.009], "dense": [0.006, 0.012, 0.012]}

    monkeypatch.setattr(timing, "interleave", interleave)
    found = COMPARE(lambda: calls.append("s"), lambda: calls.append("d"), turns=3)
    assert blocks == {"small": ["s"] * 3, "dense": ["d"] * 3}  # 10 ms of 4 ms each
    assert found["latency_ms"] == pytest.approx(2) and found["dense_ms"] == pytest.approx(4)
    assert found["latency_ratio"]["median"] == 0.5


def test_a_call_waits_for_its_result():
    call = timing.call(lambda v, x: v @ x, jnp.ones((2, 2)), np.ones((2, 1), np.float32))
    assert call().tolist() == [[2.0], [2.0]]


def test_the_notebook_and_its_script_are_one_and_hold_no_outputs():
    notebooks.assert_is_its_script("structured")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_the_notebook_runs_on_toy_results(whole, monkeypatch, folder):
    monkeypatch.setenv("JAXPRUNE_RESULTS", str(whole))
    assert notebooks.figures_in("structured", folder) == 3
