"""Tests of the criteria against a few lines of NumPy each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.flatten_util import ravel_pytree

import jaxprune as jp
from jaxprune import criteria, schedules, scopes
from tests.contract.tables import slow_lamp
from tests.helpers import TraceCount, assert_trees_equal, run

RNG = np.random.default_rng(0)
W = {"a": RNG.normal(size=(3, 4)).astype(np.float32), "b": RNG.normal(size=5).astype(np.float32)}
G = {"a": RNG.normal(size=(3, 4)).astype(np.float32), "b": RNG.normal(size=5).astype(np.float32)}

FISHER_EMA = criteria.fisher_ema(0.5)
ALL = {name: getattr(criteria, name) for name in criteria.__all__} | {"fisher_ema": FISHER_EMA}


def square_loss(params, batch):
    return 0.5 * sum(jnp.sum(batch * w * w) for w in jax.tree.leaves(params))


def scale(params, x):
    return jax.tree.map(lambda w: x * w, params)


def evidence_for(params, key):
    """All that any criterion asks for; the loss and the flow are sums over the weights."""
    ones = jax.tree.map(jnp.ones_like, params)
    functions = {"loss_fn": square_loss, "apply_fn": scale, "batch": jnp.ones(())}
    return {
        "grads": ones,
        "key": key,
        "state": ones,
        "params_init": ones,
        "norms": ones,
        **functions,
    }


# Each against its formula.


def test_magnitude_is_the_absolute_value():
    scores = criteria.magnitude(W)
    for name, w in W.items():
        np.testing.assert_array_equal(scores[name], np.abs(w))


def test_taylor_is_the_absolute_product_with_the_gradient():
    scores = criteria.taylor(W, grads=G)
    for name, w in W.items():
        np.testing.assert_array_equal(scores[name], np.abs(w * G[name]))


def test_random_draws_each_leaf_from_the_key_folded_with_its_place(key):
    scores = criteria.random(W, key=key)
    for i, name in enumerate(W):
        want = jax.random.uniform(jax.random.fold_in(key, i), W[name].shape)
        np.testing.assert_array_equal(scores[name], want)


def test_random_scores_of_equal_leaves_differ(key):
    scores = criteria.random({"a": jnp.ones(50), "b": jnp.ones(50)}, key=key)
    assert (scores["a"] != scores["b"]).all()


def test_random_scores_of_half_precision_weights_do_not_tie(key):
    scores = criteria.random({"w": jnp.ones(1000, jnp.bfloat16)}, key=key)["w"]
    assert len(np.unique(scores)) > 990


def test_fisher_is_half_the_squared_product_with_the_gradient():
    scores = criteria.fisher(W, grads=G)
    for name, w in W.items():
        np.testing.assert_allclose(scores[name], 0.5 * (w * G[name]) ** 2, rtol=1e-6)


def test_fisher_prefers_a_second_moment_to_squared_gradients():
    params, moment = {"w": jnp.array([2.0, 3.0])}, {"w": jnp.array([1.0, 4.0])}
    scores = criteria.fisher(params, grads={"w": jnp.array([9.0, 9.0])}, second_moment=moment)
    assert scores["w"].tolist() == [2.0, 18.0]


def test_fisher_of_float16_gradients_does_not_underflow():
    params = {"w": jnp.ones(2, jnp.float16)}
    scores = criteria.fisher(params, grads={"w": jnp.array([1e-4, 2e-4], jnp.float16)})["w"]
    assert 0 < scores[0] < scores[1] and scores.dtype == jnp.float32


def test_fisher_ema_averages_squared_gradients():
    criterion, params = criteria.fisher_ema(decay=0.75), {"w": jnp.array([2.0, 1.0])}
    state = criterion.init(params)
    assert state["w"].tolist() == [0.0, 0.0]
    state = criterion.update(state, params, {"w": jnp.array([2.0, 4.0])})
    assert state["w"].tolist() == [1.0, 4.0]
    state = criterion.update(state, params, {"w": jnp.array([0.0, -4.0])})
    assert state["w"].tolist() == [0.75, 7.0]
    assert criterion(params, state=state)["w"].tolist() == [1.5, 3.5]


def test_movement_is_minus_the_sum_of_weights_times_gradients():
    params, movement = {"w": jnp.array([2.0, 3.0])}, criteria.movement
    state = movement.update(movement.init(params), params, {"w": jnp.array([1.0, -1.0])})
    state = movement.update(state, {"w": jnp.array([1.0, 4.0])}, {"w": jnp.array([1.0, 1.0])})
    assert movement(params, state=state)["w"].tolist() == [-3.0, -1.0]


def test_magnitude_increase_is_the_growth_of_the_size():
    start = {"w": jnp.array([1.0, -4.0, 0.0])}
    scores = criteria.magnitude_increase({"w": jnp.array([-3.0, 1.0, 0.5])}, params_init=start)
    assert scores["w"].tolist() == [2.0, -3.0, 0.5]


# LAMP


def test_wanda_is_the_size_times_the_norm_of_the_input():
    norms = {"w": jnp.array([[4.0], [1.0]])}
    scores = criteria.wanda({"w": jnp.array([[1.0, -2.0], [3.0, 4.0]])}, norms=norms)
    assert scores["w"].tolist() == [[4.0, 8.0], [3.0, 4.0]]


def test_lamp_is_the_share_among_the_weights_that_are_as_large():
    scores = criteria.lamp({"w": jnp.array([3.0, -1.0, 2.0])})
    np.testing.assert_allclose(scores["w"], [1.0, 1 / 14, 4 / 13], rtol=1e-6)


def test_lamp_agrees_with_slow_numpy(key):
    params = {"a": jax.random.normal(key, (13, 7)), "b": jax.random.normal(key, (5,)).round()}
    for name, scores in criteria.lamp(params).items():
        np.testing.assert_allclose(scores, slow_lamp(np.float64(params[name])), rtol=1e-5)


def test_lamp_counts_the_earlier_of_two_equal_weights_as_the_larger():
    scores = criteria.lamp({"w": jnp.array([[-1.0, 1.0], [0.0, 1.0]])})["w"]
    np.testing.assert_allclose(scores, [[1.0, 1 / 2], [0.0, 1 / 3]], rtol=1e-6)


def test_lamp_of_a_leaf_of_zeros_is_zero():
    assert criteria.lamp({"w": jnp.zeros((2, 3))})["w"].tolist() == [[0.0] * 3] * 2


def test_lamp_does_not_underflow_where_all_weights_are_small():
    tiny = criteria.lamp({"w": jnp.array([3e-30, 1e-30, 2e-30])})["w"]
    np.testing.assert_allclose(tiny, slow_lamp(np.array([3.0, 1.0, 2.0])), rtol=1e-5)


def test_lamp_leaves_nan_out_of_the_sums():
    scores = criteria.lamp({"w": jnp.array([3.0, jnp.nan, 4.0])})["w"]
    np.testing.assert_allclose(scores, [9 / 25, np.nan, 1.0], rtol=1e-6)


# Whole numbers up to 64: the squares of all of them are exact, and ties are frequent.
WHOLE = hnp.arrays(np.float32, (4, 5), elements=st.integers(-64, 64))


@settings(max_examples=60, deadline=None)
@given(w=WHOLE)
def test_lamp_orders_a_leaf_as_magnitude_does(w):
    size, scores = np.abs(w).ravel(), np.asarray(criteria.lamp({"w": w})["w"]).ravel()
    order = np.lexsort((np.arange(size.size), -size))  # among equals the earlier one first
    assert (np.diff(scores[order]) <= 0).all()
    assert (scores[size == 0] == 0).all() and (scores[size > 0] > 0).all()
    assert scores.max() == (1.0 if size.any() else 0.0)


@settings(max_examples=20, deadline=None)
@given(sparsity=st.floats(0.0, 1.0))
def test_lamp_per_leaf_finds_the_masks_of_magnitude(sparsity):
    lamp = jp.find_masks({"w": W["a"]}, sparsity, criterion=criteria.lamp)
    assert_trees_equal(lamp, jp.find_masks({"w": W["a"]}, sparsity))


@pytest.mark.parametrize("kept", [3, 4, 10])
def test_lamp_across_keeps_one_of_every_layer_whatever_their_scale(key, kept):
    keys = jax.random.split(key, 3)
    params = [
        size * jax.random.normal(k, (10, 20)) for k, size in zip(keys, (1e-6, 1, 1e3), strict=True)
    ]
    find = functools.partial(jp.find_masks, params, (600 - kept) / 600, scope=scopes.across)
    counts = [int(m.sum()) for m in find(criterion=criteria.lamp)]
    assert sum(counts) == kept and min(counts) >= 1
    assert [int(m.sum()) for m in find()] == [0, 0, kept]


# Criteria that look at a network.


def tiny_net(key):
    a, b, c = jax.random.split(key, 3)
    return {
        "Dense_0": {"kernel": jax.random.normal(a, (3, 4)), "bias": jax.random.normal(b, (4,))},
        "Dense_1": {"kernel": jax.random.normal(c, (4, 2)), "bias": jnp.zeros(2)},
    }


def forward(params, x):
    hidden = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
    return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"][None]


def net_loss(params, batch):
    x, y = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(forward(params, x), y))


def net_batch(key):
    return jax.random.normal(key, (16, 3)), jax.random.randint(key, (16,), 0, 2)


def scores_of(params, criterion, **evidence):
    """Give the scores that ``find_masks`` ranks."""
    seen = []

    def spy(part, **offered):
        scores = criterion(part, **offered)
        jax.debug.callback(seen.append, scores)
        return scores

    jp.find_masks(params, 0.5, criterion=spy, **evidence)
    jax.effects_barrier()
    return seen[0]


@functools.partial(jax.jit, static_argnames="loss")
def dense_grasp(params, others, batch, loss):
    """The weights times the whole Hessian times the gradient."""
    flat, restore = ravel_pytree(params)
    at = lambda flat: loss(restore(flat), others, batch)
    return restore(flat * (jax.hessian(at)(flat) @ jax.grad(at)(flat)))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_grasp_is_the_weight_times_the_dense_hessian_times_the_gradient(key):
    params, batch = tiny_net(key), net_batch(key)
    scores = jax.jit(functools.partial(criteria.grasp, loss_fn=net_loss))(params, batch=batch)
    want = dense_grasp(params, None, batch, lambda p, _, batch: net_loss(p, batch))
    assert_close(scores, want)
    assert min(map(jnp.min, jax.tree.leaves(scores))) < 0  # the sign counts


def test_grasp_in_find_masks_takes_the_hessian_of_the_prunable_part(key):
    params, batch = tiny_net(key), net_batch(key)
    offered = {"criterion": criteria.grasp, "loss_fn": net_loss, "batch": batch}

    def loss(kernels, params, batch):
        full = {name: {**params[name], "kernel": kernels[name]["kernel"]} for name in params}
        return net_loss(full, batch)

    scores = scores_of(params, **offered)
    assert scores["Dense_0"]["bias"] is None
    assert_close(scores, dense_grasp(jp.prunable(params), params, batch, loss))
    masks = jp.find_masks(params, 0.5, scope=scopes.across, **offered)
    assert_trees_equal(masks, jp.make_masks(scores, 0.5, scope=scopes.across))


def test_snip_is_the_slope_of_the_loss_in_explicit_masks(key):
    params, batch = tiny_net(key), net_batch(key)
    ones = jax.tree.map(jnp.ones_like, params)
    masked = lambda masks: net_loss(jax.tree.map(jnp.multiply, params, masks), batch)
    slope = jax.tree.map(jnp.abs, jax.grad(masked)(ones))
    total = sum(s.sum() for s in jax.tree.leaves(slope))
    scores = criteria.snip(params, loss_fn=net_loss, batch=batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b / total, rtol=1e-4), scores, slope)


def test_snip_scores_sum_to_one_over_the_prunable_part(key):
    scores = scores_of(tiny_net(key), criteria.snip, loss_fn=net_loss, batch=net_batch(key))
    assert scores["Dense_0"]["bias"] is None
    assert float(sum(s.sum() for s in jax.tree.leaves(scores))) == pytest.approx(1.0, abs=1e-6)


def test_snip_of_float16_weights_does_not_underflow():
    params = {"w": jnp.array([1e-4, 2e-4], jnp.float16)}
    loss_fn = lambda p, slope: jnp.sum(p["w"] * slope)
    scores = criteria.snip(params, loss_fn=loss_fn, batch=jnp.full(2, 1e-4, jnp.float16))["w"]
    np.testing.assert_allclose(scores, [1 / 3, 2 / 3], rtol=1e-2)


def test_snip_of_a_flat_loss_is_zero():
    scores = criteria.snip({"w": jnp.ones(2)}, loss_fn=lambda p, _: 0.0 * p["w"].sum(), batch=None)
    assert scores["w"].tolist() == [0.0, 0.0]


def test_synflow_of_a_linear_chain_is_the_flow_through_each_weight():
    params = [jnp.array([[1.0, -2.0], [3.0, 0.0]]), jnp.array([[5.0], [-7.0]])]
    apply_fn = lambda p, x: x @ p[0] @ p[1]
    first, second = criteria.synflow(params, apply_fn=apply_fn, batch=jnp.array([[9.0, -9.0]]))
    # R = sum |w0| |w1|: a weight has all paths through it, the input being ones.
    assert first.tolist() == [[5.0, 14.0], [15.0, 0.0]]
    assert second.tolist() == [[20.0], [14.0]]


def test_synflow_conserves_the_flow_from_layer_to_layer(key):
    params = [jax.random.normal(k, (6, 6)) for k in jax.random.split(key, 3)]
    apply_fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p[0]) @ p[1]) @ p[2]
    scores = criteria.synflow(params, apply_fn=apply_fn, batch=jnp.zeros((1, 6)))
    flow = [float(s.sum()) for s in scores]
    np.testing.assert_allclose(flow, flow[0], rtol=1e-5)
    np.testing.assert_allclose(scores[0].sum(0), scores[1].sum(1), rtol=1e-5)


def test_synflow_replaces_floating_inputs_only():
    def apply_fn(params, batch):
        return {"out": params["w"][batch["token"]] * batch["x"], "more": [params["w"].sum()]}

    batch = {"token": jnp.array([1, 1]), "x": jnp.array([7.0, jnp.nan])}
    scores = criteria.synflow({"w": jnp.array([-2.0, 3.0])}, apply_fn=apply_fn, batch=batch)
    assert scores["w"].tolist() == [2.0, 9.0]


def test_criteria_of_a_network_work_inside_a_jitted_function(key):
    params, batch = tiny_net(key), net_batch(key)
    for criterion in (criteria.snip, criteria.grasp):
        find = lambda p, b, c=criterion: jp.find_masks(
            p, 0.5, criterion=c, scope=scopes.across, loss_fn=net_loss, batch=b
        )
        assert_trees_equal(jax.jit(find)(params, batch), find(params, batch))


# Every criterion on every kind of leaf.


@pytest.mark.parametrize("name", ALL)
def test_a_criterion_swallows_evidence_that_it_does_not_ask_for(key, name):
    scores = ALL[name](W, **evidence_for(W, key), value=1.0, whatever=None)
    assert jax.tree.map(jnp.shape, scores) == jax.tree.map(jnp.shape, W)


@pytest.mark.parametrize("name", ALL)
def test_a_criterion_keeps_holes(key, name):
    holed = {**W, "hole": None, "deep": {"hole": None}}
    scores = ALL[name](holed, **evidence_for(holed, key))
    assert jax.tree.map(jnp.shape, scores) == jax.tree.map(jnp.shape, holed)


SHAPES = [(), (1,), (0,), (3, 0), (1, 1, 2)]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("name", ALL)
def test_leaves_of_every_rank_and_size_and_dtype_are_scored(key, name):
    @jax.jit
    def score(key):
        params = [jnp.full(shape, 2.0) for shape in SHAPES]
        params += [jnp.linspace(-1.0, 1.0, 9).astype(dtype) for dtype in DTYPES]
        return params, ALL[name](params, **evidence_for(params, key))

    for w, scores in zip(*score(key), strict=True):
        assert scores.shape == w.shape and jnp.issubdtype(scores.dtype, jnp.floating)
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("name", sorted(set(ALL) - {"random", "movement", "snip"}))
def test_a_weight_that_is_nan_has_a_score_that_is_nan_and_no_other_has(key, name):
    params = {"w": jnp.array([[1.0, jnp.nan], [3.0, 2.0]])}
    evidence = evidence_for({"w": jnp.ones((2, 2))}, key)
    scores = ALL[name](params, **evidence)["w"]
    assert np.isnan(scores).tolist() == [[False, True], [False, False]]
    masks = jp.make_masks({"w": scores}, 0.25)
    assert masks["w"].tolist() == [[True, False], [True, True]]


def test_the_memory_of_half_precision_weights_is_float32():
    params = {"w": jnp.ones(2, jnp.bfloat16), "hole": None}
    for criterion in (criteria.movement, FISHER_EMA):
        state = criterion.init(params)
        for _ in range(2):
            assert state["hole"] is None and state["w"].dtype == jnp.float32
            state = criterion.update(state, params, params)


# Inside training.


def test_fisher_takes_the_second_moment_of_adam_through_update(key):
    params, grads = {"w": jax.random.normal(key, (8, 8))}, lambda p: jax.tree.map(jnp.cos, p)
    schedule = schedules.one_shot(0.5, at=3)
    tx = jp.prune(optax.adam(0.1), schedule=schedule, criterion=criteria.fisher)

    @jax.jit
    def step(params, state):
        moment = optax.tree.get(state, "nu")
        updates, state = tx.update(grads(params), state, params, second_moment=moment)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(4):
        before, moment = params, optax.tree.get(state, "nu")
        params, state = step(params, state)
        if i == 3:
            scores = 0.5 * np.asarray(moment["w"]) * np.asarray(before["w"]) ** 2
            want = jp.make_masks({"w": jnp.asarray(scores)}, 0.5)
            assert_trees_equal(jp.get_masks(state), want)
    by_hand = jp.find_masks(before, 0.5, criterion=criteria.fisher, second_moment=moment)
    assert_trees_equal(by_hand, want)
    from_grads = jp.find_masks(before, 0.5, criterion=criteria.fisher, grads=grads(before))
    assert not (from_grads["w"] == want["w"]).all()


@pytest.mark.parametrize("criterion", [criteria.movement, FISHER_EMA], ids=["movement", "fisher"])
def test_a_memory_in_a_scan_equals_one_threaded_by_hand(key, criterion):
    params = {"kernel": jax.random.normal(key, (6, 5)), "bias": jnp.ones(5)}
    grads = lambda p: jax.tree.map(lambda w: w - jnp.cos(3 * w), p)
    schedule = schedules.cubic(0.6, begin=1, end=4, every=3)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, criterion=criterion)
    _, state, all_params, all_masks = run(tx, params, 6, grads)

    memory, masks = criterion.init({"w": params["kernel"]}), None
    for i in range(6):
        w = params["kernel"]
        memory = criterion.update(memory, {"w": w}, {"w": grads(w)})
        if i in (1, 4):
            scores = criterion({"w": w}, state=memory)
            masks = jp.make_masks(scores, float(schedule(i)), within=masks)
        moved = w - 0.1 * grads(w)
        moved = moved if masks is None else jnp.where(masks["w"], moved, 0.0)
        params = {"kernel": moved, "bias": params["bias"] - 0.1 * grads(params["bias"])}
        np.testing.assert_allclose(all_params["kernel"][i], moved, rtol=1e-4, atol=1e-6)
        if masks is not None:
            np.testing.assert_array_equal(all_masks["kernel"][i], masks["w"])
    assert state.criterion_state["bias"] is None
    got = state.criterion_state["kernel"]
    np.testing.assert_allclose(got, memory["w"], rtol=1e-4, atol=1e-6)


def test_a_memory_lives_in_the_state_and_a_step_compiles_once(key):
    params = {"w": jax.random.normal(key, (8, 4))}
    schedule = schedules.linear(0.5, begin=0, end=3, every=1)
    tx = jp.prune(optax.adam(0.1), schedule=schedule, criterion=criteria.movement)
    count = TraceCount(lambda p, s: tx.update(p, s, p))
    step, state = jax.jit(count), tx.init(params)
    for _ in range(4):
        updates, new = step(params, state)
        assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, state)
        params, state = optax.apply_updates(params, updates), new
    assert count.count == 1 and jp.sparsity(jp.get_masks(state), params) == 0.5


def test_the_movement_of_a_removed_weight_stands_still_under_prune(key):
    params = {"w": jax.random.normal(key, (8, 4))}
    tx = jp.prune(optax.sgd(0.1), schedule=schedules.constant(0.5), criterion=criteria.movement)
    one, two = (run(tx, params, steps)[1] for steps in (1, 5))
    gone = ~jp.get_masks(one)["w"]
    before, after = one.criterion_state["w"], two.criterion_state["w"]
    np.testing.assert_array_equal(before[gone], after[gone])
    assert (before != after)[~gone].all()


def test_under_straight_through_removed_weights_move_on_and_may_return():
    # One gradient for the large weight, then three that pull the small one up.
    params, pull = {"w": jnp.array([[1.0, 2.0]])}, {"w": jnp.array([[-1.0, 0.0]])}
    schedule = schedules.linear(0.5, begin=0, end=3, every=1, initial=0.5)
    tx = jp.straight_through(optax.sgd(1.0), schedule=schedule, criterion=criteria.movement)
    state = tx.init(params)
    history = []
    for grads in ({"w": jnp.array([[0.0, -1.0]])}, pull, pull, pull):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        history.append(jp.get_masks(state)["w"].tolist())
    # Movements 0 and 2, then 1 and 2, 3 and 2, 6 and 2.
    assert history == [[[False, True]]] * 2 + [[[True, False]]] * 2
    assert state.masked.criterion_state["w"].tolist() == [[6.0, 2.0]]
    assert jp.forward_params(params, state)["w"].tolist() == [[4.0, 0.0]]


def test_magnitude_increase_takes_the_start_through_update(key):
    start = {"w": jax.random.normal(key, (8, 4))}
    grads = lambda p: jax.tree.map(jnp.sin, p)
    tx = jp.prune(
        optax.sgd(0.5),
        schedule=schedules.one_shot(0.5, at=2),
        criterion=criteria.magnitude_increase,
    )
    state, all_params, all_masks = run(tx, start, 4, grads, params_init=start)[1:]
    growth = np.abs(all_params["w"][1]) - np.abs(start["w"])
    assert_trees_equal(jp.get_masks(state), jp.make_masks({"w": growth}, 0.5))
    assert all_masks["w"][1].all()


# Bad input.

NEEDS = [
    (criteria.taylor, "grads", {}),
    (criteria.random, "key", {}),
    (criteria.snip, "loss_fn", {"batch": 0.0}),
    (criteria.snip, "batch", {"loss_fn": square_loss}),
    (criteria.grasp, "loss_fn", {"batch": 0.0}),
    (criteria.grasp, "batch", {"loss_fn": square_loss}),
    (criteria.synflow, "apply_fn", {"batch": 0.0}),
    (criteria.synflow, "batch", {"apply_fn": scale}),
    (criteria.magnitude_increase, "params_init", {}),
    (criteria.wanda, "norms", {}),
]


@pytest.mark.parametrize("criterion, missing, others", NEEDS)
def test_missing_evidence_is_named(criterion, missing, others):
    name = getattr(criterion, "__name__", type(criterion).__name__)
    words = rf"criterion `{name}` needs `{missing}`.*not given.*`{missing}=...`"
    with pytest.raises(TypeError, match=words):
        jp.find_masks({"kernel": jnp.ones((2, 2))}, 0.5, criterion=criterion, **others)


@pytest.mark.parametrize("criterion", [criteria.movement, FISHER_EMA])
def test_a_criterion_with_memory_says_who_fills_it(criterion):
    words = "ranks by what it remembers of training.*`jp.prune`.*`criterion.init"
    with pytest.raises(TypeError, match=words):
        jp.find_masks({"kernel": jnp.ones((2, 2))}, 0.5, criterion=criterion)


def test_all_evidence_that_is_missing_is_named_at_once():
    with pytest.raises(TypeError, match=r"`snip` needs `loss_fn`, `batch`"):
        jp.find_masks({"kernel": jnp.ones((2, 2))}, 0.5, criterion=criteria.snip)


def test_fisher_says_that_one_of_two_will_do():
    with pytest.raises(TypeError, match=r"`fisher` needs `grads` or `second_moment`, and neither"):
        jp.find_masks({"kernel": jnp.ones((2, 2))}, 0.5, criterion=criteria.fisher)


TREES_OF_EVIDENCE = [
    (criteria.taylor, "grads"),
    (criteria.fisher, "grads"),
    (criteria.fisher, "second_moment"),
    (criteria.magnitude_increase, "params_init"),
    (criteria.wanda, "norms"),
    (criteria.movement, "state"),
    (FISHER_EMA, "state"),
]


@pytest.mark.parametrize("criterion, name", TREES_OF_EVIDENCE)
def test_evidence_that_is_no_tree_like_the_params_is_refused_by_path(criterion, name):
    params = {"Dense_0": {"kernel": jnp.ones((2, 3))}, "Dense_1": {"kernel": jnp.ones((3, 2))}}
    find = lambda tree: jp.find_masks(params, 0.5, criterion=criterion, **{name: tree})
    words = rf"`{'second_moment' if criterion is FISHER_EMA else name}` is not a tree like"
    with pytest.raises(ValueError, match=words + r".*nothing at 'Dense_1/kernel'"):
        find({"Dense_0": params["Dense_0"]})
    with pytest.raises(ValueError, match=words + r".*unknown 'Dense_2/kernel'"):
        find({**params, "Dense_2": params["Dense_0"]})
    with pytest.raises(ValueError, match=words + r".*'Dense_1/kernel' has shape \(3,\).*\(3, 2\)"):
        find({**params, "Dense_1": {"kernel": jnp.ones(3)}})


def test_movement_names_gradients_that_do_not_fit():
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"`grads` is not a tree like.*'w' has shape \(2,\)"):
        criteria.movement.update(criteria.movement.init(params), params, {"w": jnp.ones(2)})


@pytest.mark.parametrize("bad", [1.0, -0.1, float("nan")])
def test_fisher_ema_refuses_what_is_no_average(bad):
    with pytest.raises(ValueError, match=r"`fisher_ema\(decay=.*\)` is outside \[0, 1\).*0.999"):
        criteria.fisher_ema(bad)


FUNCTIONS = [
    (criteria.snip, "loss_fn", lambda p, batch: jnp.sum(p["a"]["w"]) * batch),
    (criteria.grasp, "loss_fn", lambda p, batch: jnp.sum(p["a"]["w"] ** 2) * batch),
]


@pytest.mark.parametrize("criterion, name, loss", FUNCTIONS)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_on_the_batch_is_refused(criterion, name, loss, bad):
    params = {"a": {"w": jnp.ones((2, 2))}}
    offered = {name: loss, "batch": jnp.float32(bad)}
    words = rf"`{criterion.__name__}` gives scores.*not finite at 'a/w'.*`{name}`.*batch"
    with pytest.raises(ValueError, match=words):
        jp.find_masks(params, 0.5, criterion=criterion, **offered)
    # Inside a trace nobody can look: the scores rank last, and the count is the same.
    find = jax.jit(lambda p, b: jp.find_masks(p, 0.5, criterion=criterion, loss_fn=loss, batch=b))
    assert int(find(params, offered["batch"])["a"]["w"].sum()) == 2


def test_an_output_that_is_not_finite_is_refused():
    params = {"w": jnp.full((2, 2), 1e30)}
    offered = {"apply_fn": lambda p, x: x @ p["w"] @ p["w"], "batch": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match=r"`synflow` gives scores.*not finite at 'w'.*`apply_fn`"):
        jp.find_masks(params, 0.5, criterion=criteria.synflow, **offered)


def test_a_nan_in_any_round_is_refused():
    def apply_fn(params, x):  # not a number as soon as a weight is gone
        return x @ params["w"] * jnp.where((params["w"] == 0).any(), jnp.nan, 1.0)

    offered = {"criterion": criteria.synflow, "apply_fn": apply_fn, "batch": jnp.ones((1, 2))}
    params = {"w": jnp.ones((2, 2))}
    jp.find_masks(params, 0.75, **offered)
    with pytest.raises(ValueError, match=r"not finite at 'w'"):
        jp.find_masks(params, 0.75, rounds=2, **offered)


def test_nan_weights_alone_are_not_the_fault_of_a_loss():
    params = {"w": jnp.array([[1.0, jnp.nan], [3.0, 2.0]])}
    offered = {"loss_fn": square_loss, "batch": jnp.ones(())}
    masks = jp.find_masks(params, 0.25, criterion=criteria.grasp, **offered)
    assert masks["w"].tolist() == [[True, False], [True, True]]


def test_a_loss_that_is_no_scalar_is_refused():
    with pytest.raises(TypeError, match=r"`snip` got a `loss_fn` that returns .* a scalar"):
        jp.find_masks(
            {"w": jnp.ones((2, 2))},
            0.5,
            criterion=criteria.snip,
            loss_fn=lambda p, _: p["w"],
            batch=0.0,
        )


def test_taylor_of_float16_does_not_underflow():
    params = {"w": jnp.array([1e-4, 2e-4], jnp.float16)}
    scores = criteria.taylor(params, grads={"w": jnp.full(2, 1e-4, jnp.float16)})["w"]
    assert 0 < scores[0] < scores[1]


def test_a_step_that_is_not_finite_is_forgotten():
    params = {"w": jnp.array([1.0, 2.0])}
    for criterion in (criteria.movement, criteria.fisher_ema(0.5)):
        first = criterion.update(criterion.init(params), params, {"w": jnp.array([1.0, 1.0])})
        second = criterion.update(first, params, {"w": jnp.array([jnp.nan, jnp.inf])})
        np.testing.assert_array_equal(second["w"], first["w"])


def test_moments_with_holes_of_another_optimizer_are_evidence_too():
    """`multi_transform` leaves MaskedNode where a leaf belongs to another optimizer."""
    params = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.ones(2)}
    rest = {"kernel": "matrix", "bias": "rest"}
    tx = optax.multi_transform({"matrix": optax.adam(0.1), "rest": optax.sgd(0.1)}, rest)
    _, state = tx.update(params, tx.init(params), params)
    masks = jp.find_masks(
        params, 0.5, criterion=criteria.fisher, second_moment=optax.tree.get(state, "nu")
    )
    assert masks["kernel"].tolist() == [[False, True]]


def test_scores_that_protect_by_infinity_are_no_fault_of_a_function_that_is_not_asked():
    protect = lambda p, **_: jax.tree.map(lambda w: jnp.where(w > 1, jnp.inf, w), p)
    params = {"w": jnp.array([[1.0, 2.0]])}
    masks = jp.find_masks(params, 0.5, criterion=protect, loss_fn=lambda p, b: 0.0)
    assert masks["w"].tolist() == [[False, True]]


@pytest.mark.parametrize("criterion", [criteria.snip, criteria.grasp])
def test_a_loss_that_is_no_scalar_is_refused_by_name(criterion):
    with pytest.raises(TypeError, match=rf"`{criterion.__name__}` got a `loss_fn` that returns"):
        criterion({"w": jnp.ones(2)}, loss_fn=lambda p, b: p["w"] * b, batch=1.0)


def test_a_criterion_that_cannot_take_what_prune_offers_is_told_apart_from_its_factory():
    tx = jp.prune(
        optax.sgd(0.1), schedule=jp.schedules.constant(0.5), criterion=criteria.fisher_ema
    )
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"`fisher_ema` takes no `grads`.*call it"):
        tx.update(params, tx.init(params), params)


def test_extra_arguments_of_an_optimizer_may_be_named_as_ours():
    seen = []

    def update(updates, state, params=None, *, step, **_):
        seen.append(step)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = jp.prune(inner, schedule=jp.schedules.constant(0.5))
    params = {"w": jnp.ones((2, 2))}
    tx.update(params, tx.init(params), params, step=3, where="here", within=None)
    assert seen == [3]


def test_lamp_refuses_leaves_whose_places_overflow():
    huge = {"w": jax.ShapeDtypeStruct((2**16, 2**15), jnp.bfloat16)}
    with pytest.raises(NotImplementedError, match=r"\(65536, 32768\).*no int32.*erk"):
        jax.eval_shape(jp.criteria.lamp, huge)


STACKS = {
    "up": jnp.asarray(RNG.normal(size=(3, 8, 6)), jnp.float32),
    "bias": jnp.zeros((3, 6)),
    "conv": jnp.asarray(RNG.normal(size=(3, 3, 4, 6)), jnp.bfloat16),
}
NORMS = {
    "up": jnp.asarray(RNG.uniform(1, 9, size=(3, 8, 1)), jnp.float32),
    "bias": None,
    "conv": jnp.asarray(RNG.uniform(1, 9, size=(1, 1, 4, 1)), jnp.float32),
}
ROLES = jp.Layout({"up": ("layer", "in", "out"), "conv": ("window", "window", "in", "out")})


@pytest.mark.parametrize("layout", [None, ROLES], ids=["plain", "layout"])
@pytest.mark.parametrize(
    "scope",
    [scopes.across, scopes.per_output, scopes.windows(2)],
    ids=lambda scope: getattr(scope, "__name__", str(scope)),
)
def test_norms_that_broadcast_rank_as_whole_ones_do(scope, layout):
    where = jp.exclude("bias")
    settings = {"where": where, "layout": layout, "scope": scope}
    found = jp.find_masks(STACKS, 0.5, criterion=criteria.wanda, norms=NORMS, **settings)

    @jp.elementwise
    def slow(params, *, norms, **_):
        return jax.tree.map(lambda w, n: jnp.abs(w.astype(jnp.float32)) * n, params, norms)

    part = jp.prunable(STACKS, where=where)
    whole = jax.tree.map(lambda w, n: jnp.broadcast_to(n, w.shape), part, NORMS)
    want = jp.find_masks(STACKS, 0.5, criterion=slow, norms=whole, **settings)
    assert_trees_equal(found, want)
    scores = criteria.wanda(STACKS, norms=NORMS)
    assert scores["bias"] is None
    assert_trees_equal(jp.make_masks(scores, 0.5, layout=layout, scope=scope), want)
    tx = jp.prune(
        optax.sgd(0.1), schedule=schedules.constant(0.5), criterion=criteria.wanda, **settings
    )
    _, state = jax.jit(tx.update)(STACKS, tx.init(STACKS), STACKS, norms=NORMS)
    assert_trees_equal(jp.get_masks(state), want)


@pytest.mark.parametrize(
    "norms, words",
    [
        ({"conv": jnp.ones((3, 3, 5, 1))}, r"'conv' has shape \(3, 3, 5, 1\), in the params"),
        ({"up": jnp.ones((8, 1))}, r"'up' has shape \(8, 1\).*\(3, 8, 6\)\. Pass.*input_stats"),
        ({"up": None}, r"`wanda` gives no scores for 'up': its evidence is None there\. Leave"),
    ],
)
def test_norms_that_do_not_broadcast_are_refused_by_path(norms, words):
    where = jp.exclude("bias")
    with pytest.raises(ValueError, match=words):
        jp.find_masks(STACKS, 0.5, criterion=criteria.wanda, norms={**NORMS, **norms}, where=where)
