"""What goes in beside the params and comes out again is cut on both sides, where it is declared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxprune as jp
from jaxprune.patterns import Coupled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def half(groups, like):
    """Masks that keep every other unit of every group."""
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in groups}
    return Coupled(groups).expand(keep, like=like)


X = draw(9, 2, 4)
H = draw(8, 2, 6)
PARAMS = {"w": draw(0, 4, 6), "u": 0.3 * draw(1, 6, 6), "v": draw(2, 6, 3)}


def recur(p, h, x):
    h = jnp.tanh(x @ p["w"] + h @ p["u"])
    return h, h @ p["v"]


# In plain functions: where it goes in and where it comes out.


def test_a_carry_freezes_the_core_until_it_is_declared():
    assert not jp.find_groups(recur, PARAMS, H, X)
    (group,) = jp.find_groups(recur, PARAMS, H, X, carry=(1, 0))
    places = [(m.path, m.axis) for m in group.members]
    assert group.exact and places == [("u", 0), ("u", 1), ("v", 0), ("w", 1)]


def test_the_small_function_takes_the_whole_carry_or_a_small_one_and_gives_a_small_one():
    masks = half(jp.find_groups(recur, PARAMS, H, X, carry=(1, 0)), PARAMS)
    small_fn, small = jp.shrink(recur, PARAMS, masks, H, X, carry=(1, 0))
    masked = jp.apply_masks(PARAMS, masks)
    want, h = [], H
    for _ in range(3):
        h, y = recur(masked, h, X)
        want.append(y)
    first, y = small_fn(small, H, X)  # whatever lies at removed units is not looked at
    assert first.shape == (2, 3)
    np.testing.assert_allclose(y, want[0], rtol=1e-5, atol=1e-6)
    _, rest = jax.lax.scan(lambda h, _: small_fn(small, h, X), first, None, length=2)
    np.testing.assert_allclose(rest, jnp.stack(want[1:]), rtol=1e-5, atol=1e-6)
    more = jnp.tile(X, (4, 1)), jnp.zeros((8, 6))
    assert small_fn(small, more[1], more[0])[0].shape == (8, 3)  # another batch
    loss = lambda fn: lambda p: jnp.sum(fn(p, H, X)[1] ** 2)
    grads = jax.grad(loss(recur))(masked)
    for got, full in zip(
        jax.tree.leaves(jax.grad(loss(small_fn))(small)),
        jax.tree.leaves(jp.shrink(recur, grads, masks, H, X, carry=(1, 0))[1]),
        strict=True,
    ):
        np.testing.assert_allclose(got, full, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"a carry of shape \(2, 5\).*cut from 6 to 3.*whole"):
        small_fn(small, jnp.zeros((2, 5)), X)


def trees(p, x, *, state):
    h, y = recur(p, state["h"][0], x)
    return y, {"new": {"h": (h,), "n": state["n"] + 1}}


def last(p, x, h):
    return jnp.tanh(x @ p["w"] + h @ p["u"])


def only_in(p, mean, x):
    return (x @ p["w"] - mean[None]) @ p["v"]


STATE = {"h": (H,), "n": jnp.zeros((), int)}
SPELLINGS = {
    "pair": (recur, (H, X), {}, (1, 0)),
    "dict": (recur, (H, X), {}, {1: 0}),
    "keyword and tree": (trees, (X,), {"state": STATE}, ("state", "1/new")),
    "path": (trees, (X,), {"state": STATE}, {"state/h": "1/new/h"}),
    "whole result": (last, (X, H), {}, (2, "")),
    "does not come back": (only_in, (H[0], X), {}, {1: None}),
}


QUICK = ("pair", "keyword and tree")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SPELLINGS]
)
def test_a_carry_is_named_by_its_places(name):
    fn, inputs, keywords, carry = SPELLINGS[name]
    params = {k: w for k, w in PARAMS.items() if fn is not only_in or k != "u"}
    params = {k: w for k, w in params.items() if fn is not last or k != "v"}
    (group,) = groups = jp.find_groups(fn, params, *inputs, carry=carry, **keywords)
    assert group.size == 6
    masks = half(groups, params)
    assert jp.verify_shrink(fn, params, masks, *inputs, carry=carry, **keywords) < 1e-6
    small_fn, small = jp.shrink(fn, params, masks, *inputs, carry=carry, **keywords)
    out = jax.eval_shape(small_fn, small, *inputs, **keywords)
    assert {x.shape for x in jax.tree.leaves(out)} <= {(2, 3), ()}


@pytest.mark.parametrize(
    "carry, error, words",
    [
        ((3, 0), ValueError, "names the argument 3.*beside the params are '1', '2'"),
        ((0, 0), ValueError, "names the argument 0.*from 0, which are the params"),
        (("h", 0), ValueError, "names the argument 'h'"),
        ((1, 7), ValueError, "result 7, but.*nothing comes out; the results are '0', '1'"),
        ((1, 1), ValueError, r"float32\[2, 6\]'\] goes in and.*float32\[2, 3\]'\] comes out"),
        (1, TypeError, r"`carry=1` is neither a pair nor.*`carry=\(1, 0\)`"),
    ],
)
def test_a_carry_that_is_not_there_is_refused(carry, error, words):
    with pytest.raises(error, match=words):
        jp.find_groups(recur, PARAMS, H, X, carry=carry)


def test_shrink_has_to_see_how_large_the_whole_carry_is():
    with pytest.raises(TypeError, match=r"`shrink\(carry=...\)` needs inputs"):
        jp.shrink(recur, PARAMS, {}, carry=(1, 0))


# What it starts from.


def sums(p, h, x):
    h = jnp.tanh(x @ p["w"] + h)
    return h, h @ p["v"] + h.sum(-1, keepdims=True)


def fills(p, h, x):
    h = jnp.tanh(x @ p["w"] + h) + 1.0
    return h, h @ p["v"] + h.sum(-1, keepdims=True)


def test_groups_are_exact_for_a_carry_that_starts_from_zeros_and_stays_there():
    params = {k: PARAMS[k] for k in "wv"}
    (group,) = groups = jp.find_groups(sums, params, H, X, carry=(1, 0))
    masks = half(groups, params)
    assert group.exact
    assert jp.verify_shrink(sums, params, masks, jnp.zeros_like(H), X, carry=(1, 0)) < 1e-6
    assert jp.verify_shrink(sums, params, masks, H, X, carry=(1, 0)) > 1e-2  # as it is given
    (group,) = jp.find_groups(fills, params, H, X, carry=(1, 0))
    assert not group.exact and "sums what is not zero" in group.reason


# In libraries.


class Agent(nn.Module):
    """As in PPO with memory: an embedding, a cell that is scanned and reset, two heads."""

    cell: type

    @nn.compact
    def __call__(self, carry, inputs):
        x, done = inputs
        scanned = nn.scan(
            self._step, variable_broadcast="params", split_rngs={"params": False}, in_axes=0
        )
        x = nn.relu(nn.Dense(6)(x))
        carry, h = scanned(self.cell(features=6, name="cell"), carry, (x, done))
        return carry, nn.Dense(2)(nn.relu(nn.Dense(5)(h))), nn.Dense(1)(h)

    @staticmethod
    def _step(cell, carry, inputs):
        x, done = inputs
        zero = cell.initialize_carry(jax.random.key(0), x.shape)
        carry = jax.tree.map(lambda new, old: jnp.where(done[:, None], new, old), zero, carry)
        return cell(carry, x)


def agent(cell):
    """An agent, its variables, a carry that is not zero, and observations with resets."""
    x, done = draw(1, 3, 2, 4), jnp.array([[0, 1], [0, 0], [1, 0]], bool)
    carry = cell(features=6).initialize_carry(jax.random.key(0), (2, 6))
    carry = jax.tree.map(jnp.ones_like, carry)
    shapes = jax.eval_shape(Agent(cell).init, jax.random.key(0), carry, (x, done))
    variables = jax.tree.map(lambda s: 0.5 * draw(s.size, *s.shape), shapes)
    return Agent(cell).apply, variables, carry, (x, done)


CELLS = (nn.GRUCell, nn.OptimizedLSTMCell, nn.LSTMCell, nn.SimpleCell)


@pytest.mark.parametrize("cell", CELLS[:2])
def test_the_core_of_an_agent_with_memory_is_a_group(cell):
    fn, variables, carry, inputs = agent(cell)
    groups = jp.find_groups(fn, variables, carry, inputs, carry=(1, 0))
    assert sorted(g.size for g in groups) == [5, 6, 6] and all(g.exact for g in groups)
    masks = half(groups, variables)
    small_fn, small = jp.shrink(fn, variables, masks, carry, inputs, carry=(1, 0))
    new, *heads = jax.eval_shape(small_fn, small, carry, inputs)
    assert {h.shape for h in jax.tree.leaves(new)} == {(2, 3)}
    assert [h.shape for h in heads] == [(3, 2, 2), (3, 2, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_the_core_of_an_agent_computes_what_the_masked_one_does(cell):
    fn, variables, carry, inputs = agent(cell)
    masks = half(jp.find_groups(fn, variables, carry, inputs, carry=(1, 0)), variables)
    assert jp.verify_shrink(fn, variables, masks, carry, inputs, carry=(1, 0)) < 1e-5


class Net(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return self.b(nnx.relu(self.norm(self.a(x))))


def split_net(training):
    """A function of params and statistics, both as shapes, and where the statistics come back."""
    net = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def fn(params, rest, x):
        net = nnx.merge(graph, params, rest)
        net.train() if training else net.eval()
        out = net(x)
        return (out, nnx.state(net, nnx.BatchStat)) if training else out

    return fn, params, rest, (1, 1 if training else None)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_nnx_beside_the_params_are_a_carry(training):
    fn, params, rest, carry = split_net(training)
    assert not jp.find_groups(fn, params, rest, X)
    (group,) = groups = jp.find_groups(fn, params, rest, X, carry=carry)
    assert group.size == 6 and group.exact
    small_fn, small = jp.shrink(fn, params, half(groups, params), rest, X, carry=carry)
    out = jax.eval_shape(small_fn, small, rest, X)
    if training:
        assert out[1]["norm"]["mean"].get_value().shape == (3,)
        assert jax.eval_shape(small_fn, small, out[1], X)[0].shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_nnx_beside_the_params_are_cut_as_masked(training):
    fn, params, rest, carry = split_net(training)
    params, rest = jax.tree.map(lambda s: 1 + 0.3 * draw(s.size, *s.shape), (params, rest))
    masks = half(jp.find_groups(fn, params, rest, X, carry=carry), params)
    assert jp.verify_shrink(fn, params, masks, rest, X, carry=carry) < 1e-6
