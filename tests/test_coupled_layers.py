"""Each layer of a scanned stack keeps units of its own where nothing tells units apart."""

import json
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxprune as jp
from jaxprune import scopes
from jaxprune._groups import Groups
from jaxprune.patterns import Coupled
from tests.helpers import assert_trees_equal

LAYERS, WIDTH, HEADS, SIZE, HIDDEN = 4, 8, 4, 4, 12


def weights(*shape, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)


def assert_close(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


# A transformer, scanned and unrolled.


def block(p, x):
    """Attention of four heads, and a gated MLP with a bias."""
    h = x * p["scale"][None, None]
    q, k, v = (jnp.reshape(h @ p[name], (*x.shape[:2], HEADS, SIZE)) for name in ("q", "k", "v"))
    share = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(SIZE))
    mixed = jnp.einsum("bhts,bshd->bthd", share, v)
    x = x + mixed.reshape(*x.shape[:2], HEADS * SIZE) @ p["o"]
    return x + (jax.nn.silu(x @ p["gate"] + p["bias"][None, None]) * (x @ p["up"])) @ p["down"]


def scanned(p, x):
    step = lambda x, layer: (block(layer, x), None)
    return lax.scan(step, x @ p["in"], p["blocks"])[0] @ p["out"]


def unrolled(p, x):
    x = x @ p["in"]
    for layer in p["blocks"]:
        x = block(layer, x)
    return x @ p["out"]


PARAMS = {
    "in": weights(3, WIDTH),
    "out": weights(WIDTH, 2),
    "blocks": {
        "scale": 1 + 0.1 * weights(LAYERS, WIDTH),
        "bias": weights(LAYERS, HIDDEN),
        **{name: weights(LAYERS, WIDTH, HEADS * SIZE, seed=i) for i, name in enumerate("qkv")},
        "o": weights(LAYERS, HEADS * SIZE, WIDTH),
        **{name: weights(LAYERS, WIDTH, HIDDEN, seed=i) for i, name in enumerate(("gate", "up"))},
        "down": weights(LAYERS, HIDDEN, WIDTH),
    },
}
X = jax.random.normal(jax.random.key(0), (2, 5, 3))
GROUPS = jp.find_groups(scanned, PARAMS, X)
LAYOUT = jp.Layout(
    {"blocks/(scale|bias)": ("layer", None), "blocks/.": ("layer", None, None)}
    | {"blocks/(gate|up|down)": ("layer", "in", "out")}
)
STACKED = {"blocks/gate:2", "blocks/k:2", "blocks/k:2~2", "blocks/v:2"}


def bound(groups=GROUPS, params=PARAMS, layout=LAYOUT, **settings):
    return Coupled(groups, **settings).bind(
        params, where=jp.is_matrix, layout=layout.on(params, "a test")
    )


def best(units, share):
    """Keep a share of the units of each row, the largest."""
    ranks = np.argsort(np.argsort(-np.asarray(units), -1), -1)
    return jnp.asarray(ranks < units.shape[-1] - round(share * units.shape[-1]))


def find(share=0.5, groups=GROUPS, params=PARAMS, layout=LAYOUT, **settings):
    return jp.find_masks(params, share, pattern=Coupled(groups), layout=layout, **settings)


@pytest.fixture(scope="module")
def masks():
    return find()


def of_layer(tree, n):
    return {**tree, "blocks": [jax.tree.map(itemgetter(i), tree["blocks"]) for i in range(n)]}


UNROLLED = of_layer(PARAMS, LAYERS)


# Chosen.


def test_units_of_a_group_that_layers_choose_are_a_row_for_each():
    pattern = bound()
    assert set(pattern.per_layer) == STACKED
    units = pattern.pool(jax.tree.map(jnp.abs, PARAMS))
    sizes = {name: u.shape for name, u in units.items()}
    assert sizes == {
        **{"blocks/gate:2": (4, 12), "blocks/k:2": (4, 4), "blocks/k:2~2": (4, 4)},
        **{"blocks/v:2": (4, 4), "blocks/down:2": (8,)},
    }
    layout = pattern.units_layout.on(units, "a test")
    assert {n: layout.layers(n, u.ndim) for n, u in units.items()} == {
        n: (0,) if n in STACKED else () for n in units
    }
    assert all(u.dtype == jnp.float32 for u in units.values())


@pytest.mark.parametrize("reduce, normalize", [("mean", False), ("sum", True), ("norm", True)])
def test_units_score_as_in_layers_that_are_leaves_of_their_own(reduce, normalize):
    pattern = bound(reduce=reduce, normalize=normalize)
    alone = Coupled(jp.find_groups(unrolled, UNROLLED, X), reduce=reduce, normalize=normalize)
    units = pattern.pool(PARAMS)
    each = alone.pool(UNROLLED)
    for name in STACKED:
        own = [name.replace("blocks/", f"blocks/{i}/").replace(":2", ":1") for i in range(LAYERS)]
        rows = [each[one] for one in own]
        np.testing.assert_allclose(units[name], rows, rtol=1e-5, atol=1e-6)


def test_layers_choose_as_layers_that_are_leaves_of_their_own():
    """The same scores, small integers whose sums are exact, give the same masks bit for bit."""
    scores = jax.tree.map(lambda w: jnp.round(jnp.abs(w) * 50), PARAMS)
    groups = jp.find_groups(unrolled, UNROLLED, X)
    got = jp.make_masks(scores, 0.5, pattern=Coupled(GROUPS), layout=LAYOUT)
    alone = jp.make_masks(of_layer(scores, LAYERS), 0.5, pattern=Coupled(groups))
    whole = jax.tree.map(lambda m, w: jnp.broadcast_to(m, w.shape), got, PARAMS)
    want = jax.tree.map(lambda m, w: jnp.broadcast_to(m, w.shape), alone, UNROLLED)
    assert_trees_equal(of_layer(whole, LAYERS), want)
    one, small = jp.shrink(scanned, PARAMS, got)
    other, parts = jp.shrink(unrolled, UNROLLED, alone)
    assert_trees_equal(of_layer(small, LAYERS), parts)
    assert_close(one(small, X), other(parts, X))


def test_masks_are_full_along_layers_and_the_axis_of_the_units(masks):
    shapes = {name: m.shape for name, m in masks["blocks"].items()}
    assert shapes["scale"] == (1, WIDTH) and shapes["bias"] == (LAYERS, HIDDEN)
    alone = Groups([g for g in GROUPS if g.name == "blocks/gate:2"])
    assert find(groups=alone)["blocks"]["up"].shape == (LAYERS, 1, HIDDEN)
    rows = np.asarray(masks["blocks"]["bias"])
    assert (rows.sum(1) == HIDDEN // 2).all() and len(np.unique(rows, axis=0)) > 1


def test_all_layers_keep_as_many_as_the_one_that_keeps_most():
    pattern = bound(round_to=3, max_sparsity=0.9)
    units = pattern.pool(jax.tree.map(jnp.abs, PARAMS))
    keep = {name: jnp.zeros(u.shape, bool) for name, u in units.items()}
    keep["blocks/gate:2"] = keep["blocks/gate:2"].at[1, :4].set(True)
    settled = pattern.settle(units, keep, None)
    assert settled["blocks/gate:2"].sum(1).tolist() == [6] * LAYERS
    assert settled["blocks/k:2~2"].sum(1).tolist() == [3] * LAYERS
    assert_trees_equal(settled["blocks/gate:2"], best(units["blocks/gate:2"], 0.5))
    alive = {name: jnp.ones(u.shape, bool) for name, u in units.items()}
    alive["blocks/gate:2"] = alive["blocks/gate:2"].at[2, 5:].set(False)
    settled = pattern.settle(units, keep, alive)
    assert settled["blocks/gate:2"].sum(1).tolist() == [5] * LAYERS
    assert not (settled["blocks/gate:2"] & ~alive["blocks/gate:2"]).any()
    assert_trees_equal(jax.jit(pattern.settle)(units, keep, alive), settled)


def test_without_a_layout_all_layers_keep_the_same():
    pattern = Coupled(GROUPS).bind(PARAMS, where=jp.is_matrix)
    assert pattern.per_layer == () and pattern.units_layout is None
    masks = jp.find_masks(PARAMS, 0.5, pattern=Coupled(GROUPS))
    assert masks["blocks"]["bias"].shape == (1, HIDDEN)
    silent = jp.Layout({"blocks/(gate|up)": (None, None, None)})
    assert bound(layout=silent).per_layer == ()
    other = jp.Layout(
        {"blocks/(gate|up|down)": (None, "layer", None), "blocks/bias": ("layer",) * 2}
    )
    assert bound(layout=other).per_layer == ()


# Cut.


def test_the_small_function_is_the_masked_one(masks):
    small_fn, small = jp.shrink(scanned, PARAMS, masks, X)
    masked = jp.apply_masks(PARAMS, masks)
    assert small["blocks"]["up"].shape == (LAYERS, WIDTH // 2, HIDDEN // 2)
    assert jp.verify_shrink(scanned, PARAMS, masks, X) < 1e-5
    other = jax.random.normal(jax.random.key(1), (7, 5, 3))
    assert_close(jax.jit(small_fn)(small, other), scanned(masked, other))
    assert_close(jax.vmap(small_fn, (None, 0))(small, X[:, None]), scanned(masked, X)[:, None])
    cut = jp.Cut.from_masks(masks, PARAMS)
    slope = lambda f, p: jax.grad(lambda p: jnp.sum(f(p, X) ** 2))(p)
    assert_close(slope(small_fn, small), cut.params(slope(scanned, masked)))
    assert jp.count_flops(small_fn, small, X) < 0.45 * jp.count_flops(scanned, PARAMS, X)
    sizes = [leaf.size for leaf in jax.tree.leaves(small)]
    assert jp.size_of(PARAMS, masks) == sum(sizes)


def test_rows_of_indices_are_taken_layer_by_layer(masks):
    cut = jp.Cut.from_masks(masks, PARAMS)
    k = cut["blocks/bias"][1]
    assert k.shape == (LAYERS, HIDDEN // 2)
    assert cut["blocks/gate"][2].shape == (LAYERS, 1, HIDDEN // 2)
    assert cut["blocks/down"][1].shape == (LAYERS, HIDDEN // 2, 1)
    assert_trees_equal(
        cut.params(PARAMS)["blocks"]["bias"],
        jnp.stack([b[i] for b, i in zip(PARAMS["blocks"]["bias"], k, strict=True)]),
    )
    assert "blocks/bias axis 1: 6 of 12 a layer" in repr(jp.Cut({"blocks/bias": {1: k}}, PARAMS))
    shapes = jax.eval_shape(lambda: PARAMS)
    assert_trees_equal(
        jax.tree.map(jnp.shape, cut.params(shapes)), jax.tree.map(jnp.shape, cut.params(PARAMS))
    )


def test_a_cut_goes_through_json_and_back_to_masks(masks):
    cut = jp.Cut.from_masks(masks, PARAMS)
    again = jp.Cut(json.loads(json.dumps(cut.json)), PARAMS)
    assert again == cut and hash(again) == hash(cut)
    assert again.json == jp.cut_list(PARAMS, masks)
    assert_trees_equal(again.masks(), masks)
    fn, small = jp.shrink(scanned, PARAMS, cut=cut.json)
    assert_close(fn(small, X), scanned(jp.apply_masks(PARAMS, masks), X))
    assert jp.Cut.from_masks(again.masks()) == cut
    same = {"w": {1: [[0, 2], [0, 2]]}}
    assert jp.Cut(same, {"w": jnp.ones((2, 3))}) == jp.Cut({"w": {1: [0, 2]}})


def test_two_rounds_are_one(masks):
    first = jp.Cut.from_masks(masks, PARAMS)
    fn, small = first.fn(scanned), first.params(PARAMS)
    groups = jp.find_groups(fn, small, X)
    assert set(GROUPS.cut(masks)) == set(groups)
    more = find(0.4, groups, small)
    second = jp.Cut.from_masks(more, small)
    both = second.after(first)
    assert_trees_equal(both.params(PARAMS), second.params(small))
    assert jp.verify_shrink(fn, small, more, X) < 1e-5
    rows = jp.Cut({"w": {1: [[0, 2], [1, 3]]}}, {"w": jnp.ones((2, 4))})
    one = jp.Cut({"w": {1: [1]}}, {"w": jnp.ones((2, 2))})
    assert one.after(rows).json == {"w": {1: [[2], [3]]}}
    assert rows.after(jp.Cut({"w": {1: [0, 2, 3, 4]}})).json == {"w": {1: [[0, 3], [2, 4]]}}
    assert jp.Cut({"w": {0: [1]}}).after(rows).json == {"w": {1: [1, 3], 0: [1]}}


def test_a_state_is_cut_as_the_params_are(masks):
    tx = optax.adam(0.1)
    _, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS))
    small = jp.shrink_state(tx, state, PARAMS, masks)
    cut = jp.Cut.from_masks(masks, PARAMS)
    assert_trees_equal(small[0].mu, cut.params(state[0].mu))
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    params = {"up": weights(3, 4, 12), "down": weights(3, 12, 5)}
    rows = best(weights(3, 12), 0.5)
    some = {"up": rows[:, None], "down": rows[:, :, None]}
    state = jax.jit(tx.update)(params, tx.init(params), params)[1]
    cut = jp.Cut.from_masks(some, params)
    left = cut.state(tx, state)
    sums = jax.tree.leaves(left)
    fresh = jax.tree.leaves(tx.init(cut.params(params)))
    assert [s.shape for s in sums] == [f.shape for f in fresh]
    one = [s for s in jax.tree.leaves(state) if s.shape == (3, 12)]
    assert any(np.array_equal(jnp.take_along_axis(one[0], cut["up"][2][:, 0], 1), s) for s in sums)


def test_a_vector_that_layers_share_cannot_be_cut_in_each():
    tx, params = optax.sm3(0.1), {"up": weights(3, 4, 6)}
    masks = {"up": best(weights(3, 6), 0.5)[:, None]}
    with pytest.raises(
        ValueError, match=r"one vector along axis 2 .* each layer keeps.*Start anew"
    ):
        jp.shrink_state(tx, tx.init(params), params, masks)


def test_groups_follow_masks(masks):
    keep = GROUPS.keep(masks)
    assert {name: k.shape for name, k in keep.items()} == {
        g.name: (LAYERS, g.size) if g.name in STACKED else (g.size,) for g in GROUPS
    }
    some = {"blocks": {name: masks["blocks"][name] for name in ("bias", "q", "v")}}
    whole = GROUPS.complete(some, PARAMS)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), whole, masks))
    alone = {"blocks": {"bias": masks["blocks"]["bias"]}}  # a matrix alone, which groups explain
    assert (GROUPS.complete(alone, PARAMS)["blocks"]["up"][:, 0] == alone["blocks"]["bias"]).all()
    _, small = jp.shrink(scanned, PARAMS, alone, X, groups=GROUPS)
    assert small["blocks"]["up"].shape == (LAYERS, WIDTH, HIDDEN // 2)
    inner = GROUPS.at("blocks")
    assert {g.name for g in inner if g.layers == LAYERS} == {n[7:] for n in STACKED}
    assert inner.stacked["up"] == 0 and "scale" not in inner.stacked
    contrary = {
        "blocks": {"bias": alone["blocks"]["bias"], "up": ~alone["blocks"]["bias"][:, None]}
    }
    with pytest.raises(ValueError, match=r"remove index \d+ of axis 1 of 'blocks/bias'"):
        GROUPS.complete(contrary, PARAMS)


def test_a_layer_may_go_and_the_others_choose(masks):
    blocks = jp.find_blocks(scanned, PARAMS, X)
    whole = next(b for b in blocks if "[1]" in b.name)
    both = jp.combine_masks(masks, blocks.without([whole.name], PARAMS))
    fn, small = jp.shrink(scanned, PARAMS, both, X)
    assert small["blocks"]["up"].shape == (LAYERS - 1, WIDTH // 2, HIDDEN // 2)
    assert jp.verify_shrink(scanned, PARAMS, both, X) < 1e-5
    cut = jp.Cut.from_masks(both, PARAMS)
    assert cut["blocks/bias"][1].shape == (LAYERS - 1, HIDDEN // 2)
    assert jp.Cut(json.loads(json.dumps(cut.json)), PARAMS) == cut
    assert jp.Cut.from_masks(cut.masks(), PARAMS) == cut
    assert not GROUPS.keep(both)["blocks/gate:2"][1].any()
    groups = {g.name: g for g in GROUPS.cut(both)}
    assert groups["blocks/gate:2"].layers == LAYERS - 1
    assert set(groups.values()) == set(jp.find_groups(fn, small, X))


def test_a_small_model_is_saved_and_loaded(masks, tmp_path):
    _, small = jp.shrink(scanned, PARAMS, masks)
    jp.checkpoint.save(tmp_path / "small.safetensors", small)
    again, _ = jp.checkpoint.load(tmp_path / "small.safetensors", like=small)
    assert_trees_equal(again, small)
    jp.checkpoint.save(tmp_path / "whole.safetensors", PARAMS, masks)
    _, stored = jp.checkpoint.load(tmp_path / "whole.safetensors")
    assert_trees_equal(stored, jax.tree.map(np.asarray, masks))


# Which groups may be chosen so.

H = {"up": weights(3, WIDTH, 6), "down": weights(3, 6, WIDTH)}
INPUT = jax.random.normal(jax.random.key(2), (2, WIDTH))


def mlp(act, x, p):
    return x + act(x @ p["up"]) @ p["down"]


def over(p, x, act=jnp.tanh, **keywords):
    return lax.scan(lambda x, p: (mlp(act, x, p), None), x, p, **keywords)[0]


def halves(h):
    a, b = jnp.split(h, 2, -1)
    return jnp.concatenate([a * jax.nn.sigmoid(b), b], -1)


def heads(x, p, weigh=lambda s: s):
    """Three heads of two: a fused kernel for queries, keys and values."""
    q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(*x.shape[:-1], 3, 3, 2), -3, 0)
    share = jax.nn.softmax(weigh(jnp.einsum("thd,shd->hts", q, k)))
    return x + jnp.einsum("hts,shd->thd", share, v).reshape(*x.shape[:-1], 6) @ p["o"]


def fused(p, x):
    return lax.scan(lambda x, p: (heads(x, p), None), x, p)[0]


def two_loops(p, x):
    return over(p, over(jax.tree.map(lambda w: w[:2], p), x))


def with_time(p, x):
    def layer(x, p):  # an inner loop carries what one layer holds
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h + x @ p["up"]), jnp.zeros((2, 6)))
        return x + h @ p["down"], None

    return lax.scan(layer, x, p)[0]


def in_a_loop(p, x):
    return lax.fori_loop(0, 2, lambda _, x: over(p, x), x)


FUSED = {"qkv": weights(3, WIDTH, 18), "o": weights(3, 6, WIDTH)}
GATED = {"up": weights(3, WIDTH, 12), "down": weights(3, 12, WIDTH)}
SECOND = {"up": jnp.moveaxis(H["up"], 0, 1), "down": jnp.moveaxis(H["down"], 0, 2)}
CHOSEN = {
    "hidden units": (over, H, {"up:2"}),
    "a gate fused with what it gates": (
        lambda p, x: over(p, x, halves),
        GATED,
        {"up:2"},
    ),
    "a gate that alternates with what it gates": (
        lambda p, x: over(p, x, lambda h: h[:, ::2] * jax.nn.relu(h[:, 1::2])),
        {"up": GATED["up"], "down": H["down"]},
        {"up:2"},
    ),
    "heads of a fused kernel": (fused, FUSED, {"qkv:2", "qkv:2~2"}),
    "layers along another axis": (
        lambda p, x: over(
            {"up": jnp.moveaxis(p["up"], 1, 0), "down": jnp.moveaxis(p["down"], 2, 0)}, x
        ),
        SECOND,
        {"up:2"},
    ),
    "a cast and a view before the loop": (
        lambda p, x: over(
            {"up": (2 * p["up"]).astype(jnp.float16).astype(jnp.float32), "down": p["down"]}, x
        ),
        H,
        {"up:2"},
    ),
    "remat": (
        lambda p, x: lax.scan(jax.checkpoint(lambda x, p: (mlp(jax.nn.relu, x, p), None)), x, p)[0],
        H,
        {"up:2"},
    ),
    "backwards": (lambda p, x: over(p, x, reverse=True), H, {"up:2"}),
    "numbers of layers": (
        lambda p, x: lax.scan(
            lambda x, a: (mlp(lambda h: h * (1 + a[1]), x, a[0]), None), x, (p, jnp.arange(3.0))
        )[0],
        H,
        {"up:2"},
    ),
    "low ranks merged before the loop": (
        lambda p, x: over(
            {"up": p["up"] + jnp.einsum("lir,lro->lio", p["a"], p["b"]), "down": p["down"]}, x
        ),
        {**H, "a": weights(3, WIDTH, 2), "b": weights(3, 2, 6)},
        {"a:2", "b:2"},
    ),
    "two loops over one stack": (two_loops, H, {"up:2"}),
    "a loop in a layer": (with_time, H, {"up:2"}),
    "a loop around layers": (in_a_loop, H, {"up:2"}),
    "a new order that is undone": (
        lambda p, x: over(p, x, lambda h: h[:, ::-1][:, ::-1]),
        H,
        {"up:2"},
    ),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_layers_choose_where_units_are_alike(name):
    fn, params, wanted = CHOSEN[name]
    groups = jp.find_groups(fn, params, INPUT)
    assert {g.name for g in groups if g.layers == 3} == wanted
    layout = jp.find_layout(fn, params, INPUT)
    pattern = bound(groups, params, layout)
    assert set(pattern.per_layer) == wanted
    keep = {g.name: best(weights(g.layers, g.size), 0.5) for g in groups if g.layers}
    keep |= {g.name: np.ones(g.size, bool) for g in groups if not g.layers}
    masks = pattern.expand(keep, like=params)
    cut = jp.Cut.from_masks(masks, params)
    assert any(k.ndim > 1 for axes in cut.values() for k in axes.values())
    along = {"up": 1, "down": 2} if name == "layers along another axis" else {}
    assert groups.stacked == {path: along.get(path, 0) for path in groups.stacked}
    assert jp.verify_shrink(fn, params, masks, INPUT) < 1e-5


SHARED = {**H, "b": weights(1, 6)[0]}
LOPSIDED = lambda h: jnp.concatenate([jnp.tanh(h[:, :3]), jax.nn.relu(h[:, 3:])], -1)
TABLE = lambda n: jnp.asarray(np.linspace(1, 2, n, dtype=np.float32))
APART = {
    "a table of the program": (lambda p, x: over(p, x, lambda h: h * TABLE(6)[None]), H),
    "positions": (lambda p, x: over(p, x, lambda h: h * jnp.arange(6.0)[None]), H),
    "noise": (
        lambda p, x: over(p, x, lambda h: h * jax.random.normal(jax.random.key(0), h.shape)),
        H,
    ),
    "what all layers share": (
        lambda p, x: over({k: p[k] for k in H}, x, lambda h: h + p["b"][None]),
        SHARED,
    ),
    "two ways on": (lambda p, x: over(p, x, LOPSIDED), H),
    "every other": (
        lambda p, x: over(
            p, x, lambda h: jnp.concatenate([jnp.tanh(h[:, ::2]), jax.nn.relu(h[:, 1::2])], -1)
        ),
        H,
    ),
    "a slope for each head": (
        lambda p, x: lax.scan(
            lambda x, p: (heads(x, p, lambda s: s * TABLE(3)[:, None, None]), None), x, p
        )[0],
        FUSED,
    ),
    "layers in two orders": (lambda p, x: over({"up": p["up"], "down": p["down"][::-1]}, x), H),
    "sums over the layers so far": (
        lambda p, x: over({"up": jnp.cumsum(p["up"], 0), "down": p["down"]}, x),
        H,
    ),
    "layers weighed by one another": (
        lambda p, x: over({"up": p["up"] * jax.nn.softmax(p["up"], 0), "down": p["down"]}, x),
        H,
    ),
    "pairs of units": (
        lambda p, x: over(p, x, lambda h: (h[:, :, None] * h[:, None]).reshape(2, 36)),
        {"up": H["up"], "down": weights(3, 36, WIDTH)},
    ),
    "layers that meet one another": (
        lambda p, x: (
            over({"up": p["up"], "down": p["down"]}, x)
            + jnp.einsum("liu,muo->lmio", p["up"], p["down"]).sum((0, 1, 2))[None]
        ),
        H,
    ),
    "neighbours in the stack": (
        lambda p, x: over({"up": p["up"][1:] + p["up"][:-1], "down": p["down"][1:]}, x),
        H,
    ),
    "a sum over layers": (lambda p, x: jnp.sum((over(p, x) @ p["up"].mean(0)) ** 2, 1), H),
    "what is carried": (
        lambda p, x: lax.scan(
            lambda c, p: ((mlp(jnp.tanh, c[0], p), c[1] + c[0] @ p["up"]), None),
            (x, jnp.zeros((2, 6))),
            p,
        )[0][1].sum(1),
        H,
    ),
    "what the loop gives": (
        lambda p, x: lax.scan(lambda x, p: (mlp(jnp.tanh, x, p), jnp.sin(x @ p["up"])), x, p)[
            1
        ].sum((0, 2)),
        H,
    ),
    "a loop that looks layers up": (
        lambda p, x: lax.fori_loop(
            0, 3, lambda i, x: mlp(jnp.tanh, x, jax.tree.map(lambda w: w[i], p)), x
        ),
        H,
    ),
    "stacks of stacks": (
        lambda p, x: lax.scan(lambda x, p: (over(p, x), None), x, p)[0],
        {"up": weights(2, 3, WIDTH, 6), "down": weights(2, 3, 6, WIDTH)},
    ),
    "layers of two scans": (
        lambda p, x: over({"up": p["up"], "down": jnp.concatenate([p["down"], p["more"]])}, x),
        {"up": H["up"], "down": H["down"][:1], "more": H["down"][1:]},
    ),
}


@pytest.mark.parametrize("name", APART)
def test_all_layers_keep_the_same_where_units_are_told_apart(name):
    fn, params = APART[name]
    groups = jp.find_groups(fn, params, INPUT)
    sizes = (3,) if name == "a slope for each head" else (3, 6)  # what a head holds is alike
    assert any(g.size in sizes for g in groups)
    assert not any(g.layers for g in groups if g.size in sizes)


def test_masks_that_the_function_contradicts_are_refused():
    rows = best(weights(3, 6), 0.5)
    masks = {"up": rows[:, None], "down": rows[:, :, None]}
    for name in ("a table of the program", "two ways on"):
        fn, params = APART[name]
        with pytest.raises(
            ValueError, match=r"other indices of axis \d of '\w+' in each layer, but"
        ):
            jp.shrink(fn, params, masks, INPUT)
    groups = jp.find_groups(*APART["a table of the program"], INPUT)
    with pytest.raises(ValueError, match="of which all layers have to keep the same"):
        groups.keep(masks)
    wrong = {"up": rows[:, None], "down": rows[::-1][:, :, None]}
    with pytest.raises(
        ValueError, match=r"The masks keep index \d of axis 1 of 'down'|remove index"
    ):
        jp.shrink(over, H, wrong, INPUT)


def test_training_prunes_each_layer_and_goes_on_small():
    groups = jp.find_groups(over, H, INPUT)
    layout = jp.Layout({".*": ("layer", "in", "out")})
    schedule = jp.schedules.cubic(0.5, begin=0, end=2, every=1)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, pattern=Coupled(groups), layout=layout)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(over(p, INPUT) ** 2) / 100)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = H, tx.init(H)
    for _ in range(4):
        params, state = step(params, state)
    masks = jp.get_masks(state)
    assert {name: k.sum(-1).tolist() for name, k in groups.keep(masks).items()} == {"up:2": [3] * 3}
    assert len(np.unique(masks["up"][:, 0], axis=0)) > 1
    assert jp.verify_shrink(over, params, masks, INPUT) < 1e-5
    tx = jp.hold(optax.sgd(0.1))
    state = jp.shrink_state(tx, state, params, masks)
    small = jp.Cut.from_masks(masks, params).params(params)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(small))


# What is refused.


def test_layers_that_keep_more_and_fewer_are_refused(masks):
    rows = np.asarray(masks["blocks"]["bias"]).copy()
    rows[1, :] = True
    some = {"blocks": {"up": jnp.asarray(rows)[:, None]}}
    wanted = (
        r"'blocks/up' keeps \[6, 12, 6, 6\] indices of axis 2 in the layers along axis 0.*per_leaf"
    )
    with pytest.raises(ValueError, match=wanted):
        jp.shrink(scanned, PARAMS, some)


def test_single_weights_are_no_layers():
    """As many weights of each column, as N:M keeps, do not make a stack of a matrix."""
    params = {"w": weights(4, 8), "conv": weights(1, 1, 4, 8), "v": weights(2, 4, 8)}
    for axis in (0, 1):
        masks = {"w": best(jnp.moveaxis(params["w"], axis, -1), 0.5)}
        masks["w"] = jnp.moveaxis(masks["w"], -1, axis)
        for some in (masks, {"conv": masks["w"][None, None]}):
            with pytest.raises(ValueError, match=r"removes \d+ single weights"):
                jp.cut_list(params, some)
    with pytest.raises(ValueError, match=r"'v' removes \d+ single weights"):
        jp.cut_list(params, {"v": best(params["v"], 0.5)})


def test_scopes_that_need_unequal_widths_are_refused():
    for scope in (scopes.isomorphic(GROUPS), scopes.across):
        with pytest.raises(ValueError, match=r"'blocks/gate:2'.* one width.*per_leaf.*unstack"):
            find(scope=scope)
        assert find(scope=scope, layout=None)["blocks"]["bias"].shape == (1, HIDDEN)
    assert scopes.isomorphic(GROUPS).refuses(jp.patterns.Weights()) is None


def test_a_sparsity_for_each_group():
    shares = Coupled(GROUPS).share({"blocks/gate:2": 0.75}, default=0.25)
    masks = find(shares)
    assert masks["blocks"]["bias"].sum(1).tolist() == [3] * LAYERS
    assert GROUPS.keep(masks)["blocks/v:2"].sum(1).tolist() == [3] * LAYERS
    with pytest.raises(ValueError, match=r"a sparsity for each layer of 'blocks/gate:2'"):
        find({**shares, "blocks/gate:2": jnp.linspace(0, 1, LAYERS)})
    with pytest.raises(ValueError, match=r"per_layer=.*'blocks/down:2', which layers cannot"):
        Coupled(GROUPS, per_layer=("blocks/down:2",))


def test_a_stack_of_another_length_is_refused():
    taller = jax.tree.map(lambda w: jnp.concatenate([w, w]), PARAMS["blocks"])
    params = {**PARAMS, "blocks": taller}
    with pytest.raises(ValueError, match=r"has 4 layers along axis 0 of .* shape is \(8, "):
        bound(params=params)
    with pytest.raises(ValueError, match=r"has 4 layers along axis 0"):
        bound().expand({g.name: jnp.ones((LAYERS, g.size), bool) for g in GROUPS}, like=params)
    with pytest.raises(
        ValueError, match=r"keeps .* of axis 1 of 'w', but the params have \(3, 4\)"
    ):
        jp.Cut({"w": {1: [[0, 2], [1, 3]]}}, {"w": jnp.ones((3, 4))})
    for rows in ([[0, 2], [3, 1]], [[0, 2], [1]], [[[0]]], [[0, 1], [2, 2]]):
        with pytest.raises(ValueError, match="Pass increasing indices"):
            jp.Cut({"w": {1: rows}})


def test_groups_tell_what_layers_may_choose():
    (group,) = [g for g in GROUPS if g.name == "blocks/gate:2"]
    assert str(group).startswith("blocks/gate:2: 12 units in each of 4 layers\n")
    other = jp.Group(group.name, group.members, group.size)
    assert other != group and hash(other) != hash(group)
    member = group.members[0]
    assert member.layer == 0 and jp.Member(member.path, member.axis, member.indices) != member


def test_a_declared_layout_need_not_name_biases():
    def mlp(p, x):
        layer = lambda x, q: (x + jax.nn.relu(x @ q["up"] + q["b"]) @ q["down"], None)
        return lax.scan(layer, x, p)[0]

    params = {"up": weights(3, 6, 8), "b": jnp.zeros((3, 8)), "down": weights(3, 8, 6)}
    pattern = Coupled(jp.find_groups(mlp, params, jnp.ones((6,))))
    masks = jp.find_masks(
        params, 0.25, pattern=pattern, layout=jp.Layout({"up|down": ("layer", "in", "out")})
    )
    assert masks["b"].shape == (3, 8) and masks["b"].sum(1).tolist() == [6, 6, 6]
    # One that says that another axis counts layers is at odds with the groups.
    other = jp.Layout({"up": ("layer", "in", "out"), "down": ("in", "layer", "out")})
    assert jp.find_masks(params, 0.25, pattern=pattern, layout=other)["b"].shape == (1, 8)
