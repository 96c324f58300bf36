"""Start an experiment as processes, kill one by SIGKILL, start again, until all end by themselves.

``python -m tests.killer`` reads from its input, as JSON, the ``experiment``, the ``arguments`` of
the command line of each process, and ``kills``, one for each start but the last: a number of
seconds after the run has opened its folder, or ``{"write": n}`` for the middle of the n-th file
that is written, with ``"process"`` if it is not the first that dies. It prints the exit codes of
each start. Processes are forked off one that has imported everything, which saves seconds.
"""

import importlib
import json
import os
import signal
import stat
import sys
import time
from unittest import mock

import pytest
import tyro

from experiments.common import data


def main():
    plan = json.load(sys.stdin)
    data.load_digits()  # imports scikit-learn
    module = importlib.import_module(f"experiments.{plan['experiment']}")
    configs = [tyro.cli(module.Config, args=arguments) for arguments in plan["arguments"]]
    codes = []
    for kill in [*plan["kills"], None][: plan["starts"]]:
        codes.append(start(module, configs, kill))
        if -signal.SIGKILL not in codes[-1]:
            break
    print(json.dumps(codes))


def start(module, configs, kill):
    """Run in processes of their own, and give their exit codes."""
    lock = configs[0].out / ".lock"
    lock.unlink(missing_ok=True)  # so that its coming back says that the run has begun
    kill = kill if isinstance(kill, dict) else {"after": kill}
    victim, processes = kill.get("process", 0), []
    for number, config in enumerate(configs):
        processes.append(os.fork())
        if processes[-1] == 0:
            child(module, config, kill.get("write") if number == victim else None)
    if kill.get("after") is not None:
        while not lock.exists() and not os.waitid(os.P_PID, processes[victim], DONE):
            time.sleep(0.005)
        time.sleep(kill["after"])
        os.kill(processes[victim], signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


DONE = os.WEXITED | os.WNOHANG | os.WNOWAIT


def child(module, config, write):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        with mock.patch.object(os, "fsync", killing(write)):
            prepare(module)
            module.main(config)
        code = 0
    except Exception as error:
        print(type(error).__name__, error, file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def killing(number):
    """Bring files to the disk as ever, but die in the middle of the ``number``-th."""
    fsync, count = os.fsync, 0

    def wrapper(handle):
        nonlocal count
        if stat.S_ISREG(os.fstat(handle).st_mode):
            count += 1
            if count == number:
                # Of a file that is written anew half is there, of a new line all but its end.
                size, whole = os.fstat(handle).st_size, os.readlink(f"/proc/self/fd/{handle}")
                os.ftruncate(handle, size // 2 if whole.endswith(".draft") else size - 5)
                os.kill(os.getpid(), signal.SIGKILL)
        fsync(handle)

    return wrapper


def prepare(module):
    """What is measured is not the same twice, and a CNN takes long to compile."""
    _, name = module.__name__.split(".")
    if name in ("structured", "edge_deployment"):
        tests = importlib.import_module(f"tests.test_experiments_{name}")
        tests.stand_in(pytest.MonkeyPatch())


if __name__ == "__main__":
    main()
