"""Tests of finished sparse models in one file: bit for bit, small, and refused when damaged."""

import errno
import json
import os
import pickle
import sys
import tracemalloc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxprune as jp
from jaxprune import _atomic
from jaxprune.checkpoint import _frame, load, save
from tests.helpers import assert_trees_equal, tree_of_weights

REAL = ("float16", "bfloat16", "float32", "float64")
NARROW = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu", "float4_e2m1fn")
WHOLE = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
HALF_BYTES = ("int4", "uint4", "int2", "uint2")
DTYPES = (*REAL, *NARROW, *WHOLE, *HALF_BYTES, "complex64", "complex128")


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array | None


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    return (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert all(map(same_bits, jax.tree.leaves(got), jax.tree.leaves(want)))


def any_bits(dtype, shape, seed=0):
    """Elements of all bits that the dtype has: NaNs of any payload, minus zero, infinities."""
    dtype, rng = jnp.dtype(dtype), np.random.default_rng(seed)
    if dtype.name == "bool":
        return rng.random(shape) < 0.5
    if dtype.name in (*HALF_BYTES, "float4_e2m1fn"):  # a byte in NumPy, of which some bits count
        return rng.integers(0, 2, shape).astype(dtype)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def sparse(dtype, shape, mask_shape=None, seed=0):
    """An array and its mask."""
    mask = np.random.default_rng(seed + 1).random(shape if mask_shape is None else mask_shape) < 0.3
    array = np.where(np.broadcast_to(mask, shape)[..., None], _bytes(any_bits(dtype, shape)), 0)
    return array.astype(np.uint8).reshape(-1).view(jnp.dtype(dtype)).reshape(shape), mask


def _bytes(array):
    return array.reshape(-1).view(np.uint8).reshape(*array.shape, array.dtype.itemsize)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def random_masks(params, kept=0.5):
    """Masks of all matrices; finding some would compile for every shape."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda p: jnp.asarray(rng.random(p.shape) < kept), jp.prunable(params))


@pytest.fixture
def small(key):
    params = {"Dense_0": {"kernel": jax.random.normal(key, (5, 4)), "bias": jnp.arange(4.0)}}
    kept = jnp.arange(20).reshape(5, 4) % 2 == 1
    masks = {"Dense_0": {"kernel": kept, "bias": None}}
    return jp.apply_masks(params, masks), masks


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(path, dtype):
    array, mask = sparse(dtype, (7, 11))
    params = {"w": array, "dense": any_bits(dtype, (3, 5), seed=2)}
    save(path, params, {"w": mask, "dense": None})
    got, masks = load(path, like=params)
    assert_same_bits(got, params)
    assert_same_bits(masks, {"w": mask, "dense": None})
    # JAX holds 64 bits only where it is told to: else they stay in NumPy instead of being cut.
    wide = jnp.dtype(dtype).name in ("float64", "int64", "uint64", "complex128")
    assert_same_bits(load(path)[0], params)
    assert isinstance(load(path)[0]["w"], np.ndarray if wide else jax.Array)


def test_64_bits_come_back_to_jax_where_it_has_them(path):
    with jax.enable_x64(True):
        params = {"w": jnp.arange(3.0, dtype=jnp.float64)}
        save(path, params, {"w": None})
        got, _ = load(path)
        assert isinstance(got["w"], jax.Array) and got["w"].dtype == jnp.float64


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (4, 0), (2, 3, 11), (9, 8)])
def test_every_shape_comes_back(path, shape):
    array, mask = sparse("float32", shape)
    save(path, {"w": array}, {"w": mask})
    got, masks = load(path)
    assert same_bits(got["w"], array) and same_bits(masks["w"], mask)


@pytest.mark.parametrize("mask_shape", [(1, 300), (784, 1), (1, 1), (784, 300)])
def test_masks_that_broadcast_stay_small_and_keep_their_shape(path, mask_shape):
    array, mask = sparse("float32", (784, 300), mask_shape)
    save(path, {"w": array}, {"w": mask})
    kept = int(np.broadcast_to(mask, array.shape).sum())
    assert path.stat().st_size - 4 * kept - -(-mask.size // 8) < 500
    got, masks = load(path)
    assert same_bits(got["w"], array) and same_bits(masks["w"], mask)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24.0).reshape(4, 6)[::2, ::-1],
        np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4)),
        np.arange(6, dtype=">f4"),
        np.float32(3.5),
        np.broadcast_to(np.float32(2), (3, 3)),
    ],
)
def test_numpy_arrays_of_any_layout_come_back_in_numpy(path, array):
    save(path, {"w": array}, {"w": None})
    got, _ = load(path, like={"w": array})
    assert type(got["w"]) is type(array)
    np.testing.assert_array_equal(got["w"], array)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_random_keys_come_back_and_draw_the_same_numbers(path, impl):
    keys = {"key": jax.random.split(jax.random.key(3, impl=impl), 2)}
    save(path, keys, {"key": None})
    for like in (None, keys, jax.eval_shape(lambda: keys)):
        got, _ = load(path, like)
        assert got["key"].dtype == keys["key"].dtype
        draw = jax.vmap(jax.random.bits)
        assert_trees_equal(draw(got["key"]), draw(keys["key"]))


def containers(key):
    tree = tree_of_weights(key)
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return {
        "dict": tree,
        "list": [tree, (tree["Dense_0"],)],
        "namedtuple": [Layer(jnp.ones((3, 2)), jnp.ones(2)), Layer(jnp.ones((2, 2)), None)],
        "frozen dict": FrozenDict(tree),
        "nnx state": nnx.state(model),
        "nnx pure state": nnx.to_pure_dict(nnx.state(model)),
        "haiku": {"mlp/~/linear_0": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}},
        "one array": jnp.ones((2, 3)),
        "holes of optax": {"w": jnp.ones((2, 2)), "hole": optax.MaskedNode()},
    }


@pytest.mark.parametrize("name", containers(jax.random.key(0)))
def test_any_tree_comes_back_in_the_structure_of_like(path, key, name):
    params = containers(key)[name]
    masks = random_masks(params)
    params = jp.apply_masks(params, masks)
    save(path, params, masks)
    for like in (params, jax.eval_shape(lambda: params)):
        got, got_masks = load(path, like)
        assert_same_bits(got, params)
        assert_same_bits(got_masks, masks)


def test_without_like_trees_are_nested_dicts_with_keys_as_they_were(path):
    ones = jnp.ones((2, 2))
    params = {"a/~/b": [ones, (ones,)], "layer": Layer(ones, None), "0": ones}
    save(path, params, jax.tree.map(lambda _: None, params))
    got, masks = load(path)
    assert_trees_equal(
        got, {"a/~/b": {0: ones, 1: {0: ones}}, "layer": {"kernel": ones, "bias": None}, "0": ones}
    )
    assert jax.tree.leaves(masks) == [] and masks["layer"] == {"kernel": None, "bias": None}
    params = {"layers": {0: ones, 1: ones}}
    save(path, params, jax.tree.map(lambda _: None, params))
    assert_trees_equal(load(path)[0], params)


def test_an_empty_tree_comes_back_empty(path):
    save(path, {}, {})
    assert load(path) == ({}, {}) and load(path, {}) == ({}, {})


def test_packed_masks_are_saved_like_others(path, small):
    params, masks = small
    save(path, params, masks)
    plain = path.read_bytes()
    save(path, params, jp.pack(masks))
    assert path.read_bytes() == plain


def test_the_same_model_gives_the_same_bytes_on_one_device_or_on_eight(path, small):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    params, masks = small
    save(path, params, masks)
    plain = path.read_bytes()
    rows = NamedSharding(mesh, PartitionSpec(None, "x"))
    params["Dense_0"]["kernel"] = jax.device_put(params["Dense_0"]["kernel"], rows)
    save(path, params, masks)
    assert path.read_bytes() == plain


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    full=st.lists(st.booleans(), min_size=3, max_size=3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_any_array_under_any_mask_comes_back(tmp_path_factory, shape, full, dtype, seed):
    path = tmp_path_factory.mktemp("any") / "model"
    mask_shape = [n if f else 1 for n, f in zip(shape, full, strict=False)]
    array, mask = sparse(dtype, tuple(shape), tuple(mask_shape), seed)
    save(path, [array], [mask])
    (got,), (got_mask,) = load(path, [array])
    assert same_bits(got, array) and same_bits(got_mask, mask)


@pytest.mark.parametrize("kept, dtype", [(0.5, "bfloat16"), (0.1, "float32"), (0.01, "float16")])
def test_a_file_is_kept_values_and_a_bit_a_weight_and_a_head(path, kept, dtype):
    params, masks, size = {}, {}, 0
    for name, shape in {"hidden": (784, 300), "middle": (300, 100), "out": (100, 10)}.items():
        mask = np.random.default_rng(0).random(shape) < kept
        params[name] = {"kernel": mask.astype(jnp.dtype(dtype)), "bias": np.zeros(shape[1], dtype)}
        masks[name] = {"kernel": mask, "bias": None}
        size += (mask.sum() + shape[1]) * jnp.dtype(dtype).itemsize + -(-mask.size // 8)
    save(path, params, masks)
    assert 0 < path.stat().st_size - size <= 300 + 6 * 320  # a frame, and a record a leaf
    dense = sum(p.nbytes for p in jax.tree.leaves(params))
    assert size / dense == pytest.approx(kept + 1 / 8 / jnp.dtype(dtype).itemsize, abs=0.005)


def test_the_safetensors_library_reads_the_file(path, small):
    safetensors = pytest.importorskip("safetensors.numpy")
    params, masks = small
    save(path, params, masks)
    tensors = safetensors.load_file(path)
    kernel, mask = params["Dense_0"]["kernel"], np.asarray(masks["Dense_0"]["kernel"])
    assert_trees_equal(
        tensors,
        {
            "dense/Dense_0/bias": params["Dense_0"]["bias"],
            "kept/Dense_0/kernel": np.asarray(kernel)[mask],
            "bits/Dense_0/kernel": np.packbits(mask),
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_accepts_every_dtype(path, dtype):
    safetensors = pytest.importorskip("safetensors")
    array, mask = sparse(dtype, (3, 5))
    save(
        path,
        {"a": array, "b": np.ones(3, np.int8), "c": np.ones(3)},
        {"a": mask, "b": None, "c": None},
    )
    names = [name for name, _ in safetensors.deserialize(path.read_bytes())]
    assert sorted(names) == ["bits/a", "dense/b", "dense/c", "kept/a"]


def test_leaves_come_back_on_the_devices_of_like(path, key):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    rows, columns = (NamedSharding(mesh, PartitionSpec(*s)) for s in (("x",), (None, "x")))
    second = SingleDeviceSharding(jax.devices()[1])
    params = {name: jax.random.normal(key, (16, 8)) for name in ("a", "b", "c", "d")}
    masks = {
        "a": random_masks(params)["a"],
        "b": random_masks(params)["b"][:1],
        "c": jnp.ones((16, 8), bool),
        "d": None,
    }
    params = jp.apply_masks(params, masks)
    save(path, params, masks)
    where = {"a": rows, "b": rows, "c": second, "d": columns}
    shapes = {
        name: jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=where[name]) for name in "abcd"
    }
    arrays = {name: jax.device_put(params[name], where[name]) for name in "abcd"}
    for like in (shapes, arrays):
        got, got_masks = load(path, like)
        assert_same_bits(got, params)
        assert_same_bits(got_masks, masks)
        assert {name: leaf.sharding for name, leaf in got.items()} == where
        assert got_masks["a"].sharding == rows and got_masks["c"].sharding == second
        assert got_masks["b"].sharding.is_fully_replicated
        assert got_masks["b"].sharding.device_set == rows.device_set
    assert not load(path)[0]["a"].committed


def test_a_loaded_model_can_be_donated(path, small):
    save(path, *small)
    second = SingleDeviceSharding(jax.devices()[1])
    for like in (None, jax.tree.map(lambda x: jax.device_put(x, second), small[0])):
        params, _ = load(path, like)
        double = jax.jit(lambda p: jax.tree.map(lambda x: 2 * x, p), donate_argnums=0)
        assert_trees_equal(double(params), jax.tree.map(lambda x: 2 * x, small[0]))


def test_leaves_are_loaded_one_by_one(path):
    mask = np.arange(1_000_000).reshape(1000, 1000) % 2 == 0
    array = mask.astype(np.float32)
    save(path, [array] * 12, [mask] * 12)
    tracemalloc.start()
    load(path, [array] * 12)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = 12 * (array.nbytes + mask.nbytes)
    assert result <= peak < result + 3 * array.nbytes  # the file itself is six of them


def test_what_the_masks_remove_comes_back_as_apply_masks_leaves_it(path):
    params = {
        "a": jnp.array([1.0, -0.0, 2.0, -0.0]),
        "b": jnp.array([[jnp.nan, 1.0]], jnp.bfloat16),
        "c": jnp.array([5.0, jnp.inf]),
    }
    mask = jnp.array([[False, True]])
    masks = {"a": jnp.array([False, False, True, True]), "b": mask, "c": ~mask[0]}
    save(path, params, masks)
    assert_same_bits(load(path)[0], jp.apply_masks(params, masks))


def test_what_is_no_array_is_refused_with_its_path(path):
    params = {
        "a": object(),
        "b": {"c": "relu", "d": np.array(["x"])},
        "e": np.longdouble(1),
        "w": np.ones(2),
    }
    message = (
        r"save\(params\)` got leaves that are no arrays of numbers: 'a' is of type object, 'b/d' "
        "is <U1, 'e' is float128.*jnp.asarray"
    )
    with pytest.raises(TypeError, match=message):
        save(path, params, jax.tree.map(lambda _: None, params))
    save(path, {"a": np.ones(2)}, {"a": None})
    with pytest.raises(TypeError, match=r"load\(like\)` got .*'a' is of type object"):
        load(path, {"a": object()})
    with pytest.raises(ValueError, match=r"'a' is float64\[2\] there and float\[\] in `like`"):
        load(path, {"a": 1.0})


def test_functions_and_strings_stay_in_the_code_and_numbers_are_stored(path):
    model = {"f": jax.nn.relu, "name": "lenet", "rate": 0.5, "n": 3, "w": jnp.ones((2, 2))}
    masks = {"f": None, "name": None, "rate": None, "n": None, "w": jnp.eye(2) > 0}
    save(path, model, masks)
    params, got = load(path)
    assert params["f"] is None and params["name"] is None
    assert (params["rate"], params["n"]) == (0.5, 3)
    other = {**model, "name": "another", "rate": 0.25}
    params, got = load(path, like=other)
    assert params["f"] is jax.nn.relu and params["name"] == "another" and params["rate"] == 0.5
    assert got["name"] is None and got["f"] is None
    assert params["w"].tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_params_without_masks_are_stored_as_they_are(path):
    params = {"w": jnp.arange(4.0), "b": jnp.ones(2, jnp.bfloat16)}
    save(path, params)
    got, masks = load(path, like=params)
    assert_same_bits(got, params)
    assert masks == {"w": None, "b": None}


def test_fields_called_key_and_value_come_back_as_two(path):
    class Attention(NamedTuple):
        key: jax.Array
        value: jax.Array

    params = {"a": Attention(jnp.ones((2, 2)), jnp.zeros((2, 3)))}
    save(path, params)
    assert load(path)[0]["a"].keys() == {"key", "value"}
    assert_same_bits(load(path, like=params)[0], params)


def test_leaves_that_share_a_path_are_refused(path):
    params = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"several leaves at 'a/b'.*Rename a key that holds a '/'"):
        save(path, params, jax.tree.map(lambda _: None, params))


def test_masks_of_another_tree_are_refused(path, small):
    params, masks = small
    with pytest.raises(ValueError, match="`masks` is not a tree like the params"):
        save(path, params, {"other": masks["Dense_0"]["kernel"]})
    with pytest.raises(ValueError, match="'Dense_0/kernel' has shape"):
        save(path, params, {"Dense_0": {"kernel": jnp.ones((2, 2), bool), "bias": None}})
    keys = {"key": jax.random.split(jax.random.key(0))}
    with pytest.raises(TypeError, match="masks for random keys: 'key'"):
        save(path, keys, {"key": jnp.ones(2, bool)})


def test_a_model_unlike_like_is_refused_with_every_difference(path, small):
    params, masks = small
    save(path, params | {"extra": jnp.ones(2), "hole": None}, masks | {"extra": None, "hole": None})
    like = {
        "Dense_0": {"kernel": jnp.ones((5, 3)), "bias": jnp.arange(4)},
        "Dense_1": jnp.ones((), jnp.bfloat16),
        "hole": jnp.ones(1),
    }
    with pytest.raises(ValueError) as error:
        load(path, like)
    text = str(error.value)
    for line in (
        "'Dense_0/kernel' is float32[5, 4] there and float32[5, 3] in `like`",
        "'Dense_0/bias' is float32[4] there and int32[4] in `like`",
        "'extra' is float32[2] there and nothing in `like`",
        "'Dense_1' is nothing there and bfloat16[] in `like`",
        "'hole' is None there and float32[1] in `like`",
        "Pass params of the same model",
    ):
        assert line in text
    assert len(text.splitlines()) == 7


def test_a_file_cut_at_any_length_is_refused(path, small):
    save(path, *small)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"`load` got .*(cut short|is empty|is no model)"):
            load(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="has 1 bytes behind its end"):
        load(path)


def refused_after_a_flip(path, whole, place, bit):
    """Flip one bit of a file, load it, and give the message."""
    flipped = bytearray(whole)
    flipped[place] ^= 1 << bit
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"`load` got .*\w") as error:
        load(path)
    assert error.type is ValueError
    return str(error.value)


def test_a_bit_flipped_in_any_byte_is_found_and_named_by_path(path, small):
    save(path, *small)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(len(whole)):
        message = refused_after_a_flip(path, whole, place, place % 8)
        if place >= start:  # 16 bytes of bias, 40 of kernel, 3 of bits
            name = "bias" if place < start + 16 else "kernel"
            assert f"the data of 'Dense_0/{name}' do not match" in message


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_every_single_bit_of_a_file_is_checked(path, small, bit):
    save(path, *small)
    whole = path.read_bytes()
    for place in range(len(whole)):
        refused_after_a_flip(path, whole, place, bit)


def test_all_damaged_leaves_are_named_together(path, small):
    save(path, *small)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    whole[8 + int.from_bytes(whole[:8], "little")] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="data of 'Dense_0/bias', 'Dense_0/kernel' do not match"):
        load(path)


class Bomb:
    """A pickle that runs code when it is loaded."""

    def __reduce__(self):
        return os._exit, (1,)


FOREIGN = {
    "empty": (b"", "is empty"),
    "text": (b"epoch,loss\n0,1.5\n" * 5, "is no model"),
    "short text": (b"hi", "is no model"),
    "pickle": (pickle.dumps(Bomb()), "is a pickle, no model of.*nothing of it was loaded"),
    "gzip": (b"\x1f\x8b" + b"\x00" * 50, "is a gzip archive"),
    "zeros": (b"\x00" * 100, "is no model"),
    "braces": (b"\x40" + b"\x00" * 7 + b"{" * 64, "its head cannot be read"),
    "nested": (b"\xa0\x0f" + b"\x00" * 6 + b'{"a":' + b"[" * 3995, "its head cannot be read"),
    "a JSON list": (b"\x09" + b"\x00" * 7 + b"{}       ", "safetensors file without a manifest"),
}


@pytest.mark.parametrize("content, message", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_kind_is_refused_with_its_kind(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_npz_npy_safetensors_and_folders_are_refused_with_their_kind(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    np.savez(tmp_path / "a.npz", w=np.ones(3))
    np.save(tmp_path / "a.npy", np.ones(3))
    safetensors.save_file({"w": np.ones(3)}, tmp_path / "a.safetensors")
    for name, message in {
        "a.npz": "is a zip archive, such as npz",
        "a.npy": "is an npy file",
        "a.safetensors": "file without a manifest of jaxprune. Read it with `safetensors",
        ".": "is a folder; a model is one file.*restore_run",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        load(tmp_path / "nothing_here")


def test_a_newer_format_is_refused(path, small, monkeypatch):
    monkeypatch.setattr(_frame, "FORMAT", 2)
    save(path, *small)
    monkeypatch.undo()
    message = r"written by a newer jaxprune \(format 2, this one reads 1\): upgrade"
    with pytest.raises(ValueError, match=message):
        load(path)


def forged(path, change):
    """Change the manifest of a file and seal it again."""
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    places = json.loads(whole[8:start])
    manifest = json.loads(places.pop("__metadata__")["jaxprune"])
    manifest["sha256"] = _frame.NO_SEAL
    change(manifest, places)
    text = json.dumps({"__metadata__": {"jaxprune": json.dumps(manifest)}, **places}).encode()
    head = len(text).to_bytes(8, "little") + text
    seal = _frame._seal(head)
    path.write_bytes(head.replace(_frame.NO_SEAL.encode(), seal.encode(), 1) + whole[start:])


FORGERIES = {
    "objects": (lambda m, _: m["leaves"][0].update(dtype="object"), "manifest cannot be read"),
    "no dtype": (lambda m, _: m["leaves"][0].update(dtype="float33"), "manifest cannot be read"),
    "a list": (lambda m, _: m.update(leaves=[1]), "manifest cannot be read"),
    "no leaves": (lambda m, _: m.pop("leaves"), "manifest cannot be read"),
    "negative": (lambda m, _: m["leaves"][0].update(shape=[-2, -2]), "manifest cannot be read"),
    "fractions": (lambda m, _: m["leaves"][0].update(shape=[4.0]), "manifest cannot be read"),
    "larger": (lambda m, _: m["leaves"][0].update(shape=[5]), "does not describe its data"),
    "fewer": (lambda m, _: m["leaves"].pop(), "does not describe its data"),
    "kept": (lambda m, _: m["leaves"][1].update(kept=9), "does not describe its data"),
    "kept where": (lambda m, _: m["leaves"][1].update(shape=[5, 1, 4]), "manifest cannot be read"),
    "offsets": (
        lambda _, p: p["dense/Dense_0/bias"].update(data_offsets=[0, 10**15]),
        "does not describe its data",
    ),
    "no offsets": (lambda _, p: p["dense/Dense_0/bias"].clear(), "does not describe its data"),
    "a short seal": (lambda m, _: m.update(sha256="0"), "head does not match its checksum"),
}


@pytest.mark.parametrize("change, message", FORGERIES.values(), ids=FORGERIES)
def test_a_forged_manifest_is_refused_though_its_checksum_fits(path, small, change, message):
    save(path, *small)
    forged(path, change)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_failed_save_leaves_the_old_file_and_no_draft(path, small, monkeypatch):
    save(path, *small)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_atomic.os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*No space left.*choose a path") as error:
        save(path, jax.tree.map(jnp.zeros_like, small[0]), small[1])
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_an_error_that_names_it(tmp_path, small):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for bad in ("file/model", "folder", "x" * 300):
        with pytest.raises(OSError, match=f"`save` cannot write .*{bad}"):
            save(tmp_path / bad, *small)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    save(tmp_path / "new" / "folders" / "model", *small)
    assert_trees_equal(load(tmp_path / "new" / "folders" / "model")[0], small[0])


def test_models_need_no_extra_and_runs_say_which_they_need(path, small, monkeypatch):
    for extra in ("orbax.checkpoint", "safetensors"):
        monkeypatch.setitem(sys.modules, extra, None)  # importing it fails from now on
    save(path, *small)
    assert_same_bits(load(path), small)
    for user, call in {
        "save_run": lambda: jp.checkpoint.save_run(path, 0, [jnp.ones(3)]),
        "restore_run": lambda: jp.checkpoint.restore_run(path, [jnp.ones(3)]),
        "latest_step": lambda: jp.checkpoint.latest_step(path),
    }.items():
        need = rf"`{user}` needs orbax-checkpoint, .* with `pip install 'jaxprune\[checkpoint\]'`"
        with pytest.raises(ImportError, match=need):
            call()
