"""Rankings inside of shard_map, pmap and vmap: parts of leaves, ranked as the whole."""

import functools
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune import patterns, schedules, scopes
from tests.helpers import assert_trees_equal, fast_if

# A data axis and a model axis; leaves cut in every way over the latter, one over both, one not.
SPECS = {
    "columns": P(None, "model"),
    "rows": P("model"),
    "grid": P("data", "model"),
    "both": P(("model", "data"), None),
    "whole": P(),
    "bias": P(),
}
NAMES = ("data", "model")


def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 4), NAMES, axis_types=(axis_type,) * 2)


def draw(ties):
    """Weights; with ``ties`` of only four magnitudes, so that position decides nearly all."""
    rng = np.random.default_rng(5)
    shapes = {"columns": (6, 8), "rows": (8, 3), "grid": (4, 8), "both": (16, 2), "whole": (3, 5)}
    make = (lambda s: rng.integers(-3, 4, s)) if ties else (lambda s: rng.normal(size=s))
    return {
        **{k: jnp.asarray(make(s), jnp.float32) for k, s in shapes.items()},
        "bias": jnp.ones(3),
    }


def in_parts(find, check_vma=True, specs=SPECS):
    """Run ``find`` on the parts of the params, and put its masks together again."""
    out = {name: spec for name, spec in specs.items() if name != "bias"} | {"bias": None}
    return jax.jit(
        jax.shard_map(find, mesh=mesh(), in_specs=(specs,), out_specs=out, check_vma=check_vma)
    )


@pytest.mark.parametrize(
    "scope, ties, check_vma",
    fast_if(
        lambda scope, ties, check_vma: (scope is scopes.across) ^ ties ^ check_vma,
        product([scopes.across, scopes.per_leaf], [False, True], [True, False]),
    ),
)
def test_parts_ranked_over_their_axes_give_the_masks_of_the_whole(scope, ties, check_vma):
    bound = functools.partial(scope, axis_name=NAMES, specs=SPECS)
    params = draw(ties)
    got = in_parts(lambda p: jp.find_masks(p, 0.6, scope=bound), check_vma)(params)
    assert_trees_equal(got, jp.find_masks(params, 0.6, scope=scope))


def test_without_specs_types_say_what_is_cut_and_counts_are_those_of_the_whole():
    bound = functools.partial(scopes.across, axis_name=NAMES)
    params = draw(ties=False)  # no ties, so that the order of the parts does not matter
    got = in_parts(lambda p: jp.find_masks(p, 0.6, scope=bound))(params)
    assert_trees_equal(got, jp.find_masks(params, 0.6, scope=scopes.across))


def test_among_equals_the_parts_of_the_first_device_stay_where_nobody_says_how_a_leaf_is_cut():
    bound = functools.partial(scopes.across, axis_name="model")
    find = jax.shard_map(
        lambda w: jp.make_masks({"w": w}, 0.5, scope=bound)["w"],
        mesh=mesh(),
        in_specs=P(None, "model"),
        out_specs=P(None, "model"),
    )
    assert np.asarray(find(jnp.ones((3, 8)))).tolist() == [[True] * 4 + [False] * 4] * 3


def test_without_an_axis_each_device_ranks_what_it_holds():
    params = {"w": jnp.arange(1.0, 17.0).reshape(1, 16)}
    find = jax.shard_map(
        lambda p: jp.find_masks(p, 0.5),
        mesh=mesh(),
        in_specs=({"w": P(None, "model")},),
        out_specs={"w": P(None, "model")},
    )
    assert np.asarray(find(params)["w"])[0].tolist() == [False, False, True, True] * 4


def test_only_the_named_axis_is_ranked_over():
    """A seed on each device of one axis, its weights cut over the other."""
    seeds = jax.random.normal(jax.random.key(0), (2, 8, 8))
    bound = functools.partial(scopes.per_leaf, axis_name="model", specs=P(None, "model"))
    find = jax.shard_map(
        lambda w: jp.make_masks({"w": w[0]}, 0.7, scope=bound)["w"][None],
        mesh=mesh(),
        in_specs=P("data", None, "model"),
        out_specs=P("data", None, "model"),
    )
    for got, w in zip(find(seeds), seeds, strict=True):
        assert_trees_equal(got, jp.make_masks({"w": w}, 0.7)["w"])


@pytest.mark.parametrize("way", ["pmap", "vmap"])
def test_pmap_and_vmap_have_axes_too(way):
    rows = jax.random.normal(jax.random.key(1), (8, 6))
    bound = functools.partial(scopes.across, axis_name="rows")
    find = getattr(jax, way)(
        lambda row: jp.make_masks({"w": row}, 0.7, scope=bound)["w"], axis_name="rows"
    )
    assert_trees_equal(find(rows), jp.make_masks({"w": rows}, 0.7)["w"])


@pytest.mark.parametrize("within", [None, 0.3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_parts_with_dead_units_give_the_masks_of_the_whole(within, sparsity):
    params = draw(ties=True)
    old = None if within is None else jp.find_masks(params, within, scope=scopes.across)
    bound = functools.partial(scopes.across, axis_name=NAMES, specs=SPECS)
    masks_specs = {**SPECS, "bias": None}
    find = jax.shard_map(
        lambda p, m: jp.find_masks(p, sparsity, scope=bound, within=m),
        mesh=mesh(),
        in_specs=(SPECS, None if old is None else masks_specs),
        out_specs=masks_specs,
    )
    assert_trees_equal(
        jax.jit(find)(params, old),
        jp.find_masks(params, sparsity, scope=scopes.across, within=old),
    )


@pytest.mark.parametrize(
    "packed, check_vma",
    fast_if(lambda packed, check_vma: packed == check_vma, product([True, False], [True, False])),
)
def test_a_pruner_on_parts_trains_as_on_the_whole(packed, check_vma):
    scope = functools.partial(scopes.across, axis_name=NAMES, specs=SPECS)
    settings = {"schedule": schedules.linear(0.75, begin=0, end=3, every=1), "packed": packed}

    def train(params, scope):
        tx = jp.prune(optax.sgd(0.25, momentum=0.5), scope=scope, **settings)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return jp.get_masks(state)

    params = draw(ties=True)
    got = in_parts(functools.partial(train, scope=scope), check_vma)(params)
    assert_trees_equal(got, jax.jit(functools.partial(train, scope=scopes.across))(params))


def test_blocks_compete_over_an_axis_where_no_block_is_cut():
    spec = P("model")
    params = {"w": jax.random.normal(jax.random.key(2), (16, 8))}
    settings = {"pattern": patterns.Blocks((2, 2))}
    bound = functools.partial(scopes.across, axis_name="model", specs=spec)
    find = jax.shard_map(
        lambda p: jp.find_masks(p, 0.5, scope=bound, **settings),
        mesh=mesh(),
        in_specs=(spec,),
        out_specs=spec,
    )
    assert_trees_equal(find(params), jp.find_masks(params, 0.5, scope=scopes.across, **settings))


# What does not fit.


@pytest.mark.parametrize("scope", [scopes.across, scopes.per_leaf])
def test_an_axis_that_is_not_there_is_named(scope):
    bound = functools.partial(scope, axis_name="model")
    with pytest.raises(ValueError, match=r"axis_name='model', which names no axis here.*shard_map"):
        jp.find_masks({"w": jnp.ones((2, 2))}, 0.5, scope=bound)


def test_specs_without_an_axis_are_refused():
    bound = functools.partial(scopes.across, specs=P("model"))
    with pytest.raises(ValueError, match=r"`across` got specs without an `axis_name`"):
        jp.find_masks({"w": jnp.ones((2, 2))}, 0.5, scope=bound)


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ({"rows": P("model")}, r"specs that are no tree like the units"),
        ({**SPECS, "rows": P(None, None, "model")}, r"as the spec of 'rows', whose part has shape"),
        ({**SPECS, "rows": "model"}, r"'model' as the spec of 'rows'.*Pass what `in_specs` has"),
    ],
)
def test_specs_that_do_not_fit_are_named(specs, words):
    bound = functools.partial(scopes.across, axis_name=NAMES, specs=specs)
    with pytest.raises(ValueError, match=words):
        in_parts(lambda p: jp.find_masks(p, 0.6, scope=bound))(draw(ties=False))
