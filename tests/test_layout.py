"""What a layout says, where it comes from, and what becomes of a wrong one."""

import functools
import json
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import patterns, scopes
from jaxprune._use import Entry
from tests.helpers import TraceCount

PARAMS = {
    "blocks": {"up": jnp.arange(24.0).reshape(3, 2, 4) + 1, "scale": jnp.ones((3, 4))},
    "head": jnp.arange(8.0).reshape(4, 2) + 1,
}
LAYOUT = jp.Layout({"blocks/up": ("layer", "in", "out"), "head": ("in", "out")})
TIED = jp.Layout(
    [
        Entry(
            "table",
            (
                jp.Use("embedding", (None, "out"), ("its rows are looked up", "")),
                jp.Use("matmul", ("out", "in")),
            ),
            (6, 4),
        )
    ]
)


# As data.


def test_a_layout_is_a_mapping_from_paths_to_uses():
    assert list(LAYOUT) == ["blocks/up", "head"]
    assert LAYOUT["head"] == (jp.Use("matmul", ("in", "out")),)
    assert len(LAYOUT) == 2 and "head" in LAYOUT and "tail" not in LAYOUT


def test_what_a_layout_says_nothing_of_is_no_key():
    assert LAYOUT.get("tail") is None
    with pytest.raises(KeyError, match="tail"):
        LAYOUT["tail"]


def test_a_layout_of_a_layout_is_the_same():
    assert jp.Layout(LAYOUT) == LAYOUT


def test_a_use_has_a_reason_for_each_axis_or_none_at_all():
    with pytest.raises(ValueError, match="1 reasons for 2 axes"):
        jp.Use("matmul", ("in", None), ("",))


def test_layouts_are_equal_hashable_and_go_through_json_and_pickle():
    derived = Entry(
        "v", (jp.Use("derived", ("in",), zero=math.nan, through="div at f.py:3"),), (2,)
    )
    endless = Entry("u", (jp.Use("derived", ("in",), zero=-math.inf),), (2,))
    for layout in (LAYOUT, TIED, jp.layouts.flax, jp.Layout([derived, endless])):
        again = jp.Layout(json.loads(json.dumps(layout.json, allow_nan=False)))
        assert again == layout and hash(again) == hash(layout)
        assert pickle.loads(pickle.dumps(layout)) == layout
    assert LAYOUT != TIED


def test_equal_layouts_share_a_program():
    counted = TraceCount(lambda params, **_: jax.tree.map(jnp.abs, params))
    for _ in range(2):
        layout = jp.Layout({"blocks/up": ("layer", "in", "out"), "head": ("in", "out")})
        jp.find_masks(PARAMS, 0.5, criterion=counted, layout=layout)
    assert counted.count == 1


def test_what_the_second_layout_says_counts():
    both = LAYOUT | jp.Layout({".*up": ("in", "layer", "out")})
    assert both.roles("blocks/up", 3) == ("in", "layer", "out")
    assert both.roles("head", 2) == ("in", "out")
    # One that has nothing to say of a leaf of this rank leaves it as it was.
    assert (LAYOUT | jp.layouts.flax).roles("blocks/up", 3) == ("layer", "in", "out")


def test_a_part_of_a_layout():
    whole = jp.Layout({"params/w": ("in", "out"), ".*/v": ("out", "in")})
    assert list(whole.at("params")) == ["w", ".*/v"]
    found = whole.on({"params": {"w": jnp.ones((2, 3)), "a": {"v": jnp.ones((3, 2))}}}, "f")
    assert list(found.at("params")) == ["a/v", "w"]
    assert list(found.at({"params": {"w": 0}})) == ["params/w"]
    with pytest.raises(ValueError, match=r"layout.at\('batch'\).*nothing below.*params/a/v"):
        found.at("batch")


def test_printed_a_layout_is_a_table_with_reasons():
    text = str(TIED | jp.Layout({"w": ("in", None)}))
    assert text.splitlines() == [
        "table  6x4  embedding (?, out)",
        "table  6x4  matmul (out, in)",
        "w           unknown (in, ?)",
        "cannot be told:",
        "  table axis 0: its rows are looked up",
        "  w axis 1: declared so",
    ]


def test_roles_are_those_that_all_uses_agree_on():
    assert TIED.roles("table", 2) == (None, None)
    assert "it is used as" not in TIED.why("table", 2)  # a use has a reason of its own
    twice = jp.Layout(
        [Entry("w", (jp.Use("matmul", ("in", "out")), jp.Use("matmul", ("in", "in"))))]
    )
    assert twice.roles("w", 2) == ("in", None)
    assert "matmul (in, out) and as matmul (in, in)" in twice.why("w", 2)


# Declared.


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"w": ("in", "outt")}, r"role 'outt'. Did you mean 'out'"),
        ({"w": ("rows", "out")}, r"role 'rows'. The roles are 'layer', 'in'"),
        ({"(": ("in", "out")}, r"Layout.*no regular expression"),
    ],
)
def test_wrong_rules_are_refused_when_they_are_declared(rules, words):
    with pytest.raises(ValueError, match=words):
        jp.Layout(rules)


@pytest.mark.parametrize("rules", [{"w": "in"}, {"w": 3}, "w", [("w", "in")]])
def test_what_is_no_mapping_to_roles_is_refused(rules):
    with pytest.raises(TypeError, match=r"Layout.* got "):
        jp.Layout(rules)


def test_what_json_gave_has_to_be_whole():
    broken = LAYOUT.json
    del broken[0]["shape"]
    with pytest.raises(ValueError, match=r"entry without 'shape'"):
        jp.Layout(broken)


def test_a_rule_that_matches_nothing_is_refused_with_the_paths():
    with pytest.raises(ValueError, match=r"`find_masks\(layout=...\)` got 'block/.*'.*blocks/up"):
        jp.find_masks(PARAMS, 0.5, layout=jp.Layout({"block/.*": ("layer", "in", "out")}))


def test_a_rule_of_another_rank_is_refused_by_path():
    with pytest.raises(ValueError, match=r"'blocks/scale' of shape \(3, 4\) by .*a role for each"):
        jp.find_masks(PARAMS, 0.5, layout=jp.Layout({"blocks/.*": ("layer", "in", "out")}))


def test_what_another_rule_overrides_need_not_fit():
    general = jp.Layout({"head|.*/up": ("in", "out")})
    masks = jp.find_masks(PARAMS, 0.5, layout=general | LAYOUT)
    assert masks["blocks"]["up"].sum((1, 2)).tolist() == [4, 4, 4]


def test_a_rule_for_what_an_optimizer_does_not_get_is_no_error():
    tx = optax.partition(
        {
            "prune": jp.prune(optax.sgd(0.1), schedule=jp.schedules.constant(0.5), layout=LAYOUT),
            "rest": optax.sgd(0.1),
        },
        {"blocks": "prune", "head": "rest"},
    )
    masks = jp.get_masks(tx.init(PARAMS))
    assert masks["blocks"]["up"].shape == (3, 2, 4)


def test_the_layout_of_another_tree_is_refused_path_by_path():
    found = LAYOUT.on({"blocks": {"up": jnp.ones((3, 2, 5))}, "head": jnp.ones((4, 2))}, "f")
    with pytest.raises(
        ValueError,
        match=r"says nothing of 'blocks/scale'.*'blocks/up' has shape "
        r"\(3, 2, 4\), in the layout \(3, 2, 5\)",
    ):
        jp.find_masks(PARAMS, 0.5, layout=found)
    with pytest.raises(ValueError, match=r"says nothing of 'up'.*knows .*layout.at\(prefix\)"):
        jp.find_masks({"up": jnp.ones((3, 2, 5))}, 0.5, layout=found)


@pytest.mark.parametrize("wrong", ["flax", {"w": ("in", "out")}, jp.layouts])
def test_what_is_no_layout_is_refused(wrong):
    with pytest.raises(TypeError, match=r"`prune` got layout=.*jp.find_layout"):
        jp.prune(optax.sgd(0.1), schedule=jp.schedules.constant(0.5), layout=wrong)


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_a_declared_layout_may_say_nothing_of_biases(name):
    params = {"kernel": jnp.arange(24.0).reshape(2, 3, 4), "bias": jnp.zeros((2, 4))}
    layout = jp.Layout({"kernel": ("layer", "in", "out")})
    settings = {"sparsity": 0.5, "begin": 0, "end": 9, "every": 3, "layout": layout}
    settings |= {"key": jax.random.key(0)} if name == "set" else {}
    state = getattr(jp.dynamic, name)(optax.sgd(0.1), **settings).init(params)
    assert jp.get_masks(state)["kernel"].sum((1, 2)).tolist() == [6, 6]


def test_rules_may_be_joined_as_they_are():
    assert jp.layouts.flax | {"w": ("in", "out")} == jp.layouts.flax | jp.Layout(
        {"w": ("in", "out")}
    )


def test_a_convention_that_cannot_tell_takes_nothing_back():
    known = jp.Layout({"blocks/up/kernel": ("layer", "in", "out")})
    for both in (known | jp.layouts.flax, jp.layouts.flax | known):
        assert both.roles("blocks/up/kernel", 3) == ("layer", "in", "out")
    declared = known | jp.Layout({"blocks/up/kernel": (None, None, None)})
    assert declared.roles("blocks/up/kernel", 3) == (None, None, None)


@pytest.mark.parametrize(
    ("use", "user"),
    [
        (lambda wrong: jp.summary(PARAMS, jp.dense_masks(PARAMS), layout=wrong), "summary"),
        (lambda wrong: scopes.erk(PARAMS, 0.5, layout=wrong), "erk"),
        (lambda wrong: scopes.uniform(PARAMS, 0.5, layout=wrong), "uniform"),
        (lambda wrong: scopes.custom(PARAMS, {}, layout=wrong), "custom"),
        (lambda wrong: jp.by_use("matmul", layout=wrong), "by_use"),
    ],
)
@pytest.mark.parametrize("wrong", [jp.find_layout, "flax"])
def test_what_is_no_layout_is_refused_everywhere(use, user, wrong):
    with pytest.raises(TypeError, match=rf"`{user}` got layout=.*jp.find_layout"):
        use(wrong)


# By convention.


@pytest.mark.parametrize(
    ("convention", "path", "shape", "roles"),
    [
        ("flax", "Dense_0/kernel", (3, 4), ("in", "out")),
        ("flax", "Conv_1/kernel", (3, 3, 4, 8), ("window", "window", "in", "out")),
        ("flax", "stem_conv/kernel", (3, 4, 8), ("window", "in", "out")),
        ("flax", "ConvTranspose_0/kernel", (3, 3, 4, 8), (None,) * 4),
        ("flax", "blocks/Dense_0/kernel", (8, 3, 4), (None,) * 3),
        ("flax", "SelfAttention_0/query/kernel", (8, 2, 4), ("in", "out", "out")),
        ("flax", "MultiHeadDotProductAttention_0/out/kernel", (2, 4, 8), ("in", "in", "out")),
        ("flax", "out/kernel", (2, 4, 8), (None,) * 3),
        ("flax", "linear/w", (3, 4), ("in", "out")),
        ("flax", "Embed_0/embedding", (9, 4), (None, "out")),
        ("torch", "layers/0/weight", (4, 3), ("out", "in")),
        ("torch", "features/conv1/weight", (8, 3, 3, 3), ("out", "in", "window", "window")),
        ("torch", "rnn/weight_hh_l0", (12, 4), ("out", "in")),
        ("torch", "up/ConvTranspose2d_0/weight", (8, 3, 3, 3), (None,) * 4),
        ("torch", "h/0/attn/c_attn/weight", (4, 12), (None, None)),
        ("torch", "wte/weight", (9, 4), (None, "out")),
        ("torch", "blocks/layer_norm/weight", (6, 8), (None, None)),
        ("torch", "blocks/ln_1/weight", (6, 8), (None, None)),
        ("flax", "blocks/ln/w", (6, 8), (None, None)),
    ],
)
def test_conventions_by_name_and_rank(convention, path, shape, roles):
    layout = getattr(jp.layouts, convention)
    assert layout.roles(path, len(shape)) == roles
    if None in roles:
        assert layout.why(path, len(shape))


def test_stacked_gains_are_no_matrices_by_convention():
    params = {"norm": {"weight": jnp.ones((6, 8))}, "fc": {"weight": jnp.ones((6, 8, 8))}}
    layout = jp.layouts.torch | {"fc/weight": ("layer", "out", "in")}
    masks = jp.find_masks(params, 0.5, layout=layout)
    assert (
        masks["norm"]["weight"] is None and masks["fc"]["weight"].sum((1, 2)).tolist() == [32] * 6
    )


def test_a_summary_says_what_a_convention_does_not_know():
    params = {
        "layers": {n: {"kernel": jnp.ones((3, *s))} for n, s in (("a", (4, 8)), ("b", (8, 4)))}
    }
    notes = jp.summary(params, jp.dense_masks(params), layout=jp.layouts.flax).advice
    assert "look like stacks of 3 layers" in notes[0]


def test_a_convention_is_enough_to_prune_by():
    params = {"Dense_0": {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.zeros(4)}}
    masks = jp.find_masks(params, 0.5, scope=scopes.windows(4, axis="in"), layout=jp.layouts.flax)
    assert masks["Dense_0"]["kernel"].sum(0).tolist() == [2, 2, 2, 2]
    turned = {"weight": params["Dense_0"]["kernel"].T}
    masks = jp.find_masks(turned, 0.5, scope=scopes.windows(4, axis="in"), layout=jp.layouts.torch)
    assert masks["weight"].sum(1).tolist() == [2, 2, 2, 2]


# By use.


def test_leaves_are_chosen_by_use():
    uses = {
        "kernel": jp.Use("embedding", (None, "out")),
        "scale": jp.Use("matmul", ("in", "out")),
        "log_scale": jp.Use("derived", ("in", "out"), zero=1.0, through="exp at model.py:3"),
    }
    params = {name: jnp.arange(4.0).reshape(2, 2) + 1 for name in uses}
    layout = jp.Layout([Entry(name, (use,), (2, 2)) for name, use in uses.items()])
    assert [n for n, m in jp.find_masks(params, 0.5).items() if m is not None] == ["kernel"]
    chosen = lambda where: [
        n
        for n, m in jp.find_masks(params, 0.5, where=where, layout=layout).items()
        if m is not None
    ]
    assert chosen(jp.is_matrix) == ["scale"]
    assert chosen(jp.by_use("embedding", "derived")) == ["kernel", "log_scale"]
    assert chosen(jp.exclude("kernel", where=jp.by_use("embedding", "matmul"))) == ["scale"]
    tx = jp.dynamic.rigl(optax.sgd(0.1), sparsity=0.5, begin=0, end=1, every=1, layout=layout)
    assert list(jp.get_masks(tx.init(params))) == ["kernel", "log_scale", "scale"]
    assert jp.get_masks(tx.init(params))["kernel"] is None


def test_a_leaf_of_several_uses_is_taken_only_if_all_are_named():
    where = lambda *kinds: jp.by_use(*kinds, layout=TIED)("table", jnp.ones((6, 4)))
    assert not where("matmul") and not where("embedding") and where("matmul", "embedding")


def test_names_still_tell_what_no_use_can():
    params = {"lora_a": jnp.ones((4, 2)), "w": jnp.ones((4, 4))}
    layout = jp.Layout({".*": ("in", "out")})
    assert jp.find_masks(params, 0.5, layout=layout)["lora_a"] is None


def test_stacked_vectors_are_vectors():
    params = {"a": jnp.ones((3, 8)), "b2": jnp.ones((8, 8))}
    layout = jp.Layout({"a": ("layer", None), "b2": ("in", "out")})
    assert jp.find_masks(params, 0.5)["a"] is not None
    assert jp.find_masks(params, 0.5, layout=layout)["a"] is None


@pytest.mark.parametrize(
    ("kinds", "words"),
    [((), "no use"), (("matmul", "matmul"), "a use twice"), (("dense",), "'dense'.*'matmul'")],
)
def test_wrong_uses_are_refused(kinds, words):
    with pytest.raises(ValueError, match=rf"`by_use` got {words}"):
        jp.by_use(*kinds)


def test_uses_that_no_leaf_has_are_told_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"'table' as embedding and as matmul. Name all uses"):
        jp.find_masks({"table": jnp.ones((6, 4))}, 0.5, where=jp.by_use("matmul"), layout=TIED)


def test_uses_without_a_layout_are_refused():
    with pytest.raises(ValueError, match=r"by_use\('matmul'\).*layout=jp.find_layout"):
        jp.find_masks(PARAMS, 0.5, where=jp.by_use("matmul"))


# Axes by name.


NAMED = {
    "windows": {"scope": scopes.windows(2, axis="in")},
    "Channels": {"pattern": patterns.Channels("in")},
    "Blocks": {"pattern": patterns.Blocks((2, 2), axes=("in", "out"))},
}


@pytest.mark.parametrize("name", NAMED)
def test_names_without_a_layout_are_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}\(.*names axes by their roles.*jp.layouts.flax"):
        jp.find_masks(PARAMS, 0.5, **NAMED[name])


@pytest.mark.parametrize("name", NAMED)
def test_leaves_without_an_axis_of_that_name_are_listed(name):
    params = {"v": jnp.ones((4, 4)), "w": jnp.ones((4, 4))}
    layout = jp.Layout({"v": (None, "out"), "w": ("in", "out")})
    with pytest.raises(
        ValueError,
        match=rf"`{name}\(.*'v' of shape \(4, 4\), whose axes are "
        r"\(\?, out\): none is 'in' \(declared so\).*jp.exclude",
    ):
        jp.find_masks(params, 0.5, layout=layout, **NAMED[name])


@pytest.mark.parametrize("name", ["windows", "Blocks"])
def test_two_axes_of_a_name_are_refused_where_one_is_meant(name):
    layout = jp.Layout({"w": ("in", "in", "out")})
    with pytest.raises(ValueError, match=rf"`{name}\(.*'w' .*there are 2 axes 'in'"):
        jp.find_masks({"w": jnp.ones((4, 4, 4))}, 0.5, layout=layout, **NAMED[name])


@pytest.mark.parametrize("name", NAMED)
def test_a_leaf_whose_uses_differ_has_no_names(name):
    where = lambda path, x: True
    with pytest.raises(ValueError, match=r"'table'.*its rows are looked up"):
        jp.find_masks({"table": jnp.ones((6, 4))}, 0.5, where=where, layout=TIED, **NAMED[name])


def test_channels_are_indices_over_all_axes_of_the_name():
    scores = {"w": jnp.arange(12.0).reshape(2, 3, 2)}
    layout = jp.Layout({"w": ("in", "out", "out")})
    units = patterns.Channels("out", layout=layout).pool(scores)["w"]
    np.testing.assert_array_equal(units, scores["w"].mean(0, keepdims=True))
    grouped = jp.Layout({"w": ("group", "in", "out")})
    assert patterns.Channels("out", layout=grouped).pool(scores)["w"].shape == (2, 1, 2)


def test_blocks_lie_inside_of_each_place_of_a_window():
    scores = {"w": jnp.arange(32.0).reshape(2, 4, 4)}
    layout = jp.Layout({"w": ("window", "out", "in")})
    pattern = patterns.Blocks((4, 2), axes=("in", "out"), layout=layout)
    units = pattern.pool(scores)["w"]
    assert units.shape == (2, 2, 1)
    want = np.asarray(scores["w"]).reshape(2, 2, 2, 4).mean((2, 3))
    np.testing.assert_array_equal(units[..., 0], want)
    assert pattern.expand({"w": units > 10}, like=scores)["w"].shape == (2, 4, 4)


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        (("in", "in"), ValueError, "an axis twice"),
        (("in", "outer"), ValueError, "names no role.*Did you mean 'out'"),
        (("in",), TypeError, "an axis for each of the 2 sizes"),
        ("in", TypeError, "an axis for each"),
        (("layer", "in"), ValueError, "names no role"),
    ],
)
def test_wrong_axes_of_blocks_are_refused_when_built(axes, error, words):
    with pytest.raises(error, match=words):
        patterns.Blocks((2, 2), axes=axes)


@pytest.mark.parametrize("pattern", [patterns.Channels(-1), "coupled"])
def test_outputs_that_are_units_cannot_rank_their_inputs(pattern):
    if pattern == "coupled":
        net = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]
        params = {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))}
        pattern = patterns.Coupled(jp.find_groups(net, params, jnp.ones((1, 3))))
    with pytest.raises(ValueError, match=r"`per_output` lets the inputs.*leaves no inputs to rank"):
        jp.find_masks(
            {"w": jnp.ones((3, 4)), "v": jnp.ones((4, 2))},
            0.5,
            pattern=pattern,
            scope=scopes.per_output,
        )


def test_a_vector_has_no_inputs_to_rank():
    with pytest.raises(ValueError, match=r"`per_output`.*'v' of shape \(4,\), which has no inputs"):
        settings = {"scope": scopes.per_output, "where": lambda path, x: True}
        jp.find_masks({"v": jnp.ones(4)}, 0.5, **settings)
    empty = jp.find_masks(
        {"w": jnp.ones((4, 0)), "v": jnp.ones((4, 4))}, 0.5, scope=scopes.per_output
    )
    assert empty["w"].shape == (4, 0) and empty["v"].sum() == 8


def test_outputs_have_to_be_known_where_there_is_a_layout():
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match=r"`per_output`.*'v' of shape \(4, 4\), whose axes are"):
        layout = jp.Layout({"w": ("in", "out"), "v": ("in", None)})
        jp.find_masks(params, 0.5, scope=scopes.per_output, layout=layout)


def test_per_output_counts_in_each_output_group_and_layer():
    w = np.random.default_rng(0).normal(size=(2, 3, 8, 5)).astype(np.float32)
    layout = jp.Layout({"w": ("layer", "group", "in", "out")})
    masks = jp.find_masks({"w": w}, 0.75, scope=scopes.per_output, layout=layout)["w"]
    assert (masks.sum(2) == 2).all()
    want = np.sort(np.abs(w), axis=2)[:, :, -2:].min(2, keepdims=True)
    np.testing.assert_array_equal(masks, np.abs(w) >= want)


def test_every_column_of_blocks_loses_as_many():
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    masks = jp.find_masks({"w": w}, 0.75, pattern=patterns.Blocks((4, 4)), scope=scopes.per_output)
    assert (np.asarray(masks["w"]).reshape(8, 4, 4, 4).all((1, 3)).sum(0) == 2).all()


def test_an_axis_that_is_named_by_role_and_by_number_is_named_twice():
    layout = jp.Layout({"w": ("in", "out")})
    with pytest.raises(ValueError, match=r"'w' of shape .*, of which it names an axis twice"):
        pattern = patterns.Blocks((2, 2), axes=("in", 0))
        jp.find_masks({"w": jnp.ones((4, 4))}, 0.5, pattern=pattern, layout=layout)


def test_blocks_are_shown_as_they_were_built():
    assert repr(patterns.Blocks((2, 4), "norm")) == "Blocks(shape=(2, 4), reduce='norm')"
    assert repr(patterns.Blocks((2, 4), axes=("in", "out"))).endswith("axes=('in', 'out'))")


# Criteria.


def test_a_criterion_that_names_layout_is_given_it():
    seen = []

    def criterion(params, *, layout, **_):
        seen.append(layout and layout.layers("blocks/up", 3))
        return jax.tree.map(jnp.abs, params)

    for layout in (LAYOUT, None):
        jp.find_masks(PARAMS, 0.5, criterion=criterion, layout=layout)
    assert seen == [(0,), None]


def test_evidence_that_is_bound_to_an_elementwise_criterion_stays_stacked():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    bound = functools.partial(
        jp.criteria.taylor, grads=jp.prunable(grads, where=jp.by_path("head|.*/up"))
    )
    where = jp.by_path("head|.*/up")
    got = jp.find_masks(PARAMS, 0.5, criterion=bound, where=where, layout=LAYOUT)
    want = jp.find_masks(
        PARAMS, 0.5, criterion=jp.criteria.taylor, where=where, layout=LAYOUT, grads=grads
    )
    np.testing.assert_array_equal(got["blocks"]["up"], want["blocks"]["up"])


def test_a_criterion_that_stumbles_over_a_list_of_layers_is_told_what_to_do():
    def closed(params, **_):
        return jax.tree.map(lambda w, g: jnp.abs(w * g), params, jp.prunable(PARAMS))

    with pytest.raises(ValueError, match="structure") as caught:
        jp.find_masks(PARAMS, 0.5, criterion=closed, layout=LAYOUT)
    assert "`closed` is shown the list of the layers" in caught.value.__notes__[0]


def test_layers_of_nnx_variables_have_their_layout_for_parts_that_know_none():
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Param)
    state = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), state)
    foreign = lambda units, sparsity, within=None: scopes.per_leaf(units, sparsity, within=within)
    layout = jp.Layout({"kernel": ("layer", "in", "out")})
    settings = {"pattern": patterns.Channels("out"), "layout": layout}
    got = jp.find_masks(state, 0.5, scope=foreign, **settings)
    want = jp.find_masks(state, 0.5, **settings)
    np.testing.assert_array_equal(jax.tree.leaves(got)[0], jax.tree.leaves(want)[0])
    bare = jax.tree.leaves(state)[1]
    layout = jp.Layout({"": ("layer", "in", "out")})
    masks = jp.find_masks(bare, 0.5, pattern=patterns.Channels("out"), scope=foreign, layout=layout)
    assert masks.sum((1, 2)).tolist() == [3, 3, 3]


# Layers.


def test_a_list_of_sparsities_is_asked_for_as_an_array():
    layout = jp.Layout({"w": ("layer", "in", "out")})
    with pytest.raises(ValueError, match=r"layers of a stack are one array, `np.array"):
        jp.find_masks({"w": jnp.ones((2, 3, 4))}, {"w": [0.25, 0.75]}, layout=layout)


def test_an_array_of_sparsities_has_one_for_each_layer():
    params = {"w": jnp.arange(24.0).reshape(2, 3, 4)}
    layout = jp.Layout({"w": ("layer", "in", "out")})
    masks = jp.find_masks(params, {"w": np.array([0.25, 0.75])}, layout=layout)
    assert masks["w"].sum((1, 2)).tolist() == [9, 3]
    traced = jax.jit(lambda s: jp.find_masks(params, {"w": s}, layout=layout))(
        jnp.array([0.25, 0.75])
    )
    np.testing.assert_array_equal(traced["w"], masks["w"])
    for length, known in ((3, layout), (2, None)):
        with pytest.raises(
            ValueError, match=rf"sparsities of shape \({length},\) at 'w', which has"
        ):
            jp.find_masks(params, {"w": np.full(length, 0.5)}, layout=known)
    with pytest.raises(ValueError, match=r"1\.5 at 'w', outside \[0, 1\]"):
        jp.find_masks(params, {"w": np.array([0.5, 1.5])}, layout=layout)
    with pytest.raises(TypeError, match="one number in"):
        jp.find_masks(params, np.array([0.5, 0.5]), layout=layout)


@pytest.mark.parametrize("user", ["custom", "imp"])
def test_rules_have_one_number_each(user):
    rules = {"head": np.array([0.5, 0.5])}
    with pytest.raises(TypeError, match="one number in"):
        if user == "custom":
            scopes.custom(PARAMS, rules)
        else:
            next(jp.imp(PARAMS, lambda ticket, masks: ticket, rounds=1, rates=rules))


def test_rules_that_name_no_layer_are_refused():
    layout = jp.Layout({"blocks/up": ("layer", "in", "out"), "head": ("in", "out")})
    with pytest.raises(ValueError, match=r"'blocks/up\[3\]', which matches no parameter"):
        scopes.custom(PARAMS, {"blocks/up[3]": 0.5}, layout=layout)


def test_a_summary_has_a_row_for_each_layer():
    masks = {
        "blocks": {"up": jnp.zeros((3, 2, 4), bool).at[1:, 0].set(True), "scale": None},
        "head": jnp.ones((1, 2), bool),
    }
    found = jp.summary(jp.apply_masks(PARAMS, masks), masks, layout=LAYOUT)
    assert [row.path for row in found.rows] == [
        "blocks/up[0]",
        "blocks/up[1]",
        "blocks/up[2]",
        "head",
    ]
    assert [row.kept for row in found.rows] == [0, 4, 4, 8]
    assert found.collapsed == ("blocks/up[0]",)
    assert found.total.kept == 16 and found.total.total == 32
    lines = str(found).splitlines()
    assert lines[2].split()[:6] == ["blocks/up[0]", "2x4", "0", "/", "8", "100.00%"]
    assert lines[3].split()[:4] == ["blocks/up[1..2]", "2", "of", "2x4"]
    assert "warning: 'blocks/up[0]' keeps nothing" in str(found)
    assert not jp.summary(PARAMS, masks).collapsed  # without a layout nobody sees it


def test_a_summary_counts_masks_that_hold_for_all_layers():
    masks = {
        "blocks": {"up": jnp.array([[[True, False, False, True]]]), "scale": None},
        "head": None,
    }
    found = jp.summary(PARAMS, masks, layout=LAYOUT)
    assert [row.kept for row in found.rows] == [4, 4, 4]


def test_a_summary_says_what_looks_like_other_axes():
    params = {
        "layers": {"up": jnp.ones((3, 4, 8)), "down": jnp.ones((3, 8, 4))},
        "linear": {"weight": jnp.ones((8, 4)), "bias": jnp.ones(8)},
        "attn": {"query": {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}},
    }
    masks = jp.dense_masks(params)
    notes = "\n".join(jp.summary(params, masks).advice)
    assert "'layers/down', 'layers/up' look like stacks of 3 layers" in notes
    assert "'linear/weight' look like [out, in]" in notes
    assert "'attn/query/kernel' look like [in, heads, parts]" in notes
    known = jp.Layout(
        {
            "layers/.*": ("layer", "in", "out"),
            "linear/weight": ("out", "in"),
            "attn/.*/kernel": ("in", "out", "out"),
        }
    )
    assert jp.summary(params, masks, layout=known).advice == ()
    turned = {
        "blocks": {"l": {"weight": jnp.ones((3, 8, 4)), "bias": jnp.ones((3, 8))}},
        "alpha": jnp.float32(1.0),
    }
    every = jp.dense_masks(turned, where=lambda path, x: True)
    assert "'blocks/l/weight' look like stacks" in jp.summary(turned, every).advice[0]
    convs = {f"layers_{i}": {"kernel": jnp.ones((3, n, 16))} for i, n in ((0, 8), (2, 16))}
    assert jp.summary(convs, jp.dense_masks(convs)).advice == ()
    plain = {"Dense_0": {"kernel": jnp.ones((4, 4))}, "Conv_0": {"kernel": jnp.ones((3, 3, 4, 8))}}
    assert jp.summary(plain, jp.dense_masks(plain)).advice == ()


def test_a_summary_says_which_zeros_are_none_of_the_network():
    use = jp.Use("derived", ("in", "out"), zero=math.log(2), through="softplus at f.py:3")
    layout = jp.Layout([Entry("w", (use,), (2, 2))])
    params = {"w": jnp.ones((2, 2))}
    found = jp.summary(params, {"w": jnp.ones((2, 2), bool)}, layout=layout)
    assert "goes through softplus at f.py:3: a removed weight becomes 0.693" in found.advice[0]
    left = jp.summary(params, {"w": None}, layout=layout).left_out
    assert [(kind.kind, kind.size) for kind in left] == [("derived", 4)]
