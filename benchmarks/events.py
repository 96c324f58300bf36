"""Time an update at which masks change, for every wrapper, against a magnitude event of ``prune``.

    python -m benchmarks.events

There is no network: gradients are given, so that an update is the inner optimizer and what the
wrapper does. ``event`` is what an update costs beyond one between events, ``plain`` what one
between events costs over the bare optimizer. Contestants take turns in one process.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks.common import Task, interleave, machine, paired_ratio, print_table, write_json

SPARSITY = 0.9
STEPS = 1000  # of the schedules; a measurement starts in their middle


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      weights: of all layers together.
      layers: square kernels that share the weights.
      turns: of every contestant.
      clock: ``cpu`` seconds of all threads, which other people's work disturbs least, or ``wall``.
      seed: of weights and gradients.
      out: JSON file to write.
    """

    weights: int = 4_000_000
    layers: int = 4
    turns: int = 20
    clock: Literal["wall", "cpu"] = "cpu"
    seed: int = 0
    out: Path = Path("results/benchmarks/events.json")


def optimizers(every: int) -> dict[str, optax.GradientTransformation]:
    """Wrappers of the same Adam with the same events."""
    adam = optax.adam(1e-3)
    beat: Any = {"begin": 0, "end": STEPS, "every": every}
    rising = jp.schedules.linear(SPARSITY, **beat)  # every event has something to remove
    return {
        "prune": jp.prune(adam, schedule=rising),
        "straight_through": jp.straight_through(adam, schedule=rising),
        "rigl": jp.dynamic.rigl(adam, sparsity=SPARSITY, **beat),
        "set": jp.dynamic.set(adam, key=jax.random.key(0), sparsity=SPARSITY, **beat),
        "rigl, packed": jp.dynamic.rigl(adam, sparsity=SPARSITY, packed=True, **beat),
    }


def updater(tx: optax.GradientTransformation, params: Any, grads: Any) -> Task:
    """One update after another, each on the params and the state that the last one left."""

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    # Past the middle, where a schedule with a period of half its length sleeps.
    state = optax.tree.set(tx.init(params), count=jnp.int32(STEPS // 2 + 1))
    carry = jax.tree.map(jnp.copy, (params, state))
    run = jax.jit(step, donate_argnums=0).lower(carry, grads).compile()

    def task() -> None:
        nonlocal carry
        carry = run(carry, grads)
        jax.block_until_ready(carry)

    task()  # the first call pages memory in
    return task


def measure(config: Config) -> dict[str, dict[str, float]]:
    """Time all updates in turns; ratios are over the magnitude event, and over bare Adam."""
    size = round((config.weights / config.layers) ** 0.5)
    rng = np.random.default_rng(config.seed)

    def draw() -> dict[str, jax.Array]:
        shape = (size, size)
        return {
            f"layer_{i}": jnp.asarray(rng.normal(size=shape), jnp.float32)
            for i in range(config.layers)
        }

    params, grads = draw(), draw()
    tasks = {"bare": updater(optax.adam(1e-3), params, grads)}
    for name, tx in optimizers(every=1).items():
        tasks[f"{name}, event"] = updater(tx, params, grads)
    for name, tx in optimizers(every=STEPS // 2).items():
        tasks[f"{name}, plain"] = updater(tx, params, grads)
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    times = interleave(tasks, dict.fromkeys(tasks, config.turns), clock)

    def beyond(name: str, base: str) -> np.ndarray:
        return np.subtract(times[name], times[base])

    magnitude = beyond("prune, event", "prune, plain")
    return {
        name: {
            "event": paired_ratio(
                beyond(f"{name}, event", f"{name}, plain"), magnitude, seed=config.seed
            ),
            "plain": paired_ratio(times[f"{name}, plain"], times["bare"], seed=config.seed),
        }
        for name in optimizers(every=1)
    }


def main(config: Config) -> dict[str, Any]:
    ratios = measure(config)
    rows = [
        [name, *(f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for r in pair.values())]
        for name, pair in ratios.items()
    ]
    print_table(
        f"An update of {config.weights:,} weights in {config.layers} layers ({config.clock} "
        f"seconds, Adam): median of {config.turns} turns [95 % interval]",
        ["wrapper", "event / magnitude event", "between events / bare Adam"],
        rows,
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result = {"machine": machine(), "config": settings, "ratios": ratios}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
