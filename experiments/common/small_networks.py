"""Networks out of which parts are cut, and their files; for `structured` and `edge_deployment`."""

from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import jaxprune as jp
from experiments.common import runner
from experiments.common.train import Infer, Learn, Variables

Cut = dict[str, dict[int, Any]]  # path: axis: indices that stay


class Network(NamedTuple):
    """A network in its size.

    Attributes:
      learn: gives logits as in training, and the running statistics that move.
      infer: gives logits.
      variables: params, and running statistics.
      cut: what is left of the dense variables; empty if that is all.
    """

    learn: Learn
    infer: Infer
    variables: Variables
    cut: Cut

    def masked(self, masks: Any) -> "Network":
        """Set to zero what masks of the params remove."""
        params = jp.apply_masks(self.variables["params"], masks)
        return self._replace(variables={**self.variables, "params": params})


def whole(model: nn.Module, variables: Variables) -> Network:
    """Make a network of a module, of which nothing is cut; shapes may stand for its variables."""

    def learn(variables: Variables, inputs: Any) -> tuple[jax.Array, Variables]:
        return model.apply(variables, inputs, train=True, mutable=["batch_stats"])

    def infer(variables: Variables, inputs: Any) -> jax.Array:
        return model.apply(variables, inputs)

    return Network(learn, infer, variables, {})


def cut_down(dense: Network, cut: Cut) -> Network:
    """Cut a network to what stays of it."""
    learn, _ = jp.shrink(dense.learn, dense.variables, cut=cut)
    infer, variables = jp.shrink(dense.infer, dense.variables, cut=cut)
    return Network(learn, infer, variables, cut)


def save(path: Path, network: Network) -> None:
    """Save the variables of a network, and which indices of the dense ones they are."""
    cut = {
        name: {axis: np.asarray(indices, np.int32) for axis, indices in axes.items()}
        for name, axes in network.cut.items()
    }
    runner.save(path, {"variables": network.variables, "cut": cut})


def load(path: Path, dense: Network) -> Network:
    """Load ``dense`` itself, or a network that was cut out of it, as :func:`save` saved it."""
    saved, _ = runner.load(path)
    cut = saved.get("cut", {})
    network = cut_down(dense, cut) if cut else dense
    return network._replace(variables=saved["variables"])
