"""Layers are layers: a stack with a layout is masked as the list of its layers is, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import criteria, patterns, scopes
from tests.contract import tables, trainings
from tests.contract.layered import (
    ALONE,
    LAYERS,
    LAYOUT,
    alone,
    assert_same,
    draw,
    stacked,
    unstacked,
)
from tests.helpers import fast_if

SPARSITY = 0.75
EMA = criteria.fisher_ema(0.5)
SCOPES = {
    "per_leaf": scopes.per_leaf,
    "across": scopes.across,
    "per_output": scopes.per_output,
    "windows": scopes.windows(4),
    "windows in": scopes.windows(4, axis="in"),
}
PATTERNS = {
    "Weights": patterns.Weights(),
    "Channels": patterns.Channels(-1),
    "Channels 0": patterns.Channels(0),
    "Channels out": patterns.Channels("out", reduce="norm"),
    "Blocks": patterns.Blocks((2, 3)),  # ragged
    "Blocks named": patterns.Blocks((4, 2), axes=("out", "in")),
}
PAIRS = [
    (p, s)
    for p in PATTERNS
    for s in SCOPES
    if not (p.startswith("Channels") and not s.startswith(("per_leaf", "across")))
]
# One of each pattern and of each scope; all pairs are in the slow suite.
FEW = [
    *(("Weights", s) for s in SCOPES),
    *(("Blocks named", "per_output"), ("Channels out", "across"), ("Channels 0", "per_leaf")),
    ("Blocks", "windows"),
]


def both(find):
    """Masks of the stacks and of the leaves, by a function of params, gradients and layout."""
    grads = alone(seed=7)
    return find(stacked(alone()), stacked(grads), LAYOUT), find(alone(), grads, ALONE)


def evidence(params, grads):
    """All that a criterion may ask for, the same for stacks and leaves."""
    apart = (lambda tree: tree) if isinstance(params["h"]["a"], list) else unstacked
    return {
        "grads": grads,
        "key": jax.random.key(3),
        "batch": jnp.float32(tables.BATCH),
        "loss_fn": lambda p, batch: tables.loss_fn(apart(p), batch),
        "apply_fn": lambda p, batch: tables.apply_fn(apart(p), batch),
        "params_init": jax.tree.map(lambda w: w / 2, params),
        "norms": jax.tree.map(lambda w: 1 + jnp.mean(jnp.abs(w), -1, keepdims=True), params),
    }


@pytest.mark.parametrize(("pattern", "scope"), fast_if(lambda p, s: (p, s) in FEW, PAIRS))
def test_patterns_and_scopes(pattern, scope):
    parts = {"pattern": PATTERNS[pattern], "scope": SCOPES[scope]}
    find = lambda p, g, layout: jp.find_masks(p, SPARSITY, layout=layout, **parts)
    assert_same(*both(find))


@pytest.mark.parametrize(
    "name",
    fast_if(
        lambda n: n in ("taylor", "random", "lamp", "snip"),
        [n for n in tables.CRITERIA if n not in tables.MEMORIES],
    ),
)
def test_criteria(name):
    criterion = tables.make_criterion(name)

    def find(params, grads, layout):
        asked = evidence(params, grads)
        settings = {"criterion": criterion, "scope": scopes.across, "layout": layout}
        return jp.find_masks(params, SPARSITY, **settings, **asked)

    if name == "random":  # draws differ
        stacks, leaves = both(find)
        count = lambda tree: sum(int(m.sum()) for m in jax.tree.leaves(tree))
        assert count(stacks) == count(leaves)
    elif name in ("snip", "synflow", "grasp"):  # gradients may be summed in another order
        stacks, leaves = both(find)
        differ = [
            np.mean(np.asarray(a) != np.asarray(b))
            for a, b in zip(
                jax.tree.leaves(unstacked(stacks)), jax.tree.leaves(leaves), strict=True
            )
        ]
        assert max(differ) <= 0.02
    else:
        assert_same(*both(find))


def test_a_part_that_knows_no_layout_sees_each_layer_as_a_leaf():
    def share(params, *, grads, **_):
        return jax.tree.map(lambda w, g: jnp.abs(w * g) / jnp.abs(w).max(), params, grads)

    find = lambda p, g, layout: jp.find_masks(
        p, SPARSITY, criterion=share, scope=keep_more_of_small, layout=layout, grads=g
    )
    stacks, leaves = both(find)
    assert_same(stacks, leaves)
    assert all(np.mean(m) > 0.6 for m in jax.tree.leaves(leaves))


class Steady:
    """A criterion with memory, of somebody's own: how steadily a layer is pulled at, as a whole."""

    def init(self, params):
        return jax.tree.map(lambda w: jnp.zeros_like(w) + jnp.abs(w).max(), params)

    def update(self, state, params, grads):
        return jax.tree.map(
            lambda s, w, g: s / 2 + jnp.abs(w * g) / jnp.abs(g).max(), state, params, grads
        )

    def __call__(self, params, *, state, **_):
        return state


@pytest.mark.parametrize(
    "criterion",
    [Steady(), *(pytest.param(c, marks=pytest.mark.slow) for c in (criteria.movement, EMA))],
)
def test_criteria_with_memory(criterion):
    def find(params, grads, layout):
        settings = {"criterion": criterion, "scope": scopes.across, "layout": layout}
        schedule = jp.schedules.linear(SPARSITY, 0, 4, 2)
        return trained(jp.prune(optax.sgd(0.25), schedule=schedule, **settings), params, grads)

    (weights, masks), (leaves, want) = both(find)
    assert_same(masks, want)
    assert_same(weights, leaves)


def keep_more_of_small(units, sparsity, *, within=None):
    """A scope that knows no layout."""
    return scopes.per_leaf(units, jax.tree.map(lambda s: s / 2, sparsity), within=within)


@pytest.mark.parametrize("scope", [scopes.per_leaf, keep_more_of_small])
def test_an_array_of_sparsities_has_one_for_each_layer_whoever_ranks(scope):
    each = {"a": [0.25, 0.75], "b": [0.5, 0.0]}

    def find(params, grads, layout):
        rows = each if layout is ALONE else {n: np.array(x) for n, x in each.items()}
        sparsity = {"h": rows, "head": 0.5, "out": 0.25}
        return jp.find_masks(params, sparsity, scope=scope, layout=layout)

    assert_same(*both(find))


@pytest.mark.parametrize(
    "pattern", fast_if(lambda p: p == "Channels", ["Channels", "Blocks named", "foreign"])
)
def test_sparse_training_moves_units_in_each_layer(pattern):
    class Rows:
        """A pattern that knows no layout."""

        def pool(self, scores):
            return jax.tree.map(lambda s: s.mean(1, keepdims=True), scores)

        def expand(self, keep, *, like):
            return jax.tree.map(lambda _, k: k, like, keep)

    def find(params, grads, layout):
        settings = {"pattern": Rows() if pattern == "foreign" else PATTERNS[pattern]}
        where = jp.exclude("out")  # is checked at `init` alone, when all leaves are there
        wrap = trainings.wrappers(layout=layout, where=where, **settings)["rigl"]
        return trained(wrap(optax.sgd(0.25)), params, grads)

    (weights, masks), (leaves, want) = both(find)
    assert masks["out"] is None
    assert_same(masks, want)
    assert_same(weights, leaves)


def test_parts_that_know_no_layout_on_an_explicit_mesh():
    def share(params, **_):
        return jax.tree.map(lambda w: jnp.abs(w) / jnp.abs(w).max(), params)

    params = {"w": draw(2, 4, 8, 8) * np.arange(1, 9, dtype=np.float32)[:, None]}
    layout = jp.Layout({"w": ("in", "layer", "out")})
    settings = {"criterion": share, "scope": keep_more_of_small, "layout": layout}
    want = jp.find_masks(params, SPARSITY, **settings)["w"]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        there = jax.device_put(params, NamedSharding(mesh, P(None, "x", None)))
        np.testing.assert_array_equal(jp.find_masks(there, SPARSITY, **settings)["w"], want)
        tx = jp.prune(optax.sgd(0.1), schedule=jp.schedules.constant(SPARSITY), **settings)
        np.testing.assert_array_equal(trained(tx, there, there, 1)[1]["w"], want)


def test_a_stack_of_no_layers_has_nothing_to_lose():
    params = {"w": jnp.ones((0, 8, 4)), "v": jnp.ones((8, 4))}
    layout = jp.Layout({"w": ("layer", "in", "out"), "v": ("in", "out")})
    for scope in (*SCOPES.values(), keep_more_of_small):
        masks = jp.find_masks(params, 0.5, scope=scope, layout=layout)
        assert masks["w"].shape == (0, 8, 4) and masks["v"].sum() in (16, 24)
    tx = jp.dynamic.rigl(optax.sgd(0.1), sparsity=0.5, begin=0, end=2, every=1, layout=layout)
    ragged = {**params, "v": jnp.arange(32.0).reshape(8, 4)}
    assert trained(tx, ragged, ragged, 2)[1]["v"].sum() == 16


@pytest.mark.parametrize("name", ["uniform", "erk", "custom", "owl"])
def test_allocations(name):
    if name == "custom":
        rules = {"h/a[1]": 0.9, r"h/b\[[01]\]": 0.2, "head": 0.25}
        apart = {"h/a/1": 0.9, "h/b/[01]": 0.2, "head": 0.25}
        allocate = lambda p, layout: scopes.custom(
            p, rules if layout is LAYOUT else apart, default=0.5, layout=layout
        )
    elif name == "owl":
        settings = {"threshold": 2.0, "where": jp.is_matrix}
        allocate = lambda p, layout: scopes.owl(
            jax.tree.map(jnp.square, p), 0.75, layout=layout, **settings
        )
    else:
        allocate = lambda p, layout: getattr(scopes, name)(p, 0.9, layout=layout)
    stacks, leaves = allocate(stacked(alone()), LAYOUT), allocate(alone(), ALONE)
    got = jax.tree.leaves(unstacked(stacks))
    assert got == jax.tree.leaves(leaves)
    find = lambda p, g, layout: jp.find_masks(p, allocate(p, layout), layout=layout)
    assert_same(*both(find))


def trained(tx, params, grads, steps=tables.STEPS):
    """Params and masks after some updates with given gradients."""
    step = jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, jp.get_masks(state)


@pytest.mark.parametrize(
    "name", fast_if(lambda n: n in ("cubic", "cyclic"), list(tables.SCHEDULES))
)
def test_prune_under_every_schedule(name):
    packed = name != "cyclic"

    def find(params, grads, layout):
        final = scopes.erk(params, SPARSITY, layout=layout)
        settings = {"criterion": criteria.taylor, "layout": layout, "packed": packed}
        tx = jp.prune(optax.sgd(0.25), schedule=tables.SCHEDULES[name](final), **settings)
        return trained(tx, params, grads)

    (weights, masks), (leaves, want) = both(find)
    assert_same(masks, want)
    assert_same(weights, leaves)


@pytest.mark.parametrize(
    ("name", "scope"),
    fast_if(
        lambda n, s: n != "set" and s == "per_leaf",
        [*((n, "per_leaf") for n in ("rigl", "set", "straight_through")), ("rigl", "per_output")],
    ),
)
def test_other_wrappers(name, scope):
    def find(params, grads, layout):
        wrap = trainings.wrappers(layout=layout, packed=True, scope=SCOPES[scope])[name]
        return trained(wrap(optax.sgd(0.25)), params, grads)

    (weights, masks), (leaves, want) = both(find)
    if name == "set":  # draws differ, counts do not
        kept = lambda tree: [int(m.sum()) for m in jax.tree.leaves(tree)]
        assert kept(unstacked(masks)) == kept(want)
    else:
        assert_same(masks, want)
        assert_same(weights, leaves)


@pytest.mark.parametrize(
    "scope", fast_if(lambda s: s is keep_more_of_small, [scopes.per_leaf, keep_more_of_small])
)
def test_iterative_pruning(scope):
    def find(params, grads, layout):
        rates = {"h/a[1]": 0.5} if layout is LAYOUT else {"h/a/1": 0.5}
        fit = lambda ticket, masks: jax.tree.map(lambda w, g: w + g / 4, ticket, grads)
        settings = {"rounds": 2, "rate": 0.3, "rates": rates, "layout": layout, "scope": scope}
        *_, level = jp.imp(params, fit, **settings)
        return level.masks

    assert_same(*both(find))


def test_earlier_masks_and_rounds():
    def find(params, grads, layout):
        first = jp.find_masks(params, 0.4, layout=layout)
        settings = {"layout": layout, "within": first, "rounds": 2, "grads": grads}
        return jp.find_masks(params, 0.8, criterion=criteria.taylor, **settings)

    assert_same(*both(find))


def test_two_axes_of_layers_are_layers_in_their_order():
    w = draw(1, 2, 8, 3, 8) * np.arange(1, 7, dtype=np.float32).reshape(2, 1, 3, 1)
    layout = jp.Layout({"w": ("layer", "in", "layer", "out")})
    rows = [w[i, :, j] for i in range(2) for j in range(3)]
    for settings in ({}, {"scope": scopes.across}, {"criterion": criteria.lamp}):
        got = jp.find_masks({"w": w}, 0.5, layout=layout, **settings)["w"]
        want = jp.find_masks({"w": rows}, 0.5, **settings)["w"]
        np.testing.assert_array_equal([got[i, :, j] for i in range(2) for j in range(3)], want)


@pytest.mark.parametrize("axis", fast_if(lambda axis: axis == 0, [0, 1, None]))
def test_sharded_over_eight_devices_the_layers_too(axis):
    w = draw(2, 8, 8, 16) * np.arange(1, 9, dtype=np.float32)[:, None, None]
    layout = jp.Layout({"w": ("layer", "in", "out")})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = P(*("x" if i == axis else None for i in range(3)))
    there = jax.device_put(jnp.asarray(w), NamedSharding(mesh, spec))
    for scope in (scopes.per_leaf, scopes.across, scopes.per_output):
        find = functools.partial(jp.find_masks, sparsity=SPARSITY, scope=scope, layout=layout)
        got = find({"w": there})["w"]
        assert got.sharding.is_equivalent_to(there.sharding, 3)
        np.testing.assert_array_equal(got, find({"w": w})["w"])


def test_each_layer_loses_exactly_its_share():
    masks = jp.find_masks(stacked(alone()), SPARSITY, layout=LAYOUT)
    a, b = masks["h"]["a"], masks["h"]["b"]
    assert a.sum((1, 2)).tolist() == [64 - round(SPARSITY * 64)] * LAYERS
    assert b.sum((0, 2)).tolist() == [128 - round(SPARSITY * 128)] * LAYERS


@pytest.mark.parametrize("axis", fast_if(lambda axis: axis == 0, [0, 2]))
def test_trained_on_eight_devices_masks_are_those_of_one(axis):
    params = {"w": draw(2, 8, 8, 16) * np.arange(1, 9, dtype=np.float32)[:, None, None]}
    layout = jp.Layout({"w": ("layer", "in", "out")})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    spec = NamedSharding(mesh, P(*("x" if i == axis else None for i in range(3))))
    schedule = jp.schedules.linear(scopes.erk(params, SPARSITY, layout=layout), 0, 4, 2)
    tx = jp.prune(
        optax.sgd(0.25), schedule=schedule, criterion=criteria.taylor, packed=True, layout=layout
    )
    grads = {"w": draw(3, 8, 8, 16)}
    there = jax.device_put((params, grads), spec)
    (weights, masks), (want, found) = trained(tx, *there), trained(tx, params, grads)
    np.testing.assert_array_equal(masks["w"], found["w"])
    np.testing.assert_array_equal(weights["w"], want["w"])


def attention(x, p):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k), axis=-1)
    return jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["o"])


def block(x, p):
    x = x + attention(x, p)
    return x + jax.nn.gelu(x @ p["up"]) @ p["down"], None


def scanned(params, tokens):
    x, _ = jax.lax.scan(block, params["embedding"][tokens], params["h"])
    return x @ params["head"]


def unrolled(params, tokens):
    x = params["embedding"][tokens]
    for p in params["h"]:
        x, _ = block(x, p)
    return x @ params["head"]


def transformer(seed):
    shapes = {"q": (8, 2, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (2, 4, 8)}
    shapes |= {"up": (8, 16), "down": (16, 8)}
    layers = [
        {name: draw([seed, i, *s], *s) * 2**i for name, s in shapes.items()} for i in range(LAYERS)
    ]
    ends = {"embedding": draw([seed, 9], 12, 8), "head": draw([seed, 8], 8, 12)}
    return {"h": layers, **ends}, {"h": jax.tree.map(lambda *x: np.stack(x), *layers), **ends}


@pytest.mark.parametrize(
    "settings",
    [
        {"scope": scopes.across, "criterion": criteria.taylor},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"scope": scopes.per_output}, marks=pytest.mark.slow),
        pytest.param({"pattern": patterns.Channels("out")}, marks=pytest.mark.slow),
    ],
    ids=["taylor across", "per_leaf", "per_output", "channels"],
)
def test_a_scanned_transformer_is_pruned_as_the_unrolled_one(settings):
    masks = []
    grads = transformer(seed=5)
    for fn, params, given in zip((unrolled, scanned), transformer(seed=4), grads, strict=True):
        layout = jp.find_layout(fn, params, jnp.zeros((1, 3), int))
        schedule = jp.schedules.linear(SPARSITY, 0, 4, 2)
        tx = jp.prune(optax.sgd(0.25), schedule=schedule, layout=layout, **settings)
        masks.append(trained(tx, params, given)[1])
    alone, stacks = masks
    assert alone["embedding"] is None and stacks["embedding"] is None
    np.testing.assert_array_equal(stacks["head"], alone["head"])
    for name in stacks["h"]:
        for i in range(LAYERS):
            np.testing.assert_array_equal(stacks["h"][name][i], alone["h"][i][name])
