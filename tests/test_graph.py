"""One small network for each family of rules: units removed at random, the answer stays."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jaxprune as jp

# Compiling takes most of the time here, and running none.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
same = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="SAME")
conv = functools.partial(same, dimension_numbers=("NHWC", "HWIO", "NHWC"))

ROW = (2, 4)  # a batch of rows, of sequences and of images
SEQUENCE = (2, 5, 4)
IMAGE = (2, 6, 6, 3)
TOKENS = np.array([[1, 3, 0], [2, 2, 5]])
PAIRS = np.array([1, 0, 3, 2, 5, 4])
TURN = np.array([2, 0, 1, 5, 4, 3])


def between(middle, x=ROW, n=6, m=6):
    """A function between two matrices: of n hidden values it makes m."""
    fn = lambda p, x, *others: middle(x @ p["w"], *others) @ p["v"]
    return fn, {"w": (x[-1], n), "v": (m, 3)}, x


def images(*kernels, **how):
    """Two convolutions, the second one in groups, and a matrix behind the mean of positions."""
    fn = lambda p, x: conv(conv(x, p["a"]), p["b"], **how).mean((1, 2)) @ p["v"]
    return fn, {"a": kernels[0], "b": kernels[1], "v": (kernels[1][-1], 2)}, IMAGE


def pool(h, op, start):
    return lax.reduce_window(h, start, op, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").mean((1, 2))


@jax.custom_jvp
def leaky(h):
    return jnp.maximum(h, 0.0)


@leaky.defjvp
def _(primals, tangents):
    return leaky(*primals), jnp.where(primals[0] > 0, 1.0, 0.5) * tangents[0]


@jax.custom_vjp
def straight(h):
    return jnp.sign(h)


straight.defvjp(lambda h: (straight(h), None), lambda _, g: (g,))


def dropout(h, key):
    return jnp.where(jax.random.bernoulli(key, 0.5, h.shape), h * 2, 0.0)


PLAIN = [(6, [1, 1])]  # what `between` has if nothing happens in between

# By name: function, shapes of its parameters, inputs (shapes or values), and the units of its
# groups: how many there are, and how many indices of each member one of them owns.
SHAPES = {
    "reshape merges": (
        lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"]).reshape(2, 15) @ p["v"],
        {"w": (4, 3, 5), "v": (15, 2)},
        ROW,
        [(3, [5, 1]), (5, [3, 1])],
    ),
    "reshape splits": (
        lambda p, x: jnp.einsum("bhd,hdo->bo", (x @ p["w"]).reshape(2, 3, 5), p["v"]),
        {"w": (4, 15), "v": (3, 5, 2)},
        ROW,
        [(3, [1, 5]), (5, [1, 3])],
    ),
    "reshape splits twice": (
        lambda p, x: jnp.einsum("bghd,ghdo->bo", (x @ p["w"]).reshape(2, 3, 2, 5), p["v"]),
        {"w": (4, 30), "v": (3, 2, 5, 2)},
        ROW,
        [(3, [1, 10]), (2, [1, 15]), (5, [1, 6])],
    ),
    "reshape splits what was merged": (
        lambda p, x: jnp.einsum(
            "bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["w"]).reshape(2, 2, 10), p["v"]
        ),
        {"w": (4, 4, 5), "v": (2, 10, 2)},
        ROW,
        [(2, [1, 2]), (2, [5, 2]), (5, [2, 1])],
    ),
    "reshape that does not fit": (
        lambda p, x: jnp.einsum(
            "bhd,hdo->bo", jnp.einsum("bi,ihd->bhd", x, p["w"]).reshape(2, 2, 6), p["v"]
        ),
        {"w": (4, 3, 4), "v": (2, 6, 2)},
        ROW,
        [],
    ),
    "reshape of positions": (*between(lambda h: h.reshape(10, 6), SEQUENCE), PLAIN),
    "reshape of positions into channels": (
        lambda p, x: (x @ p["w"]).reshape(2, -1) @ p["v"],
        {"w": (4, 6), "v": (30, 3)},
        SEQUENCE,
        [(6, [5, 1])],
    ),
    "pixel unshuffle": (
        lambda p, x: (
            (x @ p["w"])
            .reshape(2, 3, 2, 3, 2, 5)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(2, 3, 3, 20)
            .mean((1, 2))
            @ p["v"]
        ),
        {"w": (3, 5), "v": (20, 3)},
        IMAGE,
        [(5, [4, 1])],
    ),
    "transpose": (
        *between(lambda h: jnp.transpose(h, (2, 1, 0)).T[:, 0], SEQUENCE),
        PLAIN,
    ),
    "squeeze": (*between(lambda h: jnp.squeeze(h[:, None], 1)), PLAIN),
    "concatenate": (
        lambda p, x: jnp.concatenate([x @ p["a"], x, x @ p["b"]], -1) @ p["v"],
        {"a": (4, 5), "b": (4, 7), "v": (16, 3)},
        ROW,
        [(5, [1, 1]), (7, [1, 1])],
    ),
    "concatenate beside": (
        lambda p, x: jnp.concatenate([x @ p["a"], x @ p["b"]], 0) @ p["v"],
        {"a": (4, 5), "b": (4, 5), "v": (5, 3)},
        ROW,
        [(5, [1, 1, 1])],
    ),
    "split": (
        lambda p, x: sum(
            h @ p[n] for n, h in zip("uv", jnp.split(x @ p["w"], [4], -1), strict=True)
        ),
        {"w": (4, 10), "u": (4, 3), "v": (6, 3)},
        ROW,
        [(4, [1, 1]), (6, [1, 1])],
    ),
    "split in halves": (*between(lambda h: jax.nn.glu(h, -1), n=12), [(6, [1, 2])]),
    "slice": (
        lambda p, x: (x @ p["w"])[:, 3:] @ p["u"] + jnp.tanh(x @ p["w"])[:, :7] @ p["v"],
        {"w": (4, 12), "u": (9, 3), "v": (7, 3)},
        ROW,
        [(3, [1, 1]), (4, [1, 1, 1]), (5, [1, 1])],
    ),
    "slice with a stride": (*between(lambda h: h[:, ::2] * h[:, 1::2], n=12), [(6, [1, 2])]),
    "slice of one index": (*between(lambda h: h * h[:, 2:3]), [(5, [1, 1])]),
    "rev": (*between(lambda h: h + h[:, ::-1]), [(3, [2, 2])]),
    "pad": (*between(lambda h: jnp.pad(h, ((0, 0), (1, 2))), m=9), PLAIN),
    "pad with ones": (
        *between(lambda h: jnp.pad(h, ((0, 0), (1, 2)), constant_values=1.0), m=9),
        PLAIN,
    ),
    "pad inside": (*between(lambda h: lax.pad(h, 0.0, [(0, 0, 0), (0, 0, 1)]), m=11), []),
    "tile": (*between(lambda h: jnp.tile(h, (1, 2)), m=12), [(6, [2, 1])]),
    "repeat": (
        *between(lambda h: jnp.repeat(h, 2, 1), m=12),
        [(2, [6]), (6, [2, 1])],
    ),  # a copy, too
    "stack": (
        lambda p, x: jnp.einsum("bks,kso->bo", jnp.stack([x @ p["a"], x @ p["b"]], -1), p["v"]),
        {"a": (4, 5), "b": (4, 5), "v": (5, 2, 3)},
        ROW,
        [(5, [1, 1, 1])],
    ),
    "unstack": (*between(lambda h: sum(jnp.unstack(h, axis=1)), SEQUENCE), PLAIN),
    "iota": (*between(lambda h: h * jnp.arange(1.0, 7.0)[None]), PLAIN),
}
INDICES = {
    "gather moves": (*between(lambda h: h[:, TURN]), PLAIN),
    "gather pairs": (*between(lambda h: h + jnp.take(h, PAIRS, axis=1)), [(3, [2, 2])]),
    "gather in part": (*between(lambda h: h[:, np.array([5, 2])], m=2), [(2, [1, 1])]),
    "roll": (*between(lambda h: jnp.roll(h, 2, -1)), PLAIN),
    "embedding": (
        lambda p, tokens: (p["e"][tokens] + p["at"][:3][None]) @ p["v"],
        {"e": (7, 6), "at": (4, 6), "v": (6, 3)},
        TOKENS,
        [(6, [1, 1, 1])],
    ),
    "one-hot": (
        lambda p, tokens: jax.nn.one_hot(tokens, 7) @ p["e"] @ p["v"],
        {"e": (7, 6), "v": (6, 3)},
        TOKENS,
        PLAIN,
    ),
    "take along positions": (
        *between(lambda h: jnp.take_along_axis(h, jnp.ones((2, 1, 1), int), 1), SEQUENCE),
        PLAIN,
    ),
    "dynamic slice at a known place": (
        *between(lambda h: lax.dynamic_slice_in_dim(h, 2, 3, 1), m=3),
        [(3, [1, 1])],
    ),
    "dynamic slice of channels": (
        *between(lambda h, i: lax.dynamic_slice_in_dim(h, i, 3, 1), m=3),
        np.int32(2),
        [],
    ),
    "dynamic slice of positions": (
        *between(lambda h, i: lax.dynamic_index_in_dim(h, i, 1, False), SEQUENCE),
        np.int32(2),
        PLAIN,
    ),
    "cache": (
        *between(
            lambda h, i: lax.dynamic_update_slice_in_dim(jnp.zeros((2, 9, 6)), h, i, 1), SEQUENCE
        ),
        np.int32(2),
        PLAIN,
    ),
    "update of channels": (
        *between(lambda h, i: lax.dynamic_update_slice_in_dim(jnp.zeros((2, 9)), h, i, 1), m=9),
        np.int32(2),
        [],
    ),
    "scatter": (
        *between(lambda h, i: jnp.zeros((3, 6)).at[i].add(h)),
        np.array([1, 1]),
        PLAIN,
    ),
    "scatter into channels": (*between(lambda h: h.at[:, 2].set(0.0)), []),
    "scatter-add into some channels": (
        lambda p, x: (x @ p["w"]).at[:, 1:4].add(x @ p["u"]) @ p["v"],
        {"w": (4, 6), "u": (4, 3), "v": (6, 3)},
        ROW,
        [(3, [1, 1, 1]), (3, [1, 1])],
    ),
    "scatter-add of ones into some channels": (*between(lambda h: h.at[:, 1:4].add(1.0)), PLAIN),
    "scatter-add to known channels": (
        lambda p, x: (x @ p["w"]).at[:, np.array([4, 1, 0])].add(x @ p["u"]) @ p["v"],
        {"w": (4, 6), "u": (4, 3), "v": (6, 3)},
        ROW,
        [(3, [1, 1, 1]), (3, [1, 1])],
    ),
    "scatter-add to one channel twice": (
        lambda p, x: (x @ p["w"]).at[:, np.array([4, 1, 4])].add(x @ p["u"]) @ p["v"],
        {"w": (4, 6), "u": (4, 3), "v": (6, 3)},
        ROW,
        [(4, [1, 1]), (1, [2, 1, 1])][:1],  # and one of its own
    ),
    "sums of known channels": (
        *between(lambda h: jax.ops.segment_sum(h.T, np.array([0, 1, 1, 0, 2, 2]), 3).T, m=3),
        [(3, [1, 2])],
    ),
    "scatter to unknown channels": (
        *between(lambda h, i: h.at[:, i].add(1.0)),
        np.array([1, 3]),
        [],
    ),
    "update of some channels": (
        lambda p, x: lax.dynamic_update_slice(x @ p["w"], x @ p["u"], (0, 2)) @ p["v"],
        {"w": (4, 6), "u": (4, 3), "v": (6, 3)},
        ROW,
        [(3, [1, 1, 1]), (3, [1, 1])],
    ),
}


def noted(h):
    """A reference that is written to whole, at a row and again in a loop."""
    ref = jax.new_ref(jnp.zeros_like(h))
    ref[...] += h
    ref[1] = jnp.tanh(h[0])

    def body(total, row):
        ref[...] = ref[...] * 0.5 + row[None]
        return total + ref[0], None

    total, _ = lax.scan(body, jnp.zeros(6), h)
    return jax.ref.freeze(ref) + total[None]


def printed(h):
    jax.debug.print("{}", h.shape[0])
    jax.debug.callback(lambda h: None, h)
    return jnp.tanh(h)


def each(op, size=2):
    """A matrix for each hidden unit, which scales what the unit says."""
    fn = lambda p, x: (
        ((x @ p["w"])[:, :, None, None] * op(p["m"] + p["m"].mT)[None]).sum((2, 3)) @ p["v"]
    )
    return fn, {"w": (4, 6), "m": (6, size, size), "v": (6, 3)}, ROW, [(6, [1, 1, 1])]


def positive(m):
    return jnp.einsum("hij,hkj->hik", m, m) + jnp.eye(len(m[0]))[None]


def system(x):
    """A matrix made of two rows of inputs that can be inverted."""
    return x[:, :2] @ x[:, :2].T + jnp.eye(2)


HOST = lambda h: jax.pure_callback(np.asarray, jax.ShapeDtypeStruct(h.shape, h.dtype), h)
MORE = {
    "Fourier transform of positions": (
        *between(lambda h: jnp.fft.irfft(jnp.fft.rfft(h, axis=1), n=5, axis=1), SEQUENCE),
        PLAIN,
    ),
    "Fourier transform of channels": (*between(lambda h: jnp.fft.fft(h).real), []),
    "ragged product": (
        lambda p, x, sizes: lax.ragged_dot(
            jax.nn.relu(lax.ragged_dot(x, p["w"], sizes)), p["v"], sizes
        ),
        {"w": (3, 4, 6), "v": (3, 6, 2)},
        (5, 4),
        np.array([1, 3, 1]),
        PLAIN,
    ),
    "references": (*between(noted), PLAIN),
    "reference to channels": (*between(lambda h: jax.new_ref(h)[:, 1:3], m=2), []),
    "callbacks that watch": (*between(printed), PLAIN),
    "callback that computes": (*between(HOST), []),
    "any": (*between(lambda h: h * jnp.any(h > 0.5, 1, keepdims=True)), PLAIN),
    "reduction of one's own, of positions": (
        *between(lambda h: lax.reduce(h, 1.0, lambda a, b: a * b + a, (1,)), SEQUENCE),
        PLAIN,
    ),
    "reduction of one's own, of channels": (
        *between(lambda h: h * lax.reduce(h, 1.0, lambda a, b: a * b + a, (1,))[:, None]),
        [],
    ),
    "largest of positions, about": (
        *between(lambda h: h + lax.approx_max_k(h, 2, reduction_dimension=1)[0][:, :1], SEQUENCE),
        PLAIN,
    ),
    "top_k along any axis": (*between(lambda h: lax.top_k(h, 2, axis=1)[0], SEQUENCE), PLAIN),
    "cholesky": each(lambda m: jnp.linalg.cholesky(positive(m))),
    "inverse": each(lambda m: jnp.linalg.inv(positive(m))),
    "eigenvalues": each(lambda m: jnp.linalg.eigh(m)[0][:, None]),
    "singular values": each(lambda m: jnp.linalg.svd(m, compute_uv=False)[:, None]),
    "solve": (
        lambda p, x: jnp.linalg.solve(system(x), x @ p["w"]) @ p["v"],
        {"w": (4, 6), "v": (6, 3)},
        ROW,
        PLAIN,
    ),
    "solve from the right": (
        lambda p, x: (
            lax.linalg.triangular_solve(jnp.tril(system(x)), (x @ p["w"]).T, lower=True).T @ p["v"]
        ),
        {"w": (4, 6), "v": (6, 3)},
        ROW,
        PLAIN,
    ),
    "conjugate gradients": (
        lambda p, x: (
            jax.scipy.sparse.linalg.cg(lambda h: system(x) @ h, x @ p["w"], maxiter=3)[0] @ p["v"]
        ),
        {"w": (4, 6), "v": (6, 3)},
        ROW,
        PLAIN,
    ),
    "solve along channels": (
        lambda p, x: jnp.linalg.solve(p["r"] @ p["r"].T + jnp.eye(6), (x @ p["w"]).T).T @ p["v"],
        {"w": (4, 6), "r": (6, 2), "v": (6, 3)},
        ROW,
        [(2, [1])],  # what `r` is summed over
    ),
    "tied": (lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T, {"w": (4, 6)}, ROW, [(6, [1])]),
    "sum of the hidden": (
        lambda p, x: jnp.tanh(x @ p["w"]).sum(1, keepdims=True),
        {"w": (4, 6)},
        ROW,
        [(6, [1])],
    ),
}
PRODUCTS = {
    "matrices in a batch": (
        lambda p, x: jnp.einsum(
            "bhd,hde,heo->bo", jnp.einsum("bi,ihd->bhd", x, p["w"]), p["u"], p["v"]
        ),
        {"w": (4, 3, 5), "u": (3, 5, 2), "v": (3, 2, 4)},
        ROW,
        [(3, [1, 1, 1]), (5, [1, 1]), (2, [1, 1])],
    ),
    "outer product": (
        lambda p, x: jnp.einsum("bi,bj->bij", x @ p["w"], x @ p["u"]).reshape(2, -1) @ p["v"],
        {"w": (4, 6), "u": (4, 5), "v": (30, 3)},
        ROW,
        [(6, [5, 1]), (5, [1, 6])],
    ),
    "a matrix and its transpose": (
        lambda p, x: x @ p["w"] @ (p["r"] + p["r"].T) @ p["v"],
        {"w": (4, 6), "r": (6, 6), "v": (6, 3)},
        ROW,
        [(6, [1, 1, 1, 1])],
    ),
    "diagonal": (
        lambda p, x: x @ p["w"] @ jnp.diag(p["d"]) @ p["v"],
        {"w": (4, 6), "d": (6,), "v": (6, 3)},
        ROW,
        PLAIN,  # of `w` and `d`; `v` is read whole
    ),
    "grouped conv": (
        *images((3, 3, 3, 8), (3, 3, 4, 6), feature_group_count=2),
        [(4, [2, 1]), (3, [2, 2]), (2, [4, 3, 3])],
    ),
    "depthwise conv": (
        *images((1, 1, 3, 4), (3, 3, 1, 4), feature_group_count=4),
        [(4, [1, 1, 1])],
    ),
    "depthwise conv with a multiplier": (
        *images((1, 1, 3, 4), (3, 3, 1, 12), feature_group_count=4),
        [(4, [1, 3, 3]), (3, [4, 4])],
    ),
    "grouped conv of one output each": (
        *images((1, 1, 3, 8), (3, 3, 2, 4), feature_group_count=4),
        [(4, [2, 1, 1]), (2, [4, 1])],
    ),
    "conv of groups of inputs": (
        lambda p, x: conv(x, p["b"], feature_group_count=3).mean((1, 2)) @ p["v"],
        {"b": (3, 3, 1, 6), "v": (6, 2)},
        IMAGE,
        [],
    ),
    "conv transpose": (
        lambda p, x: lax.conv_transpose(x @ p["w"], p["a"], (2, 2), "SAME").mean((1, 2)) @ p["v"],
        {"w": (3, 4), "a": (3, 3, 4, 5), "v": (5, 2)},
        IMAGE,
        [(4, [1, 1]), (5, [1, 1])],
    ),
    "max pool": (*between(lambda h: pool(h, lax.max, -jnp.inf), IMAGE), PLAIN),
    "mean pool": (*between(lambda h: pool(h, lax.add, 0.0) / 4, IMAGE), PLAIN),
    "pool of channels": (
        *between(lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 2), (1, 2), "VALID"), m=3),
        [],
    ),
    "sum": (*between(lambda h: h * h.sum(1, keepdims=True)), PLAIN),
    "scale of quantization": (*between(lambda h: h / (1 + jnp.abs(h).max(1)[:, None])), PLAIN),
    "norm": (*between(lambda h: h / jnp.linalg.norm(h, axis=1, keepdims=True)), PLAIN),
    **{
        f"{name} of {what}": (*between(run, *x), units)
        for name, run in {
            "max": lambda h: h * h.max(1, keepdims=True),
            "argmax": lambda h: h * jnp.argmax(h, 1, keepdims=True),
            "cumsum": lambda h: jnp.cumsum(h, 1),
            "sort": lambda h: jnp.sort(h, 1),
            "softmax": lambda h: jax.nn.softmax(h, 1),
            "top_k": lambda h: h * jnp.moveaxis(lax.top_k(jnp.moveaxis(h, 1, -1), 1)[0], -1, 1),
        }.items()
        for what, x, units in (("positions", (SEQUENCE,), PLAIN), ("channels", (), []))
    },
}
CALLS = {
    "jit": (*between(jax.jit(lambda h: jnp.tanh(h) + h[:, ::-1])), [(3, [2, 2])]),
    "remat": (*between(jax.checkpoint(lambda h: jnp.tanh(h) * h)), PLAIN),
    "scan that carries": (
        lambda p, x: (
            lax.scan(
                lambda h, x: (jnp.tanh(h @ p["r"] + x @ p["w"]), None),
                jnp.zeros((2, 6)),
                x.swapaxes(0, 1),
            )[0]
            @ p["v"]
        ),
        {"w": (4, 6), "r": (6, 6), "v": (6, 3)},
        SEQUENCE,
        [(6, [1, 1, 1, 1])],
    ),
    "scan that makes": (
        lambda p, x: lax.map(lambda x: x @ p["w"], x.swapaxes(0, 1)) @ p["v"],
        {"w": (4, 6), "v": (6, 3)},
        SEQUENCE,
        PLAIN,
    ),
    "scan of layers": (
        lambda p, x: (
            lax.scan(lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None), x @ p["w"], p["l"])[0]
            @ p["v"]
        ),
        {"w": (4, 6), "l": [(3, 6, 5), (3, 5, 6)], "v": (6, 3)},
        ROW,
        [(5, [1, 1]), (6, [1, 1, 1, 1])],
    ),
    "while": (
        *between(
            lambda h: lax.while_loop(
                lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, h)
            )[1]
        ),
        PLAIN,
    ),
    "fori_loop": (
        *between(lambda h: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h) * i, h)),
        PLAIN,
    ),
    "cond": (
        lambda p, x: (
            lax.cond(x[0, 0] > 0, lambda x: x @ p["a"], lambda x: jnp.tanh(x @ p["b"]), x) @ p["v"]
        ),
        {"a": (4, 6), "b": (4, 6), "v": (6, 3)},
        ROW,
        [(6, [1, 1, 1])],
    ),
    "switch": (
        *between(lambda h, i: lax.switch(i, [jnp.tanh, jnp.zeros_like, lambda h: h[:, ::-1]], h)),
        np.int32(2),
        [(3, [2, 2])],
    ),
    "platform_dependent": (
        *between(lambda h: lax.platform_dependent(h, cpu=jnp.tanh, default=jnp.sin)),
        PLAIN,
    ),
    "custom_jvp": (*between(leaky), PLAIN),
    "custom_vjp": (*between(straight), PLAIN),
    "gradient inside": (
        lambda p, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"]))(x),
        {"w": (4, 6), "v": (6, 3)},
        ROW,
        PLAIN,
    ),
    "dropout": (*between(dropout), "key", PLAIN),
    "noise of a seed": (
        *between(lambda h: h * jax.random.normal(jax.random.key(1), h.shape)),
        PLAIN,
    ),
    "optimization_barrier": (*between(lambda h: lax.optimization_barrier((h, -h))[1]), PLAIN),
}
NETWORKS = SHAPES | INDICES | PRODUCTS | CALLS | MORE


def network(name):
    fn, shapes, *inputs, units = NETWORKS[name]
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))
    made = {str: lambda _: jax.random.key(3), tuple: draw}
    return fn, params, [made.get(type(x), jnp.asarray)(x) for x in inputs], units


def remove_some(groups, params, seed):
    """Masks that remove some units of each group but never all."""
    rng = np.random.default_rng(seed)
    keep = {group.name: rng.permutation(group.size) < rng.integers(1, group.size)
            for group in groups}  # fmt: skip
    return jp.patterns.Coupled(groups).expand(keep, like=params)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_own_what_any_reader_would_say(name):
    fn, params, inputs, units = network(name)
    groups = jp.find_groups(fn, params, *inputs)
    found = [(group.size, [m.indices.shape[1] for m in group.members]) for group in groups]
    assert sorted(found) == sorted(units), groups
    assert all(group.exact for group in groups), groups


CUT = [name for name in NETWORKS if NETWORKS[name][-1]]
# What is cut by the same rule as another network here, for the slow suite.
ALIKE = (
    *("reshape splits twice", "reshape splits what was merged", "pixel unshuffle", "squeeze"),
    *("gather pairs", "roll", "take along positions", "depthwise conv", "outer product"),
    *("grouped conv of one output each", "max pool", "argmax of positions", "sort of positions"),
    *("max of positions", "softmax of positions", "top_k of positions", "matrices in a batch"),
    *("concatenate beside", "scan that makes", "fori_loop", "noise of a seed", "pad with ones"),
    *("scatter-add of ones into some channels", "scatter-add to one channel twice", "any", "tied"),
    *("sums of known channels", "callbacks that watch", "reduction of one's own, of positions"),
    *("largest of positions, about", "top_k along any axis", "cholesky", "inverse"),
    *("eigenvalues", "singular values", "solve from the right", "solve along channels"),
    *("conjugate gradients", "update of some channels", "sum of the hidden", "ragged product"),
    "Fourier transform of positions",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in CUT],
)
def test_units_removed_at_random_leave_the_masked_answer(name):
    fn, params, inputs, _ = network(name)
    masks = remove_some(jp.find_groups(fn, params, *inputs), params, 0)
    small_fn, small = jp.shrink(fn, params, masks)
    masked = jp.apply_masks(params, masks)
    assert_close(*jit(lambda p, q: (small_fn(q, *inputs), fn(p, *inputs)))(masked, small))


DERIVED = ("custom_jvp", "custom_vjp", "remat", "scan of layers")  # rebuilt with their derivatives


@pytest.mark.parametrize(
    "name, seed",
    [
        pytest.param(name, seed, marks=() if name in DERIVED and not seed else pytest.mark.slow)
        for name in CUT
        if name != "while"
        for seed in range(3)
    ],
)
def test_gradients_of_what_is_left_are_those_of_the_masked_network(name, seed):
    fn, params, inputs, _ = network(name)
    masks = remove_some(jp.find_groups(fn, params, *inputs), params, seed)
    small_fn, small = jp.shrink(fn, params, masks)
    masked = jp.apply_masks(params, masks)
    weigh = lambda out: jnp.sum(out * jnp.sin(jnp.arange(out.size)).reshape(out.shape))
    grads = lambda f: jax.grad(lambda p: weigh(f(p, *inputs)))
    want, got = jit(lambda p, q: (grads(fn)(p), grads(small_fn)(q)))(masked, small)
    _, want = jp.shrink(fn, want, masks)
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    assert_close(flat(got), flat(want))


# What stays, and why.


@pytest.mark.parametrize(
    "name, words",
    [
        ("reshape that does not fit", "two ways that do not fit"),
        ("slice of one index", "`slice` at test_graph.py:.*picks this index alone"),
        ("pad inside", "`pad` at test_graph.py:.*needs the whole axis"),
        ("dynamic slice of channels", "`dynamic_slice` at test_graph.py:.*needs the whole axis"),
        ("sort of channels", "`sort` at test_graph.py:.*needs the whole axis"),
        ("max of channels", "`reduce_max` at test_graph.py:.*needs the whole axis"),
        ("concatenate", "`dot_general` at test_graph.py:.*joins it with an axis that stays whole"),
        ("embedding", "`gather` at test_graph.py:.*needs the whole axis"),
        ("dropout", "it is axis 1 of an output"),
        ("scatter to unknown channels", "`scatter-add` at test_graph.py:.*needs the whole axis"),
        ("Fourier transform of channels", "`fft` at test_graph.py:.*needs the whole axis"),
        ("reference to channels", "`get` at test_graph.py:.*needs the whole axis"),
        (
            "callback that computes",
            "`pure_callback` at test_graph.py:.*hands it to the host, whole",
        ),
        ("reduction of one's own, of channels", "`reduce` at test_graph.py:.*needs the whole axis"),
        (
            "cholesky",
            "`cholesky` at test_graph.py:.*needs the whole axis|joins it with an axis that",
        ),
    ],
)
def test_frozen_axes_name_the_operation_and_its_line(name, words):
    fn, params, inputs, _ = network(name)
    text = str(jp.find_groups(fn, params, *inputs))
    assert re.search("frozen:.*" + words, text, re.DOTALL), text


def test_the_largest_magnitude_is_exact_only_without_what_is_zero():
    scale = lambda h: h / jnp.abs(jax.nn.sigmoid(h)).max(1, keepdims=True)
    fn, shapes, inputs = between(scale)
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    groups = jp.find_groups(fn, params, jnp.ones(inputs))
    assert not groups[0].exact and "`reduce_max` at test_graph.py" in groups[0].reason


def test_a_reshape_that_transposes_first_moves_channels_along():
    """`vmap` over kernels lays members beside outputs by a reshape with `dimensions`."""
    one = functools.partial(lax.conv_general_dilated, window_strides=(1,), padding="SAME")
    conv = functools.partial(one, dimension_numbers=("NWC", "WIO", "NWC"))
    fn = jax.vmap(lambda p, x: conv(jnp.tanh(conv(x, p["w"])), p["v"]), (0, None))
    draw = np.random.default_rng(0).normal
    params = {"w": jnp.asarray(draw(size=(5, 3, 4, 6))), "v": jnp.asarray(draw(size=(5, 3, 6, 2)))}
    x = jnp.asarray(draw(size=(2, 8, 4)))
    (group,) = jp.find_groups(fn, params, x)
    assert [(m.path, m.axis) for m in group.members] == [("v", 2), ("w", 3)] and group.size == 6
    masks = jp.find_masks(params, 0.5, pattern=jp.patterns.Coupled(jp.find_groups(fn, params, x)))
    assert jp.verify_shrink(fn, params, masks, x) < 1e-5


widen = Primitive("divide_by_width")
widen.def_impl(lambda x: x / x.shape[-1])
widen.def_abstract_eval(lambda x: x)
mlir.register_lowering(widen, mlir.lower_fun(lambda x: x / x.shape[-1], multiple_results=False))


def test_an_operation_without_a_rule_freezes_what_it_touches_and_names_its_line():
    fn, params, x = between(widen.bind)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in params.items()}
    words = r"`divide_by_width` at test_graph.py:\d+ is a primitive without"
    with pytest.warns(UserWarning, match=words):
        groups = jp.find_groups(fn, shapes, jax.ShapeDtypeStruct(x, jnp.float32))
    assert not groups and "`divide_by_width`" in str(groups)


def test_a_rule_of_your_own_says_how_axes_hang_together_and_how_to_compute():
    fn, shapes, x = between(widen.bind)
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda node: isinstance(node, tuple))
    inputs = [jnp.ones(x)]
    couple = lambda at: [at.ins[0]]
    wide = lambda at, x: [x / at.out_shape()[-1]]  # what it was before anything was cut
    for cut, answer in ((None, 4.0), (wide, 2.0)):
        rules = {"divide_by_width": jp.graph.Rule(couple, cut)}
        groups = jp.find_groups(fn, params, *inputs, rules=rules)
        assert [(m.path, m.axis) for m in groups[0].members] == [("v", 0), ("w", 1)]
        keep = {groups[0].name: np.arange(6) < 3}
        masks = jp.patterns.Coupled(groups).expand(keep, like=params)
        small_fn, small = jp.shrink(fn, params, masks, rules=rules)
        np.testing.assert_allclose(small_fn(small, *inputs), answer)


def test_a_rule_of_your_own_goes_before_ours():
    fn, params, x = between(jnp.tanh)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in params.items()}

    def whole(at):
        at.freeze(at.ins[0][1], lambda: "nobody cuts my tanh")
        return [(None, None)]

    rules = {"tanh": jp.graph.Rule(whole)}
    groups = jp.find_groups(fn, shapes, jax.ShapeDtypeStruct(x, jnp.float32), rules=rules)
    assert not groups and "nobody cuts my tanh" in str(groups)
