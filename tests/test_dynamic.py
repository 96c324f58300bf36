"""Tests of rigl and set: drop, grow, reset, and a count that never changes."""

import functools
import math
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria, patterns, scopes
from jaxprune._ranking import in_words
from jaxprune.dynamic._drop_and_grow import _floor
from tests.contract.laws import leaves, units
from tests.contract.tables import OPTIMIZERS, PATTERNS, WRAPPERS, small_params
from tests.helpers import assert_trees_equal, fast_if, slow_keep

KEY = jax.random.key(7)
STEPS = 10
EVENTS = {"begin": 1, "end": 8, "every": 3}  # at 1, 4, 7 and, moving nothing, 8
W = {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}


def rigl(inner, **settings):
    return jp.dynamic.rigl(inner, **{"sparsity": 0.5, **EVENTS, **settings})


def set_(inner, **settings):
    return jp.dynamic.set(inner, **{"sparsity": 0.5, "key": KEY, **EVENTS, **settings})


METHODS = {"rigl": rigl, "set": set_}


def gradients(params, steps=STEPS):
    """Gradients of few bits, other ones at each step: sums of them and of weights are exact."""
    rng = np.random.default_rng(5)
    draw = lambda p: jnp.asarray(rng.integers(-9, 10, (steps, *p.shape)) / 8, p.dtype)
    return jax.tree.map(draw, params)


def train(tx, params, all_grads):
    """Train in one scan; give the params and the state after every step."""

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    @jax.jit
    def scan(params, all_grads):
        return jax.lax.scan(step, (params, tx.init(params)), all_grads)[1]

    return scan(params, all_grads)


def one_event(tx, params, grads, masks=None):
    """Take one step, operation by operation; give masks before, and params and masks after it."""
    with jax.disable_jit():  # quicker than to compile what runs once
        state = tx.init(params)
        state = state if masks is None else jp.with_masks(state, masks)
        updates, new = tx.update(grads, state, params)
        return jp.get_masks(state), optax.apply_updates(params, updates), jp.get_masks(new)


def start(tx, params):
    """Give the masks that `init` finds."""
    with jax.disable_jit():
        return jp.get_masks(tx.init(params))


# An event, one unit at a time.


def slow_event(pattern, mask, moved, promise, fraction):
    """Drop the worst and grow the most promising units of one leaf."""
    members, _ = units(pattern, moved)
    alive = np.array([mask.ravel()[m].any() for m in members])
    mean = lambda x: [np.abs(x).ravel()[m].mean() for m in members]
    kept = int(alive.sum())
    moving = min(math.floor(fraction * kept + 1e-6), len(members) - kept)
    stay = slow_keep(mean(moved), kept - moving, alive)
    grow = slow_keep(mean(promise), moving, ~alive)
    new = np.zeros(mask.size, bool)
    for m, keep in zip(members, stay | grow, strict=True):
        new[m] = keep
    return new.reshape(mask.shape)


def slow_training(name, pattern, settings, lr, masks, params, all_grads):
    """Train by gradient descent, and give the masks and weights after every step."""
    part = jp.prunable(params)
    w = leaves(params)
    masks = {path: np.broadcast_to(m, w[path].shape) for path, m in leaves(masks).items()}
    begin, end, every = (settings[name] for name in ("begin", "end", "every"))
    for step in range(STEPS):
        grads = leaves(jax.tree.map(lambda g: g[step], all_grads))  # noqa: B023
        promise = grads
        if name == "set":
            promise = leaves(criteria.random(part, key=jax.random.fold_in(KEY, step)))
        time = (step - begin) / (end - begin)
        fraction = settings["drop_fraction"] / 2 * (1 + math.cos(math.pi * time))
        due = begin <= step <= end and ((step - begin) % every == 0 or step == end)
        new = {}
        w = {path: p - lr * grads[path] for path, p in w.items()}
        for path, old in masks.items():
            moved = np.where(old, w[path], 0.0)
            new[path] = slow_event(pattern, old, moved, promise[path], fraction) if due else old
            w[path] = np.where(old & new[path], moved, 0.0)  # what has grown starts at zero
        masks = new
        yield masks, w


RUNS = {
    "rigl of weights": ("rigl", "Weights", {}),
    "rigl of channels": ("rigl", "Channels", {"drop_fraction": 0.6}),
    "rigl of blocks": ("rigl", "Blocks", {"drop_fraction": 1.0}),
    "rigl with few zeros": ("rigl", "Weights", {"sparsity": 0.1, "drop_fraction": 1.0}),
    "set of weights": ("set", "Weights", {}),
    "set of channels": ("set", "Channels", {"drop_fraction": 1.0}),
    "set of blocks": ("set", "Blocks", {"drop_fraction": 1.0}),
}
SLOW = ("rigl of channels", "set of weights", "set of blocks")
EVERY_RUN = [pytest.param(run, marks=[pytest.mark.slow] * (run in SLOW)) for run in RUNS]


def settings_of(run):
    return {**EVENTS, "drop_fraction": 0.5, **RUNS[run][2]}


@functools.cache
def history(run):
    """Start masks, and the params and masks after every step."""
    name, pattern, _ = RUNS[run]
    tx = METHODS[name](optax.sgd(0.25), pattern=PATTERNS[pattern], **settings_of(run))
    params = small_params()
    all_params, states = train(tx, params, gradients(params))
    return jp.get_masks(tx.init(params)), all_params, jp.get_masks(states)


@pytest.mark.parametrize("run", EVERY_RUN)
def test_masks_and_weights_are_those_of_a_slow_loop(run):
    name, pattern, _ = RUNS[run]
    start, all_params, masks = history(run)
    params = small_params()
    slow = slow_training(name, pattern, settings_of(run), 0.25, start, params, gradients(params))
    for step, (want_masks, want) in enumerate(slow):
        for path, m in leaves(masks).items():
            got = np.broadcast_to(m[step], want[path].shape)
            np.testing.assert_array_equal(got, want_masks[path], f"{path} at {step}")
        for path, p in leaves(all_params).items():  # the bias among them
            np.testing.assert_array_equal(p[step], want[path], f"{path} at {step}")


@pytest.mark.parametrize("run", EVERY_RUN)
def test_the_number_kept_never_changes_in_any_leaf(run):
    start, _, masks = history(run)
    for path, m in leaves(masks).items():
        kept = m.sum(tuple(range(1, m.ndim)))
        if RUNS[run][1] == "Blocks" and path == ("b", "kernel"):  # ragged: blocks of 8 and of 4
            kept = m[:, ::2, ::4].sum((1, 2))
            assert (kept == int(leaves(start)[path][::2, ::4].sum())).all()
        else:
            assert (kept == int(leaves(start)[path].sum())).all(), path


@pytest.mark.parametrize("run", EVERY_RUN)
def test_masks_move_at_begin_and_every_so_often_and_no_more_at_the_end(run):
    start, _, masks = history(run)
    moved = []
    for step in range(STEPS):
        before = jax.tree.map(lambda m: m[step - 1], masks) if step else start  # noqa: B023
        now = jax.tree.map(lambda m: m[step], masks)  # noqa: B023
        if any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, now))):
            moved.append(step)
    assert moved in ([1, 4, 7], [1, 4])  # at 7 of 8 a small leaf may have less than one to move


def test_weights_that_have_grown_are_zero_and_train_from_then_on():
    _, all_params, masks = history("rigl of weights")
    for path, m in leaves(masks).items():
        p = leaves(all_params)[path]
        grown = m[4] & ~m[3]
        assert grown.any() and (p[4][grown] == 0.0).all()
        assert (p[5][grown] != 0.0).any()


@pytest.mark.slow
def test_an_event_without_compilation_is_the_same_event():
    params = small_params()
    grads = jax.tree.map(lambda g: g[0], gradients(params))
    tx = set_(optax.sgd(0.25), begin=0, drop_fraction=1.0)
    state = tx.init(params)
    plain, compiled = (f(grads, state, params) for f in (tx.update, jax.jit(tx.update)))
    assert_trees_equal(plain[0], compiled[0])
    assert_trees_equal(jp.get_masks(plain[1]), jp.get_masks(compiled[1]))


def test_what_is_dropped_was_small_and_what_grows_has_the_largest_gradient():
    tx = rigl(optax.sgd(0.0), begin=0, drop_fraction=0.5)
    grads = {"kernel": jnp.array([[0.0, 0.0, -5.0, 1.0]])}
    before, params, after = one_event(tx, W, grads)
    assert before["kernel"].tolist() == [[True, True, False, False]]
    assert after["kernel"].tolist() == [[True, False, True, False]]
    assert params["kernel"].tolist() == [[4.0, 0.0, 0.0, 0.0]]


def test_the_inner_update_comes_first():
    tx = rigl(optax.sgd(1.0), begin=0, drop_fraction=0.5)  # 4 and 3 become 1 and 2
    grads = {"kernel": jnp.array([[3.0, 1.0, 1.0, 2.0]])}
    _, params, after = one_event(tx, W, grads)
    assert after["kernel"].tolist() == [[False, True, False, True]]
    assert params["kernel"].tolist() == [[0.0, 2.0, 0.0, 0.0]]


def test_among_equals_the_earlier_position_stays_and_grows():
    tx = rigl(optax.sgd(0.0), begin=0, drop_fraction=0.5)
    same = {"kernel": jnp.ones((1, 4))}
    before, _, after = one_event(tx, same, same)
    assert before["kernel"].tolist() == [[True, True, False, False]]
    assert after["kernel"].tolist() == [[True, False, True, False]]


# Settings.


@pytest.mark.parametrize("name", METHODS)
def test_a_drop_fraction_of_one_moves_everything_and_of_zero_nothing(name):
    params = small_params()
    for fraction in (0.0, 1.0):
        sparsity = scopes.uniform(params, 0.5)
        tx = METHODS[name](optax.sgd(0.1), sparsity=sparsity, begin=0, drop_fraction=fraction)
        before, _, after = one_event(tx, params, params)
        want = jax.tree.map(lambda m: ~m, before) if fraction else before
        assert_trees_equal(after, want)


def test_at_a_drop_fraction_of_zero_rigl_holds_a_ticket():
    params = small_params()
    tx = rigl(optax.adam(0.1), begin=0, drop_fraction=0.0)
    masks = start(tx, params)
    _, got, after = one_event(tx, params, params)
    _, want, _ = one_event(jp.hold(optax.adam(0.1)), params, params, masks)
    assert_trees_equal(after, masks)
    assert_trees_equal(got, want)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 1.0, 0, 1])
def test_at_sparsity_zero_and_one_there_is_nothing_to_move(name, sparsity):
    tx = METHODS[name](optax.sgd(0.1), sparsity=sparsity, begin=0, drop_fraction=1.0)
    before, params, after = one_event(tx, W, W)
    assert_trees_equal(before, after)
    assert np.asarray(after["kernel"]).all() == (sparsity == 0)
    assert np.asarray(params["kernel"]).any() == (sparsity == 0)


WIDE_AND_THIN = {"wide": jnp.arange(96.0).reshape(16, 6), "thin": jnp.arange(4.0).reshape(2, 2)}


@pytest.mark.parametrize("name", METHODS)
def test_a_number_is_shared_out_by_erk_and_the_total_is_exact(name):
    params = {**WIDE_AND_THIN, "bias": jnp.ones(4)}
    masks = start(METHODS[name](optax.sgd(0.1), sparsity=0.83), params)
    gone = {name: int((~masks[name]).sum()) for name in WIDE_AND_THIN}
    assert sum(gone.values()) == round(0.83 * 100)
    allocation = scopes.erk(params, 0.83)
    assert gone == {path: round(allocation[path] * params[path].size) for path in gone}
    assert gone["thin"] / 4 < 0.83 < gone["wide"] / 96


def test_a_leaf_that_erk_leaves_dense_stays_dense():
    params = WIDE_AND_THIN
    tx = rigl(optax.sgd(0.1), sparsity=0.5, begin=0)
    before, _, after = one_event(tx, params, params)
    assert np.asarray(before["thin"]).all() and np.asarray(after["thin"]).all()
    assert int(after["wide"].sum()) == int(before["wide"].sum()) == 50 - 4


@pytest.mark.parametrize("name", METHODS)
def test_a_tree_gives_every_leaf_its_own_sparsity(name):
    params = small_params()
    for tree in (
        scopes.uniform(params, 0.75),
        scopes.custom(params, {"a/.*": 0.5}, default=0.25),
    ):
        masks = start(METHODS[name](optax.sgd(0.1), sparsity=tree), params)
        want = {
            path: round(float(s) * leaves(params)[path].size) for path, s in leaves(tree).items()
        }
        assert {path: int((~m).sum()) for path, m in leaves(masks).items()} == want


def test_the_largest_weights_start_or_with_a_key_random_ones():
    params = small_params()
    with jax.disable_jit():
        erk = scopes.erk(params, 0.5)
        largest = jp.find_masks(params, erk)
        drawn = jp.find_masks(params, erk, criterion=criteria.random, key=KEY)
    assert_trees_equal(start(rigl(optax.sgd(0.1)), params), largest)
    assert_trees_equal(start(rigl(optax.sgd(0.1), key=KEY), params), drawn)
    assert_trees_equal(start(set_(optax.sgd(0.1)), params), drawn)


@pytest.mark.parametrize(
    "run", ["rigl of weights", pytest.param("set of channels", marks=pytest.mark.slow)]
)
def test_packed_masks_are_the_same_masks(run):
    name, pattern, _ = RUNS[run]
    settings = {**settings_of(run), "pattern": PATTERNS[pattern], "packed": True}
    params = small_params()
    all_params, states = train(
        METHODS[name](optax.sgd(0.25), **settings), params, gradients(params)
    )
    assert isinstance(states.masks["a"]["kernel"], jp.Packed)
    assert_trees_equal(jp.get_masks(states), history(run)[2])
    assert_trees_equal(all_params, history(run)[1])


def test_leaves_that_are_none_and_those_that_where_refuses_are_left_alone():
    params = {"w": W["kernel"], "none": None, "bias": jnp.ones(4), "frozen": jnp.ones((2, 2))}
    tx = rigl(optax.adam(0.5), where=jp.by_path("w"), begin=0, drop_fraction=1.0)
    before, after_params, after = one_event(tx, params, params)
    assert before["bias"] is after["frozen"] is after["none"] is after_params["none"] is None
    assert after["w"].tolist() == (~before["w"]).tolist()
    bare = optax.adam(0.5)
    with jax.disable_jit():
        updates, _ = bare.update(params, bare.init(params), params)
        want = optax.apply_updates(params, updates)
    for path in ("bias", "frozen"):
        np.testing.assert_array_equal(after_params[path], want[path])


# What optimizers remember.


def recorded(tx, log):
    """Log what the updates of an optimizer give."""
    tx = optax.with_extra_args_support(tx)

    def update(*args, **extra):
        log.append(tx.update(*args, **extra))
        return log[-1]

    return optax.GradientTransformationExtraArgs(tx.init, update)


def pruner(state):
    is_pruner = lambda node: isinstance(node, jp.PruneState)
    (found,) = filter(is_pruner, jax.tree.leaves(state, is_leaf=is_pruner))
    return found


def check_an_event(wrap):
    """Go up to an event, operation by operation; hold it against what the inner update gave.

    Gives how many leaves of the inner state were reset.
    """
    inside, outside = [], []
    half = scopes.uniform(small_params(), 0.5)
    method = lambda inner: recorded(rigl(recorded(inner, inside), sparsity=half), outside)
    tx = optax.with_extra_args_support(wrap(method))
    params, state, swapped = small_params(), tx.init(small_params()), None
    all_grads = jax.tree.map(lambda g: g + 1 / 16, gradients(params))  # none is zero
    with jax.disable_jit():
        for step in range(STEPS):
            if pruner(state).count == 1 and not swapped:  # so that what is gone has moments
                swapped = jax.tree.map(jnp.logical_not, jp.get_masks(state))
                state, params = jp.with_masks(state, swapped), jp.apply_masks(params, swapped)
            before = pruner(state)
            grads = jax.tree.map(lambda g: g[step], all_grads)  # noqa: B023
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            after = pruner(state)
            if after.count == EVENTS["begin"] + 1:
                break
    grown = leaves(jax.tree.map(lambda new, old: new & ~old, after.masks, before.masks))
    updates = leaves(outside[-1][0])
    for path, m in grown.items():
        assert m.any() and (updates[path][m] == 0.0).all()
    bare, state, reset = leaves(inside[-1][1]), leaves(after.inner_state), 0
    assert bare.keys() == state.keys()
    for path, leaf in state.items():
        want = bare[path]
        for name, m in grown.items():
            if path[-len(name) :] == name and leaf.shape == m.shape:
                want, reset = np.where(m, np.zeros_like(want), want), reset + 1
        np.testing.assert_array_equal(leaf, want, path)
    return reset


NO_MOMENTS = {"adafactor": 0}  # factored: sums over rows and columns have another shape


@pytest.mark.parametrize(
    "name", fast_if(lambda name: name not in ("adamw", "lion"), sorted(set(OPTIMIZERS) - {"lbfgs"}))
)
def test_every_optimizer_forgets_what_grows_and_nothing_else(name):
    reset = check_an_event(lambda wrap: wrap(OPTIMIZERS[name]()))
    assert reset == NO_MOMENTS.get(name, reset) and (reset or name in NO_MOMENTS)


# What lies outside of the pruner is met in `inside`, and what lies in it in two of `around`.
POSITIONS = fast_if(
    lambda name: not name.startswith("around") or name in ("around MultiSteps", "around masked"),
    WRAPPERS,
)


@pytest.mark.parametrize("name", POSITIONS)
def test_what_grows_is_forgotten_in_every_position(name):
    assert check_an_event(WRAPPERS[name])


def test_what_grows_starts_from_where_the_optimizer_starts():
    tx = rigl(optax.adagrad(0.1, initial_accumulator_value=0.25), begin=0, drop_fraction=1.0)
    grads = {"kernel": jnp.array([[1.0, 1.0, 1.0, 1.0]])}
    with jax.disable_jit():
        _, state = tx.update(grads, tx.init(W), W)
    sums = optax.tree.get(state, "sum_of_squares")
    assert sums["kernel"].tolist() == [[1.25, 1.25, 0.25, 0.25]]


def test_adafactor_forgets_where_it_keeps_a_number_a_weight():
    full = lambda: optax.adafactor(0.1, factored=False, momentum=0.9)
    assert check_an_event(lambda wrap: wrap(full())) == 4


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("make", "words"), [(optax.lbfgs, "ScaleByLBFGSState"), (lambda: optax.sm3(0.1), "SM3State")]
)
def test_optimizers_whose_state_cannot_be_mapped_are_refused_by_name_at_init(name, make, words):
    chain = optax.chain(optax.clip(1.0), make())
    for inner in (make(), chain, optax.masked(make(), {"kernel": True})):
        tx = METHODS[name](inner)
        with pytest.raises(TypeError, match=rf"`{name}` resets.*{words}.*optax.adamw.*`jp.prune`"):
            tx.init(W)


def test_extra_arguments_reach_the_inner_optimizer():
    plateau = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(factor=0.5, patience=1))
    tx = rigl(plateau, sparsity=0.0)
    state = tx.init(W)
    with jax.disable_jit():
        for _ in range(3):
            updates, state = tx.update(W, state, W, value=1.0)
    assert (updates["kernel"] == -0.25 * W["kernel"]).all()  # the rate was halved twice


# Under transformations; scan, cond, donation and one trace are in contract/.


def test_seeds_train_side_by_side_under_vmap_with_one_count():
    keys = jax.random.split(KEY, 3)
    batch = jax.vmap(lambda k: {"w": jax.random.normal(k, (8, 8))})(keys)
    axes = jp.PruneState(count=None, masks=0, inner_state=0, criterion_state=0, key=0)
    tx = lambda key: set_(optax.sgd(0.1, momentum=0.9), key=key)
    init = lambda key, params: tx(key).init(params)

    def step(params, state):
        updates, state = tx(KEY).update(params, state, params)  # the key is in the state
        return optax.apply_updates(params, updates), state

    state = jax.jit(jax.vmap(init, out_axes=axes))(keys, batch)
    together = jax.jit(jax.vmap(step, in_axes=(0, axes), out_axes=(0, axes)))
    params = batch
    for _ in range(STEPS):
        params, state = together(params, state)
    assert state.count.shape == ()
    alone = jax.jit(step)
    for i, key in enumerate(keys):
        p = {"w": batch["w"][i]}
        s = init(key, p)
        for _ in range(STEPS):
            p, s = alone(p, s)
        np.testing.assert_array_equal(jp.get_masks(state)["w"][i], jp.get_masks(s)["w"])
        np.testing.assert_allclose(params["w"][i], p["w"], rtol=1e-5, atol=1e-6)
    assert len({m.tobytes() for m in np.asarray(jp.get_masks(state)["w"])}) == 3


def test_a_traced_sparsity_and_drop_fraction_under_vmap_give_a_sweep():
    params = {"w": jax.random.normal(KEY, (8, 8))}

    @jax.jit
    @jax.vmap
    def moved(sparsity, fraction):
        uniform = scopes.uniform(params, sparsity)
        tx = rigl(optax.sgd(0.1), sparsity=uniform, begin=0, drop_fraction=fraction)
        state = tx.init(params)
        after = tx.update(params, state, params)[1]
        old, new = jp.get_masks(state)["w"], jp.get_masks(after)["w"]
        return old.sum(), new.sum(), (new & ~old).sum()

    old, new, grown = moved(jnp.array([0.0, 0.5, 0.75, 1.0]), jnp.array([0.3, 0.3, 1.0, 1.0]))
    assert old.tolist() == new.tolist() == [64, 32, 16, 0]
    assert grown.tolist() == [0, 9, 16, 0]


# Numbers of all kinds.


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("rigl", jnp.bfloat16), pytest.param("set", jnp.float16, marks=pytest.mark.slow)],
)
def test_half_precision_keeps_the_count_and_exact_zeros(name, dtype):
    params = jax.tree.map(lambda p: (p * 1.01).astype(dtype), small_params())
    tx = METHODS[name](optax.adam(0.1, eps=1e-4), sparsity=0.75)
    all_params, states = train(tx, params, gradients(params))
    for path, m in leaves(jp.get_masks(states)).items():
        p = leaves(all_params)[path]
        assert p.dtype == dtype and (p[~m].astype(np.float32) == 0.0).all()
        assert len({int(x.sum()) for x in m}) == 1
    assert all(m.dtype in (dtype, jnp.int32) for m in jax.tree.leaves(states.inner_state))


@pytest.mark.parametrize(
    "where, name",
    fast_if(
        lambda where, name: (where, name) not in [("weights", "rigl"), ("all gradients", "set")],
        product(["weights", "gradients", "all gradients"], METHODS),
    ),
)
def test_what_is_not_a_number_does_not_change_the_count(name, where):
    params, grads = small_params(), jax.tree.map(lambda g: g[0], gradients(small_params()))
    spoil = lambda tree, rows: jax.tree.map(lambda p: p.at[::rows].set(jnp.nan), tree)
    if where == "weights":
        params = spoil(params, 2)
    else:
        grads = spoil(grads, 1 if where == "all gradients" else 2)
    tx = METHODS[name](optax.sgd(0.0), begin=0, drop_fraction=1.0)
    before, _, after = one_event(tx, params, grads)
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert int(old.sum()) == int(new.sum()) and (old != new).any()


def test_weights_that_are_not_numbers_are_dropped_first_and_gradients_grown_last():
    tx = rigl(optax.sgd(0.0), begin=0, drop_fraction=0.5)
    masks = {"kernel": jnp.array([[True, False, False, True]])}
    params = {"kernel": jnp.array([[jnp.nan, 0.0, 0.0, 1.0]])}
    _, _, after = one_event(tx, params, {"kernel": jnp.array([[0.0, jnp.nan, 0.1, 0.0]])}, masks)
    assert after["kernel"].tolist() == [[False, False, True, True]]


# Masks put in by hand.


@pytest.mark.parametrize(
    "packed, name",
    fast_if(lambda packed, name: packed == (name == "rigl"), product([False, True], METHODS)),
)
def test_masks_put_in_are_those_that_move_and_their_count_is_kept(name, packed):
    params = small_params()
    masks = start(set_(optax.sgd(0.1), sparsity=0.7), params)
    tx = METHODS[name](optax.sgd(0.25), begin=0, packed=packed)
    grads = jax.tree.map(lambda g: g[0], gradients(params))
    _, _, after = one_event(tx, params, grads, masks)
    for old, new in zip(*map(jax.tree.leaves, (masks, after)), strict=True):
        moved = int((new & ~old).sum())
        assert int(new.sum()) == int(old.sum()) and moved == math.floor(0.3 * int(old.sum()))


@pytest.mark.parametrize("packed", [False, True])
def test_channel_masks_put_into_rigl_of_weights_move_weight_by_weight(packed):
    tx = rigl(optax.sgd(0.0), begin=0, drop_fraction=0.5, packed=packed)
    params = {"kernel": jnp.array([[1.0, 0.0], [2.0, 0.0]])}
    grads = {"kernel": jnp.array([[0.0, 3.0], [0.0, 4.0]])}
    _, _, after = one_event(tx, params, grads, {"kernel": jnp.array([[True, False]])})
    assert after["kernel"].tolist() == [[False, False], [True, True]]


def test_weight_masks_put_into_rigl_of_channels_move_channel_by_channel():
    pattern = patterns.Channels(-1)
    tx = rigl(optax.sgd(0.0), begin=0, drop_fraction=1.0, pattern=pattern)
    params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.0]])}
    masks = {"kernel": jnp.array([[True, False], [False, False]])}
    _, _, after = one_event(tx, params, {"kernel": jnp.ones((2, 2))}, masks)
    assert after["kernel"].tolist() == [[False, True], [False, True]]


# Bad input, checked at the door.


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"drop_fraction": 1.5}, r"`{}\(drop_fraction=1.5\)` is outside \[0, 1\].*0.3 is common"),
        ({"drop_fraction": -0.1}, r"`{}\(drop_fraction=-0.1\)` is outside"),
        ({"drop_fraction": math.nan}, r"`{}\(drop_fraction=nan\)` is outside"),
        ({"sparsity": 90}, r"`{}` got 90, outside \[0, 1\]"),
        ({"sparsity": {"a": 0.5, "b": -1.0}}, r"`{}` got -1 at 'b', outside"),
        ({"begin": -1}, r"begin=-1.*integers from 0 on"),
        ({"end": 10.5}, r"end=10.5.*integers from 0 on"),
        ({"every": 0}, r"every=0"),
        ({"begin": 9}, r"end=8 before begin=9"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name, settings, words):
    with pytest.raises(ValueError, match=words.format(name)):
        METHODS[name](optax.sgd(0.1), **settings)


def test_set_needs_a_key():
    with pytest.raises(TypeError, match=r"`set` grows weights at random.*`key=jax.random.key"):
        set_(optax.sgd(0.1), key=None)
    with pytest.raises(TypeError, match="'key'"):
        jp.dynamic.set(optax.sgd(0.1), sparsity=0.5, begin=0, end=1, every=1)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_optimizer_is_refused(name):
    with pytest.raises(TypeError, match=rf"`{name}` wraps an optax optimizer, but got"):
        METHODS[name](optax.adam)


@pytest.mark.parametrize("name", METHODS)
def test_params_that_do_not_fit_are_refused_at_init(name):
    with pytest.raises(ValueError, match="No leaf of `params` is prunable"):
        METHODS[name](optax.sgd(0.1)).init({"bias": jnp.ones(3)})
    tree = METHODS[name](optax.sgd(0.1), sparsity={"kernel": 0.5, "other": 0.5})
    with pytest.raises(ValueError, match=r"does not mirror.*not prunable 'other'"):
        tree.init(W)


@pytest.mark.parametrize("name", METHODS)
def test_updates_that_do_not_fit_are_refused(name):
    tx, params = METHODS[name](optax.sgd(0.1)), small_params()
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
    with pytest.raises(ValueError, match=r"`masks` is not .*'b/kernel' has shape"):
        tx.update(wide, state, wide)


def test_no_more_weights_move_than_there_are_even_among_millions():
    for kept in (10, 2_200_000, 8_388_608, 20_000_001):
        moving = int(_floor(1.0, in_words(jnp.int32(kept))).float)
        assert kept - 1 <= moving <= kept
    some = in_words(jnp.array([10, 100, 101]))
    assert _floor(jnp.float32(0.3), some).float.tolist() == [3, 30, 30]


@pytest.mark.parametrize(
    "inner",
    [
        optax.lbfgs(),
        optax.lbfgs(linesearch=None),
        optax.chain(optax.scale_by_lbfgs(), optax.scale(-0.1)),
    ],
)
def test_l_bfgs_is_refused_by_name_with_or_without_its_line_search(inner):
    with pytest.raises(TypeError, match=r"`rigl` resets.*ScaleByLBFGSState.*`optax.adamw`"):
        rigl(inner).init(W)


def test_an_optimizer_that_starts_elsewhere_than_at_zero_starts_there_again():
    """Rprop multiplies its step sizes: from zero they would never move a weight again."""
    tx = rigl(optax.rprop(0.1), begin=0, drop_fraction=1.0)
    state = tx.init(W)
    updates, state = tx.update({"kernel": jnp.array([[1.0, 1.0, 8.0, 9.0]])}, state, W)
    params = optax.apply_updates(W, updates)
    assert jp.get_masks(state)["kernel"].tolist() == [[False, False, True, True]]
    assert params["kernel"].tolist() == [[0.0, 0.0, 0.0, 0.0]]
    for _ in range(2):  # it moves by how the sign of the gradient goes on
        updates, state = tx.update({"kernel": jnp.ones((1, 4))}, state, params)
        params = optax.apply_updates(params, updates)
    assert (np.asarray(updates["kernel"])[0, 2:] < 0).all()


@pytest.mark.parametrize("drop_fraction", ["a lot", None])
def test_a_drop_fraction_that_is_no_number_is_refused(drop_fraction):
    with pytest.raises(TypeError, match=r"`rigl\(drop_fraction=.*is no number"):
        rigl(optax.sgd(0.1), drop_fraction=drop_fraction)


def test_a_traced_sparsity_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"`rigl` got a traced sparsity.*tree"):
        jax.jit(lambda s: rigl(optax.sgd(0.1), sparsity=s).init(W))(0.5)
