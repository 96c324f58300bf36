"""Networks that the experiments train."""

import flax.linen as nn
import jax
import jax.numpy as jnp

# `glorot_normal` cuts the normal distribution off at two standard deviations.
GLOROT = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


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
        for i, width in enumerate(self.widths):
            images = nn.relu(nn.Dense(width, kernel_init=GLOROT, name=f"hidden_{i}")(images))
        return nn.Dense(self.classes, kernel_init=GLOROT, name="out")(images)


class PatchConv(nn.Module):
    """Convolution without padding, written as one product with shifted copies of its input.

    It computes what ``nn.Conv(padding="VALID")`` does, with the same kernel of shape
    `[height, width, in, out]`. Inside a scan on a CPU it does so eight times as fast: in a loop XLA
    falls back to a slow convolution, but not to a slow product of matrices (a training step of
    LeNet-5 at batch 64, on two cores: 18 ms with ``nn.Conv``, 2.2 ms with this).

    Attributes:
      features: channels of the output.
      size: height and width of the kernel.
    """

    features: int
    size: tuple[int, int] = (5, 5)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images `[batch, height, width, in]` to feature maps, smaller by the kernel less 1."""
        kernel = self.param("kernel", GLOROT, (*self.size, images.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        rows, columns = (n - k + 1 for n, k in zip(images.shape[1:3], self.size, strict=True))
        shifts = [(i, j) for i in range(self.size[0]) for j in range(self.size[1])]
        patches = [images[:, i : i + rows, j : j + columns] for i, j in shifts]
        flat = jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, self.features)
        return flat + bias.reshape(1, 1, 1, -1)


class LeNet5(nn.Module):
    """Two convolutions and three dense layers, with ReLUs and max-pooling.

    The shape is LeNet-5's: 6 and 16 maps of 5x5 kernels, then 120, 84 and ``classes`` units.

    Attributes:
      classes: number of logits.
    """

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images `[batch, 784]` of 28x28 pixels to logits `[batch, classes]`."""
        maps = images.reshape(-1, 28, 28, 1)
        for i, features in enumerate((6, 16)):
            maps = halve(nn.relu(PatchConv(features, name=f"conv_{i}")(maps)))
        units = maps.reshape(len(maps), -1)
        for i, width in enumerate((120, 84)):
            units = nn.relu(nn.Dense(width, kernel_init=GLOROT, name=f"hidden_{i}")(units))
        return nn.Dense(self.classes, kernel_init=GLOROT, name="out")(units)


def halve(maps: jax.Array) -> jax.Array:
    """Max-pool 2x2 windows of maps `[batch, height, width, channels]` of even height and width."""
    batch, height, width, channels = maps.shape
    return maps.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
