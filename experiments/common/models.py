"""Networks that the experiments train."""

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Fully connected network with ReLUs and Gaussian Glorot weights.

    Layers are called ``hidden_0``, ``hidden_1``, ... and ``out``, so that a parameter's path says
    where it sits. ``MLP((300, 100), 10)`` is LeNet-300-100.

    Attributes:
      widths: units of each hidden layer.
      classes: number of logits.
    """

    widths: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images `[batch, pixels]` to logits `[batch, classes]`."""
        # `glorot_normal` cuts the normal distribution off at two standard deviations.
        glorot = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
        for i, width in enumerate(self.widths):
            images = nn.relu(nn.Dense(width, kernel_init=glorot, name=f"hidden_{i}")(images))
        return nn.Dense(self.classes, kernel_init=glorot, name="out")(images)
