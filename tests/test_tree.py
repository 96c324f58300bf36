"""Tests of paths, holes and the question which leaves are prunable."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune._tree import is_hole, leaves_with_path, map_leaves, narrow
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
