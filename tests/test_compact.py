"""Weights by their kept blocks: what is computed is what the masked network computes."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.test_util import check_grads

import jaxprune as jp
from jaxprune._tree import is_floating, leaves_with_path
from jaxprune.graph import _block_product
from jaxprune.graph._block_product import block_product, transposed_product
from tests.balanced import balanced_mask, balanced_masks
from tests.layout_models import MODELS
from tests.test_calibrate import drawn
from tests.zoo import ZOO

QUICK = ("straight_through", "resnext", "equinox_cnn", "llama", "scanned", "experts")
BLOCKS = jp.patterns.Blocks((4, 8), axes=("in", "out"))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mask(seed, *shape, block=(4, 8), share=0.5, roles=None):
    """A balanced mask of a weight `[layers..., in, out]`."""
    roles = roles or (*["layer"] * (len(shape) - 2), "in", "out")
    sizes = {shape[-2]: block[0], shape[-1]: block[1]}
    rng = np.random.default_rng(seed)
    return jnp.asarray(balanced_mask(shape, roles, rng, share=share, block=sizes.get))


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + jnp.broadcast_to(p["bias"], (*x.shape[:-1], 32))) @ p["down"]


@pytest.fixture(scope="module")
def small():
    params = {"up": normal(0, 16, 32), "bias": normal(1, 32), "down": normal(2, 32, 24)}
    masks = {"up": mask(3, 16, 32), "bias": None, "down": mask(4, 32, 24)}
    return params, masks, normal(5, 6, 16)


# What is computed


def assert_same(fn, params, masks, *inputs, within=1e-5):
    """Outputs, and gradients of the kept weights, equal those of the masked network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jp.PruneWarning)
        assert jp.verify_compact(fn, params, masks, *inputs, only=".*") <= within
        sparse_fn, sparse_params = jp.compact(fn, params, masks, only=".*")

        def loss(f):
            def of(p):
                outs = jax.tree.leaves(f(p, *inputs))
                return sum(jnp.sum(jnp.sin(x)) for x in outs if is_floating(x))

            return jax.grad(of, allow_int=True)

        got = jp.expand(loss(sparse_fn)(sparse_params), params, masks, only=".*")
    want = jp.apply_masks(loss(fn)(jp.apply_masks(params, masks)), masks)
    pairs = [
        (a, b)
        for (_, a), (_, b) in zip(leaves_with_path(want), leaves_with_path(got), strict=True)
        if is_floating(a) and a.size
    ]
    scale = max(float(jnp.max(jnp.abs(a))) for a, _ in pairs)
    assert max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs) <= within * scale


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)
def test_models_of_the_zoo_give_what_their_masked_networks_give(name):
    model = ZOO[name]()
    layout = jp.find_layout(model.fn, model.params, *model.inputs)
    masks = balanced_masks(model.params, layout)
    if not jax.tree.leaves(masks):
        pytest.skip("no weight has two axes that blocks divide")
    assert_same(model.fn, model.params, masks, *model.inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_table_of_layouts_do_so_too(name):
    if name == "while_by_data":
        pytest.skip("with half of its weights it never stops")
    model = MODELS[name]()
    params, inputs = drawn(model.params), drawn(model.inputs, 1)
    masks = balanced_masks(params, jp.find_layout(model.fn, params, *inputs))
    if not jax.tree.leaves(masks):
        pytest.skip("no weight has two axes that blocks divide")
    half = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(params) if hasattr(x, "dtype"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", jp.PruneWarning)
        error = jp.verify_compact(model.fn, params, masks, *inputs, only=".*")
    assert error <= (2e-2 if half else 1e-5)


@pytest.mark.parametrize("at_once", [1 << 21, 64])
def test_products_of_blocks_equal_a_slow_loop(monkeypatch, at_once):
    monkeypatch.setattr(_block_product, "_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    columns, kept, bi, bo, blocks, rows = 6, 2, 4, 8, 5, 3
    index = np.stack([np.sort(rng.choice(blocks, kept, replace=False)) for _ in range(columns)])
    parts = rng.normal(size=(columns, kept, bi, bo)).astype(np.float32)
    x = rng.normal(size=(rows, blocks * bi)).astype(np.float32)
    back = rng.normal(size=(rows, columns * bo)).astype(np.float32)
    y, z = np.zeros((rows, columns * bo)), np.zeros((rows, blocks * bi))
    for c in range(columns):
        for k in range(kept):
            ins, outs = (slice(i * n, i * n + n) for i, n in ((index[c, k], bi), (c, bo)))
            y[:, outs] += x[:, ins] @ parts[c, k]
            z[:, ins] += back[:, outs] @ parts[c, k].T
    np.testing.assert_allclose(block_product(x, parts, index), y, rtol=1e-5, atol=1e-5)
    got = transposed_product(back, parts, jnp.asarray(index), blocks * bi)
    np.testing.assert_allclose(got, z, rtol=1e-5, atol=1e-5)
    check_grads(lambda *a: block_product(*a, index), (x, parts), 2, rtol=1e-2)


SPELLINGS = {
    "bi,io->bo": (16, 32),
    "bi,io->ob": (16, 32),
    "io,bi->bo": (16, 32),
    "abi,io->abo": (16, 32),
    "bi,ihd->bhd": (16, 4, 8),
    "bhd,hdo->bo": (4, 8, 24),
    "bgi,gio->bgo": (3, 16, 32),
    "gbi,gio->gbo": (3, 16, 32),
    "bi,gio->bgo": (3, 16, 32),
    "bi,oi->bo": (32, 16),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_einsum_is_a_product_of_blocks_however_it_is_spelled(spelling):
    ins = spelling.split("->")[0]
    x_axes, w_axes = sorted(ins.split(","), key=lambda s: "b" not in s)
    shape = SPELLINGS[spelling]
    sizes = {**dict(zip(w_axes, shape, strict=True)), "b": 5, "a": 2}
    roles = tuple(
        "group" if a in "gh" and a + "d" != "hd" else "in" if a in x_axes else "out" for a in w_axes
    )
    if "h" in w_axes:
        roles = {"ihd": ("in", "out", "out"), "hdo": ("in", "in", "out")}[w_axes]
    x = normal(0, *(sizes[a] for a in x_axes))
    params = {"w": normal(1, *shape)}
    m = balanced_mask(
        shape, roles, np.random.default_rng(2), block=lambda n: 8 if n % 8 == 0 else 4
    )
    masks = {"w": jnp.asarray(m)}
    order = (lambda x, w: (w, x)) if ins.split(",")[0] == w_axes else (lambda x, w: (x, w))
    fn = lambda p, x: jnp.einsum(spelling, *order(x, p["w"]))
    assert_same(fn, params, masks, x)
    (row,) = jp.compact_plan(fn, params, masks, x, only=".*").rows
    assert row.products and not row.whole


MOVES = {
    "cast": (lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), (16, 32)),
    "scaled": (lambda w: w * 0.5 / 3, (16, 32)),
    "transposed twice": (
        lambda w: w.T.reshape(4, 8, 16).transpose(2, 0, 1).reshape(16, 32),
        (16, 32),
    ),
    "quantized": (lambda w: w + lax.stop_gradient(jnp.round(w * 4) / 4 - w), (16, 32)),
    "a layer": (lambda w: w[1], (3, 16, 32)),
    "a layer by a number": (
        lambda w: lax.dynamic_index_in_dim(w, jnp.int32(2), 0, False),
        (3, 16, 32),
    ),
    "half of its outputs": (lambda w: w[:, 8:24], (16, 32)),
    "two weights side by side": (lambda w: jnp.concatenate([w[0], w[1]], axis=-1), (2, 16, 32)),
    "jitted": (jax.jit(lambda w: w * 2), (16, 32)),
    "under remat": (jax.checkpoint(lambda w: w.T), (32, 16)),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_weight_that_is_moved_about_stays_in_blocks(move):
    f, shape = MOVES[move]
    params, masks = {"w": normal(0, *shape)}, {"w": mask(1, *shape)}
    fn = lambda p, x: jnp.tanh(x @ f(p["w"]))
    x = normal(2, 5, 16)
    assert_same(fn, params, masks, x, within=1e-2 if move == "cast" else 1e-5)
    (row,) = jp.compact_plan(fn, params, masks, x, only=".*").rows
    assert move == "under remat" or (row.products and not row.whole)


def test_layers_under_scan_and_loops_stay_in_blocks():
    params = {"layers": normal(0, 3, 16, 16), "shared": normal(1, 16, 16)}
    masks = {"layers": mask(2, 3, 16, 16, block=(4, 4)), "shared": mask(3, 16, 16, block=(4, 4))}

    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w @ p["shared"]), jnp.sum(x)

        x, sums = lax.scan(jax.checkpoint(layer), x, p["layers"])
        x = lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["layers"][i]), x)
        x = lax.while_loop(lambda x: jnp.sum(x) > 1e9, lambda x: x @ p["shared"], x)
        return lax.cond(jnp.sum(x) > 0, lambda x: x @ p["shared"], lambda x: x, x), sums

    x = normal(4, 5, 16)
    error = jp.verify_compact(fn, params, masks, x, only=".*")
    assert error <= 1e-5
    plan = jp.compact_plan(fn, params, masks, x, only=".*")
    assert all(row.products and not row.whole for row in plan.rows)


def test_the_program_does_not_grow_with_the_number_of_layers():
    def length(layers):
        params, masks = (
            {"w": normal(0, layers, 16, 16)},
            {"w": mask(1, layers, 16, 16, block=(4, 4))},
        )
        fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
        sparse_fn, sparse_params = jp.compact(fn, params, masks, only=".*")
        return len(jax.jit(sparse_fn).lower(sparse_params, normal(2, 5, 16)).as_text().splitlines())

    assert length(3) == length(12)


CONVOLUTIONS = {
    "3x3": {"padding": "SAME"},
    "strided": {"padding": "VALID", "window_strides": (2, 1)},
    "dilated": {"padding": ((2, 1), (0, 3)), "rhs_dilation": (1, 2)},
    "transposed": {"padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 1)},
    "cropped": {"padding": ((-1, 0), (0, -1))},
}


@pytest.mark.parametrize("order", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_multiply_patches_with_blocks(name, order):
    settings = {"window_strides": (1, 1), **CONVOLUTIONS[name]}
    roles = {"HWIO": ("window", "window", "in", "out"), "OIHW": ("out", "in", "window", "window")}
    sizes = dict(zip(order[0], (2, 7, 8, 8), strict=True)) | {"N": 2, "C": 8, "H": 7, "W": 8}
    shape = tuple({"H": 3, "W": 2, "I": 8, "O": 12}[a] for a in order[1])
    x, params = normal(0, *(sizes[a] for a in order[0])), {"w": normal(1, *shape)}
    m = balanced_mask(
        shape, roles[order[1]], np.random.default_rng(2), share=0.3, block=lambda n: 4
    )

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], dimension_numbers=order, **settings)

    assert_same(fn, params, {"w": jnp.asarray(m)}, x)
    (row,) = jp.compact_plan(fn, params, {"w": jnp.asarray(m)}, x, only="w").rows
    assert row.products[0].startswith("conv")


def test_what_also_reads_a_weight_gets_it_whole_and_that_is_said(small):
    params, masks, x = small
    fn = lambda p, x: mlp(p, x) + jnp.sum(p["up"] ** 2)
    sparse_fn, sparse_params = jp.compact(fn, params, masks, only=".*")
    with pytest.warns(
        jp.PruneWarning, match=r"'up': `(square|integer_pow|mul)` at test_compact.py"
    ):
        got = sparse_fn(sparse_params, x)
    np.testing.assert_allclose(got, fn(jp.apply_masks(params, masks), x), rtol=1e-5)
    plan = jp.compact_plan(fn, params, masks, x, only=".*")
    assert "made whole: 'up'" in str(plan) and plan.rows[0].products
    with pytest.warns(jp.PruneWarning, match="the result, as it is, reads it"):
        jp.verify_compact(lambda p, x: (mlp(p, x), p["up"]), params, masks, x, only=".*")


def test_it_lives_in_jit_grad_vmap_scan_donation_and_export(small):
    params, masks, x = small
    sparse_fn, sparse_params = jp.compact(mlp, params, masks, only=".*")
    want = mlp(jp.apply_masks(params, masks), x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(jax.jit(sparse_fn)(sparse_params, x), want)
    members = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), sparse_params)
    close(jax.vmap(sparse_fn, (0, None))(members, x)[0], want)
    close(jax.vmap(sparse_fn, (None, 0))(sparse_params, x[:, None])[:, 0], want)
    _, ys = lax.scan(lambda c, row: (c, sparse_fn(sparse_params, row[None])[0]), 0, x)
    close(ys, want)
    loss = lambda f: lambda p: jnp.sum(jnp.tanh(0.1 * f(p, x)))
    hessian = lambda f, p: jax.jvp(jax.grad(loss(f)), (p,), (p,))[1]
    got = jp.expand(hessian(sparse_fn, sparse_params), params, masks, only=".*")
    dense = jp.apply_masks(params, masks)
    jax.tree.map(close, got, jp.apply_masks(hessian(mlp, dense), masks))
    (rows,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    exported = jax.export.export(jax.jit(sparse_fn))(sparse_params, spec)
    close(jax.export.deserialize(exported.serialize()).call(sparse_params, x), want)
    step = jax.jit(lambda p: jax.tree.map(lambda a: 0.5 * a, p), donate_argnums=0)
    assert sparse_fn(step(jax.tree.map(jnp.copy, sparse_params)), x).shape == want.shape


def test_an_index_of_a_layer_is_clamped_as_the_program_clamps_it():
    params, masks = {"w": normal(0, 3, 16, 16)}, {"w": mask(1, 3, 16, 16, block=(4, 4))}
    x = normal(2, 5, 16)

    def clamped(p, x, i):
        w = lax.dynamic_slice(p["w"], (i, 0, 0), (1, 16, 16), allow_negative_indices=False)
        return x @ w[0]

    for fn in (clamped, lambda p, x, i: x @ p["w"][i]):
        sparse_fn, sparse_params = jp.compact(fn, params, masks, only="w")
        for i in (-5, -1, 1, 4):
            want = fn(jp.apply_masks(params, masks), x, jnp.int32(i))
            got = sparse_fn(sparse_params, x, jnp.int32(i))
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7 * np.abs(want).max())


@pytest.mark.parametrize("at_once", [1 << 21, 1 << 10])
def test_half_precision_adds_up_columns_as_a_product_does(monkeypatch, at_once):
    monkeypatch.setattr(_block_product, "_AT_ONCE", at_once)
    draw = lambda *shape: jnp.asarray(jnp.abs(normal(0, *shape)) + 0.5, jnp.bfloat16)
    params, x, back = {"w": draw(16, 2048)}, draw(2, 16), draw(2, 2048)
    masks = {"w": mask(1, 16, 2048, block=(8, 8))}
    fn = lambda p, x: x @ p["w"]
    sparse_fn, sparse_params = jp.compact(fn, params, masks, only="w")
    whole = np.float64(jp.apply_masks(params, masks)["w"])
    (got,) = jax.vjp(lambda x: sparse_fn(sparse_params, x), x)[1](back)
    np.testing.assert_allclose(np.float64(got), np.float64(back) @ whole.T, rtol=8e-3)
    turned, sparse_params = jp.compact(lambda p, x: x @ p["w"].T, params, masks, only="w")
    got = turned(sparse_params, back)
    np.testing.assert_allclose(np.float64(got), np.float64(back) @ whole.T, rtol=8e-3)


def test_numbers_among_the_params_and_their_dtypes_are_those_that_are_passed(small):
    _, masks, x = small
    params = {"scale": 0.5, "bias": normal(0, 32), "up": normal(1, 16, 32)}
    masks = {"scale": None, "bias": None, "up": masks["up"]}
    fn = lambda p, x: p["scale"] * (x @ p["up"] + jnp.broadcast_to(p["bias"], (6, 32)))
    sparse_fn, sparse_params = jp.compact(fn, params, masks, only="up")
    want = fn({**jp.apply_masks(params, masks), "scale": 2.0}, x)
    other = {**sparse_params, "scale": 2.0}
    np.testing.assert_allclose(sparse_fn(other, x), want, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(sparse_fn)(other, x), want, rtol=1e-5)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (other, x))
    assert sparse_fn(*half).dtype == jnp.bfloat16


def test_data_without_rows_and_single_vectors_go_through(small):
    params, masks, x = small
    sparse_fn, sparse_params = jp.compact(lambda p, x: x @ p["up"], params, masks, only="up")
    assert sparse_fn(sparse_params, x[:0]).shape == (0, 32)
    want = sparse_fn(sparse_params, x)[0]
    np.testing.assert_allclose(sparse_fn(sparse_params, x[0]), want, rtol=1e-5)
    back = lambda p, x: x @ p["up"].T
    sparse_fn, sparse_params = jp.compact(back, params, masks, only="up")
    assert sparse_fn(sparse_params, jnp.ones((0, 32))).shape == (0, 16)


def test_nnx_models_and_flax_variables_go_in_as_they_are():
    model = nnx.Sequential(
        nnx.Linear(16, 32, rngs=nnx.Rngs(0)), nnx.Linear(32, 8, rngs=nnx.Rngs(1))
    )
    graph, state = nnx.split(model)
    x = normal(0, 5, 16)
    masks = balanced_masks(state, jp.layouts.flax.on(state, "test"))
    assert_same(lambda s, x: nnx.merge(graph, s)(x), state, masks, x)
    module = nn.Dense(8)
    variables = module.init(jax.random.key(0), x)
    masks = balanced_masks(variables, jp.layouts.flax.on(variables, "test"))
    assert_same(module.apply, variables, masks, x)


def test_half_precision_accumulates_as_the_dense_product_does():
    params = {"w": normal(0, 64, 64).astype(jnp.bfloat16)}
    masks = {"w": mask(1, 64, 64, block=(8, 8))}
    x = normal(2, 5, 64).astype(jnp.bfloat16)
    for kind in (None, jnp.float32):
        fn = lambda p, x, kind=kind: jnp.dot(x, p["w"], preferred_element_type=kind)
        sparse_fn, sparse_params = jp.compact(fn, params, masks, only="w")
        assert sparse_params["w"].dtype == jnp.bfloat16
        got, want = sparse_fn(sparse_params, x), fn(jp.apply_masks(params, masks), x)
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_blocks_and_data_that_are_sharded_give_what_one_device_gives(small, kind):
    params, masks, x = small
    sparse_fn, sparse_params = jp.compact(mlp, params, masks, only=".*")
    want = sparse_fn(sparse_params, x)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType[kind],))
    columns = jax.NamedSharding(mesh, jax.P("x"))
    with jax.set_mesh(mesh):
        sharded = {**sparse_params, "up": jax.device_put(sparse_params["up"], columns)}
        got = jax.jit(sparse_fn)(sharded, jax.device_put(x, columns))
        by_hand = jax.shard_map(sparse_fn, in_specs=(jax.P(), jax.P("x")), out_specs=jax.P("x"))
        apart = jax.jit(by_hand)(sparse_params, jax.device_put(x, columns))
    scale = 1e-6 * float(jnp.abs(want).max())  # sums over shards are added up in another order
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=scale)
    np.testing.assert_allclose(apart, want, rtol=1e-6, atol=scale)


def test_what_is_sharded_over_explicit_axes_is_cut_into_blocks_and_put_back():
    params, masks = {"w": normal(0, 16, 16)}, {"w": mask(1, 16, 16, block=(4, 4))}
    tx = optax.adam(0.1)
    _, want = jp.compact(lambda p, x: x @ p["w"], params, masks, only="w")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    fn = lambda p, x: x @ p["w"] + jnp.sum(p["w"] ** 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rows)
        sparse_fn, sparse_params = jp.compact(fn, sharded, masks, only="w")
        state = jp.compact_state(tx, tx.init(sharded), sharded, masks, only="w")
        blocks = jax.device_put(sparse_params, rows)
        back = jp.expand(blocks, sharded, masks, only="w")
        with pytest.warns(jp.PruneWarning, match="whole weights"):
            got = sparse_fn(blocks, jnp.ones((2, 16)))
    np.testing.assert_array_equal(sparse_params["w"], want["w"])
    assert state[0].mu["w"].shape == want["w"].shape
    np.testing.assert_array_equal(back["w"], jp.apply_masks(params, masks)["w"])
    np.testing.assert_allclose(got, fn(back, jnp.ones((2, 16))), rtol=1e-5)


@pytest.mark.parametrize("at_once", [1 << 20, 16])
@pytest.mark.parametrize("dtype", ["int8", "int32", "complex64", "float8_e4m3fn"])
def test_weights_that_are_no_floats_are_multiplied_exactly(monkeypatch, dtype, at_once):
    monkeypatch.setattr(_block_product, "_AT_ONCE", at_once)
    kind = {"int8": "int32", "int32": "int32", "complex64": "complex64"}.get(dtype, "float32")
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.integers(-8, 9, n), dtype) for n in ((16, 16), (3, 16)))
    x = x + 2**24 + 1 if dtype == "int32" else x  # which a float32 does not know
    masks = {"w": mask(1, 16, 16, block=(4, 4))}
    for contract in (0, 1):
        numbers = (((1,), (contract,)), ((), ()))
        fn = lambda p, x, n=numbers: lax.dot_general(x, p["w"], n, preferred_element_type=kind)
        assert jp.verify_compact(fn, {"w": w}, masks, x, only="w") == 0


# Which weights, and in what shape


def test_a_leaf_becomes_its_kept_blocks_and_comes_back(small):
    params, masks, _ = small
    _, sparse_params = jp.compact(mlp, params, masks, only=".*")
    assert sparse_params["up"].shape == (4, 2, 4, 8) and sparse_params["down"].shape == (3, 4, 4, 8)
    np.testing.assert_array_equal(sparse_params["bias"], params["bias"])
    back = jp.expand(sparse_params, params, masks, only=".*")
    jax.tree.map(np.testing.assert_array_equal, back, jp.apply_masks(params, masks))
    for path, leaf in params.items():
        if path != "bias":
            kept = int(masks[path].sum())
            assert sparse_params[path].size == kept == jp.dense_masks({path: leaf})[path].size // 2


def test_weights_that_would_not_gain_stay_dense_and_masked_and_the_plan_says_why():
    params = {"big": normal(0, 512, 512), "wide": normal(1, 512, 512), "out": normal(2, 512, 8)}
    masks = {
        "big": mask(3, 512, 512, block=(128, 128), share=0.25),
        "wide": mask(4, 512, 512, block=(16, 16), share=0.25),
        "out": mask(5, 512, 8, block=(128, 8), share=0.5),
    }
    fn = lambda p, x: x @ p["big"] @ p["wide"] @ p["out"]
    _, sparse_params = jp.compact(fn, params, masks)
    assert sparse_params["big"].shape == (4, 1, 128, 128)
    assert sparse_params["wide"].shape == (512, 512)
    assert not sparse_params["wide"][~masks["wide"]].any()
    plan = jp.compact_plan(fn, params, masks, jax.ShapeDtypeStruct((4, 512), jnp.float32))
    assert plan.compacted == ("big",)
    assert "'out': 512 x 8 is too small to gain" in str(plan)
    assert "'wide': with 8 of 32 blocks of 16 x 16 left" in str(plan)
    assert {r.path: r.bytes for r in plan.rows}["big"] == 4 * 4 * 128 * 128 + 4 * 4
    _, sparse_params = jp.compact(fn, params, masks, only=["wide"])
    assert sparse_params["wide"].shape == (32, 8, 16, 16) and sparse_params["big"].ndim == 2


@pytest.mark.parametrize("scope", ["prune", "rigl", "imp"])
def test_balance_survives_training(scope):
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    params = {"up": normal(0, 16, 32), "down": normal(1, 32, 16)}
    x = normal(2, 8, 16)
    layout = jp.find_layout(fn, params, x)
    parts = {"pattern": BLOCKS, "scope": jp.scopes.per_output, "layout": layout}
    grad = jax.grad(lambda p: jnp.sum((fn(p, x) - 1) ** 2))
    if scope == "imp":
        fit = lambda ticket, masks: jax.tree.map(lambda p: p + 0.1, ticket)
        levels = list(jp.imp(params, fit, rounds=2, rate=0.5, **parts))
        masks = levels[-1].masks
    else:
        schedule = jp.schedules.cubic(0.75, begin=0, end=4, every=2)
        tx = (
            jp.prune(optax.sgd(0.1), schedule=schedule, packed=True, **parts)
            if scope == "prune"
            else jp.dynamic.rigl(
                optax.sgd(0.1),
                sparsity=jp.scopes.uniform(params, 0.75),
                begin=0,
                end=4,
                every=2,
                **parts,
            )
        )
        state = tx.init(params)
        for _ in range(6):
            updates, state = tx.update(grad(params), state, params)
            params = optax.apply_updates(params, updates)
        masks = jp.get_masks(state)
    assert jp.sparsity(masks, params) == 0.75
    plan = jp.compact_plan(fn, params, masks, x, only=".*")
    assert [row.kept for row in plan.rows] == [(2, 8), (1, 4)]
    assert jp.verify_compact(fn, params, masks, x, only=".*") < 1e-5


# Training


def test_training_in_blocks_is_training_the_masked_network(small):
    params, masks, x = small
    loss = lambda f: lambda p: jnp.mean((f(p, x) - 1) ** 2)
    inner = optax.adamw(1e-2)
    schedule = jp.schedules.one_shot(0.5, 0)
    pattern = {"pattern": BLOCKS, "scope": jp.scopes.per_output, "layout": jp.layouts.flax}
    wrapped = {"up": {"kernel": params["up"]}, "down": {"kernel": params["down"]}}
    fn = lambda p, x: mlp({"up": p["up"]["kernel"], "down": p["down"]["kernel"], "bias": 0.1}, x)
    tx = jp.prune(inner, schedule=schedule, **pattern)

    def steps(tx, f, params, state, n):
        for _ in range(n):
            updates, state = tx.update(jax.grad(loss(f))(params), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = steps(tx, fn, wrapped, tx.init(wrapped), 3)
    masks = jp.get_masks(state)
    sparse_fn, sparse = jp.compact(fn, params, masks, only=".*")
    for after in (inner, jp.hold(inner)):
        small_state = jp.compact_state(after, state, params, masks, only=".*")
        want = jax.eval_shape(after.init, sparse)
        assert jax.tree.structure(small_state) == jax.tree.structure(want)
        small, _ = steps(after, sparse_fn, sparse, small_state, 3)
        large, _ = steps(tx, fn, params, state, 3)
        back = jp.expand(small, params, masks, only=".*")
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, back, large)


def test_a_pruner_inside_of_a_chain_hands_over_to_its_inner_optimizer():
    params, masks = {"w": normal(0, 16, 16)}, {"w": mask(1, 16, 16, block=(4, 4))}
    held = optax.chain(optax.clip(1.0), jp.hold(optax.adam(0.1)))
    alone = optax.chain(optax.clip(1.0), optax.adam(0.1))
    state = jp.with_masks(held.init(params), masks)
    got = jp.compact_state(alone, state, params, masks, only="w")
    _, sparse_params = jp.compact(lambda p, x: x @ p["w"], params, masks, only="w")
    assert jax.tree.structure(got) == jax.tree.structure(alone.init(sparse_params))


def test_what_an_optimizer_does_otherwise_with_blocks_is_said():
    params, masks = {"w": normal(0, 16, 16)}, {"w": mask(1, 16, 16, block=(4, 4))}
    for tx in (
        optax.adamw(1e-3, mask=lambda p: jax.tree.map(lambda x: x.ndim == 2, p), weight_decay=1.0),
        optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)),
    ):
        with pytest.warns(jp.PruneWarning, match=r"'w': by \d+% of its largest update"):
            jp.compact_state(tx, tx.init(params), params, masks, only="w")
    muon = optax.contrib.muon(0.1)
    with pytest.raises(ValueError, match=r"another structure.*Muon.*Start anew"):
        jp.compact_state(muon, muon.init(params), params, masks, only="w")
    for tx in (optax.lamb(0.1), optax.chain(optax.clip_by_global_norm(0.1), optax.lion(0.1))):
        jp.compact_state(tx, tx.init(params), params, masks, only="w")


def test_layers_that_have_lost_the_same_blocks_are_layers_still():
    params = {"w": normal(0, 3, 16, 16)}
    one = mask(1, 16, 16, block=(4, 4))
    fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]
    single = {"w": params["w"][:1]}
    assert_same(fn, single, {"w": one[None]}, normal(2, 5, 16))
    assert (
        not jp.compact_plan(fn, single, {"w": one[None]}, normal(2, 5, 16), only="w").rows[0].whole
    )
    for masks in ({"w": jnp.stack([one] * 3)}, {"w": one[None]}):
        (row,) = jp.compact_plan(fn, params, masks, normal(2, 5, 16), only="w").rows
        assert row.blocks == (4, 4) and row.kept == (2, 4) and not row.whole


def test_a_state_is_refused_where_removed_weights_would_come_back_or_nothing_fits():
    params = {"big": normal(0, 512, 512), "out": normal(2, 512, 8)}
    masks = {
        "big": mask(3, 512, 512, block=(128, 128), share=0.25),
        "out": mask(5, 512, 8, block=(128, 8)),
    }
    tx = optax.adam(0.1)
    with pytest.raises(ValueError, match=r"weights of 'out' come back.*too small.*jp.hold"):
        jp.compact_state(tx, tx.init(params), params, masks)
    held = jp.hold(tx)
    state = jp.with_masks(held.init(params), masks)
    got = jp.compact_state(held, state, params, masks)
    kept = jp.get_masks(got)
    np.testing.assert_array_equal(kept["out"], masks["out"])
    assert kept["big"].shape == (4, 1, 128, 128) and kept["big"].all()
    factored = optax.adafactor(0.1, min_dim_size_to_factor=8)
    with pytest.raises(ValueError, match=r"'big' of shape \(512, 512\).*tx.init\(sparse_params\)"):
        jp.compact_state(factored, factored.init(params), params, masks, only=".*")


# Bad input

EYE = jnp.eye(4, dtype=bool)


def grown(grid, *block):
    return jnp.asarray(np.kron(np.asarray(grid), np.ones(block, bool)).astype(bool))


BAD = {
    "single weights": (
        jnp.asarray(np.random.default_rng(0).random((16, 32)) < 0.5),
        "single weights.*Blocks",
    ),
    "unbalanced": (
        grown(EYE.at[0, 1].set(True), 4, 8),
        r"not balanced: of 4 blocks of 4 x 8.*most keep 1, but column 1 keeps 2.*per_output",
    ),
    "ragged": (
        jnp.asarray(
            np.repeat(np.random.default_rng(0).random((4, 4)) < 0.5, 5, 0)[:16].repeat(8, 1)
        ),
        r"blocks of 5 along axis 0, which do not divide its 16",
    ),
    "empty": (jnp.zeros((16, 32), bool), "keeps nothing"),
    "a column empty": (grown(EYE.at[1, 1].set(False), 4, 8), "not balanced.*column 1 keeps 0"),
    "another shape": (jnp.ones((8, 32), bool), r"bool\[8, 32\]"),
    "no bools": (jnp.ones((16, 32)), r"float32\[16, 32\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_masks_that_are_no_balanced_blocks_are_refused_by_name(name, small):
    params, _, _ = small
    bad, match = BAD[name]
    with pytest.raises(ValueError, match=match) as error:
        jp.compact(mlp, params, {"up": bad}, only=".*")
    assert "'up'" in str(error.value)


def test_other_bad_input_is_refused_at_the_door(small):
    params, masks, x = small
    with pytest.raises(ValueError, match=r"'up': 16 x 32 is too small to gain.*only"):
        jp.compact(mlp, params, masks)
    with pytest.raises(ValueError, match=r"'upp'.*matches no parameter"):
        jp.compact(mlp, params, masks, only="upp")
    with pytest.raises(ValueError, match="no weight to hold by its blocks"):
        jp.compact(mlp, params, {"up": None})
    with pytest.raises(ValueError, match="'left'"):
        jp.compact(mlp, params, {"left": masks["up"]}, only=".*")
    with pytest.raises(TypeError, match="instead of a function"):
        jp.compact(nn.Dense(3), params, masks)
    with pytest.raises(ValueError, match=r"'down' of shape \(32, 24\), wanted \(3, 4, 4, 8\)"):
        jp.expand(params, params, masks, only=".*")
    sparse_fn, sparse_params = jp.compact(mlp, params, masks, only=".*")
    with pytest.raises(ValueError, match=r"'up' has shape \(16, 32\), wanted \(4, 2, 4, 8\)"):
        sparse_fn(params, x)
    with pytest.raises(ValueError, match="structure"):
        sparse_fn({"up": sparse_params["up"]}, x)
    with pytest.raises(TypeError, match="jit"):
        jax.jit(lambda m: jp.compact(mlp, params, m, only=".*")[1])(masks)
