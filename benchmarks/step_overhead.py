"""Time a training step of the wrapped optimizer against the bare one.

    python -m benchmarks.step_overhead

Steps between pruning events and steps that are events are measured apart. Blocks of bare and
wrapped steps take turns and are compared pairwise, so that a slow spell of the machine cancels;
``bare again`` is the same program as ``bare`` and says how far a ratio can be trusted.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import tyro
from jax import lax

import jaxprune as jp
from benchmarks.common import Task, interleave, machine, paired_ratio, print_table, write_json

SPARSITY = 0.9
STEPS = 1_000_000_000  # of the schedule; a measurement begins in its middle and never gets far


class MLP(nn.Module):
    """Fully connected network; as it stands, LeNet-300-100."""

    widths: tuple[int, ...] = (300, 100)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images to logits `[batch, 10]`."""
        x = images.reshape(len(images), -1)
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Three 3x3 convolutions and a head, as small as CIFAR-10 networks come."""

    widths: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images `[batch, height, width, channels]` to logits `[batch, 10]`."""
        x = images
        for width in self.widths:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Transformer(nn.Module):
    """Pre-norm encoder that predicts a token at every place."""

    layers: int = 4
    width: int = 256
    vocabulary: int = 256

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens `[batch, places]` to logits `[batch, places, vocabulary]`."""
        x = nn.Embed(self.vocabulary, self.width)(tokens)
        x += self.param("place", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        for _ in range(self.layers):
            x += nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x += nn.Dense(self.width)(hidden)
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network and a batch that looks like its data."""

    model: nn.Module
    inputs: tuple[int, ...]
    labels: tuple[int, ...]
    classes: int
    tokens: bool = False

    def batch(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw inputs and labels at random."""
        key_inputs, key_labels = jax.random.split(key)
        labels = jax.random.randint(key_labels, self.labels, 0, self.classes)
        if self.tokens:
            return jax.random.randint(key_inputs, self.inputs, 0, self.classes), labels
        return jax.random.normal(key_inputs, self.inputs), labels


WORKLOADS = {
    "lenet": Workload(MLP(), (60, 28, 28), (60,), 10),
    "cnn": Workload(CNN(), (64, 32, 32, 3), (64,), 10),
    "transformer": Workload(Transformer(), (8, 128), (8, 128), 256, tokens=True),
    "toy": Workload(MLP(widths=(4,)), (4, 4, 4), (4,), 10),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      workloads: names of networks; ``toy`` is there for tests.
      contestants: names of optimizers beside the bare one; all of them if empty.
      driver: ``step`` calls one jitted step in a Python loop, ``scan`` jits a whole block. State is
        donated either way.
      clock: ``cpu`` seconds of all threads, which other people's work disturbs least, or ``wall``.
      blocks: turns of every contestant.
      block_seconds: how long a block of bare steps should take; the others do as many steps.
      seed: of weights and data.
      out: JSON file to write.
    """

    workloads: tuple[str, ...] = ("lenet", "cnn", "transformer")
    contestants: tuple[str, ...] = ()
    driver: Literal["step", "scan"] = "step"
    clock: Literal["wall", "cpu"] = "cpu"
    blocks: int = 40
    block_seconds: float = 0.3
    seed: int = 0
    out: Path = Path("results/benchmarks/step_overhead.json")


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The contestants. Schedules differ only in how often they are due."""
    adam = optax.adam(1e-3)
    # Measured from just after its middle, a schedule with a period of half its length sleeps.
    between = jp.schedules.cubic(SPARSITY, begin=0, end=STEPS, every=STEPS // 2)
    always = jp.schedules.cubic(SPARSITY, begin=0, end=STEPS, every=1)
    return {
        "bare": adam,
        "bare again": adam,
        "prune": jp.prune(adam, schedule=between),
        "prune, packed": jp.prune(adam, schedule=between, packed=True),
        "hold": jp.hold(adam),
        "hold, packed": jp.hold(adam, packed=True),
        "rigl": jp.dynamic.rigl(adam, sparsity=SPARSITY, begin=0, end=STEPS, every=STEPS // 2),
        "straight_through": jp.straight_through(adam, schedule=between),
        "event": jp.prune(adam, schedule=always),
        "event, packed": jp.prune(adam, schedule=always, packed=True),
    }


def start(tx: optax.GradientTransformation, params: Any) -> Any:
    """Optimizer state in the middle of the schedule, with the masks that belong there."""
    state = tx.init(params)
    if not isinstance(state, jp.PruneState | jp.StraightThroughState):
        return state
    sparsity = float(jp.schedules.cubic(SPARSITY, begin=0, end=STEPS, every=1)(STEPS // 2))
    state = jp.with_masks(state, jp.find_masks(params, sparsity))
    return jax.tree.map(
        lambda node: node._replace(count=jnp.int32(STEPS // 2 + 1)) if pruner(node) else node,
        state,
        is_leaf=pruner,
    )


def pruner(node: Any) -> bool:
    """True for the state that counts the updates."""
    return isinstance(node, jp.PruneState)


def stepper(
    tx: optax.GradientTransformation, workload: Workload
) -> Callable[[Any, Any], tuple[Any, None]]:
    """One training step: ``(params, state), batch -> (params, state), None``."""

    def loss(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = workload.model.apply({"params": params}, batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    def step(carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        seen = (
            jp.forward_params(params, state)
            if isinstance(state, jp.StraightThroughState)
            else params
        )
        updates, state = tx.update(jax.grad(loss)(seen, batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


def block(
    step: Callable[[Any, Any], tuple[Any, None]], carry: Any, batch: Any, steps: int, driver: str
) -> Task:
    """A block of ``steps`` steps that goes on where the last one stopped."""
    carry = jax.tree.map(jnp.copy, carry)  # donated, so nobody else's
    if driver == "scan":

        def many(carry: Any, batch: Any) -> Any:
            return lax.scan(lambda c, _: step(c, batch), carry, length=steps)[0]

        calls = 1
    else:

        def many(carry: Any, batch: Any) -> Any:
            return step(carry, batch)[0]

        calls = steps
    run = jax.jit(many, donate_argnums=0).lower(carry, batch).compile()

    def task() -> None:
        nonlocal carry
        for _ in range(calls):
            carry = run(carry, batch)
        jax.block_until_ready(carry)

    task()  # the first call pages memory in
    return task


def calibrate(config: Config, workload: Workload, params: Any, batch: Any) -> int:
    """Bare steps that fit into a block."""
    tx = optimizers()["bare"]
    task = block(stepper(tx, workload), (params, tx.init(params)), batch, 1, "step")
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < config.block_seconds:
        task()
        steps += 1
    return max(steps, 1)


def measure(config: Config, name: str) -> dict[str, Any]:
    """Compare all contestants on one network."""
    workload = WORKLOADS[name]
    key_params, key_batch = jax.random.split(jax.random.key(config.seed))
    batch = workload.batch(key_batch)
    params = jax.jit(workload.model.init)(key_params, batch[0])["params"]
    steps = calibrate(config, workload, params, batch)
    chosen = ("bare", *(config.contestants or [n for n in optimizers() if n != "bare"]))
    tasks = {
        contestant: block(
            stepper(tx, workload), (params, start(tx, params)), batch, steps, config.driver
        )
        for contestant, tx in optimizers().items()
        if contestant in chosen
    }
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    seconds = interleave(tasks, dict.fromkeys(tasks, config.blocks), clock)
    pairs = [(ours, "bare") for ours in tasks if ours != "bare"]
    pairs += [
        (event, plain)
        for event, plain in (("event", "prune"), ("event, packed", "prune, packed"))
        if event in tasks and plain in tasks
    ]
    ratios = {
        f"{ours} / {base}": paired_ratio(seconds[ours], seconds[base], seed=config.seed)
        for ours, base in pairs
    }
    return {
        "workload": name,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "steps_per_block": steps,
        "bare_milliseconds_per_step": 1e3 * min(seconds["bare"]) / steps,
        "ratios": ratios,
    }


def main(config: Config) -> dict[str, Any]:
    cases = []
    for name in config.workloads:
        cases.append(measure(config, name))
        print(f"{name}: done", flush=True)
    rows = [
        [
            name,
            *(f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in ratios),
        ]
        for name in cases[0]["ratios"]
        for ratios in [[case["ratios"][name] for case in cases]]
    ]
    rows.append(["bare, milliseconds", *(f"{c['bare_milliseconds_per_step']:.2f}" for c in cases)])
    print_table(
        f"Time of a step ({config.clock} seconds, driver {config.driver}, Adam): median of "
        f"{config.blocks} paired blocks [95 % interval]",
        ["ratio", *(f"{case['workload']} ({case['weights']:,})" for case in cases)],
        rows,
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, "cases": cases}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
