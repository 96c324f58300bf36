"""What lies at removed units: where it is divided by, a group is not called exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp

pytestmark = pytest.mark.filterwarnings("ignore:`fn` never reads")  # not all networks have all

RNG = np.random.default_rng(0)
P = {
    name: jnp.asarray(RNG.normal(size=shape), jnp.float32)
    for name, shape in {"w": (5, 8), "s": (8,), "t": (8,), "v": (8, 3)}.items()
}
X = jnp.asarray(RNG.normal(size=(4, 5)), jnp.float32)


def hidden(middle):
    """A function between two matrices that has two vectors of its own."""
    return lambda p, x: middle(x @ p["w"], p["s"][None], p["t"][None]) @ p["v"]


def free(h):
    """What may be anything at a removed unit."""
    return h + h.sum(1, keepdims=True)


@jax.custom_jvp
def upside_down(s):
    return 1 / s


upside_down.defjvp(lambda p, t: (1 / p[0], -t[0] / p[0] ** 2))


def scanned(h, s, t):
    return lax.scan(lambda c, x: (c / s + x, c * t), h * 0 + 1, jnp.stack([h, h]))[0]


def started_at_zero(h, s, t):
    """The sum in the denominator is zero at the start alone, the weights never."""
    step = lambda c, x: (c[0] + x * t, c[1] + jnp.exp(x * s))
    top, bottom = lax.fori_loop(0, 3, lambda _, c: step(c, h), (jnp.zeros_like(h),) * 2)
    return top / bottom


INFINITE = {  # each with the operation that makes the difference
    "a reciprocal": (lambda h, s, t: h * (1 / s), "div"),
    "a quotient": (lambda h, s, t: h / s, "div"),
    "a quotient of anything": (lambda h, s, t: free(h) / s, "div"),
    "a sum of two": (lambda h, s, t: free(h) / (s - t), "div"),
    "complex numbers": (lambda h, s, t: (h * (1 / (s + 1j * t))).real, "div"),
    "complex numbers of anything": (
        lambda h, s, t: (free(h) / lax.complex(s, t)).real,
        "div",
    ),
    "a zero-order hold": (lambda h, s, t: h * (jnp.exp(s * 0.1) - 1) / s, "div"),
    "one without itself": (lambda h, s, t: free(h) / (1 - jnp.exp(-s)), "div"),
    "what is left of a cosine": (lambda h, s, t: h / (jnp.cos(s) - 1), "div"),
    "a power": (lambda h, s, t: h * jnp.abs(s) ** -0.5, "pow"),
    "a whole power": (lambda h, s, t: h * s**-2, "integer_pow"),
    "a power of anything": (lambda h, s, t: h * jnp.abs(s) ** free(h), "pow"),
    "a root below": (lambda h, s, t: h * lax.rsqrt(s * s), "rsqrt"),
    "a remainder": (lambda h, s, t: jnp.fmod(h + 1.0, s), "rem"),
    "modulo": (lambda h, s, t: jnp.mod(h + 1.0, s), "rem"),
    "a logarithm": (lambda h, s, t: h * jnp.log(jnp.abs(s)), "log"),
    "a logarithm of one less": (lambda h, s, t: h * jnp.log1p(-jnp.exp(s)), "log1p"),
    "digamma": (lambda h, s, t: h * lax.digamma(jnp.abs(s)), "digamma"),
    "lgamma": (lambda h, s, t: h * lax.lgamma(jnp.abs(s)), "lgamma"),
    "zeta": (lambda h, s, t: lax.zeta(1.5 + h * h, jnp.abs(s) + 0 * h), "zeta"),
    "the inverse of tanh": (lambda h, s, t: h * jnp.arctanh(jnp.exp(s)), "atanh"),
    "the inverse of cosh": (lambda h, s, t: h * jnp.arccosh(jnp.abs(s)), "acosh"),
    "its own norm": (lambda h, s, t: h / jnp.sqrt((s * s).sum(0, keepdims=True)), "div"),
    "its largest": (lambda h, s, t: free(h) / jnp.abs(s).max(0)[None], "div"),
    "a running sum of rows": (
        lambda h, s, t: free(h) / jnp.cumsum(jnp.stack([s, t])[:, 0], 0)[-1:],
        "div",
    ),
    "both are zero or one is": (
        lambda h, s, t: free(h) / jnp.where(h > 0.1, 1.0, s),
        "div",
    ),
    "one or the other": (lambda h, s, t: h / jnp.where(jnp.sin(h) < 2, s, 1.0), "div"),
    "limits": (lambda h, s, t: free(h) / jnp.clip(s, -1, 1), "div"),
    "a product with what is free": (lambda h, s, t: 1 / (free(h) * s), "div"),
    "the other product": (lambda h, s, t: jax.nn.sigmoid(s) / h, "div"),
    "order of rows": (lambda h, s, t: 1 / jnp.sort(h, 0), "div"),
    "in jit": (jax.jit(lambda h, s, t: free(h) / s), "div"),
    "in remat": (jax.checkpoint(lambda h, s, t: free(h) / s), "div"),
    "in a scan": (scanned, "div"),
    "in a loop": (
        lambda h, s, t: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] / s), (0, h))[
            1
        ],
        "div",
    ),
    "in a branch": (lambda h, s, t: lax.cond(h.sum() > 0, lambda: h / s, lambda: h), "div"),
    "with a derivative of its own": (lambda h, s, t: h * upside_down(s), "div"),
    "a matrix for each": (
        lambda h, s, t: h * jnp.linalg.inv(s[0, :, None, None] * jnp.eye(2)[None])[:, 0, 0][None],
        "triangular_solve",
    ),
}


def cases(table, slow=()):
    """The names of a table; what takes long is for the slow suite."""
    marks = lambda name: pytest.mark.slow if name in slow else ()
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in table])


@cases(INFINITE, slow=["a matrix for each"])
def test_what_is_infinite_without_a_unit_is_not_exact_and_names_the_operation(name):
    middle, primitive = INFINITE[name]
    groups = jp.find_groups(hidden(middle), P, X)
    wrong = [group for group in groups if not group.exact]
    assert wrong or not groups
    assert f"`{primitive}` at test_graph_values.py:" in wrong[0].reason, groups
    assert "is not finite where a unit is removed" in wrong[0].reason


FINITE = {
    "an epsilon": lambda h, s, t: h / (s**2 + 1e-6),
    "an epsilon below a root": lambda h, s, t: h * lax.rsqrt(s * s + 1e-6),
    "an exponential": lambda h, s, t: h / jnp.exp(s),
    "a softplus": lambda h, s, t: h / jax.nn.softplus(s),
    "one more": lambda h, s, t: h * jnp.log1p(jnp.abs(s)),
    "a positive power": lambda h, s, t: h * jnp.abs(s) ** 0.5,
    "zero to nothing": lambda h, s, t: h * s**0,
    "divided by what is not cut": lambda h, s, t: h / jnp.abs(h).sum(1, keepdims=True),
    "a norm": lambda h, s, t: (
        (h - h.mean(0)[None]) * lax.rsqrt(jnp.var(h, 0, keepdims=True) + 1e-5) * s
    ),
    "an angle": lambda h, s, t: h * jnp.arctan2(s, t),
    "a complex epsilon": lambda h, s, t: (h / (s + 1j * t + 1e-3j)).real,
    "a softmax of rows": lambda h, s, t: jax.nn.softmax(h, 0) * s,
    "a guarded quotient": lambda h, s, t: h / jnp.where(s == 0, 1.0, s),
    "a denominator that starts at zero": started_at_zero,
    "a square root of a sum": lambda h, s, t: h / jnp.sqrt(1 + s * s),
    "a remainder of one": lambda h, s, t: jnp.fmod(h, 1.0),
}


@pytest.mark.parametrize("name", FINITE)
def test_what_stays_finite_stays_exact(name):
    groups = jp.find_groups(hidden(FINITE[name]), P, X)
    assert [group.size for group in groups] == [8] and groups[0].exact, groups


def half(groups):
    keep = {group.name: np.arange(group.size) % 2 == 0 for group in groups}
    return jp.patterns.Coupled(groups).expand(keep, like=P)


@cases(FINITE, slow=set(FINITE) - {"a guarded quotient"})
def test_numbers_that_are_followed_are_those_of_the_masked_network(name):
    fn = hidden(FINITE[name])
    assert jp.verify_shrink(fn, P, half(jp.find_groups(fn, P, X)), X) < 1e-5


NEUTRAL = {
    "any": lambda h: h * jnp.any(h > 0.5, 1, keepdims=True),
    "all": lambda h: h * jnp.all(h > -1.5, 1, keepdims=True),
    "parity": lambda h: h * lax.reduce_xor(h > 0.0, (1,))[:, None],
    "bits": lambda h: h * lax.reduce_and((h >= 0).astype(int) - 1 | -1, (1,))[:, None],
    "a product of factors": lambda h: h * jnp.prod(1 + h, 1, keepdims=True),
    "the smallest of large ones": lambda h: (
        h * jnp.exp(-jnp.min(jnp.where(h == 0, jnp.inf, h), 1, keepdims=True))
    ),
}
NEEDED = {
    "any": lambda h: h * jnp.any(h >= 0, 1, keepdims=True),
    "all": lambda h: h * jnp.all(h > 0, 1, keepdims=True),
    "a product": lambda h: h * jnp.prod(h, 1, keepdims=True),
    "the smallest": lambda h: h * jnp.min(h, 1, keepdims=True),
}


@cases(NEUTRAL, slow=set(NEUTRAL) - {"any", "bits"})
def test_what_changes_nothing_in_a_reduction_is_cut(name):
    p = {key: P[key] for key in "wv"}
    fn = lambda p, x: NEUTRAL[name](x @ p["w"]) @ p["v"]
    groups = jp.find_groups(fn, p, X)
    assert [group.size for group in groups] == [8] and groups[0].exact, groups
    masks = jp.patterns.Coupled(groups).expand({"w:1": np.arange(8) % 2 == 0}, like=p)
    assert jp.verify_shrink(fn, p, masks, X) < 1e-5


@pytest.mark.parametrize("name", NEEDED)
def test_what_changes_a_reduction_stays(name):
    p = {key: P[key] for key in "wv"}
    groups = jp.find_groups(lambda p, x: NEEDED[name](x @ p["w"]) @ p["v"], p, X)
    assert not groups and "`reduce_" in str(groups)


@pytest.mark.parametrize("broken", [jnp.nan, -jnp.inf, complex("infj")])
def test_a_difference_that_is_infinite_is_said_to_be(broken):
    net = lambda p, x: (x @ p["w"] + jnp.where(p["s"] == 0, broken, 0)[None]) @ p["v"]
    keep = jnp.arange(8) < 4
    masks = {"w": keep[None], "s": keep, "v": keep[:, None], "t": None}
    whole = lambda p, x: {"out": net(p, x), "large": 1e6 * x, "winner": jnp.argmax(net(p, x).real)}
    assert jp.verify_shrink(whole, P, masks, X) == np.inf


def test_whole_numbers_that_differ_are_a_difference_whatever_is_beside_them():
    rules = {"argmax": jp.graph.Rule(lambda at: [(None,)], lambda at, x: [jnp.zeros(4, int) - 1])}
    net = lambda p, x: (jnp.argmax(x @ p["w"] @ p["v"], 1), 1e6 * x)
    masks = half(jp.find_groups(net, {"w": P["w"], "v": P["v"]}, X))
    assert jp.verify_shrink(net, {"w": P["w"], "v": P["v"]}, masks, X, rules=rules) == 1
