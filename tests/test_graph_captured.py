"""Groups of one member, what no data meets, and arrays that a function captures."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

RNG = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
X = draw(4, 5)
KEPT = {"w": draw(5, 8), "v": draw(8, 3)}  # hidden units that can be cut
READ = {"w": draw(8, 6), "u": draw(8, 6), "v": draw(6, 3)}  # two that read the same eight features
FEATURES, SCALES, RATES = draw(4, 8), draw(8), draw(3)
TABLE = np.asarray(FEATURES)


def places(groups):
    return sorted((m.path, m.axis) for group in groups for m in group.members)


def half(groups, params):
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in groups}
    return jp.patterns.Coupled(groups).expand(keep, like=params)


# One member.


TIED = {
    "by hand": lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T,
    "with a bias of the output": lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T + p["b"][None],
    "in jit": jax.jit(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T),
    "summed": lambda p, x: jnp.tanh(x @ p["w"]).sum(-1),
    "a convolution and its transpose": lambda p, x: lax.conv_transpose(
        lax.conv(x.T[None], p["w"].T[:, :, None], (1,), "SAME"), p["w"][:, :, None], (1,), "SAME",
        dimension_numbers=("NCH", "OIH", "NCH"),
    ),
}  # fmt: skip


def cases(table, *quick):
    """The names of a table; all but the quick ones are for the slow suite."""
    marks = lambda name: () if name in quick else pytest.mark.slow
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in table])


@cases(TIED, "by hand")
@pytest.mark.filterwarnings("ignore:`fn` never reads")
def test_a_tied_matrix_is_a_group_of_its_own(name):
    params = {"w": KEPT["w"], "b": draw(5)}
    groups = jp.find_groups(TIED[name], params, X)
    assert places(groups) == [("w", 1)] and groups[0].size == 8 and groups[0].exact
    assert jp.verify_shrink(TIED[name], params, half(groups, params), X) < 1e-5


@pytest.mark.slow
def test_layers_that_equinox_shares_are_a_group():
    eqx = pytest.importorskip("equinox")

    class Autoencoder(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key):
            there, back = (
                eqx.nn.Linear(n, m, use_bias=False, key=key) for n, m in ((5, 8), (8, 5))
            )
            where = lambda pair: pair[1].weight
            self.shared = eqx.nn.Shared((there, back), where, lambda pair: pair[0].weight.T)

        def __call__(self, x):
            there, back = self.shared()
            return back(jax.nn.relu(there(x)))

    params, static = eqx.partition(Autoencoder(jax.random.key(0)), eqx.is_array)
    fn = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    groups = jp.find_groups(fn, params, X)
    assert [group.size for group in groups] == [8] and len(groups[0].members) == 1
    assert jp.verify_shrink(fn, params, half(groups, params), X) < 1e-5


UNREAD = {
    "rows behind the end": (
        lambda p, x: (x + p["e"][:4]) @ p["v"],
        {"e": (9, 5), "v": (5, 3)},
        "5 indices, ",
    ),
    "words of one-hot vectors": (
        lambda p, x: jax.nn.one_hot(jnp.arange(4), 9) @ p["e"] + x,
        {"e": (9, 5)},
        "",
    ),
    "a sum of weights alone": (
        lambda p, x: x * jnp.exp(p["e"]).sum(),
        {"e": (9,)},
        "",
    ),
    "padding": (
        lambda p, x: jnp.pad(x @ p["w"], ((0, 0), (0, 3))) @ p["e"],
        {"w": (5, 6), "e": (9, 3)},
        "3 indices, ",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_no_data_meets_is_frozen_and_said(name):
    fn, shapes, which = UNREAD[name]
    groups = jp.find_groups(fn, {k: draw(*shape) for k, shape in shapes.items()}, X)
    assert f"e axis 0: {which}inputs of these shapes do not reach it" in str(groups)
    assert all(len(group.members) > 1 for group in groups)


def test_a_weight_that_is_returned_anew_is_no_group_by_itself():
    def step(variables, x):
        grads = jax.grad(lambda p: jnp.sum((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2))(variables["p"])
        return {"p": jax.tree.map(lambda p, g: p - 0.01 * g, variables["p"], grads)}

    groups = jp.find_groups(step, {"p": KEPT}, X)
    assert places(groups) == [("p/v", 0), ("p/w", 1)]
    assert "p/v axis 1: `fn` returns its new value" in str(groups)


# Captured arrays.


def table(h):
    """A table that is made whenever the function is called."""
    return h * np.cos(np.arange(8, dtype=np.float32))[None]


MADE = {
    "by NumPy": table,
    "by NumPy in jit": jax.jit(table),
    "by jnp": lambda h: h * jnp.cos(jnp.arange(8.0))[None],
    "a mask": lambda h: h * np.tri(8, dtype=bool)[:1],
    "known places": lambda h: h[:, np.arange(8)[::-1]],
}
CAPTURED = {
    "features": lambda p, x: FEATURES @ p["w"] @ p["v"] + FEATURES @ p["u"] @ p["v"],
    "features of NumPy": lambda p, x: TABLE @ p["w"] @ p["v"] + TABLE @ p["u"] @ p["v"],
    "in jit": lambda p, x: jax.jit(lambda p: (FEATURES @ p["w"] + FEATURES @ p["u"]) @ p["v"])(p),
    "of NumPy, all of it in jit": jax.jit(lambda p, x: (TABLE @ p["w"] + TABLE @ p["u"]) @ p["v"]),
    "behind a function": lambda p, x: (jnp.tanh(FEATURES) @ (p["w"] + p["u"])) @ p["v"],
    "in a partial": functools.partial(
        lambda p, x, features: (features @ (p["w"] + p["u"])) @ p["v"], features=FEATURES
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_tables_that_a_function_makes_are_cut_with_what_they_are_joined_with(name):
    fn = lambda p, x: MADE[name](x @ p["w"]) @ p["v"]
    groups = jp.find_groups(fn, KEPT, X)
    assert places(groups) == [("v", 0), ("w", 1)] and groups[0].exact


@cases(MADE, "by NumPy")
def test_what_is_left_of_a_table_is_what_the_masked_network_has(name):
    fn = lambda p, x: MADE[name](x @ p["w"]) @ p["v"]
    masks = half(jp.find_groups(fn, KEPT, X), KEPT)
    assert jp.verify_shrink(fn, KEPT, masks, X) < 1e-5


@pytest.mark.parametrize("name", CAPTURED)
def test_captured_arrays_stay_whole_as_inputs_do_and_this_is_said(name):
    groups = jp.find_groups(CAPTURED[name], READ, X)
    assert places(groups) == [("u", 1), ("v", 0), ("w", 1)]
    assert "w axis 0: `fn` captures float32[4, 8], which it is joined with" in str(groups)


def test_what_is_scaled_by_a_captured_array_stays_and_is_cut_once_it_is_a_parameter():
    scaled = lambda p, x: (x @ p["w"]) * p["scales"][None] @ p["v"]
    captured = lambda p, x: scaled({**p, "scales": SCALES}, x)
    assert not jp.find_groups(captured, KEPT, X)
    assert "w axis 1: `fn` captures float32[8]" in str(jp.find_groups(captured, KEPT, X))
    (group,) = jp.find_groups(scaled, {**KEPT, "scales": SCALES}, X)
    assert len(group.members) == 3


def test_a_captured_number_for_each_layer_goes_with_its_layer():
    step = lambda h, layer: (h + jnp.tanh(h @ layer[0]) * layer[1], None)
    fn = lambda p, x: lax.scan(step, x, (p["w"], RATES))[0]
    params = {"w": draw(3, 5, 5)}
    blocks = jp.find_blocks(fn, params, X)
    assert len(blocks) == 3 and all(block.exact for block in blocks)
    small_fn, small = jp.shrink(fn, params, blocks.without([blocks[1].name], params))
    want = X
    for i in (0, 2):
        want = want + jnp.tanh(want @ params["w"][i]) * RATES[i]
    np.testing.assert_allclose(small_fn(small, X), want, rtol=1e-5)


# Lines of code that is installed.


def test_code_of_a_package_is_named_by_its_own_line_and_the_users_before_it(tmp_path):
    folder = tmp_path / "site-packages" / "somebody"
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(
        "import jax.numpy as jnp\n\ndef net(p, x):\n    return jnp.sort(x @ p['w'], 1) @ p['v']\n"
    )
    spec = importlib.util.spec_from_file_location("somebody_net", folder / "net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "`sort` at somebody/net.py:4" in str(jp.find_groups(module.net, KEPT, X))
    mine = lambda p, x: -module.net(p, x)
    assert "`sort` at test_graph_captured.py:" in str(jp.find_groups(mine, KEPT, X))
