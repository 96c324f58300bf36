"""Tests of what a part may declare beside its one line: parts of one's own can do what ours can."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune._parts import Parts
from tests.helpers import assert_trees_equal

PARAMS = {
    "a": {"kernel": jnp.arange(1.0, 13.0).reshape(3, 4), "bias": jnp.array([9.0, 1.0, 2.0, 3.0])},
    "b": {"kernel": -jnp.arange(1.0, 9.0).reshape(4, 2)},
}
ONCE = jp.schedules.constant(0.5)


def masks_by_prune(params, sparsity, grads=None, **parts):
    """Masks of one update of `prune`."""
    tx = jp.prune(optax.sgd(0.0), schedule=jp.schedules.constant(sparsity), **parts)
    state = jax.jit(tx.update)(params if grads is None else grads, tx.init(params), params)[1]
    return jp.get_masks(state)


@dataclasses.dataclass(frozen=True)
class Slices:
    """Slices along the longest axis, of which each leaf keeps at least one."""

    axes: tuple[tuple[str, int], ...] = ()

    def bind(self, params, *, where, layout=None):
        found = jp.prunable(params, where=where)
        flat = jax.tree_util.tree_leaves_with_path(found)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
        axes = tuple(int(np.argmax(leaf.shape)) for _, leaf in flat)
        return Slices(tuple(zip(names, axes, strict=True)))

    def _map(self, f, tree, *rest):
        axes = iter(axis for _, axis in self.axes)
        return jax.tree.map(lambda x, *more: f(x, next(axes), *more), tree, *rest)

    def pool(self, scores):
        return self._map(lambda s, axis: jnp.sum(s, 1 - axis, keepdims=True), scores)

    def expand(self, keep, *, like):
        return jax.tree.map(lambda _, k: k, like, keep)

    def settle(self, units, keep, alive):
        del alive
        return jax.tree.map(lambda u, k: k | ((u == u.max()) & ~k.any()), units, keep)


@pytest.mark.parametrize("find", [jp.find_masks, masks_by_prune], ids=["find_masks", "prune"])
def test_a_pattern_of_ones_own_is_bound_to_the_params_and_settles_what_stays(find):
    masks = find(PARAMS, 1.0, pattern=Slices())
    assert masks["a"]["kernel"].tolist() == [[False, False, False, True]]
    assert masks["b"]["kernel"].tolist() == [[False], [False], [False], [True]]
    assert jp.sparsity(find(PARAMS, 0.5, pattern=Slices()), PARAMS) == 0.5


@dataclasses.dataclass(frozen=True)
class WithBiases:
    """Outputs with their biases: a unit owns parts of two leaves."""

    neighbours = False

    def owns(self, path, array):
        return path.startswith("a/")

    def of_units(self, sparsity):
        return {"a": sparsity["outputs"]}

    def pool(self, scores):
        return {"a": scores["a"]["kernel"].sum(0) + scores["a"]["bias"]}

    def expand(self, keep, *, like):
        kept = {"kernel": keep["a"][None], "bias": keep["a"]}
        return {"a": kept, "b": {"kernel": None}}


@pytest.mark.parametrize("sparsity", [0.5, {"outputs": 0.5}])
@pytest.mark.parametrize("find", [jp.find_masks, masks_by_prune], ids=["find_masks", "prune"])
def test_a_pattern_of_ones_own_covers_what_it_owns_in_the_place_of_where(find, sparsity):
    masks = find(PARAMS, sparsity, pattern=WithBiases())
    # Sums of the columns 15, 18, 21, 24 and the biases 9, 1, 2, 3: 24, 19, 23, 27.
    assert masks["a"]["bias"].tolist() == [True, False, False, True]
    assert masks["b"]["kernel"] is None


def test_a_pattern_across_leaves_is_refused_by_what_grows_within_a_leaf():
    with pytest.raises(ValueError, match="`WithBiases` groups own parts of many leaves"):
        jp.dynamic.rigl(optax.sgd(0.1), sparsity=0.5, begin=0, end=1, every=1, pattern=WithBiases())


@pytest.mark.parametrize("pattern", [WithBiases(), jp.patterns.Channels(-1)])
def test_windows_refuse_whoever_says_that_it_has_no_neighbours(pattern):
    with pytest.raises(ValueError, match="leaves no neighbours to rank"):
        jp.find_masks(PARAMS, 0.5, pattern=pattern, scope=jp.scopes.windows(4))
    with pytest.raises(ValueError, match="leaves no neighbours to rank"):
        jp.prune(optax.sgd(0.1), schedule=ONCE, pattern=pattern, scope=jp.scopes.windows(4)).init(
            PARAMS
        )


def _is_lazy(node):
    return isinstance(node, jp.typing.Lazy)


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Keep what scores at least a threshold that is made of the count."""

    lazy = True
    leaves: int = 0

    def bind(self, params, *, where, layout=None):
        return AtLeast(len(jax.tree.leaves(jp.prunable(params, where=where))))

    def counts(self, units, sparsity):
        del units
        return round(10 * sparsity) if isinstance(sparsity, float) else sparsity

    def __call__(self, units, amount, *, within=None):
        assert self.leaves == 2  # it has been bound
        scores = jax.tree.map(
            lambda u: u.score(*u.operands) if _is_lazy(u) else u, units, is_leaf=_is_lazy
        )
        return jax.tree.map(lambda s: s > amount, scores)

    def refuses(self, pattern):
        return None if isinstance(pattern, jp.patterns.Weights) else "`AtLeast` ranks weights only."

    def check_sparsity(self, sparsity, *, exact):
        if exact and sparsity == 1.0:
            raise ValueError("`AtLeast` cannot remove all.")


def test_a_scope_of_ones_own_counts_beforehand_in_one_program_for_all_sparsities():
    traces = []

    def score(params, **_):
        traces.append(None)
        return jax.tree.map(jnp.abs, params)

    for sparsity, kept in ((0.5, 7 + 3), (0.7, 5 + 1), (0.9, 3 + 0)):
        masks = jp.find_masks(PARAMS, sparsity, scope=AtLeast(), criterion=score)
        assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) == kept
    assert len(traces) == 1


def test_a_scope_of_ones_own_refuses_patterns_and_sparsities():
    with pytest.raises(ValueError, match="ranks weights only"):
        jp.find_masks(PARAMS, 0.5, scope=AtLeast(), pattern=jp.patterns.Channels(-1))
    with pytest.raises(ValueError, match="cannot remove all"):
        jp.find_masks(PARAMS, 1.0, scope=AtLeast())


def test_a_scope_that_says_that_it_is_lazy_gets_scores_that_are_not_computed_yet():
    seen = []

    class Looking(AtLeast):
        def bind(self, params, *, where, layout=None):
            return self

        def __call__(self, units, amount, *, within=None):
            seen.extend(type(u).__name__ for u in jax.tree.leaves(units, is_leaf=_is_lazy))
            return super().__call__(units, amount, within=within)

    jp.find_masks(PARAMS, 0.5, scope=Looking(2))
    assert seen == ["Lazy", "Lazy"]


def unmarked(criterion):
    """The same without the mark."""

    def score(params, **evidence):
        return criterion(params, **evidence)

    return score


GRADS = jax.tree.map(lambda w: jnp.cos(7 * w), PARAMS)
EVIDENCE = {
    "magnitude": {},
    "taylor": {"grads": GRADS},
    "fisher": {"second_moment": jax.tree.map(jnp.square, GRADS)},
    "magnitude_increase": {"params_init": GRADS},
    "movement": {"state": GRADS},
    "wanda": {"norms": jax.tree.map(lambda w: jnp.abs(w[..., :1]) + 1, GRADS)},
}


@pytest.mark.parametrize("name", EVIDENCE)
@pytest.mark.parametrize("scope", [jp.scopes.per_leaf, jp.scopes.across])
def test_scores_that_are_made_where_they_are_read_give_the_masks_of_stored_ones(name, scope):
    marked, evidence = getattr(jp.criteria, name), EVIDENCE[name]
    plain = unmarked(marked)
    assert_trees_equal(
        jp.find_masks(PARAMS, 0.5, criterion=marked, scope=scope, **evidence),
        jp.find_masks(PARAMS, 0.5, criterion=plain, scope=scope, **evidence),
    )


def test_evidence_that_is_no_tree_reaches_a_marked_criterion_whole():
    @jp.elementwise
    def power(params, *, exponent, offset=0.0, **_):
        return jax.tree.map(lambda w: -(jnp.abs(w) ** exponent) + offset, params)

    largest_go = jp.find_masks(PARAMS, 0.5, criterion=power, exponent=jnp.float32(2), offset=1.0)
    assert largest_go["a"]["kernel"].ravel().tolist() == [True] * 6 + [False] * 6


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["magnitude", "taylor"])
def test_a_marked_criterion_stores_no_scores(name):
    params = {"kernel": jnp.ones((512, 512))}
    evidence = {"grads": params} if name == "taylor" else {}
    criterion = getattr(jp.criteria, name)

    def temporaries(criterion):
        find = jax.jit(
            lambda p, e: jp.find_masks(p, 0.5, criterion=criterion, scope=jp.scopes.across, **e)
        )
        return find.lower(params, evidence).compile().memory_analysis().temp_size_in_bytes

    marked = temporaries(criterion)
    stored = temporaries(unmarked(criterion))
    assert marked <= params["kernel"].size * 1.1  # a byte a weight
    assert stored >= params["kernel"].size * 4


def test_a_partial_scope_still_declares_what_its_function_does():
    parts = Parts(
        "find_masks",
        jp.criteria.magnitude,
        jp.patterns.Weights(),
        functools.partial(jp.scopes.across, axis_name=None),
        jp.is_matrix,
    )
    units = {"kernel": jax.ShapeDtypeStruct((3, 7), jnp.float32)}
    assert parts.can_count and parts.counts(units, 0.5).kept == (21 - round(0.5 * 21),)


@pytest.mark.parametrize("name", [n for n in jp.typing.__all__ if n[0].isupper()])
def test_what_a_part_may_declare_is_in_words(name):
    word = getattr(jp.typing, name)
    if isinstance(word, type):
        assert word.__doc__


def test_a_pattern_is_bound_wherever_it_is_used():
    assert jp.make_masks(PARAMS["b"], 1.0, pattern=Slices())["kernel"].sum() == 1
    init = {"kernel": PARAMS["a"]["kernel"]}
    level = jp.next_level(None, init, rate=0.5, pattern=Slices())
    level = jp.next_level(level._replace(trained=init), init, rate=0.5, pattern=Slices())
    assert jp.sparsity(level.masks, init) == 0.5
    for tx in (
        jp.dynamic.rigl(optax.sgd(0.1), sparsity=0.5, begin=0, end=1, every=1, pattern=Slices()),
        jp.straight_through(optax.sgd(0.1), schedule=ONCE, pattern=Slices()),
    ):
        _, state = jax.jit(tx.update)(init, tx.init(init), init)
        assert jp.sparsity(jp.get_masks(state), init) == 0.5


def test_what_wraps_a_part_declares_nothing_of_it():
    @functools.wraps(jp.criteria.magnitude)
    def last_first(params, **evidence):  # looks at the whole tree
        scores = jax.tree.leaves(jp.criteria.magnitude(params, **evidence))
        shifted = [s + 100.0 * i for i, s in enumerate(scores)]
        return jax.tree.unflatten(jax.tree.structure(params), shifted)

    masks = jp.find_masks(PARAMS, 0.6, criterion=last_first, scope=jp.scopes.across)
    assert not masks["a"]["kernel"].any() and masks["b"]["kernel"].all()

    @functools.wraps(jp.scopes.across)
    def half(units, sparsity, *, within=None):
        return jp.scopes.across(units, sparsity * 0.5, within=within)

    assert jp.sparsity(jp.find_masks(PARAMS, 0.8, scope=half), PARAMS) == 0.4
    again = jp.elementwise(functools.wraps(jp.criteria.magnitude)(lambda p, **_: p))
    assert again.elementwise is not jp.criteria.magnitude.elementwise


def test_keywords_that_a_partial_binds_to_a_scope_reach_who_takes_them():
    scope = functools.partial(jp.scopes.windows(4, axis=0), within=None)
    only_b = jp.by_path("b/kernel")
    assert jp.sparsity(jp.find_masks(PARAMS, 0.5, scope=scope, where=only_b), PARAMS) == 0.5
    parts = Parts("find_masks", jp.criteria.magnitude, jp.patterns.Weights(), scope, only_b)
    assert parts.bind(PARAMS).scope is scope  # or it would compile anew
    pruned = masks_by_prune(PARAMS, 0.5, scope=functools.partial(jp.scopes.across, specs=None))
    assert jp.sparsity(pruned, PARAMS) == 0.5


@pytest.mark.parametrize("evidence", [{"p": 1}, {"p": 2.0}, {"kind": "l1"}, {"deep": PARAMS}])
def test_a_marked_criterion_is_computed_at_once_where_evidence_is_not_to_be_traced(evidence):
    @jp.elementwise
    def power(params, *, p=1, kind="l1", deep=None, **_):
        by = jp.criteria.magnitude if kind == "l1" and p == 1 else jp.criteria.random
        within = params if deep is None else deep["a"] and params
        return by(within, key=jax.random.key(0))

    masks = jp.find_masks(PARAMS, 0.5, criterion=power, scope=jp.scopes.across, **evidence)
    assert jp.sparsity(masks, PARAMS) == 0.5


def test_a_criterion_remembers_only_if_it_says_how_it_starts():
    class Updated:
        def update(self, value):
            raise AssertionError("nobody asked for it")

        def __call__(self, params, **_):
            return jax.tree.map(jnp.abs, params)

    assert jp.sparsity(masks_by_prune(PARAMS, 0.5, criterion=Updated()), PARAMS) == 0.5


def test_a_scope_is_not_asked_about_an_end_that_a_schedule_does_not_know():
    schedule = jp.schedules.custom(lambda step: 0.5, begin=0, end=1, every=1)
    tx = jp.prune(optax.sgd(0.1), schedule=schedule, scope=AtLeast())
    assert tx.init(PARAMS).count == 0


@pytest.mark.parametrize("name", ["taylor", "movement"])
@pytest.mark.parametrize("scope", [jp.scopes.across, jp.scopes.per_leaf])
def test_shards_are_ranked_by_evidence_as_the_whole_is(name, scope):
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 6))}
    grads = {"kernel": jnp.round(4 * jax.random.normal(jax.random.key(1), (8, 6)))}  # with ties
    criterion, given = getattr(jp.criteria, name), {"taylor": "grads", "movement": "state"}[name]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    over = functools.partial(scope, axis_name="x", specs=spec)

    def find(p, g):
        return jp.find_masks(p, 0.6, criterion=criterion, scope=over, **{given: g})

    sharded = jax.shard_map(find, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(params, grads)
    whole = jp.find_masks(params, 0.6, criterion=criterion, scope=scope, **{given: grads})
    assert_trees_equal(sharded, whole)


def test_a_lazy_scope_of_ones_own_sees_bools_of_the_scopes_that_it_calls():
    def scope(units, sparsity, *, within=None):
        keep = jp.scopes.per_leaf(units, sparsity, within=within)
        return jax.tree.map(lambda k: k.at[0].set(True), keep)

    scope.lazy, scope.counts = True, jp.scopes.per_leaf.counts
    params = {"kernel": jnp.arange(12.0).reshape(3, 4)}
    masks = jp.find_masks(params, 0.5, scope=scope)["kernel"]
    assert masks[0].all() and int(masks.sum()) == 4 + 6
    tx = jp.prune(optax.sgd(0.0), schedule=jp.schedules.constant(0.5), scope=scope)
    _, state = tx.update(params, tx.init(params), params)
    assert bool((jp.get_masks(state)["kernel"] == masks).all())


@pytest.mark.parametrize("wrapper", ["find_masks", "prune", "rigl", "set"])
def test_a_pattern_with_an_elementwise_pool_expands_bools(wrapper):
    @dataclasses.dataclass(frozen=True)
    class Plain:
        @jp.elementwise
        def pool(self, scores):
            return scores

        def expand(self, keep, *, like):
            return jax.tree.map(lambda _, k: k & True, like, keep)

    params = {"kernel": jnp.arange(12.0).reshape(3, 4)}
    ours, theirs = Plain(), jp.patterns.Weights()
    events = {"begin": 0, "end": 4, "every": 2}
    found = []
    for pattern in (ours, theirs):
        if wrapper == "find_masks":
            found.append(jp.find_masks(params, 0.5, pattern=pattern))
            continue
        if wrapper == "prune":
            schedule = jp.schedules.constant(0.5)
            tx = jp.prune(optax.sgd(0.1), schedule=schedule, pattern=pattern)
        else:
            key = {"key": jax.random.key(0)} if wrapper == "set" else {}
            train = getattr(jp.dynamic, wrapper)
            tx = train(optax.sgd(0.1), sparsity=0.5, pattern=pattern, **events, **key)
        _, state = tx.update(params, tx.init(params), params)
        found.append(jp.get_masks(state))
    assert_trees_equal(*found)


@pytest.mark.parametrize("scope", [jp.scopes.per_leaf, jp.scopes.across])
def test_scopes_called_with_lazy_units_give_bools(scope):
    w = jnp.array([[1.0, -4.0], [3.0, -2.0]])
    lazy = {"w": jp.typing.Lazy((w,), jnp.abs, w.dtype)}
    within = {"w": jnp.array([[True, False], [True, True]])}
    for given in ({}, {"within": within}):
        assert_trees_equal(scope(lazy, 0.5, **given), scope({"w": jnp.abs(w)}, 0.5, **given))


def test_nothing_to_rank_is_told():
    for scope in (jp.scopes.per_leaf, jp.scopes.across):
        with pytest.raises(ValueError, match="no units to rank"):
            scope({}, 0.5)
