"""Groups as plain data, built by hand: compared, printed, moved, kept, spread and expanded."""

from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune._group import Group, Member
from jaxprune._groups import Groups
from jaxprune._kept import kept_by
from jaxprune._units import expand
from tests.helpers import assert_trees_equal


def member(path, axis, indices):
    """A member of units that own one index each, or those of one row each."""
    indices = np.asarray(indices)
    return Member(path, axis, indices if indices.ndim == 2 else indices[:, None])


def hidden(prefix="", n=3):
    """Hidden units between two kernels, with a bias."""
    members = [member(f"{prefix}{path}", axis, np.arange(n)) for path, axis in
               (("in/bias", 0), ("in/kernel", 1), ("out/kernel", 0))]  # fmt: skip
    return Group(f"{prefix}in/kernel:1", tuple(members), n)


def params(n=3):
    return {
        "in": {"bias": jnp.zeros(n), "kernel": jnp.zeros((2, n))},
        "out": {"kernel": jnp.zeros((n, 2))},
    }


# Two heads of three dimensions in one projection of six columns.
HEADS = Group("qkv:1~2", (member("qkv", 1, np.arange(6).reshape(2, 3)),), 2)
DIMS = Group("qkv:1", (member("qkv", 1, np.arange(6).reshape(2, 3).T),), 3)
BLOCK = Group(
    "layers/0",
    (member("layers/0/w", 0, [[0, 1, 2]]), member("layers/0/b", 0, [[0, 1]])),
    1,
    kind="block",
)
LAYER = Group("layers[1]", (member("layers/w", 0, [[1]]),), 1, kind="block")


# One member, one group.


def test_members_are_equal_if_path_axis_and_indices_are():
    one = member("w", 1, [0, 2])
    assert one == member("w", 1, [0, 2]) and hash(one) == hash(member("w", 1, [0, 2]))
    others = member("v", 1, [0, 2]), member("w", 0, [0, 2]), member("w", 1, [2, 0])
    assert len({one, *others, member("w", 1, [[0, 2]])}) == 5
    assert one != ("w", 1)


def test_members_keep_their_indices_to_themselves():
    given = np.array([[0], [1]])
    one = Member("w", 0, given)
    given[:] = 7
    assert one.indices.tolist() == [[0], [1]]
    with pytest.raises(ValueError, match="read-only"):
        one.indices[0] = 7


def test_groups_are_equal_by_what_they_own_and_not_by_what_is_frozen():
    groups = Groups([hidden()])
    assert groups == Groups([hidden()], [("in/kernel", 0, 0, "an input")])
    assert hash(groups) == hash(Groups((hidden(),)))
    assert groups != Groups([hidden(n=4)]) and groups != (hidden(),)
    assert len({jp.patterns.Coupled(g) for g in (groups, Groups([hidden()]), groups[:1])}) == 1


# Printed.


def test_a_group_prints_what_its_units_own():
    inexact = Group(
        "w:1", (member("w", 1, [[0, 1], [2, 3]]),), 2, False, "`reduce_sum` at net.py:3"
    )
    assert str(hidden()) == (
        "in/kernel:1: 3 units\n  in/bias axis 0\n  in/kernel axis 1\n  out/kernel axis 0"
    )
    assert str(inexact) == (
        "w:1: 2 units, not exact: `reduce_sum` at net.py:3\n  w axis 1, 2 a unit"
    )


def test_a_block_prints_what_goes_with_it():
    assert str(BLOCK) == "layers/0: a block\n  layers/0/w\n  layers/0/b"
    assert str(LAYER) == "layers[1]: a block\n  layers/w axis 0, index 1"


def test_a_group_of_many_members_prints_twelve_of_them():
    group = Group("0:1", tuple(member(str(i), 1, [0, 1]) for i in range(15)), 2)
    assert str(group).splitlines()[-2:] == ["  11 axis 1", "  and 3 more"]


def test_groups_print_what_is_frozen_with_the_reason():
    frozen = [("w", 0, 0, "it is axis 1 of an output"), ("v", 1, 2, "`slice` at net.py:7")]
    text = str(Groups([hidden()], frozen))
    assert text.endswith(
        "frozen:\n  w axis 0: it is axis 1 of an output\n  v axis 1: 2 indices, `slice` at net.py:7"
    )
    assert str(Groups()) == "no groups"
    assert repr(Groups([hidden(), DIMS])) == "Groups(in/kernel:1 x 3, qkv:1 x 3)"


# Moved to a subtree, to the small network.


def test_at_sees_a_subtree_as_its_own_tree():
    stats = member("stats/mean", 0, np.arange(3))
    whole = hidden("params/")
    group = Group(whole.name, (*whole.members, stats), 3)
    frozen = [("params/in/kernel", 0, 0, "an input"), ("stats/var", 0, 0, "a state")]
    groups = Groups([group, Group("stats/mean:0", (stats,), 3)], frozen)
    for prefix in ("params", "params/"):
        assert groups.at(prefix) == Groups([hidden()])
        assert groups.at(prefix).frozen == (("in/kernel", 0, 0, "an input"),)
    assert len(groups.at("stats")) == 2
    assert Groups().at("params") == Groups()
    with pytest.raises(
        ValueError, match=r"groups.at\('param'\)` finds no member below it.*params/"
    ):
        groups.at("param")


def test_cut_leaves_out_units_that_are_gone_and_counts_anew():
    masks = {"in": {"bias": jnp.array([True, False, True])}}
    (small,) = Groups([hidden()]).cut({**masks, "out": None})
    assert small.size == 2
    assert [m.indices.ravel().tolist() for m in small.members] == [[0, 1], [0, 2], [0, 2]]
    (small,) = Groups([hidden()]).cut(expand([hidden()], {"in/kernel:1": [0, 0, 1]}, params()))
    assert [m.indices.tolist() for m in small.members] == [[[0]]] * 3


def test_cut_takes_part_of_every_head_if_dimensions_go():
    keep = {"qkv:1": [True, False, True], "qkv:1~2": [True, True]}
    masks = expand([HEADS, DIMS], keep, {"qkv": jnp.zeros((4, 6))})
    heads, dims = Groups([HEADS, DIMS]).cut(masks)
    assert heads.members[0].indices.tolist() == [[0, 1], [2, 3]]
    assert dims.members[0].indices.tolist() == [[0, 2], [1, 3]]


def test_cut_leaves_out_blocks_that_are_gone():
    gone = {"layers/0/w": jnp.zeros((3, 1), bool), "layers/0/b": jnp.zeros(2, bool)}
    assert Groups([BLOCK]).cut(gone) == Groups()
    assert Groups([BLOCK]).cut({"layers/0/w": jnp.ones((3, 1), bool)}) == Groups([BLOCK])
    (left,) = Groups([LAYER]).cut({"layers/w": jnp.array([[False], [True]])})
    assert left.members[0].indices.tolist() == [[0]]


def test_cut_of_a_group_in_a_block_that_is_gone_is_nothing():
    masks = jax.tree.map(lambda p: jnp.zeros((1,) * p.ndim, bool), params())
    assert Groups([hidden()]).cut(masks) == Groups()


# Kept, completed, expanded.


def test_keep_reads_units_from_any_member():
    groups = Groups([hidden()])
    for masks in (
        {"in": {"bias": jnp.array([True, False, True])}},
        {"out": {"kernel": jnp.array([[True], [False], [True]])}},
        expand(groups, {"in/kernel:1": [True, False, True]}, params()),
    ):
        assert groups.keep(masks)["in/kernel:1"].tolist() == [True, False, True]
    assert groups.keep({"in": None})["in/kernel:1"].all()  # no mask, nothing gone


def test_keep_reads_heads_and_dimensions_from_one_axis():
    mask = {"qkv": jnp.array([[True, False, True, False, False, False]])}
    keep = Groups([HEADS, DIMS]).keep(mask)
    assert keep["qkv:1~2"].tolist() == [True, False]
    assert keep["qkv:1"].tolist() == [True, False, True]


def test_keep_refuses_masks_that_contradict_a_group():
    bias = jnp.array([True, False, True])
    for kernel, words in (
        (jnp.array([[True, True, True]]), "remove index 1 of axis 0 of 'in/bias'"),
        (jnp.array([[True, False, False]]), "remove index 2 of axis 1 of 'in/kernel'"),
    ):
        masks = {"in": {"bias": bias, "kernel": kernel}, "out": None}
        with pytest.raises(ValueError, match=f"{words}, which contradicts.*in/bias.*complete"):
            Groups([hidden()]).keep(masks)
    part = {"qkv": jnp.array([[True, True, True, True, False, True]])}
    with pytest.raises(ValueError, match="remove index 4 of axis 1 of 'qkv'"):
        Groups([HEADS]).keep(part)


def test_keep_says_that_what_lies_in_a_block_that_is_gone_is_gone():
    gone = jax.tree.map(lambda p: jnp.zeros((1,) * p.ndim, bool), params())
    assert not Groups([hidden()]).keep(gone)["in/kernel:1"].any()
    gone["out"] = None  # it is read elsewhere
    assert Groups([hidden()]).keep(gone)["in/kernel:1"].all()


def test_keep_lets_blocks_that_stay_lose_channels():
    masks = {"layers/0/w": jnp.array([[True], [False], [True]]), "layers/0/b": None}
    assert Groups([BLOCK]).keep(masks)["layers/0"].all()


def test_complete_fills_in_masks_and_leaves_the_given_ones_alone():
    bias, other = jnp.array([False, True, True]), jnp.array([[True, False]])
    tree = {**params(), "free": jnp.zeros((3, 2)), "lone": jnp.zeros(4)}
    masks = Groups([hidden()]).complete({"in": {"bias": bias}, "free": other}, tree)
    assert_trees_equal(
        masks,
        {
            "in": {"bias": bias, "kernel": bias[None]},
            "out": {"kernel": bias[:, None]},
            "free": other,
            "lone": None,
        },
    )
    with pytest.raises(ValueError, match="nobody"):
        Groups([hidden()]).complete({"nobody": bias}, tree)


def test_without_removes_groups_by_name_and_refuses_unknown_names():
    tree = {
        "layers/0/w": jnp.zeros((3, 2)),
        "layers/0/b": jnp.zeros(2),
        "layers/w": jnp.zeros((2, 5)),
    }
    groups = Groups([BLOCK, LAYER])
    masks = groups.without(["layers/0"], tree)
    assert not masks["layers/0/w"].any() and not masks["layers/0/b"].any()
    assert masks["layers/w"].tolist() == [[True], [True]]
    assert groups.without(iter(["layers[1]"]), tree)["layers/w"].tolist() == [[True], [False]]
    with pytest.raises(ValueError, match=r"no group 'layers/1'; the names are 'layers/0', 'layers"):
        groups.without(["layers/0", "layers/1"], tree)


def test_groups_of_the_same_kind_of_members_are_isomorphic():
    groups = Groups([hidden("layers_0/"), hidden("layers_1/", n=5), hidden("other/"), HEADS, DIMS])
    assert groups.isomorphic() == {
        "layers_0/in/kernel:1": "layers_0/in/kernel:1",
        "layers_1/in/kernel:1": "layers_0/in/kernel:1",
        "other/in/kernel:1": "other/in/kernel:1",
        "qkv:1~2": "qkv:1~2",  # units of three columns, not of two
        "qkv:1": "qkv:1",
    }
    assert jp.scopes.isomorphic(groups) == jp.scopes.isomorphic(Groups(list(groups)))


def test_expand_makes_masks_that_are_full_only_where_a_group_cuts():
    masks = expand([hidden()], {"in/kernel:1": [True, False, True]}, params())
    assert masks["in"]["bias"].tolist() == [True, False, True]
    assert masks["in"]["kernel"].tolist() == [[True, False, True]]
    assert masks["out"]["kernel"].tolist() == [[True], [False], [True]]


def test_expand_keeps_what_all_owners_keep_and_what_nobody_owns():
    like = {"qkv": jnp.zeros((4, 8)), "w": jnp.zeros((2, 2))}
    keep = {"qkv:1": jnp.array([True, False, True]), "qkv:1~2": jnp.array([False, True])}
    masks = jax.jit(lambda keep: expand([HEADS, DIMS], keep, like))(keep)
    assert masks["qkv"].tolist() == [[False, False, False, True, False, True, True, True]]
    square = Group("w:1", (member("w", 0, [0, 1]), member("w", 1, [0, 1])), 2)
    both = expand([square], {"w:1": [True, False]}, like)
    assert both["w"].tolist() == [[True, False], [False, False]] and both["qkv"] is None


def test_expand_names_the_member_that_does_not_fit():
    keep = {"in/kernel:1": [True, True, True]}
    with pytest.raises(ValueError, match=r"member 'out/kernel' that `params` lack.*groups.at"):
        expand([hidden()], keep, {"in": params()["in"]})
    with pytest.raises(
        ValueError, match=r"owns index 2 of axis 0 of 'in/bias'.*\(2,\).*groups.cut"
    ):
        expand([hidden()], keep, params(2))


def test_kept_indices_are_read_from_masks_of_whole_indices_only():
    read = kept_by({"w": jnp.array([[True, False, True]]), "b": jnp.ones(2, bool)})
    assert list(read["w"]) == [1] and read["w"][1].tolist() == [0, 2] and read["b"] == {}
    both = kept_by({"w": jnp.array([[True, False, True], [False] * 3])})["w"]
    assert {axis: indices.tolist() for axis, indices in both.items()} == {0: [0], 1: [0, 2]}
    assert kept_by({"w": jnp.zeros((2, 3), bool)})["w"][0].tolist() == []  # dropped as a whole
    assert kept_by({"w": jnp.ones((0, 3), bool)}) == {"w": {}}  # nothing left to remove
    with pytest.raises(ValueError, match="'w' removes 1 single weights of rows and columns"):
        kept_by({"w": jnp.array([[True, False], [True, True]])})


def test_a_notebook_draws_the_groups_that_are_printed():
    def fn(params, x):
        return jax.nn.relu(x @ params["<a>"]) @ params["b"]

    params = {"<a>": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    groups = jp.find_groups(fn, params, jnp.ones((1, 3)))
    html = f"<body>{groups._repr_html_()}</body>".replace("<br>", "<br/>")
    drawn = ElementTree.fromstring(html)
    row = drawn.findall("table/tr")[1]
    words = [[*cell.itertext()] for cell in row]
    assert words == [["<a>:1"], [], ["4 units"], ["<a> axis 1", "b axis 0"]]
    assert "width:100.0%" in row.find("td/div/div").get("style")
    frozen = [*drawn.find("details").itertext()]
    assert [f"  {line}" for line in frozen[1:]] == str(groups).splitlines()[4:]
    assert Groups()._repr_html_() == "no groups"


def test_the_old_name_of_complete_warns_and_does_the_same():
    units = np.arange(3)[:, None]
    groups = Groups([Group("a:1", (Member("a", 1, units), Member("b", 0, units)), 3)])
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    masks = {"a": jnp.array([[True, False, True]])}
    with pytest.warns(DeprecationWarning, match="`groups.complete`"):
        old = groups.spread(masks, params)
    assert_trees_equal(old, groups.complete(masks, params))
