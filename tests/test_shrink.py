"""What is cut out of params of every kind, of outputs, of optimizer states, and how it is told."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune.patterns import Coupled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def mlp(p, x):
    return jax.nn.relu(x @ p["w"] + p["b"][None]) @ p["v"]


class Pair(NamedTuple):
    w: jax.Array
    v: jax.Array


X = draw(9, 2, 4)
PARAMS = {"w": draw(0, 4, 6), "b": draw(1, 6), "v": draw(2, 6, 3)}


def half(groups, like):
    """Masks that keep the first half of every group."""
    keep = {group.name: np.arange(group.size) < group.size // 2 for group in groups}
    return Coupled(groups).expand(keep, like=like)


@pytest.fixture(scope="module")
def masks():
    return half(jp.find_groups(mlp, PARAMS, X), PARAMS)


# Params of every kind.

TREES = {
    "NamedTuple": (lambda p, x: jnp.tanh(x @ p.w) @ p.v, Pair(PARAMS["w"], PARAMS["v"])),
    "FrozenDict": (lambda p, x: mlp(p["params"], x), FrozenDict({"params": PARAMS})),
    "list": (lambda p, x: jnp.tanh(x @ p[0]) @ p[1], [PARAMS["w"], PARAMS["v"]]),
    "scalars and keys": (
        lambda p, x: mlp(p, x) * p["scale"] * jax.random.uniform(p["key"], (2, 3)),
        {**PARAMS, "scale": jnp.float32(2.0), "key": jax.random.key(3)},
    ),
    "flags and names": (
        lambda p, x: mlp(p, x) if p["name"] == "mlp" and p["flag"] else x,
        {**PARAMS, "name": "mlp", "flag": True, "nothing": None},
    ),
    "half precision": (
        lambda p, x: mlp(p, x.astype(jnp.bfloat16)),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS),
    ),
    "NumPy": (mlp, jax.tree.map(np.asarray, PARAMS)),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow if kind in ("half precision", "NumPy") else ())
        for kind in TREES
    ],
)
def test_params_of_every_kind_are_cut(kind):
    fn, params = TREES[kind]
    masks = half(jp.find_groups(fn, params, X), params)
    small_fn, small = jp.shrink(fn, params, masks)
    assert jax.tree.structure(small) == jax.tree.structure(params)
    assert small_fn(small, X).shape == (2, 3)
    assert jp.size_of(params, masks) == sum(
        leaf.size for leaf in jax.tree.leaves(small) if hasattr(leaf, "size")
    )
    assert jp.verify_shrink(fn, params, masks, X) <= 2e-2 if "half" in kind else 1e-6


def test_shapes_will_do_for_everything_but_running(masks):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype)
    assert jp.find_groups(mlp, shapes, x) == jp.find_groups(mlp, PARAMS, X)
    small_fn, small = jp.shrink(mlp, shapes, masks)
    assert jax.tree.map(lambda leaf: leaf.shape, small) == {"w": (4, 3), "b": (3,), "v": (3, 3)}
    assert jp.count_flops(small_fn, small, x) == 2 * 2 * (4 * 3 + 3 * 3)
    assert jp.count_flops(mlp, shapes, x) == 2 * 2 * (4 * 6 + 6 * 3)
    assert jax.eval_shape(small_fn, small, x).shape == (2, 3)


@pytest.mark.slow
def test_an_nnx_module_is_cut_with_its_statistics_and_draws_the_same_dropout():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
            self.norm, self.drop = nnx.BatchNorm(6, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.b(self.drop(nnx.relu(self.norm(self.a(x)))))

    graph, state = nnx.split(Net(nnx.Rngs(0)))

    def train(state, x):
        net = nnx.merge(graph, state)
        out = net(x)
        return out, nnx.state(net)

    (group,) = groups = jp.find_groups(train, state, X)
    assert {m.path for m in group.members} >= {"norm/mean", "norm/var", "a/kernel", "b/kernel"}
    masks = half(groups, state)
    small_fn, small = jp.shrink(train, state, masks)
    _, new = small_fn(small, X)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, small)
    assert jp.verify_shrink(train, state, masks, X) < 1e-6  # keys and counts are equal, too


def test_small_params_outlive_the_donation_of_one_another(masks):
    _, small = jp.shrink(mlp, PARAMS, jax.tree.map(jnp.ones_like, masks))
    jax.jit(lambda p: jax.tree.map(lambda leaf: leaf + 1, p), donate_argnums=0)(small)
    assert not PARAMS["w"].is_deleted() and PARAMS["w"].shape == (4, 6)


@pytest.mark.slow
def test_an_ensemble_of_small_params_runs_side_by_side(masks):
    small_fn, small = jp.shrink(mlp, PARAMS, masks)
    more = jax.tree.map(lambda leaf: leaf + 1, small)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), small, more)
    out = jax.vmap(small_fn, (0, None))(both, X)
    for got, one in zip(out, (small, more), strict=True):
        np.testing.assert_allclose(got, mlp(one, X), rtol=1e-5, atol=1e-5)


# Outputs, and how far they are off.


def test_outputs_of_every_kind_come_back_as_they_were(masks):
    def fn(p, x):
        h = jax.nn.relu(x @ p["w"] + p["b"][None])
        return {
            "out": h @ p["v"],
            "norm": (h * h).sum(),
            "none": None,
            "one": 1.0,
            "n": jnp.arange(3),
        }

    small_fn, small = jp.shrink(fn, PARAMS, masks)
    got, want = small_fn(small, X), fn(jp.apply_masks(PARAMS, masks), X)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert jp.verify_shrink(fn, PARAMS, masks, X) < 1e-5


def test_a_step_of_training_gives_small_params_from_small_params(masks):
    def step(variables, x):
        grads = jax.grad(lambda p: jnp.sum(mlp(p, x) ** 2))(variables["params"])
        return {"params": jax.tree.map(lambda p, g: p - 0.01 * g, variables["params"], grads)}

    variables = {"params": PARAMS}
    (group,) = (g for g in jp.find_groups(step, variables, X) if g.size == 6)
    assert len(group.members) == 3
    small_fn, small = jp.shrink(step, variables, {"params": masks})
    assert jax.tree.map(jnp.shape, small_fn(small, X)) == jax.tree.map(jnp.shape, small)


@pytest.mark.parametrize(
    "wrong, far", [(lambda x: x * 2.0, 0.5), (lambda x: x / 0.0, np.inf), (lambda x: x, 0.0)]
)
def test_a_rule_that_computes_something_else_is_found_out(masks, wrong, far):
    rules = {"exp": jp.graph.Rule(lambda at: at.ins, lambda at, x: [wrong(jnp.exp(x))])}
    net = lambda p, x: jnp.exp(jnp.tanh(mlp(p, x)))
    got = jp.verify_shrink(net, PARAMS, masks, X, rules=rules)
    np.testing.assert_allclose(got, far, atol=1e-6)


def test_whole_numbers_that_differ_are_a_difference(masks):
    rules = {"argmax": jp.graph.Rule(lambda at: [(None,)], lambda at, x: [jnp.zeros(2, int) - 1])}
    net = lambda p, x: jnp.argmax(mlp(p, x), 1)
    assert jp.verify_shrink(net, PARAMS, masks, X) == 0
    assert jp.verify_shrink(net, PARAMS, masks, X, rules=rules) == 1


# Masks of a part, masks that nothing goes with.


def test_masks_of_a_subtree_do_and_nothing_is_cut_without(masks):
    tree = {"params": PARAMS, "stats": {"mean": draw(5, 6)}}
    fn = lambda v, x: mlp({**v["params"], "b": v["params"]["b"] - v["stats"]["mean"]}, x)
    groups = jp.find_groups(fn, tree, X)
    assert jp.verify_shrink(fn, tree, {"params": masks}, X, groups=groups) < 1e-5
    _, small = jp.shrink(fn, tree, {"params": masks}, groups=groups)
    assert small["stats"]["mean"].shape == (3,)
    for nothing in ({}, {"params": None}, jax.tree.map(lambda _: None, tree)):
        small_fn, small = jp.shrink(fn, tree, nothing)
        assert jp.size_of(tree, nothing) == 54
        np.testing.assert_allclose(small_fn(small, X), fn(tree, X), rtol=1e-6)


def test_masks_that_were_carried_over_are_compared_with_the_network_that_was_trained():
    """Masks of kernels' columns leave the biases on: without them the network is another one."""
    groups = jp.find_groups(mlp, PARAMS, X)
    columns = {"w": jnp.array([[True, False] * 3])}
    masked = mlp(jp.apply_masks(PARAMS, {**columns, "b": None, "v": None}), X)
    small_fn, small = jp.shrink(mlp, PARAMS, columns, groups=groups)
    got = small_fn(small, X)
    want = float(jnp.abs(masked - got).max() / jnp.abs(got).max())
    far = jp.verify_shrink(mlp, PARAMS, columns, X, groups=groups)
    np.testing.assert_allclose(far, want, rtol=1e-5)
    assert far > 0.1
    without = {**PARAMS, "b": PARAMS["b"].at[1::2].set(0.0)}  # trained with its biases off
    assert jp.verify_shrink(mlp, without, columns, X, groups=groups) < 1e-6


def test_statistics_that_go_with_their_channels_make_no_difference():
    """A running mean is no weight: where the gain behind it is masked it does not matter."""
    tree = {"params": {**PARAMS, "g": draw(6, 6)}, "stats": {"mean": draw(5, 6)}}

    def fn(v, x):
        p, mean = v["params"], v["stats"]["mean"]
        return (jax.nn.relu((x @ p["w"] - mean[None]) * p["g"][None] + p["b"][None])) @ p["v"]

    groups = jp.find_groups(fn, tree, X)
    given = {"params": half(groups.at("params"), tree["params"])}
    assert "stats" not in given
    assert jp.verify_shrink(fn, tree, given, X, groups=groups) < 1e-6


def test_integers_that_differ_are_told_beside_large_numbers(masks):
    rules = {"argmax": jp.graph.Rule(lambda at: [(None,)], lambda at, x: [jnp.zeros(2, int) - 1])}
    net = lambda p, x: (jnp.argmax(mlp(p, x), 1), 1e6 * mlp(p, x))
    assert jp.verify_shrink(net, PARAMS, masks, X, rules=rules) == 1


# Keyword arguments of the function.


def noisy(p, x, *, train, rngs, scale=1.0):
    h = jax.nn.relu(x @ p["w"] + p["b"][None])
    if train:
        h = jnp.where(jax.random.bernoulli(rngs["dropout"], 0.5, h.shape), h / 0.5, 0)
    return scale * h @ p["v"]


def test_keywords_of_the_function_go_in_as_they_are():
    rngs = {"dropout": jax.random.key(1)}
    (group,) = groups = jp.find_groups(noisy, PARAMS, X, train=True, rngs=rngs)
    assert group.size == 6
    masks = half(groups, PARAMS)
    small_fn, small = jp.shrink(noisy, PARAMS, masks)
    masked = jp.apply_masks(PARAMS, masks)
    settings = ({"train": True, "scale": 2.0}, {"train": False})
    wanted = [noisy(masked, X, rngs=rngs, **how) for how in settings]
    for how, want in zip(settings, wanted, strict=True):
        np.testing.assert_allclose(small_fn(small, X, rngs=rngs, **how), want, rtol=1e-5, atol=1e-6)
    traced = jax.jit(small_fn, static_argnames="train")(small, X, train=True, rngs=rngs)
    np.testing.assert_allclose(
        traced, noisy(masked, X, train=True, rngs=rngs), rtol=1e-5, atol=1e-6
    )
    assert jp.verify_shrink(noisy, PARAMS, masks, X, train=True, rngs=rngs) < 1e-6
    flops = jp.count_flops(noisy, PARAMS, X, train=True, rngs=rngs)
    assert flops == 2 * jp.count_flops(small_fn, small, X, train=True, rngs=rngs)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.relu(x)))


def test_linen_apply_takes_its_own_keywords():
    net, rngs = Dropped(), {"dropout": jax.random.key(1)}
    shapes = jax.eval_shape(lambda key: net.init(key, X, train=False), jax.random.key(0))
    how = {"train": True, "rngs": rngs, "mutable": ["batch_stats"]}
    (group,) = groups = jp.find_groups(net.apply, shapes, X, **how)
    assert len(group.members) == 7
    small_fn, small = jp.shrink(net.apply, shapes, half(groups, shapes))
    out, new = jax.eval_shape(lambda v, x: small_fn(v, x, **how), small, X)
    assert out.shape == (2, 3) and new["batch_stats"]["BatchNorm_0"]["mean"].shape == (3,)
    assert jax.eval_shape(lambda v, x: small_fn(v, x, train=False), small, X).shape == (2, 3)


def test_a_keyword_that_looks_like_a_typing_error_is_refused(masks):
    anything = lambda p, x, **_: mlp(p, x)
    named = lambda p, x, rule=None: mlp(p, x)
    for call in (
        lambda: jp.find_groups(anything, PARAMS, X, rule={}),
        lambda: jp.find_blocks(anything, PARAMS, X, rule={}),
        lambda: jp.shrink(anything, PARAMS, masks, X, rule={}),
        lambda: jp.verify_shrink(anything, PARAMS, masks, X, rule={}),
    ):
        with pytest.raises(TypeError, match=r"got rule=, which `fn` does not name.*rules="):
            call()
    assert jp.find_groups(named, PARAMS, X, rule=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nobody'"):
        jp.find_groups(mlp, PARAMS, X, nobody=3)


# Modules in the place of functions.


def modules():
    import equinox as eqx
    import haiku as hk

    equinox = eqx.nn.Linear(4, 3, key=jax.random.key(0))
    return {
        "linen": (
            nn.Dense(3),
            "got a Dense instead of a function of its parameters.",
        ),
        "haiku": (hk.transform(mlp), r"got a Transformed.*Pass its `apply`"),
        "equinox": (equinox, r"a Linear, which holds its.*with the model as params"),
        "nnx": (nnx.Linear(4, 3, rngs=nnx.Rngs(0)), r"a Linear, which holds its.*nnx.merge"),
        "nothing": (None, "got a NoneType instead of a function"),
    }


@pytest.mark.parametrize("name", ["linen", "haiku", "equinox", "nnx", "nothing"])
def test_a_module_is_no_function_of_its_parameters(name, masks):
    module, words = modules()[name]
    for call in (
        lambda: jp.find_groups(module, PARAMS, X),
        lambda: jp.find_groups(module, X),
        lambda: jp.find_blocks(module, PARAMS, X),
        lambda: jp.shrink(module, PARAMS, masks),
        lambda: jp.verify_shrink(module, PARAMS, masks, X),
        lambda: jp.count_flops(module, PARAMS, X),
    ):
        with pytest.raises(TypeError, match=words):
            call()


# Arrays that a donated state took along.


def test_masks_of_a_donated_state_are_told_from_living_ones(masks):
    tx = jp.hold(optax.sgd(0.1), where=lambda path, _: True)
    state = jp.with_masks(tx.init(PARAMS), masks)
    gone = state.masks
    for mask in jax.tree.leaves(gone):
        mask.delete()
    for call in (
        lambda: jp.apply_masks(PARAMS, gone),
        lambda: jp.summary(PARAMS, gone),
        lambda: jp.sparsity(gone, PARAMS),
        lambda: jp.combine_masks(gone, gone),
        lambda: jp.shrink(mlp, PARAMS, gone),
        lambda: jp.verify_shrink(mlp, PARAMS, gone, X),
        lambda: jp.shrink_state(tx, state, PARAMS, gone),
        lambda: jp.get_masks(state),
    ):
        with pytest.raises(
            ValueError, match=r"'b', 'v', 'w' have been deleted.*donated.*get_masks"
        ):
            call()


def test_the_small_function_refuses_another_tree_and_names_what_it_was_called_with(masks):
    small_fn, small = jp.shrink(mlp, PARAMS, masks)
    with pytest.raises(ValueError, match="wants params of the structure"):
        small_fn({"w": small["w"]}, X)
    with pytest.raises(ValueError, match=r"'w' has shape \(4, 6\), wanted \(4, 3\)"):
        small_fn({**small, "w": PARAMS["w"]}, X)
    with pytest.raises(TypeError) as error:
        small_fn(small, jnp.ones((2, 5)))
    assert "3 parameter arrays and float32[2, 5]" in "".join(error.value.__notes__)


def test_an_axis_of_one_index_cannot_go():
    net = lambda p, x: (x @ p["w"]) @ p["v"]
    params = {"w": jnp.ones((4, 1)), "v": jnp.ones((1, 3))}
    small_fn, small = jp.shrink(net, params, cut={"w": {1: []}, "v": {0: []}})
    with pytest.raises(ValueError, match="remove all of 'v', 'w'"):
        small_fn(small, X)


def test_a_cut_of_indices_out_of_order_is_refused():
    for indices in ([2, 0], [0, 0], [-1, 2], [6]):
        with pytest.raises(ValueError, match=r"of axis 0 of 'b'.*\(6,\).*increasing"):
            jp.shrink(mlp, PARAMS, cut={"b": {"0": indices}})
    with pytest.raises(ValueError, match="no such path"):
        jp.shrink(mlp, PARAMS, cut={"nobody": {0: [1]}})


@pytest.mark.parametrize("where", ["pure_callback", "debug_callback"])
def test_callbacks_to_the_host_still_run_in_the_small_function(where):
    seen = []

    def net(p, x):
        if where == "debug_callback":
            jax.debug.callback(lambda total: seen.append(float(total)), mlp(p, x).sum())
            return mlp(p, x)
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return mlp(p, jax.pure_callback(lambda x: seen.append(1) or np.asarray(x), like, x))

    groups = jp.find_groups(net, PARAMS, X)  # no warning: they touch nothing that could be cut
    masks = half(groups, PARAMS)
    small_fn, small = jp.shrink(net, PARAMS, masks)
    want = mlp(jp.apply_masks(PARAMS, masks), X)
    np.testing.assert_allclose(small_fn(small, X), want, rtol=1e-5)
    jax.effects_barrier()
    assert len(seen) == 1


# Optimizer states.


def label(params):
    return {"w": "a", "b": "b", "v": "b"}


KINDS = {
    "coupled": {},
    "memory": {"criterion": jp.criteria.movement},
    "key": {"criterion": jp.criteria.random, "key": jax.random.key(0)},
    "packed": {"packed": True},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k == "coupled" else pytest.mark.slow) for k in KINDS]
)
def test_after_a_cut_training_goes_on_with_hold(kind):
    """Whatever the pruner was: of it only the masks are left, and they are dense."""
    pattern = Coupled(jp.find_groups(mlp, PARAMS, X))
    schedule = jp.schedules.constant(0.5)
    pruner = jp.prune(optax.adam(0.1), schedule=schedule, pattern=pattern, **KINDS[kind])
    _, state = pruner.update(PARAMS, pruner.init(PARAMS), PARAMS)
    found = jp.get_masks(state)
    _, small = jp.shrink(mlp, PARAMS, found)
    tx = jp.hold(optax.adam(0.1), packed=kind == "packed")
    cut = jp.shrink_state(tx, state, PARAMS, found)
    fresh = tx.init(small)
    assert jax.tree.structure(cut) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, fresh)
    assert jp.sparsity(jp.get_masks(cut), small) == 0
    moments = state.inner_state[0].mu["w"][:, found["b"]]
    np.testing.assert_array_equal(cut.inner_state[0].mu["w"], moments)
    updates, _ = tx.update(small, cut, small)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, small)


@pytest.mark.slow
def test_what_was_trained_straight_through_goes_on_with_hold(masks):
    through = jp.straight_through(optax.adam(0.1), schedule=jp.schedules.constant(0.5))
    _, state = through.update(PARAMS, through.init(PARAMS), PARAMS)
    tx = jp.hold(optax.adam(0.1))
    cut = jp.shrink_state(tx, state, PARAMS, masks)
    assert jax.tree.structure(cut) == jax.tree.structure(tx.init(PARAMS))
    _, small = jp.shrink(mlp, PARAMS, masks)
    assert jp.sparsity(jp.get_masks(cut), small) > 0
    tx.update(small, cut, small)


@pytest.mark.slow
def test_single_weights_that_were_removed_stay_so_after_a_cut(masks):
    tx = jp.prune(optax.adam(0.1), schedule=jp.schedules.constant(0.25))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    single = jp.get_masks(state)
    hold = jp.hold(optax.adam(0.1))
    cut = jp.get_masks(jp.shrink_state(hold, state, PARAMS, masks))
    np.testing.assert_array_equal(cut["w"], single["w"][:, :3])
    np.testing.assert_array_equal(cut["v"], single["v"][:3])
    assert cut["b"] is None and not cut["w"].all()


def wrapped():
    pruner = jp.prune(optax.sgd(0.1), schedule=jp.schedules.linear(0.5, begin=0, end=9, every=1))
    through = jp.straight_through(
        optax.sgd(0.1), schedule=jp.schedules.constant(0.5, end=9, every=1)
    )
    return {
        "alone": pruner,
        "chain": optax.chain(optax.clip(1.0), pruner),
        "partition": optax.partition({"a": pruner, "b": optax.sgd(0.1)}, label),
        "MultiSteps": optax.MultiSteps(pruner, 2).gradient_transformation(),
        "straight_through": through,
    }


@pytest.mark.parametrize("name", wrapped())
def test_a_pruner_with_events_to_come_is_refused_with_what_to_go_on_with(masks, name):
    tx = wrapped()[name]
    with pytest.raises(ValueError, match=r"events to come: its schedule ends at update 9, and 0 .*"
                       r"`tx = jp.hold\(inner\)`"):  # fmt: skip
        jp.shrink_state(tx, tx.init(PARAMS), PARAMS, masks)


def test_whole_variables_are_told_from_what_the_optimizer_got(masks):
    tx = optax.adam(0.1)
    whole = {"params": PARAMS, "batch_stats": {"mean": draw(5, 6)}}
    with pytest.raises(ValueError, match=r"another tree.*'params/b'.*tx.init` got.*\[\"params\"\]"):
        jp.shrink_state(tx, tx.init(PARAMS), whole, {"params": masks})
    with pytest.raises(ValueError, match="another tree"):  # an optimizer of another kind
        jp.shrink_state(optax.sgd(0.1), tx.init(PARAMS), PARAMS, masks)


def test_the_state_of_an_nnx_optimizer_is_cut_with_its_variables():
    class Net(nnx.Module):
        def __init__(self):
            self.w, self.v = nnx.Param(PARAMS["w"]), nnx.Param(PARAMS["v"])
            self.mean = nnx.BatchStat(draw(5, 6))

        def __call__(self, x):
            return jnp.tanh(x @ self.w[...] - self.mean[...][None]) @ self.v[...]

    net, tx = Net(), optax.adam(0.1)
    graph, state = nnx.split(net)
    fn = lambda state, x: nnx.merge(graph, state)(x)
    groups = jp.find_groups(fn, state, X)
    params = nnx.state(net, nnx.Param)
    masks = jp.find_masks(params, 0.5, pattern=Coupled(groups.at(params)))
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    optimizer.update(net, params)
    cut = jp.shrink_state(tx, optimizer.opt_state, params, masks)
    _, small = jp.shrink(fn, state, masks, groups=groups)
    again = nnx.Optimizer(nnx.merge(graph, small), tx, wrt=nnx.Param)
    assert jax.tree.structure(cut) == jax.tree.structure(again.opt_state)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, again.opt_state)
    kept = np.nonzero(np.asarray(jax.tree.leaves(masks["v"])[0])[:, 0])[0]
    mu = optimizer.opt_state[0].mu["w"].get_value()
    np.testing.assert_array_equal(cut[0].mu["w"].get_value(), mu[:, kept])
    pruner = nnx.Optimizer(net, jp.hold(tx), wrt=nnx.Param)
    cut = jp.shrink_state(jp.hold(tx), pruner.opt_state, params, masks)
    again = nnx.Optimizer(nnx.merge(graph, small), jp.hold(tx), wrt=nnx.Param)
    assert jax.tree.structure(cut) == jax.tree.structure(again.opt_state)
    with pytest.raises(TypeError, match=r"a Optimizer instead of an optimizer state.*`opt_state`"):
        jp.shrink_state(tx, optimizer, params, masks)


def test_sums_along_each_axis_are_cut_as_the_axis():
    params = {"k": draw(1, 2, 4, 6), "b": draw(2, 6)}
    keep = jnp.array([True, True, False] * 2)
    tx = optax.sm3(0.1)
    _, state = tx.update(params, tx.init(params), params)
    cut = jp.shrink_state(tx, state, params, {"k": keep[None, None], "b": keep})
    mu, old = cut[0].mu, state[0].mu
    assert [m.shape for m in mu["k"]] == [(2,), (4,), (4,)] and mu["b"][0].shape == (4,)
    np.testing.assert_array_equal(mu["k"][2], old["k"][2][keep])
    np.testing.assert_array_equal(mu["k"][1], old["k"][1])


OPTIMIZERS = {
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1), optax.ema(0.9)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(0.1),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "b": False, "v": True}),
    "multi_transform": optax.multi_transform(
        {"a": optax.sgd(0.1, momentum=0.9), "b": optax.adam(0.1)}, label
    ),
    "MultiSteps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "muon": optax.contrib.muon(0.1),
    "sm3": optax.sm3(0.1),
    "prune, packed": jp.prune(optax.adam(0.1), schedule=jp.schedules.constant(0.5), packed=True),
    "rigl": jp.dynamic.rigl(optax.adam(0.1), sparsity=0.5, begin=0, end=9, every=1),
}
QUICK = ("chain",)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPTIMIZERS],
)
def test_a_state_is_cut_and_takes_the_next_step(masks, name):
    tx = OPTIMIZERS[name]
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    _, small = jp.shrink(mlp, PARAMS, masks)
    cut = jp.shrink_state(tx, state, PARAMS, masks)
    fresh = tx.init(small)
    assert jax.tree.structure(cut) == jax.tree.structure(fresh)
    assert jax.tree.map(jnp.shape, cut) == jax.tree.map(jnp.shape, fresh)
    updates, after = tx.update(small, cut, small)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, small)
    assert jax.tree.structure(after) == jax.tree.structure(cut)


def test_training_goes_on_as_that_of_the_masked_network(masks):
    """The same numbers: moments are cut and not begun anew."""
    tx = optax.adam(0.1)
    fit = lambda fn: lambda p: jnp.sum((fn(p, X) - 1.0) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def step(fn, params, state):
        updates, state = tx.update(jax.grad(fit(fn))(params), state, params)
        return optax.apply_updates(params, updates), state

    large = jp.apply_masks(PARAMS, masks), tx.init(PARAMS)
    large = step(mlp, *large)
    large = jp.apply_masks(large[0], masks), large[1]
    small_fn, small = jp.shrink(mlp, large[0], masks)
    state = jp.shrink_state(tx, large[1], PARAMS, masks)
    for _ in range(2):
        small, state = step(small_fn, small, state)
        large = step(mlp, *large)
        large = jp.apply_masks(large[0], masks), large[1]
    _, want = jp.shrink(mlp, large[0], masks)
    for got, wanted in zip(jax.tree.leaves(small), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


# Budgets.


def test_budgets_are_met_from_above_and_never_searched_for_in_vain(masks):
    tried = []

    def find(sparsity):
        tried.append(sparsity)
        return sparsity

    cost = lambda sparsity: 1 - sparsity
    assert jp.masks_within_budget(find, cost, 1.0) == 0.0 and tried == [0.0]
    found = jp.masks_within_budget(find, cost, 0.3)
    assert 0.7 <= found <= 0.7 + 1 / 1024 and len(tried) == 1 + 12
    assert jp.masks_within_budget(find, cost, 0.0) == 1.0
    with pytest.raises(ValueError, match=r"cannot reach a budget of -1: at sparsity 1.*still 0"):
        jp.masks_within_budget(find, cost, -1)


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_nnx_optimizer_goes_on_after_a_cut_beside_kernels_that_are_in_no_group(packed):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.c = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.skip = nnx.Linear(6, 3, rngs=rngs)  # the pruner has no mask for it, hold has one

        def __call__(self, x):
            return self.c(nnx.relu(self.a(x))) + self.skip(x)

    net, x = Net(nnx.Rngs(0)), draw(4, 6)
    graph, params = nnx.split(net)
    fn = lambda params, x: nnx.merge(graph, params)(x)
    grads = nnx.grad(lambda net: jnp.mean(net(x) ** 2))
    schedule, groups = jp.schedules.constant(0.5), jp.find_groups(fn, params, x)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, pattern=Coupled(groups), packed=packed)
    optimizer = nnx.Optimizer(net, tx, wrt=nnx.Param)
    optimizer.update(net, grads(net))
    params, masks = nnx.state(net, nnx.Param), jp.get_masks(optimizer.opt_state)
    tx = jp.hold(optax.sgd(0.1), packed=packed)
    state = jp.shrink_state(tx, optimizer.opt_state, params, masks)
    small = nnx.merge(graph, jp.shrink(fn, params, masks)[1])
    again = nnx.Optimizer(small, tx, wrt=nnx.Param)
    assert jax.tree.structure(state) == jax.tree.structure(again.opt_state)
    again.opt_state = nnx.data(state)
    again.update(small, grads(small))
    assert small.a.kernel.shape == (6, 4)
    assert jp.sparsity(jp.get_masks(again.opt_state), nnx.state(small, nnx.Param)) == 0.0


def test_the_small_function_runs_where_devices_hold_parts_of_the_data():
    def mlp(p, x):
        return jax.nn.relu(x @ p["up"] + jnp.broadcast_to(p["bias"], (len(x), 6))) @ p["down"]

    draw = np.random.default_rng(0).normal
    params = {"up": draw(size=(4, 6)), "bias": draw(size=6), "down": draw(size=(6, 3))}
    params, x = jax.tree.map(jnp.float32, (params, draw(size=(8, 4))))
    groups = jp.find_groups(mlp, params, x)
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(groups))
    small_fn, small = jp.shrink(mlp, params, masks)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    apart = jax.shard_map(small_fn, mesh=mesh, in_specs=(jax.P(), jax.P("x")), out_specs=jax.P("x"))
    each = jnp.concatenate([small_fn(small, half) for half in jnp.split(x, 2)])
    np.testing.assert_allclose(jax.jit(apart)(small, x), each, rtol=1e-6)


def test_numbers_among_the_params_are_those_that_are_passed():
    fn = lambda p, x: p["scale"] * (jnp.tanh(x @ p["w"]) @ p["v"])
    params = {"scale": 0.5, "w": jnp.arange(12.0).reshape(4, 3) / 9, "v": jnp.ones((3, 2))}
    groups = jp.find_groups(fn, params, jnp.ones((2, 4)))
    masks = jp.find_masks(params, 0.3, pattern=jp.patterns.Coupled(groups))
    small_fn, small = jp.shrink(fn, params, masks)
    half, whole = (small_fn({**small, "scale": s}, jnp.ones((2, 4))) for s in (0.5, 1.0))
    np.testing.assert_allclose(whole, 2 * half, rtol=1e-6)
