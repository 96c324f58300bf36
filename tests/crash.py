"""Run folders as a kill may leave them: caught at every file operation of an undisturbed run."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.common import show

ROOT = Path(__file__).parents[1]

# What is written piece by piece; all else appears in one stroke, when a draft gets its name.
PIECEMEAL = (".draft", ".lock", ".jsonl")


def is_piecemeal(name):
    """Tell a file that may be found half written; drafts of arrays lie in a hidden folder."""
    return name.endswith(PIECEMEAL) or any(part.startswith(".") for part in Path(name).parts[:-1])


def contents(folder):
    """Read every file in a folder, by its path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def restore(state, folder):
    """Make a folder hold exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in state.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def states(folder, run, monkeypatch):
    """List what ``run()`` has left in the folder before and after each of its file operations.

    Where a file grew from one to the next, states in which it has grown by nothing, by half and
    by all but a byte stand between.
    """
    seen = [{}]

    def watched(operation):
        def wrapper(*args, **kwargs):
            seen.append(contents(folder))
            result = operation(*args, **kwargs)
            seen.append(contents(folder))
            return result

        return wrapper

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "unlink", "write"):
            patch.setattr(os, name, watched(getattr(os, name)))
        run()
    found = [seen[0]]
    for before, after in itertools.pairwise(seen):
        found += [*torn(before, after), after]
    return [state for i, state in enumerate(found) if state not in found[:i]]


def torn(before, after):
    """States in which what a file gained from one to the next is partly there."""
    for name, whole in after.items():
        old = len(before.get(name, b""))
        if is_piecemeal(name) and len(whole) > old:
            for size in sorted({old, (old + len(whole)) // 2, len(whole) - 1}):
                yield {**after, name: whole[:size]}


def assert_any_kill_is_survived(main, config, monkeypatch, *, files, at_least, every=1):
    """Run undisturbed, then go on from (every so many of) the states that a kill may leave.

    Figures are not rendered: that takes longer than all else at toy size.
    """
    monkeypatch.setattr(show, "png", lambda figure: b"png")
    left = states(config.out, lambda: main(config), monkeypatch)
    undisturbed = contents(config.out)
    assert len(undisturbed) == files and len(left) >= at_least, len(left)
    for state in left[::every]:
        restore(state, config.out)
        main(config)
        assert contents(config.out) == undisturbed, list(state)


def run_processes(experiment, arguments, kills=(), *, starts=None, timeout=600):
    """Run an experiment in processes of their own, which may be killed; see ``tests/killer.py``.

    Args:
      experiment: its name.
      arguments: of the command line of each process.
      kills: when one is to be killed; the last start is left alone.
      starts: how many; without it, until nobody is killed any more.
      timeout: seconds after which all are killed.

    Returns:
      The exit codes of the processes, start by start, and what they wrote to stderr.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    if kills:  # as experiments do it; whom nobody kills shows that it makes no difference
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder_of(arguments)) + "_programs"
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    plan = {"experiment": experiment, "arguments": arguments, "kills": list(kills)}
    plan["starts"] = starts or len(kills) + 1
    with subprocess.Popen(
        [sys.executable, "-m", "tests.killer"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, told = process.communicate(json.dumps(plan), timeout=timeout)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, told
    return json.loads(out), told


def folder_of(arguments):
    """Read the run folder off the command lines of a run."""
    return arguments[0][arguments[0].index("--out") + 1]


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
