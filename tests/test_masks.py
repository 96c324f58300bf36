"""Tests of find_masks, make_masks, apply_masks, dense_masks and sparsity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import criteria, patterns, scopes
from tests.helpers import TraceCount, assert_trees_equal, slow_keep, tree_of_weights

KERNEL = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.zeros(2)}


def test_find_masks_removes_the_smallest_weights_of_each_layer():
    masks = jp.find_masks(KERNEL, 0.5)
    assert masks["kernel"].tolist() == [[False, True], [True, False]]
    assert masks["bias"] is None


def test_find_masks_ranks_by_the_criterion_that_it_is_given():
    grads = {"kernel": jnp.array([[9.0, 0.0], [0.0, 1.0]]), "bias": jnp.ones(2)}
    masks = jp.find_masks(KERNEL, 0.5, criterion=criteria.taylor, grads=grads)
    assert masks["kernel"].tolist() == [[True, False], [False, True]]


def test_a_lambda_is_a_criterion():
    masks = jp.find_masks(KERNEL, 0.5, criterion=lambda p, **_: jax.tree.map(lambda w: w, p))
    assert masks["kernel"].tolist() == [[False, False], [True, True]]


def test_a_lambda_is_a_scope():
    def keep_above(units, sparsity, *, within=None):
        return jax.tree.map(lambda u: u > 10 * sparsity, units)

    masks = jp.find_masks(KERNEL, 0.25, scope=keep_above)
    assert masks["kernel"].tolist() == [[False, True], [True, False]]


def test_a_pattern_of_somebody_elses_is_a_pattern():
    class Rows:
        def pool(self, scores):
            return jax.tree.map(lambda s: s.sum(1, keepdims=True), scores)

        def expand(self, keep, *, like):
            return keep

    masks = jp.find_masks(KERNEL, 0.5, pattern=Rows(), criterion=criteria.magnitude)
    assert masks["kernel"].shape == (2, 1) and jp.sparsity(masks, KERNEL) == 0.5


def test_make_masks_takes_ready_scores():
    scores = {"a": jnp.array([[3.0, 1.0], [2.0, 4.0]]), "b": None}
    assert_trees_equal(
        jp.make_masks(scores, 0.25), {"a": np.array([[True, False], [True, True]]), "b": None}
    )


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.1, 0.05, 0.35])
def test_counts_inside_the_compiled_program_are_those_of_python(sparsity):
    params = {"w": jax.random.normal(jax.random.key(1), (50, 30))}  # 1500: many halves
    masks = jp.find_masks(params, sparsity)
    assert int((~masks["w"]).sum()) == round(sparsity * 1500)


def test_a_sparsity_may_be_traced_and_batched():
    params = {"w": jnp.arange(1.0, 11.0).reshape(2, 5)}
    sparsities = jnp.array([0.0, 0.3, 0.9, 1.0])
    masks = jax.vmap(lambda s: jp.find_masks(params, s))(sparsities)
    assert masks["w"].sum((1, 2)).tolist() == [10, 7, 1, 0]


def test_find_masks_compiles_once_for_all_sparsities(key):
    traced = TraceCount(criteria.magnitude)
    params = tree_of_weights(key)
    for sparsity in (0.1, 0.5, np.float64(0.7), 1):
        jp.find_masks(params, sparsity, criterion=traced)
    assert traced.count == 1


def test_parts_that_compare_equal_share_a_program(key):
    traced = TraceCount(criteria.magnitude)
    for _ in range(2):
        jp.find_masks(
            tree_of_weights(key),
            0.5,
            criterion=traced,
            pattern=patterns.Blocks((2, 1)),
            scope=scopes.windows(2),
            where=jp.by_path(".*/kernel"),
        )
    assert traced.count == 1


def test_masks_are_found_inside_a_trace_as_outside_of_it(key):
    params = tree_of_weights(key)
    find = lambda p: jp.find_masks(p, 0.7, scope=scopes.across)
    assert_trees_equal(jax.jit(find)(params), find(params))


def test_numpy_arrays_are_params_too(key):
    params = jax.tree.map(np.asarray, tree_of_weights(key))
    assert_trees_equal(
        jp.find_masks(params, 0.5), jp.find_masks(jax.tree.map(jnp.asarray, params), 0.5)
    )


def test_a_bare_array_is_a_tree():
    masks = jp.find_masks(jnp.array([[1.0, 2.0], [4.0, 3.0]]), 0.5)
    assert masks.tolist() == [[False, False], [True, True]]


def test_no_gradient_flows_through_masks():
    def loss(params):
        masks = jp.find_masks(params, 0.5)
        return sum(jnp.sum(p) for p in jax.tree.leaves(jp.apply_masks(params, masks)))

    grads = jax.grad(loss)(KERNEL)
    assert grads["kernel"].tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert grads["bias"].tolist() == [1.0, 1.0]


# Evidence.


def test_a_criterion_sees_only_what_is_prunable(key):
    params = tree_of_weights(key)
    seen = {}

    def spy(part, *, grads, other, **_):
        seen.update(part=part, grads=grads, other=other)
        return criteria.magnitude(part)

    where = jp.by_path("Dense_1/kernel")
    other = {"curvature": jnp.ones(3)}
    jp.find_masks(params, 0.5, criterion=spy, where=where, grads=params, other=other)
    for name in ("part", "grads"):
        assert [p for p, _ in jax.tree_util.tree_leaves_with_path(seen[name])] == [
            (jax.tree_util.DictKey("Dense_1"), jax.tree_util.DictKey("kernel"))
        ]
    assert seen["other"]["curvature"].shape == (3,)


def test_a_function_of_the_params_gets_all_of_them_back(key):
    params = tree_of_weights(key)

    def loss_fn(p, scale):
        assert jax.tree.structure(p) == jax.tree.structure(params)  # no holes
        return scale * sum(jnp.sum(x * x) for x in jax.tree.leaves(p))

    def by_loss(part, *, loss_fn, **_):
        return jax.tree.map(jnp.abs, jax.grad(loss_fn)(part, 2.0))

    masks = jp.find_masks(params, 0.5, criterion=by_loss, loss_fn=loss_fn)
    assert_trees_equal(masks, jp.find_masks(params, 0.5))  # |4 w| ranks like |w|


def test_missing_evidence_is_told_before_anything_is_traced():
    def criterion(params, *, fisher, grads, **_):
        raise AssertionError("never called")

    with pytest.raises(TypeError, match=r"`criterion` needs `fisher`, `grads`.*tx.update"):
        jp.find_masks(KERNEL, 0.5, criterion=criterion)


def test_scores_of_another_shape_are_refused_with_the_criterion_that_made_them():
    def sums(params, **_):
        return jax.tree.map(jnp.sum, params)

    with pytest.raises(ValueError, match=r"`sums` returned scores .*'kernel', \(\).*\(2, 2\)"):
        jp.find_masks(KERNEL, 0.5, criterion=sums)


def test_scores_that_are_not_floating_are_refused():
    with pytest.raises(TypeError, match=r"A score of int32 at 'w'.*floating"):
        jp.make_masks({"w": jnp.ones((2, 2), jnp.int32)}, 0.5)


# within


@pytest.mark.parametrize("scope", [scopes.per_leaf, scopes.across, scopes.windows(4)])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_within_removes_what_is_missing_and_revives_nothing(key, scope, sparsity):
    first, second = (tree_of_weights(k) for k in jax.random.split(key))
    old = jp.find_masks(first, 0.5, scope=scope)
    new = jp.find_masks(second, sparsity, scope=scope, within=old)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert not (b & ~a).any()
    want = max(sparsity, 0.5)
    assert jp.sparsity(new, second) == want


def test_within_counts_those_already_removed():
    scores = {"w": jnp.arange(10.0)}
    old = {"w": jnp.arange(10) < 8}  # the two best are gone
    masks = jp.make_masks(scores, 0.5, within=old)
    assert masks["w"].tolist() == [False] * 3 + [True] * 5 + [False] * 2


def test_within_ranks_a_dead_weight_below_nan():
    scores = {"w": jnp.array([jnp.nan, 5.0, 1.0, -jnp.inf])}
    old = {"w": jnp.array([True, False, True, True])}
    masks = jp.make_masks(scores, 0.5, within=old)
    assert masks["w"].tolist() == [False, False, True, True]


def test_channels_within_single_weights_die_when_all_their_weights_are_dead():
    scores = {"w": jnp.arange(12.0).reshape(3, 4)}
    old = {"w": jnp.array([[True, True, True, False]] * 2 + [[True, False, True, False]])}
    masks = jp.make_masks(scores, 0.5, pattern=patterns.Channels(-1), within=old)
    assert masks["w"].tolist() == [[False, True, True, False]] * 2 + [[False, False, True, False]]


@pytest.mark.parametrize("reduce", ["mean", "sum", "norm"])
def test_a_unit_with_one_living_weight_lives_whatever_the_reduction(reduce):
    pattern = patterns.Blocks((2, 2), reduce)
    old = {"w": jnp.zeros((5, 5), bool).at[0, 1].set(True).at[4, 4].set(True)}
    masks = jp.make_masks({"w": jnp.ones((5, 5))}, 0.0, pattern=pattern, within=old)
    assert_trees_equal(masks, old)


# apply_masks, dense_masks, sparsity


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_apply_masks_zeroes_infinities_and_nan(dtype):
    params = {"w": jnp.array([jnp.inf, -jnp.inf, jnp.nan, 1.0, -0.0], dtype), "b": jnp.ones(2)}
    out = jp.apply_masks(params, {"w": jnp.array([False, False, False, True, True]), "b": None})
    assert out["w"].dtype == dtype and out["b"] is params["b"]
    assert out["w"].tolist() == [0.0, 0.0, 0.0, 1.0, 0.0]


def test_apply_masks_broadcasts():
    out = jp.apply_masks({"w": jnp.ones((2, 3))}, {"w": jnp.array([[True, False, True]])})
    assert out["w"].tolist() == [[1.0, 0.0, 1.0]] * 2


def test_apply_masks_leaves_integers_alone(key):
    params = {**tree_of_weights(key), "step": jnp.int32(7)}
    assert jp.apply_masks(params, jp.find_masks(params, 0.5))["step"] == 7


def test_apply_masks_passes_gradients_of_kept_weights_only():
    masks = {"w": jnp.array([True, False])}
    grads = jax.grad(lambda p: jnp.sum(jp.apply_masks(p, masks)["w"] ** 2))({"w": jnp.ones(2)})
    assert grads["w"].tolist() == [2.0, 0.0]


def test_dense_masks_remove_nothing(key):
    params = tree_of_weights(key)
    masks = jp.dense_masks(params)
    assert masks["Dense_0"]["kernel"].shape == (12, 8) and masks["Dense_0"]["bias"] is None
    assert jp.sparsity(masks, params) == 0.0
    assert all(m.dtype == bool and m.all() for m in jax.tree.leaves(masks))


def test_dense_masks_do_not_share_a_buffer_with_the_params(key):
    params = tree_of_weights(key)
    masks = jp.dense_masks(params)
    jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(params)
    assert jax.tree.leaves(masks)[0].all()


def test_sparsity_is_the_exact_fraction_of_the_prunable_weights():
    params = {"a": jnp.ones((3, 7)), "b": jnp.ones((4, 5)), "c": jnp.ones(100)}
    masks = {"a": jnp.ones((3, 7), bool).at[0, :4].set(False), "b": jnp.ones((1, 5), bool)}
    masks["b"] = masks["b"].at[0, 2].set(False)
    assert jp.sparsity({**masks, "c": None}, params) == 8 / 41


def test_sparsity_inside_a_trace_is_an_array():
    masks = {"w": jnp.array([[True, False, False, False]])}
    traced = jax.jit(jp.sparsity)(masks, {"w": jnp.ones((6, 4))})
    assert isinstance(traced, jax.Array) and float(traced) == 0.75


def test_sparsity_of_nothing_is_zero():
    params = {"w": jnp.ones((0, 3))}
    assert jp.sparsity(jp.dense_masks(params), params) == 0.0


def test_sparsity_speaks_for_broadcast_axes_of_any_size():
    params = {"w": jax.ShapeDtypeStruct((100_000, 4), jnp.float32)}
    assert jp.sparsity({"w": jnp.array([[True, True, True, False]])}, params) == 0.25


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.999, 1.0])
def test_the_sparsity_measured_is_the_sparsity_asked_for(n, sparsity):
    params = {"w": jax.random.normal(jax.random.key(n), (n, 1))}
    masks = jp.find_masks(params, sparsity)
    assert jp.sparsity(masks, params) == round(sparsity * n) / n
    np.testing.assert_array_equal(
        masks["w"], slow_keep(jnp.abs(params["w"]), n - round(sparsity * n))
    )


# Masks that do not fit.

TAKERS = {
    "apply_masks": jp.apply_masks,
    "sparsity": lambda params, masks: jp.sparsity(masks, params),
    "summary": jp.summary,
    "within": lambda params, masks: jp.find_masks(params, 0.5, within=masks),
}


@pytest.mark.parametrize("take", TAKERS)
def test_masks_of_another_structure_are_refused(take):
    with pytest.raises(
        ValueError, match=r"is not a tree like the params: nothing at 'bias'; unknown 'scale'"
    ):
        TAKERS[take](KERNEL, {"kernel": jnp.ones((2, 2), bool), "scale": jnp.ones(2, bool)})
    with pytest.raises(ValueError, match=r"is not a tree like the params.*jp.dense_masks"):
        TAKERS[take](KERNEL, {"kernel": jnp.ones((2, 2), bool)})
    more = {"kernel": jnp.ones((2, 2), bool), "bias": None, "scale": jnp.ones(2, bool)}
    with pytest.raises(ValueError, match=r"unknown 'scale' \(its paths are 'bias', 'kernel'\)"):
        TAKERS[take](KERNEL, more)
    with pytest.raises(
        ValueError, match=r"the params: got None; nothing at 'bias', 'kernel'\. Make"
    ):
        jp.apply_masks(KERNEL, None)


@pytest.mark.parametrize("take", TAKERS)
def test_an_optimizer_state_in_the_place_of_masks_is_told_whether_masks_are_in_it(take):
    plain = optax.chain(optax.clip(1.0), optax.sgd(0.1)).init(KERNEL)
    with pytest.raises(ValueError, match=r"state, and there is no pruner in this state.*`jp.hold`"):
        TAKERS[take](KERNEL, plain)
    pruned = optax.MultiSteps(jp.hold(optax.adam(0.1)), 2).init(KERNEL)
    with pytest.raises(ValueError, match=r"is an optimizer state, .*`jp.get_masks\(opt_state\)`"):
        TAKERS[take](KERNEL, pruned)


def test_masks_of_two_trees_are_not_combined():
    words = r"`masks\[1\]` is not a tree like `masks\[0\]`: nothing at 'a'; unknown 'b'. Pass `comb"
    with pytest.raises(ValueError, match=words):
        jp.combine_masks({"a": jnp.ones(2, bool)}, {"b": jnp.ones(2, bool)})


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2, 2), ()])
def test_masks_of_another_rank_or_shape_are_refused_by_path(take, shape):
    with pytest.raises(
        ValueError, match=r"'kernel' has shape .*, in the params \(2, 2\). A mask has the rank"
    ):
        TAKERS[take](KERNEL, {"kernel": jnp.ones(shape, bool), "bias": None})


@pytest.mark.parametrize("take", TAKERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_masks_of_another_dtype_are_refused_by_path(take, dtype):
    with pytest.raises(TypeError, match=r"not bool: 'kernel' is .*mask.astype\(bool\)"):
        TAKERS[take](KERNEL, {"kernel": jnp.ones((2, 2), dtype), "bias": None})


def test_a_mask_where_within_is_prunable_and_the_scores_are_not_is_refused():
    within = {"kernel": jnp.ones((2, 2), bool), "bias": jnp.ones(2, bool)}
    masks = jp.find_masks(KERNEL, 0.5, within=within)
    assert masks["bias"] is None  # what is not prunable now has no mask now


def test_a_hole_in_within_means_that_nothing_was_removed_there():
    masks = jp.find_masks(KERNEL, 0.5, within={"kernel": None, "bias": None})
    assert_trees_equal(masks, jp.find_masks(KERNEL, 0.5))


def test_sparsity_inside_a_trace_is_that_outside_to_a_float32(key):
    params = {**tree_of_weights(key), "fp8": {"kernel": jnp.ones((4, 4), jnp.float8_e4m3fn)}}
    masks = jp.find_masks(params, 0.7, scope=scopes.across)
    inside = jax.jit(jp.sparsity)(masks, params)
    assert inside.dtype == jnp.float32
    assert float(inside) == pytest.approx(jp.sparsity(masks, params), rel=1e-6)


def test_sparsity_counts_more_weights_than_an_int32_holds():
    shapes = {"kernel": jax.ShapeDtypeStruct((2**20, 2**14), jnp.float32)}
    masks = {"kernel": jnp.arange(2**14)[None] % 4 == 0}  # channels
    traced = jax.jit(lambda masks: jp.sparsity(masks, shapes))(masks)
    assert jp.sparsity(masks, shapes) == 0.75 == float(traced)


def test_swapped_params_and_masks_are_told_so():
    with pytest.raises(
        TypeError, match=r"'w' is float32. The other tree is bool: were the two swap"
    ):
        jp.apply_masks({"w": jnp.ones((2, 2), bool)}, {"w": jnp.ones((2, 2))})


@pytest.mark.optimized
def test_the_sparsity_of_masks_that_keep_all_is_zero_inside_of_a_trace():
    params = {"a": jnp.ones((64, 64)), "b": jnp.ones((64, 10)), "c": jnp.ones((7, 3))}
    assert jax.jit(lambda masks: jp.sparsity(masks, params))(jp.dense_masks(params)) == 0
