"""Tests of the relations between indices: what dies together, what cannot, what is a product."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.graph._coupling import Coupling


def test_joined_ids_are_one_unit():
    coupling = Coupling()
    a, b, c = (coupling.fresh(2) for _ in range(3))
    coupling.join(a, b)
    coupling.join(b, c[::-1])
    coupling.solve()
    assert coupling.find(a).tolist() == coupling.find(b).tolist() == coupling.find(c[::-1]).tolist()
    assert len(np.unique(coupling.find(np.concatenate([a, b, c])))) == 2


def test_a_frozen_id_holds_what_it_is_joined_with_and_says_why():
    coupling = Coupling()
    a, b = coupling.fresh(3), coupling.fresh(3)
    coupling.freeze(b[1:2], "an output")
    coupling.freeze(b[1:2], "another reason, too late")
    coupling.join(a, b)
    coupling.solve()
    assert coupling.frozen(a).tolist() == [False, True, False]
    assert coupling.why_frozen(a) == "an output" and coupling.why_frozen(a[:1]) == ""
    assert coupling.units(a)[0].tolist() == [0, 2]  # what cannot die has no unit


def test_a_chain_of_joins_in_one_go_hands_reasons_down():
    coupling = Coupling()
    ids = coupling.fresh(3)
    coupling.freeze(ids[2:], "an output")
    coupling.join(ids[:2], ids[1:])
    coupling.solve()
    assert coupling.frozen(ids).all() and coupling.why_frozen(ids[:1]) == "an output"


def test_reasons_are_only_worked_out_where_they_are_news():
    coupling = Coupling()
    a = coupling.fresh(2)
    coupling.freeze(a, "first")
    coupling.freeze(a, lambda: pytest.fail("asked for a reason that nobody needs"))
    assert coupling.why_frozen(a) == "first"


def test_what_is_not_exact_says_why_for_all_that_is_joined_with_it():
    coupling = Coupling()
    a, b = coupling.fresh(2), coupling.fresh(2)
    coupling.blur(a[:1], lambda: "a sum")
    coupling.join(a, b)
    coupling.solve()
    assert (coupling.why_inexact(b[:1]), coupling.why_inexact(b[1:])) == ("a sum", "")


def test_a_cell_dies_with_its_row_and_with_its_column():
    coupling = Coupling()
    rows, columns, cells = coupling.fresh(2), coupling.fresh(3), coupling.fresh(6)
    coupling.product(cells, rows, columns)
    coupling.solve()
    assert coupling.alive(rows[:1])[cells].tolist() == [False] * 3 + [True] * 3
    assert coupling.alive(columns[1:2])[cells].tolist() == [True, False, True] * 2
    position, unit = coupling.units(cells)
    assert {p: set(unit[position == p]) for p in (0, 5)} == {
        0: {rows[0], columns[0]},
        5: {rows[1], columns[2]},
    }


def test_a_frozen_cell_holds_its_row_and_its_column():
    coupling = Coupling()
    rows, columns, cells = coupling.fresh(2), coupling.fresh(3), coupling.fresh(6)
    coupling.product(cells, rows, columns)
    coupling.freeze(cells[4:5], "it is read alone")
    coupling.solve()
    assert coupling.frozen(rows).tolist() == [False, True]
    assert coupling.frozen(columns).tolist() == [False, True, False]
    assert coupling.why_frozen(rows) == "it is read alone"


def test_a_row_that_cannot_die_leaves_its_cells_to_the_columns():
    coupling = Coupling()
    rows, columns, cells = coupling.fresh(2), coupling.fresh(3), coupling.fresh(6)
    coupling.product(cells, rows, columns)
    coupling.freeze(rows, "whole")
    coupling.solve()
    for one in cells.reshape(2, 3):
        assert coupling.find(one).tolist() == coupling.find(columns).tolist()


def test_equal_cells_make_equal_factors():
    coupling = Coupling()
    a, b = ((coupling.fresh(2), coupling.fresh(3)) for _ in range(2))
    cells = coupling.fresh(6)
    for rows, columns in (a, b):
        coupling.product(cells, rows, columns)
    coupling.solve()
    for one, other in zip(a, b, strict=True):
        assert coupling.find(one).tolist() == coupling.find(other).tolist()


def test_two_splits_of_an_axis_nest_into_three_factors():
    coupling = Coupling()
    (two, six), (four, three), cells = (
        (coupling.fresh(2), coupling.fresh(6)),
        (coupling.fresh(4), coupling.fresh(3)),
        coupling.fresh(12),
    )
    coupling.product(cells, two, six)
    coupling.product(cells, four, three)
    coupling.solve()
    assert len(np.unique(coupling.units(cells)[1])) == 2 + 2 + 3
    alive = coupling.alive(two[:1])
    assert alive[coupling.find(four)].tolist() == [False, False, True, True]
    alive = coupling.alive(three[:1])
    assert alive[coupling.find(six)].tolist() == [False, True, True, False, True, True]


def test_two_splits_that_do_not_fit_freeze_the_axis():
    coupling = Coupling()
    factors = [(coupling.fresh(2), coupling.fresh(6)), (coupling.fresh(3), coupling.fresh(4))]
    cells = coupling.fresh(12)
    for rows, columns in factors:
        coupling.product(cells, rows, columns)
    coupling.solve()
    assert coupling.frozen(cells).all() and coupling.frozen(factors[0][1]).all()
    assert "two ways that do not fit" in coupling.why_frozen(cells)


def test_a_cell_that_is_its_own_factor_holds_the_other_factor():
    coupling = Coupling()
    rows, columns = coupling.fresh(2), coupling.fresh(2)
    coupling.product(np.array([rows[0], columns[1], rows[1], rows[1]]), rows, columns)
    coupling.solve()
    assert coupling.frozen(columns[:1]).all()
    assert "part of its own axis" in coupling.why_frozen(columns)


def test_products_that_go_round_in_a_circle_are_frozen():
    coupling = Coupling()
    a, b, c, d = (coupling.fresh(2) for _ in range(4))
    coupling.product(np.concatenate([a, coupling.fresh(2)]), b, c)
    coupling.product(np.concatenate([b, coupling.fresh(2)]), a, d)
    coupling.solve()
    assert coupling.frozen(np.concatenate([a, b])).all()
    assert "part of itself" in coupling.why_frozen(a)


def test_an_axis_whose_every_index_would_go_with_one_unit_stays():
    coupling = Coupling()
    rows, columns, cells = coupling.fresh(2), coupling.fresh(2), coupling.fresh(4)
    coupling.join(rows[:1], rows[1:])
    coupling.product(cells, rows, columns)
    coupling.solve()
    assert coupling.frozen(rows).all() and not coupling.frozen(columns).any()
    assert "every index" in coupling.why_frozen(rows)


def test_kinds_are_axes_that_have_an_index_in_common():
    coupling = Coupling()
    a, b, c = (coupling.fresh(2) for _ in range(3))
    coupling.join(a[:1], b[1:])
    coupling.solve()
    kinds = coupling.kinds()
    assert len(set(kinds[np.concatenate([a, b])])) == 1 and kinds[a[0]] != kinds[c[0]]


def test_units_are_unknown_before_conclusions_are_drawn():
    coupling = Coupling()
    with pytest.raises(RuntimeError, match=r"solve.. comes before questions"):
        coupling.units(coupling.fresh(2))


def test_there_may_be_more_ids_than_room_was_made_for():
    coupling = Coupling()
    ids = np.concatenate([coupling.fresh(700) for _ in range(4)])
    coupling.join(ids[:700], ids[2100:])
    assert np.array_equal(coupling.find(ids), [*range(2100), *range(700)])


# Any relations at all, against a reading of what they say.

SIZES = (1, 2, 2, 3, 4, 6)


@st.composite
def relations(draw):
    """Joins, frozen ids and products of a few axes, over axes or any ids."""
    n = sum(SIZES)
    ids = lambda k: st.lists(st.integers(0, n - 1), min_size=k, max_size=k)
    axes = st.integers(0, len(SIZES) - 1)
    made = []
    for kind in draw(st.lists(st.sampled_from(("join", "freeze", "product", "grid")), max_size=7)):
        if kind == "join":
            k = draw(st.integers(1, 4))
            made.append((kind, draw(ids(k)), draw(ids(k))))
        elif kind == "freeze":
            made.append((kind, draw(ids(1))))
        elif kind == "product":  # new cells, as of a reshape that merges
            made.append((kind, draw(axes), draw(axes)))
        else:  # cells of any kind, as of a reshape that splits
            p, q = draw(st.integers(1, 3)), draw(st.integers(1, 3))
            made.append((kind, draw(ids(p * q)), draw(ids(p)), draw(ids(q))))
    return made


@settings(max_examples=300, deadline=None)
@given(relations(), st.randoms(use_true_random=False))
def test_whatever_units_die_every_relation_holds(made, random):
    coupling = Coupling()
    axes = [coupling.fresh(n) for n in SIZES]
    joins, frozen, products = [], [], []
    for kind, *what in made:
        if kind == "join":
            joins.append([np.array(ids) for ids in what])
            coupling.join(*joins[-1])
        elif kind == "freeze":
            frozen.append(np.array(what[0]))
            coupling.freeze(frozen[-1], "frozen")
        elif kind == "product":
            rows, columns = (axes[i] for i in what)
            products.append((coupling.fresh(len(rows) * len(columns)), rows, columns))
            coupling.product(*products[-1])
        else:
            products.append([np.array(ids) for ids in what])
            coupling.product(*products[-1])
    coupling.solve()

    every = np.concatenate([*axes, *(np.ravel(cells) for cells, *_ in products)])
    position, unit = coupling.units(every)
    for _ in range(5):
        dead = np.array([u for u in np.unique(unit) if random.random() < 0.4], np.int64)
        flags = coupling.alive(dead)
        alive = lambda ids: flags[coupling.find(np.asarray(ids))]  # noqa: B023
        for a, b in joins:
            assert (alive(a) == alive(b)).all()
        for ids in frozen:
            assert alive(ids).all()
        for cells, rows, columns in products:
            assert (alive(cells) == np.ravel(np.outer(alive(rows), alive(columns)))).all()
        gone = np.isin(np.arange(len(every)), position[np.isin(unit, dead)])
        assert (alive(every) == ~gone).all()  # an index dies with its units and only with them
