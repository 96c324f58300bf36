"""The truth about structured pruning: every model of the zoo, cut at random, tells it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune._tree import leaves_with_path, map_with_path
from tests.zoo import ZOO

# Sizes of the groups of each model: what anyone would cut in it, no less and no more.
HEADS = (3, 4, 4)  # heads, what queries and keys share, what values and the kernel behind share
LLAMA = (2, 3, 2, 4)  # heads of keys, queries of each, pairs that turn, what values share
EXPECTED = {
    "mlp": (10, 12),
    "dropout": (10, 12),
    "plain_mlp": (10, 12),
    "haiku_mlp": (10, 12),
    "equinox_mlp": (10, 10),
    "nnx_mlp": (10, 12),
    "shared_layer": (10,),
    "two_towers": (10, 12, 14),
    "maxout": (10,),
    "gated": (10,),
    "straight_through": (10,),
    "own_derivative": (10, 12),
    "resnet": (5, 6, 7, 10),
    "resnet_flatten": (5, 6, 7, 10),
    "resnet_train": (5, 6, 7, 10),
    "mobilenet": (5, 5, 6, 10, 12, 14),
    "resnext": (10, 4, 3, 3, 4, 3, 3),  # groups, and what the inputs and outputs of groups share
    "densenet": (4, 5, 6, 7, 10),
    "unet": (4, 5, 6, 7, 9, 10, 8, 9, 5, 6),
    "unet_transposed": (4, 5, 6, 7, 9, 10, 8, 8, 9, 5, 5, 6),
    "equinox_cnn": (6, 7, 10),
    "patch_merge": (6, 10),
    "patch_merge_strided": (6, 10),
    "pixel_shuffle": (5, 6),
    "group_norm": (3, 4, 2, 5),
    "group_norm_two_pass": (3, 4),
    "transformer": (10, 18, 18, *HEADS, *HEADS),
    "vit": (10, 18, *HEADS),
    "gpt": (14, 20, 20, 3, 3, 4, 4),
    "gpt_split": (14, 20, 20, *HEADS, *HEADS),
    "llama": (14, 10, 10, *LLAMA, *LLAMA),
    "t5": (14, 10, 10, 10, 3, 3, 3, *(4,) * 8),  # heads of a side hang together by their biases
    "scanned": (10, 12),
    "nnx_transformer": (10, 18, *HEADS),
    "mixer": (10, 12, 14),
    "experts": (7, 10, 12),
    "lstm": (7, 10, 12),
    "gru": (7, 10, 12),
    "layer_norm_two_pass": (10, 12),
    "sigmoid_norm": (10, 12),
    "unweighted_mean": (10,),
}
QUICK = ("mlp", "equinox_mlp", "straight_through", "resnet", "nnx_transformer", "scanned")
INEXACT = ("group_norm_two_pass", "mixer", "layer_norm_two_pass", "sigmoid_norm", "unweighted_mean")


def models(*seeds, quick=QUICK):
    """Parametrise over the zoo and seeds; all but the first seed of a few models is slow."""
    cases = []
    for name in ZOO:
        for seed in seeds or (None,):
            marks = () if name in quick and seed in (None, 0) else pytest.mark.slow
            values = (name,) if seed is None else (name, seed)
            cases.append(pytest.param(*values, marks=marks, id="-".join(map(str, values))))
    return pytest.mark.parametrize("name, seed" if seeds else "name", cases)


# Compiling takes most of the time here, and running none.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def groups_of(name):
    model = ZOO[name]()
    return jp.find_groups(model.fn, model.params, *model.inputs)


def shapes_of(name):
    return {path: np.shape(leaf) for path, leaf in leaves_with_path(ZOO[name]().params)}


def random_masks(name, seed, exact=True):
    """Remove 30 to 60 % of the units of each exact (or other) group; and say what was kept."""
    rng = np.random.default_rng(seed)
    keep = {}
    for group in groups_of(name):
        removed = round(rng.uniform(0.3, 0.6) * group.size) if group.exact == exact else 0
        removed = min(max(removed, int(group.exact == exact)), group.size - 1)
        keep[group.name] = np.isin(np.arange(group.size), rng.permutation(group.size)[removed:])
    units = {group: jnp.asarray(k) for group, k in keep.items()}
    return jp.patterns.Coupled(groups_of(name)).expand(units, like=ZOO[name]().params), keep


def kept_indices(name, keep):
    """By path and axis, what is left when the removed units take their indices along."""
    left = {path: [np.arange(n) for n in shape] for path, shape in shapes_of(name).items()}
    for group in groups_of(name):
        for member in group.members:
            gone = np.asarray(member.indices)[~keep[group.name]].ravel()
            axes = left[member.path]
            axes[member.axis] = np.setdiff1d(axes[member.axis], gone)
    return left


def cut(tree, left):
    """Take out of each leaf what is left; leaves of outputs are known by the end of their path."""

    def visit(path, leaf):
        ends = [p for p in left if path == p or path.endswith("/" + p)]
        return leaf[np.ix_(*left[max(ends, key=len)])] if ends else leaf

    return map_with_path(visit, tree)


def assert_close(got, want, tolerance=1e-5):
    """Equal to a fraction of the largest entry of the whole tree."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)
    scale = max(np.abs(b).max() for b in jax.tree.leaves(want))
    assert np.isfinite(scale) and scale > 0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def value_and_grads(fn, params, inputs, take=lambda out: out):
    """Give outputs, and the gradient of a random projection of what ``take`` takes of them."""

    def project(params):
        out = take(fn(params, *inputs))
        rng = np.random.default_rng(5)
        draw = lambda o: jnp.asarray(rng.normal(size=o.shape), o.dtype)
        return sum(jnp.sum(o * draw(o)) for o in jax.tree.leaves(out)), out

    (_, out), grads = jit(jax.value_and_grad(project, has_aux=True))(params)
    return jax.device_get((out, grads))  # NumPy cuts without compiling


def test_every_model_says_what_to_expect():
    assert set(EXPECTED) == set(ZOO)


@models()
def test_groups_are_those_that_anyone_would_cut(name):
    groups = groups_of(name)
    assert sorted(group.size for group in groups) == sorted(EXPECTED[name]), groups
    assert len({group.name for group in groups}) == len(groups)
    shapes = shapes_of(name)
    for group in groups:
        assert len(group.members) > 1
        for member in group.members:
            indices = np.asarray(member.indices)
            assert len(indices) == group.size
            assert len(np.unique(indices)) == indices.size  # units do not overlap
            assert indices.min() >= 0 and indices.max() < shapes[member.path][member.axis]


@models()
def test_groups_say_where_masked_and_shrunk_must_differ(name):
    model, groups = ZOO[name](), groups_of(name)
    blurred = [group for group in groups if not group.exact]
    assert bool(blurred) == bool(model.inexact), groups
    for group in blurred:
        named = primitives(jax.make_jaxpr(model.fn)(model.params, *model.inputs).jaxpr)
        assert any(word in named for word in group.reason.replace("`", " ").split()), group.reason


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and in the jaxprs within."""
    names = set()
    for eqn in jaxpr.eqns:
        names.add(eqn.primitive.name)
        for value in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            names |= primitives(inner) if hasattr(inner, "eqns") else set()
    return names


@models(0, 1, 2)
def test_shrunk_equals_masked(name, seed):
    model = ZOO[name]()
    masks, keep = random_masks(name, seed)
    left = kept_indices(name, keep)
    masked = jit(jp.apply_masks)(model.params, masks)
    small_fn, small_params = jp.shrink(model.fn, model.params, masks)
    assert_close(small_params, cut(jax.device_get(masked), left), tolerance=0)

    want, want_grads = value_and_grads(
        model.fn, masked, model.inputs, take=lambda out: cut(out, left)
    )
    got, grads = value_and_grads(small_fn, small_params, model.inputs)
    assert_close(got, want)
    assert_close(grads, cut(want_grads, left))


@models()
def test_the_cut_is_what_the_groups_say(name):
    model = ZOO[name]()
    masks, keep = random_masks(name, 3)
    want = {}
    for path, axes in kept_indices(name, keep).items():
        for axis, kept in enumerate(axes):
            if len(kept) < shapes_of(name)[path][axis]:
                want.setdefault(path, {})[axis] = kept.tolist()
    cuts = jp.cut_list(model.params, masks)
    got = {path: {axis: list(kept) for axis, kept in axes.items()} for path, axes in cuts.items()}
    assert got == want

    small_fn, small_params = jp.shrink(model.fn, model.params, masks)
    small = jp.count_flops(small_fn, small_params, *model.inputs)
    full = jp.count_flops(model.fn, model.params, *model.inputs)
    assert small < full if want else model.inexact


@models(quick=("mlp",))
def test_shrunk_serves_other_batches_jit_and_vmap(name):
    model = ZOO[name]()
    masks, keep = random_masks(name, 4)
    left = kept_indices(name, keep)
    masked = jit(jp.apply_masks)(model.params, masks)
    small_fn, small_params = jp.shrink(model.fn, model.params, masks)
    want = lambda *inputs: cut(jax.device_get(jit(model.fn)(masked, *inputs)), left)

    more = tuple(jnp.concatenate([x, x[::-1], x[:1]]) for x in model.inputs)
    assert_close(jit(small_fn)(small_params, *more), want(*more))
    assert_close(small_fn(small_params, *model.inputs), want(*model.inputs))

    turned = tuple(x[::-1] for x in model.inputs)
    pairs = tuple(jnp.stack(pair) for pair in zip(model.inputs, turned, strict=True))
    mapped = jit(jax.vmap(functools.partial(small_fn, small_params)))(*pairs)
    assert_close(mapped, jax.tree.map(lambda *o: jnp.stack(o), want(*model.inputs), want(*turned)))


@pytest.mark.slow
@pytest.mark.parametrize("name", INEXACT)
def test_verify_shrink_says_how_far_off_inexact_groups_are(name):
    model = ZOO[name]()
    masks, _ = random_masks(name, 0, exact=False)
    difference = float(jp.verify_shrink(model.fn, model.params, masks, *model.inputs))
    assert 1e-4 < difference < np.inf


@models(quick=("mlp",))
def test_verify_shrink_agrees_where_groups_are_exact(name):
    model = ZOO[name]()
    masks, _ = random_masks(name, 5)
    assert jp.verify_shrink(model.fn, model.params, masks, *model.inputs) < 1e-5
