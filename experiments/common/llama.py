"""A llama: plain functions over a dict of arrays, all layers in one scan."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Params = dict[str, Any]


class Llama(NamedTuple):
    """Sizes of a network of the llama family.

    Attributes:
      vocabulary: tokens that there are.
      width: of the stream between the layers.
      layers: pairs of an attention and a feed-forward branch.
      heads: of the queries.
      kv_heads: of keys and values; each serves ``heads // kv_heads`` of the queries.
      inner: neurons of a feed-forward branch.
      theta: base of the rotary frequencies.
      epsilon: added to mean squares before they are divided by.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    theta: float = 1e5
    epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.width // self.heads


def init(key: jax.Array, net: Llama) -> Params:
    """Draw random weights.

    Every kernel is `[layers, inputs, outputs]`, so that one program serves all layers; the
    embedding `[vocabulary, width]` is the head, too.
    """
    d, kv = net.width, net.kv_heads * net.head_width
    shapes = {
        "attention": {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d)},
        "mlp": {"gate": (d, net.inner), "up": (d, net.inner), "down": (net.inner, d)},
    }
    keys = iter(jax.random.split(key, 8))

    def kernel(shape: tuple[int, int]) -> dict[str, jax.Array]:
        drawn = jax.random.normal(next(keys), (net.layers, *shape))
        return {"kernel": drawn / jnp.sqrt(shape[0])}

    layers = {
        branch: {"norm": {"scale": jnp.ones((net.layers, d))}}
        | {name: kernel(shape) for name, shape in kernels.items()}
        for branch, kernels in shapes.items()
    }
    return {
        "embedding": jax.random.normal(next(keys), (net.vocabulary, d)) / jnp.sqrt(d),
        "layers": layers,
        "norm": {"scale": jnp.ones(d)},
    }


def logits(params: Params, tokens: jax.Array, *, net: Llama) -> jax.Array:
    """Map tokens `[batch, length]` to logits of the next one, `[batch, length, vocabulary]`."""
    return hidden(params, tokens, net=net) @ params["embedding"].T


def hidden(params: Params, tokens: jax.Array, *, net: Llama) -> jax.Array:
    """Map tokens `[batch, length]` to what the head reads, `[batch, length, width]`."""
    step = functools.partial(layer, net=net)
    stream, _ = lax.scan(lambda s, p: (step(p, s), None), embed(params, tokens), params["layers"])
    return rms_norm(params["norm"], stream, net=net)


def streams(params: Params, tokens: jax.Array, *, net: Llama) -> tuple[jax.Array, jax.Array]:
    """Give what enters and what leaves each layer, both `[layers, batch, length, width]`."""

    def step(stream: jax.Array, p: Params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        after = layer(p, stream, net=net)
        return after, (stream, after)

    return lax.scan(step, embed(params, tokens), params["layers"])[1]


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Look tokens up."""
    return params["embedding"][tokens]


def layer(p: Params, stream: jax.Array, *, net: Llama) -> jax.Array:
    """Add both branches of one layer to the stream `[batch, length, width]`."""
    stream = stream + attention(p["attention"], stream, net=net)
    return stream + mlp(p["mlp"], stream, net=net)


def attention(p: Params, stream: jax.Array, *, net: Llama) -> jax.Array:
    """Look back: some heads of the queries share a head of keys and values."""
    x = rms_norm(p["norm"], stream, net=net)
    batch, length, _ = x.shape
    q = (x @ p["q"]["kernel"]).reshape(batch, length, net.kv_heads, -1, net.head_width)
    k = (x @ p["k"]["kernel"]).reshape(batch, length, net.kv_heads, net.head_width)
    v = (x @ p["v"]["kernel"]).reshape(k.shape)
    angle = angles(length, net=net)
    q, k = rotate(q, angle[None, :, None, None]), rotate(k, angle[None, :, None])
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k) / jnp.sqrt(net.head_width)
    seen = jnp.tril(jnp.ones((1, 1, 1, length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return mixed.reshape(batch, length, -1) @ p["o"]["kernel"]


def mlp(p: Params, stream: jax.Array, *, net: Llama) -> jax.Array:
    """Map each position by gated neurons."""
    return neurons(p, stream, net=net) @ p["down"]["kernel"]


def neurons(p: Params, stream: jax.Array, *, net: Llama) -> jax.Array:
    """Give what the neurons of a feed-forward branch say, `[batch, length, inner]`."""
    x = rms_norm(p["norm"], stream, net=net)
    return jax.nn.silu(x @ p["gate"]["kernel"]) * (x @ p["up"]["kernel"])


def rms_norm(p: Params, x: jax.Array, *, net: Llama) -> jax.Array:
    """Divide `[batch, length, width]` by the root of the mean square over the last axis."""
    scale = p["scale"].reshape(1, 1, -1)
    return x * lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + net.epsilon) * scale


def angles(length: int, *, net: Llama) -> jax.Array:
    """Give by how much each pair of features turns at each position, `[length, head_width / 2]`."""
    half = net.head_width // 2
    frequencies = net.theta ** (-jnp.arange(half) / half)
    return jnp.outer(jnp.arange(length), frequencies)


def rotate(x: jax.Array, angle: jax.Array) -> jax.Array:
    """Turn features: the first of a pair lies in the first half of a head, the other in the second.

    Args:
      x: `[batch, length, ..., head_width]`.
      angle: `[1, length, ..., head_width / 2]`.
    """
    a, b = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Negative log-likelihoods in nats of tokens `[batch, length]` under logits of each."""
    found = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - found
