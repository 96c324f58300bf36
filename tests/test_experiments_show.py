"""Pictures that experiments and notebooks share."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib")
from experiments.common.show import draw_masks


def test_a_picture_of_masks_shows_every_leaf_as_a_matrix():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
        "out": jnp.ones((4, 2)),
    }
    channels = jnp.array([True, False, True, True]).reshape(1, 1, 1, 4)
    masks = {"conv": {"kernel": channels, "bias": None}, "out": jnp.eye(4, 2, dtype=bool)}
    first, second = draw_masks(masks, params).axes
    assert first.get_title() == "conv/kernel: 25% removed"
    assert second.get_title() == "out: 75% removed"
    drawn = np.asarray(first.collections[0].get_array()).reshape(4, 18)
    np.testing.assert_array_equal(drawn, np.repeat(channels.reshape(4, 1), 18, 1))
    np.testing.assert_array_equal(second.collections[0].get_array().reshape(2, 4), np.eye(2, 4))


def test_a_picture_may_show_a_corner_and_says_what_the_whole_removes():
    params = {"w": jnp.ones((64, 32))}
    masks = {"w": jnp.arange(32)[None] < 8}
    (axes,) = draw_masks(masks, params, corner=4).axes
    assert axes.get_title() == "w: 75% removed"
    assert axes.collections[0].get_array().size == 16


def test_a_picture_of_no_masks_is_empty():
    assert draw_masks({"bias": None}, {"bias": jnp.ones(3)}).axes[0].get_title() == ""
