"""Networks that the experiments train."""

import math

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

    It computes what ``nn.Conv(padding="VALID")`` does, with a kernel `[height, width, in, out]`.
    In a scan on a CPU, where XLA falls back to slow convolutions, it does so eight times as fast (a
    training step of LeNet-5 at batch 64, on two cores: 18 ms with ``nn.Conv``, 2.2 ms with this).
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
    """LeNet-5: 6 and 16 maps of 5x5 kernels, then 120, 84 and ``classes`` units; ReLUs."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images `[batch, 784]` of 28x28 pixels to logits `[batch, classes]`."""
        maps = images.reshape(-1, 28, 28, 1)
        for i, features in enumerate((6, 16)):
            maps = halve(nn.relu(PatchConv(features, name=f"conv_{i}")(maps)))
        units = maps.reshape(maps.shape[0], -1)
        for i, width in enumerate((120, 84)):
            units = nn.relu(nn.Dense(width, kernel_init=GLOROT, name=f"hidden_{i}")(units))
        return nn.Dense(self.classes, kernel_init=GLOROT, name="out")(units)


def halve(maps: jax.Array) -> jax.Array:
    """Max-pool 2x2 windows of maps `[batch, height, width, channels]` of even height and width."""
    batch, height, width, channels = maps.shape
    return maps.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))


class ResidualNet(nn.Module):
    """Residual CNN with batch normalisation, for square grey images.

    A stem, then stages of residual blocks. The first block of every stage but the first halves the
    image and goes around itself by a strided 1x1 convolution; all others by the identity.

    Attributes:
      widths: channels of each stage.
      classes: number of logits.
      blocks: residual blocks of a stage.
      stride: of the stem; 2 halves the image before anything else.
    """

    widths: tuple[int, ...]
    classes: int
    blocks: int = 2
    stride: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Map images `[batch, pixels]` to logits `[batch, classes]`.

        Where ``train``, batches are normalised by themselves and move the running statistics.
        """
        side = math.isqrt(images.shape[-1])
        maps = images.reshape(-1, side, side, 1)
        maps = ConvNorm(self.widths[0], stride=self.stride, name="stem")(maps, train)
        maps = nn.relu(maps)
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                maps = ResidualBlock(width, stride, name=f"block_{stage}_{block}")(maps, train)
        return nn.Dense(self.classes, name="out")(maps.mean((1, 2)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a way around them, which is a 1x1 convolution under a stride."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, maps: jax.Array, train: bool) -> jax.Array:
        """Map feature maps `[batch, height, width, channels]` to such."""
        inner = nn.relu(ConvNorm(self.width, stride=self.stride, name="conv_0")(maps, train))
        inner = ConvNorm(self.width, name="conv_1")(inner, train)
        if self.stride != 1:
            maps = ConvNorm(self.width, size=1, stride=self.stride, name="around")(maps, train)
        return nn.relu(maps + inner)


class ConvNorm(nn.Module):
    """Square convolution without bias, then batch normalisation."""

    features: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, maps: jax.Array, train: bool) -> jax.Array:
        """Map feature maps `[batch, height, width, channels]` to such."""
        size, stride = (self.size, self.size), (self.stride, self.stride)
        maps = nn.Conv(self.features, size, stride, use_bias=False, name="conv")(maps)
        # Trainings are short: a running mean over hundreds of steps would lag behind.
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(maps)


class Transformer(nn.Module):
    """Causal pre-LN transformer over characters, with learned positions.

    Attributes:
      symbols: size of the alphabet.
      context: characters of an input.
      width: channels between the layers.
      layers: pairs of an attention and a feed-forward branch.
      heads: of every attention.
    """

    symbols: int
    context: int
    width: int = 64
    layers: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, codes: jax.Array, train: bool = False) -> jax.Array:
        """Map codes `[batch, context]` to logits of the next one, `[batch, context, symbols]`."""
        del train  # nothing here depends on it
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (1, self.context, self.width)
        )
        stream = nn.Embed(self.symbols, self.width, name="symbols")(codes) + positions
        mask = nn.make_causal_mask(codes)
        for i in range(self.layers):
            normed = nn.LayerNorm(name=f"norm_{i}_0")(stream)
            stream += nn.MultiHeadAttention(self.heads, name=f"attention_{i}")(normed, mask=mask)
            normed = nn.LayerNorm(name=f"norm_{i}_1")(stream)
            inner = nn.gelu(nn.Dense(4 * self.width, name=f"up_{i}")(normed))
            stream += nn.Dense(self.width, name=f"down_{i}")(inner)
        return nn.Dense(self.symbols, name="out")(nn.LayerNorm(name="norm")(stream))
