"""Params in the layout of other libraries: a tensor for each layer, outputs before inputs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytest.importorskip("safetensors")

import safetensors.numpy as library

from experiments.common import llama
from jaxprune.export._safetensors import read_safetensors

NET = llama.Llama(vocabulary=32, width=16, layers=3, heads=4, kv_heads=2, inner=24)
NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "layers/attention/norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/mlp/norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    **{
        f"layers/attention/{n}/kernel": f"model.layers.{{}}.self_attn.{n}_proj.weight"
        for n in "qkvo"
    },
    **{
        f"layers/mlp/{n}/kernel": f"model.layers.{{}}.mlp.{n}_proj.weight"
        for n in ("gate", "up", "down")
    },
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_scanned_llama_becomes_the_tensors_that_transformers_reads(tmp_path):
    params = llama.init(jax.random.key(0), NET)
    tokens = jnp.arange(8).reshape(1, 8)
    layout = jp.find_layout(functools.partial(llama.logits, net=NET), params, tokens)
    masks = jp.find_masks(params, 0.5, layout=layout)
    path = tmp_path / "model.safetensors"
    report = jp.export.safetensors(path, params, layout=layout, names=NAMES, masks=masks)
    read = library.load_file(path)
    wanted = {name.replace("{}", str(i)) for name in NAMES.values() for i in range(3)}
    assert set(read) == wanted and report.zeros_kept == 1.0 and report.zeroed == 0
    baked = jp.apply_masks(params, masks)
    down = np.asarray(baked["layers"]["mlp"]["down"]["kernel"])
    for i in range(3):
        np.testing.assert_array_equal(read[f"model.layers.{i}.mlp.down_proj.weight"], down[i].T)
    np.testing.assert_array_equal(read["model.embed_tokens.weight"], baked["embedding"])
    scale = baked["layers"]["mlp"]["norm"]["scale"]
    np.testing.assert_array_equal(read["model.layers.1.post_attention_layernorm.weight"], scale[1])
    # The network of those tensors is the same.
    again = jax.tree.map(np.array, baked)
    for name in ("gate", "up", "down"):
        rows = [read[f"model.layers.{i}.mlp.{name}_proj.weight"].T for i in range(3)]
        again["layers"]["mlp"][name]["kernel"] = np.stack(rows)
    for name in "qkvo":
        rows = [read[f"model.layers.{i}.self_attn.{name}_proj.weight"].T for i in range(3)]
        again["layers"]["attention"][name]["kernel"] = np.stack(rows)
    run = jax.jit(functools.partial(llama.logits, net=NET))
    np.testing.assert_array_equal(run(again, tokens), run(baked, tokens))


def test_a_transposed_kernel_is_written_in_its_own_order(tmp_path):
    """safetensors 0.8.0 writes other numbers for what is not contiguous; ours is made so."""
    path = tmp_path / "model.safetensors"
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    jp.export.safetensors(path, {"kernel": kernel.T, "column": kernel[:, 1], "back": kernel[::-1]})
    read = library.load_file(path)
    np.testing.assert_array_equal(read["kernel"], kernel.T)
    np.testing.assert_array_equal(read["column"], kernel[:, 1])
    np.testing.assert_array_equal(read["back"], kernel[::-1])


ATTENTION = {"query": ("in", "out", "out"), "out": ("in", "in", "out")}


def test_axes_of_outputs_and_of_inputs_become_one_and_windows_go_last(tmp_path):
    params = {
        "query": numbers(8, 2, 3),
        "out": numbers(2, 3, 8),
        "conv": numbers(3, 5, 4, 6),
        "bias": numbers(2, 3),
        "experts": numbers(2, 3, 4, 5),
        "table": numbers(7, 8),
    }
    layout = jp.Layout(
        ATTENTION
        | {
            "conv": ("window", "window", "in", "out"),
            "bias": ("out", "out"),
            "experts": ("layer", "group", "in", "out"),
            "table": (None, "out"),
        }
    )
    path = tmp_path / "model.safetensors"
    names = {path: path for path in params} | {"experts": "layers.{}.experts.weight"}
    jp.export.safetensors(path, params, layout=layout, names=names)
    read = library.load_file(path)
    np.testing.assert_array_equal(read["query"], params["query"].reshape(8, 6).T)
    np.testing.assert_array_equal(read["out"], params["out"].reshape(6, 8).T)
    np.testing.assert_array_equal(read["conv"], params["conv"].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(read["bias"], params["bias"].reshape(6))
    np.testing.assert_array_equal(read["table"], params["table"])
    stacked = read["layers.1.experts.weight"]
    np.testing.assert_array_equal(stacked, params["experts"][1].swapaxes(1, 2))
    names["experts"] = "layers.{}.experts.{}.weight"
    jp.export.safetensors(path, params, layout=layout, names=names)
    one = library.load_file(path)["layers.1.experts.2.weight"]
    np.testing.assert_array_equal(one, params["experts"][1, 2].T)


def attention():
    from flax import linen as nn

    net = nn.MultiHeadDotProductAttention(2)
    x = numbers(2, 6, 128)
    params = net.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p + numbers(*p.shape), params)
    return params, jp.find_layout(lambda p, x: net.apply({"params": p}, x), params, x)


def test_biases_of_attention_have_one_axis_as_their_kernels_have_for_outputs(tmp_path):
    pytest.importorskip("flax")
    params, layout = attention()
    path = tmp_path / "model.safetensors"
    masks = {n: {"kernel": None, "bias": None} for n in params}
    masks["query"]["bias"] = params["query"]["bias"] > 0
    report = jp.export.safetensors(path, params, layout=layout, masks=masks)
    read = library.load_file(path)
    for name in ("query", "key", "value", "out"):
        assert read[f"{name}/kernel"].shape == (128, 128) and read[f"{name}/bias"].shape == (128,)
    np.testing.assert_array_equal(read["value/bias"], params["value"]["bias"].reshape(128))
    np.testing.assert_array_equal(
        read["query/bias"], np.maximum(params["query"]["bias"], 0).ravel()
    )
    assert report.zeros_kept == 1.0


@pytest.mark.parametrize(
    "kernel, bias, wanted",
    [
        ((("layer", "in", "out", "out"), (5, 8, 2, 3)), (("layer", None, None), (5, 2, 3)), [6]),
        ((("in", "out", "out"), (8, 2, 3)), ((None, None), (3, 2)), [3, 2]),  # other sizes
        ((("in", "out", "out"), (8, 2, 3)), (("in", None), (2, 3)), None),  # another role
        ((("layer", "in", "out"), (5, 8, 3)), ((None, None), (5, 3)), [5, 3]),  # of positions
        ((("group", "in", "out"), (4, 8, 3)), ((None, None), (4, 3)), [4, 3]),
        ((("window", "in", "out"), (3, 8, 2)), ((None, None), (6, 2)), [6, 2]),  # of positions
    ],
)
def test_a_bias_takes_the_roles_of_outputs_of_kernels_beside_it_that_fit(
    tmp_path, kernel, bias, wanted
):
    from jaxprune._use import Entry, Use

    entries = (
        Entry("q/kernel", (Use("matmul", kernel[0]),), kernel[1]),
        Entry("q/bias", (Use("bias", bias[0]),), bias[1]),
    )
    params = {"q": {"kernel": numbers(*kernel[1]), "bias": numbers(*bias[1])}}
    path = tmp_path / "model.safetensors"
    if wanted is None:
        with pytest.raises(ValueError, match="cannot lay out 'q/bias'"):
            jp.export.safetensors(path, params, layout=jp.Layout(entries))
        return
    jp.export.safetensors(path, params, layout=jp.Layout(entries))
    name = "q/bias[4]" if bias[0][0] == "layer" else "q/bias"
    value = params["q"]["bias"][4] if bias[0][0] == "layer" else params["q"]["bias"]
    np.testing.assert_array_equal(library.load_file(path)[name], value.reshape(wanted))


def test_biases_in_a_dict_of_several_kernels_go_with_those_that_fit_if_these_agree(tmp_path):
    def model(p, x):
        q, k = (jnp.einsum("td,dhs->ths", x, p[f"w{n}"]) + p[f"b{n}"][None] for n in "qk")
        return jnp.einsum("ths,uhs->htu", q, k), x @ p["up"] + p["bup"][None]

    params = {"wq": numbers(8, 2, 3), "bq": numbers(2, 3), "wk": numbers(8, 2, 3)}
    params |= {"bk": numbers(2, 3), "up": numbers(8, 5), "bup": numbers(5)}
    layout = jp.find_layout(model, params, numbers(4, 8))
    path = tmp_path / "model.safetensors"
    jp.export.safetensors(path, params, layout=layout)
    shapes = {name: x.shape for name, x in library.load_file(path).items()}
    assert shapes == {"bq": (6,), "bk": (6,), "bup": (5,), "up": (5, 8)} | dict.fromkeys(
        ("wq", "wk"), (6, 8)
    )
    # Of two that do not agree nobody can tell whose it is.
    other = layout | jp.Layout({"wk": ("in", "group", "out")})
    jp.export.safetensors(path, params, layout=other)
    assert library.load_file(path)["bq"].shape == (2, 3)


def test_layers_without_names_are_called_as_the_rest_of_the_library_calls_them(tmp_path):
    path = tmp_path / "model.safetensors"
    layout = jp.Layout({"up": ("layer", "in", "out")})
    jp.export.safetensors(path, {"up": numbers(2, 3, 4)}, layout=layout)
    assert set(library.load_file(path)) == {"up[0]", "up[1]"}


def test_the_head_says_what_transformers_wants_to_read(tmp_path):
    path = tmp_path / "model.safetensors"
    jp.export.safetensors(path, {"w": numbers(2, 3)}, metadata={"source": "a test"})
    data = path.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert head["__metadata__"] == {"format": "pt", "source": "a test"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.int8, bool])
def test_dtypes_come_back_bit_by_bit(tmp_path, dtype):
    import safetensors

    value = np.asarray(jnp.arange(12).reshape(3, 4).astype(dtype))
    path = tmp_path / "model.safetensors"
    report = jp.export.safetensors(path, {"w": value.T, "empty": value[:0], "one": value[1, 1]})
    read = dict(safetensors.deserialize(path.read_bytes()))
    assert bytes(read["w"]["data"]) == np.ascontiguousarray(value.T).tobytes()
    assert tuple(read["empty"]["shape"]) == (0, 4) and tuple(read["one"]["shape"]) == ()
    assert report.parity == 0


@pytest.mark.parametrize(
    "dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16, jnp.int64, bool]
)
def test_every_dtype_that_is_written_is_read(tmp_path, dtype):
    value = np.arange(12).reshape(3, 4).astype(dtype)
    path = tmp_path / "model.safetensors"
    jp.export.safetensors(path, {"w": value, "empty": value[:0], "one": value[1, 1]})
    read = read_safetensors(path)
    assert {name: (x.dtype, x.shape) for name, x in read.items()} == {
        "w": (value.dtype, (3, 4)),
        "empty": (value.dtype, (0, 4)),
        "one": (value.dtype, ()),
    }
    np.testing.assert_array_equal(read["w"], value)


def test_dtypes_of_others_are_read_and_packed_ones_told(tmp_path):
    def write(dtype):
        head = {"w": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, 4]}}
        if dtype == "F4":
            head["w"]["shape"] = [2, 4]
        text = json.dumps(head).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes([127, 128, 126, 127]))

    path = tmp_path / "model.safetensors"
    write("F8_E8M0")
    np.testing.assert_array_equal(
        read_safetensors(path)["w"].astype(np.float32), [[1, 2], [0.5, 1]]
    )
    write("F4")
    with pytest.raises(ValueError, match=r"NumPy has not: 'w' \(F4\).*F32.*convert"):
        read_safetensors(path)


def test_files_that_cannot_be_read_are_told(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no .*model\.safetensors"):
        read_safetensors(path)
    jp.export.safetensors(path, {"w": numbers(2, 3)})
    whole = path.read_bytes()
    bad_head = whole[:8] + b"[" + whole[9:]
    for data in (b"", whole[:4], whole[:20], whole[:-1], whole + b"\0", bad_head, b"x" * 99):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors' is no .*cut short.*Copy it"):
            read_safetensors(path)


def test_zeros_are_positive_and_what_was_removed_is_zero(tmp_path):
    path = tmp_path / "model.safetensors"
    params = {"w": np.array([[-0.0, 2.0], [np.nan, 3.0]], np.float32)}
    masks = {"w": np.array([[True, True], [False, True]])}
    jp.export.safetensors(path, params, masks=masks)
    read = library.load_file(path)["w"]
    np.testing.assert_array_equal(read, [[0, 2], [0, 3]])
    assert not np.signbit(read).any()
    packed = jp.pack({"w": jnp.asarray(masks["w"])})
    jp.export.safetensors(path, params, masks=packed)
    np.testing.assert_array_equal(library.load_file(path)["w"], read)


def test_unequal_widths_are_refused_with_the_layers_and_two_ways_out(tmp_path):
    widths = {0: 24, 1: 16, 2: 24}
    params = {f"model.layers.{i}.mlp.up_proj.weight": numbers(n, 8) for i, n in widths.items()}
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError) as error:
        jp.export.safetensors(path, params)
    text = str(error.value)
    line = "'model.layers.{}.mlp.up_proj.weight' is [16, 8] in layer 1, [24, 8] in layers 0, 2"
    assert line in text and "round_to=" in text and "per_leaf" in text
    assert not list(tmp_path.iterdir())
    jp.export.safetensors(path, params, equal_layers=False)
    assert len(library.load_file(path)) == 3


def test_groups_cut_per_leaf_have_equal_widths_and_others_are_told(tmp_path):
    def model(params, x):
        for layer in params["layers"].values():
            x = x + jax.nn.relu(x @ layer["up"]) @ layer["down"]
        return x

    params = {
        "layers": {
            str(i): {"up": numbers(8, 64, seed=i) * (i + 1), "down": numbers(64, 8, seed=i + 9)}
            for i in range(3)
        }
    }
    x = jnp.ones((1, 8))
    layout = jp.find_layout(model, params, x)
    pattern = jp.patterns.Coupled(jp.find_groups(model, params, x), round_to=8)
    for scope, equal in ((jp.scopes.per_leaf, True), (jp.scopes.across, False)):
        masks = jp.find_masks(params, 0.5, pattern=pattern, scope=scope)
        _, small = jp.shrink(model, params, masks)
        path = tmp_path / "model.safetensors"
        if equal:
            jp.export.safetensors(path, small, layout=jp.Layout({".*": ("in", "out")}))
            assert library.load_file(path)["layers/0/up"].shape == (32, 8)
        else:
            with pytest.raises(ValueError, match=r"layers/\{\}/up.*in layers? "):
                jp.export.safetensors(path, small, layout=jp.Layout({".*": ("in", "out")}))
    assert layout.roles("layers/0/up", 2) == ("in", "out")


@pytest.mark.parametrize(
    "roles, name, match",
    [
        ((None, "in", "out"), "w", r"cannot lay out 'w'.*\?, in, out.*Declare all"),
        (("layer", "in", "out"), "w", r"0 places for numbers.*\(layer, in, out\).*\(1\)"),
        (("in", "out", "out"), "w.{}", r"1 places for numbers.*\(0\)"),
    ],
)
def test_axes_that_do_not_fit_are_refused(tmp_path, roles, name, match):
    layout = jp.Layout({"w": roles})
    with pytest.raises(ValueError, match=match):
        jp.export.safetensors(
            tmp_path / "m.safetensors", {"w": numbers(2, 3, 4)}, layout=layout, names={"w": name}
        )


def test_a_kernel_that_the_layout_does_not_know_is_refused_and_vectors_are_not(tmp_path):
    params = {"kernel": numbers(2, 3), "odd": numbers(2, 3), "vector": numbers(3)}
    layout = jp.Layout({"kernel": ("in", "out")})
    path = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match=r"'odd'.*says nothing of it.*Declare"):
        jp.export.safetensors(path, params, layout=layout)
    jp.export.safetensors(path, params, layout=layout | jp.Layout({"odd": ("out", "in")}))
    assert library.load_file(path)["odd"].shape == (2, 3)


@pytest.mark.parametrize(
    "params, kwargs, error, match",
    [
        ([], {}, ValueError, "no arrays"),
        (np.ones(3), {}, ValueError, "without a name"),
        ({"w": np.ones(3, complex)}, {}, TypeError, "'w' is complex128"),
        ({"w": np.ones(3)}, {"layout": {"w": ("in",)}}, TypeError, "layout="),
        ({"w": np.ones(3)}, {"metadata": {"a": 1}}, TypeError, "'a': 1"),
        ({"w": np.ones(3)}, {"metadata": {3: "a"}}, TypeError, "3: 'a'"),
        ({"w": np.ones(3)}, {"metadata": [1]}, TypeError, r"metadata=\[1\]. Pass a dict of"),
        ({"w": np.ones(3)}, {"metadata": {"a": "\ud800"}}, ValueError, "no place for in .'a'"),
        ({"\ud800": np.ones(3)}, {}, ValueError, "UTF-8 has no place for"),
        ({"__metadata__": np.ones(3)}, {}, ValueError, "would call '__metadata__'.*names="),
        ({"w": np.ones(3)}, {"names": {"w": "__metadata__"}}, ValueError, "would call 'w' '__met"),
        ({"w": np.ones(3)}, {"names": {"w": 3}}, TypeError, "gives 3 for 'w'"),
        ({"w": np.ones(3)}, {"names": 3}, TypeError, "names=3. Pass a mapping"),
        ({"w": np.ones(3)}, {"masks": {"w": np.ones(3)}}, TypeError, "bool"),
        ({"a": {"b": np.ones(3)}, "a/b": np.ones(3)}, {}, ValueError, "several leaves at 'a/b'"),
    ],
)
def test_bad_input_is_refused_at_the_door(tmp_path, params, kwargs, error, match):
    with pytest.raises(error, match=match):
        jp.export.safetensors(tmp_path / "m.safetensors", params, **kwargs)
    assert not list(tmp_path.iterdir())


def test_a_file_that_reads_back_as_something_else_is_not_put_in_place(tmp_path, monkeypatch):
    import safetensors

    def other(data):
        return [(n, x | {"data": bytes(len(x["data"]))}) for n, x in read(data)]

    read = safetensors.deserialize
    monkeypatch.setattr(safetensors, "deserialize", other)
    with pytest.raises(ValueError, match=r"other values than it wrote at \['w'\]"):
        jp.export.safetensors(tmp_path / "m.safetensors", {"w": numbers(2, 3)})
    assert not list(tmp_path.iterdir())


def test_arguments_in_the_wrong_order_are_told():
    with pytest.raises(TypeError, match=r"no path.*\(path, (tensors|params)\)"):
        jp.export.safetensors({"w": np.ones((2, 32))}, "net")
