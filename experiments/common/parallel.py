"""Many seeds in one program: mapped side by side, and shared out among the devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

ALL, EACH = PartitionSpec(), PartitionSpec("seeds")


def mesh(count: int) -> Mesh:
    """Line up devices of this process for ``count`` seeds: as many as divide them evenly.

    Eight seeds use eight devices of eight, five use five, nine use three; no device idles while
    another has more than its share.
    """
    devices = jax.local_devices()
    used = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    return Mesh(np.array(devices[:used]), ("seeds",), axis_types=(AxisType.Auto,))


def side_by_side(run: Callable[..., Any], stacked: Any, *common: Any) -> Any:
    """Run a function for every seed, in one program.

    Each device maps over the seeds that it has, and knows nothing of the others: a loop inside
    ends when its own seeds have. How XLA rounds may depend on how many seeds a device has; alone
    on its device a seed has the numbers that it has alone.

    Args:
      run: from what belongs to one seed, and what is common to all, to arrays.
      stacked: what belongs to the seeds, with a leading axis.
      common: handed to every seed as it is.

    Returns:
      What ``run`` gave, with a leading axis.
    """
    count = len(jax.tree.leaves(stacked)[0])
    mapped = jax.vmap(run, in_axes=(0, *(None for _ in common)))
    return jax.shard_map(
        mapped,
        mesh=mesh(count),
        in_specs=(EACH, *(ALL for _ in common)),
        out_specs=EACH,
        check_vma=False,  # nothing goes from one seed to another
    )(stacked, *common)


def everywhere(tree: Any, count: int) -> Any:
    """Put arrays on every device that ``count`` seeds use, once and for all."""
    return jax.device_put(tree, NamedSharding(mesh(count), ALL))


def stack(trees: Sequence[Any]) -> Any:
    """Stack trees of arrays along a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def unstack(tree: Any) -> list[Any]:
    """Fetch a stacked tree from the devices, and take it apart along its first axis."""
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    return [jax.tree.unflatten(structure, each) for each in zip(*leaves, strict=True)]
