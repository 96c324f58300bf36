"""Small models that structured pruning has to handle, one of every kind in use.

Widths are small, uneven and as a rule distinct, so that two axes that only happen to have the
same size cannot pass for coupled ones. Each model is a plain function on its whole tree of
variables, and nothing in that tree is trivially 0 or 1.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class Model(NamedTuple):
    """A function to prune.

    Attributes:
      name: its name in ``ZOO``.
      fn: ``fn(params, *inputs)``.
      params: concrete arrays; running statistics, too.
      inputs: arrays with the batch as leading axis.
      inexact: why masked and shrunk cannot agree, or None if they must.
    """

    name: str
    fn: Callable[..., Any]
    params: Any
    inputs: tuple[jax.Array, ...]
    inexact: str | None = None


ZOO: dict[str, Callable[[], Model]] = {}


def listed(build=None, *, inexact=None):
    """Enter a function that gives ``fn, params, inputs`` into ``ZOO`` under its own name."""
    if build is None:
        return functools.partial(listed, inexact=inexact)
    name = build.__name__
    ZOO[name] = functools.cache(lambda: Model(name, *build(), inexact))
    return build


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tokens(seed, *shape, vocabulary=11):
    return jnp.asarray(np.random.default_rng(seed).integers(0, vocabulary, shape), jnp.int32)


def drawn(shapes, seed=7):
    """Put random arrays in the place of shapes: no scale is 1 and no bias 0."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape) / np.prod(leaf.shape[:-1]) ** 0.5
        name = jax.tree_util.keystr(path[-1:], simple=True)
        drawn = {"scale": 0.5 + np.abs(noise), "var": 0.5 + np.abs(noise), "bias": 0.3 * noise}
        return jnp.asarray(drawn.get(name, noise), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def weights(seed=0, **shapes):
    """Draw a hand-written tree."""
    return drawn({k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}, seed)


def linen(module, *inputs, **settings):
    """``fn, params, inputs`` of a flax module; ``settings`` go to ``apply``."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return lambda v, *x: module.apply(v, *x, **settings), drawn(shapes), inputs


def equinox(make, *inputs):
    """``fn, params, inputs`` of an equinox module for one example, made from a key."""
    import equinox as eqx

    module = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda p, *x: jax.vmap(eqx.combine(p, static))(*x), drawn(shapes), inputs


def from_nnx(make, *inputs):
    """``fn, params, inputs`` of an nnx module, on its state as a plain dict."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return lambda p, *x: nnx.merge(graph, p)(*x), drawn(nnx.to_pure_dict(state)), inputs


# Dense networks


class MLP(nn.Module):
    rate: float = 0.0

    @nn.compact
    def __call__(self, x):
        for width in (10, 12):
            x = nn.relu(nn.Dense(width)(x))
            x = nn.Dropout(self.rate, deterministic=self.rate == 0)(x)
        return nn.Dense(3)(x)


@listed
def mlp():
    return linen(MLP(), normal(1, 4, 6))


@listed
def dropout():
    """Trained: what is dropped must not move when widths do."""
    module, key, x = MLP(rate=0.4), jax.random.key(5), normal(1, 4, 6)
    _, params, inputs = linen(MLP(), x)
    return lambda v, x: module.apply(v, x, rngs={"dropout": key}), params, inputs


@listed
def plain_mlp():
    """A list of layers, no library at all."""

    def fn(layers, x):
        for w, b in layers[:-1]:
            x = jnp.tanh(x @ w + b[None])
        w, b = layers[-1]
        return x @ w + b[None]

    sizes = (6, 10, 12, 3)
    layers = [
        (normal(i, n, m) / n**0.5, normal(9 + i, m))
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    ]
    return fn, layers, (normal(1, 4, 6),)


@listed
def haiku_mlp():
    import haiku as hk

    def forward(x):
        return hk.nets.MLP([10, 12, 3])(x)

    net, x = hk.without_apply_rng(hk.transform(forward)), normal(1, 4, 6)
    return net.apply, drawn(jax.eval_shape(net.init, jax.random.key(0), x)), (x,)


@listed
def equinox_mlp():
    import equinox as eqx

    make = lambda key: eqx.nn.MLP(6, 3, 10, 2, activation=jax.nn.gelu, key=key)
    return equinox(make, normal(1, 4, 6))


@listed
def nnx_mlp():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(6, 10, rngs=rngs)
            self.norm = nnx.BatchNorm(10, use_running_average=True, rngs=rngs)
            self.wide = nnx.Linear(10, 12, rngs=rngs)
            self.out = nnx.Linear(12, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.gelu(self.wide(nnx.relu(self.norm(self.hidden(x))))))

    return from_nnx(Net, normal(1, 4, 6))


@listed
def shared_layer():
    """One kernel used twice: its input and its output are the same units."""

    def fn(p, x):
        h = jnp.tanh(x @ p["into"])
        for _ in range(2):
            h = jnp.tanh(h @ p["step"] + p["bias"][None])
        return h @ p["out"]

    return fn, weights(into=(6, 10), step=(10, 10), bias=(10,), out=(10, 3)), (normal(1, 4, 6),)


@listed
def two_towers():
    """Cosine similarity of two inputs, whose norms sum squares over the units."""

    def tower(p, x):
        h = jnp.tanh(x @ p["hidden"]) @ p["out"]
        return h / (jnp.linalg.norm(h, axis=-1, keepdims=True) + 1e-3)

    def fn(p, x, y):
        return jnp.einsum("ad,bd->ab", tower(p["left"], x), tower(p["right"], y)) * p["scale"]

    params = {
        "left": weights(1, hidden=(6, 10), out=(10, 14)),
        "right": weights(2, hidden=(5, 12), out=(12, 14)),
        "scale": jnp.array([[3.0]]),
    }
    return fn, params, (normal(1, 4, 6), normal(2, 4, 5))


@listed
def maxout():
    """Each unit is the maximum of three pieces, which leave together."""

    def fn(p, x):
        pieces = (x @ p["kernel"] + p["bias"][None]).reshape(-1, 10, 3)
        return pieces.max(-1) @ p["out"]

    return fn, weights(kernel=(6, 30), bias=(30,), out=(10, 3)), (normal(1, 4, 6),)


@listed
def gated():
    """One kernel makes values and gates: halves that leave in pairs."""

    def fn(p, x):
        value, gate = jnp.split(x @ p["kernel"] + p["bias"][None], 2, axis=-1)
        return (value * nn.silu(gate)) @ p["out"]

    return fn, weights(kernel=(6, 20), bias=(20,), out=(10, 3)), (normal(1, 4, 6),)


@jax.custom_vjp
def rounded(x):
    return jnp.round(x * 8) / 8


rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))


@listed
def straight_through():
    """Rounding with the gradient of the identity, which plain tracing would turn to zero."""

    def fn(p, x):
        h = rounded(jnp.tanh(x @ rounded(p["hidden"]) + p["bias"][None]))
        return rounded(h) @ rounded(p["out"])

    return fn, weights(hidden=(6, 10), bias=(10,), out=(10, 3)), (normal(1, 4, 6),)


@jax.custom_jvp
def clipped(x):
    return jnp.clip(x, -0.5, 0.5)


@clipped.defjvp
def _(primals, tangents):
    """Leak gradients where the value is clipped."""
    (x,), (t,) = primals, tangents
    return clipped(x), jnp.where(jnp.abs(x) < 0.5, 1.0, 0.1) * t


@listed
def own_derivative():
    def fn(p, x):
        return clipped(clipped(x @ p["hidden"] + p["bias"][None]) @ p["more"]) @ p["out"]

    shapes = {"hidden": (6, 10), "bias": (10,), "more": (10, 12), "out": (12, 3)}
    return fn, weights(**shapes), (normal(1, 4, 6),)


# Convolutional networks


class ResNet(nn.Module):
    """Two blocks; the second halves the image and widens, so that its shortcut is a kernel."""

    train: bool = False
    flatten: bool = False

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=not self.train)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.relu(norm()(conv(6, (3, 3))(x)))
        for inner, width, stride in ((5, 6, 1), (7, 10, 2)):
            h = nn.relu(norm()(conv(inner, (3, 3), strides=stride)(x)))
            h = norm()(conv(width, (3, 3))(h))
            if stride > 1:
                x = norm(name="norm_skip")(conv(width, (1, 1), strides=stride, name="skip")(x))
            x = nn.relu(x + h)
        if self.flatten:
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))
        return nn.Dense(3)(x.mean((1, 2)))


@listed
def resnet():
    return linen(ResNet(), normal(1, 2, 8, 8, 3))


@listed
def resnet_flatten():
    """Each channel is four rows of the last kernel."""
    return linen(ResNet(flatten=True), normal(1, 2, 8, 8, 3))


@listed
def resnet_train():
    """Gives new running statistics beside the logits."""
    return linen(ResNet(train=True), normal(1, 2, 8, 8, 3), mutable=["batch_stats"])


class MobileNet(nn.Module):
    """Expand, convolve each channel by itself, squeeze and excite, project."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu6(norm()(nn.Conv(6, (3, 3), strides=2, use_bias=False)(x)))
        for wide, stride, width in ((12, 1, 6), (14, 2, 10)):
            h = nn.relu6(norm()(nn.Conv(wide, (1, 1), use_bias=False)(x)))
            h = nn.Conv(wide, (3, 3), strides=stride, feature_group_count=wide, use_bias=False)(h)
            h = nn.relu6(norm()(h))
            gate = nn.silu(nn.Dense(5)(h.mean((1, 2), keepdims=True)))
            h = h * nn.sigmoid(nn.Dense(wide)(gate))
            h = norm()(nn.Conv(width, (1, 1), use_bias=False)(h))
            x = x + h if stride == 1 else h
        return nn.Dense(3)(x.mean((1, 2)))


@listed
def mobilenet():
    return linen(MobileNet(), normal(1, 2, 8, 8, 3))


class ResNeXt(nn.Module):
    """Blocks whose middle convolution works in four groups of three channels."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(10, (3, 3))(x)))
        for _ in range(2):
            h = nn.relu(norm()(nn.Conv(12, (1, 1), use_bias=False)(x)))
            h = nn.Conv(12, (3, 3), feature_group_count=4, use_bias=False)(h)
            h = nn.Conv(10, (1, 1), use_bias=False)(nn.relu(norm()(h)))
            x = nn.relu(x + norm()(h))
        return nn.Dense(3)(x.mean((1, 2)))


@listed
def resnext():
    return linen(ResNeXt(), normal(1, 2, 6, 6, 3))


class DenseNet(nn.Module):
    """Each layer reads all earlier ones, side by side."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.Conv(7, (3, 3))(x)
        for growth in (5, 6, 4):
            h = nn.Conv(growth, (3, 3))(nn.relu(norm()(x)))
            x = jnp.concatenate([x, h], axis=-1)
        x = nn.avg_pool(nn.Conv(10, (1, 1))(nn.relu(norm()(x))), (2, 2), strides=(2, 2))
        return nn.Dense(3)(nn.relu(norm()(x)).mean((1, 2)))


@listed
def densenet():
    return linen(DenseNet(), normal(1, 2, 6, 6, 3))


class UNet(nn.Module):
    """Down twice and up again, past features beside the upsampled ones; gives an image."""

    transpose: bool = False

    @nn.compact
    def __call__(self, x):
        def double(x, width):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            return nn.relu(nn.Conv(width + 1, (3, 3))(x))

        skips = []
        for width in (4, 6):
            x = double(x, width)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = double(x, 9)
        for width, skip in zip((8, 5), reversed(skips), strict=True):
            if self.transpose:
                x = nn.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
            else:
                x = jax.image.resize(x, (*skip.shape[:3], x.shape[-1]), "nearest")
            x = double(jnp.concatenate([x, skip], axis=-1), width)
        return nn.Conv(2, (1, 1))(x)


@listed
def unet():
    return linen(UNet(), normal(1, 2, 8, 8, 3))


@listed
def unet_transposed():
    return linen(UNet(transpose=True), normal(1, 2, 8, 8, 3))


@listed
def equinox_cnn():
    """Channels first, one image at a time under ``vmap``."""
    import equinox as eqx

    def make(key):
        keys = jax.random.split(key, 4)
        layers = [
            eqx.nn.Conv2d(3, 6, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Conv2d(6, 10, 3, padding=1, key=keys[1]),
            eqx.nn.Lambda(jax.nn.gelu),
            eqx.nn.AvgPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(40, 7, key=keys[2]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(7, 3, key=keys[3]),
        ]
        return eqx.nn.Sequential(layers)

    return equinox(make, normal(1, 2, 3, 8, 8))


class PatchMerge(nn.Module):
    """As in Swin: four neighbours become one, four times as wide, by slices or by a reshape."""

    strided: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Conv(6, (2, 2), strides=2)(x))
        b, h, w, c = x.shape
        if self.strided:
            corners = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
            x = jnp.concatenate(corners, axis=-1)
        else:
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
            x = x.reshape(b, h // 2, w // 2, 4 * c)
        x = nn.Dense(10, use_bias=False)(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.gelu(x).mean((1, 2)))


@listed
def patch_merge():
    return linen(PatchMerge(), normal(1, 2, 8, 8, 3))


@listed
def patch_merge_strided():
    return linen(PatchMerge(strided=True), normal(1, 2, 8, 8, 3))


class PixelShuffle(nn.Module):
    """Superresolution: four times the channels become twice the height and width."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(24, (3, 3))(nn.relu(nn.Conv(5, (3, 3))(x)))
        b, h, w, _ = x.shape
        x = x.reshape(b, h, w, 2, 2, 6).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 6)
        return nn.Conv(2, (3, 3))(nn.relu(x))


@listed
def pixel_shuffle():
    return linen(PixelShuffle(), normal(1, 2, 5, 5, 2))


class GroupNormNet(nn.Module):
    """Two groupings of twelve channels; flax sums squares, so zeros change no statistic."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(num_groups=3)(nn.Conv(12, (3, 3))(x)))
        x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Conv(10, (3, 3))(x)))
        return nn.Dense(3)(x.mean((1, 2)))


@listed
def group_norm():
    return linen(GroupNormNet(), normal(1, 2, 6, 6, 3))


@listed(inexact="the variance is a sum of (x - mean)^2, to which removed channels add mean^2")
def group_norm_two_pass():
    def fn(p, x):
        h = lax.conv_general_dilated(
            x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        b, height, width, c = h.shape
        h = h.reshape(b, height, width, 3, c // 3)
        mean = h.mean((1, 2, 4), keepdims=True)
        var = jnp.square(h - mean).mean((1, 2, 4), keepdims=True)
        h = ((h - mean) * lax.rsqrt(var + 1e-3)).reshape(b, height, width, c)
        return nn.relu(h * p["scale"] + p["bias"]).mean((1, 2)) @ p["out"]

    shapes = {"conv": (3, 3, 3, 12), "scale": (1, 1, 1, 12), "bias": (1, 1, 1, 12), "out": (12, 3)}
    return fn, weights(**shapes), (normal(1, 2, 5, 5, 3),)


# Attention, by hand


def heads_of(x, heads):
    """``[batch, tokens, heads * size]`` to ``[batch, tokens, heads, size]``."""
    return x.reshape(*x.shape[:2], heads, -1)


def attend(q, k, v, *, bias=None, causal=False):
    """``[batch, tokens, heads, size]`` in and ``[batch, tokens, heads * size]`` out."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    if bias is not None:
        logits = logits + bias
    if causal:
        seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(seen[None, None], logits, -1e9)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
    return out.reshape(*out.shape[:2], -1)


def rms_norm(x, scale):
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale


# Transformers


class EncoderBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)(h, h)
        h = nn.gelu(nn.Dense(18)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h)


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(10)(x)
        for _ in range(2):
            x = EncoderBlock()(x)
        return nn.Dense(3)(nn.LayerNorm()(x))


@listed
def transformer():
    return linen(Encoder(), normal(1, 2, 5, 6))


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(10, (4, 4), strides=4)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = self.param("token", nn.initializers.normal(1.0), (1, 1, 10))
        x = jnp.concatenate([jnp.tile(token, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("position", nn.initializers.normal(1.0), (1, 5, 10))
        x = EncoderBlock()(x)
        return nn.Dense(3)(nn.LayerNorm()(x)[:, 0])


@listed
def vit():
    return linen(ViT(), normal(1, 2, 8, 8, 3))


class GPT(nn.Module):
    """Queries, keys and values from one kernel; the embedding is the last kernel, too."""

    split: bool = False

    @nn.compact
    def __call__(self, ids):
        b, t = ids.shape
        embed = nn.Embed(11, 14)
        position = self.param("position", nn.initializers.normal(1.0), (9, 14))
        x = embed(ids) + position[None, :t]
        for _ in range(2):
            h = nn.Dense(36)(nn.LayerNorm()(x))
            if self.split:
                q, k, v = (heads_of(a, 3) for a in jnp.split(h, 3, axis=-1))
            else:
                h = h.reshape(b, t, 3, 3, 4)
                q, k, v = h[:, :, 0], h[:, :, 1], h[:, :, 2]
            x = x + nn.Dense(14)(attend(q, k, v, causal=True))
            x = x + nn.Dense(14)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        return embed.attend(nn.LayerNorm()(x))


@listed
def gpt():
    return linen(GPT(), tokens(1, 2, 7))


@listed
def gpt_split():
    return linen(GPT(split=True), tokens(1, 2, 7))


def rotary(x):
    """Turn each pair (i, i + half) by an angle that grows with the position."""
    tokens, size = x.shape[1], x.shape[-1]
    rates = 100.0 ** (-jnp.arange(size // 2) / (size // 2))
    angle = jnp.arange(tokens)[:, None] * rates[None]
    angle = jnp.concatenate([angle, angle], axis=-1)[None, :, None]
    a, b = jnp.split(x, 2, axis=-1)
    return x * jnp.cos(angle) + jnp.concatenate([-b, a], axis=-1) * jnp.sin(angle)


@listed
def llama():
    """Six heads of queries share two of keys and values; rotary positions, SwiGLU, RMSNorm."""

    def layer(p, x):
        h = rms_norm(x, p["norm_attention"])
        q = rotary(heads_of(h @ p["query"], 6))
        k = rotary(heads_of(h @ p["key"], 2))
        k, v = (jnp.repeat(a, 3, axis=2) for a in (k, heads_of(h @ p["value"], 2)))
        x = x + attend(q, k, v, causal=True) @ p["out"]
        h = rms_norm(x, p["norm_ffn"])
        return x + (nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def fn(p, ids):
        x = p["embed"][ids]
        for name in ("layer_0", "layer_1"):
            x = layer(p[name], x)
        return rms_norm(x, p["norm"]) @ p["head"]

    shapes = {
        "norm_attention": (1, 1, 14),
        "query": (14, 24),
        "key": (14, 8),
        "value": (14, 8),
        "out": (24, 14),
        "norm_ffn": (1, 1, 14),
        "gate": (14, 10),
        "up": (14, 10),
        "down": (10, 14),
    }
    params = weights(embed=(11, 14), norm=(1, 1, 14), head=(14, 11))
    params |= {f"layer_{i}": weights(i + 1, **shapes) for i in range(2)}
    return fn, params, (tokens(1, 2, 7),)


@listed
def t5():
    """Encoder and decoder; biases by distance, one per head, shared by the layers of a side."""

    def attention(p, x, memory, bias=None, causal=False):
        q, k, v = (heads_of(a @ p[n], 3) for a, n in ((x, "q"), (memory, "k"), (memory, "v")))
        return attend(q, k, v, bias=bias, causal=causal) @ p["o"]

    def distance_bias(table, tokens):
        distance = np.arange(tokens)[:, None] - np.arange(tokens)[None] + 5
        return table[distance].transpose(2, 0, 1)[None]

    def ffn(p, x):
        return nn.relu(rms_norm(x, p["norm"]) @ p["wi"]) @ p["wo"]

    def fn(p, source, target):
        x = p["embed"][source]
        bias = distance_bias(p["encoder_bias"], x.shape[1])
        for q in p["encoder"]:
            h = rms_norm(x, q["norm"])
            x = x + attention(q["self"], h, h, bias)
            x = x + ffn(q["ffn"], x)
        memory = rms_norm(x, p["encoder_norm"])
        y = p["embed"][target]
        bias = distance_bias(p["decoder_bias"], y.shape[1])
        for q in p["decoder"]:
            h = rms_norm(y, q["norm"])
            y = y + attention(q["self"], h, h, bias, causal=True)
            y = y + attention(q["cross"], rms_norm(y, q["norm_cross"]), memory)
            y = y + ffn(q["ffn"], y)
        return rms_norm(y, p["decoder_norm"]) @ p["embed"].T

    scale = (1, 1, 14)
    attention_shapes = {"q": (14, 12), "k": (14, 12), "v": (14, 12), "o": (12, 14)}

    def layer(seed, *kinds):
        params = {kind: weights(seed + i, **attention_shapes) for i, kind in enumerate(kinds)}
        params |= weights(seed + 2, norm=scale, norm_cross=scale)
        return params | {"ffn": weights(seed + 3, norm=scale, wi=(14, 10), wo=(10, 14))}

    params = weights(embed=(11, 14), encoder_bias=(11, 3), decoder_bias=(11, 3))
    params |= weights(1, encoder_norm=scale, decoder_norm=scale)
    params["encoder"] = [layer(2, "self"), layer(12, "self")]
    params["decoder"] = [layer(22, "self", "cross")]
    for unused in params["encoder"]:
        del unused["norm_cross"]
    return fn, params, (tokens(1, 2, 6), tokens(2, 2, 5))


class ScanBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h), None


class ScanNet(nn.Module):
    """Three layers behind one another in a scan that keeps no activations."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(ScanBlock, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = stack()(nn.Dense(10)(x), None)
        return nn.Dense(3)(nn.LayerNorm()(x))


@listed
def scanned():
    return linen(ScanNet(), normal(1, 4, 6))


@listed
def nnx_transformer():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.into = nnx.Linear(6, 10, rngs=rngs)
            self.norm = nnx.LayerNorm(10, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(
                num_heads=3, in_features=10, qkv_features=12, decode=False, rngs=rngs
            )
            self.norm_ffn = nnx.LayerNorm(10, rngs=rngs)
            self.wide = nnx.Linear(10, 18, rngs=rngs)
            self.narrow = nnx.Linear(18, 10, rngs=rngs)
            self.out = nnx.Linear(10, 3, rngs=rngs)

        def __call__(self, x):
            x = self.into(x)
            x = x + self.attention(self.norm(x))
            x = x + self.narrow(nnx.gelu(self.wide(self.norm_ffn(x))))
            return self.out(x)

    return from_nnx(Block, normal(1, 2, 5, 6))


class Mixer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(10)(x)
        h = nn.gelu(nn.Dense(12)(nn.LayerNorm()(x).swapaxes(1, 2)))
        x = x + nn.Dense(x.shape[1])(h).swapaxes(1, 2)
        x = x + nn.Dense(10)(nn.gelu(nn.Dense(14)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


@listed(inexact="the token-mixing bias is added to removed channels, which norms then count")
def mixer():
    return linen(Mixer(), normal(1, 2, 5, 6))


@listed
def experts():
    """Four experts side by side, weighted by a softmax."""

    def fn(p, x):
        gate = jax.nn.softmax(x @ p["router"])
        h = nn.gelu(jnp.einsum("bi,eio->beo", x @ p["into"], p["up"]) + p["bias"][None])
        y = jnp.einsum("beo,eod->bed", h, p["down"])
        return jnp.einsum("bed,be->bd", y, gate) @ p["out"]

    shapes = {"into": (6, 7), "router": (6, 4), "up": (4, 7, 10), "bias": (4, 10)}
    return fn, weights(**shapes, down=(4, 10, 12), out=(12, 3)), (normal(1, 5, 6),)


# Recurrent networks


class Recurrent(nn.Module):
    cell: type[nn.RNNCellBase]

    @nn.compact
    def __call__(self, x):
        x = nn.RNN(self.cell(10))(nn.Dense(7)(x))
        return nn.Dense(3)(nn.RNN(self.cell(12))(x)[:, -1])


@listed
def lstm():
    return linen(Recurrent(nn.OptimizedLSTMCell), normal(1, 2, 5, 6))


@listed
def gru():
    return linen(Recurrent(nn.GRUCell), normal(1, 2, 5, 6))


# Norms that see what was removed


@listed(inexact="the variance is a sum of (x - mean)^2, to which removed units add mean^2")
def layer_norm_two_pass():
    def fn(p, x):
        h = x @ p["hidden"]
        mean = h.mean(-1, keepdims=True)
        var = jnp.square(h - mean).mean(-1, keepdims=True)
        h = (h - mean) * lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"]
        return nn.relu(nn.relu(h) @ p["more"]) @ p["out"]

    shapes = {"hidden": (6, 10), "scale": (1, 10), "bias": (1, 10), "more": (10, 12)}
    return fn, weights(**shapes, out=(12, 3)), (normal(1, 4, 6),)


class SigmoidNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.sigmoid(nn.Dense(10)(x)))
        return nn.Dense(3)(nn.relu(nn.Dense(12)(x)))


@listed(inexact="sigmoid(0) is 1/2, which the norm behind it counts")
def sigmoid_norm():
    return linen(SigmoidNorm(), normal(1, 4, 6))


@listed(inexact="the mean over units counts cos(0) = 1 of every removed one")
def unweighted_mean():
    def fn(p, x):
        h = jnp.cos(x @ p["hidden"])
        return h @ p["out"] + h.mean(-1, keepdims=True)

    return fn, weights(hidden=(6, 10), out=(10, 3)), (normal(1, 4, 6),)
