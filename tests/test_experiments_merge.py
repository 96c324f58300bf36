"""Tests of experiments/merge.py and of experiments/_template.py, which is merged here."""

import dataclasses
from pathlib import Path

import pytest

from experiments import _template, lottery_ticket
from experiments.common import runner, show
from experiments.merge import merge
from tests import crash

TOY = _template.Config(sparsities=(0.5, 0.9), seeds=3, steps=5)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Not rendered: that takes longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "png", lambda figure: b"png")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one run of the template leaves, to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    _template.main(dataclasses.replace(TOY, out=folder))
    return folder


def part(whole, folder, seeds):
    """A run of some seeds, made from the records of all."""
    folder.mkdir()
    config = dataclasses.replace(TOY, seeds=seeds, out=folder)
    found = [r for r in runner.read_records(whole) if r["seed"] in seeds_of(seeds)]
    with runner.open_run(folder, _template.settings.recorded(config), _template.FIELDS) as run:
        for record in found:
            run.add(record)
    return folder


def seeds_of(seeds):
    return _template.settings.seed_range(seeds)


def test_the_template_leaves_its_files_and_goes_on(whole, tmp_path):
    left = crash.contents(whole)
    assert list(left) == ["accuracy.png", "config.json", "metrics.jsonl", "summary.json"]
    records = runner.read_records(whole)
    assert [r["seed"] for r in records] == 4 * [0, 1, 2] and records[0]["criterion"] == "magnitude"
    lines = left["metrics.jsonl"].splitlines(keepends=True)
    crash.restore({**left, "metrics.jsonl": b"".join(lines[:5]) + b"{to"}, tmp_path)
    _template.main(dataclasses.replace(TOY, out=tmp_path))
    assert crash.contents(tmp_path) == left


def test_runs_of_some_seeds_are_merged_to_the_bytes_of_one_run(whole, tmp_path):
    one, two = part(whole, tmp_path / "one", "1:3"), part(whole, tmp_path / "two", 1)
    for _ in range(2):  # or merged again
        merge("_template", tmp_path / "out", (one, two))
        assert crash.contents(tmp_path / "out") == crash.contents(whole)


def test_what_is_missing_of_a_part_is_made(whole, tmp_path):
    one, two = part(whole, tmp_path / "one", "0:2"), part(whole, tmp_path / "two", "2:3")
    lines = (two / "metrics.jsonl").read_text().splitlines(keepends=True)
    (two / "metrics.jsonl").write_text("".join(lines[:-1]))
    merge("_template", tmp_path / "out", (one, two))
    assert crash.contents(tmp_path / "out") == crash.contents(whole)


def test_runs_of_other_settings_are_not_merged(whole, tmp_path):
    one, two = part(whole, tmp_path / "one", "0:2"), part(whole, tmp_path / "two", "2:3")
    config = (two / "config.json").read_text()
    (two / "config.json").write_text(config.replace('"steps": 5', '"steps": 6'))
    with pytest.raises(ValueError, match=r"other settings \(steps: \[5, 6\]\)\. Run them all"):
        merge("_template", tmp_path / "out", (one, two))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [("0:2", "1:3"), ("0:1", "2:3"), ("0:2", "0:2")])
def test_seeds_have_to_follow_on_one_another(whole, tmp_path, seeds):
    parts = tuple(part(whole, tmp_path / str(n), seeds[n]) for n in range(2))
    with pytest.raises(ValueError, match=r"`seeds` of the runs are .*, and do not follow on one"):
        merge("_template", tmp_path / "out", parts)


@pytest.mark.slow
def test_tickets_of_two_processes_are_merged_with_their_masks(tmp_path):
    toy = lottery_ticket.Config(levels=1, steps=10, eval_every=5, controls=("reinit",))
    for name, seeds in (("one", "0:1"), ("two", "1:3"), ("whole", 3)):
        lottery_ticket.main(dataclasses.replace(toy, seeds=seeds, out=tmp_path / name))
    merge("lottery_ticket", tmp_path / "out", (tmp_path / "one", tmp_path / "two"))
    assert crash.contents(tmp_path / "out") == crash.contents(tmp_path / "whole")
    assert Path("seed_2/level_01.safetensors") in {
        path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("level_*")
    }
