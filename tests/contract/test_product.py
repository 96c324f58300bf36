"""Laws 1-5, 7 and 8 over the whole product criterion x pattern x scope x schedule."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import scopes
from tests.contract import laws
from tests.contract.tables import (
    ALLOCATIONS,
    CRITERIA,
    FAMILIES,
    MEMORIES,
    ONE_PATTERN,
    PATTERNS,
    REFUSED,
    SCHEDULES,
    SCOPES,
    STEPS,
    evidence,
    make_criterion,
    small_params,
)
from tests.helpers import TraceCount, slow_keep

FINAL = 0.75
PRODUCT = [
    names for names in itertools.product(CRITERIA, PATTERNS, SCOPES) if names[1:] not in REFUSED
]
# Allocations rank by `per_leaf`, so that one criterion will do; the slow suite runs them all.
QUICK = [
    names
    for names in PRODUCT
    if (names[0] == "magnitude" or names[2] not in ALLOCATIONS)
    and (names[0] not in ONE_PATTERN or names[1:] == ("Weights", "across"))
]
# Of these, as many as it takes for every two parts to meet, each under all schedules.
MEETINGS = {
    "magnitude": (
        *(("Weights", "per_leaf"), ("Channels", "across"), ("Blocks", "windows")),
        *(("Weights", "uniform"), ("Channels", "erk"), ("Blocks", "custom"), ("Weights", "owl")),
        ("Blocks", "per_output"),
    ),
    "taylor": (
        *(("Weights", "windows"), ("Channels", "per_leaf"), ("Blocks", "across")),
        ("Weights", "per_output"),
    ),
    "random": (
        *(("Weights", "across"), ("Channels", "across")),
        *(("Blocks", "per_leaf"), ("Blocks", "windows"), ("Weights", "per_output")),
    ),
    **dict.fromkeys(ONE_PATTERN, (("Weights", "across"),)),
}
FAST = [names for names in PRODUCT if names[1:] in MEETINGS.get(names[0], MEETINGS["magnitude"])]
SLOW = [pytest.param(*names, marks=pytest.mark.slow) for names in PRODUCT if names not in FAST]
# For criteria that differ in nothing that a part sees, one combination is enough here.
ALONE = [
    names
    for names in PRODUCT
    if names[0] not in ONE_PATTERN or names[1:] == ("Weights", "per_leaf")
]


def test_every_two_parts_meet_in_the_fast_suite():
    """And every part is under every schedule: each program of the product runs them all."""
    for i, j in ((0, 1), (0, 2), (1, 2)):
        met = {(names[i], names[j]) for names in FAST}
        assert met >= {(names[i], names[j]) for names in QUICK if names[2] not in ALLOCATIONS}
    assert {names[2] for names in FAST} == set(SCOPES)
    assert {first_of(*names) for names in FAST} == set(range(len(SCHEDULES)))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda module: module.__name__)
def test_being_listed_means_being_tested(family):
    assert set(FAMILIES[family]) == set(family.__all__)


def grads_of(params):
    """Fixed gradients of few bits, so that products with weights are exact."""
    return jax.tree.map(
        lambda p: jnp.asarray(np.random.default_rng(p.size).integers(-4, 5, p.shape) / 8, p.dtype),
        params,
    )


@dataclasses.dataclass
class Chosen:
    """All schedules in one, the choice being data: one program serves the whole table."""

    plans: list
    which: jax.Array

    def __call__(self, step):
        return jax.lax.switch(self.which, [lambda s, p=p: floats(p(s)) for p in self.plans], step)

    def due(self, step):
        return jax.lax.switch(self.which, [p.due for p in self.plans], step)

    @property
    def final(self):
        finals = [floats(p(STEPS) if p.final is None else p.final) for p in self.plans]
        return jax.tree.map(lambda *values: jnp.stack(values)[self.which], *finals)


def floats(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def pruner(criterion, pattern, scope, schedule):
    return jp.prune(
        optax.sgd(0.25, momentum=0.5),
        schedule=schedule,
        criterion=make_criterion(criterion),
        pattern=PATTERNS[pattern],
        scope=scopes.per_leaf if scope in ALLOCATIONS else SCOPES[scope],
        key=jax.random.key(3),
    )


def plans(scope):
    final = SCOPES[scope](small_params(), FINAL) if scope in ALLOCATIONS else FINAL
    return {name: make(final) for name, make in SCHEDULES.items()}


def fallen(plan, step):
    """Say whether a plan asks for less than a step ago."""
    now, then = (leaves_of(plan(at)) for at in (step, max(step - 1, 0)))
    return any(a < b for a, b in zip(now, then, strict=True))


def leaves_of(tree):
    return [float(leaf) for leaf in jax.tree.leaves(tree)]


def check_laws(names, step, init):
    """Take STEPS updates and hold each of them against the laws; `plan` says what was asked."""
    criterion, pattern, scope, plan = names
    params, memory = small_params(), None
    grads, state = grads_of(params), init
    for i in range(STEPS):
        new_params, new_state = step(params, state, grads)
        before, after = jp.get_masks(state), jp.get_masks(new_state)
        memory = laws.remember(criterion, memory, params, grads)
        if fallen(plan, i):  # all weights are free again
            before = jax.tree.map(jnp.ones_like, before)
        laws.mirror(params, after)
        laws.monotone(before, after)
        laws.zero(new_params, after)
        laws.closed(state, new_state)
        if plan.due(i):
            asked = laws.asked(plan(i))
            key = jax.random.fold_in(state.key, i)
            names = criterion, pattern, scope
            laws.count_and_order(names, params, grads, key, asked, before, after, memory)
        else:
            laws.equal(before, after)
        params, state = new_params, new_state


def first_of(*names):
    """The number of the schedule that starts a combination: each in its turn."""
    return [*FAST, *PRODUCT].index(names) % len(SCHEDULES)


@pytest.mark.parametrize("criterion, pattern, scope", [*FAST, *SLOW])
def test_the_laws_hold_for_every_combination_under_every_schedule(criterion, pattern, scope):
    table = plans(scope)

    def step(which, params, state, grads):
        tx = pruner(criterion, pattern, scope, Chosen(list(table.values()), which))
        updates, state = tx.update(grads, state, params, **evidence())
        return optax.apply_updates(params, updates), state

    traces = TraceCount(step)
    step = jax.jit(traces)
    # What `init` makes of one schedule it makes of all: the slow suite has each with each.
    first = list(table.values())[first_of(criterion, pattern, scope)]
    init = pruner(criterion, pattern, scope, first).init(small_params())
    for which, plan in enumerate(table.values()):
        check_laws((criterion, pattern, scope, plan), functools.partial(step, which), init)
    assert traces.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("criterion, pattern, scope", ALONE)
def test_the_laws_hold_for_every_combination_compiled_on_its_own(
    criterion, pattern, scope, schedule
):
    plan = plans(scope)[schedule]
    tx = pruner(criterion, pattern, scope, plan)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **evidence())
        return optax.apply_updates(params, updates), state

    traces = TraceCount(step)
    check_laws((criterion, pattern, scope, plan), jax.jit(traces), tx.init(small_params()))
    assert traces.count == 1


@pytest.mark.parametrize(
    "criterion, scope", [names[::2] for names in QUICK if names[1] == "Weights"]
)
def test_masks_of_single_weights_are_those_of_slow_numpy(criterion, scope):
    params, key = small_params(), jax.random.key(5)
    part = {path: w for path, w in laws.leaves(params).items() if w.ndim > 1}
    grads = grads_of(params)
    memory = laws.remember(criterion, None, params, grads)
    offered = {"grads": grads, "key": key, **evidence()}
    if criterion in MEMORIES:
        offered["state"] = like(params, memory)
    exact = {path: w.astype(np.float64) for path, w in part.items()}
    scores = laws.slow_scores(criterion, exact, laws.leaves(grads), key, memory)
    sparsities = SCOPES[scope](params, FINAL) if scope in ALLOCATIONS else FINAL
    dense = {path: np.ones(w.shape, bool) for path, w in part.items()}
    half = {path: np.random.default_rng(w.size).random(w.shape) < 0.5 for path, w in part.items()}
    for within in (dense, half):
        masks = jp.find_masks(
            params,
            sparsities,
            criterion=make_criterion(criterion),
            scope=scopes.per_leaf if scope in ALLOCATIONS else SCOPES[scope],
            within=like(params, within),
            **offered,
        )
        want = slow_masks(scope, scores, laws.asked(sparsities), within)
        for path, mask in laws.leaves(masks).items():
            np.testing.assert_array_equal(mask, want[path], err_msg=str(path))


def like(params, by_path):
    """Put arrays by path into the tree of the params, None elsewhere."""
    return jax.tree.unflatten(
        jax.tree.structure(params), [by_path.get(path) for path in laws.leaves(params)]
    )


def slow_masks(scope, scores, sparsity, within):
    """Hold every competition on its own, one weight after the other."""
    keep = {path: np.zeros(s.shape, bool) for path, s in scores.items()}
    for competition in laws.competitions(scope, {path: s.shape for path, s in scores.items()}):
        kept = len(competition) - round(sparsity(competition[0][0]) * len(competition))
        found = slow_keep(
            [scores[path].flat[u] for path, u in competition],
            kept,
            [within[path].flat[u] for path, u in competition],
        )
        for (path, u), stays in zip(competition, found, strict=True):
            keep[path].flat[u] = stays
    return keep


def pairs(first, second):
    """All pairs; those that are needed to see every name of either are quick."""
    every = itertools.product(enumerate(first), enumerate(second))
    most = max(len(first), len(second))
    quick = {(i % len(first), i % len(second)) for i in range(most)}
    return [
        pytest.param(a, b, marks=() if (i, j) in quick else pytest.mark.slow)
        for (i, a), (j, b) in every
    ]


@pytest.mark.parametrize("criterion, schedule", pairs(CRITERIA, SCHEDULES))
def test_channels_under_windows_are_refused_by_name(criterion, schedule):
    tx = jp.prune(
        optax.sgd(0.1),
        schedule=SCHEDULES[schedule](FINAL),
        criterion=make_criterion(criterion),
        pattern=PATTERNS["Channels"],
        scope=SCOPES["windows"],
        key=jax.random.key(0),
    )
    with pytest.raises(ValueError, match=REFUSED["Channels", "windows"]):
        tx.init(small_params())


@pytest.mark.parametrize("allocation, schedule", pairs(ALLOCATIONS, SCHEDULES))
def test_a_tree_of_sparsities_across_is_refused_by_name(allocation, schedule):
    params = small_params()
    final = SCOPES[allocation](params, FINAL)
    tx = jp.prune(optax.sgd(0.1), schedule=SCHEDULES[schedule](final), scope=SCOPES["across"])
    with pytest.raises(ValueError, match=REFUSED["tree", "across"]):
        tx.init(params)
    with pytest.raises(ValueError, match=REFUSED["tree", "across"]):
        jp.find_masks(params, final, scope=SCOPES["across"])
