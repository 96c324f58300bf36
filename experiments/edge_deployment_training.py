"""Networks on their way: trained on a lesson, pruned while they are, and cut."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import jaxprune as jp
from experiments.common import data, small_networks, train
from experiments.common.small_networks import Network

LEARNING_RATE = 3e-3  # of Adam at its highest, in both parts of a training
SCORED_BATCHES = 8  # that the gradient of the criterion is averaged over


class Bench(NamedTuple):
    """What all trainings have in common.

    Attributes:
      model: linen module that gives logits.
      dense: the network, with shapes in place of variables.
      data: what to fit, what to choose by, and what to report.
      channels: groups of coupled channels of the model.
      branches: its residual branches, of those around an identity.
      compile_: what ``train.compiler`` made.
    """

    model: nn.Module
    dense: Network
    data: data.Dataset
    channels: jp.Groups
    branches: jp.Groups
    compile_: train.Compile

    def take(self, indices: np.ndarray) -> data.Examples:
        """Give the training examples of some indices."""
        return jax.tree.map(lambda array: array[indices], self.data.train)

    def draw(self, key: jax.Array) -> Network:
        """Draw the variables of the dense network."""
        images = self.data.test.inputs[:1]
        return self.dense._replace(
            variables=self.compile_(self.model.init, key, images)(key, images)
        )


class Lesson(NamedTuple):
    """What a network learns from: batches of given examples, and the loss of its logits on them."""

    take: Callable[[np.ndarray], data.Examples]
    loss: train.Loss


def by_labels(bench: Bench) -> Lesson:
    """Learn from the labels alone."""
    return Lesson(bench.take, train.cross_entropy)


def fit(bench: Bench, lesson: Lesson, network: Network, order: np.ndarray) -> Network:
    """Train from a fresh state of the optimizer."""
    state = train.clipped_adam(0.0).init(network.variables["params"])
    return go_on(bench, lesson, network, state, paced(order))[0]


def paced(order: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Give each batch of an order, `[steps, batch size]`, its learning rate."""
    return list(zip(order, train.learning_rates(LEARNING_RATE, len(order)), strict=True))


def go_on(
    bench: Bench, lesson: Lesson, network: Network, state: Any, pairs: list[Any], **held: bool
) -> tuple[Network, Any]:
    """Go on with the training over batches and learning rates; if ``held``, under masks."""
    variables, state = train.loop(
        lambda rate: train.Recipe(network.learn, train.clipped_adam(rate, **held), lesson.loss),
        network.variables,
        state,
        ((lesson.take(indices), rate) for indices, rate in pairs),
        bench.compile_,
    )
    return network._replace(variables=variables), state


def rescale(small: Any, whole: Any) -> Any:
    """Make kernels that are part of fresh ones what flax would have drawn at their size.

    There the variance is 1 over the number of inputs (LeCun), and inputs are fewer now.
    """

    def scale(path: Any, part: jax.Array, kernel: jax.Array) -> jax.Array:
        if path[-1].key != "kernel" or not part.size:
            return part
        return part * math.sqrt(math.prod(kernel.shape[:-1]) / math.prod(part.shape[:-1]))

    return jax.tree.map_with_path(scale, small, whole)


class Removal(NamedTuple):
    """From which step on which fraction of the ``channels`` or ``branches`` is gone."""

    step: int
    kind: str
    sparsity: float


def removals_of(
    method: str, channels: float, blocks: float, rounds: int, steps: int
) -> list[Removal]:
    """List what is removed when: channels, then branches; all at once, or over a quarter."""
    rounds, last = (rounds, steps // 4) if method == "iterative" else (1, 0)
    removals = [("channels", 1 - (1 - channels) ** (n / rounds)) for n in range(1, rounds + 1)]
    removals += [("branches", blocks)] if blocks else []
    starts = np.linspace(0, last, len(removals)).astype(int).tolist()
    return [Removal(step, *removal) for step, removal in zip(starts, removals, strict=True)]


def prune(
    bench: Bench, lesson: Lesson, trained: Network, order: np.ndarray, removals: list[Removal]
) -> Network:
    """Go on with the training of the dense network, and remove parts of it on the way.

    Until the last removal masks are held on the whole network, whose program is there already.
    Then what they remove is cut out of the network and of the optimizer's state, and the small
    network goes on. What is removed is chosen by the loss on the labels, whoever teaches.

    Args:
      bench: what all trainings have in common.
      lesson: what to learn from.
      trained: the dense network.
      order: examples of each batch, `[steps, batch size]`.
      removals: in their order; the first is at step 0.
    """
    pairs, network, masks = paced(order), trained, {}
    tx, held = train.clipped_adam(0.0), train.clipped_adam(0.0, held=True)
    state = held.init(network.variables["params"])
    for now, following in itertools.zip_longest(removals, removals[1:]):
        batches = map(bench.take, order[now.step : now.step + SCORED_BATCHES])
        grads = train.mean_gradient(network.learn, network.variables, batches, bench.compile_)
        masks[now.kind] = find(bench, now, network.variables, grads, within=masks.get(now.kind))
        together = jp.combine_masks(*masks.values())
        network = network.masked(together["params"])
        state = jp.with_masks(state, together["params"])
        if following:
            part = pairs[now.step : following.step]
            network, state = go_on(bench, lesson, network, state, part, held=True)
    params = network.variables["params"]
    state = jp.shrink_state(tx, state.inner_state, params, together["params"])
    network = small_networks.cut_down(network, jp.cut_list(network.variables, together))
    return go_on(bench, lesson, network, state, pairs[now.step :])[0]


def find(bench: Bench, removal: Removal, variables: Any, grads: Any, *, within: Any) -> Any:
    """Find masks of all variables that remove a fraction of the channels or of the branches.

    Every group loses the same share of its channels; branches compete with each other.
    """
    channels = removal.kind == "channels"
    groups = bench.channels if channels else bench.branches
    masks = jp.find_masks(
        variables["params"],
        removal.sparsity,
        criterion=jp.criteria.taylor,
        pattern=jp.patterns.Coupled(groups.at("params"), normalize=channels),
        scope=jp.scopes.per_leaf if channels else jp.scopes.across,
        within=within and within["params"],
        grads=grads,
    )
    return groups.complete({"params": masks}, variables)
