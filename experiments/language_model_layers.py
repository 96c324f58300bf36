"""Whole layers left out of a llama, and what the layer before can make up for."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from experiments.common import llama, tokens
from experiments.common.llama import Llama, Params
from experiments.common.tokens import Logits, Task

SCORED = 16  # windows that are enough to tell which layers change little
DAMPING = 0.01  # of the mean diagonal of the Gram matrix, as in SparseGPT


def without(task: Task, count: int, *, refit: bool) -> tuple[Logits, Params]:
    """Leave out the layers that change least what goes through them.

    Args:
      task: what is pruned.
      count: layers to leave out.
      refit: let the layer before each gap make up for it.
    """
    blocks = jp.find_blocks(task.logits, task.params, task.batches[0][0][:1])
    change = influence(task)
    masks = jp.make_masks(
        jax.tree.map_with_path(functools.partial(_score, change), task.params),
        count / task.net.layers,
        pattern=jp.patterns.Coupled(blocks),
        scope=jp.scopes.across,
    )
    gone = set(jnp.argsort(change)[:count].tolist())
    params = filled(task, gone) if refit else task.params
    return jax.block_until_ready(jp.shrink(task.logits, params, masks))


def _score(change: jax.Array, path: Any, leaf: jax.Array) -> jax.Array:
    """Give all weights of a layer what it is worth; what lies in no layer goes with none."""
    if path[0].key != "layers":
        return jnp.zeros_like(leaf)
    return jnp.broadcast_to(change.reshape(-1, *[1] * (leaf.ndim - 1)), leaf.shape)


def influence(task: Task) -> jax.Array:
    """Score each layer as ShortGPT does, `[layers]`.

    One minus the cosine between what enters and what leaves it, averaged over tokens.
    """

    @jax.jit
    def mean_change(params: Params, windows: jax.Array) -> jax.Array:
        before, after = llama.streams(params, windows, net=task.net)
        lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(after, axis=-1)
        return jnp.mean(1 - jnp.sum(before * after, axis=-1) / lengths, axis=(1, 2))

    windows = tokens.batches(task.text.calibration[:SCORED], 1)
    return sum(mean_change(task.params, *window) for window in windows) / len(windows)


def filled(task: Task, gone: set[int]) -> Params:
    """Let the layer before each gap bring the stream to where the dense network has it behind.

    What its neurons say is mapped by the least-squares solution instead; the text goes through both
    networks side by side, so that a gap makes up for what the ones before it left, too. A gap at
    the bottom has no layer before it, and stays.
    """
    params, count = task.params, task.net.layers
    step = jax.jit(functools.partial(llama.layer, net=task.net))
    fit = jax.jit(functools.partial(refitted, net=task.net))
    rows = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(count)]
    kept = [i for i in range(count) if i not in gone]
    small = dense = [llama.embed(params, batch) for (batch,) in task.batches]
    down = params["layers"]["mlp"]["down"]["kernel"]
    for i in range(kept[0]):
        dense = [step(rows[i], stream) for stream in dense]
    for here, behind in itertools.pairwise([*kept, count]):
        row = rows[here]
        for i in range(here, behind):
            dense = [step(rows[i], stream) for stream in dense]
        if behind > here + 1:
            row = fit(row, small, dense)
            down = down.at[here].set(row["mlp"]["down"]["kernel"])
        small = [step(row, stream) for stream in small]
    return replaced(params, down)


def refitted(p: Params, streams: list[Any], wanted: list[Any], *, net: Llama) -> Params:
    """Change the last kernel of a layer so that what leaves it comes closest to what is wanted.

    Args:
      p: the layer.
      streams: batches of what enters it, each `[batch, length, width]`.
      wanted: what should leave it, likewise.
      net: its sizes.
    """
    kernel = p["mlp"]["down"]["kernel"]
    gram, cross = jnp.zeros((len(kernel), len(kernel))), jnp.zeros_like(kernel)
    for entering, goal in zip(streams, wanted, strict=True):
        stream = entering + llama.attention(p["attention"], entering, net=net)
        x = llama.neurons(p["mlp"], stream, net=net)
        gram += jnp.einsum("bti,bto->io", x, x)
        cross += jnp.einsum("bti,bto->io", x, goal - stream - x @ kernel)
    gram += DAMPING * jnp.mean(jnp.diag(gram)) * jnp.eye(len(gram))
    more = jax.scipy.linalg.solve(gram, cross, assume_a="pos")
    return {**p, "mlp": {**p["mlp"], "down": {"kernel": kernel + more}}}


def replaced(params: Params, down: jax.Array) -> Params:
    """Put other kernels behind the neurons."""
    mlp = {**params["layers"]["mlp"], "down": {"kernel": down}}
    return {**params, "layers": {**params["layers"], "mlp": mlp}}
