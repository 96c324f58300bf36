"""Tests of the check that everything with a sparsity shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune._errors import check_parts

W = {"layer": {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)}}


@pytest.mark.parametrize("bad", [-0.1, 1.1, 90, float("nan"), float("inf")])
def test_what_is_no_fraction_is_refused_with_its_value(bad):
    with pytest.raises(ValueError, match=rf"got {bad:g}, outside \[0, 1\].*0.9 keeps a tenth"):
        jp.find_masks(W, bad)
    with pytest.raises(ValueError, match=rf"got {bad:g}, outside \[0, 1\]"):
        jp.make_masks(W, bad)


def test_all_bad_leaves_of_a_tree_are_named_together():
    with pytest.raises(ValueError, match=r"got 1.5 at 'a/b', -2 at 'c', outside"):
        jp.find_masks(W, {"a": {"b": 1.5}, "c": -2.0, "d": 0.5})


@pytest.mark.parametrize(
    "bad", ["0.9", jnp.array([0.5, 0.5]), np.ones(3), 1j, True, False, np.True_, jnp.array(True)]
)
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(TypeError, match=r"`sparsity` got .*Pass the fraction to remove"):
        jp.find_masks(W, bad)


@pytest.mark.parametrize("good", [0, 1, 0.5, np.float32(0.5), np.float64(0.5), jnp.float32(0.5)])
def test_numbers_of_any_make_will_do(good):
    assert jp.sparsity(jp.find_masks(W, good), W) == float(good)


def test_traced_sparsities_pass_unseen():
    masks = jax.jit(lambda s: jp.find_masks(W, s))(0.5)
    assert jp.sparsity(masks, W) == 0.5


PARTS = {
    "criterion": jp.criteria.magnitude,
    "pattern": jp.patterns.Weights(),
    "scope": jp.scopes.per_leaf,
    "where": jp.is_matrix,
}
WRONG_PARTS = {
    "a string as criterion": ({"criterion": "taylor"}, "criterion='taylor', a string.*criteria"),
    "a string as pattern": ({"pattern": "Channels"}, r"pattern='Channels', a string.*Channels\(-1"),
    "a string as scope": ({"scope": "across"}, "scope='across', a string.*jp.scopes.across"),
    "a string as where": ({"where": ".*kernel"}, r"where='\.\*kernel', a string.*by_path\('\.\*k"),
    "the class of a pattern": (
        {"pattern": jp.patterns.Channels},
        r"pattern=<class .*, a class.*`Channels\(\.\.\.\)`",
    ),
    "the class of a criterion": (
        {"criterion": type(jp.criteria.movement)},
        r"criterion=<class .*`Movement\(\.\.\.\)`",
    ),
    "a criterion as pattern": (
        {"pattern": jp.criteria.taylor},
        r"pattern=<function taylor.* no `pool` and `expand`.*Channels\(-1\)",
    ),
    "groups as pattern": ({"pattern": ()}, r"pattern=\(\), .*`pattern=jp.patterns.Coupled\(groups"),
    "a pattern as criterion": (
        {"criterion": jp.patterns.Weights()},
        r"criterion=Weights\(\), which cannot be called.*jp.criteria.taylor",
    ),
    "a pattern as scope": ({"scope": jp.patterns.Weights()}, "scope=Weights.*cannot be called"),
    "nothing as scope": ({"scope": None}, "scope=None, which cannot be called"),
    "what makes scopes": (
        {"scope": jp.scopes.windows},
        "scope=<function windows.*makes scopes or sparsities. Call it",
    ),
    "what makes sparsities": ({"scope": jp.scopes.erk}, "scope=<function erk.*makes scopes or"),
    "a tree as where": ({"where": {"kernel": True}}, "where={'kernel': True}, which cannot be"),
    "a where of a path alone": (
        {"where": lambda path: True},
        r"where=<function.*does not take a path and an array.*`where\(path, array\)`",
    ),
}


@pytest.mark.parametrize("name", WRONG_PARTS)
def test_what_is_no_part_is_refused_by_its_role(name):
    wrong, words = WRONG_PARTS[name]
    with pytest.raises(TypeError, match=f"`user` got {words}"):
        check_parts("user", **{**PARTS, **wrong})


def test_parts_of_every_make_pass():
    check_parts("user", **PARTS)
    check_parts("user", criterion=lambda params, **_: params, scope=lambda units, sparsity: units)
    check_parts("user", scope=jp.scopes.windows(4), where=jp.by_path("a"))
    check_parts("user", criterion=jp.criteria.movement, where=lambda *args: True)
