"""Tests of prune, hold, with_masks and get_masks; the optimizers themselves are in contract/."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.contract.trainings import wrappers
from tests.helpers import (
    assert_trees_equal,
    assert_zero_where_removed,
    removed_at,
    run,
    tree_of_weights,
)

KERNEL = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
HALF = {"kernel": jnp.array([[False, True], [True, False]])}
ONCE = schedules.constant(0.5)


def update(tx, state, params, grads=None, **extra):
    updates, state = tx.update(params if grads is None else grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


# prune


def test_the_update_that_prunes_already_leaves_zeros():
    tx = jp.prune(optax.sgd(0.5), schedule=ONCE)
    params, state = update(tx, tx.init(KERNEL), KERNEL)
    assert params["kernel"].tolist() == [[0.0, -2.0], [1.5, 0.0]]
    assert_trees_equal(jp.get_masks(state), HALF)


def test_masks_are_found_from_the_params_and_gradients_of_that_update():
    tx = jp.prune(optax.sgd(0.5), schedule=schedules.one_shot(0.5, at=1), criterion=criteria.taylor)
    state = tx.init(KERNEL)
    params, state = update(tx, state, KERNEL, {"kernel": jnp.zeros((2, 2))})
    assert jp.get_masks(state)["kernel"].all()
    grads = {"kernel": jnp.array([[9.0, 0.0], [0.0, 1.0]])}
    _, state = update(tx, state, params, grads)
    assert jp.get_masks(state)["kernel"].tolist() == [[True, False], [False, True]]


def test_the_inner_optimizer_sees_no_gradient_of_removed_weights():
    tx = jp.prune(optax.sgd(1.0, momentum=0.5), schedule=ONCE)
    _, state = update(tx, tx.init(KERNEL), KERNEL, {"kernel": jnp.ones((2, 2))})
    (trace,) = jax.tree.leaves(optax.tree.get(state, "trace"))
    assert trace.tolist() == [[0.0, 1.0], [1.0, 0.0]]


@pytest.mark.parametrize("name", ["linear", "cubic", "cosine"])
def test_a_ramp_removes_exactly_what_it_says_and_arrives_at_the_end(key, name):
    schedule = getattr(schedules, name)(0.7, begin=1, end=8, every=3)
    params = {"kernel": jax.random.normal(key, (25, 6))}  # 0.7 * 150 is a tie but for float32
    tx = jp.prune(optax.sgd(0.1), schedule=schedule)
    _, state, _, masks = run(tx, params, 10)
    want, now = [], 0
    for step in range(10):
        if step in (1, 4, 7, 8):
            now = round(float(schedule(step)) * 150) if step < 8 else round(0.7 * 150)
        want.append([now])
    assert [removed_at(masks, step) for step in range(10)] == want
    assert int(state.count) == 10


def test_geometric_removes_the_ladder_of_iterative_pruning(key):
    params = {"kernel": jax.random.normal(key, (50, 20))}
    schedule = schedules.geometric(0.2, begin=0, end=8, every=2)
    masks = run(jp.prune(optax.sgd(0.1), schedule=schedule), params, 10)[3]
    want = [round((1 - 0.8 ** (step // 2 + 1)) * 1000) for step in range(9)]
    assert [removed_at(masks, step) for step in range(9)] == [[n] for n in want]


def test_a_tree_of_sparsities_prunes_each_leaf_by_its_own(key):
    params = tree_of_weights(key)
    final = scopes.custom(params, {"Dense_0/kernel": 0.5}, default=0.25)
    schedule = schedules.cubic(final, begin=0, end=4, every=2)
    params, _state, _, masks = run(jp.prune(optax.adam(0.1), schedule=schedule), params, 5)
    assert removed_at(masks, 4) == [48, 8]


def test_weights_come_back_only_when_the_schedule_falls():
    falling = schedules.custom(lambda step: jnp.where(step < 2, 0.5, 0.25), 0, 3, 1)
    tx = jp.prune(optax.sgd(0.0), schedule=falling)
    masks = run(tx, KERNEL, 4)[3]
    assert [removed_at(masks, step) for step in range(4)] == [[2], [2], [1], [1]]


def test_a_schedule_that_falls_between_two_events_has_fallen_at_the_next():
    falling = schedules.custom(lambda step: jnp.where(step < 2, 0.5, 0.25), 0, 3, 3)
    masks = run(jp.prune(optax.sgd(0.0), schedule=falling), KERNEL, 4)[3]
    assert [removed_at(masks, step) for step in range(4)] == [[2], [2], [2], [1]]


@pytest.mark.parametrize(
    "pattern", [patterns.Weights(), patterns.Channels(), patterns.Blocks((3, 2))]
)
def test_packed_masks_are_the_same_masks(key, pattern):
    params = tree_of_weights(key)
    schedule = schedules.cubic(0.75, begin=0, end=5, every=2)
    make = lambda packed: jp.prune(
        optax.adam(0.1), schedule=schedule, pattern=pattern, packed=packed
    )
    plain, bits = (run(make(packed), params, 6) for packed in (False, True))
    assert_trees_equal(bits[3], plain[3])
    assert_zero_where_removed(bits[0], jp.get_masks(bits[1]))
    stored = bits[1].masks["Dense_0"]["kernel"]
    assert isinstance(stored, jp.Packed) and stored.bits.dtype == jnp.uint8


def test_masks_of_channels_are_never_materialised(key):
    tx = jp.prune(optax.sgd(0.1), schedule=ONCE, pattern=patterns.Channels(-1))
    _, state, _, _ = run(tx, tree_of_weights(key), 2)
    assert state.masks["Dense_0"]["kernel"].shape == (1, 8)


def test_where_protects_what_it_refuses(key):
    tx = jp.prune(optax.sgd(0.1), schedule=ONCE, where=jp.by_path("Dense_0/kernel"))
    masks = jp.get_masks(run(tx, tree_of_weights(key), 2)[1])
    assert masks["Dense_1"]["kernel"] is None
    assert int((~masks["Dense_0"]["kernel"]).sum()) == 48


def test_pruning_under_adamw_does_not_drift_with_weight_decay(key):
    tx = jp.prune(optax.adamw(0.1, weight_decay=0.5), schedule=ONCE)
    _, _, params, masks = run(tx, tree_of_weights(key), 6)
    assert_zero_where_removed(params, masks)


def test_a_transformation_chained_after_prune_revives_weights_as_the_docstring_warns():
    tx = optax.chain(jp.prune(optax.sgd(0.5), schedule=ONCE), optax.scale(0.5))
    params, _ = update(tx, tx.init(KERNEL), KERNEL)
    assert (params["kernel"] != 0).all()


# Criteria with keys, memory and evidence.


def test_random_draws_anew_at_each_event_from_the_key_folded_with_the_step(key):
    params = {"kernel": jnp.ones((8, 8))}
    schedule = schedules.custom(lambda step: 0.9 - 0.1 * step, 0, 3, 1)  # falls: all found anew
    tx = jp.prune(optax.sgd(0.0), schedule=schedule, criterion=criteria.random, key=key)
    masks = run(tx, params, 4)[3]["kernel"]
    for step in range(4):
        want = jp.find_masks(
            params,
            schedule(step),
            criterion=criteria.random,
            key=jax.random.fold_in(key, step),
        )
        np.testing.assert_array_equal(masks[step], want["kernel"])


def test_another_key_draws_other_masks(key):
    def masks(k):
        tx = jp.prune(optax.sgd(0.1), schedule=ONCE, criterion=criteria.random, key=k)
        return run(tx, {"kernel": jnp.ones((8, 8))}, 1)[3]["kernel"]

    one, two = jax.random.split(key)
    assert (masks(one) == masks(one)).all() and not (masks(one) == masks(two)).all()


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_keys_of_both_kinds_will_do(make):
    tx = jp.prune(optax.sgd(0.1), schedule=ONCE, criterion=criteria.random, key=make(3))
    assert removed_at(run(tx, {"kernel": jnp.ones((8, 8))}, 1)[3], 0) == [32]


@dataclasses.dataclass(frozen=True)
class Movement:
    """Accumulate minus w times g: a criterion with memory."""

    decay: float = 1.0

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, state, params, grads):
        return jax.tree.map(lambda s, w, g: self.decay * s - w * g, state, params, grads)

    def __call__(self, params, *, state, **_):
        del params
        return state


def test_a_criterion_with_memory_is_updated_at_every_step():
    params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "bias": jnp.ones(2)}
    grads = {"kernel": jnp.array([[-1.0, 1.0], [-2.0, 0.0]]), "bias": jnp.ones(2)}
    tx = jp.prune(optax.sgd(0.0), schedule=schedules.one_shot(0.5, at=2), criterion=Movement())
    params, state, _, masks = run(tx, params, 4, lambda p: grads)
    assert state.criterion_state["kernel"].tolist() == [
        [4.0, -6.0],
        [24.0, 0.0],
    ]  # removed after three steps
    assert state.criterion_state["bias"] is None
    assert [removed_at(masks, step) for step in range(4)] == [[0], [0], [2], [2]]
    assert masks["kernel"][2].tolist() == [[True, False], [True, False]]


def test_a_step_counts_in_the_memory_before_the_masks_are_found():
    params = {"kernel": jnp.array([[1.0, 2.0]])}
    tx = jp.prune(optax.sgd(0.0), schedule=ONCE, criterion=Movement())
    masks = run(tx, params, 1, lambda p: {"kernel": jnp.array([[1.0, -1.0]])})[3]
    assert masks["kernel"][0].tolist() == [[False, True]]


def test_evidence_travels_through_update():
    def fisher(params, *, fisher, **_):
        return jax.tree.map(lambda w, f: f * w * w, params, fisher)

    tx = jp.prune(optax.sgd(0.0), schedule=ONCE, criterion=fisher)
    evidence = {"kernel": jnp.array([[9.0, 0.0], [0.0, 9.0]])}
    _, state = update(tx, tx.init(KERNEL), KERNEL, fisher=evidence)
    assert jp.get_masks(state)["kernel"].tolist() == [[True, False], [False, True]]


def test_an_evidence_function_sees_the_full_params(key):
    params = tree_of_weights(key)

    def loss_fn(p):
        assert all(leaf is not None for leaf in (p["Dense_0"]["bias"], p["norm"]["scale"]))
        return sum(jnp.sum(x * x) for x in jax.tree.leaves(p))

    def by_loss(part, *, loss_fn, **_):
        return jax.tree.map(jnp.abs, jax.grad(loss_fn)(part))

    tx = jp.prune(optax.sgd(0.1), schedule=ONCE, criterion=by_loss)
    _, state = update(tx, tx.init(params), params, loss_fn=loss_fn)
    assert_trees_equal(jp.get_masks(state), jp.find_masks(params, 0.5))


# hold, with_masks, get_masks


def test_hold_is_dense_until_it_is_given_masks():
    tx = jp.hold(optax.sgd(0.5))
    state = tx.init(KERNEL)
    assert jp.get_masks(state)["kernel"].all()
    params, state = update(tx, state, KERNEL)
    assert params["kernel"].tolist() == [[0.5, -2.0], [1.5, 1.0]]
    params, state = update(tx, jp.with_masks(state, HALF), params)
    assert params["kernel"].tolist() == [[0.0, -1.0], [0.75, 0.0]]
    assert_trees_equal(jp.get_masks(state), HALF)


@pytest.mark.parametrize("packed", [False, True])
def test_held_masks_never_change(key, packed):
    params = tree_of_weights(key)
    masks = jp.find_masks(params, 0.7, pattern=patterns.Channels(-1))
    tx = jp.hold(optax.adam(0.1), packed=packed)
    state = jp.with_masks(tx.init(params), masks)
    for _ in range(3):
        params, state = update(tx, state, params)
        assert_zero_where_removed(params, masks)
    assert_trees_equal(jp.get_masks(state), masks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", [HALF, FrozenDict(HALF), jp.pack(HALF), lambda params: HALF])
def test_hold_takes_masks_or_a_function_that_makes_them(given, packed):
    tx = jp.hold(optax.sgd(0.5), masks=given, packed=packed)
    params, state = update(tx, tx.init(KERNEL), KERNEL)
    assert params["kernel"].tolist() == [[0.0, -2.0], [1.5, 0.0]]
    assert_trees_equal(jp.get_masks(state), HALF)
    assert_trees_equal(jp.get_masks(jax.jit(tx.init)(KERNEL)), HALF)
    assert isinstance(state.masks["kernel"], jp.Packed) == packed


def test_masks_that_hold_was_given_survive_the_donation_of_its_state():
    tx = jp.hold(optax.sgd(0.5), masks=HALF)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 1, s), donate_argnums=0)(tx.init(KERNEL))
    assert_trees_equal(jp.get_masks(tx.init(KERNEL)), HALF)


def test_a_pruned_network_is_trained_further_with_masks_from_its_zeros():
    params = {"kernel": jnp.array([[0.0, -4.0], [3.0, -0.0]]), "bias": jnp.zeros(2)}
    assert jp.masks_from_zeros(params)["bias"] is None
    assert_trees_equal(
        jp.masks_from_zeros(params, where=jp.by_path("kernel")), {**HALF, "bias": None}
    )
    tx = jp.hold(optax.adam(0.5), masks=jp.masks_from_zeros)
    state = tx.init(params)
    for _ in range(2):
        params, state = update(tx, state, params, jax.tree.map(jnp.ones_like, params))
    assert_zero_where_removed(params, {**HALF, "bias": None})
    assert not jp.check(params, state)


def test_hold_refuses_masks_that_do_not_fit_at_init():
    with pytest.raises(ValueError, match=r"'kernel' has shape \(3, 2\).*\(2, 2\)"):
        jp.hold(optax.sgd(0.5), masks={"kernel": jnp.ones((3, 2), bool)}).init(KERNEL)
    with pytest.raises(TypeError, match=r"not bool: 'kernel' is float32"):
        jp.hold(optax.sgd(0.5), masks=lambda params: params).init(KERNEL)


def test_masks_are_found_however_deep_they_are_nested(key):
    params = tree_of_weights(key)
    masks = jp.find_masks(params, 0.5)
    tx = optax.MultiSteps(optax.chain(optax.clip(1.0), jp.hold(optax.adam(0.1))), 2)
    state = jp.with_masks(tx.init(params), masks)
    assert_trees_equal(jp.get_masks(state), masks)
    assert_trees_equal(jp.get_masks({"model": 3, "optimizer": [state]}), masks)


def test_a_state_without_a_pruner_is_refused():
    state = optax.adam(0.1).init(KERNEL)
    with pytest.raises(ValueError, match=r"holds 0 pruners, want one.*jp.prune"):
        jp.get_masks(state)
    with pytest.raises(ValueError, match=r"holds 0 pruners, want one"):
        jp.with_masks(state, HALF)


def test_a_state_with_several_pruners_is_refused():
    tx = optax.chain(jp.hold(optax.sgd(0.1)), jp.hold(optax.sgd(0.1)))
    state = tx.init(KERNEL)
    with pytest.raises(ValueError, match=r"holds 2 pruners, want one.*belongs to one"):
        jp.get_masks(state)
    with pytest.raises(ValueError, match=r"holds 2 pruners, want one"):
        jp.with_masks(state, HALF)
    assert_trees_equal(jp.get_masks(jp.with_masks(state[1], HALF)), HALF)


def test_a_pruner_around_a_pruner_is_refused():
    state = jax.jit(jp.hold(jp.hold(optax.sgd(0.1))).init)(KERNEL)
    with pytest.raises(ValueError, match=r"holds 2 pruners, want one"):
        jp.get_masks(state)


def test_masks_survive_the_donation_of_the_state_and_the_state_that_of_the_masks():
    tx = jp.hold(optax.sgd(0.5))
    mine = jax.tree.map(jnp.copy, HALF)
    state = jp.with_masks(tx.init(KERNEL), mine)
    read = jp.get_masks(state)
    consume = jax.jit(lambda tree: jax.tree.map(jnp.logical_not, tree), donate_argnums=0)
    consume(mine)
    assert_trees_equal(jp.get_masks(state), HALF)
    jax.jit(lambda s: jax.tree.map(lambda x: x * 1, s), donate_argnums=0)(state)
    assert_trees_equal(read, HALF)


def test_the_key_survives_the_donation_of_the_state(key):
    mine = jax.random.clone(key)
    tx = jp.prune(optax.sgd(0.5), schedule=ONCE, criterion=criteria.random, key=mine)
    jax.jit(lambda s: s._replace(count=s.count + 1), donate_argnums=0)(tx.init(KERNEL))
    assert tx.init(KERNEL).key == mine


def test_with_masks_takes_masks_of_another_container():
    state = jp.hold(optax.sgd(0.5)).init(KERNEL)
    state = jp.with_masks(state, FrozenDict(HALF))
    assert_trees_equal(jp.get_masks(state), HALF)


def test_pruning_goes_on_from_the_masks_that_were_put_in(key):
    params = tree_of_weights(key)
    start = jp.find_masks(params, 0.25)
    tx = jp.prune(optax.sgd(0.1), schedule=schedules.one_shot(0.5, at=1))
    state = jp.with_masks(tx.init(params), start)
    step = jax.jit(lambda p, s: update(tx, s, p))
    for _ in range(3):
        params, state = step(params, state)
    masks = jp.get_masks(state)
    assert jp.sparsity(masks, params) == 0.5
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(masks), strict=True):
        assert not (new & ~old).any()


def test_channel_masks_put_into_a_pruner_of_weights_are_pruned_further():
    tx = jp.prune(optax.sgd(0.1), schedule=schedules.one_shot(0.75, at=1))
    state = jp.with_masks(tx.init(KERNEL), {"kernel": jnp.array([[False, True]])})
    params = KERNEL
    for _ in range(2):
        params, state = update(tx, state, params)
    kept = np.broadcast_to(jp.get_masks(state)["kernel"], (2, 2))
    assert kept.tolist() == [[False, True], [False, False]]


def test_weight_masks_put_into_a_pruner_of_channels_are_pruned_further():
    tx = jp.prune(
        optax.sgd(0.1), schedule=schedules.one_shot(0.5, at=1), pattern=patterns.Channels(-1)
    )
    state = jp.with_masks(tx.init(KERNEL), {"kernel": jnp.array([[True, False], [True, True]])})
    params = KERNEL
    for _ in range(2):
        params, state = update(tx, state, params)
    kept = np.broadcast_to(jp.get_masks(state)["kernel"], (2, 2))
    assert kept.tolist() == [[True, False], [True, False]]


def test_with_masks_refuses_masks_that_do_not_fit(key):
    params = tree_of_weights(key)
    state = jp.hold(optax.sgd(0.1)).init(params)
    masks = jp.dense_masks(params)
    with pytest.raises(ValueError, match=r"`masks` is not a tree like the params"):
        jp.with_masks(state, {"Dense_0": masks["Dense_0"]})
    for bad in (jnp.ones(8, bool), jnp.ones((12, 7), bool), jnp.ones((1, 12, 8), bool)):
        wrong = {**masks, "Dense_0": {"kernel": bad, "bias": None}}
        with pytest.raises(ValueError, match=r"'Dense_0/kernel' has shape .*\(12, 8\)"):
            jp.with_masks(state, wrong)
    wrong = {**masks, "Dense_0": {"kernel": jnp.ones((12, 8)), "bias": None}}
    with pytest.raises(TypeError, match=r"not bool: 'Dense_0/kernel' is float32"):
        jp.with_masks(state, wrong)


# Bad input, checked at the door.


def test_update_without_params_is_refused():
    for tx in (jp.hold(optax.sgd(0.1)), jp.prune(optax.sgd(0.1), schedule=ONCE)):
        with pytest.raises(
            ValueError, match=r"without params.*`tx.update\(grads, state, params\)`"
        ):
            tx.update(KERNEL, tx.init(KERNEL))


@pytest.mark.parametrize("bad", [None, 0.1, "adam", optax.adam])
def test_what_is_no_optimizer_is_refused(bad):
    with pytest.raises(TypeError, match=r"`hold` wraps an optax optimizer, but got .*optax.adam"):
        jp.hold(bad)
    with pytest.raises(TypeError, match=r"`prune` wraps an optax optimizer, but got"):
        jp.prune(bad, schedule=ONCE)


@pytest.mark.parametrize("bad", [0.9, None, lambda step: 0.5])
def test_what_is_no_schedule_is_refused(bad):
    with pytest.raises(TypeError, match=r"`prune` got schedule=.*when it is due.*custom"):
        jp.prune(optax.sgd(0.1), schedule=bad)


@pytest.mark.parametrize("wrap", [jp.prune, jp.straight_through])
def test_a_sparsity_in_the_place_of_a_schedule_is_told_which_schedule_takes_it(wrap):
    words = (
        rf"`{wrap.__name__}` got .*0.8.*constant\(0.8\)` prunes at the first.*one_shot\(0.8, at="
    )
    for call in (
        lambda: wrap(optax.sgd(0.1), 0.8),
        lambda: wrap(optax.sgd(0.1), sparsity=0.8),
        lambda: wrap(optax.sgd(0.1), schedule=0.8),
    ):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(TypeError, match=r"got constant\(0.5\). Pass the schedule by its name"):
        wrap(optax.sgd(0.1), ONCE)


WRONG_PARTS = {
    "criterion": ("taylor", "criterion='taylor', a string"),
    "pattern": (patterns.Channels, r"pattern=<class.*`Channels\(...\)`"),
    "scope": ("across", "scope='across', a string"),
    "where": (".*kernel", r"where='.\*kernel', a string.*jp.by_path"),
    "key": (0, r"key=0, which is no random key. Pass `key=jax.random.key\(0\)`"),
}


@pytest.mark.parametrize("setting", WRONG_PARTS)
@pytest.mark.parametrize("name", wrappers())
def test_every_wrapper_refuses_what_is_no_part(name, setting):
    wrap = jp.dynamic.rigl if name == "rigl" else jp.dynamic.set if name == "set" else None
    wrap = wrap or getattr(jp, name)
    taken = inspect.signature(wrap).parameters
    settings = {"schedule": ONCE, "sparsity": 0.5, "begin": 0, "end": 1, "every": 1}
    settings |= {"key": jax.random.key(0)}
    bad, words = WRONG_PARTS[setting]
    if setting in taken:
        given = {name: value for name, value in settings.items() if name in taken}
        with pytest.raises(TypeError, match=rf"`{name}` got {words}"):
            wrap(optax.sgd(0.1), **{**given, setting: bad})


@pytest.mark.parametrize("name", wrappers())
def test_arguments_of_update_in_another_order_are_refused(name):
    tx = wrappers()[name](optax.sgd(0.1))
    state = tx.init(KERNEL)
    with pytest.raises(
        TypeError, match=r"got a dict in the place of.*`tx.update\(grads, state, params"
    ):
        tx.update(KERNEL, KERNEL, state)


# What optax puts around optimizers that does arithmetic of its own.


@pytest.mark.parametrize("name", ["prune", "hold", "straight_through"])
def test_a_state_that_was_blended_by_arithmetic_is_refused_by_name(name):
    pruner = wrappers()[name](optax.sgd(0.1))
    tx = optax.contrib.sam(pruner, optax.sgd(0.05))
    _, state = tx.update(KERNEL, tx.init(KERNEL), KERNEL)
    with pytest.raises(
        TypeError, match=r"become int32.*`optax.contrib.sam`.*jp.prune\(optax.contrib"
    ):
        tx.update(KERNEL, state, KERNEL)


def test_sam_inside_of_a_pruner_leaves_exact_zeros():
    sam = optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05))
    tx = jp.prune(sam, schedule=ONCE)
    params, state, _, masks = run(tx, KERNEL, 4)
    assert removed_at(masks, 3) == [2]
    assert_zero_where_removed(params, jp.get_masks(state))


def test_gradients_of_single_examples_are_refused_with_what_takes_them():
    grads = jax.tree.map(lambda p: jnp.stack([p] * 5), KERNEL)
    private = optax.contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0))
    for name, wrap in wrappers().items():
        tx = wrap(private) if name not in ("rigl", "set") else wrap(optax.sgd(0.1))
        with pytest.raises(
            ValueError, match=r"leading axis of 5.*dpsgd.*`optax.chain\(optax.contrib"
        ):
            tx.update(grads, tx.init(KERNEL), KERNEL)
    tx = optax.chain(private, jp.prune(optax.sgd(0.1), schedule=ONCE))
    updates, state = tx.update(grads, tx.init(KERNEL), KERNEL)
    assert_zero_where_removed(optax.apply_updates(KERNEL, updates), jp.get_masks(state))


def test_the_pair_of_lookahead_is_refused_with_what_works():
    pair = optax.LookaheadParams.init_synced(KERNEL)
    for wrap in wrappers().values():
        with pytest.raises(ValueError, match=r"fast and the slow.*`optax.lookahead\(jp.*mask both"):
            wrap(optax.lookahead(optax.sgd(0.1), 2, 0.5)).init(pair)
    tx = optax.lookahead(jp.prune(optax.sgd(0.1), schedule=ONCE), 2, 0.5)
    state = tx.init(pair)
    for _ in range(3):
        updates, state = tx.update(pair.fast, state, pair)
        pair = optax.apply_updates(pair, updates)
        pair = optax.LookaheadParams(*(jp.apply_masks(p, jp.get_masks(state)) for p in pair))
    assert not jp.check(pair.fast, state) and not jp.check(pair.slow, state)


@pytest.mark.parametrize("wrap", [jp.prune, jp.straight_through, jp.hold, jp.dynamic.rigl])
def test_signatures_show_parts_as_one_writes_them(wrap):
    shown = str(inspect.signature(wrap))
    assert "= jp.is_matrix" in shown and " at 0x" not in shown
    if wrap is jp.prune:
        assert "= jp.criteria.magnitude" in shown and "= jp.patterns.Weights()" in shown


def test_a_criterion_that_needs_a_key_is_refused_without_one():
    with pytest.raises(TypeError, match=r"criterion `random` needs a random key.*`key=jax.random"):
        jp.prune(optax.sgd(0.1), schedule=ONCE, criterion=criteria.random)


def test_missing_evidence_is_named_at_update():
    def criterion(params, *, fisher, **_):
        return params

    tx = jp.prune(optax.sgd(0.1), schedule=ONCE, criterion=criterion)
    with pytest.raises(TypeError, match=r"`criterion` needs `fisher`.*`tx.update`"):
        tx.update(KERNEL, tx.init(KERNEL), KERNEL)


def test_scores_of_another_shape_are_refused_at_update():
    tx = jp.prune(optax.sgd(0.1), schedule=ONCE, criterion=lambda p, **_: {"w": p["kernel"]})
    with pytest.raises(ValueError, match=r"returned scores .*'w'.*prunable leaves are .*'kernel'"):
        tx.update(KERNEL, tx.init(KERNEL), KERNEL)


BAD_PARTS = {
    "windows that do not divide": ({"scope": scopes.windows(5)}, "Dense_0/kernel.*multiple of 5"),
    "windows out of range": ({"scope": scopes.windows(2, axis=-3)}, "axis=-3.*out of range"),
    "channels out of range": ({"pattern": patterns.Channels(2)}, r"Channels\(axis=2\).*Dense_0"),
    "blocks of too many axes": ({"pattern": patterns.Blocks((2, 2, 2))}, "at least 3 axes"),
    "windows of channels": (
        {"pattern": patterns.Channels(), "scope": scopes.windows(2)},
        r"`windows\(m=2\)`.*`Channels`",
    ),
    "a regex that matches nothing": (
        {"where": jp.by_path("Dense_9/kernel")},
        "'Dense_9/kernel'.*matches no parameter.*'Dense_0/bias'",
    ),
    "nothing prunable": ({"where": lambda path, leaf: False}, "No leaf of `params` is prunable"),
    "across with a tree": (
        {"scope": scopes.across, "schedule": schedules.constant({"Dense_0": {"kernel": 0.5}})},
        "`across`.*one sparsity.*got a tree",
    ),
    "a tree that does not mirror": (
        {"schedule": schedules.constant({"Dense_0": {"kernel": 0.5}})},
        "`per_leaf`.*none for 'Dense_1/kernel'",
    ),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_do_not_fit_the_params_are_refused_at_init(key, name):
    settings, words = BAD_PARTS[name]
    tx = jp.prune(optax.sgd(0.1), **{"schedule": ONCE, **settings})
    with pytest.raises(ValueError, match=words):
        tx.init(tree_of_weights(key))


def test_hold_refuses_at_init_what_is_not_there(key):
    with pytest.raises(ValueError, match=r"'nobody'.*matches no parameter"):
        jp.hold(optax.sgd(0.1), where=jp.by_path("nobody")).init(tree_of_weights(key))
    with pytest.raises(ValueError, match="No leaf of `params` is prunable"):
        jp.hold(optax.sgd(0.1)).init({"bias": jnp.ones(2)})


def test_masks_of_other_params_are_refused_at_update(key):
    tx = jp.hold(optax.sgd(0.1))
    state = tx.init(KERNEL)
    other = {"kernel": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"'kernel' has shape \(2, 2\).*\(3, 2\)"):
        tx.update(other, state, other)


def test_a_schedule_may_say_everything_as_an_integer():
    tx = jp.prune(optax.sgd(0.1), schedule=schedules.constant(1))
    params, _ = update(tx, tx.init(KERNEL), KERNEL)
    assert not np.asarray(params["kernel"]).any()


@pytest.mark.parametrize(
    "wrap", [jp.hold, lambda tx: jp.prune(tx, schedule=jp.schedules.constant(0.5))]
)
def test_gradients_of_another_structure_or_shape_are_named_by_path(wrap):
    params = {"a": KERNEL["kernel"], "b": 2 * KERNEL["kernel"]}
    tx = wrap(optax.sgd(0.1))
    state = tx.init(params)
    with pytest.raises(ValueError, match="`grads` is not a tree like the params: nothing at 'b'"):
        tx.update({"a": jnp.ones((2, 2))}, state, params)
    with pytest.raises(ValueError, match=r"'b' has shape \(4,\), in the params \(2, 2\)"):
        tx.update({"a": jnp.ones((2, 2)), "b": jnp.ones(4)}, state, params)
