"""Start an experiment as a process, kill it by SIGKILL, start it again, until it ends by itself.

``python -m tests.killer`` reads from its input, as JSON, the ``experiment``, the ``arguments`` of
its command line, and ``kills``: each is a number of seconds after the run has opened its folder,
or ``{"write": n}`` for the middle of the n-th file that it writes. It prints the exit codes.
Processes are forked off one that has imported everything, which saves seconds each time.
"""

import importlib
import json
import os
import signal
import sys
import time
from unittest import mock

import pytest
import tyro

from experiments.common import data, files


def main():
    plan = json.load(sys.stdin)
    data.load_digits()  # imports scikit-learn
    module = importlib.import_module(f"experiments.{plan['experiment']}")
    config = tyro.cli(module.Config, args=plan["arguments"])
    codes = []
    for kill in [*plan["kills"], None]:
        codes.append(start(module, config, kill))
        if codes[-1] != -signal.SIGKILL:
            break
    print(json.dumps(codes))


def start(module, config, kill):
    """Run in a process of its own, and give its exit code."""
    lock = config.out / ".lock"
    lock.unlink(missing_ok=True)  # so that its coming back says that the run has begun
    process = os.fork()
    if process == 0:
        child(module, config, kill["write"] if isinstance(kill, dict) else 0)
    if isinstance(kill, float):
        while not lock.exists() and not os.waitid(os.P_PID, process, DONE):
            time.sleep(0.005)
        time.sleep(kill)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


DONE = os.WEXITED | os.WNOHANG | os.WNOWAIT


def child(module, config, write):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        with mock.patch.object(files, "_write_through", killing(write)):
            prepare(module)
            module.main(config)
        code = 0
    finally:
        os._exit(code)


def killing(number):
    """Write as ever, but die in the middle of the ``number``-th time."""
    write_through, left = files._write_through, [number]

    def wrapper(file, content):
        left[0] -= 1
        if left[0] == 0:
            file.write(content[: len(content) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write_through(file, content)

    return wrapper


def prepare(module):
    """What is measured is not the same twice, and a CNN takes long to compile."""
    tests = importlib.import_module(f"tests.test_{module.__name__.replace('.', '_')}")
    if hasattr(tests, "stand_in"):
        tests.stand_in(pytest.MonkeyPatch())


if __name__ == "__main__":
    main()
