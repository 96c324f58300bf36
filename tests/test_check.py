"""Tests of check and of the one warning at init: what looks wrong, from outside."""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import _values, schedules
from tests.contract.trainings import wrappers
from tests.helpers import FULL

KERNEL = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.ones(2)}
HALF = {"kernel": jnp.array([[False, True], [True, False]]), "bias": None}
ONCE = schedules.constant(0.5)
PRUNED = jp.apply_masks(KERNEL, HALF)


@functools.cache
def compiled(tx):
    return jax.jit(tx.update)


def train(tx, params=KERNEL, steps=2):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = compiled(tx)(params, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# Weights that came back.

PRUNER = jp.prune(optax.sgd(0.1), schedule=ONCE)
AFTER = {
    "a learning rate": optax.scale_by_learning_rate(1e-3),
    "weight decay": optax.add_decayed_weights(-0.5),
    "an average": optax.ema(0.9),
}


@pytest.mark.parametrize("name", AFTER)
def test_what_is_chained_after_a_pruner_brings_weights_back_and_check_counts_them(name):
    params, state = train(optax.chain(PRUNER, AFTER[name]), steps=1)
    report = jp.check(params, state)
    assert report and report.revived == {"kernel": 2} and report.problems == ()
    assert "'kernel': 2 weights that the masks remove are not zero" in str(report)
    assert jp.summary(params, jp.get_masks(state)).revived == {"kernel": 2}


def test_all_is_well_where_the_pruner_is_outermost():
    params, state = train(PRUNER)
    report = jp.check(params, state, schedule=ONCE)
    assert not report and report == jp.Check({}, ()) and str(report) == "all is well"
    assert jp.summary(params, jp.get_masks(state)).revived == {}


def test_masks_will_do_in_the_place_of_a_state_packed_or_not():
    for masks in (HALF, jp.pack(HALF)):
        assert not jp.check(PRUNED, masks)
        assert jp.check(KERNEL, masks).revived == {"kernel": 2}


def test_a_weight_that_is_not_a_number_has_come_back_and_a_negative_zero_has_not():
    params = {"kernel": jnp.array([[jnp.nan, 1.0], [1.0, -0.0]]), "bias": None}
    assert jp.check(params, HALF).revived == {"kernel": 1}


def test_masks_of_channels_count_weights():
    masks = {"kernel": jnp.array([[False, True]]), "bias": None}
    assert jp.check(KERNEL, masks).revived == {"kernel": 2}


def test_copies_that_nobody_masks_are_told():
    tx = jp.prune(optax.contrib.schedule_free_sgd(0.1), schedule=ONCE)
    params, state = train(tx)
    average = optax.contrib.schedule_free_eval_params(state.inner_state, params)
    assert not jp.check(params, state)
    assert jp.check(average, state).revived == {"kernel": 2}


@pytest.mark.parametrize("name", wrappers())
def test_check_reads_the_state_of_every_wrapper(name):
    tx = wrappers()[name](optax.sgd(0.1))
    params = {"kernel": jnp.arange(1.0, 17.0).reshape(4, 4)}
    state = tx.init(params)
    if name == "set" or name == "rigl":
        assert jp.check(params, state).revived == {"kernel": 12}
        params = jp.apply_masks(params, jp.get_masks(state))
    assert not jp.check(params, state)


def test_the_weights_of_straight_through_are_dense_by_design():
    params, state = train(jp.straight_through(optax.sgd(0.1), schedule=ONCE))
    assert not jp.check(params, state, schedule=ONCE)


def test_summary_says_by_path_what_masks_remove_and_params_have():
    text = str(jp.summary(KERNEL, HALF))
    assert "not zero: 2 weights of 'kernel' that the masks remove" in text
    assert "not zero" not in str(jp.summary(PRUNED, HALF))
    shape = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    assert jp.summary(shape, {"kernel": HALF["kernel"]}).revived == {}


# Nested pruners, dense masks over zeros.


def nested():
    return {
        "prune in prune": jp.prune(PRUNER, schedule=ONCE),
        "hold in hold": jp.hold(jp.hold(optax.sgd(0.1))),
        "prune in straight_through": jp.straight_through(PRUNER, schedule=ONCE),
        "deep": jp.prune(optax.chain(optax.clip(1.0), optax.MultiSteps(PRUNER, 2)), schedule=ONCE),
    }


@pytest.mark.parametrize("name", nested())
def test_nested_pruners_are_told_by_check_and_at_init(name):
    tx = nested()[name]
    with pytest.warns(jp.PruneWarning, match="nested pruners: two act on 'kernel'") as seen:
        state = tx.init(KERNEL)
    assert len(seen) == 1
    (problem,) = jp.check(KERNEL, state).problems
    assert "nested pruners: two act on 'kernel'" in problem


def test_pruners_of_different_leaves_are_not_nested():
    params = {"a": KERNEL, "b": KERNEL}
    inner = jp.prune(optax.sgd(0.1), schedule=ONCE, where=jp.by_path("a/kernel"))
    state = jp.prune(inner, schedule=ONCE, where=jp.by_path("b/kernel")).init(params)
    assert not jp.check(params, state)


def test_dense_masks_of_hold_over_a_pruned_network_are_told_by_check_and_at_init():
    tx = jp.hold(optax.sgd(0.1))
    with pytest.warns(jp.PruneWarning, match=r"`hold`.*\n.*zeros at 'kernel' \(50%\).*masks_from"):
        state = tx.init(PRUNED)
    (problem,) = jp.check(PRUNED, state).problems
    assert "zeros at 'kernel' (50%)" in problem
    assert not jp.check(PRUNED, jp.with_masks(state, HALF))


def test_a_leaf_that_starts_from_zero_was_not_pruned():
    params = {"kernel": jnp.zeros((2, 2)), "other": KERNEL["kernel"]}
    state = jp.hold(optax.sgd(0.1)).init(params)
    assert not jp.check(params, state)


def test_other_wrappers_may_start_from_a_pruned_network():
    jp.prune(optax.sgd(0.1), schedule=ONCE).init(PRUNED)


# Schedules that have not arrived.

RAMP = schedules.cubic(0.5, begin=2, end=6, every=2)
RAMPED = jp.prune(optax.sgd(0.1), schedule=RAMP)
LATE = [(0, "not due at any of the 0"), (2, "not due at any of the 2 updates")]
LATE += [(3, "not arrived: 3 updates so far, and the last event is update 6"), (6, "not arrived")]


@pytest.mark.parametrize(("step", "words"), LATE)
def test_a_loop_that_ends_before_its_schedule_is_told(step, words):
    params, state = train(RAMPED, steps=step)
    for given in (None, step, np.int64(step)):
        (problem,) = jp.check(params, state, schedule=RAMP, step=given).problems
        assert words in problem and "cubic(0.5, begin=2, end=6, every=2)" in problem
    assert not jp.check(params, state)


def test_a_schedule_has_arrived_after_its_last_event():
    params, state = train(RAMPED, steps=7)
    assert not jp.check(params, state, schedule=RAMP)


def test_masks_that_are_older_than_the_schedule_are_told():
    tx = optax.MultiSteps(RAMPED, 4).gradient_transformation()
    params, state = train(tx, steps=8)  # of which two reach the pruner
    assert "not due at any of the 2" in jp.check(params, state, schedule=RAMP).problems[0]
    (problem,) = jp.check(params, state, schedule=RAMP, step=8).problems
    assert "asks for 50% at update 7, but the masks keep all weights" in problem


AT_THREE = jp.prune(optax.sgd(0.1), schedule=schedules.one_shot(0.5, at=3))


@pytest.mark.parametrize("stop", ["early", "best"])
def test_loops_that_stop_early_or_give_the_best_params_seen_are_told(stop):
    params, seen = KERNEL, []
    tx, state = AT_THREE, AT_THREE.init(params)
    for _ in range(3 if stop == "early" else 5):
        seen.append(params)
        updates, state = compiled(tx)(params, state, params)
        params = optax.apply_updates(params, updates)
    report = jp.check(
        seen[-1 if stop == "early" else 1], state, schedule=schedules.one_shot(0.5, 3)
    )
    assert bool(report.problems) == (stop == "early")
    assert report.revived == ({} if stop == "early" else {"kernel": 2})


@dataclasses.dataclass(frozen=True)
class Mine:
    """A schedule of a user, which knows no end."""

    at: int

    def __call__(self, step):
        return jnp.where(jnp.asarray(step) >= self.at, 0.5, 0.0)

    def due(self, step):
        return jnp.asarray(step) == self.at


class OneByOne(Mine):
    def due(self, step):
        return int(step) == self.at


def test_a_schedule_that_is_never_due_is_told_at_init_and_by_check():
    tx = jp.prune(optax.sgd(0.1), schedule=Mine(-1))
    with pytest.warns(jp.PruneWarning, match=r"Mine\(at=-1\) is due at none of the first 100,000"):
        state = tx.init(KERNEL)
    assert (
        "not due at any of the 9" in jp.check(KERNEL, state, schedule=Mine(-1), step=9).problems[0]
    )
    jp.prune(optax.sgd(0.1), schedule=Mine(700)).init(KERNEL)
    jp.prune(optax.sgd(0.1), schedule=OneByOne(700)).init(KERNEL)
    assert not jp.check(PRUNED, HALF, schedule=Mine(3), step=4)
    assert "not due" in jp.check(PRUNED, HALF, schedule=OneByOne(3), step=3).problems[0]


# Leaves that hold one number.


def with_gain(number):
    return {**KERNEL, "norm": {"weight": jnp.full((2, 3), number)}}


@pytest.mark.parametrize(("name", "number"), [("hold", 8.0), *((name, 1.0) for name in wrappers())])
def test_leaves_that_hold_one_number_are_told_at_init(name, number):
    tx = wrappers()[name](optax.sgd(0.1))
    params = {**KERNEL, "widths": jnp.full((2, 3), number)}
    with pytest.warns(
        jp.PruneWarning, match=rf"`(dynamic\.)?{name}`.*\n.*equal at 'widths' \({number:g}\)"
    ) as seen:
        tx.init(params)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "params",
    [
        {"head": jnp.zeros((2, 3))},  # heads, LoRA's B and last layers of blocks start so
        {"kernel": jnp.ones((2, 3))},  # its name says what it is
        {"a": jnp.ones((2, 3)).at[1, 2].set(2.0)},
        {"a": jnp.full((2, 3), jnp.nan)},
    ],
)
def test_leaves_of_zeros_kernels_by_name_and_others_are_not_told(params):
    jp.prune(optax.sgd(0.1), schedule=ONCE).init({**params, "b": KERNEL["kernel"]})


def test_what_an_explicit_where_or_groups_choose_is_not_asked_about():
    where = jp.by_path("widths")
    params = {"widths": jnp.full((2, 3), 8.0)}
    jp.prune(optax.sgd(0.1), schedule=ONCE, where=where).init(params)
    jp.hold(optax.sgd(0.1), where=where).init(params)


def test_all_that_looks_wrong_is_in_one_warning():
    params = {"kernel": PRUNED["kernel"], "widths": jnp.full((2, 3), 8.0)}
    with pytest.warns(jp.PruneWarning) as seen:
        jp.hold(jp.hold(optax.sgd(0.1), where=jp.by_path("kernel"))).init(params)
    text = str(seen[-1].message)
    assert text.count("\n- ") == 3 and all(w in text for w in ("nested", "50%", "'widths' (8)"))


@pytest.mark.parametrize("how", [jax.jit, lambda f: functools.partial(jax.eval_shape, f), jax.vmap])
def test_on_abstract_values_init_says_nothing(how):
    params = jax.tree.map(lambda x: jnp.stack([x, x]), with_gain(1.0))
    how(jp.hold(jp.hold(optax.sgd(0.1))).init)(params)


def test_updates_say_nothing():
    params = with_gain(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jp.PruneWarning)
        tx = jp.hold(optax.sgd(0.1))
        state = tx.init(params)
    tx.update(params, state, params)


@pytest.mark.parametrize("bad", [jax.jit, lambda f: functools.partial(jax.eval_shape, f)])
def test_check_refuses_what_has_no_values(bad):
    with pytest.raises(TypeError, match=r"`check` reads values.*outside"):
        bad(lambda p: jp.check(p, HALF) and p)(KERNEL)


def test_check_refuses_a_schedule_without_a_step_and_steps_that_are_none():
    with pytest.raises(ValueError, match=r"masks do not count updates. Pass `step=`"):
        jp.check(PRUNED, HALF, schedule=ONCE)
    with pytest.raises(TypeError, match=r"`check` got step=1.5, which is no integer"):
        jp.check(PRUNED, HALF, schedule=ONCE, step=1.5)
    with pytest.raises(ValueError, match="`masks` is not a tree like the params"):
        jp.check(PRUNED, {"other": HALF["kernel"]})
    with pytest.raises(ValueError, match="there is no pruner in this state"):
        jp.check(PRUNED, optax.adam(0.1).init(PRUNED))


# On many devices.


@pytest.fixture
def sharded():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P("x"))
    return lambda x: jax.device_put(x, place)


@pytest.mark.optimized
@pytest.mark.parametrize("look", [_values._range, _values._zero_share])
def test_looking_at_sharded_leaves_gathers_nothing(sharded, look):
    text = look.lower(sharded(jnp.ones((16, 256)))).compile(FULL).as_text()
    assert "all-reduce" in text and "all-gather" not in text and "all-to-all" not in text


@pytest.mark.optimized
def test_counting_revived_weights_gathers_nothing(sharded):
    weights = sharded(jnp.ones((16, 256)))
    text = _values._revived.lower(weights, sharded(weights > 0)).compile(FULL).as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_a_corner_tells_of_nearly_all_leaves_that_they_are_not_constant(sharded, monkeypatch):
    weights = sharded(jax.random.normal(jax.random.key(0), (64, 1024)))
    assert _values.constant_of(sharded(jnp.full((64, 1024), 8.0))) == 8.0
    assert _values.constant_of(sharded(jnp.ones((64, 1024)).at[63, 1000].set(2.0))) is None
    monkeypatch.setattr(_values, "_range", None)  # would fail if it were called
    assert _values.constant_of(weights) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"])
def test_narrow_weights_are_looked_at_like_others(dtype):
    params = {"a": jnp.full((2, 3), 8.0, dtype), "kernel": PRUNED["kernel"].astype(dtype)}
    assert _values.constant_of(params["a"]) == 8.0
    assert _values.zero_shares(params) == {"kernel": 0.5}
    assert jp.check(params, {"a": None, "kernel": HALF["kernel"]}) == jp.Check({}, ())


def test_in_trees_without_names_what_starts_from_zero_is_told(key):
    kernels = jax.random.normal(key, (8, 2, 4)), jax.random.normal(key, (4, 6))
    variables = [kernels[0], jnp.zeros((2, 4)), kernels[1], jnp.zeros((2, 6)), jnp.zeros(6)]
    with pytest.warns(jp.PruneWarning, match=r"All entries are equal at '1' \(0\), '3' \(0\): a"):
        jp.prune(optax.sgd(0.1), schedule=ONCE).init(variables)
    named = {"in": {"kernel": kernels[0]}, "out": {"proj": jnp.zeros((4, 6))}}
    jp.prune(optax.sgd(0.1), schedule=ONCE).init(named)  # a last layer that starts from zero
    where = jp.exclude("1", "3")
    masks = jp.get_masks(jp.prune(optax.sgd(0.1), schedule=ONCE, where=where).init(variables))
    assert [m is None for m in masks] == [False, True, False, True, True]


def test_a_schedule_with_a_sparsity_for_each_layer_is_compared_by_its_largest():
    params = {"b": jax.random.normal(jax.random.key(0), (4, 8, 8))}
    layout = jp.Layout({"b": ("layer", "in", "out")})
    schedule = schedules.constant({"b": jnp.array([0.5, 0.25, 0.5, 0.75])})
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, layout=layout)
    updates, state = tx.update(params, tx.init(params), params)
    pruned = optax.apply_updates(params, updates)
    assert not jp.check(pruned, state, schedule=schedule)
    kept = {"b": jnp.ones((4, 8, 8), bool)}
    (problem,) = jp.check(params, kept, schedule=schedule, step=5).problems
    assert "asks for 75%" in problem
