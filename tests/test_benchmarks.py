"""The benchmarks run at toy size and write what they promise."""

import json

import pytest

pytest.importorskip("tyro")
pytest.importorskip("rich")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("safetensors")

from benchmarks import (
    checkpoint,
    compact,
    compile,
    events,
    fpga,
    import_time,
    parallel_seeds,
    post_training,
    restart,
    scale,
    selection,
    step_overhead,
    structure,
    training_speed,
    zeros,
)
from benchmarks.common import interleave, paired_ratio


def test_interleave_takes_turns_and_lets_the_slow_sit_out():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleave(tasks, {"a": 3, "b": 1})
    assert calls == ["a", "b", "a", "a"]
    assert {name: len(turns) for name, turns in seconds.items()} == {"a": 3, "b": 1}


def test_paired_ratio_divides_turn_by_turn():
    ratio = paired_ratio([2.0, 20.0, 4.0], [1.0, 10.0, 2.0], seed=0)
    assert ratio == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_selection_agrees_with_its_peers_and_writes_ratios(tmp_path):
    out = tmp_path / "selection.json"
    distributions = ("normal", "constant")
    selection.main(selection.Config(sizes=(1000,), distributions=distributions, repeats=2, out=out))
    result = json.loads(out.read_text())
    assert [case["distribution"] for case in result["cases"]] == list(distributions)
    assert all(case["time_over_ours"]["per_leaf"] == 1.0 for case in result["cases"])


def test_selection_refuses_contestants_that_disagree():
    scores = selection.np.arange(4.0)
    results = {
        "np.partition, threshold": selection.np.float64(2.0),
        "per_leaf": scores >= 2,
        "sort": scores >= 1,
    }
    with pytest.raises(RuntimeError, match="`sort` does not agree"):
        selection.check(scores, results, 0.5)


def test_step_overhead_compares_wrapped_with_bare(tmp_path):
    out = tmp_path / "step_overhead.json"
    config = step_overhead.Config(
        workloads=("toy",),
        contestants=("prune", "rigl", "event"),
        blocks=2,
        block_seconds=0.001,
        out=out,
    )
    step_overhead.main(config)
    (case,) = json.loads(out.read_text())["cases"]
    assert set(case["ratios"]) == {"prune / bare", "rigl / bare", "event / bare", "event / prune"}


@pytest.mark.slow
def test_import_time_compares_fresh_processes(tmp_path):
    out = tmp_path / "import_time.json"
    import_time.main(import_time.Config(turns=1, out=out))
    over = json.loads(out.read_text())["over_jax_and_optax"]
    assert set(over) == set(import_time.IMPORTS) - {import_time.BARE}


@pytest.mark.slow
def test_events_compares_every_wrapper_with_a_magnitude_event(tmp_path):
    out = tmp_path / "events.json"
    events.main(events.Config(weights=64, layers=1, turns=2, out=out))
    ratios = json.loads(out.read_text())["ratios"]
    assert {"prune", "rigl", "set", "straight_through"} < set(ratios)
    assert ratios["prune"]["event"]["median"] == 1.0


def test_training_speed_compares_or_says_that_torch_is_missing(tmp_path, capsys):
    out = tmp_path / "training_speed.json"
    config = training_speed.Config(iterations=3, blocks=2, examples=100, batch_size=4, out=out)
    result = training_speed.main(config)
    if result is None:
        assert "Skipped: there is no PyTorch" in capsys.readouterr().out
    else:
        assert set(result["time_over_ours"]) == set(json.loads(out.read_text())["time_over_ours"])


@pytest.mark.slow
def test_parallel_seeds_compares_seeds_side_by_side_with_seeds_alone(tmp_path):
    out = tmp_path / "parallel_seeds.json"
    config = parallel_seeds.Config(
        networks=("digits",), seeds=(1, 3), steps=16, turns=2, examples=100, batch_size=8, out=out
    )
    parallel_seeds.main(config)
    cases = json.loads(out.read_text())["cases"]
    assert [case["method"] for case in cases] == ["dense", "gradual"]
    for case in cases:
        assert set(case["over_alone"]) == {"1", "3"}
        assert case["milliseconds_per_step_and_seed"].keys() == {"alone", "1", "3"}


@pytest.mark.slow
def test_restart_kills_an_experiment_and_waits_for_a_new_record(tmp_path):
    out = tmp_path / "restart.json"
    config = restart.Config(("compare_methods",), sizes=("toy",), turns=1, out=out)
    restart.main(config)
    (case,) = json.loads(out.read_text())["cases"]
    assert list(case["seconds"]) == ["first start", "kept", "without"]
    assert case["seconds"]["kept"]["cpu"] < case["seconds"]["first start"]["cpu"]


@pytest.mark.slow
def test_structure_times_the_analysis_and_counts_what_is_left(tmp_path):
    out = tmp_path / "structure.json"
    config = structure.Config(blocks=(1, 1), layers=1, turns=1, batch=2, size=16, out=out)
    structure.main(config)
    result = json.loads(out.read_text())
    assert {"resnet", "decoder"} <= result["analysis"]["seconds"].keys()
    assert 0 < result["latency"]["flops"] < 0.6


def test_checkpoint_compares_sizes_and_times_of_models_on_disk(tmp_path):
    out = tmp_path / "checkpoint.json"
    checkpoint.main(
        checkpoint.Config(sparsities=(0.9,), weights=40_000, layers=1, turns=2, out=out)
    )
    (case,) = json.loads(out.read_text())["cases"]
    assert case["size_over_ours"]["safetensors, dense"] > 6
    assert 1 <= case["bytes over kept * 4 + n / 8"] < 1.1
    assert set(case["load_over_ours"]) == set(case["save_over_ours"]) == set(case["size_over_ours"])


@pytest.mark.slow
def test_scale_ranks_trees_of_many_sizes_alone_and_cut(tmp_path):
    out = tmp_path / "scale.json"
    config = scale.Config(
        weights=(4096,),
        leaves=2,
        splits=(1,),
        split_weights=4096,
        sharded_weights=2**18,
        repeats=1,
        out=out,
    )
    scale.main(config)
    result = json.loads(out.read_text())
    assert [(row["weights"], row["leaves"]) for row in result["trees"]] == [(4096, 2), (4096, 1)]
    assert set(result["sharded"]["over_one_device"]) == {"rows", "columns"}


@pytest.mark.slow
def test_compile_compares_with_its_peers_and_with_another_checkout(tmp_path):
    out = tmp_path / "compile.json"
    config = compile.Config(("one",), against=compile.HERE, turns=1, kernels=6, size=8, out=out)
    compile.main(config)
    (case,) = json.loads(out.read_text())["cases"]
    assert case["over_peer"].keys() == case["over_other"].keys()
    assert 0.2 < case["over_other"]["find_masks"] < 5  # one and the same checkout


def test_compile_has_72_kernels_of_one_shape_and_144_of_twelve():
    counts = [list(compile.shapes(tree, 72, 256).values()) for tree in ("one", "twelve")]
    assert [(len(shapes), len(set(shapes))) for shapes in counts] == [(72, 1), (144, 12)]
    assert max(counts[1]) == (256, 192)


def test_compile_refuses_a_checkout_without_the_library(tmp_path):
    with pytest.raises(ValueError, match=r"no jaxprune in .*Clone"):
        compile.main(compile.Config(against=tmp_path))


@pytest.mark.slow
def test_post_training_prunes_a_small_llama_and_names_a_peer_that_is_missing(tmp_path, capsys):
    out = tmp_path / "post_training.json"
    config = post_training.Config(methods=("wanda",), calibration=4, windows=2, steps=2, out=out)
    result = post_training.main(config)
    assert json.loads(out.read_text())["cases"][0]["zeros"] == 0.5
    if not result["ours_over_peer"]:
        assert "Skipped llm-compressor" in capsys.readouterr().out


@pytest.mark.slow
def test_compact_compares_products_a_network_and_its_training_with_the_dense_ones(tmp_path):
    out = tmp_path / "compact.json"
    config = compact.Config(
        **{"sizes": (256,), "sparsities": (0.75,), "blocks": ("64x64", "16x16"), "rows": (1, 8)},
        **{"width": 256, "layers": 2, "batch": (2, 8), "network_blocks": (64,)},
        turns=2,
        out=out,
    )
    compact.main(config)
    result = json.loads(out.read_text())
    assert len(result["products"]) == 2 * 2 * 2  # blocks, rows, ways
    assert {case["way"] for case in result["networks"]} == {"forward", "training step"}
    quarter, with_more_indices = (case["bytes_over_dense"] for case in result["products"][:2])
    assert quarter == (4 * 128 * 128 + 4 * 4) / (4 * 256 * 256)
    assert with_more_indices == (4 * 128 * 128 + 4 * 64) / (4 * 256 * 256)


@pytest.mark.slow
def test_fpga_prices_what_was_trained_and_its_logic_is_the_network_bit_by_bit(tmp_path):
    pytest.importorskip("da4ml")
    out = tmp_path / "fpga.json"
    settings = {"bits": (4,), "base_bits": (4,), "single": (0.75,), "windows": (2,), "whole": ()}
    fpga.main(fpga.Config(widths=(8,), steps=(20, 40), seeds=1, out=out, **settings))
    dense, single, windows = json.loads(out.read_text())["cases"]
    assert dense["equal"] == single["equal"] == windows["equal"] == 1
    assert single["adders"] < windows["adders"] < dense["adders"]


def test_fpga_names_a_peer_that_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fpga.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "fpga.json"
    assert fpga.main(fpga.Config(out=out))["cases"] == []
    assert "Skipped da4ml" in capsys.readouterr().out and out.exists()


def test_zeros_runs_what_is_installed_and_names_what_is_not(tmp_path, capsys, monkeypatch):
    out = tmp_path / "zeros.json"
    gone = zeros.Mode("nobody's", "no_such_module", "no-such-package", "int8", lambda w: w)
    broken = zeros.Mode("pytest", "pytest", "pytest", "half", lambda w: w[:1])
    halves = zeros.Mode("pytest", "pytest", "pytest", "shifted", lambda w: w + 0.5)
    monkeypatch.setattr(zeros, "MODES", (gone, broken, halves, *zeros.MODES))
    config = zeros.Config(tools=("gguf", "qwix", "pytest", "nobody's"), shape=(8, 256), out=out)
    zeros.main(config)
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "Skipped nobody's: `no-such-package` is not installed." in text
    assert "Skipped pytest, half: RuntimeError: gives back (1, 256) for (8, 256)." in text
    found = {(case["tool"], case["mode"]): case["results"] for case in result["cases"]}
    for half, tenth in (found["pytest", "shifted"],):
        assert half["zeros_kept"] == tenth["zeros_kept"] == 0 and half["largest_residue"] == 0.5
        assert half["error"] > half["error_masked_again"] > 0
    if ("gguf", "Q8_0") in found:
        assert [row["zeros_kept"] for row in found["gguf", "Q8_0"]] == [1, 1]
        assert found["gguf", "Q4_1"][0]["zeros_kept"] < 0.1
    if ("qwix", "int4") in found:
        assert found["qwix", "int4"][0]["zeros_kept"] == 1
        assert 0 < found["qwix", "int4"][0]["kept_became_zero"] < 0.3


def test_zeros_refuses_a_tool_that_it_does_not_know(tmp_path):
    with pytest.raises(ValueError, match=r"\['ggml'\], which are unknown. There are .*'gguf'"):
        zeros.main(zeros.Config(tools=("ggml",), out=tmp_path / "zeros.json"))


def test_tflite_compares_sparse_weights_of_all_kinds_with_dense_ones(tmp_path):
    pytest.importorskip("ai_edge_litert.interpreter")
    from benchmarks import tflite

    out = tmp_path / "tflite.json"
    config = {"sizes": ("64x128",), "sparsities": (0.9,), "rows": (1, 2), "turns": 2}
    tflite.main(tflite.Config(**config, out=out))
    cases = json.loads(out.read_text())["cases"]
    assert [case["rows"] for case in cases] == [1, 1, 1, 2, 2, 2]
    assert all(case["bytes_over_dense"] < 0.2 and case["parity"] < 1e-6 for case in cases)
