"""Tests of imp and its step: train, prune, rewind, and again."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria, patterns, scopes
from tests.helpers import assert_trees_equal, assert_zero_where_removed, tree_of_weights


@jax.jit
def shake(params):
    """A stand-in for training: deterministic, different for every weight, zeros stay zero."""
    return jax.tree.map(lambda p: p * (1.5 + jnp.sin(37.0 * p)), params)


def fit(ticket, masks):
    return jp.apply_masks(shake(ticket), masks)


def removed(masks):
    return [int((~np.asarray(m)).sum()) for m in jax.tree.leaves(masks)]


def test_a_leaf_has_lost_exactly_what_the_ladder_says(key):
    params = {"a": jax.random.normal(key, (15, 10)), "b": jax.random.normal(key, (7, 9))}
    levels = list(jp.imp(params, fit, rounds=8, rate=0.2))
    assert [level.index for level in levels] == list(range(9))
    for level in levels:
        want = [round((1 - 0.8**level.index) * n) for n in (150, 63)]
        assert removed(level.masks) == want


def test_level_zero_is_the_dense_network(key):
    params = tree_of_weights(key)
    level = next(jp.imp(params, fit, rounds=0))
    assert_trees_equal(level.masks, jp.dense_masks(params))
    assert_trees_equal(level.ticket, params)
    assert_trees_equal(level.trained, shake(params))


def test_rounds_zero_yields_the_dense_level_only(key):
    assert len(list(jp.imp(tree_of_weights(key), fit, rounds=0))) == 1


def test_every_ticket_is_the_masked_start(key):
    params = tree_of_weights(key)
    for level in jp.imp(params, fit, rounds=3, rate=0.5):
        assert_trees_equal(level.ticket, jp.apply_masks(params, level.masks))
        assert_zero_where_removed(level.trained, level.masks)


def test_masks_rank_the_trained_weights_of_the_level_before(key):
    params = tree_of_weights(key)
    dense, first, second = jp.imp(params, fit, rounds=2, rate=0.5)
    assert_trees_equal(first.masks, jp.find_masks(dense.trained, 0.5))
    assert_trees_equal(second.masks, jp.find_masks(first.trained, 0.75, within=first.masks))


@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across, scopes.windows(4)])
def test_nothing_is_ever_revived_even_by_a_fit_that_ignores_the_masks(key, scope):
    levels = list(
        jp.imp(tree_of_weights(key), lambda t, m: shake(t), rounds=4, rate=0.3, scope=scope)
    )
    for before, after in itertools.pairwise(levels):
        for old, new in zip(*map(jax.tree.leaves, (before.masks, after.masks)), strict=True):
            assert not (new & ~old).any()


def test_rates_make_exceptions_by_regex(key):
    params = {
        "hidden": {"kernel": jax.random.normal(key, (20, 10))},
        "out": {"kernel": jax.random.normal(key, (10, 5))},
    }
    rates = {"out/.*": 0.1, ".*/kernel": 0.2}  # the first that matches counts
    for level in jp.imp(params, fit, rounds=5, rate=0.9, rates=rates):
        n = level.index
        assert removed(level.masks) == [round((1 - 0.8**n) * 200), round((1 - 0.9**n) * 50)]


def test_globally_the_ladder_counts_all_weights_together(key):
    params = tree_of_weights(key)
    for level in jp.imp(params, fit, rounds=4, rate=0.3, scope=scopes.across):
        assert sum(removed(level.masks)) == round((1 - 0.7**level.index) * 128)


def test_channels_can_be_rewound_too(key):
    levels = list(
        jp.imp(tree_of_weights(key), fit, rounds=2, rate=0.5, pattern=patterns.Channels())
    )
    assert removed(levels[2].masks) == [6, 3]


def test_where_and_criterion_are_passed_on(key):
    params = tree_of_weights(key)

    def smallest_first(p, **_):
        return jax.tree.map(lambda w: -jnp.abs(w), p)

    where = jp.by_path("Dense_0/kernel")
    _, level = jp.imp(params, fit, rounds=1, rate=0.25, criterion=smallest_first, where=where)
    want = jp.find_masks(shake(params), 0.25, criterion=smallest_first, where=where)
    assert_trees_equal(level.masks, want)
    assert level.masks["Dense_1"]["kernel"] is None


def test_evidence_comes_from_the_level_just_trained(key):
    params, seen = tree_of_weights(key), []

    def evidence(level):
        seen.append(level.index)
        return {"grads": jax.tree.map(jnp.cos, level.trained)}

    dense, first, _ = jp.imp(
        params, fit, rounds=2, rate=0.5, criterion=criteria.taylor, evidence=evidence
    )
    assert seen == [0, 1]
    grads = jax.tree.map(jnp.cos, dense.trained)
    want = jp.find_masks(dense.trained, 0.5, criterion=criteria.taylor, grads=grads)
    assert_trees_equal(first.masks, want)


def test_a_criterion_that_asks_for_the_start_gets_it(key):
    params = tree_of_weights(key)
    parts = {"criterion": criteria.magnitude_increase}
    dense, first, second = jp.imp(params, fit, rounds=2, rate=0.5, **parts)
    find = lambda level, *args, **kwargs: jp.find_masks(
        level.trained, *args, params_init=params, **kwargs, **parts
    )
    assert_trees_equal(first.masks, find(dense, 0.5))
    assert_trees_equal(second.masks, find(first, 0.75, within=first.masks))
    assert not (
        first.masks["Dense_0"]["kernel"] == jp.find_masks(dense.trained, 0.5)["Dense_0"]["kernel"]
    ).all()


def test_the_start_survives_a_caller_that_donates_it_and_a_resume(key):
    params = tree_of_weights(key)
    settings = {"rounds": 2, "rate": 0.5, "criterion": criteria.magnitude_increase}
    whole = list(jp.imp(params, fit, **settings))
    (last,) = jp.imp(params, fit, start=(1, whole[1].masks, whole[1].trained), **settings)
    assert_trees_equal(last, whole[2])
    levels = jp.imp(params, fit, **settings)
    jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)(params)
    assert_trees_equal([level.masks for level in levels], [level.masks for level in whole])


def test_evidence_may_give_another_start(key):
    params = tree_of_weights(key)
    other = jax.tree.map(lambda p: 3.0 * p[::-1], params)
    parts = {"criterion": criteria.magnitude_increase}
    given = {"evidence": lambda level: {"params_init": other}}
    dense, level = jp.imp(params, fit, rounds=1, rate=0.5, **parts, **given)
    want = jp.find_masks(dense.trained, 0.5, params_init=other, **parts)
    assert_trees_equal(level.masks, want)


def test_what_else_a_criterion_needs_beside_the_start_is_told_before_anything_trains(key):
    def criterion(params, *, params_init, grads, **_):
        return params

    with pytest.raises(TypeError, match=r"`criterion` needs `grads`, which"):
        jp.imp(tree_of_weights(key), never, criterion=criterion)


# What a level starts from.


def test_fine_tuning_goes_on_from_the_trained_weights(key):
    levels = list(
        jp.imp(tree_of_weights(key), fit, rounds=3, rate=0.5, restart=lambda init, trained: trained)
    )
    for before, after in itertools.pairwise(levels):
        assert_trees_equal(after.ticket, jp.apply_masks(before.trained, after.masks))


def test_rewinding_to_step_k_starts_from_the_params_of_step_k(key):
    at_step_k = shake(tree_of_weights(key))
    for level in jp.imp(at_step_k, fit, rounds=2):
        assert_trees_equal(level.ticket, jp.apply_masks(at_step_k, level.masks))


def test_restart_may_draw_new_weights(key):
    fresh = tree_of_weights(jax.random.key(9))
    _, level = jp.imp(tree_of_weights(key), fit, rounds=1, restart=lambda init, trained: fresh)
    assert_trees_equal(level.ticket, jp.apply_masks(fresh, level.masks))


def test_a_fit_that_donates_its_ticket_does_not_destroy_the_rewind_target(key):
    params = tree_of_weights(key)
    kept = jax.tree.map(np.array, params)
    burn = jax.jit(lambda p: jax.tree.map(lambda x: x * 1.5, p), donate_argnums=0)
    for level in jp.imp(params, lambda ticket, masks: burn(ticket), rounds=3):
        assert_trees_equal(level.ticket, jp.apply_masks(kept, level.masks))
    assert_trees_equal(params, kept)


def test_the_callers_params_may_be_donated_once_the_iterator_is_made(key):
    params = tree_of_weights(key)
    kept = jax.tree.map(np.array, params)
    levels = jp.imp(params, fit, rounds=1)
    jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)(params)
    for level in levels:
        assert_trees_equal(level.ticket, jp.apply_masks(kept, level.masks))


def test_a_restart_that_donates_the_start_does_not_destroy_it_either(key):
    params = tree_of_weights(key)
    burn = jax.jit(lambda p: jax.tree.map(lambda x: x * 1, p), donate_argnums=0)
    levels = list(jp.imp(params, fit, rounds=2, restart=lambda init, trained: burn(init)))
    assert_trees_equal(levels[2].ticket, jp.apply_masks(params, levels[2].masks))


# Resuming.


@pytest.mark.parametrize("at", [0, 1, 3, 4])
@pytest.mark.parametrize("tuning", [False, True])
def test_resuming_gives_identical_levels(key, at, tuning):
    params = tree_of_weights(key)
    settings = {"rounds": 4, "rate": 0.3, "rates": {"Dense_1/kernel": 0.1}}
    if tuning:
        settings["restart"] = lambda init, trained: trained
    whole = list(jp.imp(params, fit, **settings))
    stop = whole[at]
    rest = list(jp.imp(params, fit, start=(stop.index, stop.masks, stop.trained), **settings))
    assert [level.index for level in rest] == list(range(at + 1, 5))
    for got, want in zip(rest, whole[at + 1 :], strict=True):
        assert_trees_equal(got, want)


def test_a_level_read_back_as_numpy_resumes_identically(key):
    params = tree_of_weights(key)
    whole = list(jp.imp(params, fit, rounds=2))
    saved = jax.tree.map(np.asarray, (whole[1].masks, whole[1].trained))
    (level,) = jp.imp(params, fit, rounds=2, start=(1, *saved))
    assert_trees_equal(level, whole[2])


def test_a_resumed_level_has_a_ticket_only_where_it_is_known(key):
    params, seen = tree_of_weights(key), []

    def evidence(level):
        seen.append(level.ticket)
        return {}

    whole = list(jp.imp(params, fit, rounds=2))
    index, masks, _, trained = whole[1]
    for start in (whole[1], (index, masks, trained)):
        (last,) = jp.imp(params, fit, rounds=2, start=start, evidence=evidence)
        assert_trees_equal(last, whole[2])
    assert_trees_equal(seen[0], whole[1].ticket)
    assert seen[1] is None


# The pure step.

SETTINGS = {
    "rates": {"rate": 0.3, "rates": {"Dense_1/kernel": 0.1}},
    "across": {"rate": 0.3, "scope": scopes.across},
    "fine-tuning": {"rate": 0.5, "restart": lambda init, trained: trained},
    "evidence": {
        "criterion": criteria.taylor,
        "evidence": lambda level: {"grads": jax.tree.map(jnp.cos, level.trained)},
    },
    "the start as evidence": {"criterion": criteria.magnitude_increase, "rate": 0.5},
    "channels": {"pattern": patterns.Channels(), "rate": 0.5, "where": jp.by_path("Dense_0/.*")},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_loop_around_next_level_is_imp(key, settings):
    params, level = tree_of_weights(key), None
    for want in jp.imp(params, fit, rounds=2, **settings):
        level = jp.next_level(level, params, **settings)
        assert_trees_equal(level, want._replace(trained=None))
        level = level._replace(trained=fit(level.ticket, level.masks))
        assert_trees_equal(level, want)


def test_next_level_goes_on_from_what_a_file_held(key):
    params = tree_of_weights(key)
    whole = list(jp.imp(params, fit, rounds=3, rate=0.3))
    index, masks, _, trained = jax.tree.map(np.asarray, whole[2])
    level = jp.next_level(jp.Level(index, masks, None, trained), params, rate=0.3)
    assert_trees_equal(level, whole[3]._replace(trained=None))


def test_a_ticket_that_is_donated_takes_nothing_along(key):
    params, level = tree_of_weights(key), None
    kept = jax.tree.map(np.array, params)
    burn = jax.jit(lambda p: jax.tree.map(lambda x: x * 1.5, p), donate_argnums=0)
    for _ in range(2):
        level = jp.next_level(level, params)
        level = level._replace(trained=burn(level.ticket))
    assert_trees_equal(params, kept)


def test_next_level_says_which_of_its_settings_is_wrong(key):
    params = tree_of_weights(key)
    with pytest.raises(ValueError, match=r"`next_level\(rate\)` got 1.2, outside"):
        jp.next_level(None, params, rate=1.2)
    with pytest.raises(ValueError, match=r"`next_level\(rates\)` got 'out'.*matches no"):
        jp.next_level(None, params, rates={"out": 0.1})
    level = jp.next_level(None, params)._replace(trained=params)
    with pytest.raises(TypeError, match=r"criterion `taylor` needs `grads`"):
        jp.next_level(level, params, criterion=criteria.taylor)
    with pytest.raises(TypeError, match=r"`next_level\(evidence=...\)` returned list"):
        jp.next_level(level, params, evidence=lambda level: [])


def test_next_level_refuses_what_is_no_trained_level_of_these_params(key):
    params = tree_of_weights(key)
    level = jp.next_level(None, params)
    with pytest.raises(ValueError, match=r"got level 0 without trained.*level._replace\(trained="):
        jp.next_level(level, params)
    level = level._replace(trained=params)
    with pytest.raises(TypeError, match=r"`next_level` got level=.*jp.Level\(index, masks, None"):
        jp.next_level(tuple(level), params)
    with pytest.raises(ValueError, match=r"`next_level` got level 0.5. Pass the index"):
        jp.next_level(level._replace(index=0.5), params)
    with pytest.raises(ValueError, match=r"`level masks` is not a tree like the params"):
        jp.next_level(level._replace(masks=level.masks["Dense_0"]), params)
    with pytest.raises(
        ValueError, match=r"`level trained params` is not.*unknown 'bias', .*same network"
    ):
        jp.next_level(level._replace(trained=params["Dense_0"]), params)


def test_imp_finds_a_ticket_with_a_real_optimizer(key):
    x = jax.random.normal(key, (64, 12))
    y = jnp.sin(x[:, :4])

    def loss(params):
        hidden = jnp.tanh(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None])
        return jnp.mean((hidden @ params["Dense_1"]["kernel"] - y) ** 2)

    tx = jp.hold(optax.adam(0.05))

    @jax.jit
    def train(ticket, masks):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = ticket, jp.with_masks(tx.init(ticket), masks)
        return jax.lax.scan(step, start, None, length=100)[0][0]

    for level in jp.imp(tree_of_weights(key), train, rounds=3, rate=0.2):
        assert loss(level.trained) < 0.5 * loss(level.ticket)
        assert_zero_where_removed(level.trained, level.masks)


# Bad input: refused by the call, before anything trains.


def never(ticket, masks):
    raise AssertionError("nothing should train")


@pytest.mark.parametrize("bad", [-0.1, 1.2, float("nan")])
def test_imp_refuses_what_is_no_rate(key, bad):
    params = tree_of_weights(key)
    with pytest.raises(ValueError, match=r"`imp\(rate\)` got .*outside \[0, 1\]"):
        jp.imp(params, never, rate=bad)
    with pytest.raises(ValueError, match=r"`imp\(rates\)` got .* at 'Dense_0/kernel', outside"):
        jp.imp(params, never, rates={"Dense_0/kernel": bad})


@pytest.mark.parametrize("bad", [-1, 2.0, None])
def test_imp_refuses_what_is_no_number_of_rounds(key, bad):
    with pytest.raises(ValueError, match=r"`imp` got rounds=.*integer from 0 on"):
        jp.imp(tree_of_weights(key), never, rounds=bad)


def test_imp_refuses_rates_for_what_is_not_there(key):
    with pytest.raises(ValueError, match=r"'out/kernel'.*matches no.*'Dense_0/kernel'"):
        jp.imp(tree_of_weights(key), never, rates={"out/kernel": 0.1})
    with pytest.raises(ValueError, match=r"`imp\(rates\)` got '\('.*no regular expression"):
        jp.imp(tree_of_weights(key), never, rates={"(": 0.1})


def test_imp_refuses_parts_that_do_not_fit(key):
    params = tree_of_weights(key)
    with pytest.raises(ValueError, match=r"`windows\(m=5\)`.*Dense_0/kernel"):
        jp.imp(params, never, scope=scopes.windows(5))
    with pytest.raises(ValueError, match=r"`across`.*one sparsity.*got a tree"):
        jp.imp(params, never, scope=scopes.across, rates={"Dense_0/kernel": 0.1})
    with pytest.raises(ValueError, match="No leaf of `params` is prunable"):
        jp.imp({"bias": jnp.ones(2)}, never)
    with pytest.raises(ValueError, match=r"'nobody'.*matches no parameter"):
        jp.imp(params, never, where=jp.by_path("nobody"))


def test_imp_refuses_a_start_that_does_not_fit(key):
    params = tree_of_weights(key)
    masks = jp.dense_masks(params)
    with pytest.raises(ValueError, match=r"imp\(start=...\)` got 2 values.*index, masks, trained"):
        jp.imp(params, never, start=(1, masks))
    with pytest.raises(ValueError, match=r"got level -1"):
        jp.imp(params, never, start=(-1, masks, params))
    with pytest.raises(ValueError, match=r"`start masks` is not a tree like the params"):
        jp.imp(params, never, start=(1, masks["Dense_0"], params))
    with pytest.raises(
        ValueError, match=r"`start trained params` is not.*unknown 'bias', .*same network"
    ):
        jp.imp(params, never, start=(1, masks, params["Dense_0"]))


@pytest.mark.parametrize(
    "result, words",
    [
        (lambda p: None, "got None; nothing at 'Dense_0/bias'"),
        (lambda p: (p, 0.5), r"unknown '0/Dense_0/bias', .*"),
        (
            lambda p: jax.tree.map(lambda x: x[:1], p),
            r"'Dense_0/bias' has shape \(1,\), in the tick",
        ),
    ],
)
def test_imp_refuses_a_fit_that_returns_no_params(key, result, words):
    message = rf"`fit\(ticket, masks\)` is not a tree like the ticket: .*{words}.*params alone"
    with pytest.raises(ValueError, match=message):
        next(jp.imp(tree_of_weights(key), lambda ticket, masks: result(ticket), rounds=1))


def test_imp_tells_missing_evidence_before_anything_trains(key):
    with pytest.raises(TypeError, match=r"criterion `taylor` needs `grads`"):
        list(jp.imp(tree_of_weights(key), never, criterion=criteria.taylor))
