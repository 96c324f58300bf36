"""Data sets as arrays: standardised, flattened, split the same way every time."""

import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MNIST_URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
MNIST_SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
SYMBOLS = 97  # the printable characters of ASCII, the end of a line, and one for all others


class Examples(NamedTuple):
    """What a network is given, and the class that each of its outputs should be.

    Images are float32 `[n, pixels]`, their classes int32 `[n]`. Where another loss than that of the
    classes is trained on, ``targets`` are what it takes.
    """

    inputs: np.ndarray
    targets: Any


class Dataset(NamedTuple):
    """What to fit, what to choose by, and what to report."""

    train: Examples
    validation: Examples
    test: Examples


class Text(NamedTuple):
    """Characters in their order, as codes below ``SYMBOLS``, each int32 `[n]`."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load(name: str, path: Path | None = None) -> Dataset:
    """Load the images of a data set, digits or mnist."""
    return load_mnist(path) if name == "mnist" else load_digits()


def load_digits() -> Dataset:
    """Load scikit-learn's 1,797 digits of 8x8 pixels; they come with it, nothing is downloaded.

    A fixed stratified split: 1,077 to train, 180 to validate, 540 to test. Pixels are standardised
    with the mean and standard deviation of the training part.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    images, labels = load(return_X_y=True)
    rest, test, rest_labels, test_labels = train_test_split(
        images, labels, test_size=540, stratify=labels, random_state=0
    )
    train, validation, train_labels, validation_labels = train_test_split(
        rest, rest_labels, test_size=180, stratify=rest_labels, random_state=0
    )
    mean, std = train.mean(), train.std()
    return Dataset(
        train=_examples((train - mean) / std, train_labels),
        validation=_examples((validation - mean) / std, validation_labels),
        test=_examples((test - mean) / std, test_labels),
    )


def load_mnist(path: Path | None = None) -> Dataset:
    """Load MNIST in the layout of keras: ``x_train``, ``y_train``, ``x_test``, ``y_test``.

    The last twelfth of the training images validates: 55,000 and 5,000 of the full set. Any file of
    this layout will do, a few hundred images for a test too.

    Args:
      path: the ``.npz``. ``None`` downloads it once, checks its sha256, and keeps it in the cache.

    Raises:
      FileNotFoundError: there is no such file.
      ConnectionError: the file cannot be downloaded.
      ValueError: the file is damaged, or its arrays are of another layout.
    """
    arrays = _read_npz(_download_mnist() if path is None else Path(path))
    images = {part: _standardise(arrays[f"x_{part}"]) for part in ("train", "test")}
    held_out = max(1, len(images["train"]) // 12)
    return Dataset(
        train=_examples(images["train"][:-held_out], arrays["y_train"][:-held_out]),
        validation=_examples(images["train"][-held_out:], arrays["y_train"][-held_out:]),
        test=_examples(images["test"], arrays["y_test"]),
    )


def load_text() -> Text:
    """Load the help on Python's language that comes with Python itself; about 450,000 characters.

    The first eight tenths train, the next one validates, the last one tests. The text, and with it
    what is measured on it, differs a little from one version of Python to the next.
    """
    codes = encode(python_help())
    return Text(*np.split(codes, [8 * len(codes) // 10, 9 * len(codes) // 10]))


def python_help() -> str:
    """Give the help on Python's language that comes with Python itself."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> np.ndarray:
    """Turn characters into codes below ``SYMBOLS``, int32 `[n]`."""
    points = np.frombuffer(text.encode("utf-32-le"), "<i4")
    printable = (points >= ord(" ")) & (points <= ord("~"))
    others = np.where(points == ord("\n"), SYMBOLS - 2, SYMBOLS - 1)
    return np.where(printable, points - ord(" "), others).astype(np.int32)


def _download_mnist() -> Path:
    import pooch

    cache = pooch.os_cache("jaxprune")
    try:
        return Path(pooch.retrieve(MNIST_URL, known_hash=f"sha256:{MNIST_SHA256}", path=cache))
    except OSError as error:
        raise ConnectionError(
            f"MNIST cannot be downloaded from {MNIST_URL}: {error}. Fetch it by other means and "
            f"name it with `data_path`."
        ) from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the four arrays of MNIST and check that they are what they are called."""
    names = ("x_train", "y_train", "x_test", "y_test")
    if not path.is_file():
        raise FileNotFoundError(
            f"No data at `data_path={str(path)!r}`. It must name MNIST as one .npz with the arrays "
            f"{', '.join(names)}. Leave it out to download the file."
        )
    try:
        with open(path, "rb") as file, np.load(file) as archive:
            arrays = {name: archive[name] for name in names if name in archive}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"`data_path={str(path)!r}` cannot be read as an .npz ({error}). It is damaged, cut "
            f"short or another kind of file. Fetch it again, or leave it out to download it."
        ) from error
    problems = [problem for name in names for problem in _problems(name, arrays)]
    if problems:
        raise ValueError(
            f"`data_path={str(path)!r}` is not MNIST as keras lays it out: {'; '.join(problems)}. "
            f"Wanted x_train and x_test as uint8 [n, 28, 28], y_train and y_test as integers [n] "
            f"from 0 to 9. Convert the file, or leave `data_path` out to download it."
        )
    return arrays


def _problems(name: str, arrays: dict[str, np.ndarray]) -> list[str]:
    """Say what is wrong with one array of the file."""
    if name not in arrays:
        return [f"{name} is missing"]
    array = arrays[name]
    found = f"{name} is {array.dtype} {list(array.shape)}"
    if name.startswith("x"):
        fits = array.dtype == np.uint8 and array.ndim == 3 and array.shape[1:] == (28, 28)
        return [] if fits and len(array) >= 2 else [found]
    images = arrays.get(name.replace("y", "x"))
    if array.dtype.kind not in "iu" or array.ndim != 1:
        return [found]
    if images is not None and len(images) != len(array):
        return [f"{found}, for {len(images)} images"]
    if len(array) and not (array.min() >= 0 and array.max() <= 9):
        return [f"{name} holds labels from {array.min()} to {array.max()}"]
    return []


def _standardise(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) / 255.0 - MNIST_MEAN) / MNIST_STD


def _examples(images: np.ndarray, labels: np.ndarray) -> Examples:
    return Examples(images.reshape(len(images), -1).astype(np.float32), labels.astype(np.int32))
