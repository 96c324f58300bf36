"""Tests of N:M and of blocks from end to end: masks that are found while a network trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.helpers import assert_trees_equal, assert_zero_where_removed, run

N_OF_M = [(2, 4), (1, 4), (4, 8)]


def network(key):
    """A dense kernel, and one of a convolution: height, width, inputs, outputs."""
    a, b = jax.random.split(key)
    return {
        "conv": {"kernel": jax.random.normal(a, (3, 3, 8, 4)), "bias": jnp.ones(4)},
        "dense": {"kernel": jax.random.normal(b, (16, 6)), "bias": jnp.ones(6)},
    }


def grads(params):
    return jax.tree.map(lambda w: w - jnp.cos(5 * w), params)


def kept_in_windows(mask, m, axis=-2):
    """Count what each window along an axis keeps."""
    mask = np.moveaxis(np.asarray(mask), axis, -1)
    return mask.reshape(*mask.shape[:-1], -1, m).sum(axis=-1)


def kernels(tree):
    return {name: tree[name]["kernel"] for name in ("conv", "dense")}


@pytest.mark.parametrize("n, m", N_OF_M)
def test_n_of_every_m_inputs_stay_in_dense_and_convolution_kernels(key, n, m):
    tx = jp.prune(
        optax.adamw(0.1), schedule=schedules.one_shot(1 - n / m, at=1), scope=scopes.windows(m)
    )
    params, state, all_params, _ = run(tx, network(key), 4, grads)
    masks, before = jp.get_masks(state), jax.tree.map(lambda p: p[0], all_params)
    assert_zero_where_removed(params, masks)
    for name, mask in kernels(masks).items():
        assert (kept_in_windows(mask, m) == n).all()
        size = np.moveaxis(np.abs(kernels(before)[name]), -2, -1)
        size = size.reshape(*size.shape[:-1], -1, m)
        best = size >= np.sort(size, axis=-1)[..., -n, None]  # the n largest of each window
        want = np.moveaxis(best.reshape(*best.shape[:-2], -1), -1, -2)
        np.testing.assert_array_equal(mask, want)


@pytest.mark.parametrize("make", [schedules.linear, schedules.cubic])
def test_a_schedule_walks_from_dense_to_2_of_4_with_all_windows_in_step(key, make):
    schedule = make(0.5, begin=0, end=6, every=1)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, scope=scopes.windows(4))
    _, _, all_params, all_masks = run(tx, network(key), 7, grads)
    stages = []
    for step in range(7):
        n = 4 - round(float(schedule(step)) * 4)
        stages.append(n)
        for kernel in kernels(all_masks).values():
            assert (kept_in_windows(kernel[step], 4) == n).all()
        if step:  # what is gone stays gone
            revived = jax.tree.map(lambda m, s=step: (m[s] & ~m[s - 1]).any(), all_masks)
            assert not any(jax.tree.leaves(revived))
    assert stages[0] == 4 and stages[-1] == 2 and sorted(set(stages)) == [2, 3, 4]
    last = jax.tree.map(lambda p: p[-1], (all_params, all_masks))
    assert_zero_where_removed(*last)


def test_a_criterion_with_memory_finds_2_of_4_as_well(key):
    tx = jp.prune(
        optax.adam(0.1),
        schedule=schedules.linear(0.5, begin=0, end=4, every=2),
        criterion=criteria.movement,
        scope=scopes.windows(4),
    )
    params, state, _, _ = run(tx, network(key), 5, grads)
    masks = jp.get_masks(state)
    assert_zero_where_removed(params, masks)
    assert all((kept_in_windows(mask, 4) == 2).all() for mask in kernels(masks).values())


def test_a_tree_of_sparsities_gives_2_of_4_here_and_1_of_4_there(key):
    params = network(key)
    tree = scopes.custom(params, {"conv/kernel": 0.75}, default=0.5)
    schedule = schedules.cubic(tree, begin=0, end=4, every=2)
    tx = jp.prune(optax.adam(0.1), schedule=schedule, scope=scopes.windows(4), packed=True)
    masks = jp.get_masks(run(tx, params, 5, grads)[1])
    assert (kept_in_windows(masks["conv"]["kernel"], 4) == 1).all()
    assert (kept_in_windows(masks["dense"]["kernel"], 4) == 2).all()


# Vectors and blocks.


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2)])
def test_n_of_every_m_vectors_along_the_outputs_stay(key, n, m):
    tx = jp.prune(
        optax.adam(0.1),
        schedule=schedules.constant(1 - n / m),
        pattern=patterns.Blocks((1, 4)),
        scope=scopes.windows(m),
    )
    start = {"kernel": jax.random.normal(key, (16, 8)), "bias": jnp.ones(8)}
    params, state, _, _ = run(tx, start, 3, grads)
    mask = np.asarray(jp.get_masks(state)["kernel"]).reshape(16, 2, 4)
    assert_zero_where_removed(params, jp.get_masks(state))
    assert (mask.all(axis=2) == mask.any(axis=2)).all()  # a vector goes as one
    assert (kept_in_windows(mask[:, :, 0], m) == n).all()
    score = np.abs(start["kernel"]).reshape(-1, m, 2, 4).mean(axis=3)
    best = score >= np.sort(score, axis=1)[:, -n, None]
    np.testing.assert_array_equal(mask[:, :, 0], best.reshape(16, 2))


@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across])
def test_blocks_with_ragged_edges_are_pruned_in_training(key, scope):
    schedule = schedules.cubic(0.6, begin=0, end=4, every=2)
    tx = jp.prune(optax.adamw(0.1), schedule=schedule, pattern=patterns.Blocks((4, 4)), scope=scope)
    start = {"kernel": jax.random.normal(key, (10, 7)), "bias": jnp.ones(7)}
    params, state, all_params, all_masks = run(tx, start, 6, grads)
    blocks = [(slice(i, i + 4), slice(j, j + 4)) for i in (0, 4, 8) for j in (0, 4)]
    kept = [[mask[block] for block in blocks] for mask in all_masks["kernel"]]
    assert all((b.all() == b.any()).all() for masks in kept for b in masks)
    alive = np.array([[b.any() for b in masks] for masks in kept])
    assert (~alive).sum(axis=1)[[0, 2, 4]].tolist() == [
        round(s * 6) for s in (float(schedule(0)), float(schedule(2)), 0.6)
    ]
    # The small ones at the edge are scored by the weights that they have.
    scores = np.array([np.abs(all_params["kernel"][3][block]).mean() for block in blocks])
    order = sorted(np.flatnonzero(alive[3]), key=lambda i: scores[i])
    gone = set(np.flatnonzero(alive[3] & ~alive[4]))
    assert gone and gone == set(order[: len(gone)])
    assert_zero_where_removed(params, jp.get_masks(state))


# Together with channels, and with a dense backward pass.


def test_2_of_4_among_the_channels_that_are_left(key):
    params = network(key)
    channels = jp.find_masks(params, 0.5, pattern=patterns.Channels(-1))
    masks = jp.find_masks(
        jp.apply_masks(params, channels), 0.5, scope=scopes.windows(4), within=channels
    )
    check_2_of_4_within(masks, channels)


@pytest.mark.parametrize("packed", [False, True])
def test_2_of_4_in_training_among_the_channels_that_are_left(key, packed):
    params = network(key)
    channels = jp.find_masks(params, 0.5, pattern=patterns.Channels(-1))
    tx = jp.prune(
        optax.adamw(0.1),
        schedule=schedules.linear(0.5, begin=1, end=5, every=2),
        scope=scopes.windows(4),
        packed=packed,
    )
    state = jp.with_masks(tx.init(params), channels)
    step = jax.jit(lambda p, s: tx.update(grads(p), s, p))
    for i in range(6):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
        masks = jp.get_masks(state)
        assert_zero_where_removed(params, channels)
        assert_zero_where_removed(params, masks)
        if i == 0:
            assert_trees_equal(jax.tree.map(lambda m, c: m | ~c, masks, channels), full(masks))
    check_2_of_4_within(masks, channels)


def full(masks):
    return jax.tree.map(jnp.ones_like, masks)


def check_2_of_4_within(masks, channels):
    """Exactly two of four in a channel that is left, none in one that was removed."""
    for mask, channel in zip(jax.tree.leaves(masks), jax.tree.leaves(channels), strict=True):
        counts = kept_in_windows(mask, 4)  # the windows last, the channels before them
        left = np.broadcast_to(channel.reshape(-1)[:, None], counts.shape)
        assert left.any() and not left.all()
        assert (counts == np.where(left, 2, 0)).all()


def test_input_channels_that_are_gone_count_among_the_removed_of_a_window(key):
    params = {"kernel": jax.random.normal(key, (8, 5))}
    inputs = jnp.array([True, False, True, False, False, False, False, True])[:, None]
    find = lambda sparsity: jp.find_masks(
        params, sparsity, scope=scopes.windows(4), within={"kernel": inputs}
    )
    # Two of the first window are left and stay; of the second there is one.
    assert (kept_in_windows(find(0.5)["kernel"], 4) == [2, 1]).all()
    assert (kept_in_windows(find(0.75)["kernel"], 4) == [1, 1]).all()


def test_2_of_4_with_straight_through_is_found_among_all_weights(key):
    schedule = schedules.linear(0.5, begin=0, end=20, every=2, initial=0.5)
    tx = jp.straight_through(optax.sgd(0.3), schedule=schedule, scope=scopes.windows(4))
    params = network(key)
    target = jax.tree.map(jnp.flip, params)

    def loss(params):
        far = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2) / 2, params, target)
        return sum(jax.tree.leaves(far))

    @jax.jit
    def step(params, state):
        slope = jax.grad(loss)(jp.forward_params(params, state))
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    state, revived = tx.init(params), 0
    for _ in range(21):
        before, handed = kernels(jp.get_masks(state)), params
        params, state = step(params, state)
        masks = kernels(jp.get_masks(state))
        assert all((kept_in_windows(mask, 4) == 2).all() for mask in masks.values())
        revived += sum(int((masks[name] & ~before[name]).sum()) for name in masks)
    assert revived > 0
    forward = jp.forward_params(params, state)
    assert_zero_where_removed(forward, jp.get_masks(state))
    want = jp.find_masks(handed, 0.5, scope=scopes.windows(4))
    assert_trees_equal(jp.get_masks(state), want)


# Bad input.


def test_an_input_axis_that_does_not_divide_is_refused_at_init_by_path(key):
    params = {"first": jax.random.normal(key, (6, 8)), "second": jax.random.normal(key, (8, 4))}
    schedule = schedules.linear(0.5, begin=0, end=4, every=2)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, scope=scopes.windows(4))
    with pytest.raises(ValueError, match=r"`windows\(m=4\)`.*'first'.*multiple of 4.*\(6, 8\)"):
        tx.init(params)
    # The way out that the message offers.
    tx = jp.prune(
        optax.sgd(0.1), schedule=schedule, scope=scopes.windows(4), where=jp.by_path("second")
    )
    masks = jp.get_masks(run(tx, params, 5)[1])
    assert masks["first"] is None and (kept_in_windows(masks["second"], 4) == 2).all()
