"""Tests of Keep: pattern, scope and sparsity put together for one matrix of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import patterns, scopes
from jaxprune._keep import _part
from tests.helpers import TraceCount, slow_keep


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def named(value):
    """Name a case without the addresses of functions, which differ between workers."""
    if not isinstance(value, dict):
        return str(value)
    return "-".join(getattr(part, "__name__", str(part)) for part in value.values()) or "default"


@jax.jit
def block(keep, scores, start):
    return keep.block(scores, start)


def in_blocks(keep, scores, size):
    """The masks of all blocks of a matrix together."""
    starts = range(0, len(scores), size)
    return np.concatenate([block(keep, scores[i : i + size], i) for i in starts])


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"scope": scopes.per_output},
        {"scope": scopes.windows(4)},
        {"pattern": patterns.Blocks((4, 3))},
        {"pattern": patterns.Channels("in")},
        {"pattern": patterns.Channels("out")},
    ],
    ids=named,
)
def test_a_matrix_is_kept_as_masks_of_its_scores_are_made(parts):
    scores, layout = draw(16, 6), jp.Layout({"w": ("in", "out")})
    mask = jp.Keep.of((16, 6), 0.5, **parts)(scores)
    want = jp.make_masks({"w": scores}, 0.5, layout=layout, **parts)["w"]
    assert mask.shape == (16, 6) and mask.dtype == bool
    np.testing.assert_array_equal(mask, np.broadcast_to(want, (16, 6)))


@pytest.mark.parametrize("size", [8, 12])
def test_blocks_keep_together_what_the_matrix_does(size):
    scores = draw(30, 7)
    for sparsity in (0.0, 0.35, 0.7, 1.0):
        mask = in_blocks(jp.Keep.of((30, 7), sparsity), scores, size)
        assert mask.sum() == 210 - round(sparsity * 210)
        keep = jp.Keep.of((30, 7), sparsity, scope=scopes.per_output)
        assert (in_blocks(keep, scores, size).sum(0) == 30 - round(sparsity * 30)).all()


def test_a_block_keeps_its_share_and_the_best_of_it():
    scores = draw(10, 1)
    keep = jp.Keep.of((10, 1), 0.3)
    for start, end, count in ((0, 4, 2), (4, 8, 3), (8, 10, 2)):
        part = scores[start:end]
        np.testing.assert_array_equal(keep.block(part, start), slow_keep(part, count))


def test_blocks_of_inputs_have_whole_units_also_where_the_last_is_ragged():
    scores = draw(37, 6)
    keep = jp.Keep.of((37, 6), 0.5, pattern=patterns.Blocks((8, 2)))
    assert keep.unit == 8
    mask = in_blocks(keep, scores, 16)
    units = np.add.reduceat(mask[:, ::2], range(0, 37, 8), axis=0)
    assert set(units.ravel().tolist()) <= {0, 8, 5}  # five rows of units, the last of 5 inputs
    assert (units > 0).sum() == 15 - round(0.5 * 15)


@pytest.mark.parametrize("start", [3, jnp.int32(3)])
def test_a_block_may_start_anywhere_traced_or_not(start):
    scores = draw(5, 2)
    found = jp.Keep.of((12, 2), 0.5).block(scores, start)
    assert found.sum() == 24 // 2 * 16 // 24 - 12 * 6 // 24


def test_what_is_gone_already_counts_and_stays_away():
    scores, first = draw(12, 4), jnp.arange(12)[:, None] >= jnp.array([6, 6, 0, 0])[None]
    keep = jp.Keep.of((12, 4), 0.5, within=first)
    assert not (keep(scores) & ~first).any() and keep(scores).sum() == 24
    # 36 are alive, 12 in the first six rows; these keep a third of what the matrix keeps.
    mask = in_blocks(keep, scores, 6)
    assert not (mask & ~np.asarray(first)).any()
    assert mask[:6].sum() == 8 and mask[6:].sum() == 16
    # Where more is gone than is asked for, all others stay.
    keep = jp.Keep.of((12, 4), 0.25, within=first, scope=scopes.per_output)
    np.testing.assert_array_equal(in_blocks(keep, scores, 4)[:, :2], first[:, :2])
    assert (in_blocks(keep, scores, 4)[:, 2:].sum(0) == 9).all()


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), sparsity=st.floats(0.0, 1.0), share=st.floats(0.0, 1.0))
def test_blocks_within_a_mask_keep_together_what_the_matrix_does(seed, sparsity, share):
    scores = draw(21, 3, seed=seed)
    first = np.random.default_rng(seed).random((21, 3)) < share
    for scope in (scopes.per_leaf, scopes.per_output):
        keep = jp.Keep.of((21, 3), sparsity, scope=scope, within=jnp.asarray(first))
        mask, whole = in_blocks(keep, scores, 7), np.asarray(block(keep, scores, 0))
        assert not (mask & ~first).any()
        assert mask.sum() == whole.sum()
        if scope is scopes.per_output:
            assert (mask.sum(0) == whole.sum(0)).all()


part = jax.jit(_part)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), total=st.integers(0, 2**29))
def test_a_part_of_what_stays_is_exact_whatever_the_product(data, total):
    kept, some = (data.draw(st.integers(0, total)) for _ in range(2))
    assert int(part(kept, some, total)) == kept * some // max(total, 1)


@pytest.mark.parametrize(
    "parts, unit, window",
    [
        ({}, 1, None),
        ({"scope": scopes.per_output}, 1, None),
        ({"scope": scopes.windows(4)}, 1, 4),
        ({"scope": scopes.windows(4, axis="in")}, 1, 4),
        ({"scope": scopes.windows(4, axis="out")}, 1, 1),
        ({"pattern": patterns.Blocks((5, 2))}, 5, None),
        ({"pattern": patterns.Blocks((2, 5), axes=("out", "in"))}, 5, None),
        ({"pattern": patterns.Blocks((5, 1)), "scope": scopes.windows(4)}, 5, 20),
        ({"pattern": patterns.Blocks((5, 2)), "scope": scopes.windows(4, axis=-1)}, 5, 5),
        ({"pattern": patterns.Blocks((64, 64))}, 64, None),  # larger than the matrix
        ({"pattern": patterns.Channels("in")}, 1, None),
        ({"pattern": patterns.Channels("out")}, None, None),
    ],
    ids=named,
)
def test_units_and_windows_are_told_in_inputs(parts, unit, window):
    keep = jp.Keep.of((40, 16), 0.5, **parts)
    assert (keep.unit, keep.window) == (unit, window)


def test_windows_of_blocks_are_whole():
    scores = draw(40, 8)
    keep = jp.Keep.of((40, 8), 0.5, scope=scopes.windows(4))
    np.testing.assert_array_equal(in_blocks(keep, scores, 8), keep(scores))


def test_a_scope_of_ones_own_is_asked_for_the_same_fraction_of_each_block():
    def above(units, sparsity, *, within=None):
        del within
        return jax.tree.map(lambda u: u >= jnp.quantile(u, sparsity), units)

    keep = jp.Keep.of((8, 4), 0.5, scope=above)
    assert keep(draw(8, 4)).sum() == keep.block(draw(4, 4), 0).sum() * 2 == 16


def test_there_is_one_trace_for_all_sparsities_and_matrices_of_a_shape():
    count = TraceCount(lambda scores, keep: keep(scores))
    jitted = jax.jit(count)
    for seed, sparsity in enumerate((0.1, 0.5, 0.9)):
        mask = jitted(draw(10, 4, seed=seed), jp.Keep.of((10, 4), sparsity))
        assert mask.sum() == 40 - round(sparsity * 40)
    assert count.count == 1
    pair = [jp.Keep.of((10, 4), s, scope=scopes.per_output) for s in (0.1, 0.2)]
    assert jax.tree.structure(pair[0]) == jax.tree.structure(pair[1])
    assert hash(jax.tree.structure(pair[0])) == hash(jax.tree.structure(pair[1]))


def test_many_are_asked_at_once():
    scores = jnp.stack([draw(6, 4, seed=seed) for seed in range(3)])
    keep = jp.Keep.of((6, 4), 0.5)
    np.testing.assert_array_equal(jax.vmap(keep)(scores), [keep(s) for s in scores])


@pytest.mark.parametrize(
    "settings, error, words",
    [
        ({"sparsity": 1.5}, ValueError, r"1.5, outside \[0, 1\]"),
        ({"sparsity": "half"}, TypeError, "`sparsity` got 'half'"),
        ({"scope": scopes.windows(4)}, ValueError, r"axis -2 of 'w' to be a multiple of 4"),
        ({"scope": scopes.windows(2), "sparsity": 0.3}, ValueError, "no window has"),
        (
            {"pattern": patterns.Channels("out"), "scope": scopes.per_output},
            ValueError,
            "`per_output`.*`Channels`",
        ),
        ({"pattern": "Weights"}, TypeError, "`prune_trained` got pattern='Weights', a string"),
        ({"within": jnp.ones((3, 3), bool)}, ValueError, r"`within`.*\(3, 3\).*\(10, 4\)"),
        ({"within": jnp.ones((10, 4))}, TypeError, "`within`.*not bool: 'w' is float32"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(settings, error, words):
    settings = {"sparsity": 0.5, **settings}
    with pytest.raises(error, match=words):
        jp.Keep.of((10, 4), **settings)


def test_it_takes_a_shape_and_not_an_array():
    with pytest.raises(TypeError, match=r"`Keep.of` got shape=.*`w.shape`"):
        jp.Keep.of(jnp.ones((10, 4)), 0.5)
    with pytest.raises(ValueError, match=r"`Keep` of 10 inputs got scores of shape \(4, 10\)"):
        jp.Keep.of((10, 4), 0.5)(draw(4, 10))
