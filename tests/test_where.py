"""Tests of the question which leaves are prunable: by shape, by name, by regex."""

import inspect

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from jaxprune._tree import leaves_with_path
from jaxprune._where import why_not

SQUARE = jax.ShapeDtypeStruct((4, 6), jnp.float32)

# Leaves as the libraries around JAX name and shape them; a shape of two long axes unless given.
MATRICES = {
    "flax": ["Dense_0/kernel", "Conv_0/kernel", "head/kernel", "out/kernel"],
    "a head of one output": [("Dense_9/kernel", (64, 1)), ("w", (64, 1)), ("weight", (1, 64))],
    "flax attention": [("attn/query/kernel", (8, 2, 4)), ("attn/value/kernel", (8, 2, 4))],
    "haiku": ["mlp/~/linear_0/w", "transformer/~/embed/w"],
    "equinox": ["layers/0/weight", "mlp/layers/1/weight", "patch_embedding/linear/weight"],
    "names that only sound alike": [
        *("patch_embed/kernel", "embed_out/kernel", "time_embed/Dense_0/kernel", "unembed"),
        *("position_encoder/Dense_0/kernel", "layers/bias_proj", "norm_proj/kernel"),
        *("upscale/kernel", "rescale/Dense_0/kernel", "tokenizer/kernel", "logits_dense/kernel"),
        *("dense_norm1/weight", "embedding_projection/weight", "w_b", "adapter_a", "adapter_b"),
        *("normalizer/layers/0/weight", "gamma_net/Dense_0/kernel", "lora_linear/kernel"),
    ],
    "containers": [
        *("Dense_0/kernel/value", "linear/weight/array", "net/kernel/0", "0/1"),
        *("layers/0/weight/args/1", "linear/weight/weight/args/0", "triangular/weight/arr"),
        *("linear/weight/tree", "linear/weight/tree/weight", ("weight/weight/tree", (1, 64))),
        *("tree", "tree/weight", "embed/proj/weight/weight", "weight/weight"),
    ],
    "Keras": ["sequential/dense/kernel", "gru/gru_cell/recurrent_kernel"],
    "raw dicts": ["wq", "w_gate", "wi_0", "A", "b", "B", "C", "Wx", "proj"],
}
OTHERS = {
    "biases": [
        *("Dense_0/bias", "layers/bias", "linear/b", "b1", "bq", "rnn/bias_hh_l0"),
        *("linear/bias/tree", "norm/tree/bias"),
        *("norm/offset", "norm/beta", "stacked/bias/0", "bias/value", "attn/query_bias", "bias_n"),
    ],
    "gains and scales": [
        *("norm/scale", "LayerNorm_0/scale", "norm/gamma", "layer_scale", "ls1", "log_step"),
        *("A_log", "weight_g", "blocks/norm1/weight", "ln_1/weight", "bn/weight", "ffn_norm"),
        *("w1_auto_scale", "rho", "tau", "log_std", "Lambda_re", "prelu/alpha", "ln_f"),
        *("cell/tau/mantissa", "cell/time_constant", "g", "time_decay"),
        *("attn_ln/weight", "norm_weight", "nu_log", "w_log_std", "logvar", "kernel_bits"),
        *("linear/weight/scale/args/0", "base_dist/scale/args/0"),
        *("norm/weight/weight", "norm/weight/tree", "embed/weight/scale/args/0/tree"),
    ],
    "embeddings": [
        *("Embed_0/embedding", "embed/embeddings", "wte/weight", "tok_embeddings/weight"),
        *("token_embedding", "wte", "word_embeddings", "embedding/weight", "wpe/embedding"),
        *("relative_attention_bias/weight", "embed", "embeddings/token_embeddings/weight/array"),
        *("embed/weight/weight", "embed/weight/tree", "embed/weight/tree/weight"),
        *("embed/weight/weight/tree", "embed/tree/weight", "embed/weight/weight/args/0"),
    ],
    "tables": [
        *("cls_token", "mask_token", "pos_embed", "pos_embedding", "position_embeddings", "cls"),
        *("relative_position_bias_table", "codebook", "register_tokens", "rel_pos_h", "pos_enc"),
        *("pos/tree", "pos_embed/tree"),
    ],
    "LoRA factors": [
        "lora/lora_a",
        "dense/kernel_lora_b",
        "q/lora_A/weight",
        "lora_a/kernel",
        "lora/a",
        "lora_A/default/weight",
        "lora_up/kernel",
    ],
    "statistics": [
        "norm/mean",
        "norm/var",
        "batch_norm/moving_variance",
        "running_mean",
        "kernel_amax_history",
    ],
    "widths of quantizers": ["dense/kernel_quantizer/f", "dense/input_quantizer/i"],
    "vectors and scalars": [
        *(("gain_row", (1, 8)), ("0/3", (1, 1, 1, 16)), ("u", (8,)), ("0", (8,)), ("step", ())),
    ],
    "not floating": [],
}


def leaf(item):
    path, shape = item if isinstance(item, tuple) else (item, SQUARE.shape)
    return path, jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("path, array", [leaf(i) for row in MATRICES.values() for i in row])
def test_kernels_heads_included_are_in(path, array):
    assert why_not(path, array) == ""
    assert jp.is_matrix(path, array) is True


@pytest.mark.parametrize(
    "kind, path, array", [(kind, *leaf(i)) for kind, row in OTHERS.items() for i in row]
)
def test_all_else_is_out_and_called_by_its_kind(kind, path, array):
    assert why_not(path, array) == kind
    assert jp.is_matrix(path, array) is False


def test_arrays_that_are_not_floating_are_out():
    for dtype in (jnp.int32, jnp.bool_, jnp.complex64):
        assert why_not("kernel", jnp.ones((2, 2), dtype)) == "not floating"
    assert jp.is_matrix("kernel", 3.0) is False
    assert jp.is_matrix("kernel", np.ones((2, 2), np.float32)) is True
    assert jp.is_matrix("kernel", jnp.ones((2, 2), jnp.float8_e4m3fn)) is True


PARAMS = {
    "Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 2))},
}


def test_exclude_leaves_out_of_the_default_what_a_regex_names():
    part = jp.prunable(PARAMS, where=jp.exclude("head/.*"))
    assert part["head"]["kernel"] is None and part["Dense_0"]["kernel"] is not None
    assert part["Dense_0"]["bias"] is None


def test_exclude_goes_on_top_of_another_predicate():
    where = jp.exclude("head/.*", where=jp.by_path(".*kernel", ".*bias"))
    part = jp.prunable(PARAMS, where=where)
    assert part["head"]["kernel"] is None and part["Dense_0"]["bias"] is not None
    assert where == jp.exclude("head/.*", where=jp.by_path(".*kernel", ".*bias"))


def test_exclude_names_regexes_that_match_nothing_and_those_that_are_none():
    with pytest.raises(ValueError, match=r"`exclude` got 'Head/\.\*', which matches no parameter"):
        jp.prunable(PARAMS, where=jp.exclude("Head/.*"))
    with pytest.raises(ValueError, match=r"`by_path` got 'nobody'.*matches no parameter"):
        jp.prunable(PARAMS, where=jp.exclude("head/.*", where=jp.by_path("nobody")))
    with pytest.raises(ValueError, match=r"`exclude\(\)` got no regex"):
        jp.exclude()


def test_exclude_protects_coupled_groups_by_its_regexes_alone():
    net = lambda p, x: jax.nn.relu(x @ p["a"]["kernel"] + p["a"]["bias"]) @ p["c"]["kernel"]
    params = {
        "a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones((1, 4))},
        "c": {"kernel": jnp.ones((4, 2))},
    }
    groups = jp.find_groups(net, params, jnp.ones((1, 3)))
    pattern = jp.patterns.Coupled(groups)
    with pytest.raises(ValueError, match="refuses a member of each of the 1 groups"):
        jp.find_masks(params, 0.5, pattern=pattern, where=jp.exclude("c/kernel"))
    free = {**params, "d": {"kernel": jnp.ones((4, 2))}}
    masks = jp.find_masks(free, 0.5, pattern=pattern, where=jp.exclude("d/kernel"))
    assert masks["a"]["bias"].sum() == 2  # covered, whatever the default says of biases


@pytest.mark.parametrize("path", ["layers[0]/w (a)", "mixing 0e+1o/w{x}", "a.b|c/w"])
def test_a_path_as_it_stands_matches_itself(path):
    name, _, last = path.rpartition("/")
    params = {name: {last: jnp.ones((2, 2)), "v": jnp.ones((2, 2))}}
    part = jp.prunable(params, where=jp.by_path(path))
    assert part[name][last] is not None and part[name]["v"] is None
    assert jp.scopes.custom(params, {path: 0.5})[name][last] == 0.5


def test_a_regex_that_matches_nothing_is_told_what_it_may_have_meant():
    params = {"out": {"kernel": jnp.ones((2, 2))}, "in": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=r"With '\(\.\*/\)\?out/kernel' it would"):
        jp.prunable(params, where=jp.by_path(".*/out/kernel"))
    with pytest.raises(ValueError, match=r"With '\(\.\*/\)\?out/kernel' it would"):
        jp.prunable({"params": params}, where=jp.by_path("out/kernel"))
    with pytest.raises(ValueError, match=r"With '\(\.\*/\)\?out/kernel' it would"):
        jp.imp(params, lambda t, m: t, rates={".*/out/kernel": 0.1})
    odd = {"w[0] (x)": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"write `re\.escape\('w\[0\] \(x\)'\)`"):
        jp.prunable(odd, where=jp.by_path(r"w\[0\] (x)"))
    with pytest.raises(ValueError, match=r"no regular expression.*re\.escape"):
        jp.by_path("w[0")


def test_leaves_that_are_objects_are_called_so():
    class Parameter:
        pass

    with pytest.raises(ValueError, match=r"no arrays but objects, such as Parameter at 'a'"):
        jp.prunable({"a": Parameter()})


def test_regexes_refuse_paths_that_meet():
    params = {"a/kernel": jnp.ones((2, 2)), "a": {"kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=r"`by_path` got several leaves at 'a/kernel'"):
        jp.prunable(params, where=jp.by_path(".*kernel"))
    with pytest.raises(ValueError, match=r"`custom` got several leaves at 'a/kernel'"):
        jp.scopes.custom(params, {".*": 0.5})
    with pytest.raises(ValueError, match=r"got several leaves at 'a/kernel'"):
        jp.imp(params, lambda t, m: t, rates={".*": 0.1})
    with pytest.raises(ValueError, match=r"several leaves at 'a/kernel'"):
        jp.cut_list(params, {"a/kernel": None, "a": {"kernel": jnp.ones((1, 2), bool)}})


def test_predicates_and_windows_are_shown_as_their_call():
    assert repr(jp.by_path("a", "b")) == "by_path('a', 'b')"
    assert repr(jp.exclude("a")) == "exclude('a')"
    assert repr(jp.exclude("a", where=jp.by_path("b"))) == "exclude('a', where=by_path('b'))"
    assert repr(jp.scopes.windows(4)) == "windows(4)"
    assert repr(jp.scopes.windows(8, axis=-1)) == "windows(8, axis=-1)"


FUNCTIONS = [
    *(jp.find_masks, jp.imp, jp.dense_masks, jp.prune, jp.hold, jp.straight_through),
    *(jp.dynamic.rigl, jp.scopes.erk, jp.scopes.uniform, jp.scopes.custom),
]


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: f.__name__)
def test_help_shows_defaults_as_one_writes_them(f):
    shown = str(inspect.signature(f))
    assert "= jp.is_matrix" in shown and "<function" not in shown and " object at " not in shown


# The libraries themselves, with layers stacked, so that biases and gains have two axes.


def haiku_stack(key):
    def net(x):
        x = hk.LayerNorm(-1, True, True)(hk.Linear(6)(x))
        return hk.Conv2D(4, 3)(hk.Embed(10, 6)(jnp.zeros((1, 3), int))[:, :, None] + x.sum())

    return jax.vmap(lambda k: hk.transform(net).init(k, jnp.ones((1, 5))))(jax.random.split(key, 2))


def equinox_stack(key):
    def block(k):
        return (
            eqx.nn.LayerNorm(6),
            eqx.nn.Linear(6, 6, key=k),
            eqx.nn.Embedding(10, 6, key=k),
            eqx.nn.GRUCell(6, 6, key=k),
        )

    norm, linear, embed, gru = eqx.filter_vmap(block)(jax.random.split(key, 2))
    return eqx.filter({"norm": norm, "linear": linear, "embed": embed, "gru": gru}, eqx.is_array)


class Block(nnx.Module):
    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.attn = nnx.MultiHeadAttention(2, 6, rngs=rngs, decode=False)
        self.norm, self.embed = nnx.LayerNorm(6, rngs=rngs), nnx.Embed(10, 6, rngs=rngs)
        self.lora = nnx.LoRA(6, 2, 6, rngs=rngs)
        self.batch_norm = nnx.BatchNorm(6, rngs=rngs)
        self.cls_token = nnx.Param(jnp.ones((1, 6)))
        self.pos_embedding = nnx.Param(jnp.ones((4, 6)))


def paramax_stack(key):
    paramax = pytest.importorskip("paramax")
    normal = paramax.WeightNormalization
    parts = {
        "linear": eqx.nn.Linear(6, 6, key=key),
        "embed": eqx.nn.Embedding(10, 6, key=key),
        "tokens": eqx.nn.Embedding(10, 6, key=key),
    }
    parts = eqx.tree_at(lambda p: [p["linear"].weight, p["embed"].weight], parts, replace_fn=normal)
    frozen = {"pos": jnp.ones((4, 6)), "embed_tokens": parts.pop("tokens")}
    parts["both"] = {"embed": paramax.non_trainable(parts["embed"])}
    return eqx.filter({**parts, **paramax.non_trainable(frozen)}, eqx.is_inexact_array)


def nnx_stack(key):
    return nnx.state(nnx.vmap(Block)(jax.random.split(key, 2)))


@pytest.mark.parametrize(
    "stack, want",
    [
        (haiku_stack, {"linear/w", "conv2_d/w"}),
        (equinox_stack, {"linear/weight", "gru/weight_ih", "gru/weight_hh"}),
        (paramax_stack, {"linear/weight/weight"}),
        (nnx_stack, {f"attn/{name}/kernel" for name in ("query", "key", "value", "out")}),
    ],
)
def test_of_stacked_layers_kernels_alone_are_pruned(key, stack, want):
    params = eqx.filter_eval_shape(stack, key)
    assert {path for path, _ in leaves_with_path(jp.prunable(params))} == want


def test_summary_says_what_is_left_out_and_as_what(key):
    shapes = eqx.filter_eval_shape(nnx_stack, key)
    shapes = jax.tree.map(lambda s: None if s.dtype != jnp.float32 else s, shapes)
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    masks = jp.find_masks(params, 0.5)
    kinds = {left.kind: left.size for left in jp.summary(params, masks).left_out}
    assert kinds["embeddings"] == 2 * 60 and kinds["LoRA factors"] == 2 * (12 + 12)
    assert kinds["tables"] == 2 * (6 + 24) and kinds["statistics"] == 2 * (6 + 6)
    assert kinds["biases"] == 2 * (4 * 6 + 6 + 6) and kinds["gains and scales"] == 2 * (6 + 6)
    text = str(jp.summary(jp.apply_masks(params, masks), masks))
    assert "  embeddings: 120 (embed/embedding)" in text
    assert "  LoRA factors: 48 (lora/lora_a, lora/lora_b)" in text
    chosen = jp.find_masks(params, 0.5, where=jp.exclude("attn/out/kernel"))
    assert "  matrices: 72 (attn/out/kernel)" in str(jp.summary(params, chosen))
