"""How long networks take, measured against each other."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.common import interleave, paired_ratio
from experiments.common.runs import Record

BLOCK = 0.01  # seconds of calls in a row, of which only the first finds the caches cold


def call(infer: Callable[[Any, Any], jax.Array], variables: Any, inputs: Any) -> Callable[[], Any]:
    """Compile an inference, and make what runs it and waits for the result."""
    run = jax.jit(infer).lower(variables, inputs).compile()
    variables, inputs = jax.device_put((variables, inputs))
    return lambda: jax.block_until_ready(run(variables, inputs))


def compare(small: Callable[[], Any], dense: Callable[[], Any], *, turns: int) -> Record:
    """Time blocks of calls of a small network and of the dense one in turns.

    Returns:
      ``latency_ms`` of a call of the small network and ``dense_ms`` of the dense one, both medians,
      and ``latency_ratio``: the median ratio of the turns with its 95 % interval.
    """
    per_call = in_turns({"small": small, "dense": dense}, turns=turns)
    return {
        "latency_ms": 1e3 * float(np.median(per_call["small"])),
        "dense_ms": 1e3 * float(np.median(per_call["dense"])),
        "latency_ratio": paired_ratio(per_call["small"], per_call["dense"], seed=0),
    }


def in_turns(calls: dict[str, Callable[[], Any]], *, turns: int) -> dict[str, np.ndarray]:
    """Time blocks of calls in turns; seconds of a call `[turns]`, by name."""
    each = {name: math.ceil(BLOCK / _seconds(run)) for name, run in calls.items()}
    blocks = {name: functools.partial(_repeat, run, each[name]) for name, run in calls.items()}
    seconds = interleave(blocks, dict.fromkeys(blocks, turns))
    return {name: np.array(taken) / each[name] for name, taken in seconds.items()}


def _seconds(run: Callable[[], Any]) -> float:
    """The shortest of three calls."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


def _repeat(run: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        run()
