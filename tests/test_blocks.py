"""Parts that can be left out: which they are, what they own, and what is left without them."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.patterns import Coupled

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def layer(seed):
    return {"in": draw(seed, 4, 5), "out": draw(seed + 50, 5, 4)}


def branch(p, x):
    return jnp.tanh(x @ p["in"]) @ p["out"]


def stack(n):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(layer, range(n)))


X = draw(99, 2, 4)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def nested(p, x):
    for i in range(2):
        y = x @ p[f"down_{i}"]
        x = x + (y + branch(p[f"inner_{i}"], y)) @ p[f"up_{i}"]
    return x


def parallel(p, x):
    for one in p["layers"]:
        x = x + (branch(one["attention"], x) + branch(one["mlp"], x))
    return x


def masked(p, x):
    mask = jnp.tril(jnp.ones((2, 2)))  # made once, read by every layer
    for one in p["layers"]:
        x = x + mask @ branch(one, x)
    return x


def called(wrap, p, x):
    block = wrap(lambda one, x: x + branch(one, x))
    for one in p["layers"]:
        x = block(one, x)
    return x


def cast(p, x):
    half = functools.partial(jax.tree.map, lambda leaf: leaf.astype(jnp.bfloat16))
    for one in p["layers"]:
        x = x + branch(half(one), half(x)).astype(jnp.float32)
    return x


def shared(p, x):
    for _ in range(2):
        x = x + branch(p["layer"], x)
    return x


def gelu(p, x):
    h = x @ p["in"]
    return (h + 0.04 * h**3) @ p["out"]  # no product of matrices in between


TWO = {"layers": [layer(0), layer(1)]}
NETWORKS = {
    "nested": (
        nested,
        {f"{name}_{i}": layer(i) if name == "inner" else draw(i, 4, 4)
         for name in ("down", "inner", "up") for i in range(2)},
        ["inner_0", "inner_1"],  # the innermost
    ),
    "parallel": (
        parallel,
        {"layers": [{"attention": layer(i), "mlp": layer(i + 9)} for i in range(2)]},
        ["layers/0/attention..mlp", "layers/1/attention..mlp"],
    ),
    "a mask for all": (masked, TWO, ["layers/0", "layers/1"]),
    "jit": (functools.partial(called, jax.jit), TWO, ["layers/0", "layers/1"]),
    "remat": (functools.partial(called, jax.checkpoint), TWO, ["layers/0", "layers/1"]),
    "half precision inside": (cast, TWO, ["layers/0", "layers/1"]),
    "weights of two branches": (shared, {"layer": layer(0)}, []),
    "no branch": (gelu, layer(0), []),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_branches_are_the_innermost_that_multiply_and_own_their_weights_alone(name):
    fn, params, names = NETWORKS[name]
    blocks = jp.find_blocks(fn, params, X)
    assert [block.name for block in blocks] == names
    assert all(block.exact and block.kind == "block" and block.size == 1 for block in blocks)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name not in ("nested", "jit") else ())
        for name in NETWORKS
        if NETWORKS[name][-1]
    ],
)
def test_a_branch_that_is_dropped_leaves_what_goes_around_it(name):
    fn, params, names = NETWORKS[name]
    masks = jp.find_blocks(fn, params, X).without(names[:1], params)
    small_fn, small = jp.shrink(fn, params, masks)
    assert jp.size_of(params, masks) == sum(leaf.size for leaf in jax.tree.leaves(small))
    large = jp.apply_masks(params, masks)
    assert_close(*jit(lambda p, q: (small_fn(q, X), fn(p, X)))(large, small))
    grads = jit(jax.grad(lambda q: jnp.sum(small_fn(q, X) ** 2)))(small)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, small)


@pytest.mark.parametrize(
    "fn, reason",
    [
        (lambda p, x: x + jax.nn.sigmoid(branch(p, x)), "`add` at test_blocks.py"),
        (lambda p, x: x + (branch(p, x) + 1.0), "adds a branch that is not zero"),
        (lambda p, x: x + (branch(p, x) - x), "adds a branch that is not zero"),
    ],
    ids=["sigmoid", "a number", "the skip itself"],
)
def test_a_branch_that_is_not_zero_without_weights_says_so(fn, reason):
    net = lambda p, x: fn(p["layer"], x) @ p["head"]
    params = {"layer": layer(0), "head": draw(7, 4, 2)}
    (block,) = blocks = jp.find_blocks(net, params, X)
    assert not block.exact and reason in block.reason and "not exact" in str(block)
    assert jp.verify_shrink(net, params, blocks.without(["layer"], params), X) > 1e-3


def test_branches_are_ranked_across_and_all_of_them_may_go():
    net = lambda p, x: functools.partial(called, lambda f: f)(p, x) @ p["head"]
    weak = {"layers": [layer(0), jax.tree.map(lambda w: w / 9, layer(1))], "head": draw(7, 4, 2)}
    blocks = jp.find_blocks(net, weak, X)
    find = lambda s: jp.find_masks(weak, s, pattern=Coupled(blocks), scope=jp.scopes.across)
    assert [bool(one["in"].any()) for one in find(0.5)["layers"]] == [True, False]
    small_fn, small = jp.shrink(net, weak, find(1.0))
    assert_close(small_fn(small, X), X @ weak["head"])
    assert jp.count_flops(small_fn, small, X) == 2 * 2 * 4 * 2


# Scans.


def scanned(p, x):
    step = lambda x, one: (x + branch(one, x), None)
    return lax.scan(step, x, p["layers"])[0] @ p["head"]


def test_layers_are_kept_in_order_and_lose_channels_besides():
    params = {"layers": stack(4), "head": draw(7, 4, 2)}
    blocks = jp.find_blocks(scanned, params, X)
    assert [block.name for block in blocks] == [f"layers[{i}]" for i in range(4)]
    groups = jp.find_groups(scanned, params, X)
    channels = jp.find_masks(params, 0.4, pattern=Coupled(groups))
    masks = jp.combine_masks(blocks.without(["layers[0]", "layers[2]"], params), channels)
    small_fn, small = jp.shrink(scanned, params, masks)
    assert jax.tree.map(jnp.shape, small["layers"]) == {"in": (2, 4, 3), "out": (2, 3, 4)}
    assert_close(small_fn(small, X), scanned(jp.apply_masks(params, masks), X))
    assert [block.members[0].indices.tolist() for block in blocks.cut(masks)] == [[[0]], [[1]]]


def test_a_number_of_the_layer_stays_with_its_layer():
    def net(p, x):
        step = lambda x, one: (x + one[1] * branch(one[0], x), None)
        return lax.scan(step, x, (p["layers"], jnp.arange(3.0)))[0]

    params = {"layers": stack(3)}
    masks = jp.find_blocks(net, params, X).without(["layers[1]"], params)
    assert jp.verify_shrink(net, params, masks, X) < 1e-5


def counting(p, x, key, reverse=False):
    """A layer draws by a key and weighs by a number, both of which the scan carries."""

    def step(carry, w):
        x, i, key = carry
        key, mine = jax.random.split(key)
        x = x + (i + 1) * jax.random.uniform(mine, ()) * jnp.tanh(x @ w)
        return (x, i + 1, key), 2 * i

    (x, i, key), _ = lax.scan(step, (x, 0, key), p["w"], reverse=reverse)
    return x @ p["out"], i, key


def by_values(p, x, key):
    """The number depends on what the layers compute."""

    def step(carry, w):
        x, i = carry
        return (x + (i + 1) * jnp.tanh(x @ w), i + (x.sum() > 0).astype(int)), None

    return lax.scan(step, (x, 0), p["w"])[0][0] @ p["out"]


COUNTED = {"w": draw(3, 3, 4, 4), "out": draw(4, 4, 2)}


def test_layers_keep_the_numbers_and_keys_that_a_scan_carries():
    x, key = draw(5, 2, 4), jax.random.key(0)
    blocks = jp.find_blocks(counting, COUNTED, x, key)
    assert len(blocks) == 3 and all(block.exact for block in blocks)
    masks = blocks.without(["w[0]"], COUNTED)
    assert jp.verify_shrink(counting, COUNTED, masks, x, key) < 1e-6
    assert jp.shrink(counting, COUNTED, masks)[1]["w"].shape == (2, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("gone", [["w[1]"], ["w[0]", "w[2]"]])
def test_layers_keep_their_numbers_backwards_and_with_raw_keys(make, gone):
    backwards = lambda p, x, key: counting(p, x, key, reverse=True)
    x, key = draw(5, 2, 4), make(0)
    masks = jp.find_blocks(backwards, COUNTED, x, key).without(gone, COUNTED)
    assert jp.verify_shrink(backwards, COUNTED, masks, x, key) < 1e-6
    small_fn, small = jp.shrink(backwards, COUNTED, masks)
    masked = jp.apply_masks(COUNTED, masks)
    loss = lambda fn: lambda p: jnp.sum(fn(p, x, key)[0] ** 2)
    want = jp.shrink(backwards, jax.grad(loss(backwards))(masked), masks)[1]
    got = jax.grad(loss(small_fn))(small)
    assert_close(got["w"], want["w"])


def test_a_number_that_depends_on_what_layers_compute_says_so():
    blocks = jp.find_blocks(by_values, COUNTED, draw(5, 2, 4), jax.random.key(0))
    assert all("changes what it is given" in block.reason for block in blocks)


def test_layers_whose_outputs_are_asked_for_stay():
    def net(p, x):
        return lax.scan(lambda x, one: (x + branch(one, x),) * 2, x, p["layers"])[1]

    params = {"layers": stack(3)}
    assert not jp.find_blocks(net, params, X)
    why = {(path, axis): why for path, axis, _, why in jp.find_groups(net, params, X).frozen}
    assert why["layers/in", 0] == "it is axis 0 of an output"


def test_a_scan_keeps_one_layer():
    params = {"layers": stack(2), "head": draw(7, 4, 2)}
    blocks = jp.find_blocks(scanned, params, X)
    small_fn, small = jp.shrink(scanned, params, blocks.without(["layers[1]"], params))
    assert_close(small_fn(small, X), (X + branch(layer(0), X)) @ params["head"])
    small_fn, small = jp.shrink(
        scanned, params, blocks.without([block.name for block in blocks], params)
    )
    with pytest.raises(ValueError, match=r"remove all of 'layers/in'.*one layer of a scan"):
        small_fn(small, X)


# Blocks with a state.


class ResNet(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="stem")(x)
        for i in range(2):
            y = nn.Dense(6, name=f"a_{i}")(x)
            y = nn.relu(nn.BatchNorm(use_running_average=not self.train, name=f"norm_{i}")(y))
            x = x + nn.Dense(4, name=f"b_{i}")(y)
        return nn.Dense(3, name="head")(x)


def train(variables, x):
    return ResNet(train=True).apply(variables, x, mutable=["batch_stats"])


@pytest.mark.slow
@pytest.mark.parametrize("fn", [ResNet().apply, train], ids=["eval", "train"])
def test_running_statistics_go_with_their_block(fn):
    x = draw(3, 8, 5)
    variables = ResNet().init(jax.random.key(0), x)
    groups, blocks = jp.find_groups(fn, variables, x), jp.find_blocks(fn, variables, x)
    assert [block.name for block in blocks] == ["params/a_0..b_0", "params/a_1..b_1"]
    assert {m.path for m in blocks[1].members} == {
        *("batch_stats/norm_1/mean", "batch_stats/norm_1/var"),
        *("params/a_1/bias", "params/a_1/kernel", "params/b_1/bias", "params/b_1/kernel"),
        *("params/norm_1/bias", "params/norm_1/scale"),
    }
    # Found on the params, as in training, and carried over to the statistics.
    inside = blocks.at("params").without(["a_1..b_1"], variables["params"])
    channels = jp.find_masks(variables["params"], 0.5, pattern=Coupled(groups.at("params")))
    masks = {"params": jp.combine_masks(inside, channels)}
    every = jp.Groups([*groups, *blocks])
    assert jp.verify_shrink(fn, variables, masks, x, groups=every) < 1e-5
    assert groups.keep(masks)["params/a_0/kernel:1"].sum() == 3
    small_fn, small = jp.shrink(fn, variables, masks, groups=every)
    shapes = jax.tree.map(jnp.shape, small["batch_stats"])
    assert shapes["norm_0"]["mean"] == (3,) and shapes["norm_1"]["mean"] == (0,)
    if fn is train:
        _, state = small_fn(small, x)
        assert jax.tree.map(jnp.shape, state["batch_stats"]) == shapes
    with pytest.raises(ValueError, match="not all the parameters of a residual branch"):
        jp.verify_shrink(fn, variables, {"params": inside}, x)  # the statistics stayed


def test_names_of_blocks_are_told_apart():
    def net(p, x):
        for i in range(2):
            x = x + jnp.tanh(x @ p["in"][i]) @ p["out"][i]
        return x

    blocks = jp.find_blocks(net, {"in": [draw(0, 4, 4)] * 2, "out": [draw(1, 4, 4)] * 2}, X)
    assert len({block.name for block in blocks}) == 2
    assert all(re.fullmatch(r"/?in\.\.out(~2)?", block.name) for block in blocks)
