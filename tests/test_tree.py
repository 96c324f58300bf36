"""Tests of paths, holes and the question which leaves are prunable."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune._tree import (
    align,
    is_hole,
    leaves_by_keys,
    leaves_by_path,
    leaves_with_path,
    map_leaves,
    match,
    narrow,
)
from tests.helpers import assert_trees_equal


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


def paths(tree):
    return [path for path, _ in leaves_with_path(tree)]


def test_paths_are_written_with_slashes_whatever_the_container():
    tree = {"a": [jnp.ones(1), (jnp.ones(1),)], "b": Pair(jnp.ones(1), {"c": jnp.ones(1)})}
    assert paths(tree) == ["a/0", "a/1/0", "b/left", "b/right/c"]


def test_the_value_that_nnx_adds_to_paths_is_left_out():
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert paths(state) == ["bias", "kernel"]
    assert paths(nnx.to_pure_dict(state)) == ["bias", "kernel"]


def test_a_leaf_named_value_in_a_dict_keeps_its_name():
    assert paths({"attention": {"value": jnp.ones(1)}}) == ["attention/value"]


def test_none_and_masked_nodes_are_holes():
    assert is_hole(None) and is_hole(optax.MaskedNode()) and not is_hole(jnp.ones(1))
    tree = {"a": None, "b": optax.MaskedNode(), "c": jnp.ones(1)}
    assert paths(tree) == ["c"]


def test_map_leaves_gives_none_for_the_holes_of_later_trees():
    seen = map_leaves(
        lambda p, m: (p, m), {"a": 1, "b": None, "c": 3}, {"a": 4, "b": 5, "c": optax.MaskedNode()}
    )
    assert seen == {"a": (1, 4), "b": None, "c": (3, None)}


@pytest.mark.parametrize(
    "path, array, want",
    [
        ("Dense_0/kernel", jnp.ones((2, 2)), True),
        ("Conv_0/kernel", jnp.ones((3, 3, 2, 2)), True),
        ("w", np.ones((2, 2), np.float32), True),
        ("w", jax.ShapeDtypeStruct((2, 2), jnp.bfloat16), True),
        ("", jnp.ones((2, 2)), True),
        ("Dense_0/bias", jnp.ones(2), False),
        ("layers/bias", jnp.ones((2, 2)), False),  # stacked for a scan
        ("layers/scale", jnp.ones((2, 2)), False),
        ("layers/bias_proj", jnp.ones((2, 2)), True),
        ("embedding", jnp.ones((2, 2), jnp.int32), False),
        ("spectrum", jnp.ones((2, 2), jnp.complex64), False),
        ("key", 3.0, False),
    ],
)
def test_is_matrix_means_a_floating_array_of_rank_two_or_more(path, array, want):
    assert jp.is_matrix(path, array) is want


def test_by_path_matches_the_whole_path():
    where = jp.by_path(r".*Dense_\d+/kernel", "head/.*")
    assert where("encoder/Dense_0/kernel", None) and where("head/bias", None)
    assert not where("Dense_0/kernel_norm", None) and not where("my/head/bias", None)


def test_by_path_compares_equal_by_its_regexes():
    assert jp.by_path("a", "b") == jp.by_path("a", "b") != jp.by_path("b", "a")
    assert hash(jp.by_path("a")) == hash(jp.by_path("a"))


def test_by_path_refuses_bad_regexes_when_built():
    with pytest.raises(ValueError, match=r"`by_path\(\)` got no regex"):
        jp.by_path()
    with pytest.raises(ValueError, match=r"`by_path` got '\['.*no regular expression"):
        jp.by_path("[")
    with pytest.raises(TypeError, match=r"`by_path` got 3 of type int"):
        jp.by_path(3)


PARAMS = {"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "step": jnp.int32(3)}


def test_prunable_puts_none_where_a_leaf_is_not():
    part = jp.prunable(PARAMS)
    assert part["Dense_0"]["bias"] is None and part["step"] is None
    assert part["Dense_0"]["kernel"] is PARAMS["Dense_0"]["kernel"]


def test_prunable_leaves_out_what_is_not_floating_whatever_where_says():
    part = jp.prunable(PARAMS, where=lambda path, leaf: True)
    assert part["step"] is None and part["Dense_0"]["bias"] is not None


def test_prunable_names_the_regex_that_matches_nothing_and_the_paths_there_are():
    words = r"'Dense_1/kernel'.*matches no parameter.*'Dense_0/bias', 'Dense_0/kernel', 'step'"
    with pytest.raises(ValueError, match=words):
        jp.prunable(PARAMS, where=jp.by_path("Dense_0/kernel", "Dense_1/kernel"))


def test_prunable_refuses_a_tree_without_a_prunable_leaf():
    words = r"No leaf.*is prunable with where=is_matrix.*'bias' float32\[2\].*by_path"
    with pytest.raises(ValueError, match=words):
        jp.prunable({"bias": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"No leaf.*the leaves are none"):
        jp.prunable({})


def test_long_lists_of_paths_are_cut():
    many = {f"w{i:02}": jnp.ones((1, 1)) for i in range(30)}
    with pytest.raises(ValueError, match="'w11' and 18 more"):
        jp.prunable(many, where=jp.by_path("nobody"))


def test_narrow_leaves_alone_what_does_not_mirror_the_params():
    part = jp.prunable(PARAMS)
    mirror = jax.tree.map(lambda x: x + 1, PARAMS)
    assert narrow(mirror, part)["step"] is None
    other = {"loss": jnp.ones(3)}
    assert_trees_equal(narrow(other, part), other)


class Attention(NamedTuple):
    key: jax.Array
    value: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    value: jax.Array


@pytest.mark.parametrize(
    "tree, want",
    [
        ({"a": Attention(1.0, 2.0)}, ["a/key", "a/value"]),
        ({"a": Attention(None, 2.0)}, ["a/value"]),  # the hole is a neighbour
        ({"a": Box(1.0), "b": Box(2.0)}, ["a", "b"]),  # what a container adds
        ({"a": {"value": 1.0}}, ["a/value"]),  # what somebody called it
        (Box(1.0), ["value"]),
        ({"a": Box(Attention(1.0, 2.0))}, ["a/value/key", "a/value/value"]),
        ({"a": [Box(1.0)], "b": (Box(2.0), Box(3.0))}, ["a/0", "b/0", "b/1"]),
    ],
)
def test_a_trailing_value_goes_only_where_it_is_alone(tree, want):
    assert paths(tree) == want


def test_leaves_are_told_apart_by_their_key_paths_not_by_their_strings():
    tree = {"a/b": 1.0, "a": {"b": 2.0}}
    assert paths(tree) == ["a/b", "a/b"]
    assert leaves_by_keys(tree) == {("a/b",): 1.0, ("a", "b"): 2.0}
    with pytest.raises(ValueError, match=r"`f` got several leaves at 'a/b'.*Rename a key"):
        leaves_by_path(tree, "f")


@pytest.mark.parametrize(
    "tree, like",
    [
        ({"key": 1, "value": 2}, Attention(0, 0)),
        (Attention(1, 2), {"key": 0, "value": 0}),
        ({"a": {"value": 1}}, {"a": Box(0)}),
        ({"a": 1}, {"a": Box(0)}),
        ([1, 2], {0: 0, 1: 0}),
        (FrozenDict({"a": {"b": 1}}), {"a": {"b": 0}}),
    ],
)
def test_containers_of_the_same_names_mirror_one_another(tree, like):
    aligned = align(tree, like)
    assert jax.tree.structure(aligned) == jax.tree.structure(like)
    assert jax.tree.leaves(aligned) == jax.tree.leaves(tree)


HOLE = optax.MaskedNode()


@pytest.mark.parametrize(
    "tree, like, want",
    [
        (
            {"a": HOLE, "b": 1},
            {"a": {"x": 2, "y": 3}, "b": 4},
            {"a": {"x": None, "y": None}, "b": 1},
        ),
        ({"a": None, "b": 1}, {"a": [2, {"y": 3}], "b": 4}, {"a": [None, {"y": None}], "b": 1}),
        ({"a": {"x": 2, "y": 3}, "b": 4}, {"a": HOLE, "b": 1}, {"a": None, "b": 4}),
        (
            {"a": {"x": HOLE, "y": 3}},
            {"a": {"x": {"z": 1}, "y": 2}},
            {"a": {"x": {"z": None}, "y": 3}},
        ),
        ({"a": HOLE, "b": {}}, {"a": {}, "b": {}}, {"a": {}, "b": {}}),
    ],
)
def test_a_hole_may_stand_for_a_subtree(tree, like, want):
    assert align(tree, like) == want


@pytest.mark.parametrize(
    "tree, like",
    [
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {"a": 1, "b": 1}),
        ({"a": 1, "c": 2}, {"a": {"x": 1}, "c": 2}),  # a leaf is no hole
        (None, {"a": 1}),  # nor does one stand for everything
        ({"a": {"x": 1}}, {"a": 1}),
        ({"a": 1}, {"a": 1, "b": None}),
    ],
)
def test_other_trees_do_not_mirror_one_another(tree, like):
    assert align(tree, like) is None


ONE, TWO = np.ones(1), np.ones(2)


@pytest.mark.parametrize(
    "tree, like, words",
    [
        ({"a": ONE}, {"a": ONE, "b": TWO}, "nothing at 'b'"),
        ({"a": ONE, "b": None}, {"a": ONE, "b": TWO}, "nothing at 'b'"),
        ({"a": ONE, "b": TWO}, {"a": ONE}, "unknown 'b' (its paths are 'a')"),
        ({"a": ONE, "b": TWO}, {"a": ONE, "b": None}, "unknown 'b' (its paths are 'a', 'b')"),
        ({"a": {"x": ONE}}, {"a": ONE}, "nothing at 'a'; unknown 'a/x'"),
        ({"a": ONE}, {"a": TWO}, "'a' has shape (1,), in its like (2,)"),
        (
            {"a": ONE, "c": ONE},
            {"a": TWO, "b": TWO},
            "nothing at 'b'; unknown 'c'; 'a' has shape (1,), in its like (2,)",
        ),
        (None, {"a": ONE}, "got None; nothing at 'a'"),
        (3.5, {"a": ONE}, "got float; nothing at 'a'"),
    ],
)
def test_match_says_all_that_differs_in_one_wording(tree, like, words):
    with pytest.raises(ValueError) as error:
        match(tree, like, "it", of="its like", step="Do this.")
    assert str(error.value) == f"`it` is not a tree like its like: {words}. Do this."


def test_match_gives_the_structure_of_its_like():
    like = FrozenDict({"a": Pair(ONE, TWO), "b": None})
    got = match({"a": {"left": ONE, "right": TWO}, "b": None}, like, "it", step="")
    assert jax.tree.structure(got) == jax.tree.structure(like)


def test_match_lets_pass_the_gaps_that_are_allowed():
    like = {"a": {"x": ONE, "y": TWO}, "b": TWO}
    holes, nothing = {"a": HOLE, "b": TWO}, {"b": TWO}
    want = {"a": {"x": None, "y": None}, "b": TWO}
    for gaps, tree in (("holes", holes), ("any", holes), ("any", nothing)):
        assert_trees_equal(match(tree, like, "it", gaps=gaps, step=""), want)
    for gaps, tree in (("none", holes), ("none", nothing), ("holes", nothing)):
        with pytest.raises(ValueError, match="nothing at 'a/x', 'a/y'"):
            match(tree, like, "it", gaps=gaps, step="")
    with pytest.raises(ValueError, match="unknown 'c'"):
        match({"c": TWO}, like, "it", gaps="any", step="")


def test_match_compares_shapes_as_it_is_told():
    tree, like = {"a": np.ones((1, 2))}, {"a": np.ones((3, 2))}
    assert_trees_equal(match(tree, like, "it", step="", fits=None), tree)
    same_rank = lambda mine, its: len(mine) == len(its)
    assert_trees_equal(match(tree, like, "it", step="", fits=same_rank), tree)
    many = {str(i): ONE for i in range(20)}
    with pytest.raises(ValueError) as error:
        match(many, dict.fromkeys(many, TWO), "it", step="")
    assert str(error.value).count("has shape") == 12
