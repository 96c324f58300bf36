"""Tests of experiments/common/files.py: locks, full disks, folders that cannot be written to."""

import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import compare_methods, lottery_ticket, structured
from experiments.common import files, runs
from tests import crash

resource = pytest.importorskip("resource", reason="needs the limits of a Unix system")
pytest.importorskip("fcntl", reason="needs the locks of a Unix system")

ROOT = Path(files.__file__).parents[2]
EXPERIMENTS = [compare_methods, lottery_ticket, structured]


def test_a_second_run_is_told_who_is_there_and_changes_nothing(tmp_path):
    with files.locked(tmp_path / "run"):
        before = crash.contents(tmp_path)
        holder = re.escape(f"process {os.getpid()} on {socket.gethostname()!r}")
        with (
            pytest.raises(
                RuntimeError, match=f"run'` is in use by {holder}. Wait until that run ends, stop"
            ),
            files.locked(tmp_path / "run"),
        ):
            pass
        assert crash.contents(tmp_path) == before
    assert crash.contents(tmp_path) == {}
    with files.locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_no_experiment_starts_in_a_folder_in_use(experiment, tmp_path):
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


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("place, words", [(".", "File exists"), ("run", "Not a directory")])
def test_no_experiment_trains_where_it_cannot_write(experiment, place, words, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / place
    message = rf"{out}'` cannot be written to: {words}; [\d,]+ bytes are free there. Nothing was"
    with pytest.raises(OSError, match=message):
        experiment.main(experiment.Config(out=out))
    assert crash.contents(tmp_path) == {"file": b"in the way"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_read_only_disk_is_named_at_the_door(experiment, tmp_path):
    with (
        crash.mounted(tmp_path / "disk", "size=1m,ro"),
        pytest.raises(OSError, match="cannot be written to: Read-only file system") as caught,
    ):
        experiment.main(experiment.Config(out=tmp_path / "disk" / "run"))
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
    runs.open_run(tmp_path, {})
    runs.append_record(tmp_path, {"level": 0})
    with (
        files_of_at_most(100),
        pytest.raises(OSError, match=r"metrics\.jsonl' cannot be written: File too large"),
    ):
        runs.append_record(tmp_path, {"level": "x" * 5000})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"level": 0}\n'
    runs.append_record(tmp_path, {"level": 1})
    assert runs.read_records(tmp_path) == [{"level": 0}, {"level": 1}]
