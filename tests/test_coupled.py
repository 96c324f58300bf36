"""Coupled units are scored, ranked and masked as slow loops over groups built by hand do it."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import scopes
from jaxprune._group import Group, Member
from jaxprune._groups import Groups
from jaxprune.patterns import Coupled
from tests.helpers import assert_trees_equal, slow_keep

REDUCTIONS = {"mean": np.mean, "sum": np.sum, "norm": np.linalg.norm}


def group(name, size, **places):
    """Units that own ``places[path] = (axis, indices)``; a number stands for so many in a row."""
    members = []
    for path, (axis, each) in places.items():
        indices = np.arange(size * each).reshape(size, each) if isinstance(each, int) else each
        members.append(Member(path, axis, np.asarray(indices)))
    return Group(name, tuple(members), size)


# Two layers that are alike, heads of three columns in a kernel of 12, and what heads share.
GROUPS = Groups(
    [
        group("b", 8, in_0=(1, 1), bias_0=(0, 1), out_0=(0, 1)),
        group("a", 6, in_1=(1, 1), bias_1=(0, 1), out_1=(0, 1)),
        group("heads", 4, qkv=(1, 3), proj=(0, 3)),
        group("dims", 3, qkv=(1, np.arange(12).reshape(4, 3).T)),
        group("rows", 5, proj=(1, [[4], [2], [0], [1], [3]])),
    ]
)
SHAPES = {
    **{"in_0": (3, 8), "bias_0": (8,), "out_0": (8, 4)},
    **{"in_1": (3, 6), "bias_1": (6,), "out_1": (6, 4)},
    **{"qkv": (4, 12), "proj": (12, 5), "free": (2, 2)},
}
SPARSITIES = (0.0, 0.1, 0.35, 0.5, 0.8, 1.0)
SCOPES = {
    "per_leaf": (scopes.per_leaf, [["a"], ["b"], ["dims"], ["heads"], ["rows"]]),
    "across": (scopes.across, [["a", "b", "dims", "heads", "rows"]]),
    "isomorphic": (scopes.isomorphic(GROUPS), [["a", "b"], ["dims"], ["heads"], ["rows"]]),
}


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    return {path: jnp.asarray(rng.random(shape), jnp.float32) for path, shape in SHAPES.items()}


def entries(group, unit, tree):
    """All entries that a unit owns, one slice after the other."""
    return [
        np.take(np.asarray(tree[m.path], np.float64), i, axis=m.axis).ravel()
        for m in group.members
        for i in m.indices[unit]
    ]


def slow_pool(groups, scores, reduce="mean"):
    return {
        g.name: np.array(
            [REDUCTIONS[reduce](np.concatenate(entries(g, u, scores))) for u in range(g.size)]
        )
        for g in groups
    }


def slow_rank(units, alive, sparsity, classes, *, round_to=1, max_sparsity=1.0):
    """Rank the units of each class; then give each group what it needs, the best of those alive."""
    keep = {}
    for names in classes:
        together = np.concatenate([units[name] for name in names])
        living = np.concatenate([alive[name] for name in names])
        n = len(together)
        found = slow_keep(together, n - round(sparsity * n), living)
        sizes = np.cumsum([len(units[name]) for name in names])[:-1]
        keep |= dict(zip(names, np.split(found, sizes), strict=True))
    for name, s in units.items():
        least = max(1, math.ceil(round((1 - max_sparsity) * len(s), 9)))
        rounded = -(-max(keep[name].sum(), least) // round_to) * round_to
        keep[name] = slow_keep(s, min(rounded, alive[name].sum()), alive[name])
    return keep


def slow_masks(groups, keep, like):
    """An entry goes if any unit that owns it does; a leaf of no group has no mask."""
    masks = dict.fromkeys(like)
    for g in groups:
        for m in g.members:
            if masks[m.path] is None:
                masks[m.path] = np.ones(like[m.path].shape, bool)
            for unit in np.nonzero(~keep[g.name])[0]:
                np.moveaxis(masks[m.path], m.axis, 0)[m.indices[unit]] = False
    return masks


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_units_are_scored_like_the_slow_loop(scores, reduce):
    got = Coupled(GROUPS, reduce=reduce).pool(scores)
    want = slow_pool(GROUPS, scores, reduce)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6)
    normal = Coupled(GROUPS, reduce=reduce, normalize=True).pool(scores)
    for name in want:
        np.testing.assert_allclose(normal[name], want[name] / want[name].mean(), rtol=1e-6)


def test_scores_of_nothing_stay_nothing_when_normalized(scores):
    zeros = jax.tree.map(jnp.zeros_like, scores)
    for units in Coupled(GROUPS, normalize=True).pool(zeros).values():
        assert not units.any()


def test_half_precision_scores_are_pooled_in_float32():
    groups = Groups([group("w", 2, w=(1, 1))])
    # In bfloat16 256 + 1 is 256: the sums would tie.
    scores = {"w": jnp.array([[256.0, 255.0], *[[1.0, 1.0]] * 3], jnp.bfloat16)}
    units = Coupled(groups).pool(scores)["w"]
    assert units.dtype == jnp.float32 and units.tolist() == [259 / 4, 258 / 4]


def test_scores_of_all_members_are_asked_for(scores):
    with pytest.raises(ValueError, match="no scores at 'bias_0', a member of the group 'b'"):
        Coupled(GROUPS).pool({**scores, "bias_0": None})


SETTINGS = [{}, {"round_to": 2, "max_sparsity": 0.6}, {"round_to": 4}, {"max_sparsity": 0.25}]


@pytest.mark.parametrize("alive", ["all", "some"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "settings",
    [s if i < 2 else pytest.param(s, marks=pytest.mark.slow) for i, s in enumerate(SETTINGS)],
    ids=str,
)
def test_units_are_ranked_and_masked_like_the_slow_loop(scores, settings, scope, alive):
    rank, classes = SCOPES[scope]
    rng = np.random.default_rng(5)
    living = {g.name: (rng.random(g.size) < 0.7) | (alive == "all") for g in GROUPS}
    within = slow_masks(GROUPS, living, scores)
    find = jax.jit(
        lambda sparsity: jp.make_masks(
            scores | {"free": None},
            sparsity,
            pattern=Coupled(GROUPS, **settings),
            scope=rank,
            within=None if alive == "all" else within | {"free": None},
        )
    )
    for sparsity in SPARSITIES:
        keep = slow_rank(slow_pool(GROUPS, scores), living, sparsity, classes, **settings)
        assert all(keep[name].any() == living[name].any() for name in keep)
        masks = find(sparsity)
        want = slow_masks(GROUPS, keep, scores)
        assert masks["free"] is None
        for path, mask in masks.items():
            if mask is not None:
                np.testing.assert_array_equal(np.broadcast_to(mask, SHAPES[path]), want[path])


def test_a_sweep_of_sparsities_is_one_program_and_only_ever_removes_more(scores):
    find = lambda s: jp.make_masks(
        scores | {"free": None}, s, pattern=Coupled(GROUPS), scope=scopes.across
    )
    swept = jax.jit(jax.vmap(find))(jnp.linspace(0, 1, 9))
    for mask in jax.tree.leaves(swept):
        assert (np.diff(np.asarray(mask, int), axis=0) <= 0).all()
        assert mask[0].all() and mask[-1].any()


def test_ties_go_to_the_first_units_of_a_group():
    groups = Groups([group("w", 4, w=(1, 1))])
    masks = jp.make_masks({"w": jnp.ones((2, 4))}, 0.5, pattern=Coupled(groups))
    assert masks["w"].tolist() == [[True, True, False, False]]


def test_blocks_may_all_go_and_channels_may_not():
    block = Group("w", (Member("w", 0, np.arange(3)[None]),), 1, kind="block")
    params = {"w": jnp.ones((3, 2))}
    find = lambda groups: jp.find_masks(
        params, 1.0, pattern=Coupled(Groups(groups)), scope=scopes.across
    )
    assert not find([block])["w"].any()
    assert find([group("w:1", 2, w=(1, 1))])["w"].tolist() == [[True, False]]
    assert Coupled(Groups([block])).least(block) == 0


def test_the_default_where_covers_biases_and_another_one_protects_whole_groups(scores):
    pattern = Coupled(GROUPS)
    masks = jp.find_masks(scores, 0.5, pattern=pattern)
    assert masks["bias_0"].sum() == 4 and masks["free"] is None
    kernels = lambda path, array: not path.startswith("bias_0")
    masks = jp.find_masks(scores, 0.5, pattern=pattern, where=kernels)
    assert masks["in_0"] is None and masks["out_0"] is None and masks["bias_1"].sum() == 3
    assert pattern.owns("bias_0", scores["bias_0"]) and not pattern.owns("free", scores["free"])


def test_groups_found_again_make_the_same_program(scores):
    traces = []

    def criterion(params, **_):
        traces.append(1)
        return jax.tree.map(jnp.abs, params)

    for sparsity in (0.2, 0.6):
        again = Groups([Group(g.name, tuple(g.members), g.size) for g in GROUPS])
        jp.find_masks(scores, sparsity, criterion=criterion, pattern=Coupled(again))
    assert len(traces) == 1


def test_rounds_and_within_search_among_the_units_that_are_left(scores):
    first = jp.find_masks(scores, 0.5, pattern=Coupled(GROUPS))
    flipped = jax.tree.map(lambda s: 1 - s, scores)
    second = jp.find_masks(flipped, 0.75, pattern=Coupled(GROUPS), within=first, rounds=2)
    for old, new in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert not (new & ~old).any()
    assert second["bias_0"].sum() == 2 and second["bias_1"].sum() == 2
    assert_trees_equal(jp.find_masks(flipped, 0.5, pattern=Coupled(GROUPS), within=first), first)


def test_isomorphic_refuses_other_units_and_trees_of_sparsities(scores):
    scope = scopes.isomorphic(Groups(GROUPS[:2]))
    with pytest.raises(ValueError, match="got units of 'dims', 'heads', 'rows' that its groups"):
        jp.find_masks(scores, 0.5, pattern=Coupled(GROUPS), scope=scope)
    units = {"a": jnp.ones(2), "b": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"one sparsity for all classes.*tree of 2"):
        scope(units, {"a": 0.5, "b": 0.5})


def two_groups():
    net = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    key = jax.random.key(1)
    shapes = {"a": (2, 10), "b": (10, 20), "c": (20, 3)}
    params = {name: jax.random.normal(key, shape) for name, shape in shapes.items()}
    return params, jp.find_groups(net, params, jnp.ones((1, 2)))


def kept(masks):
    return int(masks["a"].sum()), int(masks["c"].sum())


def test_groups_have_a_sparsity_each_by_a_regex_over_their_names():
    params, groups = two_groups()
    coupled = jp.patterns.Coupled(groups)
    first, second = (group.name for group in groups)
    tree = coupled.share({re.escape(first): 0.7}, default=0.25)
    assert tree == {first: 0.7, second: 0.25}
    assert kept(jp.find_masks(params, tree, pattern=coupled)) == (3, 15)
    ramp = jp.schedules.linear(tree, begin=0, end=2, every=1)
    tx = jp.prune(optax.sgd(0.1), schedule=ramp, pattern=coupled)
    state, step = tx.init(params), jax.jit(tx.update)
    counts = []
    for _ in range(3):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
        counts.append(kept(jp.get_masks(state)))
    assert counts == [(10, 20), (6, 18), (3, 15)]


def test_sparsities_by_the_paths_of_leaves_are_refused_with_what_groups_take():
    params, groups = two_groups()
    coupled = jp.patterns.Coupled(groups)
    tree = jp.scopes.uniform(params, 0.5)
    words = r"`Coupled`.*nothing for the groups .*`jp.patterns.Coupled\(groups\).share"
    with pytest.raises(ValueError, match=words):
        jp.find_masks(params, tree, pattern=coupled)
    with pytest.raises(ValueError, match=words):
        schedule = jp.schedules.constant(tree)
        jp.prune(optax.sgd(0.1), schedule=schedule, pattern=coupled).init(params)
    with pytest.raises(ValueError, match=r"`share` got 'nobody', which matches no group.*The"):
        coupled.share({"nobody": 0.5})
    with pytest.raises(ValueError, match=r"`share` got 2 at.*outside"):
        coupled.share({".*": 2})
