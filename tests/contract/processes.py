"""Trains in several processes as one: what `test_processes` starts, one of these for each."""

import sys

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType

import jaxprune as jp
from tests.contract import sharded


def main(coordinator: str, processes: str, process: str, out: str, *names: str) -> None:
    """Train every wrapper that is named in every layout, and write the masks to ``out``."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(processes), int(process), initialization_timeout=60)
    mesh = jax.make_mesh((2, 4), sharded.NAMES, axis_types=(AxisType.Auto,) * 2)
    found = {}
    for name in names:
        for layout in sharded.LAYOUTS:
            tx = sharded.WRAPPERS[name](optax.sgd(0.25, momentum=0.5))
            params = sharded.place(sharded.network(), mesh, layout)
            state = sharded.start(tx, params, name)
            step = jax.jit(lambda p, s, tx=tx: sharded.step(tx, p, s))
            for _ in range(sharded.STEPS):
                params, state = step(params, state)
            masks = jp.get_masks(state)
            whole = multihost_utils.process_allgather((params, masks), tiled=True)
            found |= {
                f"{name}|{layout}|{jax.tree_util.keystr(path)}": np.asarray(leaf)
                for path, leaf in jax.tree_util.tree_leaves_with_path(whole)
            }
            found[f"{name}|{layout}|sparsity"] = np.float64(jp.sparsity(masks, params))
    np.savez(f"{out}/{process}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
