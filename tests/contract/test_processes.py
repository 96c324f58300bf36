"""Law 9 over several real processes, which share one mesh over loopback."""

import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxprune as jp
from tests.contract import sharded
from tests.contract.processes import train

ROOT = Path(__file__).parents[2]
SECONDS = 300  # for all processes together; a hang ends here


def start_all(count, out, cases):
    """Start ``count`` processes with eight devices among them, and wait for all or kill all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={8 // count}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.contract.processes", coordinator, str(count)]
    processes = [
        subprocess.Popen(
            [*command, str(i), str(out), *cases],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(count)
    ]
    try:
        deadline = time.monotonic() + SECONDS
        texts = [p.communicate(timeout=deadline - time.monotonic())[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * count, "\n".join(texts)[-4000:]


ALL = [f"{name}:{layout}" for name in sharded.WRAPPERS for layout in sharded.LAYOUTS]


@pytest.mark.parametrize(
    ("count", "cases"),
    [
        (2, ["taylor across, packed:grid"]),
        pytest.param(2, ALL, marks=pytest.mark.slow),
        pytest.param(4, ALL, marks=pytest.mark.slow),
    ],
)
def test_processes_that_share_a_mesh_find_the_masks_of_one(tmp_path, count, cases):
    start_all(count, tmp_path, cases)
    for case in cases:
        params, masks = on_one_device(case.split(":")[0])
        want = jax.tree_util.tree_leaves_with_path((params, masks))
        for i in range(count):
            with np.load(tmp_path / f"{i}.npz") as file:
                assert file[f"{case} sparsity"] == jp.sparsity(masks, params)
                for path, leaf in want:
                    got = file[f"{case} {jax.tree_util.keystr(path)}"]
                    np.testing.assert_array_equal(got, leaf, err_msg=f"{case} {path}")


@functools.cache
def on_one_device(name):
    return train(name, jax.tree.map(jax.numpy.array, sharded.network()))
