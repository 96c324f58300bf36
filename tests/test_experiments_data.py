"""Tests of experiments/common/data.py and models.py."""

import jax
import numpy as np
import pytest

from experiments.common import data
from experiments.common.models import MLP


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (120, 28, 28), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 120, dtype=np.uint8),
        "x_test": rng.integers(0, 256, (20, 28, 28), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 20, dtype=np.uint8),
    }


def test_digits_are_split_without_overlap_and_the_same_way_every_time():
    once, again = data.load_digits(), data.load_digits()
    assert [len(split.targets) for split in once] == [1077, 180, 540]
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = np.concatenate([split.inputs for split in once])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_digits_are_standardised_by_the_training_part_and_stratified():
    digits = data.load_digits()
    assert digits.train.inputs.dtype == np.float32 and digits.train.targets.dtype == np.int32
    assert abs(digits.train.inputs.mean()) < 1e-5
    assert abs(digits.train.inputs.std() - 1) < 1e-5
    assert np.bincount(digits.validation.targets).min() >= 17


def test_mnist_is_standardised_and_its_last_twelfth_validates(tmp_path, arrays):
    np.savez(tmp_path / "mnist.npz", **arrays)
    mnist = data.load_mnist(tmp_path / "mnist.npz")
    assert [split.inputs.shape for split in mnist] == [(110, 784), (10, 784), (20, 784)]
    expected = (arrays["x_train"][-1].reshape(-1) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(mnist.validation.inputs[-1], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mnist.validation.targets, arrays["y_train"][-10:])
    np.testing.assert_array_equal(mnist.test.targets, arrays["y_test"])


def test_mnist_is_downloaded_by_its_checksum(tmp_path, monkeypatch, arrays):
    asked = {}

    def retrieve(url, *, known_hash, path):
        asked.update(url=url, known_hash=known_hash)
        np.savez(tmp_path / "mnist.npz", **arrays)
        return str(tmp_path / "mnist.npz")

    monkeypatch.setattr("pooch.retrieve", retrieve)
    assert len(data.load_mnist().test.targets) == 20
    assert asked["url"].endswith("/mnist.npz") and asked["known_hash"].startswith("sha256:731c5ac6")


def test_a_download_that_fails_asks_for_the_data_path(monkeypatch):
    def retrieve(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("pooch.retrieve", retrieve)
    with pytest.raises(ConnectionError, match=r"no route to host.*data_path"):
        data.load_mnist()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No data at .*nowhere\.npz.*Leave it out"):
        data.load_mnist(tmp_path / "nowhere.npz")


@pytest.mark.parametrize("kept", [0, 10, 1000, -1, -30])
def test_a_file_that_was_cut_short_is_refused(tmp_path, arrays, kept):
    path = tmp_path / "mnist.npz"
    np.savez(path, **arrays)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"mnist\.npz.*cannot be read.*cut short"):
        data.load_mnist(path)


def test_a_file_that_is_damaged_inside_is_refused(tmp_path, arrays):
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **arrays)
    content = bytearray(path.read_bytes())
    content[5000:5100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mnist\.npz.*cannot be read.*damaged"):
        data.load_mnist(path)


@pytest.mark.parametrize("content", [b"no zip at all", b"\x93NUMPY\x01\x00"])
def test_another_kind_of_file_is_refused(tmp_path, content):
    path = tmp_path / "mnist.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        data.load_mnist(path)


def test_a_single_array_is_refused(tmp_path, arrays):
    np.save(tmp_path / "x.npy", arrays["x_train"])
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        data.load_mnist(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y_test": None}, "y_test is missing"),
        ({"x_train": np.zeros((120, 784), np.uint8)}, r"x_train is uint8 \[120, 784\]"),
        ({"x_test": np.zeros((20, 28, 28), np.float32)}, r"x_test is float32 \[20, 28, 28\]"),
        ({"y_train": np.zeros(119, np.uint8)}, r"y_train is uint8 \[119\], for 120 images"),
        ({"y_test": np.zeros((20, 10), np.uint8)}, r"y_test is uint8 \[20, 10\]"),
        ({"y_test": np.full(20, 10)}, "y_test holds labels from 10 to 10"),
    ],
)
def test_another_layout_is_refused_by_the_array(tmp_path, arrays, changes, words):
    changed = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(tmp_path / "mnist.npz", **changed)
    with pytest.raises(ValueError, match=f"{words}.*Wanted x_train"):
        data.load_mnist(tmp_path / "mnist.npz")


def test_all_wrong_arrays_are_named_together(tmp_path):
    np.savez(tmp_path / "mnist.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="x_train is missing; y_train is missing; x_test is"):
        data.load_mnist(tmp_path / "mnist.npz")


def test_lenet_has_266200_weights_with_gaussian_glorot_spread(key):
    params = MLP((300, 100), 10).init(key, np.zeros((1, 784), np.float32))["params"]
    kernels = {name: np.asarray(layer["kernel"]) for name, layer in params.items()}
    assert list(kernels) == ["hidden_0", "hidden_1", "out"]
    assert sum(kernel.size for kernel in kernels.values()) == 266_200
    for kernel in kernels.values():
        std = np.sqrt(2 / sum(kernel.shape))
        assert abs(kernel.std() / std - 1) < 0.05
        assert np.abs(kernel).max() > np.sqrt(3) * std  # where a uniform draw would end
    assert all(not layer["bias"].any() for layer in params.values())
