"""What several test files need: trees to prune, slow NumPy references, trace counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

# For `.compile` in tests marked `optimized`: undoes the flag of conftest.py, which no setting does.
FULL = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else {}


def tree_of_weights(key, dtype=jnp.float32):
    """A small network: two kernels to prune, biases and a scale to leave alone."""
    a, b, c = jax.random.split(key, 3)
    return {
        "Dense_0": {
            "kernel": jax.random.normal(a, (12, 8), dtype),
            "bias": jax.random.normal(b, (8,), dtype),
        },
        "Dense_1": {"kernel": jax.random.normal(c, (8, 4), dtype), "bias": jnp.zeros(4, dtype)},
        "norm": {"scale": jnp.ones((2, 8), dtype)},
    }


def assert_trees_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def with_old_bits(tree):
    """Packed masks in a tree as earlier versions had them: along the last axis, whatever it is."""

    def old(node):
        if not isinstance(node, jp.Packed):
            return node
        mask = np.asarray(jp.unpack(node))
        wide = mask if node.shape else mask[..., None]
        return node._replace(bits=jnp.asarray(np.packbits(wide, axis=-1)))

    return jax.tree.map(old, tree, is_leaf=lambda node: isinstance(node, jp.Packed))


def slow_keep(scores, count, alive=None):
    """Keep ``count`` of the scores of one competition set, one at a time, as HOUSE says it."""
    flat = [float(s) for s in np.asarray(scores, np.float64).ravel()]
    living = [True] * len(flat) if alive is None else [bool(a) for a in np.asarray(alive).ravel()]

    def rank(i):  # the living first, NaN after every number, then by score, then by position
        missing = np.isnan(flat[i])
        return (not living[i], missing, 0.0 if missing else -flat[i], i)

    chosen = set(sorted(range(len(flat)), key=rank)[:count])
    keep = [i in chosen and living[i] for i in range(len(flat))]
    return np.array(keep, bool).reshape(np.shape(scores))


def fast_if(is_fast, cases):
    """Give cases to parametrise by, tuples or names, of which all but the fast ones are slow."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*row, marks=[pytest.mark.slow] * (not is_fast(*row))) for row in rows]


class TraceCount:
    """Wrap a function to be jitted; ``count`` says how often it has been traced."""

    def __init__(self, f):
        self.f, self.count = f, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.f(*args, **kwargs)


def run(tx, params, steps, grads=lambda p: p, **extra):
    """Train in one scan; give the final params and state, and the history of params and masks."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads(params), state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, jp.get_masks(state))

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)

    (params, state), (all_params, all_masks) = train(params)
    return params, state, all_params, all_masks


def removed_at(masks, step):
    """How many entries of each mask of a history are False at a step."""
    return [int((~np.asarray(m[step])).sum()) for m in jax.tree.leaves(masks)]


def assert_zero_where_removed(params, masks):
    """Law 5: exactly zero, in every leaf, wherever a mask is False."""
    for p, m in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(masks, is_leaf=lambda x: x is None),
        strict=True,
    ):
        if m is not None:
            gone = ~np.broadcast_to(np.asarray(m), p.shape)
            assert (np.asarray(p, np.float64)[gone] == 0.0).all()


def equations_of(jaxpr):
    """All equations of a program, those inside its loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations_of(inner)


@functools.cache
def sums_int8_exactly():
    """Whether onnxruntime sums int8 exactly here: on x86 without VNNI sums of two saturate."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    make, kinds = onnx.helper.make_tensor_value_info, onnx.TensorProto
    node = onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    ends = [make("x", kinds.UINT8, [1, 64])], [make("y", kinds.INT32, [1, 8])]
    w = onnx.numpy_helper.from_array(np.full((64, 8), 127, np.int8), "w")
    graph = onnx.helper.make_graph([node], "sum", *ends, [w])
    opsets = [onnx.helper.make_opsetid("", 13)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": np.full((1, 64), 255, np.uint8)})
    return bool((y == 255 * 127 * 64).all())
