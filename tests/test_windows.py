"""Tests of windows: N:M sparsity against a slow loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import schedules
from jaxprune._ranking import order_key
from jaxprune.scopes import _windows, windows
from tests.helpers import assert_trees_equal, slow_keep


def slow_windows(scores, count, m, axis, alive=None):
    """Rank every window on its own."""
    scores = np.moveaxis(np.asarray(scores, np.float64), axis, -1)
    living = None if alive is None else np.moveaxis(np.asarray(alive), axis, -1)
    keep = np.empty(scores.shape, bool)
    for place in np.ndindex(*scores.shape[:-1]):
        for i in range(0, scores.shape[-1], m):
            at = (*place, slice(i, i + m))
            keep[at] = slow_keep(scores[at], count, None if living is None else living[at])
    return np.moveaxis(keep, -1, axis)


def test_two_of_every_four_stay():
    keep = windows(4, axis=-1)({"w": jnp.array([1.0, 4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0])}, 0.5)
    want = np.array([False, True, True, False, True, True, False, False])
    assert_trees_equal(keep, {"w": want})


def test_the_default_axis_is_the_input_axis_of_a_kernel():
    keep = windows(2)({"kernel": jnp.array([[1.0, 4.0], [3.0, 2.0]])}, 0.5)["kernel"]
    assert keep.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_windows_keep_exactly_n_of_every_m(key, axis, sparsity):
    scores = jax.random.normal(key, (4, 8, 12)).round(1)
    count = 4 - round(sparsity * 4)
    keep = windows(4, axis)({"w": scores}, sparsity)["w"]
    np.testing.assert_array_equal(keep, slow_windows(scores, count, 4, axis))
    assert (np.moveaxis(keep, axis, -1).reshape(-1, 4).sum(axis=1) == count).all()


@pytest.mark.parametrize("m", [2, 3, 4, 16, 24, 48])
def test_any_m_that_divides_will_do(key, m):
    scores = jax.random.normal(key, (48, 2)).round(1).at[5].set(jnp.nan).at[7].set(-jnp.inf)
    keep = windows(m)({"w": scores}, 0.5)["w"]
    np.testing.assert_array_equal(keep, slow_windows(scores, m - round(0.5 * m), m, 0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_scores_are_ranked(key, dtype):
    scores = jax.random.normal(key, (8, 3), dtype)
    keep = windows(4)({"w": scores}, 0.5)["w"]
    np.testing.assert_array_equal(keep, slow_windows(scores, 2, 4, 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("m", [2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(32, 3), (2, 16, 5), (48, 1)])
def test_ranks_by_tiles_are_those_of_a_slow_loop(key, dtype, m, shape):
    # Chosen on a TPU only, and for long axes; here it is called by itself.
    scores = jax.random.normal(key, shape).round(1)
    scores = scores.at[..., 5, 0].set(jnp.nan).at[..., 7, 0].set(-jnp.inf).astype(dtype)
    alive = jax.random.bernoulli(key, 0.7, shape)
    axis = len(shape) - 2
    for within in (None, alive):
        codes = order_key(scores, within)
        rank = _windows._rank_by_tiles(codes, m=m, axis=axis)
        np.testing.assert_array_equal(rank, _windows._rank_by_rows(codes, m=m, axis=axis))
        for n in {0, 1, m // 2, m}:
            keep = (rank < n) if within is None else (rank < n) & within
            wide = np.asarray(scores, np.float32)
            np.testing.assert_array_equal(keep, slow_windows(wide, n, m, axis, within))


@pytest.mark.parametrize(
    "shape, m, axis, fills",
    [
        ((4096, 3), 4, 0, True),
        ((2, 2048, 3), 8, 1, True),
        ((4096, 3), 16, 0, True),
        ((2048, 3), 16, 0, False),  # 256 devices would have half a window each
        ((1024, 3), 4, 0, False),
        ((4096, 3), 32, 0, False),  # as many arrays as members
        ((6144, 3), 3, 0, False),  # windows that cross tiles
        ((3, 4096), 4, 1, False),
        ((4096,), 4, 0, False),
    ],
)
def test_windows_are_read_by_tiles_only_where_no_device_has_a_part_of_one(shape, m, axis, fills):
    assert _windows._fills_tiles(shape, m, axis) is fills


@pytest.mark.parametrize("vmapped", [False, True])
def test_long_axes_keep_what_a_slow_loop_keeps(key, vmapped):
    # Here the program for a TPU is chosen among.
    scores = jax.random.normal(key, (2, 2048, 1)).round(1)
    keep = lambda x: windows(4)({"w": x}, 0.5)["w"]
    found = jax.vmap(keep)(scores) if vmapped else jax.jit(keep)(scores)
    np.testing.assert_array_equal(found, slow_windows(scores, 2, 4, 1))


def test_float64_scores_are_ranked_under_x64():
    with jax.enable_x64(True):
        scores = jnp.array([1.0, 1.0 + 2.0**-40, 1.0, 1.0], jnp.float64)
        assert windows(4, -1)({"w": scores}, 0.75)["w"].tolist() == [False, True, False, False]


def test_dead_units_rank_last_and_stay_dead(key):
    scores = jax.random.normal(key, (8, 3)).round(1)
    alive = jax.random.bernoulli(key, 0.6, (8, 3))
    keep = windows(4)({"w": scores}, 0.5, within={"w": alive})["w"]
    np.testing.assert_array_equal(keep, slow_windows(scores, 2, 4, 0, alive))


def test_a_tree_of_sparsities_gives_each_leaf_its_own():
    units = {"a": jnp.arange(8.0), "b": jnp.arange(4.0)}
    keep = windows(4, axis=0)(units, {"a": 0.25, "b": 0.75})
    assert [int(keep[name].sum()) for name in "ab"] == [6, 1]


def test_an_empty_leaf_has_no_windows():
    assert windows(4, axis=0)({"w": jnp.zeros((0, 3))}, 0.5)["w"].shape == (0, 3)


def test_blocks_compete_as_vectors():
    scores = {"w": jnp.arange(16.0).reshape(8, 2)}
    masks = jp.make_masks(scores, 0.5, pattern=jp.patterns.Blocks((2, 1)), scope=windows(2))
    assert masks["w"][:, 0].tolist() == [False, False, True, True] * 2


def test_windows_name_every_parameter_that_does_not_fit():
    units = {"Dense_0": {"kernel": jnp.ones((6, 2))}, "Dense_1": {"kernel": jnp.ones((7, 2))}}
    with pytest.raises(ValueError, match=r"Dense_0/kernel.*multiple of 4.*Dense_1/kernel.*`where`"):
        windows(4)(units, 0.5)


@pytest.mark.parametrize("axis", [2, -3])
def test_windows_name_the_parameter_without_the_axis(axis):
    with pytest.raises(ValueError, match=rf"axis={axis}\)` is out of range for 'w'.*\(4, 4\)"):
        windows(4, axis)({"w": jnp.ones((4, 4))}, 0.5)


ROOM = {"a": {"kernel": jnp.arange(16.0).reshape(8, 2)}, "b": jnp.arange(8.0).reshape(4, 2)}


@pytest.mark.parametrize("sparsity", [0.9, 0.876, 0.99])
def test_a_sparsity_that_would_keep_none_of_a_window_is_refused(sparsity):
    words = rf"windows\(m=4\)` would keep none of 4 at a sparsity of {sparsity}.*at most 0.75"
    with pytest.raises(ValueError, match=words):
        windows(4)(ROOM, sparsity)
    with pytest.raises(ValueError, match=words):
        jp.find_masks(ROOM, sparsity, scope=windows(4))
    with pytest.raises(ValueError, match=words):
        jp.make_masks(ROOM, sparsity, scope=windows(4))
    with pytest.raises(ValueError, match=words):
        jp.prune(optax.sgd(0.1), schedule=schedules.linear(sparsity, 0, 9, 3), scope=windows(4))
    with pytest.raises(ValueError, match=words):
        jp.straight_through(
            optax.sgd(0.1), schedule=schedules.cyclic(sparsity, 1, 1, 0, 9), scope=windows(4)
        )


def test_a_tree_of_sparsities_names_the_leaf_of_which_nothing_would_stay():
    tree = {"a": {"kernel": 0.9}, "b": 0.5}
    words = r"would keep none of 4 at a sparsity of 0.9 at 'a/kernel'\."
    with pytest.raises(ValueError, match=words):
        windows(4)(ROOM, tree)
    with pytest.raises(ValueError, match=words):
        jp.find_masks(ROOM, tree, scope=windows(4))
    with pytest.raises(ValueError, match=words):
        jp.prune(optax.sgd(0.1), schedule=schedules.constant(tree), scope=windows(4))


@pytest.mark.parametrize("sparsity, kept", [(0.75, 1), (0.8, 1), (0.87, 1), (0.875, 0), (1.0, 0)])
def test_one_of_a_window_stays_up_to_three_quarters_and_nothing_at_one(sparsity, kept):
    if sparsity == 0.875:  # rounds to 4 as Python does: half to even
        with pytest.raises(ValueError, match="would keep none of 4"):
            jp.find_masks(ROOM, sparsity, scope=windows(4))
        return
    # As inside of a schedule: what no window has is refused where it is known.
    masks = jax.jit(lambda s: jp.find_masks(ROOM, s, scope=windows(4)))(sparsity)
    for mask in jax.tree.leaves(masks):
        assert (mask.reshape(-1, 4, 2).sum(axis=1) == kept).all()


def test_windows_check_their_settings_when_built():
    with pytest.raises(ValueError, match=r"windows\(m=1\).*m >= 2"):
        windows(1)
    with pytest.raises(TypeError, match=r"windows\(m=4.0\).*needs an integer"):
        windows(4.0)
    with pytest.raises(TypeError, match=r"windows\(axis=1\.0\).*needs an integer"):
        windows(4, axis=1.0)
    with pytest.raises(ValueError, match=r"windows\(axis='input'\).*The roles are 'in', 'out'"):
        windows(4, axis="input")


def test_windows_refuse_channels_by_name():
    with pytest.raises(ValueError, match=r"`windows\(m=2\)`.*`Channels`.*`per_leaf` or `across`"):
        jp.find_masks(
            {"w": jnp.ones((4, 4))}, 0.5, pattern=jp.patterns.Channels(), scope=windows(2)
        )


def test_windows_that_compare_equal_share_a_program():
    assert windows(4) == windows(4, axis=-2) and hash(windows(4)) == hash(windows(4))
    assert windows(4) != windows(2)
