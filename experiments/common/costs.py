"""What training costs and what a pruned network weighs, counted from its masks."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict


def training_flops(
    kept: np.ndarray,
    *,
    sizes: np.ndarray,
    positions: np.ndarray,
    dense_gradients: np.ndarray,
    batch_size: int,
) -> int:
    """Count what a training run would cost on a device that skips every zero.

    A weight that is kept costs a multiplication and an addition, 2 FLOPs, at each position of its
    layer's output (a dense layer has one), for each example:

    - forward: 2 FLOPs for each kept weight and position;
    - backward: the same for the gradient of the layer's input and again for the gradient of its
      weights, together twice the forward pass;
    - but where a method needs the gradient of removed weights too, that last part is dense: RigL
      when it grows weights, straight-through at every step.

    Which weights are kept is read off the masks of every step, so schedules need no formula.
    Biases, activations, the optimizer, the search for masks and the scores of pruning at
    initialisation (a dozen steps' worth at most) are left out.

    Args:
      kept: weights that each layer keeps at each step, `[steps, layers]`.
      sizes: weights of each layer, `[layers]`.
      positions: positions at which each layer applies its weights, `[layers]`.
      dense_gradients: whether a step needs the gradient of all weights, bool `[steps]`.
      batch_size: examples of a step.
    """
    kept = np.asarray(kept, np.int64)
    gradients = np.where(dense_gradients[:, None], sizes, kept)
    return int(2 * batch_size * ((2 * kept + gradients) * positions).sum())


def inference_flops(kept: np.ndarray, *, positions: np.ndarray) -> int:
    """Count a forward pass of one example over ``kept`` weights a layer, `[layers]`."""
    return int(2 * (np.asarray(kept, np.int64) * positions).sum())


def model_bytes(kept: np.ndarray, *, sizes: np.ndarray, others: int) -> int:
    """Count the bytes of a stored float32 model.

    It stores the values that it keeps, one bit for each prunable weight that says where they are,
    and everything that is not prunable as it is. A dense model needs no bits.

    Args:
      kept: weights that each layer keeps, `[layers]`.
      sizes: weights of each layer, `[layers]`.
      others: number of parameters that are not prunable.
    """
    where = sum(-(-int(n) // 8) for n in sizes) if np.any(kept < sizes) else 0
    return 4 * (int(np.sum(kept)) + others) + where


def output_positions(model: nn.Module, params: Any, images: jax.Array) -> dict[str, int]:
    """Count the positions at which each layer applies its kernel, by the kernel's path."""
    _, seen = jax.eval_shape(
        lambda params: model.apply({"params": params}, images[:1], capture_intermediates=True),
        params,
    )
    outputs = flatten_dict(seen["intermediates"], sep="/")
    return {
        path: math.prod(outputs[path.removesuffix("kernel") + "__call__"][0].shape[1:-1])
        for path in flatten_dict(params, sep="/")
        if path.endswith("/kernel")
    }
