"""A network on numbers that JAX does not know: fractions, NumPy's floats, da4ml's variables."""

import dataclasses
from decimal import Decimal
from fractions import Fraction

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp


def fractions(rng, shape):
    """Fractions that no float holds."""
    numbers = [Fraction(int(n), 7) for n in rng.integers(-20, 20, int(np.prod(shape)))]
    return np.array(numbers, dtype=object).reshape(shape)


def weights(*shape, seed=0):
    """Multiples of 1 / 16."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-16, 17, shape) / 16, jnp.float32)


def scanned(params, x):
    def layer(x, w):
        return jax.nn.relu(x @ w), x.sum()

    return lax.scan(layer, x, params["layers"], reverse=True)


# Functions of params and inputs, with the shapes of both, whose values no float rounds.
FUNCTIONS = {
    "dense": (lambda w, x: jax.nn.relu(x @ w + 0.5), [(4, 3)], [(2, 4)]),
    "weights first": (lambda w, x: w @ x, [(4, 3)], [(3, 2)]),
    "einsum": (lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), [(2, 3, 4)], [(2, 2, 2, 3)]),
    "batched": (lambda w, x: jnp.einsum("gbk,gkd->bgd", x, w), [(2, 3, 4)], [(2, 2, 3)]),
    "of inputs": (lambda w, x, y: (x * w) @ y.T, [(3,)], [(2, 3), (4, 3)]),
    "jit": (jax.jit(lambda w, x: -jnp.abs(x - w)), [(3,)], [(2, 3)]),
    "remat": (jax.checkpoint(lambda w, x: (x * w) ** 2), [(3,)], [(2, 3)]),
    "powers": (lambda w, x: lax.square(x) + x**3 * w, [(3,)], [(2, 3)]),
    "division": (lambda w, x: (x / 4 + w).mean(1), [(4,)], [(2, 4)]),
    "where": (lambda w, x: jnp.where((x > w) & ~(x == 1), x, 2 * w), [(3,)], [(2, 3)]),
    "constant first": (lambda w, x: jnp.where(w <= x, 1.0, x), [(3,)], [(2, 3)]),
    "choices": (lambda w, x: jnp.where(w > 0, x, w), [(3,)], [(2, 3)]),
    "leaky": (lambda w, x: jax.nn.leaky_relu(x * w, 0.25), [(3,)], [(2, 3)]),
    "clip": (lambda w, x: jnp.clip(x * w, -1, 1) + jax.nn.relu6(x), [(3,)], [(2, 3)]),
    "extremes": (lambda w, x: (x * w).max(0) - x.min() + jnp.max(x), [(3,)], [(2, 3)]),
    "casts": (lambda w, x: (x > 0).astype(jnp.float32) * w, [(3,)], [(2, 3)]),
    "moves": (
        lambda w, x: [x[:, 1] * w, x[::-1, ..., :2].T, jnp.pad(x, ((1, 0), (0, 2))), x[:, [2, 0]]],
        [()],
        [(2, 3)],
    ),
    "joins": (
        lambda w, x: jnp.split(jnp.concatenate([x, w[None], x[:, None].squeeze(1)]), 5),
        [(3,)],
        [(2, 3)],
    ),
    "updates": (lambda w, x: x.at[0:1].set(w), [(1, 3)], [(2, 3)]),
    "slices": (lambda w, x: lax.dynamic_slice(x, (1, 0), (1, 2)) * w, [(2,)], [(2, 3)]),
    "no input": (lambda w, x: {"x": x, "w": jnp.exp(w * 0)}, [(2,)], [(2, 3)]),
    "max pool": (lambda w, x: nn.max_pool(x * w, (2, 2), (2, 1)), [(2,)], [(1, 4, 3, 2)]),
    "mean pool": (
        lambda w, x: nn.avg_pool(x * w, (2, 2), (2, 1), "SAME", count_include_pad=True),
        [(2,)],
        [(1, 3, 3, 2)],
    ),
}
CONVOLUTIONS = {
    "same": {"padding": "SAME"},
    "strides": {"window_strides": (2, 1), "padding": "VALID"},
    "dilated": {"rhs_dilation": (1, 2), "padding": ((1, 0), (2, 3))},
    "transposed": {"lhs_dilation": (2, 3), "padding": ((1, 1), (-1, 2))},
    "groups": {"feature_group_count": 2, "padding": "SAME"},
}


def assert_same(given, wanted):
    """Exactly equal trees, the first of numbers of any kind."""
    assert jax.tree.structure(given) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replay_on_floats_of_numpy_is_what_jax_computes(name):
    fn, (shape,), shapes = FUNCTIONS[name]
    xs = [np.asarray(weights(*s, seed=i + 1), np.float64) for i, s in enumerate(shapes)]
    with jax.numpy_rank_promotion("allow"):
        wanted = fn(weights(*shape), *map(jnp.float32, xs))
        assert_same(jp.export.replay(fn, weights(*shape), *xs), wanted)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NWHC")])
def test_replay_convolves_like_jax(name, layout):
    settings = {"window_strides": (1, 1), **CONVOLUTIONS[name], "dimension_numbers": layout}
    groups = settings.get("feature_group_count", 1)
    image = tuple({"N": 2, "H": 5, "W": 6, "C": 4}[c] for c in layout[0])
    kernel = tuple({"O": 6, "I": 4 // groups, "H": 3, "W": 2}[c] for c in layout[1])
    x, w = weights(*image, seed=1), weights(*kernel)
    wanted = lax.conv_general_dilated(x, w, **settings)
    found = jp.export.replay(
        lambda w, x: lax.conv_general_dilated(x, w, **settings), w, np.asarray(x, np.float64)
    )
    assert_same(found, wanted)


def test_replay_is_exact_on_fractions_that_no_float_holds():
    rng = np.random.default_rng(0)
    params = {"in": weights(4, 5), "bias": weights(5, seed=1), "out": weights(5, 3, seed=2)}
    x = fractions(rng, (2, 4))

    def fn(p, x):
        return jax.nn.relu(x @ p["in"] + p["bias"][None]) @ p["out"]

    found = jp.export.replay(fn, params, x, number=Fraction)
    assert all(type(entry) is Fraction for entry in found.ravel())
    arrays = {k: np.vectorize(Fraction, otypes=[object])(np.float64(v)) for k, v in params.items()}
    hidden = np.maximum(x @ arrays["in"] + arrays["bias"], 0)
    assert (found == hidden @ arrays["out"]).all()
    wide = {k: np.float64(v) for k, v in params.items()}
    floats = np.maximum(np.float64(x) @ wide["in"] + wide["bias"], 0) @ wide["out"]
    np.testing.assert_allclose(np.float64(found), floats, rtol=1e-14)


X = np.array([[1.0, 2.0, -3.0]])
SMALL = {"uint8": np.array([[200, 100, 7]], np.uint8), "int8": np.array([[100, 99, -100]], np.int8)}


@pytest.mark.parametrize(
    "fn",
    [
        lambda _, x: (x > 0).astype(jnp.float32) + (x > -4).astype(jnp.float32),
        lambda _, x: (x > 0).astype(jnp.float32) @ (x > 0).astype(jnp.float32).T,
        lambda _, x: -(x > 0).astype(jnp.float32),
        lambda _, x: (x > 0).sum() + (x > -4).sum(),
        lambda _, x: (x > 0).astype(jnp.int8) * 100 + (x > 0).astype(jnp.int8) * 100,
        lambda _, x: jnp.where(x > 0, 3, -4).astype(jnp.uint32),
    ],
)
@pytest.mark.parametrize("number", [None, Fraction])
def test_bools_of_numpy_are_numbers_where_jax_has_numbers(fn, number):
    x = X if number is None else np.vectorize(Fraction, otypes=[object])(X)
    wanted = fn(0, jnp.float32(X))
    found = jp.export.replay(fn, jnp.ones(()), x, number=number)
    assert_same(found, wanted)
    if number is None or wanted.dtype != jnp.float32:
        assert found.dtype == {"float32": "float64"}.get(wanted.dtype.name, wanted.dtype.name)
    else:
        assert all(type(entry) is Fraction for entry in found.ravel())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "fn",
    [
        lambda _, x: x.astype(jnp.float32) ** 2,
        lambda _, x: -x.astype(jnp.float32),
        lambda _, x: jnp.dot(x, x.T),
        lambda _, x: jnp.dot(x, x.T, preferred_element_type=jnp.int32),
        lambda _, x: lax.dot(x, x.T, preferred_element_type=jnp.float32),
        lambda _, x: lax.conv(x[None], x[None], (1,), "SAME", preferred_element_type=jnp.int32),
        lambda _, x: x + x,
        lambda _, x: x * 3 + 1,
        lambda _, x: jnp.pad(x, ((0, 0), (1, 1))) * 2,
        lambda _, x: lax.reduce_sum_p.bind(x, axes=(1,), out_sharding=None),
        lambda _, x: x.astype(jnp.uint8).astype(jnp.int32),
        lambda _, x: x.astype(jnp.int8).astype(jnp.int32),
        lambda _, x: (x.astype(jnp.int32) - 300).astype(jnp.uint32),
        lambda _, x: (x.astype(jnp.int32) * 3).astype(jnp.int8),
    ],
)
def test_integers_of_numpy_wrap_as_those_of_jax(fn, name):
    wanted = fn(0, jnp.asarray(SMALL[name]))
    found = jp.export.replay(fn, jnp.ones(()), SMALL[name])
    assert_same(found, wanted)
    assert wanted.dtype == jnp.float32 or found.dtype == wanted.dtype


def test_narrow_floats_of_numpy_are_computed_as_wide_ones():
    x = np.array([300.0], np.float16)
    assert jp.export.replay(lambda w, x: x * x * w, jnp.ones(1), x) == [90000]


@pytest.mark.parametrize("number", [Fraction, Decimal])
def test_what_a_rule_needs_beside_its_operands_is_of_the_kind_of_the_numbers(number):
    x = np.array([[[number(1) / number(4)], [number(3)]]], dtype=object)

    def fn(w, x):
        y = lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return y, x**-1, x.max() * 2 + x**-2

    found = jp.export.replay(fn, weights(3, 1, 2), x, number=number)
    assert_same(found, fn(weights(3, 1, 2), jnp.float32(np.float64(x)))[:1] + found[1:])
    assert found[1][0, 0, 0] == 4 and found[2][0, 0, 0] == 22
    assert found[1][0, 1, 0] == number(1) / number(3)
    assert all(type(entry) is number for each in found for entry in each.ravel())


def test_replay_runs_the_layers_of_a_scan_one_by_one():
    params, x = {"layers": weights(3, 4, 4)}, np.asarray(weights(2, 4, seed=1), np.float64)
    assert_same(jp.export.replay(scanned, params, x), scanned(params, jnp.float32(x)))


def test_replay_of_a_flax_network_with_its_masks_is_the_network():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.relu(nn.Conv(4, (3, 3), strides=2)(images))
            x = nn.relu(nn.Dense(8)(nn.max_pool(x, (2, 2)).reshape(len(x), -1)))
            return nn.Dense(3)(x)

    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1))
    params = Net().init(jax.random.key(0), images)
    params = jp.apply_masks(params, jp.find_masks(params, 0.5))
    found = jp.export.replay(Net().apply, params, images)
    np.testing.assert_allclose(found, Net().apply(params, images), atol=1e-5)


def test_replay_takes_small_and_sparse_functions():
    params, x = {"in": weights(8, 16), "out": weights(16, 4, seed=1)}, weights(3, 8, seed=2)
    fn = lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"]
    groups = jp.find_groups(fn, params, x)
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    small = jp.shrink(fn, params, masks)
    pattern, scope = jp.patterns.Blocks((4, 4)), jp.scopes.per_output
    masks = jp.find_masks(params, 0.5, pattern=pattern, scope=scope)
    sparse = jp.compact(fn, params, masks, only=".*")
    for made, arrays in (small, sparse):
        assert_same(jp.export.replay(made, arrays, np.float64(x)), made(arrays, x))


def test_replay_quantizes_weights_as_jax_does():
    w = jax.random.normal(jax.random.key(0), (4, 3))
    fn = lambda w, x: x @ (jnp.round(w / 0.3) * 0.3)
    found = jp.export.replay(fn, w, np.eye(4))
    assert (found.astype(np.float32) == fn(w, jnp.eye(4))).all()


def test_rules_stand_for_primitives_and_for_jitted_functions():
    @jax.jit
    def halve(x):
        return jnp.floor(jnp.exp(x))

    x, seen = np.arange(3.0), []

    def rule(x, **params):
        seen.append(params["name"])
        return x / 2

    def fn(w, x):
        return halve(jnp.tanh(x)) * w

    found = jp.export.replay(fn, jnp.array(2.0), x, rules={"tanh": lambda x, **_: x, "halve": rule})
    assert found.tolist() == [0, 1, 2] and seen == ["halve"]


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda w, x: jnp.exp(x) * w, r"`exp` \(float32 to float32\) at test_replay.py:\d+"),
        (lambda w, x: jnp.tanh(x) + jnp.sin(w + x), r"`tanh`.*test_replay.* `sin`.*'tanh': lambda"),
        (lambda w, x: x.astype(jnp.int32), r"`convert_element_type` \(float32 to int32\)"),
        (lambda w, x: x.astype(jnp.float8_e4m3fn), r"\(float32 to float8_e4m3fn\)"),
        (lambda w, x: (x > 0).astype(jnp.int8).astype(jnp.uint8), r"\(int8 to uint8\)"),
        (lambda w, x: (x > 0).astype(jnp.int8).astype(jnp.uint32), r"\(int8 to uint32\)"),
        (lambda w, x: (x > 0).astype(jnp.uint8).astype(jnp.int8), r"\(uint8 to int8\)"),
        (lambda w, x: (x > 0).astype(jnp.int8).astype(jnp.float8_e4m3fn), r"\(int8 to float8"),
        (lambda w, x: (x > 0).sum() // 2, r"`div` \(int32, int32 to int32\)"),
        (lambda w, x: w[(x > 0).astype(jnp.int32)], r"`gather`"),
        (lambda w, x: lax.cond(x[0] > 0, lambda: x, lambda: -x), "`cond`"),
        (lambda w, x: lax.scan(lambda c, _: (jnp.exp(c), c), x, length=3), "`exp`"),
        (lambda w, x: nn.max_pool(x[None, :, None], (2,), padding="SAME"), "`reduce_window_max`"),
    ],
)
def test_replay_names_what_has_no_rule_and_its_line(fn, words):
    calls = []
    x = dataclasses.make_dataclass("Spy", [])
    x.shape, x.__array_ufunc__ = (3,), lambda *a, **k: calls.append(a)
    with pytest.raises(NotImplementedError, match=f"(?s){words}.*keep that part out of `fn`"):
        jp.export.replay(fn, jnp.ones(3), x)
    assert not calls  # nothing was computed before


def test_replay_refuses_what_it_cannot_trace_or_read():
    w, x = jnp.ones((3, 2)), np.ones((2, 3))
    fn = lambda w, x: x @ w
    with pytest.raises(TypeError, match=r"the other way round.*`export.replay\(fn, params, \*inpu"):
        jp.export.replay(lambda p, x: x @ p["w"], x, {"w": w})
    with pytest.raises(TypeError, match=r"no function.*`export.replay.fn, params"):
        jp.export.replay(w, fn, x)
    with pytest.raises(TypeError, match=r"type `float` as input 0, which has no shape.*asarray"):
        jp.export.replay(fn, w, 1.0)
    with pytest.raises(TypeError, match="masks as input 0"):
        jp.export.replay(lambda p, m: p, {"w": w}, {"w": w > 0})
    with pytest.raises(TypeError, match=r"'w' is traced.*outside of `jit`"):
        jax.jit(lambda p: jp.export.replay(lambda p, x: x @ p["w"], p, x))({"w": w})
    with pytest.raises(TypeError, match=r"no function for 'exp'"):
        jp.export.replay(fn, w, x, rules={"exp": 1})
    with pytest.raises(ValueError, match=r"got \(2, 3\) from the rule of `dot_general`.*\(2, 2\)"):
        jp.export.replay(fn, w, x, rules={"dot_general": lambda x, w, **_: x})
    with pytest.raises(ValueError, match=r"one for 'dot', but.* only into 'dot_general'.*jax.jit"):
        jp.export.replay(fn, w, x, rules={"dot": lambda x, w, **_: x})
    with pytest.raises(ValueError, match="`gather` that reads outside"):
        jp.export.replay(lambda w, x: x.at[jnp.array([5])].get(mode="fill"), w, x)


def test_flags_are_held_fixed():
    def fn(w, x, train, options):
        return x * w if train or options["mode"] == "double" else x

    w, x = jnp.array(2.0), np.array([Fraction(1, 3)], dtype=object)
    run = lambda *flags: jp.export.replay(fn, w, x, *flags, number=Fraction)
    assert run(False, {"mode": "once", "rate": None}) == [Fraction(1, 3)]
    assert run(True, {"mode": "once"}) == run(False, {"mode": "double"}) == [Fraction(2, 3)]
    with pytest.raises(
        TypeError, match=r"`Fraction` as input 1 at '0', which has no shape.*asarray"
    ):
        jp.export.replay(lambda w, x, y: x, w, x, list(x))


def test_what_is_not_named_is_counted():
    functions = [
        *(jnp.exp, jnp.log, jnp.sin, jnp.cos, jnp.tanh, jnp.sinh, jnp.cosh, jnp.floor, jnp.ceil),
        *(jnp.arcsinh, jnp.arctanh, jnp.sqrt, jnp.cbrt, jnp.expm1, jnp.log1p),
    ]
    with pytest.raises(NotImplementedError, match=r"`exp`.*`sqrt` [^`]* and 3 more\. Pass one"):
        jp.export.replay(lambda w, x: [f(x) for f in functions], jnp.ones(1), np.ones(3))


@pytest.mark.parametrize(
    "fn",
    [
        lambda w, x: lax.scan(lambda c, row: (c + row, row @ w), x[0], x[1:1])[1],
        lambda w, x: lax.scan(lambda c, row: (c + row, row @ w), x[0], x[1:1])[0],
        lambda w, x: jnp.einsum("gbk,kd->gbd", x[:0, None], w),
        lambda w, x: jnp.einsum("gbk,gkd->gbd", x[:0, None], w[None][:0]),
        lambda w, x: x[:, :0] @ w[:0],
        lambda w, x: jnp.concatenate([jnp.exp(x[:0]), x]),
    ],
)
def test_arrays_without_entries_are_computed(fn):
    w, x = weights(3, 2), np.asarray(weights(2, 3, seed=1), np.float64)
    assert_same(jp.export.replay(fn, w, x), fn(w, jnp.float32(x)))
    exact = np.vectorize(Fraction, otypes=[object])(x)
    assert_same(jp.export.replay(fn, w, exact, number=Fraction), fn(w, jnp.float32(x)))


def network(params, x):
    x = jax.nn.relu(x @ params["in"] + params["bias"])
    return jnp.clip(x @ params["out"], -4, 4 - 1 / 64)


def variables(shape):
    trace = pytest.importorskip("da4ml.trace")
    ones = np.ones(shape, int)
    return trace.FixedVariableArray.from_kif(ones, 1 * ones, 5 * ones, hwconf=(-1, -1, -1))


PARAMS = {"in": weights(8, 6), "bias": weights(1, 6, seed=1), "out": weights(6, 4, seed=2)}


def test_replay_on_variables_of_da4ml_is_bit_exact():
    x = variables((1, 8))
    from da4ml.trace import comb_trace

    logic = comb_trace(x, jp.export.replay(network, PARAMS, x))
    data = np.random.default_rng(0).integers(-64, 64, (200, 8)) / 32
    assert (logic.predict(data) == np.asarray(network(PARAMS, jnp.float32(data)))).all()


def test_bools_of_da4ml_are_numbers_bit_exactly():
    x = variables((1, 4))
    from da4ml.trace import comb_trace

    def fn(w, x):
        above, below = (x > 0).astype(jnp.int8), x <= -0.5
        counted = (above * 100 + below.astype(jnp.int8)).astype(jnp.int32) * 2
        return counted.astype(jnp.float32) @ w + jnp.where(below, 3, -4).sum() + x.max()

    logic = comb_trace(x, jp.export.replay(fn, weights(4, 2), x))
    data = np.random.default_rng(0).integers(-64, 64, (50, 4)) / 32
    wanted = jax.vmap(lambda x: fn(weights(4, 2), x[None])[0])(jnp.float32(data))
    assert (logic.predict(data) == np.asarray(wanted)).all()


def test_replay_on_variables_of_da4ml_convolves_and_pools_bit_exactly():
    x = variables((1, 5, 5, 1))
    from da4ml.trace import comb_trace

    def fn(w, x):
        x = lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.where(~(nn.max_pool(x, (2, 2), (2, 2)) > 0.25), 0.5, x[:, :2, :2])

    logic = comb_trace(x, jp.export.replay(fn, weights(3, 3, 1, 2), x))
    data = np.random.default_rng(0).integers(-64, 64, (20, 5, 5, 1)) / 32
    wanted = np.asarray(fn(weights(3, 3, 1, 2), jnp.float32(data))).reshape(20, -1)
    assert (logic.predict(data.reshape(20, -1)) == wanted).all()


MASKED = lambda w, x: jnp.where(w > 0, x, -jnp.inf).max(1)
ENDLESS = r"constant that is not finite in `select_n` .* at test_replay.py:\d+.*Overflow.*Mask with"


def test_a_constant_that_numbers_cannot_be_is_named_with_its_line():
    w, x = jnp.array([[1.0, 0.0]]), np.array([[Fraction(1, 3), Fraction(1)]], dtype=object)
    with pytest.raises(ValueError, match=ENDLESS):
        jp.export.replay(MASKED, w, x, number=Fraction)
    assert jp.export.replay(MASKED, w, x) == [Fraction(1, 3)]  # floats beside fractions
    assert jp.export.replay(MASKED, w, np.array([[1.0, 2.0]])) == [1]


def test_a_constant_that_hardware_cannot_hold_is_named_with_its_line():
    with pytest.raises(ValueError, match=ENDLESS):
        jp.export.replay(MASKED, jnp.array([[1.0, 0.0]]), variables((1, 2)))


def test_a_budget_in_adders_is_met():
    x = variables((1, 8))
    from da4ml.trace import comb_trace

    def adders(masks):
        masked = jp.apply_masks(PARAMS, masks)
        return comb_trace(x, jp.export.replay(network, masked, x)).cost

    def find(sparsity):
        return jp.find_masks(PARAMS, sparsity, where=jp.by_path("in|out"))

    dense = adders(find(0.0))
    masks = jp.masks_within_budget(find, adders, dense / 2)
    assert dense / 4 < adders(masks) <= dense / 2
    assert 0.2 < jp.sparsity(masks, PARAMS) < 0.8
