"""Trains in several processes as one: `test_processes` starts this module once for each."""

import sys

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import jaxprune as jp
from tests.contract import sharded


def main(coordinator: str, processes: str, process: str, out: str, *cases: str) -> None:
    """Train each ``wrapper:layout``, and write what comes out to ``out``."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(process), initialization_timeout=60)
    mesh = jax.make_mesh((2, 4), sharded.NAMES, axis_types=(AxisType.Auto,) * 2)
    found = {}
    for case in cases:
        name, layout = case.split(":")
        params, masks = train(name, sharded.place(sharded.network(), mesh, layout))
        found[f"{case} sparsity"] = jp.sparsity(masks, params)
        whole = multihost_utils.process_allgather((params, masks), tiled=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
            found[f"{case} {jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    np.savez(f"{out}/{process}.npz", **found)


def train(name, params):
    """Take the steps of a wrapper; the params and the masks at the end."""
    tx = sharded.WRAPPERS[name](optax.sgd(0.25, momentum=0.5))
    state = sharded.start(tx, params, name)
    step = jax.jit(lambda params, state: sharded.step(tx, params, state))
    for _ in range(sharded.STEPS):
        params, state = step(params, state)
    return params, jp.get_masks(state)


if __name__ == "__main__":
    main(*sys.argv[1:])
