"""Which indices stay, told once: read, checked, taken out of anything, composed."""

import copy
import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import jaxprune as jp
from jaxprune.patterns import Coupled
from tests.helpers import assert_trees_equal


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(p, x):
    h = jax.nn.relu(x @ p["w"] + p["b"][None])
    return jax.nn.relu(h @ p["u"]) @ p["v"]


X = draw(9, 2, 4)
PARAMS = {"w": draw(0, 4, 6), "b": draw(1, 6), "u": draw(2, 6, 8), "v": draw(3, 8, 3)}
KEPT = {"w": {1: [0, 2, 5]}, "b": {0: [0, 2, 5]}, "u": {0: [0, 2, 5], 1: [1, 7]}, "v": {0: [1, 7]}}


def cut_of(kept=KEPT, params=PARAMS):
    return jp.Cut(kept, params)


# Read and compared.


def test_a_cut_is_a_mapping_of_what_stays():
    cut = cut_of()
    assert list(cut) == ["w", "b", "u", "v"] and len(cut) == 4 and "w" in cut and "x" not in cut
    assert cut["u"][1].tolist() == [1, 7] and cut.json == KEPT
    assert repr(cut).startswith("Cut(w axis 1: 3 of 6, b axis 0: 3 of 6, u axis 0: 3 of 6")
    with pytest.raises(ValueError, match="read-only"):
        cut["w"][1][0] = 3
    with pytest.raises(TypeError):
        cut["w"][0] = np.arange(2)
    with pytest.raises(AttributeError):
        cut.kept = {}


def test_cuts_are_equal_where_the_same_stays():
    one = cut_of()
    again = jp.Cut(json.loads(json.dumps(one.json)))  # sizes unknown: they do not tell cuts apart
    for same in (again, jp.Cut(one), jp.Cut({**KEPT, "x": {}}), pickle.loads(pickle.dumps(one)),
                 copy.deepcopy(one)):  # fmt: skip
        assert same == one and hash(same) == hash(one) and same.json == KEPT
    assert one != jp.Cut({**KEPT, "b": {0: [0, 2, 4]}}) and one != KEPT and one != jp.Cut({})
    calls = []
    taken = jax.jit(lambda cut, p: calls.append(1) or cut.params(p), static_argnums=0)
    assert taken(one, PARAMS)["w"].shape == taken(again, PARAMS)["w"].shape == (4, 3)
    assert len(calls) == 1


def test_masks_and_cuts_say_the_same():
    cut = cut_of()
    masks = cut.masks()
    assert masks["w"].shape == (1, 6) and masks["u"].tolist() == np.outer(
        np.isin(np.arange(6), [0, 2, 5]), np.isin(np.arange(8), [1, 7])
    ).tolist()  # fmt: skip
    assert jp.Cut.from_masks(masks, PARAMS) == cut == jp.Cut.from_masks(masks)
    assert_trees_equal(jp.Cut(cut.json).masks(PARAMS), masks)
    assert jp.cut_list(PARAMS, masks) == KEPT
    (partly,) = jp.Cut.from_masks({"b": masks["b"], "w": None}, PARAMS)
    assert partly == "b" and jp.Cut({"b": {0: [1]}}, PARAMS).masks()["w"] is None


def test_masks_are_carried_over_by_groups():
    groups = jp.find_groups(mlp, PARAMS, X)
    given = {"b": jnp.isin(jnp.arange(6), jnp.array([0, 2, 5]))}
    cut = jp.Cut.from_masks(given, PARAMS, groups=groups)
    assert cut.json == {"w": KEPT["w"], "b": KEPT["b"], "u": {0: [0, 2, 5]}}
    with pytest.raises(TypeError, match=r"needs `params`.*from_masks\(masks, params, groups"):
        jp.Cut.from_masks(given, groups=groups)


def test_what_is_no_cut_is_refused():
    for kept in ([0, 2], {"w": [0, 2]}, "w", {"w": jnp.ones(3, bool)}):
        with pytest.raises(TypeError, match="mapping from paths to axes to indices"):
            jp.Cut(kept)
    for indices in ([2, 0], [0, 0], [-1, 2], [0.5], [True, False], [[0, 1]], "01"):
        with pytest.raises(ValueError, match=r"keeps .* of axis 1 of 'w'\. Pass increasing"):
            jp.Cut({"w": {"1": indices}})
    for axis in (-1, "x", 1.0, None):
        with pytest.raises(ValueError, match=f"names axis {axis!r} of 'w'. Count axes from 0"):
            jp.Cut({"w": {axis: [0]}})
    for kept, words in (
        ({"b": {0: [6]}, "w": {1: [9]}}, r"\[6\] of axis 0 of 'b'.*\(6,\); \[9\] of axis 1 of 'w'"),
        ({"b": {1: [0]}}, r"axis 1 of 'b', but the params have \(6,\)"),
        ({"x": {0: [0]}}, "no such path"),
    ):
        with pytest.raises(ValueError, match=words):
            jp.Cut(kept, PARAMS)


# Taken out of anything.


def test_any_tree_with_the_paths_is_cut():
    cut = cut_of()
    small = cut.params(PARAMS)
    np.testing.assert_array_equal(
        small["u"], PARAMS["u"][jnp.array([0, 2, 5])][:, jnp.array([1, 7])]
    )
    shapes = {"w": (4, 3), "b": (3,), "u": (3, 2), "v": (2, 3)}
    assert jax.tree.map(jnp.shape, small) == shapes
    grads = jax.grad(lambda p: mlp(p, X).sum())(PARAMS)
    assert jax.tree.map(jnp.shape, jax.jit(cut.params)(grads)) == shapes
    specs = jax.eval_shape(lambda p: p, PARAMS)
    assert jax.tree.map(lambda s: s.shape, cut.params(specs)) == shapes
    more = cut.params({**PARAMS, "b": None, "name": "mlp", "more": jnp.ones(2)})
    assert more["b"] is None and more["name"] == "mlp" and more["more"].shape == (2,)


@pytest.mark.parametrize("known", [True, False])
def test_masks_that_broadcast_are_cut_where_they_are_full(known):
    cut = cut_of(params=PARAMS if known else None)
    full, flat = jnp.arange(24).reshape(4, 6) % 5 > 0, jnp.arange(6)[None] % 2 == 0
    rows = jnp.array([[True], [False], [True], [True]])
    columns = full[:, jnp.array([0, 2, 5])], jnp.array([[True, True, False]])
    for mask, want in zip((full, flat, rows), (*columns, rows), strict=True):
        got = cut.params({**dict.fromkeys(PARAMS), "w": mask})
        assert got["b"] is None and got["w"].tolist() == want.tolist()


def test_small_params_outlive_the_whole_ones():
    whole = {"w": jnp.ones(3)}
    small = jp.Cut({}, whole).params(whole)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(whole)
    assert whole["w"].is_deleted() and small["w"].tolist() == [1, 1, 1]


def test_a_tree_that_was_not_cut_for_is_refused():
    for cut in (cut_of(), cut_of(params=None)):
        with pytest.raises(ValueError, match=r"names 'w', 'b', 'u', 'v', which the tree.*at\("):
            cut.params({"params": PARAMS})
        with pytest.raises(ValueError, match=r"fit the tree: 'w' has shape \(4, 3\), but 6"):
            cut.params(cut.params(PARAMS))
        with pytest.raises(ValueError, match=r"'b' has shape \(\)"):
            cut.params({**PARAMS, "b": jnp.float32(1)})
    with pytest.raises(ValueError, match=r"'b' has shape \(7,\), but 6 along axis 0 is wanted"):
        cut_of().params({**PARAMS, "b": jnp.ones(7)})
    with pytest.raises(ValueError, match=r"of axis 1 of 'w', but the params have \(4, 3\)"):
        cut_of().masks(cut_of().params(PARAMS))


def test_a_function_is_cut_alone_and_a_state_too():
    cut, tx = cut_of(), optax.adam(0.1)
    want = jp.shrink(mlp, PARAMS, cut.masks())[0](cut.params(PARAMS), X)
    np.testing.assert_array_equal(cut.fn(mlp)(cut.params(PARAMS), X), want)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert_trees_equal(cut.state(tx, state), jp.shrink_state(tx, state, PARAMS, cut.masks()))
    assert jp.verify_shrink(mlp, PARAMS, None, X, cut=cut) < 1e-6
    assert jp.verify_shrink(mlp, PARAMS, None, X, cut=json.loads(json.dumps(cut.json))) < 1e-6
    assert jp.size_of(PARAMS, cut.masks()) == sum(p.size for p in cut.params(PARAMS).values())
    with pytest.raises(ValueError, match="`verify_shrink` takes either `masks` or `cut`"):
        jp.verify_shrink(mlp, PARAMS, cut.masks(), X, cut=cut)


def test_a_cut_that_does_not_know_the_whole_network_says_what_it_needs():
    cut = cut_of(params=None)
    assert repr(cut).startswith("Cut(w axis 1: 3, b axis 0: 3")
    for call, name in (
        (lambda: cut.fn(mlp), "fn"),
        (lambda: cut.state(optax.sgd(0.1), ()), "state"),
        (cut.masks, "masks"),
    ):
        with pytest.raises(ValueError, match=rf"`cut.{name}` needs .*Cut\(cut.json, params"):
            call()
    assert_trees_equal(jp.Cut(cut, PARAMS).masks(), cut_of().masks())


def test_a_function_is_refused_in_the_words_of_shrink():
    cut = cut_of()
    with pytest.raises(TypeError, match=r"`Cut.fn` got rule=.*rules="):
        cut.fn(lambda p, x, **_: mlp(p, x), X, rule={})
    with pytest.raises(ValueError, match="counts='other'` is unknown"):
        cut.fn(mlp, counts="other")
    with pytest.raises(TypeError, match="needs inputs to know how large"):
        cut.fn(mlp, carry=(1, 0))


# A part of a tree.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x)))
        return nn.Dense(3)(x)


def test_an_optimizer_sees_a_part_of_the_variables():
    variables = Net().init(jax.random.key(0), X)
    params, tx = variables["params"], optax.adam(0.1)
    groups = jp.find_groups(Net().apply, variables, X)
    masks = jp.find_masks(params, 0.5, pattern=Coupled(groups.at("params")))
    cut = jp.Cut.from_masks({"params": masks}, variables, groups=groups)
    assert "batch_stats/BatchNorm_0/mean" in cut
    small = cut.params(variables)
    np.testing.assert_allclose(cut.fn(Net().apply)(small, X), Net().apply(
        jp.apply_masks(variables, cut.masks()), X), rtol=1e-5, atol=1e-6)  # fmt: skip
    for part in ("params", "params/", params):
        inner = cut.at(part) if isinstance(part, str) else cut.at("params").at(part)
        assert "Dense_0/kernel" in inner and len(inner) == 5
        assert_trees_equal(inner.params(params), small["params"])
        state = inner.state(tx, tx.init(params))
        assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(small["params"]))
    assert cut.at({"params": params}) == jp.Cut(
        {f"params/{path}": axes for path, axes in cut.at("params").items()}
    )
    assert len(cut.at("params/Dense_1")) == 1 and not cut.at({"params": {"Dense_1": {"bias": X}}})
    assert cut.at("").whole.keys() == cut.whole.keys() and cut.at("") == cut
    with pytest.raises(ValueError, match=r"cut.at\('param'\)` finds nothing.*params/Dense"):
        cut.at("param")
    with pytest.raises(ValueError, match=r"cut.at\(a tree of 'w'\)` finds nothing"):
        cut.at({"w": jnp.ones(3)})


# Several rounds.


def prune(fn, params, seed, sparsity):
    """Masks of one round, of which every seed removes others."""
    groups = jp.find_groups(fn, params, X)
    return jp.find_masks(params, sparsity, pattern=Coupled(groups), criterion=jp.criteria.random,
                         key=jax.random.key(seed))  # fmt: skip


def residual(p, x):
    for branch in p["layers"]:
        x = x + jax.nn.relu(x @ branch["a"] + branch["b"][None]) @ branch["c"]
    return x @ p["out"]


DEEP = {
    "layers": [{"a": draw(3 * i, 4, 6), "b": draw(3 * i + 1, 6), "c": draw(3 * i + 2, 6, 4)}
               for i in range(2)],
    "out": draw(8, 4, 3),
}  # fmt: skip


@pytest.mark.parametrize("fn, params", [(mlp, PARAMS), (residual, DEEP)], ids=["mlp", "residual"])
def test_two_rounds_are_one_cut_of_the_whole_network(fn, params):
    tx = optax.adam(0.1)
    _, state = tx.update(params, tx.init(params), params)
    first = jp.Cut.from_masks(prune(fn, params, 0, 0.3), params)
    fn_1, params_1, state_1 = first.fn(fn), first.params(params), first.state(tx, state)
    second = jp.Cut.from_masks(prune(fn_1, params_1, 1, 0.4), params_1)
    fn_2, params_2, state_2 = second.fn(fn_1), second.params(params_1), second.state(tx, state_1)

    both = second.after(first)
    assert_trees_equal(both.params(params), params_2)
    assert_trees_equal(both.state(tx, state), state_2)
    small = both.fn(fn)
    np.testing.assert_allclose(small(params_2, X), fn_2(params_2, X), rtol=1e-5, atol=1e-6)
    value = lambda fn: jax.grad(lambda p: jnp.sum(fn(p, X) ** 2))(params_2)
    for got, want in zip(jax.tree.leaves(value(small)), jax.tree.leaves(value(fn_2)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert jp.verify_shrink(fn, params, None, X, cut=both) < 1e-5
    # Read from files, where nobody knows the sizes, they compose as well.
    read = [jp.Cut(json.loads(json.dumps(cut.json))) for cut in (second, first)]
    assert read[0].after(read[1]) == both and second.after(read[1]) == both
    assert jp.Cut.from_masks(both.masks(), params) == both


def test_a_block_and_channels_of_another_go_in_two_rounds():
    blocks = jp.find_blocks(residual, DEEP, X)
    first = jp.Cut.from_masks(blocks.without([blocks[0].name], DEEP), DEEP)
    fn_1, params_1 = first.fn(residual), first.params(DEEP)
    kept = {"layers/1/a": {1: [0, 3]}, "layers/1/b": {0: [0, 3]}, "layers/1/c": {0: [0, 3]}}
    second = jp.Cut(kept, params_1)
    both = second.after(first)
    params_2 = second.params(params_1)
    assert_trees_equal(both.params(DEEP), params_2)
    np.testing.assert_allclose(
        both.fn(residual)(params_2, X), second.fn(fn_1)(params_2, X), rtol=1e-5, atol=1e-6
    )
    assert both["layers/0/a"][0].size == 0 and both.json.keys() == {*first, *second}


def test_three_rounds_compose_in_any_order_of_putting_them_together():
    a, b, c = (jp.Cut({"w": {0: list(kept)}}) for kept in ([1, 3, 4, 8, 9], [0, 2, 4], [1, 2]))
    assert c.after(b.after(a)) == c.after(b).after(a) == jp.Cut({"w": {0: [4, 9]}})
    assert jp.Cut({}).after(a) == a == a.after(jp.Cut({}))
    assert functools.reduce(lambda done, cut: cut.after(done), (a, b, c)).json == {"w": {0: [4, 9]}}


def test_a_second_cut_of_another_network_is_refused():
    first = cut_of()
    for second, words in (
        (jp.Cut({"w": {1: [3]}}), r"\[3\] of axis 1 of 'w', but the params have \(4, 3\)"),
        (jp.Cut({"x": {1: [0]}}), "no such path"),
        (cut_of(), r"\[0, 2, 5\] of axis 1 of 'w'"),
        (jp.Cut({"b": {0: [0]}}, PARAMS), r"'w' has shape \(4, 6\), but the first leaves \(4, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            second.after(first)
    with pytest.raises(ValueError, match=r"index 3 of axis 1 of 'w', of which the first leaves 3"):
        jp.Cut({"w": {1: [3]}}).after(jp.Cut(KEPT))
