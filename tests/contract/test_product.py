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
from jaxprune import criteria, scopes
from tests.contract import laws
from tests.contract.tables import (
    ALLOCATIONS,
    CRITERIA,
    FAMILIES,
    PATTERNS,
    REFUSED,
    SCHEDULES,
    SCOPES,
    STEPS,
    small_params,
)
from tests.helpers import TraceCount

FINAL = 0.75
PRODUCT = [
    names for names in itertools.product(CRITERIA, PATTERNS, SCOPES) if names[1:] not in REFUSED
]
# Allocations rank by `per_leaf`, so that one criterion will do; the slow suite runs them all.
FAST = [names for names in PRODUCT if names[0] == "magnitude" or names[2] not in ALLOCATIONS]


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
        criterion=getattr(criteria, criterion),
        pattern=PATTERNS[pattern],
        scope=scopes.per_leaf if scope in ALLOCATIONS else SCOPES[scope],
        key=jax.random.key(3),
    )


def plans(scope):
    final = SCOPES[scope](small_params(), FINAL) if scope in ALLOCATIONS else FINAL
    return {name: make(final) for name, make in SCHEDULES.items()}


def check_laws(names, step, init):
    """Take STEPS updates and hold each of them against the laws; `plan` says what was asked."""
    criterion, pattern, scope, plan = names
    params = small_params()
    grads, state = grads_of(params), init
    for i in range(STEPS):
        new_params, new_state = step(params, state, grads)
        before, after = jp.get_masks(state), jp.get_masks(new_state)
        laws.mirror(params, after)
        laws.monotone(before, after)
        laws.zero(new_params, after)
        laws.closed(state, new_state)
        if plan.due(i):
            asked = laws.asked(plan(i))
            key = jax.random.fold_in(state.key, i)
            names = criterion, pattern, scope
            laws.count_and_order(names, params, grads, key, asked, before, after)
        else:
            laws.equal(before, after)
        params, state = new_params, new_state


@pytest.mark.parametrize("criterion, pattern, scope", FAST)
def test_the_laws_hold_for_every_combination_under_every_schedule(criterion, pattern, scope):
    table = plans(scope)

    def step(which, params, state, grads):
        tx = pruner(criterion, pattern, scope, Chosen(list(table.values()), which))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    traces = TraceCount(step)
    step = jax.jit(traces)
    for which, plan in enumerate(table.values()):
        init = pruner(criterion, pattern, scope, plan).init(small_params())
        check_laws((criterion, pattern, scope, plan), functools.partial(step, which), init)
    assert traces.count == 1


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("criterion, pattern, scope", PRODUCT)
def test_the_laws_hold_for_every_combination_compiled_on_its_own(
    criterion, pattern, scope, schedule
):
    plan = plans(scope)[schedule]
    tx = pruner(criterion, pattern, scope, plan)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    traces = TraceCount(step)
    check_laws((criterion, pattern, scope, plan), jax.jit(traces), tx.init(small_params()))
    assert traces.count == 1


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_channels_under_windows_are_refused_by_name(criterion, schedule):
    tx = jp.prune(
        optax.sgd(0.1),
        schedule=SCHEDULES[schedule](FINAL),
        criterion=getattr(criteria, criterion),
        pattern=PATTERNS["Channels"],
        scope=SCOPES["windows"],
        key=jax.random.key(0),
    )
    with pytest.raises(ValueError, match=REFUSED["Channels", "windows"]):
        tx.init(small_params())


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tree_of_sparsities_across_is_refused_by_name(allocation, schedule):
    params = small_params()
    final = SCOPES[allocation](params, FINAL)
    tx = jp.prune(optax.sgd(0.1), schedule=SCHEDULES[schedule](final), scope=SCOPES["across"])
    with pytest.raises(ValueError, match=REFUSED["tree", "across"]):
        tx.init(params)
    with pytest.raises(ValueError, match=REFUSED["tree", "across"]):
        jp.find_masks(params, final, scope=SCOPES["across"])
