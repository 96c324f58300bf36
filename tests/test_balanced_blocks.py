"""As many blocks of every column stay: whatever found the masks, and however they move."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import criteria, patterns, schedules, scopes
from tests.helpers import assert_trees_equal, assert_zero_where_removed, fast_if, slow_keep

KEY = jax.random.key(3)
LAYOUT = jp.Layout(
    {
        "up": ("layer", "in", "out"),
        "down": ("out", "in"),
        "conv": ("window", "window", "in", "out"),
    }
)
BLOCKS = patterns.Blocks((4, 2), axes=("in", "out"))
BALANCED = {"pattern": BLOCKS, "scope": scopes.per_output, "layout": LAYOUT}
EVENTS = {"begin": 0, "end": 4, "every": 2}
METHODS = {"rigl": jp.dynamic.rigl, "set": functools.partial(jp.dynamic.set, key=KEY)}
STEPS = 6
LR = 0.25

# Leaves of the network as `[layers, inputs, outputs]`; blocks lie inside of each place of a window.
AS_MATRICES = {
    "up": lambda x: x,
    "down": lambda x: x.T[None],
    "conv": lambda x: x.reshape(1, 16, 4),
}


def network(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"up": (3, 16, 8), "down": (8, 16), "conv": (2, 1, 8, 4)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def stack(seed=0):
    """One of the leaves, the others None: quicker to compile."""
    return {**dict.fromkeys(AS_MATRICES), "up": network(seed)["up"]}


def columns(name, x):
    """The mean of each block, `[layers, columns, blocks]`."""
    x = AS_MATRICES[name](np.asarray(x, np.float64))
    layers, inputs, outputs = x.shape
    blocks = x.reshape(layers, inputs // 4, 4, outputs // 2, 2).mean((2, 4))
    return blocks.transpose(0, 2, 1)


def assert_balanced(masks, sparsity=0.5):
    for name, m in masks.items():
        if m is None:
            continue
        kept = columns(name, m)
        assert set(np.unique(kept)) <= {0.0, 1.0}, name  # a block lives or dies as one
        want = kept.shape[-1] - round(sparsity * kept.shape[-1])
        assert (kept.sum(-1) == want).all(), (name, kept.sum(-1))


def cut(params, mesh, axis):
    """Lay the leaves out over a mesh, along one of their axes."""
    spec = lambda x: P(*("x" if i == axis % x.ndim else None for i in range(x.ndim)))
    return {
        k: x if x is None else jax.device_put(x, NamedSharding(mesh, spec(x)))
        for k, x in params.items()
    }


def train(tx, params, steps=STEPS, **extra):
    """Params and masks after every step, and the gradients that led there."""
    like = lambda tree: {name: None if params[name] is None else tree[name] for name in params}
    place = lambda p, g: jax.device_put(g, p.sharding)
    grads = [jax.tree.map(place, params, like(network(10 + i))) for i in range(steps)]
    step, state, history = jax.jit(functools.partial(tx.update, **extra)), tx.init(params), []
    before = jp.get_masks(state)
    for g in grads:
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        history.append((params, jp.get_masks(state)))
    return before, history, grads


# Drop and grow


def slow_event(worth, promise, alive, fraction):
    """Move units of one layer, `[columns, blocks]` each: the worst of it, grown where they were."""
    kept = int(alive.sum())
    stay = slow_keep(worth, kept - math.floor(fraction * kept + 1e-3), alive)
    new = np.zeros_like(alive)
    for c, (mine, lost) in enumerate(zip(alive, (alive & ~stay).sum(1), strict=True)):
        moving = min(int(lost), int((~mine).sum()))
        new[c] = slow_keep(worth[c], int(mine.sum()) - moving, mine)
        new[c] |= slow_keep(promise[c], moving, ~mine)
    return new


@pytest.mark.parametrize(
    ("name", "sparsity", "devices"),
    fast_if(
        lambda *case: case == ("rigl", 0.5, 8),
        [(n, s, d) for n in METHODS for s in (0.25, 0.5, 0.75) for d in (1, 8)],
    ),
)
def test_masks_that_move_are_those_of_a_slow_loop(name, sparsity, devices):
    sparsities = scopes.uniform(network(), sparsity, layout=LAYOUT)
    settings = {"sparsity": sparsities, "drop_fraction": 0.9, "packed": devices > 1, **EVENTS}
    tx = METHODS[name](optax.sgd(LR), **settings, **BALANCED)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    old, history, all_grads = train(tx, cut(network(), mesh, -2))  # each has a part of a block
    assert_balanced(old, sparsity)
    w, moves = network(), 0
    for step, ((params, new), grads) in enumerate(zip(history, all_grads, strict=True)):
        promise = grads
        if name == "set":
            promise = criteria.random(grads, key=jax.random.fold_in(KEY, step))
        fraction = 0.9 / 2 * (1 + math.cos(math.pi * min(step / 4, 1)))
        for path in w:
            moved = np.where(old[path], w[path] - LR * grads[path], 0)
            was, now = (columns(path, m[path]) > 0 for m in (old, new))
            layers = zip(
                columns(path, abs(moved)), columns(path, abs(promise[path])), was, strict=True
            )
            want = [slow_event(*layer, fraction) for layer in layers] if step in (0, 2, 4) else was
            np.testing.assert_array_equal(now, want, f"{path} at {step}")
            w[path] = np.where(old[path] & new[path], moved, 0)
            moves += (was != now).sum()
        assert_balanced(new, sparsity)
        assert_zero_where_removed(params, new)
        old = new
    assert moves > 30


@jax.jit
def event(masks, params, grads, fraction):
    """Masks after one event of given masks."""
    settings = {"sparsity": 0.5, "begin": 0, "end": 1, "every": 1, "scope": scopes.per_output}
    tx = jp.dynamic.rigl(optax.sgd(0.0), drop_fraction=fraction, **settings)
    state = jp.with_masks(tx.init({"w": params}), {"w": masks > 0})
    state = tx.update({"w": grads}, state, {"w": params})[1]
    return jp.get_masks(state)["w"].astype(int)


def moved(rows, grads, fraction):
    """The same of the rows that are kept at first, and gradients of the others; five in all."""
    params = jnp.zeros((5, 2)).at[: len(rows)].set(jnp.array(rows, float))
    grads = jnp.zeros((5, 2)).at[len(rows) :].set(jnp.array(grads, float))
    return event(params, params, grads, fraction).tolist()


def test_the_worst_of_the_leaf_are_dropped_and_as_many_grow_in_the_same_output():
    rows, grads = [[1, 3], [2, 4]], [[1, 8], [2, 8], [3, 8]]
    assert moved(rows, grads, 0.5) == [[0, 1], [0, 1], [0, 0], [1, 0], [1, 0]]


def test_an_output_moves_as_many_as_it_has_zeros():
    rows, grads = [[1, 5], [2, 6], [3, 7], [4, 8]], [[1, 1]]
    assert moved(rows, grads, 0.5) == [[0, 1], [1, 1], [1, 1], [1, 1], [1, 0]]  # not all four
    assert moved(rows, grads, 1.0) == [[0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]


def test_of_few_units_in_each_output_some_move_all_the_same():
    grads = [[1, 1], [2, 2], [4, 4], [3, 3]]
    half = moved([[1, 2]], grads, 0.5)  # one of two, though half of one rounds to none
    assert half == [[0, 1], [0, 0], [0, 0], [1, 0], [0, 0]]


def test_of_a_number_each_output_loses_what_erk_gives_the_leaf():
    params = network()
    tx = jp.dynamic.rigl(optax.sgd(LR), sparsity=0.5, **EVENTS, **BALANCED)
    masks = jp.get_masks(tx.init(params))
    shares = scopes.erk(params, 0.5, layout=LAYOUT)
    assert len({float(s) for s in jax.tree.leaves(shares)}) > 1
    for path, share in shares.items():
        assert_balanced({path: masks[path]}, float(share))


def one_event(params, grads, **settings):
    """Masks before and after an event of a single leaf."""
    settings = {"sparsity": {"w": 0.5}, "begin": 0, "end": 1, "every": 1, **settings}
    tx = jp.dynamic.rigl(optax.sgd(LR), **settings)

    @jax.jit
    def run(params, grads):
        state = tx.init(params)
        after = tx.update(grads, state, params)[1]
        return jp.get_masks(state)["w"], jp.get_masks(after)["w"]

    return run({"w": params}, {"w": grads})


class Plain:
    """A pattern of somebody's own, who has never heard of layouts: it sees each layer as a leaf."""

    blocks = patterns.Blocks((2, 2))

    def pool(self, scores):
        return self.blocks.pool(scores)

    def expand(self, keep, *, like):
        return self.blocks.expand(keep, like=like)


def test_layers_that_a_pattern_sees_as_leaves_stay_balanced():
    layout = jp.Layout({"w": ("layer", "in", "out")})
    settings = {"pattern": Plain(), "scope": scopes.per_output, "layout": layout}
    before, after = one_event(network()["up"], network(1)["up"], **settings)
    assert (before != after).any() and (after.sum(1) == 8).all()


def per_input(units, sparsity, *, within=None):
    """A scope of somebody's own: of each row the best stay."""
    del within
    gone = lambda u: round(float(sparsity["w"]) * u.shape[1])
    return jax.tree.map(lambda u: jnp.argsort(jnp.argsort(u, axis=1), axis=1) >= gone(u), units)


def test_a_scope_of_ones_own_says_what_stays_balanced():
    per_input.apart = lambda units: [(0,)] * len(jax.tree.leaves(units))
    before, after = one_event(network()["up"][0], network(1)["up"][0], scope=per_input)
    assert (before != after).any() and (after.sum(1) == 4).all()


REFUSED = {
    "across": scopes.across,
    r"windows\(4\)": scopes.windows(4),
    "<lambda>": lambda units, sparsity, **_: units,
    r"functools.partial\(.*": functools.partial(scopes.per_leaf, axis_name="data"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("words", REFUSED)
def test_scopes_that_do_not_say_who_competes_inside_of_a_leaf_are_refused(name, words):
    said = rf"`{name}` grows what it drops.*`{words}` does not say who.*`scope=jp.scopes.per_leaf`"
    with pytest.raises(ValueError, match=said):
        METHODS[name](optax.sgd(LR), sparsity=0.5, scope=REFUSED[words], **EVENTS)


def test_parts_that_do_not_go_together_are_refused_at_the_door():
    settings = {"sparsity": 0.5, "scope": scopes.per_output, **EVENTS}
    with pytest.raises(ValueError, match=r"`per_output`.*`Channels` leaves no inputs to rank"):
        jp.dynamic.rigl(optax.sgd(LR), pattern=patterns.Channels(-1), **settings)
    with pytest.raises(TypeError, match=r"`rigl` got scope='per_output', a string"):
        jp.dynamic.rigl(optax.sgd(LR), **{**settings, "scope": "per_output"})
    tx = jp.dynamic.rigl(optax.sgd(LR), layout=jp.Layout({"w": (None, "in")}), **settings)
    with pytest.raises(ValueError, match=r"`per_output` has to know.*'w' of shape \(4, 4\)"):
        tx.init({"w": jnp.ones((4, 4))})


# Everything else that finds masks


def loss_fn(params, batch):
    return sum(jnp.sum(jnp.sin(w * batch)) for w in jax.tree.leaves(params))


SCHEDULES = {
    "cubic": schedules.cubic(0.5, **EVENTS),
    "linear": schedules.linear(0.5, **EVENTS),
    "geometric": schedules.geometric(1 - 0.5 ** (1 / 3), **EVENTS),
    "one_shot": schedules.one_shot(0.5, at=2),
    "constant": schedules.constant(0.5),
}
CRITERIA = ("magnitude", "taylor", "random", "snip", "movement")
MET = list(zip(SCHEDULES, CRITERIA, strict=True))


@pytest.mark.parametrize(
    ("schedule", "criterion"),
    fast_if(lambda *case: case in MET, [(s, c) for s in SCHEDULES for c in CRITERIA]),
)
def test_pruned_under_every_schedule_by_every_criterion(schedule, criterion):
    settings = {"schedule": SCHEDULES[schedule], "key": KEY, "packed": True}
    tx = jp.prune(optax.sgd(LR), criterion=getattr(criteria, criterion), **settings, **BALANCED)
    extra = {"loss_fn": loss_fn, "batch": jnp.float32(2.0)} if criterion == "snip" else {}
    _, history, _ = train(tx, stack(), **extra)
    assert_balanced(history[-1][1])


def test_straight_through_and_iterative_pruning():
    tx = jp.straight_through(optax.sgd(LR), schedule=SCHEDULES["cubic"], packed=True, **BALANCED)
    assert_balanced(train(tx, stack())[1][-1][1])
    fit = lambda ticket, masks: jax.tree.map(lambda w, g: w + g, ticket, stack(1))
    for level in jp.imp(stack(), fit, rounds=2, rate=0.5, **BALANCED):
        if level.index:
            assert_balanced(level.masks, 1 - 0.5**level.index)


# On eight devices


WEIGHTS = {**BALANCED, "pattern": patterns.Weights()}
WRAPPERS = {
    "rigl": lambda: jp.dynamic.rigl(optax.sgd(LR), sparsity=0.5, **EVENTS, **BALANCED),
    "rigl of weights, packed": lambda: jp.dynamic.rigl(
        optax.sgd(LR), sparsity=0.5, packed=True, **EVENTS, **WEIGHTS
    ),
    "set": lambda: jp.dynamic.set(optax.sgd(LR), key=KEY, sparsity=0.5, **EVENTS, **BALANCED),
    "prune, packed": lambda: jp.prune(
        optax.sgd(LR), schedule=SCHEDULES["cubic"], packed=True, **BALANCED
    ),
}


@functools.cache
def on_one_device(name):
    return train(WRAPPERS[name](), stack(), 3)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "axis", "axis_type"),
    [(n, a, t) for n in WRAPPERS for a in (1, 2) for t in (AxisType.Auto, AxisType.Explicit)],
)
def test_on_eight_devices_masks_are_those_of_one(name, axis, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    params = cut(stack(), mesh, axis)
    there = train(WRAPPERS[name](), params, 3)[1]
    where = params["up"].sharding
    for (params, masks), (_, want) in zip(there, on_one_device(name), strict=True):
        assert_trees_equal(masks, want)
        assert params["up"].sharding.is_equivalent_to(where, 3)
