"""Tests of the methods of one matrix, against slow NumPy loops and against one another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import methods, patterns, scopes
from tests.helpers import slow_keep

SHAPE = (32, 8)  # of most, so that they share programs
SGPT = functools.partial(methods.sparsegpt, block=16)
REFIT = functools.partial(methods.sparsegpt, block=16, refit=True)
METHODS = {
    "wanda": methods.wanda,
    "ria": methods.ria,
    "sparsegpt": SGPT,
    "sparsegpt refit": REFIT,
    "admm": methods.admm,
}
APART = ("ria", "sparsegpt refit", "admm")  # all code of the others is in these or is trivial
CHANGING = ("sparsegpt refit", "admm")


def draw(inputs, outputs, rows=200, seed=0):
    """Weights, and the Gram matrix of inputs that hang together and are of several sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) / inputs**0.5
    x = np.maximum(mixed * rng.uniform(0.5, 2.0, inputs), 0.0)
    w = rng.normal(size=(inputs, outputs))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32)


def loss(new, w, gram):
    """How far the outputs move, relative to what they are."""
    e, w, gram = (np.asarray(a, np.float64) for a in (new - w, w, gram))
    return np.sum(e * (gram @ e)) / np.sum(w * (gram @ w))


@functools.partial(jax.jit, static_argnames="method")
def run(method, w, gram, keep):
    return method(w, gram, keep=keep)


# Each against its formula.


def test_wanda_keeps_the_largest_weights_times_norms_of_each_output():
    w, gram = draw(30, 7)
    new, mask = methods.wanda(w, gram, keep=jp.Keep.of((30, 7), 0.7, scope=scopes.per_output))
    for j in range(7):
        scores = [abs(w[i, j]) * np.sqrt(gram[i, i]) for i in range(30)]
        np.testing.assert_array_equal(mask[:, j], slow_keep(scores, 9))
    np.testing.assert_array_equal(new, np.where(mask, w, 0))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_ria_keeps_the_largest_shares_of_inputs_and_outputs(power):
    w, gram = draw(30, 7)
    keep = jp.Keep.of((30, 7), 0.7)
    new, mask = methods.ria(w, gram, keep=keep, power=power)
    size = np.abs(np.asarray(w, np.float64))
    scores = [
        (size[i, j] / sum(size[i]) + size[i, j] / sum(size[:, j])) * gram[i, i] ** (power / 2)
        for i in range(30)
        for j in range(7)
    ]
    np.testing.assert_array_equal(mask, slow_keep(scores, 210 - 147).reshape(30, 7))
    np.testing.assert_array_equal(new, np.where(mask, w, 0))


def test_methods_that_need_the_diagonal_only_take_it_alone():
    w, gram = draw(12, 4)
    keep = jp.Keep.of((12, 4), 0.5)
    declared = [m for m in map(METHODS.get, methods.__all__) if getattr(m, "diagonal", False)]
    assert declared == [methods.ria, methods.wanda]
    for method in declared:
        whole, diagonal = (method(w, g, keep=keep)[1] for g in (gram, jnp.diagonal(gram)))
        np.testing.assert_array_equal(whole, diagonal)


def test_only_wanda_ranks_per_output_where_nobody_says_how():
    asked = [name for name in methods.__all__ if getattr(METHODS[name], "per_output", False)]
    assert asked == ["wanda"]


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_refit_is_the_least_squares_solution_on_the_mask(damping):
    w, gram = draw(20, 6)
    mask = np.random.default_rng(1).random((20, 6)) < 0.5
    mask[:, 0], mask[:, 1] = False, True
    new = jp.refit(w, jnp.asarray(mask), gram, damping=damping, iterations=40)
    # Rows whose Gram matrix is the damped one: those of its square root.
    values, vectors = np.linalg.eigh(np.asarray(gram, np.float64))
    values += damping * np.mean(np.diag(gram))
    x = np.sqrt(values)[:, None] * vectors.T
    for j in range(6):
        want = np.zeros(20)
        want[mask[:, j]] = np.linalg.lstsq(x[:, mask[:, j]], x @ w[:, j], rcond=None)[0]
        np.testing.assert_allclose(new[:, j], want, rtol=2e-3, atol=2e-3)
    assert (np.asarray(new)[~mask] == 0).all()
    np.testing.assert_allclose(new[:, 1], w[:, 1], rtol=1e-5)


def slow_sparsegpt(w, gram, keep_rows, sizes, damping):
    """Optimal brain surgery, input after input, each time with the inverse of what is left.

    Args:
      keep_rows: from the costs of some inputs and the first of them to what stays.
      sizes: how many inputs are decided at once, group after group.
    """
    w, h = np.array(w, np.float64), np.array(gram, np.float64)
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    left = [np.linalg.inv(h[i:, i:])[0] for i in range(len(h))]
    mask, start = np.ones(w.shape, bool), 0
    for size in sizes:
        some = range(start, start + size)
        mask[some] = keep_rows(np.stack([w[i] ** 2 / left[i][0] for i in some]), start)
        for i in some:
            w[i:] -= np.outer(left[i], np.where(mask[i], 0.0, w[i] / left[i][0]))
        start += size
    return w, mask


KINDS = {
    "weights": {},
    "per output": {"scope": scopes.per_output},
    "2:4": {"scope": scopes.windows(4)},
    "2:4 along outputs": {"scope": scopes.windows(4, axis="out")},
    "4:8": {"scope": scopes.windows(8)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_sparsegpt_is_optimal_brain_surgery_input_after_input(kind):
    n, outputs, window = 40, 12, {"2:4": 4, "4:8": 8}.get(kind, 0)
    w, gram = draw(n, outputs)

    def keep_rows(costs, start):
        if kind == "per output":  # of 20 that stay, each block its share
            count = 20 * (start + len(costs)) // n - 20 * start // n
            return np.stack([slow_keep(column, count) for column in costs.T], 1)
        if kind == "2:4 along outputs":
            return np.stack([slow_keep(part, 2) for part in costs.reshape(-1, 4)]).reshape(1, -1)
        if window:
            return np.stack([slow_keep(column, window // 2) for column in costs.T], 1)
        return slow_keep(costs, 240 * (start + len(costs)) // n - 240 * start // n)

    sizes = [window] * (n // window) if window else [16, 16, 8]
    sizes = [1] * n if kind == "2:4 along outputs" else sizes
    keep = jp.Keep.of((n, outputs), 0.5, **KINDS[kind])
    new, mask = run(functools.partial(SGPT, damping=0.05), w, gram, keep)
    want, want_mask = slow_sparsegpt(w, gram, keep_rows, sizes, 0.05)
    np.testing.assert_array_equal(mask, want_mask)
    np.testing.assert_allclose(new, np.where(want_mask, want, 0), rtol=1e-3, atol=1e-4)


def test_methods_that_change_weights_are_better_in_this_order():
    w, gram = draw(*SHAPE, rows=2000)
    keep = jp.Keep.of(SHAPE, 0.6)
    names = ("admm", "sparsegpt refit", "sparsegpt", "wanda")
    losses = [loss(run(METHODS[name], w, gram, keep)[0], w, gram) for name in names]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[1] < 0.8 * losses[2] < 0.7 * losses[3]


def test_admm_makes_up_for_whole_inputs():
    w, gram = draw(*SHAPE, rows=20)
    keep = jp.Keep.of(SHAPE, 0.25, pattern=patterns.Channels("in", reduce="norm"))
    new, mask = run(methods.admm, w, gram, keep)
    whole = np.asarray(mask).all(1)
    assert (np.asarray(mask) == whole[:, None]).all() and whole.sum() == 24
    plain = run(methods.wanda, w, gram, keep)[0]
    assert loss(new, w, gram) < 0.05 * loss(plain, w, gram)


# What holds for all of them.

PATTERNS = {
    "blocks": {"pattern": patterns.Blocks((16, 16))},
    "blocks per output": {"pattern": patterns.Blocks((4, 2)), "scope": scopes.per_output},
    "blocks 2:4": {"pattern": patterns.Blocks((2, 3)), "scope": scopes.windows(4)},
    "inputs": {"pattern": patterns.Channels("in")},
    "outputs": {"pattern": patterns.Channels("out")},
}
EVERY_KEEP = {**KINDS, **PATTERNS}


@pytest.mark.parametrize(
    "name, kind",
    [
        *(("sparsegpt", kind) for kind in PATTERNS if kind != "outputs"),
        *(("admm", kind) for kind in ("per output", "blocks", "blocks 2:4", "inputs", "outputs")),
    ],
)
def test_masks_of_every_kind_have_the_counts_of_their_pattern_and_scope(name, kind):
    shape = (32, 24)
    w, gram = draw(*shape)
    keep = jp.Keep.of(shape, 0.5, **EVERY_KEEP[kind])
    parts = keep.parts
    alive = lambda mask: np.asarray(parts.alive({"w": w}, {"w": mask})["w"])
    new, mask = run(METHODS[name], w, gram, keep)
    units = alive(mask)
    assert np.isfinite(new).all() and (np.asarray(new)[~np.asarray(mask)] == 0).all()
    whole = parts.expand({"w": units}, like={"w": w})["w"]
    np.testing.assert_array_equal(mask, np.broadcast_to(whole, shape))  # units go whole
    assert units.sum() == alive(keep(jnp.abs(w))).sum()
    if kind.endswith("per output"):
        assert (units.sum(0) == len(units) // 2).all()


def test_counts_are_exact_at_sizes_that_no_block_divides():
    w, gram = draw(200, 30)
    mask = run(methods.sparsegpt, w, gram, jp.Keep.of((200, 30), 0.7))[1]
    assert mask.sum() == 6000 - 4200
    w, gram = draw(577, 3)
    each = jp.Keep.of((577, 3), 0.6, scope=scopes.per_output)
    assert run(methods.sparsegpt, w, gram, each)[1].sum(0).tolist() == [577 - 346] * 3


@pytest.mark.parametrize("name", APART)
def test_experts_are_pruned_as_each_would_be(name):
    each = [draw(*SHAPE, seed=seed) for seed in range(3)]
    w, gram = (jnp.stack(some) for some in zip(*each, strict=True))
    keep = jp.Keep.of(SHAPE, 0.5)
    new, masks = jax.jit(jax.vmap(lambda w, g: METHODS[name](w, g, keep=keep)))(w, gram)
    for i in range(3):
        one, mask = run(METHODS[name], w[i], gram[i], keep)
        np.testing.assert_array_equal(masks[i], mask)
        np.testing.assert_allclose(new[i], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CHANGING)
def test_half_precision_weights_are_pruned_in_float32(name):
    w, gram = draw(*SHAPE)
    half = w.astype(jnp.bfloat16)
    keep = jp.Keep.of(SHAPE, 0.5)
    assert methods.wanda(half, gram, keep=keep)[0].dtype == jnp.bfloat16
    new, mask = run(METHODS[name], half, gram, keep)
    want, want_mask = run(METHODS[name], half.astype(jnp.float32), gram, keep)
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(mask, want_mask)
    np.testing.assert_array_equal(new, want.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", CHANGING)
def test_an_input_that_is_always_zero_has_no_say_and_no_weights(name):
    w, gram = draw(*SHAPE)
    dead = jnp.arange(32) % 5 == 3
    gram = jnp.where(dead[:, None] | dead[None], 0.0, gram)
    new, mask = run(METHODS[name], w, gram, jp.Keep.of(SHAPE, 0.5))
    assert np.isfinite(new).all() and (new[dead] == 0).all()
    assert loss(new, w, gram) < 0.5 and mask.sum() == 128
    assert (run(METHODS[name], w, 0 * gram, jp.Keep.of(SHAPE, 0.5))[0] == 0).all()


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_one_input_or_one_output_will_do(name, shape):
    w, gram = draw(*shape)
    new, mask = run(METHODS[name], w, gram, jp.Keep.of(shape, 0.5))
    assert np.isfinite(new).all() and mask.sum() == w.size - round(0.5 * w.size)


@pytest.mark.parametrize("name", CHANGING)
def test_fewer_rows_than_inputs_are_made_up_for_by_damping(name):
    w, gram = draw(*SHAPE, rows=10)
    new, _ = run(METHODS[name], w, gram, jp.Keep.of(SHAPE, 0.5))
    plain, _ = run(methods.wanda, w, gram, jp.Keep.of(SHAPE, 0.5))
    assert loss(new, w, gram) < 0.2 * loss(plain, w, gram)


@pytest.mark.parametrize("name", ["ria", "sparsegpt refit"])
def test_what_is_masked_already_stays_removed(name):
    w, gram = draw(*SHAPE)
    first = jnp.arange(32)[:, None] >= jnp.array([16] * 4 + [0] * 4)[None]  # 64 of 256 are gone
    keep = jp.Keep.of(SHAPE, 0.5, within=first)
    new, mask = run(METHODS[name], w, gram, keep)
    assert not (mask & ~first).any() and mask.sum() == 128
    assert (np.asarray(new)[~np.asarray(first)] == 0).all()


def test_any_function_of_scores_will_do():
    w, gram = draw(40, 8)
    asked = []

    def above_the_mean(scores):
        asked.append(scores.shape)
        return scores > jnp.mean(scores)

    for name in APART:
        method = functools.partial(METHODS[name], keep=above_the_mean)
        new, mask = jax.jit(method)(w, gram)
        assert np.isfinite(new).all() and 0 < mask.sum() < w.size
        assert (np.asarray(new)[~np.asarray(mask)] == 0).all()
    # SparseGPT asks block by block, a whole one and the rest.
    assert set(asked) == {(40, 8), (16, 8), (8, 8)}


@pytest.mark.parametrize(
    "pattern, words",
    [
        (patterns.Channels("out"), r"`Channels\(axis='out'.*all inputs.*Use `jp.methods.admm`"),
        (patterns.Blocks((32, 1)), r"block=16.*`Blocks\(shape=\(32, 1\).*32 inputs.*admm"),
    ],
)
def test_sparsegpt_refuses_units_that_are_larger_than_its_blocks(pattern, words):
    w, gram = draw(40, 8)
    with pytest.raises(ValueError, match=words):
        SGPT(w, gram, keep=jp.Keep.of((40, 8), 0.5, pattern=pattern))


@pytest.mark.parametrize("name", APART)
def test_data_are_no_gram_matrix(name):
    w, _ = draw(40, 8)
    with pytest.raises(ValueError, match=r"`gram` .*\(64, 40\).*`x.T @ x`"):
        METHODS[name](w, jnp.ones((64, 40)), keep=jp.Keep.of((40, 8), 0.5))


def test_refit_takes_a_mask_of_the_shape_of_the_weight():
    w, gram = draw(40, 8)
    with pytest.raises(ValueError, match=r"`refit` got a mask of shape \(8, 40\).*\(40, 8\)"):
        jp.refit(w, w.T > 0, gram)
