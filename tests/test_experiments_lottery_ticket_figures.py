"""Tests of experiments/lottery_ticket_figures.py."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import lottery_ticket_figures as figures
from experiments.common import show


def record(level, seed, condition, accuracy):
    return {
        "level": level,
        "seed": seed,
        "condition": condition,
        "sparsity": 1 - 0.5**level,
        "accuracy": accuracy,
        "accuracy_early": accuracy / 2,
        "accuracy_best": accuracy,
        "early_stop_step": 10 * (1 + seed),
        "steps": [10, 20],
        "validation_accuracy": [accuracy / 2, accuracy],
    }


@pytest.fixture
def records():
    return [
        record(1, 1, "ticket", 0.8),
        record(0, 0, "dense", 0.9),
        record(0, 1, "dense", 0.7),
        record(1, 0, "ticket", 0.6),
        record(1, 0, "reinit", 0.5),
        record(1, 1, "reinit", 0.4),
    ]


def test_a_row_gathers_the_seeds_in_order(records):
    rows = figures.summarise(records)
    assert [(row["level"], row["condition"]) for row in rows] == [
        (0, "dense"),
        (1, "ticket"),
        (1, "reinit"),
    ]
    assert rows[1]["sparsity"] == 0.5
    assert rows[1]["accuracy"]["seeds"] == [0.6, 0.8]
    assert rows[1]["accuracy"]["mean"] == pytest.approx(0.7)
    assert rows[1]["accuracy"]["std"] == pytest.approx(0.1)
    assert rows[1]["early_stop_step"] == {"mean": 15.0, "std": 5.0, "seeds": [10, 20]}


def test_conditions_are_those_of_the_pruned_levels(records):
    assert figures.conditions(figures.summarise(records)) == ["ticket", "reinit"]


def test_every_condition_starts_from_the_dense_row(records):
    rows = figures.summarise(records)
    assert figures.row_at(rows, 0, "reinit")["condition"] == "dense"
    assert figures.row_at(rows, 1, "reinit")["condition"] == "reinit"


def test_difference_pairs_the_seeds(records):
    mean, worst = figures.difference(figures.summarise(records), 1, "reinit")
    assert (mean, worst) == (pytest.approx(0.25), pytest.approx(0.1))


def test_curves_are_steps_and_a_line_a_seed(records):
    steps, seeds = figures.curves(records, 0, "ticket")
    assert steps.tolist() == [10, 20]
    assert seeds.tolist() == [[0.45, 0.9], [0.35, 0.7]]


MASKS = {
    "a": {"kernel": np.array([[True, False], [False, False]]), "bias": None},
    "b": {"kernel": np.array([[True], [True]]), "bias": None},
}


def test_chance_overlap_is_what_random_masks_share():
    rng = np.random.default_rng(0)
    a, b = ({"w": rng.random((300, 300)) < kept} for kept in (0.2, 0.3))
    both, either = (a["w"] & b["w"]).sum(), (a["w"] | b["w"]).sum()
    assert figures.chance_overlap(a, b) == pytest.approx(both / either, rel=0.03)
    assert figures.chance_overlap({"w": np.ones((2, 2), bool)}, {"w": np.ones((2, 2), bool)}) == 1
    assert figures.chance_overlap({"w": np.zeros((2, 2), bool)}, {"w": np.zeros((2, 2), bool)}) == 0


def test_weights_are_split_by_path_whatever_the_order():
    weights = {
        "b": {"bias": np.zeros(1), "kernel": np.array([[5.0], [6.0]])},
        "a": {"bias": np.zeros(2), "kernel": np.array([[1.0, 2.0], [3.0, 4.0]])},
    }
    kept, removed = figures.split_weights(weights, MASKS)
    assert (kept.tolist(), removed.tolist()) == ([1.0, 5.0, 6.0], [2.0, 3.0, 4.0])


def test_figures_draw_a_line_a_condition_and_the_dense_one(records):
    rows = figures.summarise(records)
    figure = figures.accuracy_figure(rows, steps=20, early_step=10)
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == ["dense", "ticket", "reinit"]
        assert axes.get_xlim()[0] > 100 > 50 > axes.get_xlim()[1]
    assert show.png(figure).startswith(b"\x89PNG")


def test_learning_curves_have_a_panel_a_condition(records):
    figure = figures.learning_figure(records)
    assert [axes.get_title() for axes in figure.axes] == ["ticket", "reinit"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["100 %", "50 %"]


def test_a_dense_run_alone_can_be_drawn(records):
    dense = [each for each in records if each["level"] == 0]
    rows = figures.summarise(dense)
    assert show.png(figures.accuracy_figure(rows, steps=20, early_step=10))
    assert show.png(figures.learning_figure(dense))


def test_a_level_with_nothing_left_does_not_break_the_axis():
    axes = Figure().subplots()
    figures.weights_left_axis(axes, [100.0, 50.0, 0.0])
    assert axes.get_xlim() == (pytest.approx(110), pytest.approx(50 / 1.1))
