"""The smallest complete experiment, to copy: magnitude against chance, before any training."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
import rich.table
from matplotlib.figure import Figure

import jaxprune as jp
from experiments.common import data, runner, settings, show, train
from experiments.common.models import MLP

MODEL = MLP((100, 50), 10)
CRITERIA = {"magnitude": jp.criteria.magnitude, "random": jp.criteria.random}
FIELDS = ("criterion", "sparsity", "seed")  # that tell training runs apart


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune a network of the digits before it is trained, by magnitude and at random."""

    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    seeds: int | str = 3
    steps: int = 200
    out: Path = Path("results/template")


def main(config: Config) -> runner.Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    seeds = settings.seed_range(config.seeds)
    settings.refuse(config, [("seeds", seeds, settings.SEEDS), *settings.positive(config, "steps")])
    planned = [(name, s, seed) for name in CRITERIA for s in config.sparsities for seed in seeds]
    with runner.open_run(config.out, settings.recorded(config), FIELDS) as run:
        return report(config, run.fill(planned, functools.partial(train_all, config)))


def train_all(config: Config, missing: list[runner.Key]) -> Iterator[runner.Record]:
    """Train what is missing; a training run depends on its own settings and seed, on no other."""
    digits = jax.device_put(data.load_digits())
    count = len(digits.train.targets)
    for criterion, sparsity, seed in missing:
        keys = jax.random.split(jax.random.key(seed), 3)
        start = MODEL.init(keys[0], digits.train.inputs[:1])["params"]
        order = train.batch_order(keys[1], examples=count, steps=config.steps, batch_size=64)
        masks = jp.find_masks(start, sparsity, criterion=CRITERIA[criterion], key=keys[2])
        params = fit(jp.apply_masks(start, masks), masks, digits.train, order)
        accuracy = train.accuracy(params, test=digits.test, model=MODEL)
        yield dict(zip(FIELDS, (criterion, sparsity, seed), strict=True)) | {"accuracy": accuracy}


@jax.jit
def fit(params: Any, masks: Any, examples: data.Examples, order: jax.Array) -> Any:
    """Train under masks: the whole training is one program."""
    tx = jp.hold(optax.adam(1e-3), masks=masks)
    recipe = train.Recipe(train.learner(MODEL), tx)
    return train.scan(recipe, {"params": params}, tx.init(params), examples, order)[0]["params"]


def accuracy_of(records: list[runner.Record], criterion: str, sparsity: float) -> runner.Record:
    """Gather the seeds of a criterion and sparsity."""
    found = [r for r in records if (r["criterion"], r["sparsity"]) == (criterion, sparsity)]
    return {"accuracy": show.spread([record["accuracy"] for record in found])}


def report(config: Config, records: list[runner.Record]) -> runner.Record:
    """Write the summary and the figure, print the table, return the summary."""
    table = rich.table.Table("criterion", *(f"{100 * s:g} %" for s in config.sparsities))
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    summary = {}
    for name in CRITERIA:
        rows = [accuracy_of(records, name, sparsity) for sparsity in config.sparsities]
        summary[name] = rows
        table.add_row(name, *map(show.percent, rows))
        axes.plot(config.sparsities, [row["accuracy"]["mean"] for row in rows], "o-", label=name)
    axes.set(xlabel="sparsity", ylabel="test accuracy")
    axes.legend()
    show.write(config.out, summary, accuracy=figure)
    show.printed(table, f"Figure and metrics: {config.out}")
    return summary


if __name__ == "__main__":
    runner.start(Config, main)
