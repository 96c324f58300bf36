"""Tests of experiments/lottery_ticket.py and of the notebook that reads its results."""

import dataclasses
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from experiments import lottery_ticket
from experiments import lottery_ticket_figures as figures
from experiments.common import data, runner, train
from experiments.common.data import Examples
from experiments.common.models import MLP
from experiments.lottery_ticket import CONTROLS, Config, main, resolve
from tests import crash, notebooks

SMALL = Config(levels=1, steps=10, seeds=1, eval_every=5, controls=("reinit",))
TOY = Config(levels=2, steps=20, seeds=2, eval_every=5)
SIZES = {"hidden_0/kernel": 6400, "hidden_1/kernel": 5000, "out/kernel": 500}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The folder of an undisturbed toy run, to be read only."""
    folder = tmp_path_factory.mktemp("toy")
    main(dataclasses.replace(TOY, out=folder))
    return folder


def run_of(record):
    return tuple(record[field] for field in lottery_ticket.FIELDS)


def test_a_run_leaves_its_files(toy):
    names = {str(path.relative_to(toy)) for path in toy.rglob("*") if path.is_file()}
    levels = {f"seed_{s}/level_0{n}.safetensors" for s in range(2) for n in range(3)}
    starts = {"seed_0/start.safetensors", "seed_1/start.safetensors"}
    files = {"config.json", "metrics.jsonl", "summary.json", "accuracy.png", "learning_curves.png"}
    assert names == files | levels | starts


def test_the_config_is_written_with_what_the_dataset_decides(toy):
    config = runner.read_config(toy)
    assert (config["levels"], config["rate"], config["output_rate"]) == (2, 0.36, 0.18)
    assert config["data_path"] is None and "out" not in config


def test_metrics_have_a_line_for_each_training_run(toy):
    records = runner.read_records(toy)
    assert len({run_of(record) for record in records}) == len(records) == 18
    for record in records:
        assert record["steps"] == [5, 10, 15, 20]
        assert len(record["validation_loss"]) == len(record["validation_accuracy"]) == 4
        assert record["early_stop_step"] == 5 * (1 + np.argmin(record["validation_loss"]))


def test_the_summary_has_a_row_for_each_level_and_condition(toy):
    rows = runner.read_summary(toy)["rows"]
    pruned = [(level, name) for level in (1, 2) for name in ("ticket", *CONTROLS)]
    assert [(row["level"], row["condition"]) for row in rows] == [(0, "dense"), *pruned]
    for row in rows:
        for metric in ("accuracy", "accuracy_early", "accuracy_best", "early_stop_step"):
            seeds = row[metric]["seeds"]
            assert len(seeds) == 2
            assert row[metric]["mean"] == np.mean(seeds) and row[metric]["std"] == np.std(seeds)
        assert all(0 <= accuracy <= 1 for accuracy in row["accuracy"]["seeds"])


def test_each_round_removes_exactly_its_share_of_each_layer(toy):
    for level in range(3):
        masks, _ = load(toy, 1, level)
        left = {path: int(mask.sum()) for path, mask in paths(masks).items()}
        rates = {path: 0.18 if path.startswith("out") else 0.36 for path in SIZES}
        removed = {path: round((1 - (1 - rates[path]) ** level) * n) for path, n in SIZES.items()}
        assert left == {path: n - removed[path] for path, n in SIZES.items()}
        for row in runner.read_summary(toy)["rows"]:
            if row["level"] == level:
                total = sum(SIZES.values())
                assert row["sparsity"] == (total - sum(left.values())) / total


def test_masks_are_nested_and_take_the_smallest_trained_weights(toy):
    for level in (1, 2):
        before, trained = map(paths, load(toy, 0, level - 1))
        after = paths(load(toy, 0, level)[0])
        for path in SIZES:
            assert not np.any(after[path] & ~before[path])
            lost = np.abs(trained[path][before[path] & ~after[path]])
            assert lost.max() <= np.abs(trained[path][after[path]]).min()


def load(folder, seed, level):
    """Masks of a level and the weights that were trained under them."""
    return runner.load(lottery_ticket.level_of(folder, seed, level))[::-1]


def paths(tree):
    """Arrays of two-level parameters or masks by path, without the holes."""
    flat = {f"{layer}/{name}": leaf for layer, part in tree.items() for name, leaf in part.items()}
    return {path: leaf for path, leaf in flat.items() if leaf is not None}


@pytest.fixture
def ticket(key):
    start = lottery_ticket.draw(Config(), key)
    return start, jp.find_masks(start, 0.6)


def control(name, ticket, key):
    start, masks = ticket
    seed = lottery_ticket.Seed(0, start, None, jax.random.fold_in(key, 1))
    return lottery_ticket.control(Config(), name, seed, jp.Level(1, masks, None, None))


def test_reinit_keeps_the_mask_and_draws_the_weights_again(ticket, key):
    params, masks = control("reinit", ticket, key)
    assert masks is ticket[1]
    for path, mask in paths(masks).items():
        fresh, old = paths(params)[path], paths(ticket[0])[path]
        assert not np.any(fresh[~mask])
        assert np.mean(fresh[mask] == old[mask]) < 0.01


def test_shuffle_keeps_the_weights_and_the_count_of_each_layer(ticket, key):
    params, masks = control("shuffle", ticket, key)
    for path, mask in paths(masks).items():
        original = paths(ticket[1])[path]
        assert mask.sum() == original.sum() and np.any(mask != original)
        np.testing.assert_array_equal(
            paths(params)[path], np.where(mask, paths(ticket[0])[path], 0)
        )


def test_random_keeps_the_weights_and_the_count_of_the_network(ticket, key):
    params, masks = control("random", ticket, key)
    assert jp.sparsity(masks, params) == jp.sparsity(ticket[1], params)
    for path, mask in paths(masks).items():
        assert abs(mask.mean() - 0.4) < 0.1
        np.testing.assert_array_equal(
            paths(params)[path], np.where(mask, paths(ticket[0])[path], 0)
        )


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, out=tmp_path)
    crash.assert_any_kill_is_survived(main, config, monkeypatch, files=8, at_least=40)


@pytest.mark.slow
def test_a_process_killed_three_times_goes_on_to_the_same_bytes(toy, tmp_path):
    kills = [{"write": n} for n in (5, 9, 16)]
    codes, _ = crash.run_processes(
        "lottery_ticket", [[*OPTIONS, "--out", str(tmp_path / "run")]], kills
    )
    assert codes == [[-signal.SIGKILL]] * 3 + [[0]]
    assert crash.contents(tmp_path / "run") == crash.contents(toy)


@pytest.mark.slow
def test_a_process_killed_at_random_goes_on_to_the_same_bytes(toy, tmp_path):
    delays = np.random.default_rng(0).uniform(0, 1.5, 40).tolist()
    arguments = [[*OPTIONS, "--out", str(tmp_path / "run")]]
    codes, _ = crash.run_processes("lottery_ticket", arguments, delays, timeout=1200)
    assert codes.count([-signal.SIGKILL]) >= 20 and codes[-1] == [0]
    assert crash.contents(tmp_path / "run") == crash.contents(toy)


OPTIONS = ["--levels", "2", "--steps", "20", "--seeds", "2", "--eval-every", "5"]


@pytest.mark.slow
def test_seeds_side_by_side_killed_at_any_file_operation_go_on_to_the_same_bytes(
    tmp_path, monkeypatch
):
    config = dataclasses.replace(SMALL, seeds=2, parallel_seeds="on", out=tmp_path)
    crash.assert_any_kill_is_survived(main, config, monkeypatch, files=11, at_least=60, every=8)


@pytest.mark.slow
def test_a_rewound_run_killed_at_any_file_operation_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch
):
    config = dataclasses.replace(TOY, rewind_step=10, out=tmp_path)
    crash.assert_any_kill_is_survived(main, config, monkeypatch, files=13, at_least=90)


def test_seeds_side_by_side_have_the_records_of_seeds_alone_from_one_program(
    toy, tmp_path, monkeypatch
):
    traced, side_by_side = [], train.side_by_side
    monkeypatch.setattr(
        train, "side_by_side", lambda *args: traced.append(1) or side_by_side(*args)
    )
    config = dataclasses.replace(TOY, parallel_seeds="on", out=tmp_path)
    main(config)  # two seeds on two devices of eight
    records, alone = runner.read_records(tmp_path), runner.read_records(toy)
    assert [(r["level"], r["seed"]) for r in records[:4]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert sorted(records, key=run_of) == sorted(alone, key=run_of)
    assert (tmp_path / "summary.json").read_bytes() == (toy / "summary.json").read_bytes()
    for seed in ("seed_0", "seed_1"):
        assert crash.contents(tmp_path / seed) == crash.contents(toy / seed)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:5]))
    main(config)  # neither levels nor conditions nor going on need another program
    assert runner.read_records(tmp_path) == records and len(traced) == 1


@pytest.mark.slow
def test_seeds_side_by_side_on_one_device_differ_by_rounding(toy, tmp_path, monkeypatch):
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    jax.clear_caches()
    main(dataclasses.replace(TOY, parallel_seeds="on", levels=1, controls=(), out=tmp_path))
    jax.clear_caches()
    for seed in range(2):
        for level in range(2):
            masks, trained = map(paths, load(tmp_path, seed, level))
            masks_alone, trained_alone = map(paths, load(toy, seed, level))
            for path, mask in masks.items():
                np.testing.assert_array_equal(mask, masks_alone[path])
            for path, weights in trained.items():
                np.testing.assert_allclose(weights, trained_alone[path], atol=1e-5)


def test_seeds_train_side_by_side_where_that_is_faster(monkeypatch):
    assert not lottery_ticket.together(TOY)
    assert lottery_ticket.together(dataclasses.replace(TOY, parallel_seeds="on"))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lottery_ticket.together(TOY)
    assert not lottery_ticket.together(dataclasses.replace(TOY, parallel_seeds="off"))


def test_levels_that_are_missing_are_computed_again(toy, tmp_path):
    crash.restore(crash.contents(toy), tmp_path)
    for seed, level in ((0, 1), (1, 2)):
        (tmp_path / f"seed_{seed}" / f"level_0{level}.safetensors").unlink()
    text = (toy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(text[:-1]))
    (tmp_path / "seed_0" / "level_00.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"level_00\.safetensors'.* damaged\. Or delete it: the"):
        load(tmp_path, 0, 0)
    (tmp_path / "seed_0" / "level_00.safetensors").unlink()
    main(dataclasses.replace(TOY, out=tmp_path))
    # Seed 0 has all of its records, so nobody asked for its levels.
    for seed, level in ((0, 0), (0, 1), (1, 2)):
        assert lottery_ticket.level_of(tmp_path, seed, level).exists() == (seed == 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (toy / "metrics.jsonl").read_bytes()
    assert crash.contents(tmp_path / "seed_1") == crash.contents(toy / "seed_1")


def test_a_finished_run_only_prints_and_draws_again(toy, capsys, monkeypatch):
    monkeypatch.setattr(data, "load", None)  # neither data nor training are needed
    (toy / "accuracy.png").unlink()
    summary = main(dataclasses.replace(TOY, out=toy))
    assert summary == runner.read_summary(toy)
    assert (toy / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "ticket - reinit" in capsys.readouterr().out


def test_another_config_is_refused(toy):
    with pytest.raises(ValueError, match=r"another config: rate \(0\.36 there, 0\.2 now\)\. Go on"):
        main(dataclasses.replace(TOY, rate=0.2, out=toy))


def test_tickets_can_be_rewound_to_a_later_step(toy, tmp_path):
    summary = main(dataclasses.replace(TOY, seeds=1, rewind_step=10, out=tmp_path))
    ticket = next(r for r in runner.read_records(tmp_path) if r["condition"] == "ticket")
    assert ticket["steps"] == [15, 20] and summary["early_step"] == 15
    short = main(dataclasses.replace(TOY, seeds=1, steps=10, levels=0, out=tmp_path / "short"))
    assert short["rows"][0]["condition"] == "dense"
    after_ten_steps = load(tmp_path / "short", 0, 0)[1]
    for path, rewound in paths(runner.load(lottery_ticket.start_of(tmp_path, 0))[0]).items():
        np.testing.assert_array_equal(rewound, paths(after_ten_steps)[path])


def test_weights_may_compete_across_the_layers(tmp_path):
    main(dataclasses.replace(TOY, seeds=1, scope="across", controls=(), out=tmp_path))
    masks, trained = load(tmp_path, 0, 2)
    removed = round((1 - 0.64**2) * 11_900)
    assert sum(int(mask.sum()) for mask in paths(masks).values()) == 11_900 - removed
    assert len({row.sparsity for row in jp.summary(trained, masks).rows}) == 3


def test_the_network_of_mnist_is_lenet_300_100(key):
    start = lottery_ticket.draw(Config(dataset="mnist"), key)
    assert [layer["kernel"].shape for layer in start.values()] == [
        (784, 300),
        (300, 100),
        (100, 10),
    ]


@pytest.mark.slow
def test_mnist_comes_from_the_data_path(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (140, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 140)
    np.savez(
        tmp_path / "mnist.npz",
        x_train=images[:120],
        y_train=labels[:120],
        x_test=images[120:],
        y_test=labels[120:],
    )
    path = tmp_path / "mnist.npz"
    config = Config(
        dataset="mnist", data_path=path, levels=1, steps=4, seeds=1, controls=(), out=tmp_path
    )
    rows = main(config)["rows"]
    assert 1 - rows[1]["sparsity"] == pytest.approx(0.800_38, abs=1e-5)
    assert runner.load(lottery_ticket.start_of(tmp_path, 0))[0]["hidden_0"]["kernel"].shape == (
        784,
        300,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "cifar"}, "`dataset='cifar'` is not known. Choose one of digits, mnist"),
        ({"levels": -1}, "`levels=-1` must be 0 or more"),
        ({"rate": 1.0}, "`rate=1.0` must lie between 0 and 1"),
        ({"rate": float("nan")}, "`rate=nan` must lie between 0 and 1"),
        ({"output_rate": 0.0}, "`output_rate=0.0` must lie between 0 and 1"),
        ({"steps": 0}, "`steps=0` must be positive"),
        ({"parallel_seeds": "maybe"}, "`parallel_seeds='maybe'` must be auto, on or off"),
        ({"seeds": 0}, "`seeds=0` must be positive, or a range such as 3:6"),
        ({"seeds": "6:3"}, "`seeds='6:3'` must be positive, or a range"),
        ({"batch_size": -5}, "`batch_size=-5` must be positive"),
        ({"learning_rate": 0.0}, "`learning_rate=0.0` must be positive"),
        (
            {"controls": ("reinit", "lucky")},
            r"may name reinit, shuffle, random, but not \['lucky'\]",
        ),
        ({"controls": ("reinit", "reinit")}, "names a control twice"),
        ({"scope": "globally"}, "`scope='globally'` must be per-leaf or across"),
        ({"rewind_step": 400}, "`rewind_step=400` must lie in 0 to 399"),
        ({"eval_every": 0}, "`eval_every=0` must be positive"),
        ({"eval_every": 30}, "`eval_every=30` must divide both steps=400 and rewind_step=0"),
        ({"data_path": Path("mnist.npz")}, "goes with dataset='mnist'"),
        ({"levels": -1, "seeds": 0}, "`levels=-1` must be 0 or more; `seeds=0` must be positive"),
    ],
)
def test_bad_settings_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        resolve(Config(**changes))


def test_settings_fit_together_by_default():
    assert resolve(Config(steps=25)).eval_every == 5
    assert resolve(Config(dataset="mnist", rewind_step=50)).eval_every == 50
    assert resolve(Config()).out == Path("results/lottery_ticket_digits")


@pytest.mark.slow
def test_tickets_beat_fresh_weights_on_the_digits(tmp_path):
    rows = main(Config(seeds=3, levels=6, controls=("reinit",), out=tmp_path))["rows"]
    assert figures.difference(rows, 4, "reinit")[0] >= 0.008  # 18 % of the weights left
    assert figures.difference(rows, 6, "reinit")[0] >= 0.02  # 8 %


MODEL = MLP((8,), 3)


@pytest.fixture
def problem(key):
    images = jax.random.normal(key, (30, 6))
    labels = (images[:, 0] > 0).astype(jnp.int32) + (images[:, 1] > 0)
    params = MODEL.init(key, images)["params"]
    masks = jp.find_masks(params, 0.5)
    ticket = jp.apply_masks(params, masks)
    return ticket, masks, Examples(images, labels), Examples(images[:9], labels[:9])


def outcome_of(problem, order, learning_rate=0.01):
    params, masks, examples, validation = problem
    start, static = (params, masks, order), {"model": MODEL, "learning_rate": learning_rate}
    (outcome,) = train.each_seed(
        lottery_ticket.train_ticket, [start], examples, validation, together=False, **static
    )
    return outcome


@pytest.mark.parametrize(("evaluations", "index"), [(1, 0), (2, 0), (6, 0), (30, 4), (40, 6)])
def test_early_is_one_sixth_of_the_run(evaluations, index):
    assert lottery_ticket.early_evaluation(evaluations) == index


def test_the_scan_does_what_a_plain_loop_does(key, problem):
    params, masks, data, validation = problem
    order = train.batch_order(key, examples=30, steps=12, batch_size=5).reshape(4, 3, 5)
    outcome = outcome_of(problem, order)

    @jax.jit
    def loss(params, images, labels):
        logits = MODEL.apply({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tx = optax.adam(0.01)
    state, losses = tx.init(params), []
    for batches in order:
        for batch in batches:
            grads = jax.grad(loss)(params, data.inputs[batch], data.targets[batch])
            updates, state = tx.update(grads, state, params)
            params = jp.apply_masks(optax.apply_updates(params, updates), masks)
        losses.append(loss(params, *validation))
    np.testing.assert_allclose(outcome.losses, losses, rtol=1e-4)
    for found, wanted in zip(jax.tree.leaves(outcome.final), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_pruned_weights_are_zero_and_biases_are_free(key, problem):
    order = train.batch_order(key, examples=30, steps=4, batch_size=5).reshape(2, 2, 5)
    final = outcome_of(problem, order).final
    for layer, mask in problem[1].items():
        assert not np.any(final[layer]["kernel"][~mask["kernel"]])
        assert np.any(final[layer]["bias"])


def test_best_and_early_are_the_parameters_of_their_moment(key, problem):
    order = train.batch_order(key, examples=30, steps=60, batch_size=5).reshape(12, 5, 5)
    outcome = outcome_of(problem, order, learning_rate=1.0)  # so large that the loss goes up again
    best = int(outcome.losses.argmin())
    assert 0 < best < 11
    for params, moment in [(outcome.best, best), (outcome.early, 1), (outcome.final, 11)]:
        until_then = outcome_of(problem, order[: moment + 1], learning_rate=1.0).final
        for found, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(until_then), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_training_compiles_once_and_leaves_the_start_alone(key, problem):
    start = jax.tree.map(np.asarray, problem[0])
    order = train.batch_order(key, examples=30, steps=6, batch_size=5).reshape(2, 3, 5)
    before = train._alone._cache_size()
    for sparsity in (0.0, 0.3, 0.8):
        masks = jp.find_masks(problem[0], sparsity)
        outcome_of((problem[0], masks, *problem[2:]), order)
    assert train._alone._cache_size() == before + 1
    for found, wanted in zip(jax.tree.leaves(problem[0]), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_accuracy_counts_hits():
    images = jnp.eye(3)
    params = {
        "hidden_0": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)},
        "out": {"kernel": jnp.eye(3), "bias": jnp.zeros(3)},
    }
    examples = Examples(images, jnp.array([0, 1, 0]))
    assert train.accuracy(params, test=examples, model=MLP((3,), 3)) == 2 / 3


def test_the_notebook_and_its_script_are_one_and_hold_no_outputs():
    notebooks.assert_is_its_script("lottery_ticket")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["notebooks", "."])
def test_the_notebook_runs_on_toy_results(toy, monkeypatch, folder):
    monkeypatch.setenv("JAXPRUNE_RESULTS", str(toy))
    assert notebooks.figures_in("lottery_ticket", folder) == 5
