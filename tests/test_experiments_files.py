"""Tests of experiments/common/files.py: locks, full disks, folders that cannot be written to."""

import contextlib
import dataclasses
import errno
import itertools
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import compare_methods, lottery_ticket, structured
from experiments.common import files, runs
from tests import crash

resource = pytest.importorskip("resource", reason="needs the limits of a Unix system")
pytest.importorskip("fcntl", reason="needs the locks of a Unix system")

ROOT = Path(files.__file__).parents[2]
EXPERIMENTS = [compare_methods, lottery_ticket, structured]
TOY = lottery_ticket.Config(levels=1, steps=10, seeds=1, eval_every=5, controls=("reinit",))


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    """Compiling takes longer than running what is compiled here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system in memory, which only root can have."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a file system may not be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_read_only_disk_is_named_at_the_door(experiment, tmp_path):
    with (
        mounted(tmp_path / "disk", "size=1m,ro"),
        pytest.raises(OSError, match="cannot be written to: Read-only file system") as caught,
    ):
        experiment.main(experiment.Config(out=tmp_path / "disk" / "run"))
    assert caught.value.errno == errno.EROFS


@pytest.mark.parametrize("size", ["16k", "60k", "100k"])
def test_a_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(size, tmp_path):
    lottery_ticket.main(dataclasses.replace(TOY, out=tmp_path / "undisturbed"))
    disk = tmp_path / "disk"
    config = dataclasses.replace(TOY, out=disk / "run")
    with mounted(disk, f"size={size}"):
        for _ in range(2):  # the second try changes nothing
            with pytest.raises(OSError, match=NO_SPACE) as caught:
                lottery_ticket.main(config)
            assert caught.value.errno == errno.ENOSPC
            left = crash.contents(config.out)
            assert not [name for name in left if "draft" in name or "lock" in name]
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        lottery_ticket.main(config)
        assert crash.contents(config.out) == crash.contents(tmp_path / "undisturbed")


NO_SPACE = (
    r"run/.*' cannot be written: No space left on device; [\d,]+ bytes are to be written, and "
    r"[\d,]+ are free there\. Nothing that was finished is lost: put that right, and the same "
    r"command goes on where it stopped\."
)


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


def test_whatever_write_fails_the_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    undisturbed, config = tmp_path / "undisturbed", dataclasses.replace(TOY, out=tmp_path / "run")
    lottery_ticket.main(dataclasses.replace(TOY, out=undisturbed))
    fsync, failures = os.fsync, 0

    def fail_at(number):
        left = [number]

        def wrapper(handle):
            left[0] -= stat.S_ISREG(os.fstat(handle).st_mode)
            if left[0] == 0:
                left[0] = -1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            fsync(handle)

        return wrapper

    with monkeypatch.context() as patch:
        for number in itertools.count(1):
            patch.setattr(os, "fsync", fail_at(number))
            try:
                lottery_ticket.main(config)
                break
            except OSError as error:
                assert "cannot be written: Input/output error" in str(error)
                failures += 1
    assert failures >= 4
    assert crash.contents(config.out) == crash.contents(undisturbed)
