"""Tests of runner.py, files.py and settings.py of the experiments, on one without science."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pooch
import pytest

from experiments import compare_methods, edge_deployment, lottery_ticket, structured
from experiments.common import files, runner, settings
from tests import crash

resource = pytest.importorskip("resource", reason="needs the limits of a Unix system")
pytest.importorskip("fcntl", reason="needs the locks of a Unix system")

ROOT = Path(files.__file__).parents[2]
EXPERIMENTS = [compare_methods, edge_deployment, lottery_ticket, structured]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the experiment without science."""

    seeds: int = 2
    size: int = 6
    out: Path = Path("nowhere")


def main(config):
    """Add numbers, whose sums lie in files: who goes on reads them as a ticket reads its masks."""
    planned = [(seed, level) for seed in range(config.seeds) for level in range(3)]

    def file(seed, level):
        return config.out / f"seed_{seed}" / f"level_{level}.safetensors"

    def make(missing):
        for seed, level in missing:
            start = {"w": np.full(config.size, seed, np.float32)}
            before = runner.load(file(seed, level - 1))[0] if level else start
            found = {"w": np.asarray(before["w"]) + np.arange(config.size, dtype=np.float32)}
            mask = {"w": np.arange(config.size) % 3 > 0}
            runner.save(file(seed, level), found, mask)
            yield {"seed": seed, "level": level, "total": float(found["w"][mask["w"]].sum())}

    with runner.open_run(config.out, settings.recorded(config), ("seed", "level")) as run:
        records = run.fill(planned, make, is_saved=lambda key: file(*key).exists())
        summary = {"total": sum(record["total"] for record in records)}
        files.write(config.out / "summary.json", json.dumps(summary) + "\n")
        return summary


@pytest.fixture
def whole(tmp_path):
    """What a run leaves that nobody disturbs."""
    main(Config(out=tmp_path / "whole"))
    return crash.contents(tmp_path / "whole")


def test_a_run_leaves_its_files(whole):
    levels = [f"seed_{seed}/level_{level}.safetensors" for seed in range(2) for level in range(3)]
    assert list(whole) == sorted(["config.json", "metrics.jsonl", "summary.json", *levels])
    assert json.loads(whole["config.json"]) == {"seeds": 2, "size": 6}
    records = [json.loads(line) for line in whole["metrics.jsonl"].splitlines()]
    # 1, 2, 4 and 5 stay.
    assert records[0] == {"seed": 0, "level": 0, "total": 12.0}
    assert records[-1] == {"seed": 1, "level": 2, "total": 4 + 36.0}


def test_a_run_killed_at_any_file_operation_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    config = Config(out=tmp_path / "run")
    crash.assert_any_kill_is_survived(main, config, monkeypatch, files=9, at_least=60)


def test_whatever_write_fails_the_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, whole):
    config, fsync, failures = Config(out=tmp_path / "run"), os.fsync, 0

    def fail_at(number):
        left = [number]

        def wrapper(handle):
            left[0] -= stat.S_ISREG(os.fstat(handle).st_mode)
            if left[0] == 0:
                left[0] = -1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(handle)

        return wrapper

    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail_at(number))
            try:
                main(config)
                break
            except OSError as error:
                assert "cannot be written: Input/output error" in str(error)
                failures += 1
    assert failures >= 4
    assert crash.contents(config.out) == whole


def test_a_finished_run_makes_nothing_again(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(runner, "save", None)
    main(Config(out=tmp_path / "whole"))
    assert crash.contents(tmp_path / "whole") == whole


def test_what_was_deleted_is_made_again(tmp_path, whole):
    folder = tmp_path / "whole"
    lines = whole["metrics.jsonl"].splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:1] + lines[2:]))
    (folder / "seed_1" / "level_1.safetensors").unlink()
    (folder / "summary.json").unlink()
    main(Config(out=folder))  # records are in the order of the plan, whatever order they came in
    assert crash.contents(folder) == whole


def test_a_damaged_file_is_named(tmp_path, whole):
    folder, name = tmp_path / "whole", "seed_0/level_1.safetensors"
    (folder / "seed_0" / "level_2.safetensors").unlink()
    for content in (b"", b"damaged", whole[name][:100], whole[name][:-1]):
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=r"level_1\.safetensors.*Or delete it: the same comm"):
            main(Config(out=folder))


NO_SPACE = (
    r"run/.*' cannot be written: No space left on device; [\d,]+ bytes are to be written, and "
    r"[\d,]+ are free there\. Nothing that was finished is lost: put that right, and the same "
    r"command goes on where it stopped\."
)


@pytest.mark.parametrize("size", ["24k", "60k", "100k"])
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(size, tmp_path):
    config = Config(size=5000, out=tmp_path / "disk" / "run")
    with crash.mounted(tmp_path / "disk", f"size={size}"):
        for _ in range(2):  # the second try changes nothing
            with pytest.raises(OSError, match=NO_SPACE) as caught:
                main(config)
            assert caught.value.errno == errno.ENOSPC
            left = crash.contents(config.out)
            assert not [name for name in left if "draft" in name or "lock" in name]
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path / "disk")], check=True)
        main(config)
        main(Config(size=5000, out=tmp_path / "whole"))
        assert crash.contents(config.out) == crash.contents(tmp_path / "whole")


def test_another_config_is_refused_by_its_fields(tmp_path, whole):
    with pytest.raises(
        ValueError, match=r"another config: seeds \(2 there, 1 now\), size \(6 there, 4 now\)\. Go"
    ):
        main(Config(seeds=1, size=4, out=tmp_path / "whole"))
    assert crash.contents(tmp_path / "whole") == whole


def test_records_without_a_config_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"level": 0}\n')
    with pytest.raises(ValueError, match=r"no config\.json.*Choose another `out`"):
        main(Config(out=tmp_path))


@pytest.mark.parametrize(
    "torn", [b'{"level": 1, "accu', b'{"level": 1}', b"{", b'{"level": 1, "a\n', b"\xff\x00\x00\n"]
)
def test_a_torn_last_line_is_dropped(tmp_path, whole, torn):
    folder = tmp_path / "whole"
    lines = whole["metrics.jsonl"].splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + torn)
    assert len(runner.read_records(folder)) == 5
    assert (folder / "metrics.jsonl").read_bytes().endswith(torn)  # reading changes nothing
    main(Config(out=folder))
    assert crash.contents(folder) == whole


def test_a_torn_line_in_the_middle_is_an_error(tmp_path, whole):
    folder = tmp_path / "whole"
    (folder / "metrics.jsonl").write_text('{"level": 0}\n{"lev\n{"level": 2}\n')
    for read in (runner.read_records, lambda folder: main(Config(out=folder))):
        with pytest.raises(ValueError, match=r"Line 2 of .*metrics\.jsonl.*Delete that line"):
            read(folder)


@pytest.mark.parametrize("read", [runner.read_config, lambda folder: main(Config(out=folder))])
def test_a_damaged_config_is_named(tmp_path, read):
    (tmp_path / "config.json").write_text('{"steps": 3, "ra')
    with pytest.raises(ValueError, match=r"config\.json' is damaged: .*Put back what was there"):
        read(tmp_path)


@pytest.mark.parametrize("read", [runner.read_config, runner.read_summary])
def test_a_folder_that_is_no_run_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"There is no \w+\.json in .*run the experiment"):
        read(tmp_path)


def test_arrays_are_the_same_bytes_whenever_they_are_saved(tmp_path, monkeypatch):
    found = []
    for year in (2001, 2026):
        monkeypatch.setattr("time.time", lambda year=year: (year - 1970) * 3.15e7)
        runner.save(tmp_path / "a.safetensors", {"out": {"kernel": np.eye(3)}})
        found.append((tmp_path / "a.safetensors").read_bytes())
    assert found[0] == found[1]


def test_a_second_run_is_told_who_is_there_and_changes_nothing(tmp_path):
    with files.locked(tmp_path / "run"):
        before = crash.contents(tmp_path)
        holder = re.escape(f"process {os.getpid()} on {socket.gethostname()!r}")
        with pytest.raises(
            RuntimeError, match=f"run'` is in use by {holder}. Wait until that run ends, stop"
        ):
            main(Config(out=tmp_path / "run"))
        assert crash.contents(tmp_path) == before
    assert crash.contents(tmp_path) == {}
    main(Config(out=tmp_path / "run"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_experiment_starts_in_a_folder_in_use(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(edge_deployment, "load", lambda settings: None)
    with files.locked(tmp_path):
        before = crash.contents(tmp_path)
        with pytest.raises(RuntimeError, match="is in use by process"):
            experiment.main(experiment.Config(out=tmp_path))
        assert crash.contents(tmp_path) == before


def test_the_lock_of_a_killed_process_is_open(tmp_path):
    script = (
        "import sys, pathlib; from experiments.common import files\n"
        "with files.locked(pathlib.Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(RuntimeError, match=f"by process {process.pid} on"):
            files.locked(tmp_path).__enter__()
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / ".lock").exists()
    with files.locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_lock_that_its_holder_has_just_removed_is_taken_again(tmp_path, monkeypatch):
    flock, path = files.fcntl.flock, tmp_path / ".lock"

    def slowly(handle, operation):
        monkeypatch.setattr(files.fcntl, "flock", flock)
        path.unlink()  # by who held it when we opened it
        flock(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", slowly)
    with files.locked(tmp_path), pytest.raises(RuntimeError, match="is in use by process"):
        files.locked(tmp_path).__enter__()


def test_who_has_not_left_a_note_yet_is_another_process(tmp_path):
    with files.locked(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(RuntimeError, match="is in use by another process"):
            files.locked(tmp_path).__enter__()


@pytest.mark.parametrize("place, words", [(".", "File exists"), ("run", "Not a directory")])
def test_nothing_starts_where_it_cannot_write(place, words, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / place
    message = rf"{out}'` cannot be written to: {words}; [\d,]+ bytes are free there. Nothing was"
    with pytest.raises(OSError, match=message):
        main(Config(out=out))
    assert crash.contents(tmp_path) == {"file": b"in the way"}


def test_a_read_only_disk_is_named_at_the_door(tmp_path):
    with (
        crash.mounted(tmp_path / "disk", "size=1m,ro"),
        pytest.raises(OSError, match="cannot be written to: Read-only file system") as caught,
    ):
        main(Config(out=tmp_path / "disk" / "run"))
    assert caught.value.errno == errno.EROFS


@contextlib.contextmanager
def files_of_at_most(size):
    """Let no file grow beyond a size, as a full disk would, without root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_finds_no_room_leaves_what_was_there(tmp_path):
    path = tmp_path / "summary.json"
    files.write(path, "old")
    with (
        files_of_at_most(100),
        pytest.raises(OSError, match=r"summary\.json' cannot be written: File too large; 5,000 b"),
    ):
        files.write(path, "x" * 5000)
    assert crash.contents(tmp_path) == {"summary.json": b"old"}


def test_a_line_that_finds_no_room_leaves_the_lines_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    files.append(path, '{"level": 0}\n')
    with (
        files_of_at_most(100),
        pytest.raises(OSError, match=r"metrics\.jsonl' cannot be written: File too large"),
    ):
        files.append(path, "x" * 5000)
    assert path.read_text() == '{"level": 0}\n'
    files.append(path, '{"level": 1}\n')
    assert path.read_text() == '{"level": 0}\n{"level": 1}\n'


def test_a_write_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    files.write(tmp_path / "summary.json", "old")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"


@pytest.mark.parametrize(
    ("seeds", "found"),
    [
        (8, range(8)),
        ("8", range(8)),
        ("3:6", range(3, 6)),
        ("0:2", range(2)),
        *[(bad, range(0)) for bad in (0, -1, "3:3", "6:3", "3:", "a:b", "1:2:3", "", "-1:2")],
    ],
)
def test_seeds_are_a_number_or_a_range(seeds, found):
    assert settings.seed_range(seeds) == found


def test_a_config_records_seeds_in_one_way():
    recorded = [settings.recorded(Config(seeds=seeds)) for seeds in (4, "4", "0:4", "2:4")]
    assert [each["seeds"] for each in recorded] == [4, 4, 4, "2:4"]
    assert "out" not in recorded[0]


OPTIONS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def restored():
    """Nothing is compiled in these tests, so jax has not looked at its settings yet."""
    before = {option: getattr(jax.config, option) for option in OPTIONS}
    yield
    for option, value in before.items():
        jax.config.update(option, value)


def test_programs_are_kept_in_the_users_cache(tmp_path, monkeypatch, restored):
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / name)
    monkeypatch.setattr("platform.node", lambda: "here")
    jax.config.update("jax_compilation_cache_dir", None)
    runner.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jaxprune" / "programs" / "here")
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_programs_stay_where_the_user_has_them(tmp_path, restored):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    runner.keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0
