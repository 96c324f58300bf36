"""Tests of the schedules: how much, and when."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import schedules
from tests.helpers import run

RAMPS = {
    "linear": lambda t: 1 - t,
    "cubic": lambda t: (1 - t) ** 3,
    "cosine": lambda t: 0.5 * (1 + np.cos(np.pi * t)),
}
# One of each, with a period that does not divide the range.
EXAMPLES = {
    "constant": schedules.constant(0.8),
    "one_shot": schedules.one_shot(0.8, at=5),
    "linear": schedules.linear(0.8, begin=2, end=9, every=3),
    "cubic": schedules.cubic(0.8, begin=2, end=9, every=3),
    "cosine": schedules.cosine(0.8, begin=2, end=9, every=3),
    "geometric": schedules.geometric(0.2, begin=2, end=9, every=3),
    "custom": schedules.custom(optax.linear_schedule(0.0, 0.8, 9), begin=2, end=9, every=3),
    "cyclic": schedules.cyclic(0.8, dense=2, sparse=3, begin=2, end=9),
}


def events(schedule, steps):
    return [step for step in range(steps) if schedule.due(step)]


def test_every_schedule_has_an_example():
    assert set(EXAMPLES) == set(schedules.__all__)


@pytest.mark.parametrize("name", RAMPS)
@pytest.mark.parametrize("begin, end", [(0, 8), (3, 10), (5, 5), (0, 1)])
@pytest.mark.parametrize("initial", [0.0, 0.2])
def test_ramps_follow_their_formula(name, begin, end, initial):
    schedule = getattr(schedules, name)(0.9, begin=begin, end=end, every=2, initial=initial)
    for step in range(14):
        t = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0) if step < end else 1.0
        want = 0.9 + (initial - 0.9) * RAMPS[name](t) if step >= begin else 0.0
        assert float(schedule(step)) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("name", RAMPS)
@pytest.mark.parametrize("final", [0.0, 0.1, 0.7, 0.9, 0.95, 1.0])
def test_ramps_arrive_exactly_and_never_pass_the_final_sparsity(name, final):
    schedule = getattr(schedules, name)(final, begin=3, end=50, every=7)
    values = np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(60)))
    assert (values <= np.float32(final)).all() and (np.diff(values) >= 0).all()
    assert (values[50:] == np.float32(final)).all()


def test_geometric_brings_one_minus_the_power_of_what_stays():
    schedule = schedules.geometric(0.2, begin=2, end=14, every=3)
    assert events(schedule, 20) == [2, 5, 8, 11, 14]
    for n, step in enumerate([2, 5, 8, 11, 14], start=1):
        assert float(schedule(step)) == pytest.approx(1 - 0.8**n, abs=1e-6)
        assert float(schedule(step - 1)) == pytest.approx(1 - 0.8 ** (n - 1), abs=1e-6)
    assert float(schedule(1000)) == pytest.approx(1 - 0.8**5, abs=1e-6)
    assert schedule.final == pytest.approx(1 - 0.8**5)


def test_geometric_counts_a_last_event_between_two_beats():
    schedule = schedules.geometric(0.5, begin=0, end=5, every=2)
    assert events(schedule, 10) == [0, 2, 4, 5]
    assert [float(schedule(step)) for step in (4, 5, 6)] == [0.875, 0.9375, 0.9375]
    assert schedule.final == 0.9375


def test_constant_prunes_at_the_first_update_and_holds():
    schedule = schedules.constant(0.7)
    assert events(schedule, 20) == [0]
    assert {float(schedule(step)) for step in range(20)} == {float(np.float32(0.7))}


def test_one_shot_is_dense_before_and_holds_afterwards():
    schedule = schedules.one_shot(0.5, at=4)
    assert events(schedule, 20) == [4]
    assert [float(schedule(step)) for step in (0, 3, 4, 5, 99)] == [0.0, 0.0, 0.5, 0.5, 0.5]


def test_custom_takes_any_function_of_the_step():
    schedule = schedules.custom(lambda step: jnp.where(step < 5, 0.25, 0.5), 1, 9, 4)
    assert events(schedule, 20) == [1, 5, 9]
    assert [float(schedule(step)) for step in (1, 5)] == [0.25, 0.5]


def test_cyclic_alternates_and_ends_sparse():
    schedule = schedules.cyclic(0.5, dense=2, sparse=3, begin=1, end=12)
    values = [float(schedule(step)) for step in range(15)]
    sparse = [1, 2, 3, 6, 7, 8, 11, 12, 13, 14]
    assert values == [0.5 if step in sparse else 0.0 for step in range(15)]
    assert events(schedule, 20) == [1, 4, 6, 9, 11, 12]
    assert schedule.final == 0.5


@pytest.mark.parametrize("end", [2, 3, 4, 5, 6, 7])
def test_cyclic_cuts_the_phase_short_that_the_end_falls_into(end):
    schedule = schedules.cyclic(0.5, dense=2, sparse=2, begin=2, end=end)
    assert events(schedule, 20) == [step for step in (2, 4, 6) if step < end] + [end]
    assert [float(schedule(step)) for step in (0, 1)] == [0.0, 0.0]
    assert {float(schedule(step)) for step in range(end, 12)} == {0.5}


@settings(max_examples=30, deadline=None)
@given(
    dense=st.integers(1, 9), sparse=st.integers(1, 9), begin=st.integers(0, 9), n=st.integers(0, 30)
)
def test_cyclic_changes_at_events_only(dense, sparse, begin, n):
    schedule = schedules.cyclic(0.5, dense, sparse, begin, begin + n)
    steps = np.arange(50)
    values, due = np.asarray(schedule(steps)), np.asarray(schedule.due(steps))
    want, on = [], False
    for step in steps:  # a slow walk through the phases
        into = (step - begin) % (sparse + dense)
        on = step >= begin + n or (step >= begin and into < sparse)
        want.append(0.5 if on else 0.0)
    assert values.tolist() == want
    assert not (np.diff(values, prepend=0.0) != 0)[~due].any()
    assert due[begin + n] and not due[:begin].any() and not due[begin + n + 1 :].any()


def test_cyclic_frees_all_weights_in_dense_phases_and_finds_masks_anew():
    # The small weight grows while it is free and stays in the end.
    params, grads = {"kernel": jnp.array([[1.0, 2.0]])}, {"kernel": jnp.array([[-1.0, 0.0]])}
    schedule = schedules.cyclic(0.5, dense=4, sparse=2, begin=0, end=6)
    tx = jp.prune(optax.sgd(1.0), schedule=schedule)
    _, state, all_params, masks = run(tx, params, 8, lambda p: grads)
    kept = masks["kernel"][:, 0].tolist()
    assert kept == [[False, True]] * 2 + [[True, True]] * 4 + [[True, False]] * 2
    values = [[0.0, 2.0]] * 2 + [[1.0, 2.0], [2.0, 2.0], [3.0, 2.0], [4.0, 2.0]]
    assert all_params["kernel"][:, 0].tolist() == [*values, [5.0, 0.0], [6.0, 0.0]]
    assert int(state.count) == 8


@settings(max_examples=100, deadline=None)
@given(begin=st.integers(0, 50), length=st.integers(0, 50), every=st.integers(1, 60))
def test_events_fall_on_the_beat_and_always_on_the_end(begin, length, every):
    schedule = schedules.cubic(0.9, begin=begin, end=begin + length, every=every)
    due = np.asarray(schedule.due(np.arange(120)))
    want = sorted({*range(begin, begin + length + 1, every), begin + length})
    assert np.flatnonzero(due).tolist() == want


@pytest.mark.parametrize("name", EXAMPLES)
def test_traced_steps_and_python_integers_agree(name):
    schedule = EXAMPLES[name]
    both = jax.jit(lambda step: (schedule(step), schedule.due(step)))
    values, due = jax.vmap(both)(jnp.arange(12))
    assert values.shape == due.shape == (12,) and due.dtype == bool
    for step in range(12):
        assert bool(due[step]) == bool(both(step)[1]) == bool(schedule.due(step))
        # A compiled program may round a product and a sum once instead of twice.
        assert float(values[step]) == pytest.approx(float(schedule(step)), abs=2.0**-23)
        assert float(both(step)[0]) == pytest.approx(float(schedule(step)), abs=2.0**-23)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"custom", "geometric"}))
def test_a_schedule_takes_a_tree_of_final_sparsities(name):
    tree = {"a": {"kernel": 0.5, "bias": None}, "b": 0.9}
    settings_of = {"constant": (), "one_shot": (5,), "cyclic": (2, 3, 2, 9)}.get(name, (2, 9, 3))
    got = getattr(schedules, name)(tree, *settings_of)(100)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert float(got["a"]["kernel"]) == 0.5 and float(got["b"]) == float(np.float32(0.9))


def test_geometric_takes_a_tree_of_rates():
    schedule = schedules.geometric({"a": 0.5, "b": 0.0}, begin=0, end=1, every=1)
    assert jax.tree.map(float, schedule(1)) == {"a": 0.75, "b": 0.0}
    assert schedule.final == {"a": 0.75, "b": 0.0}


@pytest.mark.parametrize("name", ["linear", "cubic", "cosine"])
@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_ramps_refuse_what_is_no_fraction(name, bad):
    make = getattr(schedules, name)
    with pytest.raises(ValueError, match=r"`schedule` got .*outside \[0, 1\]"):
        make(bad, begin=0, end=1, every=1)
    with pytest.raises(ValueError, match=r"`initial` got .*outside \[0, 1\]"):
        make(0.5, begin=0, end=1, every=1, initial=bad)
    with pytest.raises(ValueError, match=r"at 'layer', outside \[0, 1\]"):
        make({"layer": bad}, begin=0, end=1, every=1)


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_the_others_refuse_what_is_no_fraction(bad):
    for make in (
        schedules.constant,
        lambda s: schedules.one_shot(s, at=1),
        lambda s: schedules.geometric(s, begin=0, end=1, every=1),
    ):
        with pytest.raises(ValueError, match=r"got .*outside \[0, 1\]"):
            make(bad)


@pytest.mark.parametrize("name", ["linear", "cubic", "cosine", "geometric", "custom"])
def test_steps_are_checked_when_a_schedule_is_built(name):
    first = (lambda step: 0.5) if name == "custom" else 0.5
    make = getattr(schedules, name)
    with pytest.raises(ValueError, match=r"end=3 before begin=7.*swap"):
        make(first, begin=7, end=3, every=1)
    with pytest.raises(ValueError, match=r"every=0"):
        make(first, begin=0, end=3, every=0)
    with pytest.raises(ValueError, match=r"begin=-1.*integers from 0 on"):
        make(first, begin=-1, end=3, every=1)
    with pytest.raises(ValueError, match=r"end=3.5.*integers from 0 on"):
        make(first, begin=0, end=3.5, every=1)


def test_cyclic_checks_its_settings_when_built():
    with pytest.raises(ValueError, match=r"cyclic\(dense=0\)` has an empty phase.*1 step or more"):
        schedules.cyclic(0.5, dense=0, sparse=1, begin=0, end=9)
    with pytest.raises(ValueError, match=r"cyclic\(sparse=0\)` has an empty phase"):
        schedules.cyclic(0.5, dense=1, sparse=0, begin=0, end=9)
    with pytest.raises(ValueError, match=r"end=3 before begin=7.*swap"):
        schedules.cyclic(0.5, dense=1, sparse=1, begin=7, end=3)
    for name in ("dense", "sparse", "begin", "end"):
        for bad in (-1, 2.5, True, None):
            settings_of = {"dense": 1, "sparse": 1, "begin": 0, "end": 9, name: bad}
            with pytest.raises(ValueError, match=rf"{name}={bad}.*integers from 0 on"):
                schedules.cyclic(0.5, **settings_of)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`cyclic` got .*outside \[0, 1\]"):
            schedules.cyclic(bad, dense=1, sparse=1, begin=0, end=9)
        with pytest.raises(ValueError, match=r"`cyclic` got .*at 'layer', outside \[0, 1\]"):
            schedules.cyclic({"layer": bad}, dense=1, sparse=1, begin=0, end=9)


def test_one_shot_refuses_a_negative_step():
    with pytest.raises(ValueError, match=r"-1.*integers from 0 on"):
        schedules.one_shot(0.5, at=-1)


def test_custom_refuses_what_cannot_be_called():
    with pytest.raises(TypeError, match=r"custom\(fn=0.5\).*optax.linear_schedule"):
        schedules.custom(0.5, 0, 1, 1)


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan")])
def test_custom_refuses_a_function_that_leaves_the_range(bad):
    with pytest.raises(ValueError, match=r"`custom` got .*outside \[0, 1\]"):
        schedules.custom(lambda step: bad, 0, 3, 1)


def test_constant_may_look_again_until_an_end():
    schedule = schedules.constant(0.5, begin=2, end=7, every=3)
    assert [step for step in range(10) if schedule.due(step)] == [2, 5, 7]
    assert [float(schedule(step)) for step in (0, 1, 2, 9)] == [0.0, 0.0, 0.5, 0.5]


INTEGERS = (np.int64, np.int8, np.uint16, jnp.int32, np.array)


@pytest.mark.parametrize("name", sorted(set(EXAMPLES) - {"one_shot", "cyclic"}))
def test_steps_may_be_integers_of_any_make(name):
    first = (lambda step: 0.5) if name == "custom" else 0.5
    want = getattr(schedules, name)(first, begin=2, end=9, every=3)
    for make in INTEGERS:
        steps = {"begin": make(2), "end": make(9), "every": make(3)}
        got = getattr(schedules, name)(first, **steps)
        assert events(got, 12) == events(want, 12)
        assert all(float(got(step)) == float(want(step)) for step in (1, 2, 5, 9))
        assert repr(got) == repr(want) and all(type(s) is int for s in (got.begin, got.end))


@pytest.mark.parametrize("make", INTEGERS)
def test_phases_and_the_one_event_may_be_integers_of_any_make(make):
    got = schedules.cyclic(0.5, *map(make, (2, 3, 2, 9)))
    assert got == schedules.cyclic(0.5, 2, 3, 2, 9)
    assert events(schedules.one_shot(0.5, at=make(3)), 9) == [3]


@pytest.mark.parametrize("bad", [True, np.True_, jnp.array(True), np.float64(3), "3", None])
def test_a_bool_or_a_float_counts_no_steps(bad):
    with pytest.raises(ValueError, match=r"at=.*integers from 0 on"):
        schedules.one_shot(0.5, at=bad)
    with pytest.raises(ValueError, match=r"every=.*integers from 0 on"):
        schedules.cubic(0.5, begin=0, end=9, every=bad)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("bad", [True, np.False_, jnp.array(True)])
def test_a_bool_is_no_sparsity(name, bad):
    settings_of = {"constant": (), "one_shot": (5,), "cyclic": (2, 3, 2, 9)}.get(name, (2, 9, 3))
    for value in (bad, {"layer": bad}):
        first = (lambda step, value=value: value) if name == "custom" else value
        with pytest.raises(TypeError, match=r"got .*Pass the fraction to remove"):
            getattr(schedules, name)(first, *settings_of)


SHOWN = {
    "constant": "constant(0.8)",
    "one_shot": "one_shot(0.8, at=5)",
    "linear": "linear(0.8, begin=2, end=9, every=3)",
    "cubic": "cubic(0.8, begin=2, end=9, every=3)",
    "cosine": "cosine(0.8, begin=2, end=9, every=3)",
    "geometric": "geometric(0.2, begin=2, end=9, every=3)",
    "custom": "custom(schedule, begin=2, end=9, every=3)",
    "cyclic": "cyclic(0.8, dense=2, sparse=3, begin=2, end=9)",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_schedule_is_shown_as_the_call_that_makes_it(name):
    assert repr(EXAMPLES[name]) == SHOWN[name]


def test_settings_beside_the_defaults_and_long_trees_are_shown_in_short():
    schedule = schedules.linear({str(i): 0.5 for i in range(40)}, 0, 9, 1, initial=0.1)
    assert repr(schedule) == "linear(<dict>, begin=0, end=9, every=1, initial=0.1)"
    assert repr(schedules.constant(0.5, end=4)) == "constant(0.5, begin=0, end=4, every=1)"
