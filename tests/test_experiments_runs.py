"""Tests of experiments/common/runs.py."""

import json

import numpy as np
import pytest

from experiments.common import runs


def test_a_run_remembers_its_config_and_its_records(tmp_path):
    folder = tmp_path / "deep" / "run"
    assert runs.open_run(folder, {"steps": 3, "controls": ("reinit",)}) == []
    runs.append_record(folder, {"level": 0, "accuracy": 0.1})
    runs.append_record(folder, {"level": 1, "accuracy": 1 / 3})
    records = runs.open_run(folder, {"steps": 3, "controls": ("reinit",)})
    assert records == [{"level": 0, "accuracy": 0.1}, {"level": 1, "accuracy": 1 / 3}]
    assert runs.read_config(folder) == {"steps": 3, "controls": ["reinit"]}


def test_another_config_is_refused_by_its_fields(tmp_path):
    runs.open_run(tmp_path, {"steps": 3, "rate": 0.2, "seeds": 1})
    with pytest.raises(
        ValueError, match=r"steps \(3 there, 4 now\), seeds \(1 there, 2 now\)\. Go on"
    ):
        runs.open_run(tmp_path, {"steps": 4, "rate": 0.2, "seeds": 2})


def test_records_without_a_config_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"level": 0}\n')
    with pytest.raises(ValueError, match=r"no config\.json.*Choose another `out`"):
        runs.open_run(tmp_path, {})


@pytest.mark.parametrize("torn", ['{"level": 1, "accu', '{"level": 1}', "{", '{"level": 1, "a\n'])
def test_a_torn_last_line_is_dropped_and_the_next_one_starts_afresh(tmp_path, torn):
    runs.open_run(tmp_path, {})
    runs.append_record(tmp_path, {"level": 0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(torn)
    assert runs.open_run(tmp_path, {}) == [{"level": 0}]
    runs.append_record(tmp_path, {"level": 2})
    assert runs.read_records(tmp_path) == [{"level": 0}, {"level": 2}]


def test_a_torn_line_in_the_middle_is_an_error(tmp_path):
    runs.open_run(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_text('{"level": 0}\n{"lev\n{"level": 2}\n')
    with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl.*Delete that line"):
        runs.read_records(tmp_path)


def test_reading_records_changes_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"level": 0}\n{"lev')
    runs.read_records(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"level": 0}\n{"lev'


def test_a_line_that_is_no_text_is_torn(tmp_path):
    runs.open_run(tmp_path, {})
    (tmp_path / "metrics.jsonl").write_bytes(b'{"level": 0}\n\xff\x00\x00\n')
    assert runs.open_run(tmp_path, {}) == [{"level": 0}]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"level": 0}\n'


@pytest.mark.parametrize("read", [runs.read_config, lambda folder: runs.open_run(folder, {})])
def test_a_damaged_config_is_named(tmp_path, read):
    (tmp_path / "config.json").write_text('{"steps": 3, "ra')
    with pytest.raises(ValueError, match=r"config\.json' is damaged: .*Put back what was there"):
        read(tmp_path)


@pytest.mark.parametrize("size", [0, 20, 300])
def test_damaged_arrays_are_named(tmp_path, size):
    runs.save_start(tmp_path, 1, {"out": {"kernel": np.random.rand(10, 10)}})
    path = tmp_path / "seed_1" / "start.npz"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"start\.npz' is damaged: .*Delete it, and the same"):
        runs.load_start(tmp_path, 1)


def test_arrays_are_the_same_bytes_whenever_they_are_saved(tmp_path, monkeypatch):
    files = []
    for year in (2001, 2026):
        monkeypatch.setattr("time.time", lambda year=year: (year - 1970) * 3.15e7)
        runs.save_start(tmp_path, 0, {"out": {"kernel": np.eye(3)}})
        files.append((tmp_path / "seed_0" / "start.npz").read_bytes())
    assert files[0] == files[1]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    runs.write(tmp_path / "summary.json", "old")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        runs.write(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


def test_a_level_comes_back_as_it_was_saved(tmp_path):
    masks = {"out": {"kernel": np.arange(15).reshape(5, 3) % 2 == 0, "bias": None}}
    trained = {"out": {"kernel": np.random.rand(5, 3).astype(np.float32), "bias": np.ones(3)}}
    runs.save_level(tmp_path, 0, 3, masks, trained)
    masks_back, trained_back = runs.load_level(tmp_path, 0, 3)
    assert masks_back["out"]["bias"] is None and masks_back["out"]["kernel"].dtype == bool
    np.testing.assert_array_equal(masks_back["out"]["kernel"], masks["out"]["kernel"])
    np.testing.assert_array_equal(trained_back["out"]["kernel"], trained["out"]["kernel"])
    np.testing.assert_array_equal(trained_back["out"]["bias"], trained["out"]["bias"])


def test_the_start_comes_back_as_it_was_saved(tmp_path):
    runs.save_start(tmp_path, 1, {"out": {"kernel": np.eye(3)}})
    np.testing.assert_array_equal(runs.load_start(tmp_path, 1)["out"]["kernel"], np.eye(3))


@pytest.mark.parametrize("read", [runs.read_config, runs.read_summary])
def test_a_folder_that_is_no_run_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"There is no \w+\.json in .*run the experiment"):
        read(tmp_path)


def test_metrics_are_one_json_object_a_line(tmp_path):
    runs.open_run(tmp_path, {})
    runs.append_record(tmp_path, {"level": 0, "seed": 1})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"level": 0, "seed": 1}
