"""Packages for Core ML: what they weigh, what is in them, and what happens if they cannot be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import _atomic
from jaxprune._atomic import _exchange, in_place
from jaxprune.export import _coreml, _mil
from jaxprune.export._constants import compare_constants, locate
from jaxprune.export._coreml_door import matrices

pytest.importorskip("stablehlo_coreml", reason="coremltools has no wheel for Python 3.14")
pytest.importorskip("sklearn")


def mlp(params, x):
    x = jax.nn.relu(x @ params["w"] + params["b"][None])
    return jax.nn.relu(x @ params["v"]) @ params["u"]


@pytest.fixture(scope="module")
def params():
    w, v, u = jax.random.split(jax.random.key(0), 3)
    return {
        "w": jax.random.normal(w, (512, 512)),
        "b": jnp.linspace(-1, 1, 512),
        "v": jax.random.normal(v, (512, 512)),
        "u": jax.random.normal(u, (512, 10)),
    }


@pytest.fixture(scope="module")
def masks(params):
    return jp.find_masks(params, 0.9)


X = jnp.sin(jnp.arange(1024.0)).reshape(2, 512)
SMALL = {"w": jnp.cos(jnp.arange(4096.0)).reshape(64, 64)}
ONES = jnp.ones((2, 64))


def product(params, x):
    return x @ params["w"]


def spec(path):
    import coremltools

    return coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description


# What is in a package


def test_a_package_has_the_weights_that_masks_keep_and_a_bit_for_each_other(
    params, masks, tmp_path, capfd
):
    path = tmp_path / "net.mlpackage"
    report = jp.export.coreml(path, mlp, params, X, masks=masks)
    assert report.zeros_kept == 1 and report.zeroed == 0 and report.parity < 2**-11
    assert report.bytes <= 0.18 * report.dense_bytes
    assert report.latency_ms is None and report.path == path
    assert [x.name for x in spec(path).input] == ["input_0"]
    assert [x.name for x in spec(path).output] == ["output"]
    assert [x.name for x in tmp_path.iterdir()] == ["net.mlpackage"]
    assert capfd.readouterr() == ("", "")


def test_palettes_round_what_is_left_and_no_zero(params, masks, tmp_path):
    path = tmp_path / "net.mlpackage"
    report = jp.export.coreml(path, mlp, params, X, masks=masks, palettize=4)
    assert report.zeros_kept == 1 and report.zeroed == 0
    assert report.bytes <= 0.10 * report.dense_bytes and 0.01 < report.parity < 0.5
    with _coreml._contained():
        back = _coreml._read(path)
    values = {len(np.unique(x[x != 0])) for x in back.values() if x.size > 2048}
    assert max(values) <= 16


def test_float32_packages_have_the_very_weights(params, masks, tmp_path):
    report = jp.export.coreml(
        tmp_path / "net.mlpackage", mlp, params, X, masks=masks, precision="float32"
    )
    assert (
        report.parity == 0 and report.zeros_kept == 1 and report.bytes < 0.16 * report.dense_bytes
    )


def test_dense_weights_stay_dense_and_so_do_those_below_the_least_sparsity(tmp_path):
    path, half = tmp_path / "net.mlpackage", jp.find_masks(SMALL, 0.4)
    report = jp.export.coreml(path, product, SMALL, ONES)
    assert report.zeros_kept is None and 0.97 < report.bytes / report.dense_bytes < 1.03
    report = jp.export.coreml(path, product, SMALL, ONES, masks=half)
    assert report.zeros_kept == 1 and 0.97 < report.bytes / report.dense_bytes < 1.03
    report = jp.export.coreml(path, product, SMALL, ONES, masks=half, min_sparsity=0.3)
    assert report.zeros_kept == 1 and report.bytes / report.dense_bytes < 0.85


def test_kept_weights_that_float16_rounds_to_zero_are_counted(tmp_path):
    tiny = {"w": SMALL["w"].at[0, 1:4].set(1e-9)}
    report = jp.export.coreml(tmp_path / "net.mlpackage", product, tiny, ONES)
    assert report.zeroed == 3


def test_scanned_layers_and_trees_go_as_all_that_is_exported(tmp_path):
    e, layers, h = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(
        ((50, 64), (3, 64, 64), (64, 20))
    ))  # fmt: skip
    params = {"embedding": e, "layers": layers, "head": h}

    def fn(params, x):
        x, _ = jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w), None), params["embedding"][x["tokens"]], params["layers"]
        )
        return {"logits": x @ params["head"], "hidden": x}

    path, masks = tmp_path / "net.mlpackage", jp.find_masks(params, 0.9)
    tokens = {"tokens": jnp.arange(14).reshape(2, 7)}
    report = jp.export.coreml(path, fn, params, tokens, masks=masks)
    assert report.zeros_kept == 1 and report.parity < 2**-11
    assert [x.name for x in spec(path).input] == ["input_0_tokens"]
    assert {x.name for x in spec(path).output} == {"output_logits", "output_hidden"}


def test_norms_go_into_convolutions_and_zeros_stay(tmp_path):
    params = {
        "kernel": jax.random.normal(jax.random.key(0), (3, 3, 16, 32)),
        "scale": jnp.arange(32.0),
    }
    params["scale"] = params["scale"] / 8 + 0.5

    def fn(params, x):
        x = jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(x * params["scale"][None, None, None])

    masks = jp.find_masks(params, 0.9, where=jp.by_path("kernel"))
    x = jnp.ones((1, 8, 8, 16))
    report = jp.export.coreml(tmp_path / "net.mlpackage", fn, params, x, masks=masks)
    assert report.zeros_kept == 1 and report.parity < 2**-10
    assert report.bytes < 0.6 * report.dense_bytes


def test_a_batch_of_any_size_has_a_range(tmp_path):
    path = tmp_path / "net.mlpackage"
    jp.export.coreml(path, product, SMALL, ONES, batch="batch", max_batch=9)
    (given,) = spec(path).input
    (batch, inputs) = given.type.multiArrayType.shapeRange.sizeRanges
    assert (batch.lowerBound, batch.upperBound) == (1, 9)
    assert (inputs.lowerBound, inputs.upperBound) == (64, 64)


def test_the_range_holds_the_example(tmp_path):
    path = tmp_path / "net.mlpackage"
    jp.export.coreml(path, product, SMALL, jnp.ones((128, 64)), batch="batch")
    (given,) = spec(path).input
    assert given.type.multiArrayType.shapeRange.sizeRanges[0].upperBound == 128


def test_a_conversion_that_failed_stands_in_no_way_of_the_next(tmp_path):
    from coremltools.converters.mil.mil import Symbol

    path = tmp_path / "net.mlpackage"
    with pytest.raises(ValueError, match="cannot convert"):
        jp.export.coreml(path, lambda p, x: jnp.linalg.eigh(x.T @ x)[0], SMALL, ONES, batch="b")
    Symbol("dim_0")  # as a conversion of the user leaves it that fails
    assert jp.export.coreml(path, product, SMALL, ONES, batch="b").bytes


def test_inputs_that_nothing_reads_are_there(tmp_path):
    path = tmp_path / "net.mlpackage"
    inputs = {"a": jnp.ones((2, 3)), "b": ONES}
    jp.export.coreml(path, lambda p, x: product(p, x["b"]), SMALL, inputs)
    assert [x.name for x in spec(path).input] == ["input_0_a", "input_0_b"]
    assert list(spec(path).input[0].type.multiArrayType.shape) == [2, 3]


def test_names_are_of_letters_and_digits(tmp_path):
    path = tmp_path / "net.mlpackage"
    fn = lambda p, x: {"my out": product(p, x["my input"]), "é": x["b"]}
    jp.export.coreml(path, fn, SMALL, {"my input": ONES, "b": ONES})
    assert [x.name for x in spec(path).input] == ["input_0_b", "input_0_my_input"]
    assert [x.name for x in spec(path).output] == ["output_my_out", "output__"]
    fn = lambda p, x: product(p, x["a b"]) + x["a-b"]
    jp.export.coreml(path, fn, SMALL, {"a b": ONES, "a-b": ONES})
    assert [x.name for x in spec(path).input] == ["input_0", "input_1"]


# What is compared


def test_programs_without_convolutions_are_computed_and_compared(params, tmp_path, monkeypatch):
    seen = []

    def spy(program, values):
        seen.append([got is not None for got in _mil.infer(program, values)])
        return [np.asarray(x) + 1 for x in program.reference(*values)]

    monkeypatch.setattr(_coreml, "infer", spy)
    path = tmp_path / "net.mlpackage"
    with pytest.raises(ValueError, match=r"`export.coreml` made a file that differs from JAX"):
        jp.export.coreml(path, product, SMALL, ONES)
    assert seen == [[True]] and not list(tmp_path.iterdir())
    monkeypatch.setattr(_coreml, "infer", lambda program, values: [None])  # a convolution
    assert jp.export.coreml(path, product, SMALL, ONES).bytes


def test_zeros_that_palettes_lose_are_told(tmp_path):
    path = tmp_path / "net.mlpackage"
    # By magnitude there would be a gap around zero, and with it a value of the palette.
    masks = {"w": jax.random.uniform(jax.random.key(0), (64, 64)) > 0.4}
    with pytest.warns(UserWarning, match=r"kept 0.00% of the zeros in .* smaller `min_sparsity`"):
        report = jp.export.coreml(path, product, SMALL, ONES, masks=masks, palettize=4)
    assert report.zeros_kept == 0
    report = jp.export.coreml(
        path, product, SMALL, ONES, masks=masks, palettize=4, min_sparsity=0.3
    )
    assert report.zeros_kept == 1


def test_params_are_found_transposed_and_layer_by_layer():
    w = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    ((part, place),) = locate(w, {"other": np.ones(24), "a": w.transpose(2, 0, 1).reshape(4, 6)})
    assert part is w and place == ("a", (2, 0, 1), True, False)
    found = locate(w, {"b": w[1].T.copy(), "a": w[0]})
    assert [place for _, place in found] == [
        ("a", (0, 1), True, False),
        ("b", (1, 0), True, False),
    ]
    assert locate(w, {"a": np.ones(23)}) == []


def test_what_a_file_lost_is_counted_by_the_places_before_it_was_compressed():
    w = np.array([[0, 1], [2, 4]], np.float32)
    back = {"a": np.array([[0.5, 2], [0, 4]], np.float32)}  # transposed: 0 is 0.5, 1 is 0
    assert compare_constants({"w": w}, {"a": w.T}, back) == (0.25, 0.0, 1, ())
    scaled = {"a": 3 * w.T}  # as a norm does; then what counts is what compression changed
    assert compare_constants({"w": w}, scaled, {"a": 3 * w.T}) == (0.0, 1.0, 0, ())


def draw(i, *shape):
    return jnp.asarray(np.random.default_rng(i).standard_normal(shape), jnp.float32)


def test_weights_that_are_merged_are_counted_over_the_program_and_named(tmp_path):
    path, params = tmp_path / "net.mlpackage", {n: draw(i, 64, 64) for i, n in enumerate("qkv")}
    fused = lambda p, x: x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1)
    # By magnitude there would be a gap around zero, and with it a value of the palette.
    masks = {n: jax.random.uniform(jax.random.key(0), (64, 64)) > 0.1 for n in "qkv"}
    with pytest.warns(jp.PruneWarning) as told:
        report = jp.export.coreml(path, fused, params, ONES, masks=masks, palettize=4)
    words = [str(warning.message) for warning in told]
    assert "kept 0.00% of the zeros" in words[0]
    assert "finds no matrix like 'k', 'q', 'v'" in words[1]
    assert report.zeros_kept == 0 and report.parity > 0.01
    with pytest.warns(jp.PruneWarning, match=r"finds no matrix like 'q' in .*merged with others"):
        report = jp.export.coreml(
            path,
            lambda p, x: x @ p["q"][:, :32],
            params,
            ONES,
            masks={**masks, "k": None, "v": None},
        )
    assert report.zeros_kept == 1 and report.parity == 2**-11  # what float16 rounds at most


def test_weights_in_the_bodies_of_loops_and_branches_are_compared(tmp_path):
    params = {n: draw(i, 64, 64) for i, n in enumerate("qkv")}

    def fn(p, x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ p["q"]), x)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ p["k"], lambda x: x @ p["v"], x)

    masks = jp.find_masks(params, 0.9)
    report = jp.export.coreml(tmp_path / "net.mlpackage", fn, params, ONES, masks=masks)
    assert report.zeros_kept == 1 and report.zeroed == 0 and 1e-4 < report.parity < 2**-11
    report = jp.export.coreml(
        tmp_path / "net.mlpackage", fn, params, ONES, masks=masks, palettize=2
    )
    assert report.zeros_kept == 1 and report.parity > 0.05


def test_unused_params_are_no_other_matrix_of_their_size(tmp_path):
    params = {n: draw(i, 64, 64) for i, n in enumerate("qk")}
    masks, path = jp.find_masks(params, 0.9), tmp_path / "net.mlpackage"
    with pytest.warns(jp.PruneWarning, match=r"finds no matrix like 'k' in"):
        report = jp.export.coreml(path, lambda p, x: x @ p["q"], params, ONES, masks=masks)
    assert report.zeros_kept == 1 and report.zeroed == 0


def test_kernels_that_are_turned_are_found(tmp_path):
    params = {"k": draw(3, 3, 3, 16, 32)}
    report = jp.export.coreml(
        tmp_path / "net.mlpackage",
        lambda p, x: jax.lax.conv_transpose(x, p["k"], (2, 2), "SAME"),
        params,
        jnp.ones((1, 8, 8, 16)),
        masks=jp.find_masks(params, 0.9),
    )
    assert report.zeros_kept == 1 and report.zeroed == 0 and 1e-4 < report.parity < 2**-11


# Packages that are folders


def test_a_package_replaces_an_older_one_whole_and_leaves_it_if_it_cannot(tmp_path):
    path = tmp_path / "net.mlpackage"
    jp.export.coreml(path, product, SMALL, ONES)
    (path / "left_over").write_text("of the old one")
    with pytest.raises(ValueError, match=r"cannot convert `eigh` at .*test_coreml.py:\d+"):
        jp.export.coreml(path, lambda p, x: jnp.linalg.eigh(p["w"] * x[:1])[0], SMALL, ONES)
    assert (path / "left_over").exists()
    jp.export.coreml(path, product, SMALL, ONES)
    assert not (path / "left_over").exists() and (path / "Manifest.json").exists()
    assert [x.name for x in tmp_path.iterdir()] == ["net.mlpackage"]


def test_an_older_folder_is_put_back_where_the_new_one_cannot_come(tmp_path):
    old = tmp_path / "net.mlpackage"
    old.mkdir()
    with pytest.raises(FileNotFoundError):
        _exchange(tmp_path / "nothing", old, tmp_path / "aside")
    assert old.is_dir() and not (tmp_path / "aside").exists()


def test_of_two_writers_of_one_folder_the_last_one_tries_again(tmp_path, monkeypatch):
    path, calls = tmp_path / "net.mlpackage", []
    path.mkdir()

    def meets_another(new, path, old):
        calls.append(path)
        path.rename(tmp_path / "aside")  # the other one is between its two strokes
        _exchange(new, path, old)

    monkeypatch.setattr(_atomic, "_exchange", meets_another)
    with in_place(path) as written:
        written.mkdir()
        (written / "new").touch()
    assert (path / "new").exists() and len(calls) == 1


def test_a_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file' is no folder.* Pass another path"):
        jp.export.coreml(tmp_path / "file" / "net.mlpackage", product, SMALL, ONES)


# Bad input


def test_paths_of_other_names_and_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Pass '.*net.mlpackage'"):
        jp.export.coreml(tmp_path / "net.onnx", product, SMALL, ONES)
    (tmp_path / "mine.mlpackage").mkdir()
    with pytest.raises(ValueError, match=r"which is no Core ML package\. Pass another path"):
        jp.export.coreml(tmp_path / "mine.mlpackage", product, SMALL, ONES)
    with pytest.raises(TypeError, match="got the function `product` as path"):
        jp.export.coreml(product, SMALL, ONES, tmp_path)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"palettize": 5}, r"palettize=5.* Use one of \[1, 2, 3, 4, 6, 8\]"),
        ({"palettize": True}, "palettize=True.* is no number of bits"),
        ({"palettize": 4.0}, "palettize=4.0.* is no number of bits"),
        ({"min_sparsity": "0.5"}, "min_sparsity='0.5'.* is no share of zeros"),
        ({"batch": "b", "max_batch": 0}, "max_batch=0.* is no size of a batch"),
        ({"batch": "my axis"}, "batch='my axis'.* is no name of an axis"),
        ({"tolerance": "1e-4"}, "tolerance='1e-4'.* is no difference"),
        ({"precision": "int8"}, "precision='int8'.* Use 'float16' or 'float32'"),
        ({"min_sparsity": 90}, "min_sparsity=90.* is no share of zeros"),
    ],
)
def test_unknown_settings_are_refused(setting, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        jp.export.coreml(tmp_path / "net.mlpackage", product, SMALL, ONES, **setting)


def test_weights_beyond_float16_are_named(tmp_path):
    large = {"w": SMALL["w"] * 1e6}
    with pytest.raises(ValueError, match=r"'w' \(1e\+06\)\. Pass `precision='float32'`"):
        jp.export.coreml(tmp_path / "net.mlpackage", product, large, ONES)
    path = tmp_path / "net.mlpackage"
    assert jp.export.coreml(path, product, large, ONES, precision="float32").parity == 0
    assert not matrices({"b": jnp.ones(10), "w": jnp.ones((1, 1))}, "float16")


def test_a_missing_package_is_told_with_its_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "stablehlo_coreml", None)
    with pytest.raises(ImportError, match=r"needs 'stablehlo_coreml'.*jaxprune\[coreml\]"):
        jp.export.coreml(tmp_path / "net.mlpackage", product, SMALL, ONES)


def test_weights_that_are_no_numbers_are_named(tmp_path):
    for bad in (jnp.nan, jnp.inf):
        params = {"w": SMALL["w"], "b": {"c": jnp.zeros(64).at[3].set(bad)}}
        with pytest.raises(ValueError, match="got 'b/c' with NaN or infinite entries"):
            jp.export.coreml(tmp_path / "net.mlpackage", product, params, ONES)


def test_infinite_constants_have_no_palette(tmp_path):
    fn = lambda p, x: x @ p["w"] + jnp.where(jnp.tri(64) > 0, 0, -jnp.inf)
    path, x = tmp_path / "net.mlpackage", jnp.ones((64, 64))
    with pytest.raises(ValueError, match=r"cannot round .* such as \[64, 64\] of a mask"):
        jp.export.coreml(path, fn, SMALL, x, palettize=4)
    assert jp.export.coreml(path, fn, SMALL, x).parity < 2**-11


def test_inputs_without_entries_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"input of shape \[0, 64\].* one row or more"):
        jp.export.coreml(tmp_path / "net.mlpackage", product, SMALL, jnp.ones((0, 64)))


def test_bfloat16_is_told_to_be_none_of_core_ml(tmp_path):
    fn = lambda p, x: x @ p["w"].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"no bfloat16: build the model with `dtype=jnp.float32`"):
        jp.export.coreml(tmp_path / "net.mlpackage", fn, SMALL, ONES.astype(jnp.bfloat16))
