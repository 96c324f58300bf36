"""Tests of uniform, erk, custom and owl: how a total is shared out among the leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import scopes

EVERYTHING = lambda path, leaf: True
LENET = {
    "hidden_0": {"kernel": jnp.zeros((784, 300)), "bias": jnp.zeros(300)},
    "hidden_1": {"kernel": jnp.zeros((300, 100)), "bias": jnp.zeros(100)},
    "out": {"kernel": jnp.zeros((100, 10)), "bias": jnp.zeros(10)},
}


def removed(tree, params):
    """How many weights of each leaf a tree of sparsities removes."""
    return jax.tree.map(
        lambda w, s: 0 if s is None else round(s * w.size),
        params,
        tree,
        is_leaf=lambda x: x is None,
    )


def test_uniform_gives_every_prunable_leaf_the_same():
    tree = scopes.uniform(LENET, 0.9)
    layer = {"kernel": 0.9, "bias": None}
    assert tree == {"hidden_0": layer, "hidden_1": layer, "out": layer}


def test_erk_density_is_proportional_to_the_sum_over_the_product_of_the_axes():
    params = {"a": jnp.zeros((100, 100)), "b": jnp.zeros((50, 200))}
    tree = scopes.erk(params, 0.9)
    density = {name: 1 - s for name, s in tree.items()}
    assert density["b"] / density["a"] == pytest.approx(250 / 200, rel=1e-3)


def test_erk_keeps_dense_what_would_pass_one():
    tree = scopes.erk(LENET, 0.5)
    assert tree["out"]["kernel"] == 0.0
    assert tree["hidden_0"]["kernel"] > 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9, 0.97, 0.999, 1.0])
def test_erk_total_is_exact_for_lenet(sparsity):
    total = 784 * 300 + 300 * 100 + 100 * 10
    masks = jp.find_masks(LENET, scopes.erk(LENET, sparsity))
    assert jp.sparsity(masks, LENET) == round(sparsity * total) / total


shapes = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(shapes=shapes, sparsity=st.floats(0.0, 1.0))
def test_erk_total_is_exact_for_any_shapes(shapes, sparsity):
    params = {str(i): np.zeros(shape, np.float32) for i, shape in enumerate(shapes)}
    tree = scopes.erk(params, sparsity, where=EVERYTHING)
    assert all(0.0 <= s <= 1.0 for s in tree.values())
    total = sum(w.size for w in params.values())
    assert sum(removed(tree, params).values()) == round(sparsity * total)


@settings(max_examples=50, deadline=None)
@given(sparsity=st.floats(0.0, 1.0), sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_erk_total_is_exact_for_large_layers(sparsity, sizes):
    params = {str(i): jax.ShapeDtypeStruct((n, 300), jnp.float32) for i, n in enumerate(sizes)}
    tree = scopes.erk(params, sparsity, where=lambda path, leaf: True)
    total = sum(n * 300 for n in sizes)
    counts = [round(tree[str(i)] * n * 300) for i, n in enumerate(sizes)]
    assert sum(counts) == round(sparsity * total)


def test_erk_leaves_out_what_where_refuses():
    tree = scopes.erk(LENET, 0.9, where=jp.by_path("hidden_.*/kernel"))
    assert tree["out"] == {"kernel": None, "bias": None}


def test_custom_takes_the_first_rule_that_matches():
    tree = scopes.custom(LENET, {"hidden_0/.*": 0.1, "hidden_.*": 0.2}, default=0.3)
    assert [tree[name]["kernel"] for name in tree] == [0.1, 0.2, 0.3]
    assert tree["out"]["bias"] is None


def test_custom_leaves_the_rest_dense_by_default():
    assert scopes.custom(LENET, {"out/kernel": 0.5})["hidden_0"]["kernel"] == 0.0


def test_custom_refuses_a_rule_that_matches_no_prunable_leaf():
    with pytest.raises(ValueError, match=r"`custom` got 'out'.*matches no.*'hidden_0/kernel'"):
        scopes.custom(LENET, {"out": 0.5})


def test_custom_refuses_what_is_no_regex():
    with pytest.raises(ValueError, match=r"`custom` got '\('.*no regular expression"):
        scopes.custom(LENET, {"(": 0.5})


@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan")])
def test_allocations_refuse_what_is_no_fraction(bad):
    with pytest.raises(ValueError, match=r"`uniform` got .*outside \[0, 1\]"):
        scopes.uniform(LENET, bad)
    with pytest.raises(ValueError, match=r"`erk` got .*outside \[0, 1\]"):
        scopes.erk(LENET, bad)
    with pytest.raises(ValueError, match=r"`custom` got .* at 'out/kernel', outside \[0, 1\]"):
        scopes.custom(LENET, {"out/kernel": bad})
    with pytest.raises(ValueError, match=r"`custom\(default\)` got .*outside"):
        scopes.custom(LENET, {}, default=bad)


def test_allocations_refuse_trees_without_a_prunable_leaf():
    for make in (scopes.uniform, scopes.erk):
        with pytest.raises(ValueError, match=r"No leaf of `params` is prunable.*'bias'"):
            make({"bias": jnp.zeros(3)}, 0.5)
    with pytest.raises(ValueError, match="No leaf of `params` is prunable"):
        scopes.custom({"bias": jnp.zeros(3)}, {"bias": 0.5})


# Scores of which the layers have 0, 1, 2 and 10 outliers of a hundred.
OUTLIERS = {
    name: jnp.ones(100).at[:n].set(1000.0).reshape(10, 10)
    for name, n in (("none", 0), ("one", 1), ("two", 2), ("ten", 10))
}


def test_owl_keeps_layers_denser_in_proportion_to_their_outliers():
    tree = scopes.owl(OUTLIERS, 0.5)
    # Shares 0, 0.01, 0.02 and 0.1 are -0.0325, -0.0225, -0.0125 and 0.0675 from their mean.
    away = {name: round(0.08 * share / 0.0675, 2) for name, share in (
        ("none", 0.0325), ("one", 0.0225), ("two", 0.0125), ("ten", -0.0675)
    )}  # fmt: skip
    assert tree == {name: pytest.approx(0.5 + a, abs=0.01) for name, a in away.items()}
    assert tree["ten"] == 0.42


def test_owl_gives_layers_without_outliers_the_same():
    assert scopes.owl({"a": jnp.ones((2, 5)), "b": jnp.ones((5, 2))}, 0.5) == {"a": 0.5, "b": 0.5}


score_shapes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5)


@settings(max_examples=12, deadline=None)
@given(shapes=score_shapes, sparsity=st.floats(0.0, 1.0), seed=st.integers(0, 99))
def test_owl_total_is_exact_and_no_layer_is_further_from_the_mean(shapes, sparsity, seed):
    draw = np.random.default_rng(seed).pareto
    scores = {str(i): draw(1.0, shape).astype(np.float32) for i, shape in enumerate(shapes)}
    tree = scopes.owl(scores, sparsity, threshold=2.0, deviation=0.2)
    total = sum(s.size for s in scores.values())
    assert sum(removed(tree, scores).values()) == round(sparsity * total)
    for name, s in scores.items():
        assert not s.size or abs(tree[name] - sparsity) <= 0.2 + 1 / s.size


@pytest.mark.parametrize("full", [False, True])
def test_owl_of_norms_counts_the_weights_that_a_layout_knows(full):
    params = {"a": jnp.ones((3, 8, 8)), "b": jnp.ones((8, 3)), "c": jnp.ones((3, 3))}

    def fn(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["a"])[0]
        return x @ params["b"] @ params["c"]

    layout = jp.find_layout(fn, params, jnp.ones((2, 8)))
    norms = {"a": jnp.ones((3, 8, 1)).at[1, 0].set(99.0), "b": jnp.ones((8, 1)), "c": None}
    over = lambda n, w: jnp.broadcast_to(n, w.shape) if full else n
    norms = {name: None if n is None else over(n, params[name]) for name, n in norms.items()}
    tree = scopes.owl(norms, 0.5, layout=layout)
    assert tree["a"].shape == (3,) and tree["a"][1] == pytest.approx(0.42, abs=0.01)
    assert tree["a"][0] == tree["a"][2] > 0.5 and tree["c"] is None
    part = {**params, "c": None}
    masks = jp.find_masks(part, tree, layout=layout.at(part))
    assert jp.sparsity(masks, part) == 0.5


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"threshold": 0.0}, r"`owl\(threshold=0.0\)`.*multiple"),
        ({"deviation": 1.5}, r"`owl\(deviation=1.5\)` is outside"),
        ({"where": jp.exclude(".*")}, "No leaf of `params` is prunable"),
    ],
)
def test_owl_refuses_settings_of_which_nothing_comes(settings, words):
    with pytest.raises(ValueError, match=words):
        scopes.owl(OUTLIERS, 0.5, **settings)
    with pytest.raises(ValueError, match=r"`owl` got .*outside \[0, 1\]"):
        scopes.owl(OUTLIERS, 1.5)
