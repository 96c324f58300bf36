"""What no result depends on neither freezes a width nor counts, however deep it lies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

RNG = np.random.default_rng(0)
P = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"w": (4, 8), "v": (8, 3), "u": (8, 8)}.items()
}
X = jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32)


def told(p, x):
    """Logits, and what a training script looks at beside them."""
    h = jax.nn.relu(x @ p["w"])
    return h @ p["v"], {"winner": jnp.argmax(h, -1), "first": h[:, 0], "aux": h @ p["u"] @ p["u"]}


@jax.custom_jvp
def watched(h):
    return jnp.tanh(h), jnp.argmax(h, -1)


@watched.defjvp
def _(primals, tangents):
    h, winner = watched(*primals)
    return (h, winner), ((1 - h * h) * tangents[0], np.zeros(winner.shape, jax.dtypes.float0))


@jax.custom_vjp
def straight(h):
    return jnp.sign(h), h @ jnp.ones((8, 8))


straight.defvjp(lambda h: (straight(h), None), lambda _, g: (g[0],))


def loop(p, x, body, carry):
    """A loop that carries more than the caller reads."""
    return lax.while_loop(lambda c: c[0] < 3, body, (0, x @ p["w"], carry))[1] @ p["v"]


def step(h, noise):
    return jnp.tanh(h) * noise, (h, jnp.sort(h, -1), h @ P["u"])


def drawn(h, key):
    return h * jax.random.normal(key, h.shape), h[:, jax.random.permutation(key, 8)]


HIDDEN = {
    "beside": lambda p, x: told(p, x)[0],
    "in jit": lambda p, x: jax.jit(told)(p, x)[0],
    "in remat": lambda p, x: jax.checkpoint(told)(p, x)[0],
    "in jit in jit": jax.jit(lambda p, x: jax.jit(told)(p, x)[0]),
    "what a scan makes": lambda p, x: lax.scan(step, x @ p["w"], jnp.ones((3, 2, 1)))[0] @ p["v"],
    "what a scan carries": lambda p, x: (
        lax.scan(
            lambda c, _: ((jnp.tanh(c[0]), jnp.sort(c[0] @ p["u"] + c[1])), None),
            (x @ p["w"], jnp.zeros((2, 8))),
            length=3,
        )[0][0]
        @ p["v"]
    ),
    "what a loop carries": lambda p, x: loop(
        p, x, lambda c: (c[0] + 1, jnp.tanh(c[1]), c[1] @ p["u"] + c[2][:, ::-1]), jnp.zeros((2, 8))
    ),
    "what a loop hands on": lambda p, x: loop(
        p,
        x,
        lambda c: (c[0] + 1, jnp.tanh(c[1]), (c[2][1], jnp.sort(c[1]))),
        (jnp.zeros((2, 8)), jnp.zeros((2, 8))),
    ),
    "what a loop in a scan in jit carries": jax.jit(
        lambda p, x: (
            lax.scan(
                lambda h, _: (
                    lax.while_loop(
                        lambda c: c[0] < 2,
                        lambda c: (c[0] + 1, jnp.tanh(c[1]), jnp.cumsum(c[1], 1) @ p["u"]),
                        (0, h, h),
                    )[1],
                    None,
                ),
                x @ p["w"],
                length=2,
            )[0]
            @ p["v"]
        )
    ),
    "what a branch makes": lambda p, x: (
        lax.cond(x[0, 0] > 0, step, lambda h, n: (h * n, step(h, n)[1]), x @ p["w"], 2.0)[0]
        @ p["v"]
    ),
    "what a custom jvp gives": lambda p, x: watched(x @ p["w"])[0] @ p["v"],
    "what a custom vjp gives": lambda p, x: straight(x @ p["w"])[0] @ p["v"],
    "behind a barrier": lambda p, x: (
        lax.optimization_barrier((x @ p["w"], jnp.sort(x @ p["w"])))[0] @ p["v"]
    ),
    "what is drawn": lambda p, x: drawn(x @ p["w"], jax.random.key(0))[0] @ p["v"],
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.filterwarnings("ignore:`fn` never reads")
def test_what_no_result_depends_on_freezes_nothing_and_is_not_counted(name):
    fn = HIDDEN[name]
    (group,) = jp.find_groups(fn, P, X)
    assert [(m.path, m.axis) for m in group.members] == [("v", 0), ("w", 1)]
    assert group.size == 8 and group.exact
    assert jp.count_flops(fn, P, X) == 2 * (2 * 4 * 8 + 2 * 8 * 3)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if "loop in" in name or "vjp" in name else pytest.mark.slow)
        for name in HIDDEN
    ],
)
@pytest.mark.filterwarnings("ignore:`fn` never reads")
def test_the_small_function_and_its_gradients_are_those_of_the_masked_network(name):
    fn = HIDDEN[name]
    groups = jp.find_groups(fn, P, X)
    keep = {groups[0].name: np.arange(8) % 3 != 1}
    masks = jp.patterns.Coupled(groups).expand(keep, like=P)
    masked = jp.apply_masks(P, masks)
    small_fn, small = jp.shrink(fn, P, masks)
    np.testing.assert_allclose(small_fn(small, X), fn(masked, X), rtol=1e-5, atol=1e-6)
    if "loop" not in name:
        grads = lambda f, p: jax.grad(lambda p: jnp.sum(jnp.sin(f(p, X))))(p)
        _, want = jp.shrink(fn, grads(fn, masked), masks)
        got = grads(small_fn, small)
        for key in "wv":
            np.testing.assert_allclose(got[key], want[key], rtol=1e-5, atol=1e-6)


def test_what_is_read_still_holds():
    both = lambda p, x: (told(p, x)[0], told(p, x)[1]["winner"])
    with pytest.warns(UserWarning, match="never reads 'u', or for nothing that it returns"):
        groups = jp.find_groups(both, P, X)
    assert not groups and "`argmax` at test_graph_lean.py" in str(groups)
    every = 2 * (2 * 4 * 8 + 2 * 8 * 3 + 2 * 2 * 8 * 8)
    assert jp.count_flops(told, P, X) == every


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
@pytest.mark.filterwarnings("ignore:`fn` never reads")
def test_what_a_callback_looks_at_is_no_dead_code(wrap):
    seen = []

    def fn(p, x):
        h = jnp.tanh(x @ p["w"])
        jax.debug.callback(lambda top: seen.append(np.shape(top)), jnp.max(h, 1))
        return h @ p["v"]

    groups = jp.find_groups(wrap(fn), P, X)
    assert not groups and "`reduce_max` at test_graph_lean.py" in str(groups)
    small_fn, small = jp.shrink(wrap(fn), P, {})
    jax.block_until_ready(small_fn(small, X))
    jax.effects_barrier()
    assert seen == [(2,)]


@pytest.mark.filterwarnings("ignore:`fn` never reads")
def test_blocks_that_only_serve_what_nobody_reads_are_none():
    def fn(p, x):
        h = x @ p["w"]
        return h + jnp.tanh(h @ p["u"]), h @ p["v"]

    assert [block.name for block in jp.find_blocks(lambda p, x: fn(p, x)[0], P, X)] == ["u"]
    assert not jp.find_blocks(lambda p, x: fn(p, x)[1], P, X)
