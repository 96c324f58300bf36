"""Models of flax, equinox and haiku with the roles of their axes: see `layout_functions`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from tests.layout_functions import MODELS, Known, X, f32, i32, listed, plain, rms
from tests.zoo import ZOO

__all__ = ("MODELS",)


def linen(module, *inputs, **truth):
    """A flax module; the paths of its params have ``__`` for ``/``."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    truth = {f"params/{path.replace('__', '/')}": uses for path, uses in truth.items()}
    return Known(module.apply, shapes, inputs, truth)


# Recurrences


def recurrence(p, x):
    step = lambda h, x: (jnp.tanh(x @ p["wx"] + h @ p["wh"] + p["b"][None]), None)
    return lax.scan(step, jnp.broadcast_to(p["h0"], (4, 5)), x)[0]


plain(
    "rnn",
    recurrence,
    {"wx": "matmul in out", "wh": "matmul in out", "b": "bias -", "h0": "bias - -"},
    f32(7, 4, 6),
    wx=(6, 5),
    wh=(5, 5),
    b=(5,),
    h0=(1, 5),
)
plain(
    "rnn_by_fori",
    lambda p, x: lax.fori_loop(
        0, 7, lambda t, h: jnp.tanh(x[t] @ p["wx"] + h @ p["wh"]), jnp.zeros((4, 5))
    ),
    {"wx": "matmul in out", "wh": "matmul in out"},
    f32(7, 4, 6),
    wx=(6, 5),
    wh=(5, 5),
)


@listed
def linen_lstm():
    model = ZOO["lstm"]()
    truth = dict.fromkeys(("Dense_0", "Dense_1"), "matmul in out")
    truth |= {
        f"OptimizedLSTMCell_{i}/{a}{b}": "matmul in out" for i in "01" for a in "ih" for b in "ifgo"
    }
    return Known(
        model.fn, model.params, model.inputs, {f"params/{k}/kernel": v for k, v in truth.items()}
    )


@listed
def haiku_lstm():
    import haiku as hk

    def forward(x):
        core = hk.LSTM(5)
        return hk.Linear(3)(hk.dynamic_unroll(core, x, core.initial_state(4))[0][-1])

    return haiku(
        forward, f32(7, 4, 6), {"lstm/linear/w": "matmul in out", "linear/w": "matmul in out"}
    )


def haiku(forward, x, truth):
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(forward))
    return Known(net.apply, jax.eval_shape(net.init, jax.random.key(0), x), (x,), truth)


@listed
def haiku_stack():
    import haiku as hk

    def forward(x):
        x = hk.Conv2D(5, 3)(x).mean((1, 2))
        x = hk.experimental.layer_stack(3)(lambda h: jnp.tanh(hk.Linear(5)(h)))(x)
        return hk.Linear(2)(x)

    stack = "__layer_stack_no_per_layer/linear"
    truth = {
        "conv2_d/w": "conv window window in out",
        "linear/w": "matmul in out",
        f"{stack}/w": "matmul layer in out",
        f"{stack}/b": "bias layer -",
    }
    return haiku(forward, f32(4, 8, 8, 3), truth)


# flax


@listed
def linen_dense():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(10)(x))
            x = nn.DenseGeneral((3, 5))(x)
            x = nn.DenseGeneral(7, axis=(-2, -1))(x)
            return nn.LayerNorm()(x)

    return linen(
        Net(),
        X,
        Dense_0__kernel="matmul in out",
        Dense_0__bias="bias -",
        DenseGeneral_0__kernel="matmul in out out",
        DenseGeneral_0__bias="bias - -",
        DenseGeneral_1__kernel="matmul in in out",
        LayerNorm_0__scale="gain -",
    )


@listed
def linen_conv():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), strides=2)(x)
            x = nn.Conv(12, (3, 3), feature_group_count=3)(x)
            x = nn.Conv(24, (3, 3), feature_group_count=12)(x)
            x = nn.Conv(9, (1, 1))(x)
            x = nn.ConvTranspose(5, (2, 2), strides=(2, 2))(x)
            x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), transpose_kernel=True)(x)
            return nn.ConvLocal(3, (2, 2))(x)

    conv = "conv window window in out"
    return linen(
        Net(),
        f32(2, 8, 8, 3),
        Conv_0__kernel=conv,
        Conv_1__kernel=conv,
        Conv_2__kernel=conv,
        Conv_3__kernel=conv,
        ConvTranspose_0__kernel=conv,
        ConvTranspose_1__kernel="conv window window out in",
        Conv_0__bias="bias -",
        ConvLocal_0__kernel="matmul group group in out",
    )


@listed
def linen_attention():
    model = ZOO["transformer"]()
    head = "MultiHeadDotProductAttention_0"
    truth = {
        f"params/EncoderBlock_{i}/{head}/{n}/kernel": "matmul in out out"
        for i in "01"
        for n in ("query", "key", "value")
    }
    truth |= {f"params/EncoderBlock_{i}/{head}/out/kernel": "matmul in in out" for i in "01"}
    truth |= {f"params/EncoderBlock_{i}/{head}/query/bias": "bias - -" for i in "01"}
    return Known(model.fn, model.params, model.inputs, truth)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.gelu(nn.Dense(12)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(h), None


class Stack(nn.Module):
    axis: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Block, prevent_cse=False) if self.remat else Block
        how = {"variable_axes": {"params": self.axis}, "split_rngs": {"params": True}}
        x, _ = nn.scan(body, length=3, **how)(name="stack")(nn.Dense(10)(x), None)
        return nn.Dense(3)(x)


@listed
def linen_scan():
    return linen(
        Stack(),
        X,
        stack__Dense_0__kernel="matmul layer in out",
        stack__Dense_1__kernel="matmul layer in out",
        stack__Dense_0__bias="bias layer -",
        stack__LayerNorm_0__scale="gain layer -",
    )


@listed
def linen_scan_remat():
    return linen(
        Stack(remat=True),
        X,
        stack__Dense_0__kernel="matmul layer in out",
        stack__LayerNorm_0__scale="gain layer -",
    )


@listed
def linen_scan_axis_1():
    return linen(
        Stack(axis=1),
        X,
        stack__Dense_0__kernel="matmul in layer out",
        stack__Dense_0__bias="bias - layer",
    )


@listed
def linen_vmap_of_examples():
    """One example at a time: nothing of the batch is an axis of a parameter."""
    module = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)
    x = f32(5, 6)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    kernels = {f"params/{n}/kernel": "matmul in out out" for n in ("query", "key", "value")}
    return Known(
        lambda v, x: jax.vmap(lambda one: module.apply(v, one))(x),
        shapes,
        (f32(4, 5, 6),),
        {**kernels, "params/out/kernel": "matmul in in out"},
    )


@listed
def linen_tied():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, 6)
            table = self.param("position", nn.initializers.normal(), (9, 6))
            x = embed(tokens) * 6**0.5 + table[None, :5]
            return embed.attend(nn.Dense(6)(x))

    return linen(
        Net(),
        i32(4, 5),
        Embed_0__embedding="embedding - out + matmul out in",
        position="bias - -",
        Dense_0__kernel="matmul in out",
    )


@listed
def linen_batch_norm():
    model = ZOO["resnet"]()
    return Known(
        model.fn,
        model.params,
        model.inputs,
        {
            "params/BatchNorm_0/scale": "gain -",
            "params/BatchNorm_0/bias": "bias -",
            "params/skip/kernel": "conv window window in out",
        },
    )


def nnx_model(make, run, x, truth):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return Known(lambda p, x: run(nnx.merge(graph, p), x), nnx.to_pure_dict(state), (x,), truth)


@listed
def nnx_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return nnx.Linear(6, 6, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return jnp.tanh(layer(x))

    return nnx_model(make, run, X, {"kernel": "matmul layer in out", "bias": "bias layer -"})


class Expert(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(6, 10, rngs=rngs)
        self.down = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def nnx_members(x, axis):
    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return Expert(rngs)

    run = nnx.vmap(lambda m, x: m(x), in_axes=(0, axis))
    return nnx_model(
        make, run, x, {"up/kernel": "matmul group in out", "down/kernel": "matmul group in out"}
    )


@listed
def nnx_experts_that_see_the_same():
    return nnx_members(X, None)


@listed
def nnx_experts_with_their_own():
    return nnx_members(f32(5, 4, 6), 0)


@listed
def nnx_one_layer_of_members():
    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs):
        return nnx.Linear(6, 10, rngs=rngs)

    run = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))
    return nnx_model(make, run, X, {"kernel": "matmul group? in out"})


@listed
def nnx_lora():
    make = lambda rngs: nnx.LoRA(6, 2, 10, base_module=nnx.Linear(6, 10, rngs=rngs), rngs=rngs)
    truth = {
        "lora_a": "matmul in out",
        "lora_b": "matmul in out",
        "base_module/kernel": "matmul in out",
    }
    return nnx_model(make, lambda m, x: m(x), X, truth)


plain(
    "lora_merged",
    lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
    {"w": "derived in out", "a": "derived in -", "b": "derived - out"},
    w=(6, 10),
    a=(6, 2),
    b=(2, 10),
)
plain(
    "lora_on_captured",
    lambda p, x: x @ (jnp.ones((6, 10)) + p["a"] @ p["b"]),
    {"a": "derived in -", "b": "derived - out"},
    a=(6, 2),
    b=(2, 10),
)


# equinox


def equinox(make, run, x, truth):
    import equinox as eqx

    module = eqx.filter_eval_shape(make, jax.random.key(0))
    shapes, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return Known(lambda p, x: run(eqx.combine(p, static), x), shapes, (x,), truth)


@listed
def equinox_linear():
    import equinox as eqx

    truth = {f"layers/{i}/weight": "matmul out in" for i in range(3)}
    make = lambda key: eqx.nn.MLP(6, 3, 10, 2, key=key)
    return equinox(make, lambda m, x: jax.vmap(m)(x), X, truth)


@listed
def equinox_conv():
    import equinox as eqx

    def make(key):
        conv = functools.partial(eqx.nn.Conv2d, kernel_size=3, key=key)
        up = eqx.nn.ConvTranspose2d(12, 5, 2, stride=2, key=key)
        return eqx.nn.Sequential([conv(3, 6), conv(6, 12, groups=3), up])

    truth = {
        "layers/0/weight": "conv out in window window",
        "layers/1/weight": "conv out in window window",
        "layers/2/weight": "conv out in window window",
    }
    return equinox(make, lambda m, x: jax.vmap(m)(x), f32(2, 3, 8, 8), truth)


@listed
def equinox_conv1d():
    import equinox as eqx

    make = lambda key: eqx.nn.Conv1d(3, 6, 3, key=key)
    return equinox(
        make,
        lambda m, x: jax.vmap(m)(x),
        f32(2, 3, 8),
        {"weight": "conv out in window", "bias": "bias - -"},
    )


@listed
def equinox_attention():
    import equinox as eqx

    make = lambda key: eqx.nn.MultiheadAttention(3, 12, key=key)
    truth = {f"{n}_proj/weight": "matmul out in" for n in ("query", "key", "value", "output")}
    return equinox(make, lambda m, x: jax.vmap(lambda s: m(s, s, s))(x), f32(2, 5, 12), truth)


@listed
def equinox_stack():
    """Layers made by ``filter_vmap``, scanned over: the way of its documentation."""
    import equinox as eqx

    make = lambda key: eqx.filter_vmap(lambda k: eqx.nn.Linear(6, 6, key=k))(
        jax.random.split(key, 3)
    )

    def run(stack, x):
        arrays, static = eqx.partition(stack, eqx.is_array)
        step = lambda h, a: (jax.vmap(eqx.combine(a, static))(h), None)
        return lax.scan(step, x, arrays)[0]

    return equinox(make, run, X, {"weight": "matmul layer out in", "bias": "bias layer -"})


@listed
def equinox_ensemble():
    import equinox as eqx

    make = lambda key: eqx.filter_vmap(lambda k: eqx.nn.MLP(6, 3, 10, 2, key=k))(
        jax.random.split(key, 5)
    )
    member = lambda m, x: jax.vmap(m)(x)
    run = eqx.filter_vmap(member, in_axes=(eqx.if_array(0), None))
    return equinox(make, run, X, {f"layers/{i}/weight": "matmul group out in" for i in range(3)})


@listed
def vmapped_by_hand():
    net = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]
    fn = jax.vmap(net, (0, None))
    return Known(
        fn,
        {"w": f32(5, 6, 10), "v": f32(5, 10, 3)},
        (X,),
        {"w": "matmul group in out", "v": "matmul group in out"},
    )


@listed
def vmapped_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=12)
    one = jax.eval_shape(module.init, jax.random.key(0), f32(2, 5, 6))
    shapes = jax.tree.map(lambda w: f32(7, *w.shape), one)
    kernels = {f"params/{n}/kernel": "matmul group in out out" for n in ("query", "key", "value")}
    truth = {**kernels, "params/out/kernel": "matmul group in in out"}
    return Known(jax.vmap(module.apply, (0, None)), shapes, (f32(2, 5, 6),), truth)


@listed
def vmapped_convolutions():
    conv = lambda k, x: lax.conv_general_dilated(
        x, k, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    fn = jax.vmap(lambda p, x: conv(p["v"], conv(p["w"], x)), (0, None))
    params = {"w": f32(5, 3, 4, 6), "v": f32(5, 3, 6, 2)}
    return Known(
        fn,
        params,
        (f32(2, 8, 4),),
        {"w": "conv group? window in out", "v": "conv group window in out"},
    )


# Devices and derivatives of one's own


@jax.custom_vjp
def linear(x, w):
    return x @ w


linear.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def identity(w):
    return w


identity.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))

plain("custom_vjp", lambda p, x: linear(x, p["w"]), {"w": "matmul in out"}, w=(6, 10))
plain("custom_jvp", lambda p, x: x @ identity(p["w"]), {"w": "matmul in out"}, w=(6, 10))


plain(
    "vmapped_scan",
    jax.vmap(lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["w"])[0], (0, None)),
    {"w": "matmul group layer in out"},
    w=(5, 3, 6, 6),
)


@listed
def shard_map():
    mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec

    def device(w, v, x):
        h = jnp.tanh(x @ w)
        return lax.psum(h @ v, "i")

    run = jax.shard_map(
        device, mesh=mesh, in_specs=(spec(None, "i"), spec("i"), spec()), out_specs=spec()
    )
    return Known(
        lambda p, x: run(p["w"], p["v"], x),
        {"w": f32(6, 10), "v": f32(10, 3)},
        (X,),
        {"w": "matmul in out", "v": "matmul in out"},
    )


@listed
def loss_of_a_decoder():
    """What one trains: a loss of logits, by a scan of remat over cast weights, with penalty."""

    def block(x, q):
        h = rms(x, q["norm"][None, None])
        a = jnp.einsum("btd,dnh->btnh", h, q["q"]), jnp.einsum("btd,dnh->btnh", h, q["k"])
        s = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", *a))
        v = jnp.einsum("btd,dnh->btnh", h, q["v"])
        x = x + jnp.einsum("bnts,bsnh,nhd->btd", s, v, q["o"])
        return x + (jax.nn.silu(x @ q["gate"]) * (x @ q["up"])) @ q["down"], None

    def fn(p, tokens):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        x = half["embed"][tokens]
        x, _ = lax.scan(jax.checkpoint(block), x, half["blocks"])
        logits = x @ half["embed"].T
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1).mean()
        return loss + 1e-4 * sum(jnp.square(w).sum() for w in jax.tree.leaves(p))

    shapes = {"norm": (6,), "q": (6, 2, 5), "k": (6, 2, 5), "v": (6, 2, 5), "o": (2, 5, 6)}
    shapes |= {"gate": (6, 10), "up": (6, 10), "down": (10, 6)}
    params = {"embed": f32(11, 6), "blocks": {k: f32(3, *s) for k, s in shapes.items()}}
    truth = {
        "embed": "embedding - out + matmul out in",
        "blocks/norm": "gain layer -",
        "blocks/q": "matmul layer in out out",
        "blocks/o": "matmul layer in? in? out",
        **{f"blocks/{n}": "matmul layer in out" for n in ("gate", "up", "down")},
    }
    return Known(fn, params, (i32(4, 7),), truth)
