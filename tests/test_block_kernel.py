"""The kernel of the product with blocks gives what a slow loop gives, step by step on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.graph import _block_kernel_gpu, _block_kernel_tpu, _block_product
from jaxprune.graph._block_kernel_tpu import row_tile
from jaxprune.graph._block_product import Numerics, block_product

BF16 = jnp.bfloat16
KERNELS = {"tpu": _block_kernel_tpu, "cuda": _block_kernel_gpu}


def in_kernel(x, blocks, index, platform):
    kernel = _block_product._Kernel(platform, interpret=True)
    return _block_product._in_kernel(x, blocks, index, kernel)


def draw(key, rows, inputs, columns, kept, bi, bo):
    """Small whole numbers, of which bfloat16 loses nothing."""
    keys = jax.random.split(key, 3)
    x = jax.random.randint(keys[0], (rows, inputs), -3, 4).astype(BF16)
    blocks = jax.random.randint(keys[1], (columns, kept, bi, bo), -3, 4).astype(BF16)
    rank = jax.random.uniform(keys[2], (columns, inputs // bi))
    return x, blocks, jnp.argsort(rank)[:, :kept].astype(jnp.int32)


def slow(x, blocks, index):
    """A product a block, in NumPy."""
    x, blocks = np.asarray(x, np.float32), np.asarray(blocks, np.float32)
    columns, kept, bi, bo = blocks.shape
    y = np.zeros((x.shape[0], columns, bo), np.float32)
    for c in range(columns):
        for k in range(kept):
            start = int(index[c, k]) * bi
            y[:, c] += x[:, start : start + bi] @ blocks[c, k]
    return y.reshape(x.shape[0], -1)


@pytest.mark.parametrize(
    ("platform", "rows", "inputs", "columns", "kept", "bi", "bo"),
    [
        ("tpu", 128, 256, 2, 2, 128, 128),
        ("tpu", 128, 128, 3, 2, 16, 128),  # three columns go one a step
        ("tpu", 384, 128, 4, 1, 64, 64),  # three tiles of rows, and four columns go at once
        ("cuda", 128, 256, 2, 2, 128, 128),  # two steps a block
        ("cuda", 64, 128, 2, 3, 32, 64),
        ("cuda", 128, 256, 2, 8, 16, 128),  # two steps of four blocks
    ],
)
def test_a_kernel_gives_what_a_loop_over_blocks_gives(
    key, platform, rows, inputs, columns, kept, bi, bo
):
    x, blocks, index = draw(key, rows, inputs, columns, kept, bi, bo)
    assert KERNELS[platform].takes(x, blocks)
    y = KERNELS[platform].kernel_product(x, blocks, index, jnp.float32, interpret=True)
    np.testing.assert_array_equal(y, slow(x, blocks, index))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_results_are_rounded_once_to_the_dtype_that_is_asked_for(key, kernel):
    x, blocks, index = draw(key, 128, 128, 2, 2, 64, 64)
    y = kernel.kernel_product(x, blocks, index, interpret=True)
    assert y.dtype == BF16
    np.testing.assert_array_equal(y, jnp.asarray(slow(x, blocks, index), BF16))


@pytest.mark.parametrize("platform", KERNELS)
def test_derivatives_of_a_kernel_are_those_of_the_plain_product(key, platform):
    x, blocks, index = draw(key, 128, 128, 2, 1, 64, 64)
    dx, db, _ = draw(jax.random.key(1), 128, 128, 2, 1, 64, 64)

    def both(product, x, blocks):
        one = lambda x, b: product(x, b, index)
        y, tangent = jax.jvp(one, (x, blocks), (dx, db))
        grads = jax.grad(lambda x, b: jnp.sum(one(x, b)), (0, 1))(x, blocks)
        return y, tangent, grads, jax.grad(lambda b: jnp.sum(one(x, b)))(blocks)

    products = (functools.partial(in_kernel, platform=platform), block_product)
    ours, plain = (jax.jit(functools.partial(both, f))(x, blocks) for f in products)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


@pytest.mark.parametrize("platform", KERNELS)
def test_a_kernel_runs_under_vmap_and_in_a_scan_over_stacked_layers(key, platform):
    product = functools.partial(in_kernel, platform=platform)
    x, *_ = draw(key, 128, 128, 2, 2, 64, 64)
    layers = [draw(k, 128, 128, 2, 2, 64, 64)[1:] for k in jax.random.split(key, 2)]
    blocks, index = (jnp.stack(each) for each in zip(*layers, strict=True))
    want = np.stack([slow(x, *layer) for layer in layers])
    side = jax.jit(jax.vmap(product, (None, 0, 0)))(x, blocks, index)
    _, one_by_one = jax.lax.scan(lambda c, w: (c, product(x, *w)), 0, (blocks, index))
    for y in (side, one_by_one):
        np.testing.assert_array_equal(y, jnp.asarray(want, BF16))


@pytest.mark.parametrize(
    ("rows", "inputs", "columns", "kept", "bi", "bo", "dtype"),
    [
        (100, 256, 2, 1, 128, 128, BF16),  # rows are no tiles
        (0, 256, 2, 1, 128, 128, BF16),
        (128, 192, 2, 1, 64, 64, BF16),  # inputs are no lanes
        (128, 256, 2, 1, 128, 128, jnp.float32),
        (128, 256, 3, 1, 64, 64, BF16),  # columns of half a lane come in pairs
        (128, 256, 8, 1, 16, 16, BF16),
        (128, 256, 2, 1, 8, 128, BF16),
        (128, 256, 2, 1, 128, 64, BF16),
        (128, 1 << 15, 2, 1, 128, 128, BF16),  # no tile of x fits
        (128, 16384, 2, 300, 16, 128, BF16),
    ],
)
def test_other_sizes_and_numbers_go_the_plain_way_on_a_tpu(
    rows, inputs, columns, kept, bi, bo, dtype
):
    x = jax.ShapeDtypeStruct((rows, inputs), dtype)
    assert not _block_kernel_tpu.takes(x, jax.ShapeDtypeStruct((columns, kept, bi, bo), dtype))


def test_a_tile_of_rows_fits_into_fast_memory():
    assert [row_tile(512, n) for n in (4096, 8192, 16384, 32768)] == [512, 256, 128, 0]
    assert [row_tile(n, 1024) for n in (1, 384, 1024, 1000)] == [0, 128, 512, 0]


@pytest.mark.parametrize(
    ("rows", "kept", "bi", "bo", "dtype"),
    [
        (100, 2, 64, 64, BF16),
        (0, 2, 64, 64, BF16),
        (128, 2, 64, 64, jnp.float32),
        (128, 2, 16, 64, BF16),  # not four a step
        (128, 2, 8, 64, BF16),
        (128, 2, 96, 64, BF16),
        (128, 2, 64, 192, BF16),
    ],
)
def test_other_sizes_and_numbers_go_the_plain_way_on_a_gpu(rows, kept, bi, bo, dtype):
    x = jax.ShapeDtypeStruct((rows, 768), dtype)
    assert not _block_kernel_gpu.takes(x, jax.ShapeDtypeStruct((2, kept, bi, bo), dtype))


@pytest.mark.parametrize("alone", ["tpu", "cuda", None])
def test_a_program_for_one_device_holds_a_kernel(key, alone, monkeypatch):
    monkeypatch.setattr(_block_product, "kernel_platform", lambda: alone)
    x, blocks, index = draw(key, 128, 128, 2, 2, 64, 64)
    traced = jax.jit(lambda *a: block_product(*a, Numerics(dtype=jnp.float32))).trace(
        x, blocks, index
    )
    assert ("pallas_call" in str(traced.jaxpr)) == (alone is not None)
    assert "tpu_custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    if alone != "cuda":  # for which a newer jax wants to know the GPU
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in text) == (alone == "tpu")


def test_no_kernel_is_for_this_machine():
    assert _block_product.kernel_platform() is None
