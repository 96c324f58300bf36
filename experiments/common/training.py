"""The one training loop: a whole run is one compiled scan."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxprune as jp
from experiments.common import parallel
from experiments.common.data import Split

Params = Any
Masks = Any


class Outcome(NamedTuple):
    """What a training run leaves behind, all of it still on the device.

    Attributes:
      final: parameters after the last step.
      best: parameters at the evaluation with the lowest validation loss.
      early: parameters at the evaluation nearest to one sixth of the run.
      losses: validation loss at each evaluation.
      accuracies: validation accuracy at each evaluation.
    """

    final: Params
    best: Params
    early: Params
    losses: jax.Array
    accuracies: jax.Array


def early_evaluation(evaluations: int) -> int:
    """Index of the evaluation nearest to one sixth of a run."""
    return max(1, round(evaluations / 6)) - 1


@functools.partial(jax.jit, static_argnames=("examples", "steps", "batch_size"))
def batch_order(key: jax.Array, *, examples: int, steps: int, batch_size: int) -> jax.Array:
    """Choose the examples of every batch: one permutation of them all after another.

    Returns:
      Indices `[steps, batch_size]`. A longer order begins with the shorter one.
    """
    epochs = -(-steps * batch_size // examples)
    keys = jax.vmap(lambda epoch: jax.random.fold_in(key, epoch))(jnp.arange(epochs))
    order = jax.vmap(lambda key: jax.random.permutation(key, examples))(keys)
    return order.reshape(-1)[: steps * batch_size].reshape(steps, batch_size)


@functools.partial(jax.jit, static_argnames=("model", "learning_rate"))
def train(
    params: Params,
    masks: Masks,
    order: jax.Array,
    data: Split,
    validation: Split,
    *,
    model: nn.Module,
    learning_rate: float,
) -> Outcome:
    """Train with Adam under fixed masks and look at the validation set now and then.

    Everything that differs between levels, seeds and conditions is an argument, so they all share
    one compiled program. Nothing is donated: ``params`` may be the weights to rewind to.

    Args:
      params: where to start from.
      masks: weights to keep; the others are zero from the first update on.
      order: examples of each batch, `[evaluations, steps between them, batch size]`.
      data: what to fit.
      validation: what is looked at after each ``order[i]``.
      model: linen module that gives logits.
      learning_rate: of Adam.
    """
    tx = jp.hold(optax.adam(learning_rate))
    early = early_evaluation(len(order))

    def loss(params: Params, batch: Split) -> tuple[jax.Array, jax.Array]:
        logits = model.apply({"params": params}, batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses.mean(), (logits.argmax(-1) == batch.labels).mean()

    def step(carry: tuple[Params, Any], batch: jax.Array) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        examples = Split(images=data.images[batch], labels=data.labels[batch])
        grads, _ = jax.grad(loss, has_aux=True)(params, examples)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def stretch(carry: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        params, state, best, lowest, at_early = carry
        index, batches = inputs
        (params, state), _ = jax.lax.scan(step, (params, state), batches)
        now, accuracy = loss(params, validation)
        best = _choose(now < lowest, params, best)
        at_early = _choose(index == early, params, at_early)
        return (params, state, best, jnp.minimum(now, lowest), at_early), (now, accuracy)

    state = jp.with_masks(tx.init(params), masks)
    carry, (losses, accuracies) = jax.lax.scan(
        stretch,
        (params, state, params, jnp.array(jnp.inf), params),
        (jnp.arange(len(order)), order),
    )
    final, _, best, _, at_early = carry
    return Outcome(final=final, best=best, early=at_early, losses=losses, accuracies=accuracies)


@functools.partial(jax.jit, static_argnames=("model", "learning_rate"))
def train_together(starts: Any, data: Split, validation: Split, **settings: Any) -> Outcome:
    """Train seeds side by side: params, masks and orders, and the outcome, have a leading axis."""

    def one(start: Any, data: Split, validation: Split) -> Outcome:
        return train(*start, data, validation, **settings)

    return parallel.side_by_side(one, starts, data, validation)


def train_seeds(
    starts: Sequence[tuple[Params, Masks, jax.Array]], *, together: bool, **settings: Any
) -> list[Outcome]:
    """Train seeds in one program, or one after another.

    Args:
      starts: params, masks and order of each seed.
      together: whether in one program.
      settings: what :func:`train` asks for beside these.
    """
    if together:
        return parallel.unstack(train_together(parallel.stack(starts), **settings))
    return [train(*start, **settings) for start in starts]


def accuracy(params: Params, examples: Split, *, model: nn.Module) -> float:
    """Fraction of ``examples`` that the network gets right, from an exact count."""
    return int(_hits(params, examples, model=model)) / len(examples.labels)


@functools.partial(jax.jit, static_argnames="model")
def _hits(params: Params, examples: Split, *, model: nn.Module) -> jax.Array:
    return (model.apply({"params": params}, examples.images).argmax(-1) == examples.labels).sum()


def _choose(condition: jax.Array, new: Params, old: Params) -> Params:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
