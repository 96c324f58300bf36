"""GGUF files keep what masks removed, or are not written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

pytest.importorskip("gguf")

import gguf as library

from jaxprune.export._gguf import read_gguf

KEEPING = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "MXFP4", "TQ1_0", "TQ2_0")
# The largest error over the largest weight: half a step of a block that holds the largest.
ERRORS = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 250, "Q5_0": 1 / 15, "Q4_0": 1 / 7}


def weights(shape=(8, 256), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pruned(sparsity=0.5):
    params = {"blk.0.ffn_up.weight": weights(), "blk.0.ffn_norm.weight": weights((256,), 1)}
    return params, jp.find_masks(params, sparsity, where=lambda path, x: x.ndim > 1)


@pytest.mark.parametrize("quantization", KEEPING)
def test_a_removed_weight_is_exactly_zero_in_the_file(tmp_path, quantization):
    params, masks = pruned()
    path = tmp_path / "net.gguf"
    report = jp.export.gguf(path, params, masks=masks, quantization=quantization)
    read = read_gguf(path)
    mask = np.asarray(masks["blk.0.ffn_up.weight"])
    assert not read["blk.0.ffn_up.weight"][~mask].any()
    np.testing.assert_array_equal(read["blk.0.ffn_norm.weight"], params["blk.0.ffn_norm.weight"])
    assert report.zeros_kept == 1.0 and report.bytes == path.stat().st_size
    zeroed = (read["blk.0.ffn_up.weight"] == 0) & mask
    assert report.zeroed == zeroed.sum()
    assert report.parity <= ERRORS.get(quantization, 0.51)


@pytest.mark.parametrize("quantization", ["Q4_1", "Q5_1"])
def test_types_that_lose_zeros_are_refused_with_the_figure_and_leave_no_file(
    tmp_path, quantization
):
    params, masks = pruned()
    path = tmp_path / "net.gguf"
    with pytest.raises(ValueError, match=rf"{quantization}.* would keep \d.*Q8_0.*lose_zeros"):
        jp.export.gguf(path, params, masks=masks, quantization=quantization)
    assert not list(tmp_path.iterdir())
    report = jp.export.gguf(path, params, masks=masks, quantization=quantization, lose_zeros=True)
    assert report.zeros_kept < 0.2
    dense = jp.export.gguf(path, params, quantization=quantization)
    assert dense.zeros_kept is None and dense.zeroed == 0


def test_what_is_zero_counts_as_removed_where_there_are_no_masks(tmp_path):
    params, masks = pruned(0.9)
    baked = jp.export.bake(params, masks)
    report = jp.export.gguf(tmp_path / "net.gguf", baked)
    assert report.zeros_kept == 1.0
    with pytest.raises(ValueError, match="of the zeros"):
        jp.export.gguf(tmp_path / "net.gguf", baked, quantization="Q4_1")


@pytest.mark.parametrize("quantization", ["Q4_K", "IQ4_NL", "Q8_K", "q9", "int8"])
def test_types_that_cannot_be_written_are_refused_with_those_that_can(tmp_path, quantization):
    with pytest.raises(ValueError, match=f"{quantization}.*Use one of F32.*Q8_0.*MXFP4"):
        jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, quantization=quantization)


def test_vectors_stay_floats_and_so_do_widths_without_whole_blocks_with_a_warning(tmp_path):
    path = tmp_path / "net.gguf"
    tensors = {"a": weights((4, 48)), "b": weights((4, 64)), "norm": weights((64,))}
    with pytest.warns(jp.PruneWarning, match=r"'a'.*F16.*blocks of 32.*48.*round_to=32"):
        jp.export.gguf(path, tensors)
    kinds = {t.name: t.tensor_type.name for t in library.GGUFReader(path).tensors}
    assert kinds == {"a": "F16", "b": "Q8_0", "norm": "F32"}
    chosen = jp.exclude("a", where=lambda path, x: x.ndim > 1)
    jp.export.gguf(path, tensors, where=chosen)
    kinds = {t.name: t.tensor_type.name for t in library.GGUFReader(path).tensors}
    assert kinds == {"a": "F32", "b": "Q8_0", "norm": "F32"}
    with pytest.raises(ValueError, match="'c', which matches no parameter"):
        jp.export.gguf(path, tensors, where=jp.exclude("c", where=lambda path, x: x.ndim > 1))


def test_negative_zeros_are_written_as_zeros(tmp_path):
    path = tmp_path / "net.gguf"
    jp.export.gguf(
        path, {"w": -np.zeros((2, 32), np.float32), "b": -np.zeros(3)}, quantization="F16"
    )
    assert not any(np.signbit(x).any() for x in read_gguf(path).values())


def test_integers_scalars_bfloat16_and_transposed_arrays_come_back(tmp_path):
    path = tmp_path / "net.gguf"
    tensors = {
        "ids": np.arange(3, dtype=np.int64),
        "scale": jnp.float32(2.5),
        "half": jnp.arange(64, dtype=jnp.bfloat16).reshape(2, 32),
        "turned": weights((32, 4)).T,
        "none": None,
    }
    jp.export.gguf(path, tensors, quantization="F32")
    read = read_gguf(path)
    assert set(read) == {"ids", "scale", "half", "turned"}
    for name, x in read.items():
        np.testing.assert_array_equal(x, np.asarray(tensors[name], np.float32))


def test_weights_beyond_the_scales_of_a_type_are_refused_by_path(tmp_path):
    tensors = {"good": weights(), "bad": weights() * np.float32(1e7)}
    with pytest.raises(ValueError, match=r"inf or NaN of weights in 'bad'.*BF16"):
        jp.export.gguf(tmp_path / "net.gguf", tensors, quantization="Q4_0")
    assert not list(tmp_path.iterdir())
    assert jp.export.gguf(tmp_path / "net.gguf", tensors, quantization="BF16").parity < 0.01
    tensors = {"bad": np.full((2, 32), np.nan, np.float32)}
    with pytest.raises(ValueError, match="inf or NaN in 'bad'"):
        jp.export.gguf(tmp_path / "net.gguf", tensors)
    jp.export.gguf(tmp_path / "net.gguf", tensors, where=lambda path, x: False)
    assert np.isnan(read_gguf(tmp_path / "net.gguf")["bad"]).all()


@pytest.mark.parametrize(
    "quantization, factor, what",
    [
        ("Q8_0", 1e-7, r"8 whole blocks of 32 in Q8_0"),
        ("Q4_0", 1e-8, r"8 whole blocks of 32 in Q4_0"),
        ("F16", 1e-9, r"4 whole rows in F16"),
    ],
)
def test_blocks_of_weights_that_are_too_small_for_a_type_are_told(
    tmp_path, quantization, factor, what
):
    path = tmp_path / "net.gguf"
    w = weights((4, 64))
    tensors = {"small": np.concatenate([w * np.float32(factor), w]), "good": w}
    masks = {"small": np.concatenate([w, w]) > 0, "good": None}
    kept = int((w > 0).sum())
    with pytest.warns(jp.PruneWarning, match=rf"'small' \({kept} weights, {what}\)\. Sc.*BF16"):
        jp.export.gguf(path, tensors, masks=masks, quantization=quantization)
    assert not read_gguf(path)["small"][:4].any()
    for fine in ("BF16", "MXFP4"):
        jp.export.gguf(path, tensors, masks=masks, quantization=fine)
        assert all((read_gguf(path)["small"][:4] != 0).any(axis=1))


def test_single_weights_that_become_zero_beside_larger_ones_are_only_counted(tmp_path):
    w = weights((2, 32))
    w[0, 3] = 1e-9
    for quantization in ("Q8_0", "F16"):
        report = jp.export.gguf(tmp_path / "net.gguf", {"w": w}, quantization=quantization)
        assert report.zeroed >= 1


def test_numbers_beyond_float32_are_told_apart_from_scales_beyond_float16(tmp_path):
    path = tmp_path / "net.gguf"
    for shape in ((2,), (2, 32)):
        with pytest.raises(ValueError, match=r"'v'.* too large for float32.*Scale them down\.$"):
            jp.export.gguf(path, {"v": np.full(shape, 1e300)})
    with pytest.warns(jp.PruneWarning, match=r"'v' \(2 weights, 1 whole rows in F32\)"):
        jp.export.gguf(path, {"v": np.full(2, 1e-300), "empty": np.ones((3, 0))})


def test_stacks_become_layers_and_kernels_are_turned(tmp_path):
    params = {"layers": {"up": weights((3, 32, 64))}, "norm": weights((64,))}
    masks = {"layers": {"up": weights((3, 32, 64), 1) > 0}, "norm": None}
    layout = jp.Layout({"layers/up": ("layer", "in", "out")})
    names = {"layers/up": "blk.{}.ffn_up.weight", "norm": "output_norm.weight"}
    path = tmp_path / "net.gguf"
    kwargs = {"layout": layout, "names": names, "masks": masks, "quantization": "F16"}
    report = jp.export.gguf(path, params, **kwargs)
    read = read_gguf(path)
    up = np.where(masks["layers"]["up"], params["layers"]["up"], 0).astype(np.float16)
    for i in range(3):
        np.testing.assert_array_equal(read[f"blk.{i}.ffn_up.weight"], up[i].T)
    assert set(read) == {*(f"blk.{i}.ffn_up.weight" for i in range(3)), "output_norm.weight"}
    assert report.zeros_kept == 1.0


def test_biases_of_attention_stay_floats_with_one_axis(tmp_path):
    linen = pytest.importorskip("flax.linen")
    net, x = linen.MultiHeadDotProductAttention(2), weights((2, 6, 128))
    params = net.init(jax.random.key(0), x)
    layout = jp.find_layout(net.apply, params, x)
    path = tmp_path / "net.gguf"
    jp.export.gguf(path, params, layout=layout, quantization="Q4_0")
    found = {t.name: t for t in library.GGUFReader(path).tensors}
    for name in ("query", "key", "value", "out"):
        bias, kernel = (found[f"params/{name}/{leaf}"] for leaf in ("bias", "kernel"))
        assert bias.tensor_type.name == "F32" and bias.shape.tolist() == [128]
        assert kernel.tensor_type.name == "Q4_0" and kernel.shape.tolist() == [128, 128]


def test_metadata_are_written_and_taken_from_a_file_of_the_same_model(tmp_path):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.rope.freq_base": 1e5,
        "llama.feed_forward_length": [64, 32],
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.add_bos_token": True,
        "general.offset": -3,
    }
    jp.export.gguf(first, {"w": weights()}, metadata=metadata)
    jp.export.gguf(
        second, {"w": weights()}, like=first, metadata={"llama.block_count": 2}, quantization="F16"
    )
    fields = library.GGUFReader(first).fields
    assert {k: fields[k].contents() for k in metadata} == metadata
    later = library.GGUFReader(second).fields
    for key, value in (metadata | {"llama.block_count": 2}).items():
        assert later[key].types == fields[key].types
        assert later[key].contents() == value
    assert fields["general.file_type"].contents() == library.LlamaFileType.MOSTLY_Q8_0
    assert later["general.file_type"].contents() == library.LlamaFileType.MOSTLY_F16
    assert fields["llama.block_count"].types == [library.GGUFValueType.UINT32]


@pytest.mark.parametrize(
    "tensors, kwargs, error, match",
    [
        ({}, {}, ValueError, "no arrays"),
        ({"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}, {}, TypeError, "'w' without values"),
        ({"w": np.ones((2, 32), bool)}, {}, TypeError, "'w' is bool"),
        ({"w": np.ones((1, 1, 1, 2, 32))}, {}, ValueError, "'w' has 5 axes"),
        ({"w" * 64: np.ones((2, 32))}, {}, ValueError, "long name.*63 bytes"),
        ({"w": weights()}, {"names": {"v": "x"}}, ValueError, "nothing of 'w' and knows 'v'"),
        ({"w": weights()}, {"names": lambda path: None}, TypeError, "None for 'w'"),
        ({"w": weights(), "v": weights()}, {"names": lambda path: "x"}, ValueError, "'v', 'w'"),
        ({"w": weights()}, {"names": {"w": "b.{}"}}, ValueError, "1 places .*pass `layout=`"),
        ({"w": weights()}, {"masks": {"v": weights() > 0}}, ValueError, "unknown 'v'"),
        ({"w": weights()}, {"metadata": {"k": object()}}, TypeError, "'k'"),
        ({"w": weights()}, {"metadata": {"k": []}}, TypeError, "'k'"),
        ({"w": weights()}, {"metadata": {"k": np.complex64(1)}}, TypeError, "'k'"),
        ({"w": weights()}, {"metadata": {"k": np.datetime64(1, "s")}}, TypeError, "'k'"),
        ({"w": weights()}, {"metadata": "llama"}, TypeError, "metadata='llama'"),
        ({"w": weights()}, {"like": "nowhere.gguf"}, FileNotFoundError, "nowhere"),
        ({"w": weights()}, {"like": 3}, TypeError, "like=3, which is no path"),
        ({"w": weights()}, {"like": "."}, FileNotFoundError, "no such file"),
        ({"w": weights()}, {"names": {"w": 3}}, TypeError, r"gives 3 for 'w'\. Pass a string"),
        ({"w": weights()}, {"names": {"w": ""}}, TypeError, "gives '' for 'w'"),
        ({"w": weights()}, {"names": "w"}, TypeError, "names='w'. Pass a mapping"),
        ({"\ud800": weights()}, {}, ValueError, "UTF-8 has no place for"),
        ({"w": weights()}, {"where": "w"}, TypeError, r"where='w', a string.*by_path\('w'\)"),
        ({"w": weights()}, {"where": None}, TypeError, "where=None, which cannot be called"),
    ],
)
def test_bad_input_is_refused_at_the_door(tmp_path, tensors, kwargs, error, match):
    with pytest.raises(error, match=match):
        jp.export.gguf(tmp_path / "net.gguf", tensors, **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [2**70, 2**64, -(2**63) - 1, [-1, 2**63], 1e300, [1.0, -1e39], "\ud800", ["a", "\ud800"]],
)
def test_metadata_beyond_the_types_of_gguf_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"'a': .*beyond what GGUF holds: whole numbers of 64"):
        jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, metadata={"a": value, "b": 1})
    assert not list(tmp_path.iterdir())


def test_the_largest_metadata_come_back(tmp_path):
    metadata = {
        "a": 2**64 - 1,
        "b": [-1, 2**63 - 1],
        "c": -(2**63),
        "d": [0, 2**64 - 1],
        "e": float(np.finfo(np.float32).max),
        "f": float("inf"),
        "g": "\N{SNOWMAN}",
    }
    jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, metadata=metadata)
    fields = library.GGUFReader(tmp_path / "net.gguf").fields
    assert {key: fields[key].contents() for key in metadata} == metadata


@pytest.mark.parametrize(
    "key", ["general.file_type", "general.alignment", "split.count", "GGUF.version"]
)
def test_metadata_that_the_writer_decides_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=rf"got '{key}', which say .*quantization=.*Leave"):
        jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, metadata={key: 1})
    with pytest.raises(TypeError, match=r"'general.architecture': 3\. Pass a name"):
        jp.export.gguf(tmp_path / "n.gguf", {"w": weights()}, metadata={"general.architecture": 3})


@pytest.mark.parametrize("data", [b"", b"GGUF", b"junk" * 30, b"GGUF" + b"\1" * 80])
def test_a_file_like_which_is_none_of_gguf_is_told(tmp_path, data):
    like = tmp_path / "junk"
    like.write_bytes(data)
    with pytest.raises(ValueError, match=r"gguf\(like='.*junk'\)` is no GGUF file.*metadata="):
        jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, like=like)
    assert list(tmp_path.iterdir()) == [like]


def test_empty_lists_of_a_file_like_are_left_out(tmp_path):
    def text(x):
        return len(x).to_bytes(8, "little") + x.encode()

    def numbers(*xs):
        return b"".join(x.to_bytes(size, "little") for x, size in xs)

    like = tmp_path / "like.gguf"
    name = text("general.architecture") + numbers((8, 4)) + text("llama")
    tags = text("general.tags") + numbers((9, 4), (8, 4), (0, 8))  # a list of strings, none
    like.write_bytes(b"GGUF" + numbers((3, 4), (0, 8), (2, 8)) + name + tags + bytes(64))
    jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, like=like)
    fields = library.GGUFReader(tmp_path / "net.gguf").fields
    assert "general.tags" not in fields and fields["general.architecture"].contents() == "llama"
    for value in (["a"], [3], "a"):
        metadata = {"general.tags": value}
        jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, like=like, metadata=metadata)
        fields = library.GGUFReader(tmp_path / "net.gguf").fields
        assert fields["general.tags"].contents() == value


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("whole", -1, "UINT32"),
        ("whole", 2**32, "UINT32"),
        ("whole", 1.5, "UINT32"),
        ("whole", True, "UINT32"),
        ("whole", "x", "UINT32"),
        ("flag", 7, "BOOL"),
        ("text", 7, "STRING"),
        ("rows", [1, -1], "UINT32"),
        ("number", "x", "FLOAT32"),
    ],
)
def test_metadata_of_another_type_than_in_the_file_like_are_refused(tmp_path, key, value, kind):
    like = tmp_path / "like.gguf"
    before = {"whole": 3, "flag": True, "text": "x", "rows": [1, 2], "number": 1.5}
    jp.export.gguf(like, {"w": weights()}, metadata=before)
    with pytest.raises(ValueError, match=rf"'{key}': .*, which is {kind} there\. Pass values of"):
        jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, like=like, metadata={key: value})
    after = {"whole": np.int64(4), "rows": np.array([7]), "number": 2, "flag": np.False_}
    jp.export.gguf(tmp_path / "net.gguf", {"w": weights()}, like=like, metadata=after)
    fields = library.GGUFReader(tmp_path / "net.gguf").fields
    assert {k: fields[k].contents() for k in before} == before | after | {"rows": [7]}


def test_reading_says_what_a_file_is_that_is_no_gguf_file(tmp_path):
    path = tmp_path / "net.gguf"
    with pytest.raises(FileNotFoundError, match=r"no .*net\.gguf"):
        read_gguf(path)
    path.write_bytes(b"no such thing, and longer than a head of a file is")
    with pytest.raises(ValueError, match="is no GGUF file"):
        read_gguf(path)
    jp.export.gguf(path, {"w": weights()})
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match="damaged"):
        read_gguf(path)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"jaxprune\[gguf\]"):
        jp.export.gguf(tmp_path / "net.gguf", {"w": weights()})


def test_an_older_file_stays_where_something_is_wrong(tmp_path):
    path = tmp_path / "net.gguf"
    jp.export.gguf(path, {"w": weights()})
    before = path.read_bytes()
    params, masks = pruned()
    with pytest.raises(ValueError, match="zeros"):
        jp.export.gguf(path, params, masks=masks, quantization="Q5_1")
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_size_of_a_large_file_once_compressed_is_estimated_from_pieces(tmp_path, monkeypatch):
    from jaxprune.export import _report

    params, masks = pruned(0.9)
    path = tmp_path / "net.gguf"
    whole = jp.export.gguf(path, params, masks=masks, quantization="F32").gzip_bytes
    monkeypatch.setattr(_report, "LARGE", 2**10)
    monkeypatch.setattr(_report, "PIECE", 2**8)
    estimate = jp.export.gguf(path, params, masks=masks, quantization="F32").gzip_bytes
    assert whole < path.stat().st_size / 2 and 0.7 < estimate / whole < 2


def test_zeros_are_found_in_the_file_by_name_and_in_that_of_layers(tmp_path):
    params = {"layers": {"up": weights((3, 32, 64))}}
    masks = {"layers": {"up": weights((3, 32, 64), 1) > 0}}
    layout = jp.Layout({"layers/up": ("layer", "in", "out")})
    names = {"layers/up": "blk.{}.ffn_up.weight"}
    for kind, export in (("gguf", jp.export.gguf), ("safetensors", jp.export.safetensors)):
        path = tmp_path / f"net.{kind}"
        export(path, params, layout=layout, names=names, masks=masks)
        assert jp.export.check_zeros(path, params, masks).kept == 1.0
    flat, flat_masks = pruned()
    jp.export.gguf(path, flat, masks=flat_masks, quantization="Q4_1", lose_zeros=True)
    assert jp.export.check_zeros(path, flat, flat_masks).kept < 0.1


def test_arguments_in_the_wrong_order_are_told():
    with pytest.raises(TypeError, match=r"no path.*\(path, (tensors|params)\)"):
        jp.export.gguf({"w": np.ones((2, 32))}, "net")
