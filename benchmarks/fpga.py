"""What kinds of zeros save of a network in hardware, in adders, and what they cost in accuracy.

    python -m benchmarks.fpga
    python -m benchmarks.fpga --bits 6 4 --base-bits 6 --seeds 1

A small network of the digits in fixed-point numbers, trained with them (rounding with a
straight-through gradient), pruned while it trains, and trained on: single weights, N:M, inputs and
outputs of layers; beside that fewer bits in place of zeros, and networks that were built thin.
da4ml says how many adders each takes, and how many stand behind one another, when every weight is
wires: `jp.export.replay` runs the network on its variables. The hardware gives bit by bit what JAX
gives, on the whole test set. Accuracy is that of the test set, after as many steps for all.
"""

import dataclasses
import functools
import importlib.util
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jaxprune as jp
from benchmarks.common import machine, print_table, write_json
from experiments.common import data

PEER = "da4ml"
PIXEL, HIDDEN, BIAS = 3, 4, 6  # bits behind the point
KERNELS = jp.by_path(r"\d+/kernel")
ADDERS = (-1, -1, -1)  # da4ml's words for adders of any width that cost 1 and take 1


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      widths: neurons of the hidden layers.
      bits: of the weights, sign included, of networks without a mask.
      base_bits: of the weights of networks with one.
      single: fractions of single weights that are removed.
      windows: of how many neighbours along the inputs one stays; 2 leaves 2 of 4.
      whole: fractions of inputs, or outputs, of a layer that are removed.
      steps: of training, before masks change and from then on.
      batch: images of a step.
      seeds: how many trainings.
      out: JSON file to write.
    """

    widths: tuple[int, ...] = (32, 32)
    bits: tuple[int, ...] = (8, 6, 5, 4, 3, 2)
    base_bits: tuple[int, ...] = (6, 4)
    single: tuple[float, ...] = (0.5, 0.75, 0.9, 0.95)
    windows: tuple[int, ...] = (2, 4, 8)
    whole: tuple[float, ...] = (0.5, 0.75)
    steps: tuple[int, int] = (600, 1200)
    batch: int = 128
    seeds: int = 2
    out: Path = Path("results/benchmarks/fpga.json")


class Kind(NamedTuple):
    """One way to save adders.

    Attributes:
      name: in words.
      bits: of a weight.
      sparsity: what `jp.prune` removes.
      settings: of `jp.prune`.
      thin: the fraction of the hidden neurons that it is built without.
    """

    name: str
    bits: int
    sparsity: float = 0.0
    settings: Mapping[str, Any] = types.MappingProxyType({})
    thin: float = 0.0


def kinds(config: Config) -> list[Kind]:
    """All that is compared."""
    found = [Kind("dense", bits) for bits in config.bits]
    hidden = jp.by_path(*(rf"{i}/kernel" for i in range(len(config.widths))))
    for bits in config.base_bits:
        anywhere = {"scope": jp.scopes.across}
        found += [Kind(f"single weights, {s:.0%}", bits, s, anywhere) for s in config.single]
        for m in config.windows:
            n, size = (2, 4) if m == 2 else (1, m)
            settings = {"scope": jp.scopes.windows(size)}
            found.append(Kind(f"{n}:{size} along the inputs", bits, 1 - n / size, settings))
        for s in config.whole:
            rows = {"pattern": jp.patterns.Channels(-2)}
            columns = {"pattern": jp.patterns.Channels(-1), "where": hidden}
            found.append(Kind(f"inputs of a layer, {s:.0%}", bits, s, rows))
            found.append(Kind(f"outputs of a layer, {s:.0%}", bits, s, columns))
            found.append(Kind(f"built without {s:.0%} of them", bits, thin=s))
    return found


def straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """The rounded value, with the gradient of the other."""
    return x + jax.lax.stop_gradient(rounded - x)


def fixed_point(w: jax.Array, bits: int) -> jax.Array:
    """Weights of some bits; the point of a layer follows the size of the weights it has left."""
    kept = jnp.maximum(jnp.sum(w != 0), 1)
    size = jnp.sqrt(jnp.sum(w * w) / kept)
    point = jnp.round(jnp.log2(3 * size + 1e-12)).astype(jnp.int32) - (bits - 1)
    step, most = jnp.ldexp(1.0, point), 2 ** (bits - 1) - 1
    return straight_through(w, jnp.clip(jnp.round(w / step), -most, most) * step)


@jax.jit
def activation(x: jax.Array) -> jax.Array:
    """ReLU, truncated and saturated to 2 bits in front of the point and some behind it.

    The name is that of a rule for hardware, see `price`.
    """
    relu = jnp.clip(x, 0, 4 - 2.0**-HIDDEN)
    return straight_through(relu, jnp.floor(relu * 2**HIDDEN) / 2**HIDDEN)


def network(bits: int, params: Any, x: jax.Array) -> jax.Array:
    """Logits `[n, 10]` of pixels `[n, 64]`, all in fixed-point numbers."""
    for i in range(len(params)):
        layer = params[str(i)]
        bias = straight_through(layer["bias"], jnp.round(layer["bias"] * 2**BIAS) / 2**BIAS)
        x = x @ fixed_point(layer["kernel"], bits) + bias
        x = activation(x) if i + 1 < len(params) else x
    return x


def start(widths: Iterable[int], key: jax.Array) -> Any:
    """Weights as drawn, biases `[1, outputs]` zero."""
    sizes = (64, *widths, 10)
    pairs = list(itertools.pairwise(sizes))
    return {
        str(i): {
            "kernel": jax.random.normal(k, pair) * np.sqrt(2 / pair[0]),
            "bias": jnp.zeros((1, pair[1])),
        }
        for i, (pair, k) in enumerate(zip(pairs, jax.random.split(key, len(pairs)), strict=True))
    }


def pixels(images: np.ndarray) -> np.ndarray:
    """Standardised pixels as signed fixed-point numbers of 1 + 1 + 3 bits."""
    return (
        np.clip(np.round(images * 2**PIXEL), -(2 ** (PIXEL + 1)), 2 ** (PIXEL + 1) - 1) / 2**PIXEL
    )


def train(config: Config, kind: Kind, images: data.Examples, seed: int) -> Any:
    """Params after training, pruning in between, and more training; masks are baked in."""
    key, draw = jax.random.split(jax.random.key(seed))
    params = start((round(n * (1 - kind.thin)) for n in config.widths), key)
    fn, total = functools.partial(network, kind.bits), sum(config.steps)
    inner = optax.adam(optax.cosine_decay_schedule(3e-3, total))
    first, later = config.steps
    schedule = jp.schedules.cubic(
        kind.sparsity, begin=first, end=first + later // 2, every=max(1, later // 20)
    )
    tx = jp.prune(inner, schedule=schedule, **{"where": KERNELS, **kind.settings})
    inputs, targets = jnp.asarray(pixels(images.inputs), jnp.float32), jnp.asarray(images.targets)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = fn(params, inputs[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets[rows]).mean()

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        rows = jax.random.choice(key, len(inputs), (config.batch,))
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    params, state = run((params, tx.init(params)), jax.random.split(draw, total))
    return jp.apply_masks(params, jp.get_masks(state))


def price(fn: Callable[..., Any], params: Any) -> Any:
    """The network as da4ml's logic: `.cost` adders, `.latency` of them behind one another."""
    from da4ml.trace import FixedVariableArray, comb_trace

    ones = np.ones((1, 64), int)
    x = FixedVariableArray.from_kif(ones, ones, PIXEL * ones, hwconf=ADDERS)
    rules = {"activation": hardware_activation}
    return comb_trace(x, jp.export.replay(fn, params, x, rules=rules))


def hardware_activation(x: Any, **_: Any) -> Any:
    """`activation` in da4ml's words."""
    return np.maximum(x, 0).quantize(0, 2, HIDDEN, overflow_mode="SAT", round_mode="TRN")


def measure(config: Config, kind: Kind, digits: data.Dataset, seed: int) -> dict[str, Any]:
    """Train once and price what came out."""
    params = train(config, kind, digits.train, seed)
    fn = functools.partial(network, kind.bits)
    x = pixels(digits.test.inputs)
    logits = np.asarray(fn(params, jnp.asarray(x, jnp.float32)))
    logic = price(fn, params)
    return {
        "accuracy": float(np.mean(logits.argmax(1) == digits.test.targets)),
        "adders": logic.cost,
        "depth": max(logic.latency),
        "equal": bool((logic.predict(x.astype(np.float64)) == logits).all()),
    }


def cases(config: Config) -> list[dict[str, Any]]:
    """One row for each kind: means over the seeds, and how far they lie apart."""
    digits, rows = data.load_digits(), []
    for kind in kinds(config):
        runs = [measure(config, kind, digits, seed) for seed in range(config.seeds)]
        mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
        rows.append({"kind": kind.name, "bits": kind.bits, **mean, "runs": runs})
        print(f"{kind.name}, {kind.bits} bits: {mean['adders']:.0f} adders, {mean['accuracy']:.2%}")
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table; adders beside those of the first row."""
    dense = rows[0]["adders"]
    columns = ["network", "bits", "adders", "of dense", "depth", "accuracy", "seeds", "bit-exact"]
    print_table(
        f"Adders and accuracy after retraining, of {dense:.0f} adders",
        columns,
        [
            [
                row["kind"],
                str(row["bits"]),
                f"{row['adders']:.0f}",
                f"{row['adders'] / dense:.3f}",
                f"{row['depth']:.0f}",
                f"{row['accuracy']:.2%}",
                " ".join(f"{run['accuracy']:.1%}" for run in row["runs"]),
                "yes" if row["equal"] == 1 else "no",
            ]
            for row in rows
        ],
    )


def main(config: Config) -> dict[str, Any]:
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    result: dict[str, Any] = {"machine": machine(), "config": settings, "cases": []}
    if importlib.util.find_spec(PEER) is None:
        print(
            f"Skipped {PEER}, which is not there to price networks. Install the optional peer with "
            "`pip install -e '.[fpga]'` and run this again."
        )
    else:
        result["cases"] = cases(config)
        show(result["cases"])
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
