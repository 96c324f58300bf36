"""What says that it is elementwise is: a piece of a leaf scores as it does in the whole leaf."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune._parts import is_elementwise

MARKED = [
    name
    for name in jp.criteria.__all__
    if is_elementwise(getattr(jp.criteria, name)) or name == "fisher_ema"
]
SHAPE = (6, 8)


def draw(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


def evidence_of(criterion):
    """Arrays like the weights for all that a criterion may ask for by keyword."""
    offered = {"grads": 1, "state": 2, "second_moment": 3, "params_init": 4, "norms": 5}
    names = inspect.signature(criterion).parameters
    return {name: draw(seed) for name, seed in offered.items() if name in names}


@pytest.mark.parametrize("name", MARKED)
def test_a_piece_scores_as_it_does_in_the_leaf(name):
    criterion = getattr(jp.criteria, name)
    criterion = criterion() if name == "fisher_ema" else criterion
    weights, evidence = draw(0), evidence_of(criterion)
    whole = criterion({"w": weights}, **{k: {"w": v} for k, v in evidence.items()})["w"]
    for piece in (np.s_[:1], np.s_[2:5, 3:], np.s_[:, -1:]):
        cut = {k: {"w": v[piece]} for k, v in evidence.items()}
        np.testing.assert_array_equal(criterion({"w": weights[piece]}, **cut)["w"], whole[piece])


def test_what_is_not_elementwise_is_not_marked():
    assert {"lamp", "random", "snip", "synflow", "grasp"}.isdisjoint(MARKED)
    assert {"magnitude", "taylor", "fisher", "movement", "fisher_ema", "wanda"} <= set(MARKED)


def test_a_criterion_that_is_marked_and_gives_another_shape_is_refused_by_path():
    @jp.elementwise
    def narrow(params, **_):
        return jax.tree.map(lambda w: jnp.abs(w)[:, :1], params)

    with pytest.raises(ValueError, match=r"`narrow` returned scores .*'w', \(6, 1\)"):
        jp.find_masks({"w": draw(0)}, 0.5, criterion=narrow, where=lambda path, x: True)
