"""The search for the largest sparsity: against a walk over a grid, few evaluations, bad metrics."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp


def counted(metric):
    """The metric, and the sparsities that it was asked for."""
    asked = []

    def evaluate(sparsity):
        asked.append(sparsity)
        return metric(sparsity)

    return evaluate, asked


@given(st.floats(0.0, 1.0), st.sampled_from([0.1, 0.01, 0.003]))
def test_a_metric_that_falls_is_followed_to_within_the_resolution(knee, resolution):
    metric = lambda s: 0.9 if s <= knee else 0.5
    found = jp.find_sparsity(metric, 0.0, 0.95, resolution=resolution)
    grid = np.linspace(0.0, 0.95, 2001)
    want = max(s for s in grid if metric(s) >= 0.9)
    assert metric(found) == 0.9 and want - resolution - 1e-3 <= found <= want + 1e-3


def test_evaluations_are_few_and_never_repeated():
    evaluate, asked = counted(lambda s: 1 - max(0, s - 0.6))
    found = jp.find_sparsity(evaluate)
    assert found in asked and len(asked) == len(set(asked)) == 9
    assert asked[:2] == [0.0, 0.95] and 0.595 <= found <= 0.605


def test_where_the_highest_will_do_it_is_taken_at_once():
    evaluate, asked = counted(lambda s: 1.0)
    assert jp.find_sparsity(evaluate, 0.2, 0.9) == 0.9 and asked == [0.2, 0.9]


def test_a_baseline_of_ones_own_sets_the_bar():
    metric = lambda s: jnp.float32(1 - s)
    assert jp.find_sparsity(metric, tolerance=0.1) == pytest.approx(0.1, abs=0.01)
    got = jp.find_sparsity(metric, tolerance=0.1, baseline=0.8)
    assert got == pytest.approx(0.3, abs=0.01) and isinstance(got, float)


def test_a_metric_that_goes_up_and_down_gives_a_sparsity_that_was_seen_to_do():
    evaluate, asked = counted(lambda s: 1.0 if s < 0.1 or 0.4 < s < 0.5 else 0.0)
    found = jp.find_sparsity(evaluate)
    assert found in asked and (found < 0.1 or 0.4 < found < 0.5)


def test_a_network_that_diverged_is_within_no_tolerance():
    metric = lambda s: float("nan") if s > 0.7 else 1.0
    assert jp.find_sparsity(metric) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("metric", [lambda s: 0.9 - s, lambda s: float("nan")])
def test_a_dense_network_below_the_bar_is_an_error(metric):
    with pytest.raises(ValueError, match=r"at low=0, but 0.95 is the least.*Raise `tolerance`"):
        jp.find_sparsity(metric, tolerance=0.05, baseline=1.0)


def test_a_first_metric_that_is_nan_is_an_error():
    with pytest.raises(ValueError, match=r"metric of nan at low=0"):
        jp.find_sparsity(lambda s: float("nan"))


def test_what_evaluate_raises_passes_with_what_was_found_before():
    def evaluate(sparsity):
        if 0 < sparsity < 0.9:
            raise RuntimeError("out of memory")
        return 1.0 - sparsity

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        jp.find_sparsity(evaluate)
    (note,) = caught.value.__notes__
    assert "evaluate(0.475)" in note and "0: 1, 0.95: 0.05" in note


@pytest.mark.parametrize("value", [jnp.ones(3), None, "0.9"])
def test_a_metric_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"from evaluate\(0\). Return one number"):
        jp.find_sparsity(lambda s: value)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"low": 0.5, "high": 0.5}, r"low=0.5 and high=0.5.*0 <= low < high <= 1"),
        ({"high": 1.5}, r"high=1.5"),
        ({"low": -0.1}, r"low=-0.1"),
        ({"tolerance": -1.0}, r"tolerance=-1.0.*0 or more"),
        ({"tolerance": float("nan")}, r"tolerance=nan"),
        ({"resolution": 0}, r"resolution=0. Pass a positive"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_evaluated(settings, words):
    evaluate, asked = counted(lambda s: 1.0)
    with pytest.raises(ValueError, match=words):
        jp.find_sparsity(evaluate, **settings)
    assert asked == []
