"""Training in a loop of compiled steps, for networks whose size changes on the way."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import jaxprune as jp

Learn = Callable[[Any, Any], tuple[jax.Array, Any]]  # to logits, and statistics that moved
Infer = Callable[[Any, Any], jax.Array]  # to logits
Loss = Callable[[jax.Array, Any], jax.Array]  # of logits and targets; the mean over a batch
Compile = Callable[..., Callable[..., Any]]  # a function for the shapes of its arguments
TESTED_AT_ONCE = 1000


class Batch(NamedTuple):
    """Examples: ``inputs`` of a network, and the class that each of its outputs should give.

    Where another loss than that of the classes is trained on, ``targets`` are what it takes.
    """

    inputs: np.ndarray
    targets: Any


def compiler() -> Compile:
    """Make a jit that compiles programs which read the same only once.

    For jax the small networks of two seeds or methods are different functions even where their
    widths agree, and to compile one takes as long as hundreds of its steps.
    """
    programs: dict[Any, Any] = {}

    def compile_(fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
        # What is not used has to show too: layers that are left out are told apart by nothing else.
        lowered = jax.jit(fn, keep_unused=True).lower(*args)
        key = lowered.as_text(), lowered.in_tree, lowered.out_tree
        if key not in programs:
            programs[key] = lowered.compile()
        return programs[key]

    return compile_


def learning_rates(highest: float, steps: int) -> np.ndarray:
    """Rise over the first tenth of the steps, and fall to 0 as a cosine; float32 `[steps]`."""
    progress = (np.arange(steps) + 0.5) / steps
    rates = highest * np.minimum(1, 10 * progress) * (1 + np.cos(np.pi * progress)) / 2
    return rates.astype(np.float32)


def optimizer(rate: Any, *, held: bool = False) -> optax.GradientTransformationExtraArgs:
    """Adam on clipped gradients, whose learning rate may be traced; if ``held``, under masks."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    return jp.hold(tx) if held else tx


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean loss of classes."""
    return _losses(logits, targets).mean()


def train(
    learn: Learn,
    variables: Any,
    state: Any,
    steps: Iterable[tuple[Batch, np.ndarray]],
    compile_: Compile,
    *,
    loss: Loss = cross_entropy,
    held: bool = False,
) -> tuple[Any, Any]:
    """Take a step for each batch and learning rate.

    A convolution in a loop of XLA is slow on a CPU, so the loop is one of Python.

    Args:
      learn: the network as in training.
      variables: ``params``, and the statistics that ``learn`` moves.
      state: of the optimizer.
      steps: batches of one size, and their learning rates.
      compile_: what ``compiler`` made.
      loss: of logits and targets.
      held: whether the optimizer holds masks.

    Returns:
      Variables and state after the last step.
    """
    take = None
    for batch, rate in steps:
        if take is None:
            step = functools.partial(_step, learn, loss=loss, held=held)
            take = compile_(step, variables, state, batch, rate)
        variables, state = take(variables, state, batch, rate)
    return variables, state


def mean_gradient(learn: Learn, variables: Any, batches: Iterable[Batch], compile_: Compile) -> Any:
    """Average the gradient of the loss over batches of one size."""
    take, grads = None, []
    for batch in batches:
        take = take or compile_(functools.partial(_gradient, learn), variables, batch)
        grads.append(take(variables, batch)[0])
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *grads)


def evaluate(infer: Infer, variables: Any, test: Batch, compile_: Compile) -> dict[str, float]:
    """Tell the share of targets that are the most likely class, from a count, and the mean loss."""
    parts = -(-len(test.targets) // TESTED_AT_ONCE)
    batches = list(map(Batch, *(np.array_split(array, parts) for array in test)))
    ask = functools.partial(_test, infer)
    # Parts of one size, and maybe some that are smaller by one.
    asks = {len(b.targets): compile_(ask, variables, b) for b in (batches[0], batches[-1])}
    answers = [asks[len(b.targets)](variables, b) for b in batches]
    hits, losses = (sum(map(float, each)) for each in zip(*answers, strict=True))
    return {"accuracy": hits / test.targets.size, "loss": losses / test.targets.size}


def predict(infer: Infer, variables: Any, inputs: np.ndarray, compile_: Compile) -> np.ndarray:
    """Give the logits of all inputs, `[n, classes]`."""
    parts = np.array_split(inputs, -(-len(inputs) // TESTED_AT_ONCE))
    asks = {len(part): compile_(infer, variables, part) for part in (parts[0], parts[-1])}
    return np.concatenate([asks[len(part)](variables, part) for part in parts])


def _step(
    learn: Learn,
    variables: Any,
    state: Any,
    batch: Batch,
    rate: jax.Array,
    *,
    loss: Loss,
    held: bool,
) -> tuple[Any, Any]:
    grads, moved = _gradient(learn, variables, batch, loss=loss)
    updates, state = optimizer(rate, held=held).update(grads, state, variables["params"])
    params = optax.apply_updates(variables["params"], updates)
    return {**variables, **moved, "params": params}, state


def _gradient(
    learn: Learn, variables: Any, batch: Batch, *, loss: Loss = cross_entropy
) -> tuple[Any, Any]:
    def of_params(params: Any) -> tuple[jax.Array, Any]:
        logits, moved = learn({**variables, "params": params}, batch.inputs)
        return loss(logits, batch.targets), moved

    return jax.grad(of_params, has_aux=True)(variables["params"])


def _test(infer: Infer, variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits = infer(variables, batch.inputs)
    return (logits.argmax(-1) == batch.targets).sum(), _losses(logits, batch.targets).sum()


def _losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
