"""Ways to prune a llama: single weights, neurons, whole layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments import language_model_layers as layers
from experiments.common import llama, tokens
from experiments.common.llama import Params
from experiments.common.tokens import Logits, Task

SCORED = 8  # windows that the gradient of Taylor scores is averaged over
NEURONS = ("taylor", "admm")
BLOCKS = ("influence", "influence_refit")


def prune(task: Task, part: str, method: str, amount: str) -> tuple[Logits, Params]:
    """Remove an amount of a part by a method; give what computes the logits, and its params."""
    if part == "weights":
        params = (
            by_magnitude(task, amount)
            if method == "magnitude"
            else in_one_pass(task, method, amount)
        )
        return task.logits, jax.block_until_ready(params)
    if part == "neurons":
        return without_neurons(task, method, float(amount))
    if part == "blocks":
        return layers.without(task, int(amount), refit=method.endswith("_refit"))
    return task.logits, task.params


def by_magnitude(task: Task, amount: str) -> Params:
    """Remove the smallest weights of each kernel in each layer."""
    sparsity, scope = tokens.amount(amount)
    masks = jp.find_masks(
        task.params,
        sparsity,
        scope=scope or jp.scopes.per_leaf,
        layout=jp.find_layout(task.logits, task.params, task.batches[0][0]),
    )
    return jp.apply_masks(task.params, masks)


def in_one_pass(task: Task, method: str, amount: str) -> Params:
    """Prune by what reaches the weights; the head is the embedding, which stays as it is."""
    sparsity, scope = tokens.amount(amount)
    name, _, dense = method.partition("_")
    params, _ = jp.prune_trained(
        functools.partial(llama.hidden, net=task.net),
        task.params,
        task.batches,
        sparsity,
        method=getattr(jp.methods, name),
        scope=scope,
        targets="dense" if dense else "pruned",
    )
    return params


def without_neurons(task: Task, method: str, sparsity: float) -> tuple[Logits, Params]:
    """Cut a fraction of the neurons out of the feed-forward branch of every layer.

    By Taylor scores those go that change the loss least, to first order. By another method those go
    that the kernel behind them can do without, which makes up for them with what is left.
    """
    params, inputs = task.params, task.batches[0][0][:1]
    groups = jp.find_groups(task.logits, params, inputs)
    neurons = [g for g in groups if g.name.startswith("layers/mlp/")]
    pattern = jp.patterns.Coupled(neurons, reduce="mean" if method == "taylor" else "norm")
    if method == "taylor":
        masks = jp.find_masks(
            params,
            sparsity,
            criterion=jp.criteria.taylor,
            grads=mean_gradient(task),
            pattern=pattern,
            layout=jp.find_layout(task.logits, params, inputs),
        )
    else:
        params, masks = jp.prune_trained(
            functools.partial(llama.hidden, net=task.net),
            params,
            task.batches,
            sparsity,
            method=getattr(jp.methods, method),
            pattern=pattern,
        )
    return jax.block_until_ready(jp.shrink(task.logits, params, masks))


def mean_gradient(task: Task) -> Params:
    """Average the gradient of the loss over some windows."""

    @jax.jit
    def gradient(params: Params, window: jax.Array) -> Params:
        def loss(params: Params) -> jax.Array:
            return jnp.mean(llama.losses(task.logits(params, window[:, :-1]), window[:, 1:]))

        return jax.grad(loss)(params)

    windows = tokens.batches(task.text.calibration[:SCORED], 1)
    total = jax.tree.map(jnp.zeros_like, task.params)
    for (window,) in windows:
        total = jax.tree.map(jnp.add, total, gradient(task.params, window))
    return jax.tree.map(lambda g: g / len(windows), total)


def left_of(params: Params, dense: Params) -> float:
    """Give how many weights of the kernels of all layers are left, relative to the dense ones."""
    left, whole = (
        [w for w in jax.tree.leaves(p["layers"]) if w.ndim == 3] for p in (params, dense)
    )
    return float(sum(map(np.count_nonzero, left)) / sum(w.size for w in whole))
