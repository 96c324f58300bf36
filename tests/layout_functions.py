"""Functions written by hand, with the roles of all axes: what `find_layout` says, or leaves open.

The truth of a leaf is a kind and a role for each axis, as in ``"matmul in out"``; ``-`` is an axis
that has no role, and ``out?`` one whose role may be left open. Several uses are joined by `` + ``.
Sizes are small, uneven and mostly distinct.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.zoo import rounded


class Known(NamedTuple):
    """A function, shapes of its parameters and inputs, and the truth about its parameters."""

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    truth: dict[str, str]


MODELS: dict[str, Callable[[], Known]] = {}


def listed(build):
    MODELS[build.__name__] = build
    return build


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def i32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


X = f32(4, 6)


def plain(name, fn, truth, *inputs, **shapes):
    """Enter a function of a dict of arrays."""
    params = {k: f32(*v) if isinstance(v, tuple) else v for k, v in shapes.items()}
    MODELS[name] = lambda: Known(fn, params, inputs or (X,), truth)


# One matrix product in many spellings


SPELLINGS = {
    "bi,io->bo": ("matmul in out", (6, 10)),
    "bi,oi->bo": ("matmul out in", (10, 6)),
    "bi,ihd->bhd": ("matmul in out out", (6, 3, 5)),
    "bi,hid->bhd": ("matmul out in out", (3, 6, 5)),
    "bi,hdi->hbd": ("matmul out out in", (3, 5, 6)),
}
for _equation, (_roles, _shape) in SPELLINGS.items():
    plain(
        f"einsum_{_equation}",
        functools.partial(
            lambda p, x, equation: jnp.einsum(equation, x, p["w"]), equation=_equation
        ),
        {"w": _roles},
        w=_shape,
    )
plain(
    "einsum_weight_first",
    lambda p, x: jnp.einsum("oi,bi->bo", p["w"], x),
    {"w": "matmul out in"},
    w=(10, 6),
)
plain(
    "einsum_two_inputs",
    lambda p, x: jnp.einsum("bhd,hdo->bo", x, p["w"]),
    {"w": "matmul in in out"},
    f32(4, 3, 5),
    w=(3, 5, 10),
)
plain(
    "einsum_batch",
    lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]),
    {"w": "matmul group in out"},
    f32(3, 4, 6),
    w=(3, 6, 10),
)
plain(
    "einsum_bilinear",
    lambda p, x: jnp.einsum("bi,bj,ijo->bo", x, x, p["w"]),
    {"w": "matmul in in? out"},
    w=(6, 6, 10),
)
plain("transposed", lambda p, x: x @ p["w"].T, {"w": "matmul out in"}, w=(10, 6))
plain(
    "dot_by_hand",
    lambda p, x: lax.dot_general(p["w"], x, (((1,), (1,)), ((), ()))),
    {"w": "matmul out in"},
    w=(10, 6),
)
plain(
    "tensordot",
    lambda p, x: jnp.tensordot(x, p["w"], [[1], [2]]),
    {"w": "matmul out out in"},
    w=(2, 5, 6),
)
plain(
    "broadcast_and_sum",
    lambda p, x: (x[:, :, None] * p["w"][None]).sum(1),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "sum_over_last",
    lambda p, x: (x[:, None] * p["w"][None]).sum(-1),
    {"w": "matmul out in"},
    w=(10, 6),
)
plain(
    "sum_in_two_steps",
    lambda p, x: (x[..., None] * p["w"][None]).sum(1).sum(1),
    {"w": "matmul in in out"},
    f32(4, 3, 6),
    w=(3, 6, 10),
)
plain(
    "sum_of_a_batched_product",
    lambda p, x: (x[..., None] * p["w"][None]).sum(2),
    {"w": "matmul group in out"},
    f32(4, 3, 6),
    w=(3, 6, 10),
)
plain("vector", lambda p, x: x @ p["w"], {"w": "matmul in"}, w=(6,))
plain(
    "vmapped_vector_times_matrix",
    lambda p, x: jax.vmap(lambda row: row @ p["w"])(x),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "vmapped_matrix_times_vector",
    lambda p, x: jax.vmap(lambda row: p["w"] @ row)(x),
    {"w": "matmul out in"},
    w=(10, 6),
)
plain(
    "reshaped_heads",
    lambda p, x: x @ p["w"].reshape(6, 15),
    {"w": "matmul in out out"},
    w=(6, 3, 5),
)
plain(
    "reshaped_outputs",
    lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(6, 3, 5)),
    {"w": "matmul in out"},
    w=(6, 15),
)
plain(
    "reshaped_inputs",
    lambda p, x: x.reshape(4, 6) @ p["w"].reshape(6, 10),
    {"w": "matmul in in out"},
    f32(4, 2, 3),
    w=(2, 3, 10),
)
plain("split_into_in_and_out", lambda p, x: x @ p["w"].reshape(6, 10), {"w": "matmul -"}, w=(60,))
plain(
    "cast",
    lambda p, x: x.astype(jnp.bfloat16) @ (p["w"] * 0.5).astype(jnp.bfloat16),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "masked",
    lambda p, x: x @ (p["w"] * np.tri(6, 10, dtype=np.float32)),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "where_masked",
    lambda p, x: x @ jnp.where(np.tri(6, 10) > 0, p["w"], 0.0),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "reversed_padded",
    lambda p, x: x @ jnp.pad(p["w"][:, ::-1], ((1, 1), (0, 2))),
    {"w": "matmul in out"},
    w=(4, 10),
)
plain(
    "permuted", lambda p, x: x @ p["w"][:, np.array([3, 1, 2, 0])], {"w": "matmul in out"}, w=(6, 4)
)
plain("sliced", lambda p, x: x @ p["w"][:6, 2:5], {"w": "matmul in out"}, w=(8, 10))
plain("one_output_alone", lambda p, x: x @ p["w"][:, 2], {"w": "matmul in -"}, w=(6, 10))
plain("sum_of_weights", lambda p, x: x * p["w"].sum(1)[None], {"w": "derived - -"}, w=(6, 10))
plain(
    "captured_input",
    lambda p, x: x + jnp.arange(12.0).reshape(2, 6) @ p["w"],
    {"w": "matmul in out"},
    f32(2, 10),
    w=(6, 10),
)
plain(
    "written_into_zeros",
    lambda p, x: x @ lax.dynamic_update_slice(jnp.zeros((6, 10)), p["w"], (0, 3)),
    {"w": "matmul in out"},
    w=(6, 5),
)
plain(
    "basis_behind",
    lambda p, x: x @ (p["w"] @ jnp.fft.fft(jnp.eye(5)).real),
    {"w": "matmul in -"},
    w=(6, 5),
)
plain(
    "basis_before",
    lambda p, x: jnp.tanh(x @ (np.tri(6, 5, dtype=np.float32) @ p["w"])),
    {"w": "matmul - out"},
    w=(5, 10),
)
plain(
    "captured_layers",
    lambda p, x: x + jnp.tanh(jnp.arange(12.0).reshape(2, 6) @ p["w"] + p["b"][None]) @ p["v"],
    {"w": "matmul in out", "b": "bias -", "v": "matmul in out"},
    f32(2, 10),
    w=(6, 7),
    b=(7,),
    v=(7, 10),
)
plain(
    "layer_by_one_hot",
    lambda p, x: lax.fori_loop(
        0, 3, lambda i, h: h @ jnp.einsum("l,lio->io", jax.nn.one_hot(i, 3), p["w"]), x
    ),
    {"w": "matmul - in out"},
    w=(3, 6, 6),
)
plain(
    "barrier",
    lambda p, x: x @ lax.optimization_barrier(p)["w"],
    {"w": "matmul in out", "v": "unused - -"},
    w=(6, 10),
    v=(2, 3),
)
plain("unread", lambda p, x: x @ p["w"], {"w": "matmul in out", "v": "unused -"}, w=(6, 10), v=(3,))
plain(
    "given_back",
    lambda p, x: (x @ p["w"], p["t"], p["w"]),
    {"w": "matmul in out", "t": "table - -"},
    w=(6, 10),
    t=(3, 2),
)
plain("matmul_of_data", lambda p, x: (x @ x.T) @ p["w"], {"w": "matmul in out"}, w=(4, 10))


def fused(p, x):
    q, k, v = jnp.split(x @ p["qkv"], 3, -1)
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def fused_weights(p, x):
    q, k, v = jnp.split(p["qkv"], 3, 1)
    return jax.nn.softmax((x @ q) @ (x @ k).T) @ (x @ v) @ p["o"]


def concatenated(p, x):
    q, k, v = jnp.split(x @ jnp.concatenate([p["q"], p["k"], p["v"]], 1), 3, -1)
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def stacked(p, x):
    q, k, v = jnp.einsum("bi,nio->nbo", x, jnp.stack([p["q"], p["k"], p["v"]]))
    return jax.nn.softmax(q @ k.T) @ v @ p["o"]


def three_in_one(p, x):
    q, k, v = jnp.einsum("bi,inhd->nbhd", x, p["qkv"])
    a = jax.nn.softmax(jnp.einsum("bhd,chd->hbc", q, k))
    return jnp.einsum("hbc,chd->bhd", a, v).reshape(4, -1) @ p["o"]


_QKV = {"q": "matmul in out", "k": "matmul in out", "v": "matmul in out", "o": "matmul in out"}
_FUSED = {"qkv": "matmul in out", "o": "matmul in out"}
plain("fused_qkv", fused, _FUSED, qkv=(6, 15), o=(5, 6))
plain("fused_qkv_weights", fused_weights, _FUSED, qkv=(6, 15), o=(5, 6))
plain("concatenated_qkv", concatenated, _QKV, q=(6, 5), k=(6, 5), v=(6, 5), o=(5, 6))
plain("stacked_qkv", stacked, _QKV, q=(6, 5), k=(6, 5), v=(6, 5), o=(5, 6))
plain(
    "three_in_one",
    three_in_one,
    {"qkv": "matmul in out out out", "o": "matmul in out"},
    qkv=(6, 3, 2, 5),
    o=(10, 6),
)


# Layers


def layer(x, w, b):
    return jnp.tanh(x @ w + b[None])


def scan(p, x):
    return lax.scan(lambda h, q: (layer(h, q["w"], q["b"]), None), x, p)[0]


_STACK = {"w": "matmul layer in out", "b": "bias layer -"}
_SHAPES = {"w": (3, 6, 6), "b": (3, 6)}
plain("scan", scan, _STACK, **_SHAPES)
plain(
    "scan_backwards",
    lambda p, x: lax.scan(lambda h, q: (layer(h, *q), None), x, (p["w"], p["b"]), reverse=True)[0],
    _STACK,
    **_SHAPES,
)
plain(
    "scan_of_remat",
    lambda p, x: lax.scan(jax.checkpoint(lambda h, q: (layer(h, *q), None)), x, (p["w"], p["b"]))[
        0
    ],
    _STACK,
    **_SHAPES,
)
plain("remat_of_scan", jax.checkpoint(scan), _STACK, **_SHAPES)
plain("jit_of_scan", jax.jit(scan), _STACK, **_SHAPES)
plain(
    "scan_of_casts",
    lambda p, x: scan(jax.tree.map(lambda w: w.astype(jnp.bfloat16), p), x.astype(jnp.bfloat16)),
    _STACK,
    **_SHAPES,
)
plain(
    "fori_static",
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: layer(h, p["w"][i], p["b"][i]), x),
    _STACK,
    **_SHAPES,
)
plain(
    "fori_traced",
    lambda p, x, n: lax.fori_loop(0, n, lambda i, h: layer(h, p["w"][i], p["b"][i]), x),
    _STACK,
    X,
    i32(),
    **_SHAPES,
)
plain(
    "fori_from_traced",
    lambda p, x, n: lax.fori_loop(n, 3, lambda i, h: layer(h, p["w"][i], p["b"][i]), x),
    _STACK,
    X,
    i32(),
    **_SHAPES,
)
plain(
    "fori_from_behind",
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: layer(h, p["w"][2 - i], p["b"][2 - i]), x),
    _STACK,
    **_SHAPES,
)
plain(
    "fori_in_dim",
    lambda p, x: lax.fori_loop(
        0, 3, lambda i, h: layer(h, lax.dynamic_index_in_dim(p["w"], i, 0, False), p["b"][i]), x
    ),
    _STACK,
    **_SHAPES,
)
plain(
    "scan_over_numbers",
    lambda p, x: lax.scan(lambda h, i: (layer(h, p["w"][i], p["b"][i]), None), x, jnp.arange(3))[0],
    _STACK,
    **_SHAPES,
)
plain(
    "fori_over_axis_1",
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: h @ p["w"][:, i], x),
    {"w": "matmul in layer out"},
    w=(6, 3, 6),
)
plain(
    "fori_in_pairs",
    lambda p, x: lax.fori_loop(0, 6, lambda i, h: h @ p["w"][i // 2], x),
    {"w": "matmul layer in out"},
    w=(3, 6, 6),
)
plain(
    "fori_two_axes",
    lambda p, x: lax.fori_loop(0, 3, lambda i, h: h @ p["w"][i, 1], x),
    {"w": "matmul layer? - in out"},
    w=(3, 2, 6, 6),
)
plain(
    "fori_chunks",
    lambda p, x: lax.fori_loop(
        0, 2, lambda i, h: h + lax.dynamic_slice(p["w"], (0, 3 * i), (6, 3)).sum(1)[None] * h, x
    ),
    {"w": "derived - -"},
    w=(6, 6),
)
plain(
    "fori_blocks_of_outputs",
    lambda p, x: lax.fori_loop(
        0, 2, lambda i, h: h + x @ lax.dynamic_slice(p["w"], (0, 3 * i), (6, 3)), jnp.zeros((4, 3))
    ),
    {"w": "matmul in -"},
    w=(6, 6),
)
plain(
    "while",
    lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ p["w"][c[0]]), (0, x)
    )[1],
    {"w": "matmul layer in out"},
    w=(3, 6, 6),
)
plain(
    "while_by_data",
    lambda p, x: lax.while_loop(
        lambda c: c[1].sum() < 3, lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x)
    )[1],
    {"w": "matmul in out"},
    w=(6, 6),
)
plain(
    "python_loop",
    lambda p, x: functools.reduce(lambda h, i: h @ p["w"][i], range(3), x),
    {"w": "matmul - in out"},
    w=(3, 6, 6),
)
plain(
    "unstacked",
    lambda p, x: functools.reduce(jnp.matmul, list(p["w"]), x),
    {"w": "matmul - in out"},
    w=(3, 6, 6),
)
plain(
    "two_scans_over_halves",
    lambda p, x: lax.scan(
        lambda h, w: (h @ w, None),
        lax.scan(lambda h, w: (h @ w, None), x, p["w"][:2])[0],
        p["w"][2:],
    )[0],
    {"w": "matmul layer in out"},
    w=(5, 6, 6),
)


def nested(p, x):
    inner = lambda h, w: (jnp.tanh(h @ w), None)
    return lax.scan(lambda h, ws: (lax.scan(inner, h, ws)[0], None), x, p["w"])[0]


plain("nested_scans", nested, {"w": "matmul layer layer in out"}, w=(2, 3, 6, 6))
plain(
    "nested_scans_of_one_axis",
    lambda p, x: nested({"w": p["w"].reshape(2, 4, 6, 6)}, x),
    {"w": "matmul layer in out"},
    w=(8, 6, 6),
)
plain(
    "scan_over_a_part_of_the_inputs",
    lambda p, x: lax.scan(
        lambda h, q: (h + q[0] @ q[1], None),
        jnp.zeros((4, 10)),
        (x.reshape(4, 2, 3).swapaxes(0, 1), p["w"].reshape(2, 3, 10)),
    )[0],
    {"w": "matmul - out"},
    w=(6, 10),
)
plain(
    "flat_stack",
    lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, p["w"].reshape(3, 6, 6))[0],
    {"w": "matmul - out"},
    w=(18, 6),
)
plain(
    "scan_that_only_transposes",
    lambda p, x: scan({"w": lax.scan(lambda c, w: (c, w.T), 0, p["w"])[1], "b": p["b"]}, x),
    {"w": "matmul layer out in", "b": "bias layer -"},
    **_SHAPES,
)
plain(
    "map_that_only_casts",
    lambda p, x: jnp.einsum("bi,lio->blo", x, lax.map(lambda w: 2 * w, p["w"])),
    {"w": "matmul out in out"},
    w=(3, 6, 10),
)
plain(
    "map_over_outputs",
    lambda p, x: lax.map(lambda row: x @ row, p["w"]),
    {"w": "matmul - in"},
    w=(10, 6),
)
plain(
    "counted_twice",
    lambda p, x: lax.scan(
        lambda c, _: ((c[0] + 2, c[1] @ p["w"][c[0] // 2]), None), (0, x), None, length=3
    )[0][1],
    {"w": "matmul layer in out"},
    w=(3, 6, 6),
)
plain(
    "counted_in_an_array",
    lambda p, x: lax.scan(
        lambda c, _: ((c[0] + 1, c[1] @ p["w"][c[0]][0]), None),
        (jnp.zeros(1, int), x),
        None,
        length=3,
    )[0][1],
    {"w": "matmul layer? in out"},
    w=(3, 6, 6),
)
plain(
    "chosen_by_data",
    lambda p, x: lax.fori_loop(
        0, 3, lambda i, c: (c[0] + (c[1].sum() > 0), c[1] @ p["w"][c[0]]), (0, x)
    )[1],
    {"w": "matmul group in out"},
    w=(3, 6, 6),
)
plain(
    "shared_in_scan",
    lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, None, length=3)[0],
    {"w": "matmul in out"},
    w=(6, 6),
)
plain(
    "weights_in_the_carry",
    lambda p, x: lax.scan(
        lambda c, _: ((c[0], jnp.tanh(c[1] @ c[0])), None), (p["w"], x), None, length=3
    )[0][1],
    {"w": "matmul in out"},
    w=(6, 6),
)
plain(
    "stack_in_the_carry",
    lambda p, x: lax.fori_loop(0, 3, lambda i, c: (c[0], c[1] @ c[0][i]), (p["w"], x))[1],
    {"w": "matmul layer in out"},
    w=(3, 6, 6),
)
plain(
    "rotated_in_the_carry",
    lambda p, x: lax.fori_loop(
        0, 3, lambda i, c: (jnp.roll(c[0], 1, 0), c[1] @ c[0][0]), (p["w"], x)
    )[1],
    {"w": "matmul - in out"},
    w=(3, 6, 6),
)


plain(
    "repeated_in_the_carry",
    lambda p, x: lax.fori_loop(
        0, 3, lambda i, c: (jnp.repeat(c[0][:, :1], 6, 1), c[1] @ c[0]), (p["w"], x)
    )[1],
    {"w": "matmul in - + matmul in out"},
    w=(6, 6),
)


def trained_inside(p, x):
    def step(w, _):
        return w - 0.1 * jax.grad(lambda w: jnp.square(x @ w).sum())(w), None

    return x @ lax.scan(step, p["w"], None, length=2)[0]


plain("trained_inside", trained_inside, {"w": "matmul in? out?"}, w=(6, 10))
plain(
    "cond",
    lambda p, x, i: lax.cond(
        i > 0, lambda w, v: x @ w, lambda w, v: jnp.tanh(x @ v), p["w"], p["v"]
    ),
    {"w": "matmul in out", "v": "matmul in out"},
    X,
    i32(),
    w=(6, 10),
    v=(6, 10),
)
plain(
    "weights_by_cond",
    lambda p, x, i: x @ lax.cond(i > 0, lambda: p["w"], lambda: p["v"].T),
    {"w": "matmul in out", "v": "matmul out in"},
    X,
    i32(),
    w=(6, 10),
    v=(10, 6),
)
plain(
    "python_list",
    lambda p, x: layer(layer(x, p["w"], p["b"]), p["v"], p["c"]),
    {"w": "matmul in out", "b": "bias -", "v": "matmul in out", "c": "bias -"},
    w=(6, 10),
    b=(10,),
    v=(10, 3),
    c=(3,),
)
plain(
    "stacked_inside",
    lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, jnp.stack([p["w"], p["v"]]))[0],
    {"w": "matmul in out", "v": "matmul in out"},
    w=(6, 6),
    v=(6, 6),
)
plain(
    "stacks_concatenated",
    lambda p, x: lax.scan(lambda h, w: (h @ w, None), x, jnp.concatenate([p["w"], p["v"]]))[0],
    {"w": "matmul layer in out", "v": "matmul layer in out"},
    w=(2, 6, 6),
    v=(3, 6, 6),
)


# Experts


plain(
    "experts_side_by_side",
    lambda p, x: jnp.einsum(
        "beo,eod,be->bd",
        jnp.tanh(jnp.einsum("bi,eio->beo", x, p["up"])),
        p["down"],
        jax.nn.softmax(x @ p["router"]),
    ),
    {"router": "matmul in out", "up": "matmul out? in out", "down": "matmul in? in out"},
    router=(6, 4),
    up=(4, 6, 10),
    down=(4, 10, 6),
)


def ragged(p, x):
    best = jnp.argmax(x @ p["router"], -1)
    order, sizes = jnp.argsort(best), jnp.bincount(best, length=3)
    h = jnp.tanh(lax.ragged_dot(x[order], p["up"], sizes))
    return lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]


def dispatched(p, x):
    one_hot = jax.nn.one_hot(jnp.argmax(x @ p["router"], -1), 3)
    h = jnp.tanh(jnp.einsum("ebi,eio->ebo", jnp.einsum("be,bi->ebi", one_hot, x), p["up"]))
    return jnp.einsum("be,ebi->bi", one_hot, jnp.einsum("ebo,eoi->ebi", h, p["down"]))


def gathered(p, x):
    best = jnp.argmax(x @ p["router"], -1)
    return jnp.einsum("bi,bio->bo", x, p["up"][best])


def mixture(p, x):
    h = jnp.einsum("bi,eio->ebo", x, p["up"])
    y = jnp.einsum("ebo,eoi->ebi", jnp.tanh(h), p["down"])
    return jnp.einsum("be,ebi->bi", jax.nn.softmax(x @ p["router"]), y)


_MOE = {"router": "matmul in out", "up": "matmul group in out", "down": "matmul group in out"}
_MOE_SHAPES = {"router": (6, 3), "up": (3, 6, 10), "down": (3, 10, 6)}
plain("experts_ragged", ragged, _MOE, **_MOE_SHAPES)
plain("experts_dispatched", dispatched, _MOE, **_MOE_SHAPES)
plain(
    "experts_looked_up",
    gathered,
    {"router": "matmul in out", "up": "matmul group in out"},
    router=(6, 3),
    up=(3, 6, 10),
)
plain(
    "experts_one_by_one",
    lambda p, x: lax.fori_loop(0, 3, lambda e, y: y + x @ p["up"][e], jnp.zeros((4, 10))),
    {"up": "matmul layer in out"},
    up=(3, 6, 10),
)
plain(
    "experts_in_layers",
    lambda p, x: lax.scan(lambda h, q: (h + mixture(q, h), None), x, p)[0],
    {
        "router": "matmul layer in out",
        "up": "matmul layer group in out",
        "down": "matmul layer group in out",
    },
    router=(2, 6, 3),
    up=(2, 3, 6, 10),
    down=(2, 3, 10, 6),
)
plain(
    "heads_with_gates",
    lambda p, x: jnp.einsum("bhd,hde->bhe", jnp.einsum("bi,ihd->bhd", x, p["q"]), p["gate"]),
    {"q": "matmul in out? out", "gate": "matmul group in out"},
    q=(6, 3, 5),
    gate=(3, 5, 5),
)


# What is looked up


plain(
    "embedding",
    lambda p, t: p["table"][t] @ p["w"],
    {"table": "embedding - out", "w": "matmul in out"},
    i32(4, 5),
    table=(11, 6),
    w=(6, 3),
)
plain(
    "codebook",
    lambda p, x: x @ p["codes"][p["index"]],
    {"codes": "embedding -", "index": "derived - -"},
    codes=(16,),
    index=i32(6, 10),
)
plain(
    "embedding_taken",
    lambda p, t: jnp.take(p["table"], t, axis=0) @ p["w"],
    {"table": "embedding - out", "w": "matmul in out"},
    i32(4, 5),
    table=(11, 6),
    w=(6, 3),
)
plain(
    "embedding_along_axis_1",
    lambda p, t: p["table"][:, t].T @ p["w"],
    {"table": "embedding out -", "w": "matmul in out"},
    i32(4),
    table=(6, 11),
    w=(6, 3),
)
plain(
    "embedding_one_hot",
    lambda p, t: jax.nn.one_hot(t, 11) @ p["table"],
    {"table": "matmul in out"},
    i32(4, 5),
    table=(11, 6),
)
plain(
    "embedding_bag",
    lambda p, t: p["table"][t].sum(1) @ p["w"],
    {"table": "embedding - out", "w": "matmul in out"},
    i32(4, 5),
    table=(11, 6),
    w=(6, 3),
)
plain(
    "embedding_normed",
    lambda p, t: jax.nn.standardize(p["table"][t]) * p["g"][None, None],
    {"table": "embedding - out", "g": "gain -"},
    i32(4, 5),
    table=(11, 6),
    g=(6,),
)
plain(
    "matrix_factorization",
    lambda p, u, i: (p["users"][u] * p["items"][i]).sum(-1),
    {"users": "embedding - out?", "items": "embedding - out?"},
    i32(4),
    i32(4),
    users=(11, 6),
    items=(9, 6),
)
plain(
    "positions",
    lambda p, x: jnp.tanh(x + p["position"][None, :4]),
    {"position": "bias - -"},
    f32(2, 4, 6),
    position=(9, 6),
)
plain(
    "position_by_index",
    lambda p, x, t: x + lax.dynamic_slice_in_dim(p["position"], t, 4)[None],
    {"position": "embedding - out"},
    f32(2, 4, 6),
    i32(),
    position=(9, 6),
)
plain(
    "class_token",
    lambda p, x: jnp.concatenate([jnp.broadcast_to(p["token"], (2, 1, 6)), x], 1) @ p["w"],
    {"token": "bias - - -", "w": "matmul in out"},
    f32(2, 4, 6),
    token=(1, 1, 6),
    w=(6, 3),
)


# What becomes of zeros


plain("softplus", lambda p, x: x @ jax.nn.softplus(p["w"]), {"w": "derived in out"}, w=(6, 10))
plain("exp_gain", lambda p, x: x * jnp.exp(p["s"])[None], {"s": "derived -"}, s=(6,))
plain("tanh", lambda p, x: x @ jnp.tanh(p["w"]), {"w": "matmul in out"}, w=(6, 10))
plain(
    "weight_norm",
    lambda p, x: x @ (p["g"][None] * p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True)),
    {"w": "derived in out", "g": "gain out?"},
    w=(6, 10),
    g=(10,),
)
plain(
    "weight_norm_safe",
    lambda p, x: x @ (p["w"] * lax.rsqrt(jnp.square(p["w"]).sum(0, keepdims=True) + 1e-6)),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "standardized",
    lambda p, x: x @ (p["w"] - p["w"].mean(0, keepdims=True)),
    {"w": "derived in out"},
    w=(6, 10),
)
plain(
    "symmetric",
    lambda p, x: x @ (p["w"] + p["w"].T),
    {"w": "derived in out + derived out in"},
    w=(6, 6),
)
plain(
    "scaled_by_another",
    lambda p, x: x @ (p["w"] * p["g"][None]),
    {"w": "matmul in out", "g": "gain out?"},
    w=(6, 10),
    g=(10,),
)
plain(
    "sum_of_two",
    lambda p, x: x @ (p["w"] + p["v"]),
    {"w": "derived in out", "v": "derived in out"},
    w=(6, 10),
    v=(6, 10),
)
plain("rounded", lambda p, x: x @ rounded(p["w"]), {"w": "matmul in out"}, w=(6, 10))
plain(
    "quantized",
    lambda p, x: x @ (jnp.round(p["w"] / p["s"]) * p["s"]),
    {"w": "matmul in out", "s": "derived in? out?"},
    w=(6, 10),
    s=(1, 10),
)
plain(
    "dequantized",
    lambda p, x: x @ (p["w"].astype(jnp.float32) * p["s"]),
    {"w": "matmul in out", "s": "gain in? out?"},
    w=jax.ShapeDtypeStruct((6, 10), jnp.int8),
    s=(1, 10),
)
plain(
    "quantized_by_largest",
    lambda p, x: (
        x @ (jnp.round(p["w"] / jnp.abs(p["w"]).max() * 127) * jnp.abs(p["w"]).max() / 127)
    ),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "straight_through",
    lambda p, x: x @ (p["w"] + lax.stop_gradient(jnp.sign(p["w"]) - p["w"])),
    {"w": "matmul in out"},
    w=(6, 10),
)
plain(
    "softmax_of_weights",
    lambda p, x: x @ jax.nn.softmax(p["w"], 0),
    {"w": "derived in out"},
    w=(6, 10),
)
plain(
    "product_of_weights",
    lambda p, x: x @ (p["a"] @ p["b"]),
    {"a": "derived in -", "b": "derived - out"},
    a=(6, 2),
    b=(2, 10),
)
plain("sorted_weights", lambda p, x: x @ jnp.sort(p["w"], 0), {"w": "derived - -"}, w=(6, 10))
plain("inverse_of_weights", lambda p, x: x @ jnp.linalg.inv(p["w"]), {"w": "derived - -"}, w=(6, 6))
plain(
    "dropped_weights",
    lambda p, x, m: x @ jnp.where(m, p["w"], 0.0),
    {"w": "bias - -"},
    X,
    jax.ShapeDtypeStruct((6, 10), bool),
    w=(6, 10),
)


def with_penalty(p, x):
    loss = jnp.square(jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"]).mean()
    return (
        loss
        + 1e-4 * sum(jnp.square(w).sum() for w in jax.tree.leaves(p))
        + jnp.abs(p["only"]).sum()
    )


plain(
    "penalty",
    with_penalty,
    {"w": "matmul in out", "b": "bias -", "v": "matmul in out", "only": "derived - -"},
    w=(6, 10),
    b=(10,),
    v=(10, 3),
    only=(2, 2),
)


# Norms, gains, and what looks like a contraction


def rms(x, g):
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * g


plain(
    "rms_norm",
    lambda p, x: rms(x, p["g"]) @ p["w"],
    {"g": "gain - -", "w": "matmul in out"},
    f32(4, 6),
    g=(1, 6),
    w=(6, 3),
)
plain(
    "gain_and_its_mean",
    lambda p, x: x * p["g"][None] - (x * p["g"][None]).mean(-1, keepdims=True),
    {"g": "gain - + matmul in"},
    g=(6,),
)


def centred(h):
    return h - h.mean(-1, keepdims=True)


plain(
    "gain_then_centred",
    lambda p, x: centred(x * p["g"][None]),
    {"g": "gain -"},
    g=(6,),
)
plain(
    "gain_then_pooled",
    lambda p, x: (x * p["g"][None, None]).mean(1),
    {"g": "gain -"},
    f32(2, 4, 6),
    g=(6,),
)
