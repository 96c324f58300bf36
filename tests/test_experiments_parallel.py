"""Tests of experiments/common/parallel.py: seeds side by side, shared out among devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import parallel
from tests.helpers import TraceCount, assert_trees_equal


@pytest.mark.parametrize(
    "seeds, devices", [(1, 1), (2, 2), (5, 5), (8, 8), (9, 3), (11, 1), (12, 6), (16, 8)]
)
def test_as_many_devices_share_the_seeds_as_divide_them(seeds, devices):
    assert parallel.mesh(seeds).devices.size == devices


def collatz(seed, step):
    """Count the rounds that a loop takes, as many as the seed decides."""
    start, key = seed

    def halve(carry):
        n, rounds = carry
        return jnp.where(n % 2 == 0, n // 2, 3 * n + 1), rounds + step

    _, rounds = jax.lax.while_loop(lambda carry: carry[0] > 1, halve, (start, jnp.int32(0)))
    return {"rounds": rounds, "drawn": jax.random.normal(key, (3,)), "hole": None}


@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_side_by_side_is_a_loop_over_the_seeds(count):
    starts = [(jnp.int32(n), jax.random.key(n)) for n in range(1, count + 1)]
    run = jax.jit(functools.partial(parallel.side_by_side, collatz))
    found = parallel.unstack(run(parallel.stack(starts), jnp.int32(2)))
    assert [type(each["rounds"]) for each in found] == [np.int32] * count
    for one, start in zip(found, starts, strict=True):
        assert_trees_equal(one, jax.device_get(collatz(start, jnp.int32(2))))


def test_what_all_seeds_share_lies_on_the_devices_already():
    count = TraceCount(lambda seeds, common: parallel.side_by_side(jnp.multiply, seeds, common))
    run, common = jax.jit(count), parallel.everywhere(jnp.arange(4.0), 8)
    assert common.sharding.is_fully_replicated and len(common.devices()) == 8
    for factor in (1.0, 2.0):
        out = run(factor * jnp.arange(8.0), common)
        assert len(out.devices()) == 8
        np.testing.assert_array_equal(out, factor * np.outer(np.arange(8), np.arange(4)))
    assert count.count == 1


def test_stacked_trees_come_apart_again():
    trees = [{"a": np.arange(3) + n, "b": (np.float32(n), None)} for n in range(4)]
    for tree, back in zip(trees, parallel.unstack(parallel.stack(trees)), strict=True):
        assert_trees_equal(back, tree)
