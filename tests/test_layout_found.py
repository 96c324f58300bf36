"""What axes mean, found in programs: the roles written by hand for every model are the truth."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.layout_functions import Known, f32
from tests.layout_models import MODELS
from tests.zoo import ZOO

X = f32(4, 6)


def found(name):
    model: Known = MODELS[name]()
    return model, jp.find_layout(model.fn, model.params, *model.inputs)


def fits(use, truth):
    """Say whether a use is what the truth says; a role is missing only with a reason."""
    kind, *roles = truth.split()
    told = zip(use.axes, use.why, roles, strict=True)
    right = [
        bool(why) and (role == "-" or role.endswith("?"))
        if axis is None
        else axis == role.rstrip("?") and not why
        for axis, why, role in told
    ]
    return use.kind == kind and all(right)


@pytest.mark.parametrize("name", MODELS)
def test_roles_are_those_written_by_hand(name):
    model, layout = found(name)
    assert model.truth.keys() <= layout.keys()
    for path, truth in model.truth.items():
        wanted = truth.split(" + ")
        got = [[fits(use, want) for use in layout[path]] for want in wanted]
        assert np.array_equal(np.sum(got, 0), [1] * len(wanted)), (path, layout[path], truth)
        assert np.array_equal(np.sum(got, 1), [1] * len(wanted)), (path, layout[path], truth)


def more(tree):
    """The same shapes with a leading axis of two."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), tree)


def around(how, fn, params, inputs):
    """A model in a batch, as members, or as layers: the function, its params and its inputs."""
    if how == "batch":
        return jax.vmap(fn, (None, *[0] * len(inputs))), params, more(inputs)
    if how == "members":
        return jax.vmap(fn, (0, *[None] * len(inputs))), more(params), inputs
    each = lambda p, *x: jax.lax.scan(lambda c, q: (c + 1.0, fn(q, *x)), 0.0, p)[1]
    return each, more(params), inputs


MAPPED = [name for name in MODELS if name != "experts_ragged"]  # which jax cannot map over


@pytest.mark.parametrize("how", ["batch", "members", "layers"])
@pytest.mark.parametrize("name", MAPPED[::5])
def test_what_is_put_around_a_model_changes_no_role(name, how):
    """A role may be lost where something is mapped over, but none becomes another one."""
    model, layout = found(name)
    fn, params, inputs = around(how, *model[:3])
    outer = jp.find_layout(fn, params, *inputs)
    for path, uses in layout.items():
        rank = len(uses[0].axes)
        lead = () if how == "batch" else (("group",) if how == "members" else ("layer",))
        wanted = (*lead, *layout.roles(path, rank))
        got = outer.roles(path, len(wanted))
        if path == "w" and name == "vector" and how == "members":  # as a matrix is
            wanted = ("out", "in")
        agreed = [a is None or b is None or a == b for a, b in zip(got, wanted, strict=True)]
        assert all(agreed), (path, got, wanted)


@pytest.mark.parametrize(
    "name",
    [
        *("haiku_mlp", "two_towers", "resnext", "patch_merge"),
        *("pixel_shuffle", "llama", "mixer", "nnx_transformer", "gru", "equinox_cnn"),
    ],
)
def test_kernels_of_the_zoo_have_inputs_and_outputs(name):
    """Whatever the model, a kernel in it is a product or a convolution with all of its roles."""
    model = ZOO[name]()
    layout = jp.find_layout(model.fn, model.params, *model.inputs)
    kernels = [p for p in layout if re.fullmatch(r".*(kernel|weight|/w|out|query|up|down)", p)]
    for path in kernels:
        uses = [use for use in layout[path] if len(use.axes) > 1]
        for use in uses:
            assert use.kind in ("matmul", "conv"), (path, use)
            assert {"in", "out"} <= set(use.axes) and None not in use.axes, (path, use)


@pytest.mark.parametrize(
    ("name", "path", "zero", "through"),
    [
        ("softplus", "w", math.log(2), "layout_functions.py"),
        ("exp_gain", "s", 1.0, "`exp` at layout_functions.py"),
        ("weight_norm", "w", math.nan, "`div` at layout_functions.py"),
        ("weight_norm", "g", 0.0, ""),
        ("weight_norm_safe", "w", 0.0, ""),
        ("standardized", "w", None, "`sub` at layout_functions.py"),
        ("symmetric", "w", None, "`add` at layout_functions.py"),
        ("quantized", "w", 0.0, ""),
        ("quantized", "s", math.nan, "`div` at layout_functions.py"),
        ("straight_through", "w", 0.0, ""),
        ("rounded", "w", 0.0, ""),
        ("lora_merged", "a", None, "`dot_general` at layout_models.py"),
        ("codebook", "index", None, "`gather` at layout_functions.py"),
        ("softmax_of_weights", "w", None, "layout_functions.py"),
    ],
)
def test_zeros_become_what_the_function_makes_of_them(name, path, zero, through):
    use = found(name)[1][path][0]
    assert use.zero is None if zero is None else use.zero == pytest.approx(zero, nan_ok=True)
    assert through in use.through and bool(through) == bool(use.through)


@pytest.mark.parametrize(
    ("name", "path", "why"),
    [
        ("python_loop", "w", "its indices are read one by one, in `slice` at layout_functions.py"),
        ("split_into_in_and_out", "w", "parts of it are 'in' and 'out'"),
        ("flat_stack", "w", "parts of it are '(layer' and 'in|in' and 'layer)'"),
        ("sum_of_weights", "w", "`reduce_sum` at layout_functions.py:.* runs over it without data"),
        ("lora_merged", "a", "sums over it with another parameter"),
        ("embedding", "table", "data looks its indices up, in `gather` at layout_functions.py"),
        ("map_over_outputs", "w", "maps over it, and lays what it makes side by side"),
        ("nnx_one_layer_of_members", "kernel", "outputs, or members that `vmap` maps over"),
        ("heads_with_gates", "q", "it goes on as a group of 'gate'"),
        ("rnn", "b", "it meets data element by element, in `add` at layout_models.py"),
        ("rnn", "h0", "a loop starts with it, in `scan` at layout_models.py"),
        ("unread", "v", "it is not used"),
        ("given_back", "t", "it meets no data"),
    ],
)
def test_an_axis_without_a_role_says_why(name, path, why):
    model, layout = found(name)
    assert re.search(why, layout.why(path, len(model.params[path].shape))), layout[path]


@pytest.mark.parametrize("name", ["loss_of_a_decoder", "weight_norm", "linen_tied", "shard_map"])
def test_a_layout_is_the_same_again_and_through_json(name):
    _, layout = found(name)
    assert layout == found(name)[1] and hash(layout) == hash(found(name)[1])
    assert jp.Layout(json.loads(json.dumps(layout.json))) == layout


def test_arrays_and_shapes_tell_the_same():
    net = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    params = {"w": jnp.ones((6, 10)), "v": np.ones((10, 3), np.float32)}
    shapes = jax.tree.map(lambda w: f32(*w.shape), params)
    assert jp.find_layout(net, params, jnp.ones((4, 6))) == jp.find_layout(net, shapes, X)


def test_a_scan_says_what_its_layers_say():
    """One stack, or a list of its layers: the axes of a layer mean the same."""
    step = lambda h, q: h + jax.nn.gelu(h @ q["up"]) @ q["down"]
    stack = {"up": f32(3, 6, 10), "down": f32(3, 10, 6)}
    layers = [{"up": f32(6, 10), "down": f32(10, 6)} for _ in range(3)]
    scanned = jp.find_layout(
        lambda p, x: jax.lax.scan(lambda h, q: (step(h, q), None), x, p)[0], stack, X
    )
    listed = jp.find_layout(lambda p, x: step(step(step(x, p[0]), p[1]), p[2]), layers, X)
    for name in stack:
        assert scanned.roles(name, 3) == ("layer", *listed.roles(f"1/{name}", 2))


def test_whole_numbers_and_unknown_primitives_pass_without_a_warning():
    """`find_groups` warns of both; nothing is frozen here, so nobody has to know."""
    from jax.extend import core

    strange = core.Primitive("strange")
    strange.def_abstract_eval(lambda x: x)

    def fn(p, x):
        return strange.bind(x @ strange.bind(p["w"])) + p["table"][p["index"]][None]

    params = {
        "w": f32(6, 10),
        "table": f32(5, 10),
        "index": jax.ShapeDtypeStruct((), jnp.int32),
    }
    layout = jp.find_layout(fn, params, X)
    (use,) = layout["w"]
    assert (use.kind, use.zero) == ("derived", None) and "strange" in use.through
    assert layout.roles("w", 2) == (None, None) and "`strange` at" in layout.why("w", 2)
    assert layout["table"][0].kind == "embedding" and layout["index"][0].kind == "derived"


def test_keywords_go_to_the_function():
    fn = lambda p, x, *, tied: x @ p["w"] @ (p["w"].T if tied else p["v"])
    params = {"w": f32(6, 10), "v": f32(10, 3)}
    assert jp.find_layout(fn, params, X, tied=False)["v"][0].kind == "matmul"
    tied = jp.find_layout(fn, params, X, tied=True)
    assert tied["v"][0].kind == "unused" and tied.roles("w", 2) == (None, None)
    assert list(map(str, tied["w"])) == ["matmul (in, out)", "matmul (out, in)"]


def test_a_module_in_the_place_of_a_function_is_refused():
    import flax.linen as nn

    with pytest.raises(TypeError, match=r"`find_layout` got a Dense .* Pass its `apply`"):
        jp.find_layout(nn.Dense(3), {"w": f32(6, 3)}, X)
    with pytest.raises(TypeError) as error:
        jp.find_layout(lambda p, x: x @ p["w"], {"w": f32(5, 10)}, X)
    assert any("jaxprune traced `fn(params, *inputs)`" in n for n in error.value.__notes__)


def test_a_loop_is_followed_once_whatever_it_is_long():
    """A stack of a thousand layers is read as fast as one of three: uses do not add up."""
    fn = lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0]
    for length in (3, 1000):
        (use,) = jp.find_layout(fn, {"w": f32(length, 6, 6)}, X)["w"]
        assert use.axes == ("layer", "in", "out")


def test_kernels_that_an_input_gates_are_kernels():
    params = {"w": jnp.ones((6, 4))}
    drop = lambda p, x, m: x @ (p["w"] * m)
    for gate in (jnp.float32(0.5), jnp.ones((6, 4)), jnp.ones((6, 1))):
        (use,) = jp.find_layout(drop, params, jnp.ones((2, 6)), gate)["w"]
        assert (use.kind, use.axes) == ("matmul", ("in", "out"))
    # Another kernel for each example is scaled by data, as a gain is.
    each = lambda p, x, s: jnp.einsum("bi,bio->bo", x, p["w"][None] * s[:, :, None])
    (use,) = jp.find_layout(each, params, jnp.ones((2, 6)), jnp.ones((2, 6)))["w"]
    assert use.kind == "gain"


def test_a_scale_of_queries_is_no_kernel():
    def scores(p, q, k):
        return jnp.einsum("btd,bsd->bts", q * p["g"][None, None], k)

    (use,) = jp.find_layout(scores, {"g": jnp.ones(4)}, jnp.ones((2, 3, 4)), jnp.ones((2, 5, 4)))[
        "g"
    ]
    assert use.kind == "gain"


def test_a_function_that_reads_none_of_its_params_is_refused():
    params = {"w": jnp.ones((6, 4))}
    with pytest.raises(ValueError, match=r"reads none of its params \('w'\).*closed over"):
        jp.find_layout(lambda p, x: x @ params["w"], params, jnp.ones((2, 6)))


def test_members_of_a_depthwise_convolution_are_not_taken_for_its_outputs():
    def depthwise(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6
        )

    params, x = {"w": jnp.ones((2, 3, 3, 1, 6))}, jnp.ones((1, 5, 5, 6))
    shared = lambda p, x: jax.vmap(depthwise, (0, None))(p["w"], x)
    layout = jp.find_layout(shared, params, x)
    assert layout.roles("w", 5) == (None, "window", "window", "in", None)
    assert "members that `vmap` maps over" in layout.why("w", 5)
    last = {"w": jnp.ones((3, 3, 1, 6, 2))}
    shared = lambda p, x: jax.vmap(depthwise, (-1, None))(p["w"], x)
    assert jp.find_layout(shared, last, x).roles("w", 5)[2:] == ("in", None, None)
    own = lambda p, x: jax.vmap(depthwise)(p["w"], x)
    layout = jp.find_layout(own, params, jnp.ones((2, 1, 5, 5, 6)))
    assert layout.roles("w", 5) == ("group", "window", "window", "in", "out")
