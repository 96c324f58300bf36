"""Tests of summary and overlap."""

from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

PARAMS = {
    "in": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "out": {"kernel": jnp.ones((6, 2), jnp.bfloat16), "bias": jnp.ones(2)},
}


def masks_of(first, second):
    return {"in": {"kernel": first, "bias": None}, "out": {"kernel": second, "bias": None}}


MASKS = masks_of(
    jnp.array([[True, False, False, False, False, False]]),  # channels: 4 of 24 weights
    jnp.zeros((6, 2), bool),
)


def test_summary_counts_weights_and_bytes_of_each_leaf():
    rows = jp.summary(PARAMS, MASKS).rows
    assert [row.path for row in rows] == ["in/kernel", "out/kernel"]
    first, second = rows
    assert (first.shape, first.kept, first.total) == ((4, 6), 4, 24)
    assert first.sparsity == 20 / 24
    assert (first.dense_bytes, first.packed_bytes) == (96, 4 * 4 + 3)
    assert (second.dense_bytes, second.packed_bytes) == (24, 0 + 2)


def test_summary_totals_are_the_sums():
    table = jp.summary(PARAMS, MASKS)
    assert (table.total.kept, table.total.total, table.others) == (4, 36, 8)
    assert (table.total.dense_bytes, table.total.packed_bytes) == (120, 21)
    assert table.total.sparsity == jp.sparsity(MASKS, PARAMS) == 32 / 36


def test_summary_warns_of_collapsed_layers():
    table = jp.summary(PARAMS, MASKS)
    assert table.collapsed == ("out/kernel",)
    assert "warning: 'out/kernel' keeps nothing: the layer collapsed" in str(table)
    dense = jp.summary(PARAMS, jp.dense_masks(PARAMS))
    assert dense.collapsed == () and "warning" not in str(dense)


def test_an_empty_leaf_has_not_collapsed():
    params = {"w": jnp.ones((2, 2)), "none": jnp.ones((0, 2))}
    table = jp.summary(params, jp.dense_masks(params))
    assert table.collapsed == () and table.rows[0].sparsity == 0.0


def test_the_printed_table_lines_up():
    lines = str(jp.summary(PARAMS, MASKS)).splitlines()
    assert lines[0].split() == [
        "path",
        "shape",
        "kept",
        "/",
        "total",
        "sparsity",
        "dense",
        "packed",
    ]
    assert lines[2].split() == ["in/kernel", "4x6", "4", "/", "24", "83.33%", "96", "B", "19", "B"]
    assert lines[3].split() == ["out/kernel", "6x2", "0", "/", "12", "100.00%", "24", "B", "2", "B"]
    assert lines[5].split() == ["total", "4", "/", "36", "88.89%", "120", "B", "21", "B"]
    assert lines[6] == "not prunable: 8 parameters"
    assert len({len(line) for line in lines[:6]}) == 1


@pytest.mark.parametrize("shape, words", [((250, 1), "1.0 kB"), ((500, 1000), "2.0 MB")])
def test_sizes_are_written_for_people(shape, words):
    params = {"w": jnp.ones(shape)}
    assert words in str(jp.summary(params, {"w": jnp.ones((1, 1), bool)}))


def test_summary_refuses_masks_of_another_tree():
    with pytest.raises(ValueError, match=r"`masks` is not a tree like the params"):
        jp.summary(PARAMS, {"in": MASKS["in"]})


def test_overlap_is_intersection_over_union():
    a = masks_of(jnp.array([[True, True, False, False]]), jnp.array([[True, False]]))
    b = masks_of(jnp.array([[False, True, True, False]]), jnp.array([[True, False]]))
    shared = jp.overlap(a, b)
    assert shared.leaves == {
        "in": {"kernel": 1 / 3, "bias": None},
        "out": {"kernel": 1.0, "bias": None},
    }
    assert shared.total == 2 / 4


def test_equal_masks_overlap_fully_even_if_they_keep_nothing():
    nothing = {"w": jnp.zeros((2, 2), bool)}
    assert jp.overlap(nothing, nothing) == ({"w": 1.0}, 1.0)
    assert jp.overlap(MASKS, MASKS).total == 1.0


def test_random_masks_overlap_as_much_as_chance_says():
    rng = np.random.default_rng(0)
    a, b = ({"w": jnp.asarray(rng.random((300, 300)) < 0.2)} for _ in range(2))
    assert jp.overlap(a, b).total == pytest.approx(0.2 / 1.8, abs=0.005)


def test_overlap_broadcasts_channel_masks():
    channels = {"w": jnp.array([[True, False]])}
    full = {"w": jnp.array([[True, True], [True, False]])}
    assert jp.overlap(channels, full).total == 2 / 3


def test_overlap_refuses_masks_of_different_trees():
    with pytest.raises(
        ValueError,
        match=r"`masks_b` is not a tree like `masks_a`: nothing at 'out/kernel'. Compare",
    ):
        jp.overlap(MASKS, {"in": MASKS["in"], "out": {"kernel": None, "bias": None}})
    with pytest.raises(ValueError, match=r"'w' has shape \(1, 2\), in `masks_a` \(2,\). Compare"):
        jp.overlap({"w": jnp.ones(2, bool)}, {"w": jnp.ones((1, 2), bool)})


def test_a_notebook_draws_the_table_that_is_printed_with_a_bar_for_each_row():
    params = {"<a>": PARAMS["in"]["kernel"], "b": {"bias": jnp.ones(2)}}
    mask = jnp.array([[True, False, False, False, False, False]])
    table = jp.summary(params, {"<a>": mask, "b": {"bias": None}})
    drawn = ElementTree.fromstring(f"<body>{table._repr_html_()}</body>".replace("<br>", "<br/>"))
    head, *rows = drawn.findall("table/tr")
    cells = [["".join(cell.itertext()) for cell in row] for row in rows]
    printed = str(table).splitlines()
    assert cells[0] == ["<a>", "4x6", "4 / 24", "83.33%", "96 B", "19 B", ""]
    assert cells[-1][:1] == ["total"] and len(head) == 7
    assert [" ".join(row[:6]).split() for row in cells] == [printed[i].split() for i in (2, 4)]
    bars = [row.find("td/div/div").get("style") for row in rows]
    assert all("width:16.7%" in style for style in bars)
    assert list(drawn.find("p").itertext()) == printed[5:]
