"""Tests of straight_through and forward_params: dense weights, sparse forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.contract.laws import leaves
from tests.contract.tables import OPTIMIZERS, PATTERNS, WRAPPERS, small_params
from tests.helpers import assert_trees_equal, assert_zero_where_removed, slow_keep

W = {"kernel": jnp.array([[1.0, 4.0]]), "bias": jnp.array([1.0, 1.0])}
LAST = {"kernel": jnp.array([[False, True]]), "bias": None}
EVENTS = (1, 3, 5)
HALF = schedules.linear(0.5, begin=1, end=5, every=2, initial=0.5)
STEPS = 7


def through(inner, **settings):
    return jp.straight_through(inner, **{"schedule": HALF, **settings})


def gradients(params, steps=STEPS):
    """Gradients of few bits, other ones at each step: sums of them and of weights are exact."""
    rng = np.random.default_rng(3)
    draw = lambda p: jnp.asarray(rng.integers(-16, 17, (steps, *p.shape)) / 8, p.dtype)
    return jax.tree.map(draw, params)


def train(tx, params, all_grads, steps=STEPS, by_operation=False):
    """Train; give the params and the state after every step, each in a program or op by op."""

    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update = update if by_operation else jax.jit(update)
    history, state = [], jax.jit(tx.init)(params)
    for step in range(steps):
        grads = jax.tree.map(lambda g: g[step], all_grads)  # noqa: B023
        params, state = update(grads, state, params)
        history.append((params, state))
    return history


# The forward pass.


def test_the_forward_pass_sees_exact_zeros_whatever_the_weights_are():
    state = jp.with_masks(through(optax.sgd(1.0)).init(W), LAST)
    for bad in (1.0, jnp.inf, jnp.nan):
        seen = jp.forward_params({**W, "kernel": jnp.array([[bad, 4.0]])}, state)
        assert seen["kernel"].tolist() == [[0.0, 4.0]]
        assert seen["bias"].tolist() == [1.0, 1.0]


def test_the_forward_pass_is_dense_until_the_first_event():
    assert_trees_equal(jp.forward_params(W, through(optax.sgd(1.0)).init(W)), W)


def test_gradients_pass_straight_through():
    state = jp.with_masks(through(optax.sgd(1.0)).init(W), LAST)
    loss = lambda p: jnp.sum((p["kernel"] - 3.0) ** 2) + jnp.sum(p["bias"] ** 3)
    at = jax.grad(loss)(jp.forward_params(W, state))
    across = jax.grad(lambda p: loss(jp.forward_params(p, state)))(W)
    assert at["kernel"].tolist() == [[-6.0, 2.0]]  # at 0 and 4
    assert_trees_equal(across, at)
    tangent = jax.tree.map(jnp.ones_like, W)
    seen = jax.jvp(lambda p: jp.forward_params(p, state), (W,), (tangent,))[1]
    assert_trees_equal(seen, tangent)


# Masks, against a slow loop.

SETTINGS = {
    "weights": {},
    "across": {"scope": scopes.across},
    "channels": {"pattern": PATTERNS["Channels"]},
    "blocks": {"pattern": PATTERNS["Blocks"]},
    "windows": {"scope": scopes.windows(4)},
    "windows of vectors": {"pattern": patterns.Blocks((1, 2)), "scope": scopes.windows(4)},
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("across", "blocks"))) for n in SETTINGS],
)
def test_masks_are_found_among_the_weights_handed_to_every_event(name):
    params = small_params()
    tx = through(optax.sgd(0.25), **SETTINGS[name])
    history = train(tx, params, gradients(params))
    bare = train(optax.sgd(0.25), params, gradients(params))
    handed, want = params, jp.get_masks(tx.init(params))
    for step, ((params, state), (dense, _)) in enumerate(zip(history, bare, strict=True)):
        assert_trees_equal(params, dense)  # nothing is ever zeroed
        want = jp.find_masks(handed, 0.5, **SETTINGS[name]) if step in EVENTS else want
        handed = params
        assert_trees_equal(jp.get_masks(state), want)
        assert_zero_where_removed(jp.forward_params(params, state), jp.get_masks(state))


def test_masks_are_those_of_a_slow_loop_and_change_in_both_directions():
    params = small_params()
    masks = {path: np.ones(w.shape, bool) for path, w in leaves(jp.prunable(params)).items()}
    before, revived = masks, 0
    w, all_grads = leaves(params), gradients(params)
    history = train(through(optax.sgd(0.25)), params, all_grads)
    for step, (_, state) in enumerate(history):
        if step in EVENTS:
            before = masks
            masks = {path: slow_keep(np.abs(w[path]), w[path].size // 2) for path in masks}
            revived += sum(int((masks[path] & ~before[path]).sum()) for path in masks)
        grads = leaves(jax.tree.map(lambda g: g[step], all_grads))  # noqa: B023
        w = {path: p - 0.25 * grads[path] for path, p in w.items()}
        for path, m in leaves(jp.get_masks(state)).items():
            np.testing.assert_array_equal(m, masks[path], f"{path} at {step}")
    assert revived > 0


def test_a_weight_that_was_removed_comes_back():
    tx = through(optax.sgd(1.0), schedule=schedules.constant(0.5, end=2))
    state, params = tx.init(W), W
    for want in ([[0.0, 4.0]], [[0.0, 4.0]], [[7.0, 0.0]]):
        updates, state = tx.update(
            {"kernel": jnp.array([[-2.0, 0.0]]), "bias": W["bias"]}, state, params
        )
        params = optax.apply_updates(params, updates)
        assert jp.forward_params(params, state)["kernel"].tolist() == want
    assert params["kernel"].tolist() == [[7.0, 4.0]]


def test_a_ramp_arrives_and_the_forward_pass_is_exactly_as_sparse():
    params = small_params()
    tx = through(optax.adam(0.1), schedule=schedules.cubic(0.7, begin=0, end=6, every=2))
    params, state = train(tx, params, gradients(params))[-1]
    for path, m in leaves(jp.get_masks(state)).items():
        assert int((~m).sum()) == round(0.7 * m.size)
        assert int((leaves(jp.forward_params(params, state))[path] == 0).sum()) == round(
            0.7 * m.size
        )
        assert (leaves(params)[path] != 0).all()


def test_random_draws_a_new_mask_at_each_event_and_the_same_ones_again(key):
    params = small_params()
    tx = through(optax.sgd(0.0), criterion=criteria.random, key=key)
    masks = [jp.get_masks(state) for _, state in train(tx, params, gradients(params))]
    again = [jp.get_masks(state) for _, state in train(tx, params, gradients(params))]
    for step in EVENTS:
        drawn = jp.find_masks(
            params, 0.5, criterion=criteria.random, key=jax.random.fold_in(key, step)
        )
        assert_trees_equal(masks[step], drawn)
    assert (masks[1]["b"]["kernel"] != masks[3]["b"]["kernel"]).any()
    for a, b in zip(masks, again, strict=True):
        assert_trees_equal(a, b)


def test_a_criterion_with_memory_goes_on_remembering_removed_weights():
    params = small_params()
    all_grads = gradients(params)
    w, moved = leaves(params), {p: np.zeros_like(x) for p, x in leaves(params).items()}
    for step, (_, state) in enumerate(
        train(through(optax.sgd(0.25), criterion=criteria.movement), params, all_grads)
    ):
        grads = leaves(jax.tree.map(lambda g: g[step], all_grads))  # noqa: B023
        moved = {path: moved[path] - w[path] * grads[path] for path in w}
        w = {path: w[path] - 0.25 * grads[path] for path in w}
        memory = leaves(state.masked.criterion_state)
        assert set(memory) == {("a", "kernel"), ("b", "kernel")}
        for path, m in leaves(jp.get_masks(state)).items():
            np.testing.assert_array_equal(memory[path], moved[path])
            if step in EVENTS:
                np.testing.assert_array_equal(m, slow_keep(moved[path], m.size // 2))


@pytest.mark.parametrize("name", ["weights", "channels"])
def test_packed_masks_are_the_same_masks(name):
    params = small_params()
    make = lambda packed: through(optax.sgd(0.25), packed=packed, **SETTINGS[name])
    plain, bits = (train(make(packed), params, gradients(params)) for packed in (False, True))
    for (_, a), (p, b) in zip(plain, bits, strict=True):
        assert isinstance(b.masked.masks["a"]["kernel"], jp.Packed)
        assert_trees_equal(jp.get_masks(a), jp.get_masks(b))
        assert_trees_equal(jp.forward_params(p, a), jp.forward_params(p, b))


# Optimizers and transformations; scan, cond, donation and one trace are in contract/.


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"lbfgs"}))  # which is in contract/
def test_the_optimizer_never_learns_of_the_masks(name):
    params = small_params()
    got = train(through(OPTIMIZERS[name]()), params, gradients(params), 2, True)
    want = train(OPTIMIZERS[name](), params, gradients(params), 2, True)
    assert_trees_equal(got[-1][0], want[-1][0])
    assert_trees_equal(got[-1][1].masked.inner_state, want[-1][1])


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_forward_pass_finds_its_masks_however_deep_they_are_nested(name):
    params = small_params()
    masks = jp.find_masks(params, 0.5)
    with jax.disable_jit():
        state = WRAPPERS[name](through).init(params)
    seen = jp.forward_params(params, state)
    assert_trees_equal(jax.tree.leaves(seen), jax.tree.leaves(params))
    seen = jp.forward_params(params, jp.with_masks(state, masks))
    assert_trees_equal(seen, jp.apply_masks(params, masks))


def test_seeds_train_side_by_side_under_vmap_with_one_count(key):
    keys = jax.random.split(key, 3)
    batch = {"w": jax.random.normal(key, (3, 8, 8))}
    axes = jp.StraightThroughState(
        jp.PruneState(count=None, masks=0, inner_state=0, criterion_state=0, key=0)
    )
    tx = lambda k: through(optax.sgd(0.1), criterion=criteria.random, key=k)

    def step(params, state):
        grads = jp.forward_params(params, state)
        updates, state = tx(key).update(grads, state, params)  # the key is in the state
        return optax.apply_updates(params, updates), state

    @jax.jit
    def together(keys, params):
        state = jax.vmap(lambda k, p: tx(k).init(p), out_axes=axes)(keys, params)
        seeds = jax.vmap(step, in_axes=(0, axes), out_axes=(0, axes))
        return jax.lax.fori_loop(0, STEPS, lambda _, c: seeds(*c), (params, state))

    params, state = together(keys, batch)
    assert state.masked.count.shape == ()
    alone, init = jax.jit(step), jax.jit(lambda k, p: tx(k).init(p))
    for i, k in enumerate(keys):
        p = {"w": batch["w"][i]}
        s = init(k, p)
        for _ in range(STEPS):
            p, s = alone(p, s)
        np.testing.assert_array_equal(jp.get_masks(state)["w"][i], jp.get_masks(s)["w"])
        np.testing.assert_allclose(params["w"][i], p["w"], rtol=1e-5, atol=1e-6)


def test_masks_put_in_hold_until_the_next_event():
    state = jp.with_masks(through(optax.sgd(0.0)).init(W), LAST)
    tx = through(optax.sgd(0.0), schedule=schedules.one_shot(0.5, at=1))
    for want in ([[False, True]], [[True, False]]):
        assert jp.get_masks(state)["kernel"].tolist() == want
        swapped = {**W, "kernel": jnp.array([[4.0, 1.0]])}
        for _ in range(2):
            _, state = tx.update(W, state, swapped)


# Bad input, checked at the door.


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(0.1),
        jp.hold(optax.adam(0.1)),
        jp.prune(optax.adam(0.1), schedule=HALF),
        jp.dynamic.rigl(optax.adam(0.1), sparsity=0.5, begin=0, end=1, every=1),
    ],
    ids=["adam", "hold", "prune", "rigl"],
)
def test_forward_params_without_straight_through_is_refused(tx):
    with pytest.raises(ValueError, match=r"`forward_params` got .* without `jp.straight_through`"):
        jp.forward_params(W, tx.init(W))


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(through(optax.sgd(0.1)), through(optax.sgd(0.1))),
        through(jp.hold(optax.sgd(0.1))),
        through(through(optax.sgd(0.1))),
    ],
    ids=["in a row", "around hold", "in one another"],
)
def test_a_state_with_several_masks_is_refused(tx):
    with pytest.raises(ValueError, match=r"holds 2 pruners, want one.*belongs to one"):
        jp.forward_params(W, jax.jit(tx.init)(W))


def test_params_that_the_masks_do_not_mirror_are_refused():
    state = through(optax.sgd(0.1)).init(W)
    with pytest.raises(ValueError, match=r"`masks` is not a tree like the params.*'kernel'"):
        jp.forward_params({"bias": W["bias"]}, state)
    with pytest.raises(ValueError, match=r"`masks` is not .*'kernel' has shape \(1, 2\)"):
        jp.forward_params({**W, "kernel": jnp.ones((1, 3))}, state)


def test_updates_that_do_not_fit_are_refused():
    tx, params = through(optax.adam(0.1)), small_params()
    state = tx.init(params)
    short = {"a": params["a"]}
    wide = {**params, "b": {"kernel": jnp.ones((16, 7))}}
    with pytest.raises(ValueError, match="without params"):
        tx.update(params, state)
    with pytest.raises(ValueError, match=r"`grads` is not a tree like .* nothing at 'b/kernel'"):
        tx.update(short, state, params)
    with pytest.raises(ValueError, match=r"`grads` .*'b/kernel' has shape \(16, 7\).*\(16, 6\)"):
        tx.update(wide, state, params)
    with pytest.raises(ValueError, match=r"`masks` is not a tree like the params.*'b/kernel'"):
        tx.update(short, state, short)
    some = jp.with_masks(state, {**jp.dense_masks(params), "b": {"kernel": None}})
    with pytest.raises(
        ValueError,
        match=r"`straight_through` finds masks for 'a/kernel', 'b/kernel', .* for 'a/kernel'\. Put",
    ):
        tx.update(params, some, params)


@pytest.mark.parametrize("bad", [0.9, None, lambda step: 0.5])
def test_what_is_no_schedule_is_refused_by_name(bad):
    with pytest.raises(TypeError, match=r"`straight_through` got schedule=.*when it is due"):
        through(optax.sgd(0.1), schedule=bad)


def test_settings_that_make_no_sense_are_refused_by_name():
    with pytest.raises(TypeError, match=r"`straight_through` wraps an optax optimizer, but got"):
        through(optax.adam)
    with pytest.raises(TypeError, match=r"`random` needs a random key.*to `straight_through`"):
        through(optax.sgd(0.1), criterion=criteria.random)
    with pytest.raises(ValueError, match="No leaf of `params` is prunable"):
        through(optax.sgd(0.1)).init({"bias": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"`windows\(m=2\)`.*`Channels`"):
        tx = through(optax.sgd(0.1), pattern=patterns.Channels(), scope=scopes.windows(2))
        tx.init(W)
    needy = through(optax.sgd(0.1), criterion=lambda params, *, fisher, **_: fisher)
    with pytest.raises(TypeError, match=r"needs `fisher`, which was not given"):
        needy.update(W, needy.init(W), W)
