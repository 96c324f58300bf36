"""The walk over calibration data: exact on any program, and what it sees is what is there."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune._calibrate import calibrate, walk_of
from jaxprune.graph._behind import bias_of
from jaxprune.graph._form import form_of
from jaxprune.graph._linear import Part, View
from jaxprune.graph._products import stops_of
from tests.layout_models import MODELS
from tests.walks import assert_walks_exactly, planned, walked
from tests.zoo import ZOO

QUICK = (  # the others are as exact, and take some minutes
    *("straight_through", "own_derivative", "resnext", "llama", "scanned", "experts"),
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32) * 0.5


def drawn(tree, seed=0):
    rng = np.random.default_rng(seed)

    def one(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype)
        return jnp.asarray(rng.integers(0, 2, x.shape), x.dtype)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))


# Exact


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_a_walk_that_changes_nothing_gives_what_the_function_gives(name):
    model = ZOO[name]()
    assert_walks_exactly(model.fn, model.params, *model.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_walk_through_a_model_of_the_table_of_layouts_is_exact(name):
    model = MODELS[name]()
    params, inputs = drawn(model.params), drawn(model.inputs, 1)
    half = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    assert_walks_exactly(model.fn, params, *inputs, tolerance=1e-2 if half else 2e-5)


W = {"a": (6, 8), "b": (8, 4)}
X = normal(9, 5, 6)


def weights(**shapes):
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


SPELLINGS = {
    "plain": (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], W),
    "transposed": (lambda p, x: (p["b"] @ (p["a"] @ x.T)).T, {"a": (8, 6), "b": (4, 8)}),
    "einsum": (
        lambda p, x: jnp.einsum("hdo,nhd->no", p["b"], jnp.einsum("ni,ihd->nhd", x, p["a"])),
        {"a": (6, 2, 4), "b": (2, 4, 3)},
    ),
    "fused": (
        lambda p, x: (
            sum(jnp.split(x @ p["a"], 2, axis=1)) @ jnp.concatenate([p["b"], p["c"].T], axis=1)
        ),
        {"a": (6, 8), "b": (4, 3), "c": (2, 4)},
    ),
    "split": (
        lambda p, x: x @ p["a"][:, :3] + jnp.tanh(x @ p["a"][:, 3:]),
        {"a": (6, 6)},
    ),
    "stacked": (lambda p, x: jnp.tanh(x @ jnp.stack([p["a"], p["b"]])), {"a": (6, 4), "b": (6, 4)}),
    "permuted_and_scaled": (
        lambda p, x: x @ (0.5 * p["a"][:, np.array([2, 0, 1])]) / 3.0,
        {"a": (6, 3)},
    ),
    "in_bfloat16": (
        lambda p, x: x.astype(jnp.bfloat16) @ p["a"].astype(jnp.bfloat16),
        {"a": (6, 4)},
    ),
    "scaled_in_bfloat16": (
        lambda p, x: x.astype(jnp.bfloat16) @ (p["a"].astype(jnp.bfloat16) * 0.3),
        {"a": (6, 4)},
    ),
    "scaled_by_an_argument": (
        lambda p, x: x @ jax.jit(lambda w, c: w * c)(p["a"], 0.3),
        {"a": (6, 4)},
    ),
    "experts": (
        lambda p, x: jnp.einsum("enh,eho->no", jnp.einsum("ni,eih->enh", x, p["a"]), p["b"]),
        {"a": (3, 6, 4), "b": (3, 4, 2)},
    ),
    "ragged": (
        lambda p, x: lax.ragged_dot(x, p["a"], jnp.array([2, 0, 3])),
        {"a": (3, 6, 4)},
    ),
    "convolution": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(5, 1, 3, 2),
            p["a"],
            (1, 2),
            "SAME",
            rhs_dilation=(1, 1),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        {"a": (1, 2, 2, 4)},
    ),
    "channels_first": (
        lambda p, x: lax.conv_general_dilated(x.reshape(5, 2, 3), p["a"], (1,), "SAME"),
        {"a": (4, 2, 3)},
    ),
    "depthwise": (
        lambda p, x: lax.conv_general_dilated(
            x.reshape(5, 3, 2),
            p["a"],
            (1,),
            [(1, 0)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        ),
        {"a": (2, 1, 4)},
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_product_is_seen_as_one(name):
    fn, shapes = SPELLINGS[name]
    half = 1e-2 if "in_bfloat16" in name else 2e-5
    got = assert_walks_exactly(fn, weights(**shapes), X, tolerance=half)
    assert set(got.seen()) == set(shapes) and not got.found.reasons


# Loops


def test_layers_of_a_scan_are_visited_one_after_another():
    params = weights(w=(3, 6, 6), o=(6, 2))

    def net(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0] @ p["o"]

    got = assert_walks_exactly(net, params, X)
    layers = [v.weight.view.parts[0].layer for v in got.visits]
    assert layers == [(0,), (1,), (2,), ()]


def test_layers_that_a_loop_reads_by_its_counter_are_as_well():
    params = weights(w=(3, 6, 6))
    net = lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x)
    assert assert_walks_exactly(net, params, X).seen() == {"w": 3}


def test_a_scan_backwards_goes_through_its_layers_backwards():
    params = weights(w=(3, 6, 6))
    net = lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, p["w"], reverse=True)
    got = assert_walks_exactly(net, params, X)
    assert [v.weight.view.parts[0].layer for v in got.visits] == [(2,), (1,), (0,)]


def test_layers_may_be_given_keys_of_random_numbers():
    keys = jax.random.split(jax.random.key(0), 3)

    def net(p, x):
        def layer(h, both):
            w, key = both
            return jnp.tanh(h @ w) * jax.random.bernoulli(key, 0.5, h.shape), None

        return lax.scan(layer, x, (p["w"], keys))[0]

    assert assert_walks_exactly(net, weights(w=(3, 6, 6)), X).seen() == {"w": 3}


def test_layers_around_a_weight_that_all_of_them_share_are_seen_in_one_stretch():
    params = weights(w=(3, 6, 6), s=(6, 6), o=(6, 2))

    def net(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w) @ p["s"], None), x, p["w"])[0] @ p["o"]

    assert assert_walks_exactly(net, params, X).seen() == {"w": 3, "s": 1, "o": 1}


def test_what_is_written_to_goes_from_stretch_to_stretch():
    def net(p, x):
        kept = jax.new_ref(x)
        kept[...] = jnp.tanh(x @ p["a"]) @ p["b"]
        return kept[...] @ p["c"]

    params = weights(a=(6, 4), b=(4, 6), c=(6, 2))
    assert assert_walks_exactly(net, params, X).seen() == {"a": 1, "b": 1, "c": 1}


def recurrence(p, x):
    step = lambda h, x: (jnp.tanh(h @ p["h"] + x @ p["x"]), h)
    return lax.scan(step, jnp.zeros((2, 4)), x)[0]


def test_a_loop_over_time_is_seen_whole():
    params, x = weights(h=(4, 4), x=(6, 4)), normal(3, 7, 2, 6)
    got = assert_walks_exactly(recurrence, params, x)
    hs = [np.zeros((2, 4))]
    for t in range(7):
        hs.append(np.tanh(hs[-1] @ params["h"] + x[t] @ params["x"]))
    seen = {got.paths[v.weight.view.parts[0].leaf]: v.sums for v in got.visits}
    rows = np.concatenate(hs[:-1])
    np.testing.assert_allclose(seen["h"], 2 * rows.T @ rows, rtol=1e-4, atol=1e-5)
    rows = np.asarray(x).reshape(14, 6)
    np.testing.assert_allclose(seen["x"], 2 * rows.T @ rows, rtol=1e-5)


LOOPS = {
    "while": lambda p, x: lax.while_loop(
        lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["w"])), (x.sum() * 0, x)
    )[1],
    "loop_in_a_loop": lambda p, x: lax.scan(
        lambda h, t: (lax.fori_loop(0, 2, lambda _, g: jnp.tanh(g @ p["w"]), h) + t, None),
        x,
        jnp.arange(3.0).reshape(3, 1, 1),
    )[0],
    "branches": lambda p, x: lax.cond(
        x.sum() > 0, lambda: jnp.tanh(x @ p["w"]), lambda: x @ p["w"] + 1.0
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_what_is_used_in_every_round_is_one_weight(name):
    got = assert_walks_exactly(LOOPS[name], weights(w=(6, 6)), X)
    assert got.seen() == {"w": 1}


def test_layers_inside_of_a_loop_over_time_are_weights_of_their_own():
    def net(p, x):
        layers = lambda h: lax.scan(lambda g, w: (jnp.tanh(g @ w), None), h, p["w"])[0]
        return lax.scan(lambda h, t: (layers(h) + t, None), x, jnp.ones((3, 1, 1)))[0]

    assert assert_walks_exactly(net, weights(w=(2, 6, 6)), X).seen() == {"w": 2}


def test_only_the_branch_that_is_taken_counts():
    net = lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: x @ p["b"])
    positive = walked(net, weights(a=(6, 4), b=(6, 4)), (jnp.abs(X),))
    seen = {positive.paths[v.weight.view.parts[0].leaf]: v.sums for v in positive.visits}
    assert np.abs(seen["a"]).sum() > 0 and np.abs(seen["b"]).sum() == 0


def test_a_shared_weight_is_seen_whole_before_it_changes():
    params = weights(w=(6, 6))
    net = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"]
    (visit,) = walked(net, params, (X,)).visits
    h = np.tanh(np.asarray(X) @ params["w"])
    np.testing.assert_allclose(visit.sums, X.T @ X + h.T @ h, rtol=1e-4, atol=1e-5)
    # Once it is zero, so is what the second place sees, and the walk has gone back for that.
    gone = walked(
        net, params, (X,), visit=lambda v: (0 * v.matrix, jnp.zeros(v.matrix.shape, bool))
    )
    assert not np.asarray(gone.outputs[0][0]).any()


def test_later_weights_see_what_earlier_ones_have_become():
    params = weights(a=(6, 8), b=(8, 4))
    net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    got = walked(net, params, (X,), visit=lambda v: (v.matrix * 2, jnp.ones(v.matrix.shape, bool)))
    h = np.tanh(np.asarray(X) @ (2 * params["a"]))
    np.testing.assert_allclose(got.visits[1].sums, h.T @ h, rtol=1e-4, atol=1e-5)


def test_weights_that_meet_the_same_data_share_a_stop_and_a_gram_matrix():
    net = lambda p, x: jnp.tanh(x @ p["q"]) + x @ p["k"]
    got = walked(net, weights(q=(6, 4), k=(6, 4)), (X,))
    assert got.visits[0].sums is got.visits[1].sums


def test_programs_are_as_many_as_there_are_forms_of_stretches():
    def net(p, x):
        for w in p["layers"]:
            x = x + jnp.tanh(x @ w["up"]) @ w["down"]
        return x

    def programs(n):
        layers = [weights(up=(6, 8), down=(8, 6)) for _ in range(n)]
        return len(walked(net, {"layers": layers}, (X,)).walk.compiled)

    assert programs(3) == programs(6)


# Left alone


LEFT = {
    "looked up, too": (lambda p, x: p["w"][jnp.argsort(x[:, 0])] @ (x @ p["w"]).T, "gather"),
    "in a norm": (lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"])), "div"),
    "rounded": (lambda p, x: x @ jnp.round(p["w"]), "round"),
    "both ways": (lambda p, x: (x @ p["w"]) @ p["w"].T, "different ways"),
    "along both axes": (lambda p, x: (p["w"] @ (x @ p["w"]).T).T, "different axes"),
    "overlapping": (lambda p, x: x @ p["w"][:, :4] + x @ p["w"][:, 2:], "different ways"),
    "repeated": (lambda p, x: x @ jnp.concatenate([p["w"], p["w"]], 1), "repeated|different ways"),
    "masked": (lambda p, x: x @ (p["w"] * np.eye(6, dtype=np.float32)), "mul"),
    "given back": (lambda p, x: (x @ p["w"], p["w"]), "given back"),
    "complex": (lambda p, x: jnp.abs(lax.dot(x * 1j, p["w"] + 0j)), "no data"),
    "with complex data": (lambda p, x: jnp.abs((x * 1j) @ p["w"]), "no data"),
    "in a loop without data": (
        lambda p, x: x + lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), jnp.ones((1, 6))),
        "no data",
    ),
    "in a loop without data, too": (
        lambda p, x: (
            x @ p["w"] + lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), jnp.ones((1, 6)))
        ),
        "scan",
    ),
    "too small to be written back": (
        lambda p, x: x.astype(jnp.float16) @ (p["w"].astype(jnp.float16) * 1e-4),
        "put between",
    ),
    "a kernel of two groupings": (
        lambda p, x: sum(
            lax.conv_general_dilated(
                x[:, : 3 * n, None], p["w"][:, :3, None], (1,), "SAME", feature_group_count=n
            ).sum()
            for n in (1, 2)
        ),
        "different axes",
    ),
    "no data": (lambda p, x: x.sum() * (jnp.ones((2, 6)) @ p["w"]), "no data"),
    "in a test": (
        lambda p, x: lax.while_loop(lambda h: (h @ p["w"]).sum() < 1, lambda h: h + 1.0, x),
        "while",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_could_not_be_exact_is_left_alone_with_the_reason(name):
    fn, why = LEFT[name]
    _, found, paths = planned(fn, weights(w=(6, 6)), X)
    assert not found.weights and re.search(why, found.reasons[paths.index("w")])


def test_what_has_effects_is_not_run_twice():
    calls = []

    def net(p, x):
        h = jnp.tanh(x @ p["w"])
        jax.debug.callback(lambda h: calls.append(1), h)
        return jnp.tanh(h @ p["w"]) @ p["v"]

    got = walked(net, weights(w=(6, 6), v=(6, 2)), (X,), (X,))
    jax.effects_barrier()
    assert len(calls) == 2 and got.seen() == {"v": 1}
    assert "has effects" in got.reason("w")


def test_what_is_read_is_kept_only_as_long_as_it_is_read():
    def net(p, x):
        for i in range(4):
            x = jnp.tanh(x @ p["w"][i])
        return x

    kept = []
    line, found, _ = planned(net, weights(w=(4, 6, 6)), X)
    walk = walk_of(line, [weights(w=(4, 6, 6))["w"]], [[X]])
    calibrate(
        walk,
        stops_of(found.weights),
        lambda at: kept.append(len(walk.worlds[0].flows)),
    )
    assert kept == [1, 1, 1, 1]


def test_forms_tell_numbers_and_arrays_apart():
    assert form_of(1) != form_of(1.0) and form_of(True) != form_of(1)
    assert form_of(np.arange(3)) == form_of(np.arange(3)) != form_of(np.arange(3.0))
    one, other = (jax.make_jaxpr(lambda x, c=c: x * c)(1.0) for c in (2.0, 3.0))
    again = jax.make_jaxpr(lambda y: y * 2.0)(1.0)
    assert form_of(one) == form_of(again) != form_of(other)


def test_forms_tell_signs_dtypes_and_weak_types_apart():
    def forms(*functions):
        return {form_of(jax.make_jaxpr(f)(1.0)) for f in functions}

    assert len({form_of(0.0), form_of(-0.0), form_of(0j), form_of(-0j)}) == 4
    assert form_of(jnp.float8_e5m2(1).dtype.type(1)) != form_of(jnp.float8_e4m3fn(1).dtype.type(1))
    filled = [lambda x, d=d: x + jnp.full(3, 0, d).sum() for d in (jnp.bfloat16, jnp.float16)]
    signed = [lambda x, c=c: jax.jit(jnp.copysign)(x, c) for c in (0.0, -0.0)]
    assert len(forms(*filled)) == len(forms(*signed)) == 2


def test_zeros_of_two_signs_are_two_constants():
    net = lambda p, x: jax.jit(jnp.copysign)(x @ p["a"], 0.0) + jax.jit(jnp.copysign)(x, -0.0)
    got = assert_walks_exactly(net, weights(a=(6, 6)), X)
    assert got.seen() == {"a": 1}


def test_the_dense_world_keeps_its_biases():
    params = weights(a=(6, 8), b=(8, 4), c=(4,))
    net = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] + p["c"][None]
    line, found, _ = planned(net, params, X)
    leaves = jax.tree.leaves(params)
    walk = walk_of(line, leaves, [[X]], dense=leaves, outputs=True)

    def visit(at):
        if (bias := bias_of(line, at.weight.places[0])) is not None:
            walk.shift(bias, jnp.ones(4))

    calibrate(walk, stops_of(found.weights), visit)
    for world, more in zip(walk.worlds, (1.0, 0.0), strict=True):
        walk.run(walk.start, len(line.steps), world)
        out = walk.read(world, line.outs[0], 0)
        np.testing.assert_allclose(out, net(params, X) + more, rtol=1e-5, atol=1e-5)


def test_whole_numbers_go_through_half_precision_unharmed():
    number = np.arange(6 * 400).reshape(6, 400)
    for dtype, scale in ((jnp.float32, 1.0), (jnp.bfloat16, -0.3), (jnp.float16, 0.05)):
        view = View((Part(0),)).then("", lambda w, d=dtype, c=scale: (w.astype(d) * c).T)
        read = view.read_numbers([number], [jnp.float32])
        np.testing.assert_array_equal(read, number.T)
        like = jax.ShapeDtypeStruct(number.shape, jnp.float32)
        (written,) = view.scatter_numbers([like], jnp.asarray(number.T))
        assert written.shown.all()
        np.testing.assert_array_equal(written.values[0], number)


def test_a_place_without_rows_of_its_own_counts_none():
    params, x = weights(h=(4, 4), x=(6, 4)), normal(3, 7, 2, 6)
    got = walked(recurrence, params, (x,))
    assert [got.walk.rows(v.weight) for v in got.visits] == [None, None]
    got = walked(lambda p, x: x @ p["w"], weights(w=(6, 2)), (X,), (X,))
    assert [got.walk.rows(v.weight) for v in got.visits] == [10]
