"""Networks wide enough for blocks, what they are trained on, and which of their weights may go."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxprune as jp
from experiments.common import data, llama
from experiments.common.data import Examples
from experiments.common.llama import Llama
from experiments.common.models import MLP

CONTEXT = 64  # characters that the transformer sees
TEST_WINDOWS = 128


class Training(NamedTuple):
    """Steps of the dense network, steps after that, examples of a step, highest rate of Adam."""

    steps: int
    prune_steps: int
    batch_size: int
    learning_rate: float


TRAININGS = {
    "digits": Training(100, 100, 64, 1e-3),
    "mnist": Training(800, 800, 64, 1e-3),
    "text": Training(200, 60, 4, 1e-3),
}
WIDTHS = {"mlp": 1024, "transformer": 512}


class Task(NamedTuple):
    """A network, and what it is trained and tested on.

    Attributes:
      fn: from params and inputs to logits.
      start: from a key to params.
      prunable: a regex over the paths of the weights that blocks and single weights are taken from.
      shapes: words for the inputs of a file, whose sizes it leaves open.
      take: gives the training examples of some indices.
      examples: how many there are.
      test: what is reported.
      rows: from a number of rows that its products have to inputs.
    """

    fn: Callable[[Any, Any], jax.Array]
    start: Callable[[jax.Array], Any]
    prunable: str
    shapes: str
    take: Callable[[np.ndarray], Examples]
    examples: int
    test: Examples
    rows: Callable[[int], np.ndarray]

    @property
    def layout(self) -> jp.Layout:
        """What each axis of each weight means."""
        return jp.find_layout(self.fn, self.shapes_of_params, self.test.inputs[:1])

    @property
    def shapes_of_params(self) -> Any:
        """Shapes in place of params."""
        return jax.eval_shape(self.start, jax.random.key(0))

    def pruned(self, params: Any) -> list[Any]:
        """Pick the weights that are pruned, each `[..., inputs, outputs]`."""
        chosen = jp.by_path(self.prunable)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        named = [("/".join(key.key for key in path), leaf) for path, leaf in leaves]
        return [leaf for path, leaf in named if chosen(path, leaf)]


def load(model: str, dataset: str, path: Path | None, width: int) -> Task:
    """Load what a network of a width is trained and tested on."""
    return _mlp(dataset, path, width) if model == "mlp" else _transformer(width)


def _mlp(dataset: str, path: Path | None, width: int) -> Task:
    """Three hidden layers; the first, which reads pixels, and the last stay whole."""
    images = data.load(dataset, path)
    net = MLP((width, width, width), 10)
    first = images.test.inputs[:1]
    return Task(
        functools.partial(_apply, net),
        jax.jit(lambda key: net.init(key, first)["params"]),
        "hidden_[12]/kernel",
        "batch, _",
        functools.partial(_pick, images.train),
        len(images.train.targets),
        images.test,
        lambda rows: np.resize(images.test.inputs, (rows, first.shape[1])),
    )


def _apply(net: MLP, params: Any, images: Any) -> jax.Array:
    return net.apply({"params": params}, images)


def _pick(examples: Examples, indices: np.ndarray) -> Examples:
    return jax.tree.map(lambda array: array[indices], examples)


def _transformer(width: int) -> Task:
    """Two layers in one array; embedding and norms stay whole."""
    text = data.load_text()
    net = Llama(data.SYMBOLS, width, layers=2, heads=8, kv_heads=8, inner=width)
    last = len(text.test) - CONTEXT - 1
    test = windows(text.test, np.linspace(0, last, TEST_WINDOWS).astype(int))

    def rows(count: int) -> np.ndarray:
        length = min(count, CONTEXT)
        return test.inputs[: count // length, :length]

    return Task(
        functools.partial(llama.logits, net=net),
        functools.partial(llama.init, net=net),
        "layers/.*/kernel",
        "batch, time",
        functools.partial(windows, text.train),
        len(text.train) - CONTEXT,
        test,
        rows,
    )


def windows(codes: np.ndarray, starts: np.ndarray) -> Examples:
    """Give windows of a text, and beside each character the one that comes after it."""
    cut = codes[starts[:, None] + np.arange(CONTEXT + 1)]
    return Examples(cut[:, :-1], cut[:, 1:])
