"""Time the training of seeds side by side in one program against one seed after another.

    python -m benchmarks.parallel_seeds

Networks and training steps are those of the experiments, on random data: ``dense`` holds masks, as
``experiments.lottery_ticket`` does all along, ``gradual`` finds new ones on the way, as methods of
``experiments.compare_methods`` do. Contestants take turns in one process.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import tyro

from benchmarks.common import Task, interleave, machine, paired_ratio, print_table, write_json
from experiments import compare_methods
from experiments.common import data, train
from experiments.common.models import MLP, LeNet5

Network = Literal["digits", "lenet_300_100", "lenet_5"]
NETWORKS: dict[Network, tuple[nn.Module, int]] = {  # and the pixels of its images
    "digits": (MLP((100, 50), 10), 64),
    "lenet_300_100": (MLP((300, 100), 10), 784),
    "lenet_5": (LeNet5(10), 784),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
      networks: what is trained.
      methods: how, by the names of compare_methods.
      seeds: how many seeds train side by side.
      steps: of a training; whole trainings are timed.
      turns: of every contestant.
      batch_size: examples of a step.
      examples: images in memory.
      sparsity: what gradual ends at.
      out: JSON file to write.
    """

    networks: tuple[Network, ...] = tuple(NETWORKS)
    methods: tuple[Literal["dense", "gradual"], ...] = ("dense", "gradual")
    seeds: tuple[int, ...] = (1, 3, 8)
    steps: int = 100
    turns: int = 15
    batch_size: int = 64
    examples: int = 10_000
    sparsity: float = 0.9
    out: Path = Path("results/benchmarks/parallel_seeds.json")


def draw(config: Config, pixels: int) -> data.Dataset:
    """Draw images and labels, few of them to test."""
    rng = np.random.default_rng(0)

    def split(count: int) -> data.Examples:
        images = rng.standard_normal((count, pixels), np.float32)
        return data.Examples(images, rng.integers(0, 10, count).astype(np.int32))

    return data.Dataset(split(config.examples), split(10), split(10))


def trainings(config: Config, network: Network, method: str) -> dict[str, Task]:
    """Build a training of one seed alone, and one of all seeds for each number of them."""
    model, pixels = NETWORKS[network]
    dataset = draw(config, pixels)
    settings = compare_methods.Config(steps=config.steps, batch_size=config.batch_size)
    drawn = [
        compare_methods.make_seed(settings, model, dataset, n) for n in range(max(config.seeds))
    ]
    target = compare_methods.share_out(drawn[0].start, config.sparsity)
    one = functools.partial(
        compare_methods.train_method,
        method=method,
        model=model,
        learning_rate=settings.learning_rate,
    )

    def task(run: Any, *args: Any) -> Task:
        compiled = jax.jit(run).lower(*args).compile()
        return lambda: jax.block_until_ready(compiled(*args))

    together = {
        str(count): task(
            functools.partial(train.side_by_side, one),
            train.stack(drawn[:count]),
            target,
            train.placed(dataset, count, together=True),
        )
        for count in config.seeds
    }
    return {"alone": task(one, drawn[0], target, jax.device_put(dataset)), **together}


def measure(config: Config, network: Network, method: str) -> dict[str, Any]:
    """Time trainings in turns; what a step costs for each seed, and that over a seed alone."""
    tasks = trainings(config, network, method)
    for task in tasks.values():  # the first call pages memory in
        task()
    seconds = interleave(tasks, dict.fromkeys(tasks, config.turns))
    each = {
        name: np.array(taken) / config.steps / (1 if name == "alone" else int(name))
        for name, taken in seconds.items()
    }
    return {
        "network": network,
        "method": method,
        "milliseconds_per_step_and_seed": {n: 1e3 * float(np.median(s)) for n, s in each.items()},
        "over_alone": {
            name: paired_ratio(each[name], each["alone"], seed=0)
            for name in each
            if name != "alone"
        },
    }


def main(config: Config) -> dict[str, Any]:
    cases = [measure(config, network, m) for network in config.networks for m in config.methods]
    rows = [
        [
            f"{case['network']}, {case['method']}",
            f"{case['milliseconds_per_step_and_seed']['alone']:.3f}",
            *(
                "{median:.2f} [{low:.2f}, {high:.2f}]".format(**r)
                for r in case["over_alone"].values()
            ),
        ]
        for case in cases
    ]
    print_table(
        f"A training step and seed, batch {config.batch_size}, {jax.local_device_count()} "
        f"device(s): median of {config.turns} turns [95 % interval]",
        ["network, method", "alone [ms]", *(f"{n} together / alone" for n in config.seeds)],
        rows,
    )
    settings = dataclasses.asdict(config)
    del settings["out"]  # says nothing about the numbers
    devices = {"devices": jax.local_device_count()}
    result = {"machine": machine() | devices, "config": settings, "cases": cases}
    write_json(config.out, result)
    return result


if __name__ == "__main__":
    main(tyro.cli(Config))
