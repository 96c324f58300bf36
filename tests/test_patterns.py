"""Tests of the patterns: what is pooled, and what it is expanded to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.patterns import Blocks, Channels, Weights
from tests.helpers import assert_trees_equal

REDUCTIONS = {
    "mean": np.mean,
    "sum": np.sum,
    "norm": lambda block: np.sqrt(np.sum(block * block)),
}


def slow_blocks(scores, block, reduce):
    """Score the blocks one after the other, ragged ones by what they have."""
    lead = scores.shape[: scores.ndim - len(block)]
    grid = [-(-n // b) for n, b in zip(scores.shape[len(lead) :], block, strict=True)]
    units = np.empty((*lead, *grid), np.float64)
    for place in np.ndindex(*units.shape):
        corner = place[len(lead) :]
        inside = tuple(slice(i * b, (i + 1) * b) for i, b in zip(corner, block, strict=True))
        units[place] = REDUCTIONS[reduce](
            np.asarray(scores, np.float64)[place[: len(lead)]][inside]
        )
    return units


def slow_expand(keep, block, shape):
    for axis, b in enumerate(block, start=len(shape) - len(block)):
        keep = np.repeat(keep, b, axis)[(slice(None),) * axis + (slice(shape[axis]),)]
    return keep


BLOCKS = [
    ((4, 6), (2, 2)),
    ((4, 6), (4, 6)),
    ((5, 7), (2, 3)),  # ragged on both axes
    ((3, 2), (4, 4)),  # smaller than a block
    ((2, 5, 7), (4, 4)),
    ((2, 3, 5, 7), (2, 2, 2)),
    ((7,), (4,)),
    ((6, 4), (1, 1)),
    ((6, 4), (3, 1)),
]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("shape, block", BLOCKS)
def test_blocks_are_scored_and_expanded_like_the_slow_loop(shape, block, reduce):
    scores = np.random.default_rng(0).integers(-8, 8, shape).astype(np.float32)
    pattern = Blocks(block, reduce)
    units = pattern.pool({"w": jnp.asarray(scores)})["w"]
    np.testing.assert_allclose(units, slow_blocks(scores, block, reduce), rtol=1e-6)
    keep = units > np.median(units)
    masks = pattern.expand({"w": keep}, like={"w": jnp.asarray(scores)})["w"]
    assert masks.shape == shape and masks.dtype == bool
    np.testing.assert_array_equal(masks, slow_expand(np.asarray(keep), block, shape))


def test_ragged_blocks_compete_by_their_mean():
    scores = {"w": jnp.array([[1.0, 1.0, 1.0, 1.0, 2.0]])}
    masks = jp.make_masks(scores, 2 / 3, pattern=Blocks((1, 2)))
    assert masks["w"].tolist() == [[False] * 4 + [True]]


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_channels_are_scored_like_the_slow_loop(axis, reduce):
    scores = np.random.default_rng(0).integers(-8, 8, (3, 4, 5)).astype(np.float32)
    units = Channels(axis, reduce).pool({"w": jnp.asarray(scores)})["w"]
    assert units.shape == tuple(n if i == axis % 3 else 1 for i, n in enumerate(scores.shape))
    slices = np.moveaxis(scores.astype(np.float64), axis, 0)
    want = [REDUCTIONS[reduce](channel) for channel in slices]
    np.testing.assert_allclose(np.ravel(units), want, rtol=1e-6)


def test_channel_masks_broadcast_and_are_never_materialised():
    keep = {"w": jnp.array([[True, False, True]])}
    assert_trees_equal(Channels(-1).expand(keep, like={"w": jnp.ones((9, 3))}), keep)


def test_weights_leave_scores_and_masks_as_they_are():
    scores = {"w": jnp.array([1.0, 2.0]), "b": None}
    assert_trees_equal(Weights().pool(scores), scores)
    keep = {"w": jnp.array([True, False]), "b": None}
    assert_trees_equal(Weights().expand(keep, like=scores), keep)


@pytest.mark.parametrize("pattern", [Channels(-1), Blocks((2, 2))])
def test_half_precision_scores_are_pooled_in_float32(pattern):
    # In bfloat16 256 + 1 is 256: the means would tie.
    scores = {"w": jnp.full((4, 4), 1.0, jnp.bfloat16).at[0, 0].set(256.0).at[0, 2].set(255.0)}
    units = pattern.pool(scores)["w"]
    assert units.dtype == jnp.float32
    assert len(np.unique(units)) == 3


@pytest.mark.parametrize("pattern", [Channels(-1), Blocks((2, 2))])
def test_float64_scores_are_pooled_in_float64(pattern):
    with jax.enable_x64(True):
        assert pattern.pool({"w": jnp.ones((4, 4), jnp.float64)})["w"].dtype == jnp.float64


@pytest.mark.parametrize("pattern", [Weights(), Channels(0), Blocks((2, 2))])
def test_empty_leaves_pass_through(pattern):
    params = {"w": jnp.ones((4, 4)), "none": jnp.ones((4, 0))}
    masks = jp.find_masks(params, 0.5, pattern=pattern)
    assert jnp.broadcast_to(masks["none"], (4, 0)).shape == (4, 0)
    assert jp.sparsity(masks, params) == 0.5


def test_patterns_are_frozen_and_hashable():
    assert hash(Blocks([2, 2])) == hash(Blocks((2, 2))) and Blocks([2, 2]) == Blocks((2, 2))
    assert len({Weights(), Weights(), Channels(), Channels(-1), Channels(0)}) == 3


def test_channels_check_their_settings_when_built():
    with pytest.raises(TypeError, match=r"Channels\(axis=1.0\).*integer axis"):
        Channels(1.0)
    with pytest.raises(ValueError, match=r"Channels\(reduce='max'\).*'mean', 'sum', 'norm'"):
        Channels(reduce="max")


def test_blocks_check_their_settings_when_built():
    with pytest.raises(TypeError, match=r"Blocks\(shape=4\).*tuple of integers"):
        Blocks(4)
    with pytest.raises(TypeError, match=r"Blocks\(shape=\(\)\).*tuple of integers"):
        Blocks(())
    with pytest.raises(ValueError, match=r"Blocks\(shape=\(0, 4\)\).*below 1"):
        Blocks((0, 4))
    with pytest.raises(ValueError, match=r"Blocks\(reduce='max'\)"):
        Blocks((2, 2), reduce="max")


@pytest.mark.parametrize("axis", [2, -3])
def test_channels_name_every_parameter_without_the_axis(axis):
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((3, 3))}}
    words = rf"Channels\(axis={axis}\)` is out of range for 'a/kernel'.*\(2, 2\).*'b/kernel'"
    with pytest.raises(ValueError, match=words):
        jp.find_masks(params, 0.5, pattern=Channels(axis))


def test_blocks_name_every_parameter_with_too_few_axes():
    params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((3, 3, 3))}}
    with pytest.raises(ValueError, match=r"at least 3 axes, but has 'a/kernel' of shape \(2, 2\)"):
        jp.find_masks(params, 0.5, pattern=Blocks((2, 2, 2)))
