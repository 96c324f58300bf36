"""What carries masks through training beside `prune` and `hold`: a new one needs a row here."""

import jax

import jaxprune as jp
from jaxprune import schedules

SPARSITY = 0.75
EVENTS = {"begin": 0, "end": 4, "every": 2}

# From an optimizer to a transformation with masks.
TRAININGS = {
    "rigl": lambda inner: jp.dynamic.rigl(inner, sparsity=SPARSITY, **EVENTS),
    "set": lambda inner: jp.dynamic.set(
        inner, key=jax.random.key(5), sparsity=SPARSITY, **EVENTS, drop_fraction=1.0, packed=True
    ),
    "straight_through": lambda inner: jp.straight_through(
        inner, schedule=schedules.cubic(SPARSITY, **EVENTS)
    ),
}
SPARSE = ("rigl", "set")  # law 5 holds for their weights; the others stay dense
IDLE = {
    "rigl": lambda inner: jp.dynamic.rigl(inner, sparsity=0, **EVENTS),
    "set": lambda inner: jp.dynamic.set(inner, key=jax.random.key(5), sparsity=0, **EVENTS),
    "straight_through": lambda inner: jp.straight_through(
        inner, schedule=schedules.linear(0.0, **EVENTS)
    ),
}


def takes(training, optimizer):
    """Say whether a training can wrap an optimizer: L-BFGS has no moments that could be reset."""
    return optimizer != "lbfgs" or training not in SPARSE


def wrappers(key=None, **settings):
    """All that carries masks, from an optimizer to a transformation, with the same settings."""
    key = jax.random.key(5) if key is None else key  # no computation at import: processes start so
    ramp = schedules.cubic(SPARSITY, begin=0, end=2, every=2)
    without_layout = {name: value for name, value in settings.items() if name != "layout"}
    return {
        "prune": lambda inner: jp.prune(inner, schedule=ramp, **settings),
        "hold": lambda inner: jp.hold(inner, **without_layout),
        "rigl": lambda inner: jp.dynamic.rigl(inner, sparsity=SPARSITY, **EVENTS, **settings),
        "set": lambda inner: jp.dynamic.set(
            inner, key=key, sparsity=SPARSITY, **EVENTS, **settings
        ),
        "straight_through": lambda inner: jp.straight_through(inner, schedule=ramp, **settings),
    }
