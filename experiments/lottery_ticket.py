"""Lottery tickets: iterative magnitude pruning with rewinding, next to its controls."""

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro
from tqdm import tqdm

import jaxprune as jp
from experiments.common import data, figures, files, programs, results, runs, training
from experiments.common.models import MLP

CONTROLS = ("reinit", "shuffle", "random")
WIDTHS = {"digits": (100, 50), "mnist": (300, 100)}
DEFAULTS = {
    "digits": {"levels": 8, "rate": 0.36, "output_rate": 0.18, "steps": 400, "seeds": 8},
    "mnist": {"levels": 20, "rate": 0.2, "output_rate": 0.1, "steps": 3000, "seeds": 3},
}
EVAL_EVERY = {"digits": 10, "mnist": 100}


@dataclasses.dataclass(frozen=True)
class Config:
    """Find lottery tickets and compare them with their controls.

    Train, remove the smallest weights of each layer, rewind the others to where they started, and
    again. Where nothing is given, the dataset decides. A run that was stopped goes on with the
    same command.

    Attributes:
      dataset: digits (from scikit-learn, network 64-100-50-10) or mnist (LeNet-300-100).
      data_path: MNIST as one .npz in the layout of keras; downloaded once if left out.
      levels: rounds of pruning after the dense level 0 (digits 8, mnist 20).
      rate: fraction of a layer's remaining weights that a round removes (digits 0.36, mnist 0.2).
      output_rate: the same for the output layer (digits 0.18, mnist 0.1).
      steps: training steps of the dense network (digits 400, mnist 3000).
      seeds: how many seeds, counted from 0 (digits 8, mnist 3).
      batch_size: examples of a training step.
      learning_rate: of Adam.
      controls: what a ticket has to beat: its mask with fresh weights (reinit), its mask permuted
        inside each layer (shuffle), as many weights at random over all layers (random).
      rewind_step: step of the dense training that tickets are rewound to, and go on from.
      scope: which weights compete; across the layers, output_rate says nothing.
      eval_every: steps from one look at the validation set to the next (digits 10, mnist 100, or
        what they have in common with steps and rewind_step).
      out: run folder (results/lottery_ticket_DATASET).

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_, 2019.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    data_path: Path | None = None
    levels: int | None = None
    rate: float | None = None
    output_rate: float | None = None
    steps: int | None = None
    seeds: int | None = None
    batch_size: int = 60
    learning_rate: float = 1.2e-3
    controls: tuple[Literal["reinit", "shuffle", "random"], ...] = CONTROLS
    rewind_step: int = 0
    scope: Literal["per-leaf", "across"] = "per-leaf"
    eval_every: int | None = None
    out: Path | None = None


def main(config: Config) -> runs.Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    settings = resolve(config)
    planned = plan(settings)
    with files.locked(settings.out):
        records = runs.open_run(settings.out, recorded(settings))
        finished = {run_of(record) for record in records}
        seeds = sorted({seed for seed, level, condition in set(planned) - finished})

        with tqdm(total=len(planned), initial=len(finished), unit="run") as bar:
            dataset = load(settings) if seeds else None
            for seed in seeds:
                for record in run_seed(settings, dataset, seed, finished):
                    runs.append_record(settings.out, record)
                    records.append(record)
                    bar.set_postfix_str(
                        "{condition} {level} of seed {seed}".format(**record), refresh=False
                    )
                    bar.update()

        return report(settings, records)


def resolve(config: Config) -> Config:
    """Fill in what the dataset decides, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    name = config.dataset
    if name not in DEFAULTS:
        raise ValueError(f"`dataset={name!r}` is not known. Choose one of {', '.join(DEFAULTS)}.")
    defaults = {**DEFAULTS[name], "out": Path("results") / f"lottery_ticket_{name}"}
    missing = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    settings = dataclasses.replace(config, **missing)
    if settings.eval_every is None:
        every = math.gcd(EVAL_EVERY[name], settings.steps, settings.rewind_step)
        settings = dataclasses.replace(settings, eval_every=every)
    if problems := _problems(settings):
        raise ValueError(f"{'; '.join(problems)}. Change it, or leave it out for the default.")
    return settings


def _problems(settings: Config) -> list[str]:
    """Say which fields have a bad value, and what would be right."""
    s = settings
    unknown = [name for name in s.controls if name not in CONTROLS]
    checks = [
        ("levels", s.levels >= 0, "must be 0 or more"),
        ("rate", 0 < s.rate < 1, "must lie between 0 and 1"),
        ("output_rate", 0 < s.output_rate < 1, "must lie between 0 and 1"),
        ("steps", s.steps > 0, "must be positive"),
        ("seeds", s.seeds > 0, "must be positive"),
        ("batch_size", s.batch_size > 0, "must be positive"),
        ("learning_rate", 0 < s.learning_rate < math.inf, "must be positive and finite"),
        ("controls", not unknown, f"may name {', '.join(CONTROLS)}, but not {unknown}"),
        ("controls", len(set(s.controls)) == len(s.controls), "names a control twice"),
        ("scope", s.scope in ("per-leaf", "across"), "must be per-leaf or across"),
        ("rewind_step", 0 <= s.rewind_step < max(1, s.steps), f"must lie in 0 to {s.steps - 1}"),
        ("eval_every", s.eval_every > 0, "must be positive"),
        (
            "eval_every",
            s.eval_every < 1 or s.steps % s.eval_every == s.rewind_step % s.eval_every == 0,
            f"must divide both steps={s.steps} and rewind_step={s.rewind_step}",
        ),
        (
            "data_path",
            s.data_path is None or s.dataset == "mnist",
            "goes with dataset='mnist'; the digits come with scikit-learn",
        ),
    ]
    return [f"`{name}={getattr(s, name)!r}` {wanted}" for name, good, wanted in checks if not good]


def recorded(settings: Config) -> runs.Record:
    """Settings that the results depend on, as JSON types; where the folder lies is not one."""
    fields = dataclasses.asdict(settings)
    del fields["out"]
    return {**fields, "data_path": settings.data_path and str(settings.data_path)}


def plan(settings: Config) -> list[tuple[int, int, str]]:
    """List all training runs as (seed, level, condition)."""
    pruned = itertools.product(range(1, settings.levels + 1), ("ticket", *settings.controls))
    trials = [(0, "dense"), *pruned]
    return [
        (seed, level, condition) for seed in range(settings.seeds) for level, condition in trials
    ]


def run_of(record: runs.Record) -> tuple[int, int, str]:
    """Name the training run that a record tells of."""
    return record["seed"], record["level"], record["condition"]


def load(settings: Config) -> data.Dataset:
    """Load the dataset onto the device."""
    if settings.dataset == "mnist":
        return jax.device_put(data.load_mnist(settings.data_path))
    return jax.device_put(data.load_digits())


def run_seed(
    settings: Config, dataset: data.Dataset, seed: int, finished: set[tuple[int, int, str]]
) -> Iterator[runs.Record]:
    """Find the tickets of a seed, level after level, and train the controls of each.

    A training run depends on its seed, level and condition, and on the tickets of the levels
    before. So a run that was killed goes on with the numbers that it would have had.

    Yields:
      A record for each training run that is not ``finished``.
    """
    init_key, order_key, control_key = jax.random.split(jax.random.key(seed), 3)
    model = MLP(WIDTHS[settings.dataset], classes=10)
    before, after = batches(settings, order_key, examples=len(dataset.train.labels))
    train = functools.partial(
        training.train,
        data=dataset.train,
        validation=dataset.validation,
        model=model,
        learning_rate=settings.learning_rate,
    )
    tell = functools.partial(measure, settings=settings, model=model, test=dataset.test)

    def draw(key: jax.Array) -> Any:
        return model.init(key, dataset.train.images[:1])["params"]

    start = draw(init_key)
    if len(before):
        start = train(start, jp.dense_masks(start), before).final
    runs.save_start(settings.out, seed, start)

    fit = functools.partial(train, order=after)
    for level, outcome in find_tickets(settings, seed, start, fit, finished):
        here = {"seed": seed, "level": level.index, "remaining": results.remaining(level.masks)}
        if outcome is not None:
            runs.save_level(settings.out, seed, level.index, level.masks, level.trained)
            if (seed, level.index, _ticket(level.index)) not in finished:
                yield {**here, "condition": _ticket(level.index), **tell(outcome)}
        for condition in settings.controls if level.index else ():
            if (seed, level.index, condition) not in finished:
                key = jax.random.fold_in(control_key, level.index)
                key = jax.random.fold_in(key, CONTROLS.index(condition))
                params, masks = control(condition, start, level.masks, draw=draw, key=key)
                yield {**here, "condition": condition, **tell(fit(params, masks))}


def batches(settings: Config, key: jax.Array, *, examples: int) -> tuple[jax.Array, jax.Array]:
    """Order the examples of a seed's training, before the rewind step and after it.

    Returns:
      Two arrays `[evaluations, steps between them, batch size]`.
    """
    order = training.batch_order(
        key, examples=examples, steps=settings.steps, batch_size=settings.batch_size
    )
    order = order.reshape(-1, settings.eval_every, settings.batch_size)
    before, after = jnp.split(order, [settings.rewind_step // settings.eval_every])
    return before, after


def find_tickets(
    settings: Config,
    seed: int,
    start: Any,
    train: Callable[[Any, Any], training.Outcome],
    finished: set[tuple[int, int, str]],
) -> Iterator[tuple[Any, training.Outcome | None]]:
    """Prune, rewind and train again; trained weights that are ``finished`` come from the folder.

    Yields:
      Each level of imp, with how its training went if it took place here.
    """
    outcomes = []

    def fit(ticket: Any, masks: Any) -> Any:
        level = len(outcomes)
        done = (seed, level, _ticket(level)) in finished
        if done and runs.has_level(settings.out, seed, level):
            outcomes.append(None)
            return runs.load_level(settings.out, seed, level)[1]
        outcomes.append(train(ticket, masks))
        return outcomes[-1].final

    across = settings.scope == "across"
    for level in jp.imp(
        start,
        fit,
        rounds=settings.levels,
        rate=settings.rate,
        rates={} if across else {"out/kernel": settings.output_rate},
        scope=jp.scopes.across if across else jp.scopes.per_leaf,
    ):
        yield level, outcomes[level.index]


def _ticket(level: int) -> str:
    return "ticket" if level else "dense"


def control(
    condition: str, start: Any, masks: Any, *, draw: Callable[[jax.Array], Any], key: jax.Array
) -> tuple[Any, Any]:
    """Make what a ticket is compared with.

    Args:
      condition: one of ``CONTROLS``.
      start: the ticket's weights before masking.
      masks: the ticket's masks.
      draw: makes fresh initial weights from a key.
      key: for whatever the control draws.

    Returns:
      Masked weights to start from, and their masks.
    """
    if condition == "reinit":
        start = draw(key)
    elif condition == "shuffle":
        masks = shuffle(masks, key)
    else:
        # Inside the layers a random mask would be a shuffled one; over all layers it also loses
        # how the ticket shares its weights out among them.
        removed = 1 - results.remaining(masks)
        masks = jp.find_masks(
            start, removed, criterion=jp.criteria.random, scope=jp.scopes.across, key=key
        )
    return jp.apply_masks(start, masks), masks


def shuffle(masks: Any, key: jax.Array) -> Any:
    """Permute each mask; every layer keeps its count."""
    leaves, structure = jax.tree.flatten(masks)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            jax.random.permutation(key, mask.reshape(-1)).reshape(mask.shape)
            for key, mask in zip(keys, leaves, strict=True)
        ],
    )


def measure(
    outcome: training.Outcome, *, settings: Config, model: MLP, test: data.Split
) -> runs.Record:
    """Put a training run in figures: the test set at three moments, and the learning curves."""
    every = settings.eval_every
    steps = range(settings.rewind_step + every, settings.steps + 1, every)
    return {
        "accuracy": training.accuracy(outcome.final, test, model=model),
        "accuracy_early": training.accuracy(outcome.early, test, model=model),
        "accuracy_best": training.accuracy(outcome.best, test, model=model),
        "early_stop_step": steps[int(outcome.losses.argmin())],
        "steps": list(steps),
        "validation_loss": [round(loss, 6) for loss in outcome.losses.tolist()],
        "validation_accuracy": [round(accuracy, 6) for accuracy in outcome.accuracies.tolist()],
    }


def report(settings: Config, records: list[runs.Record]) -> runs.Record:
    """Write the summary and the figures, print the table, return the summary."""
    rows = results.summarise(records)
    steps = records[0]["steps"]
    early_step = steps[training.early_evaluation(len(steps))]
    summary = {"dataset": settings.dataset, "early_step": early_step, "rows": rows}
    accuracy = figures.accuracy_figure(rows, steps=settings.steps, early_step=early_step)
    learning = figures.learning_figure(records)
    runs.write(settings.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    runs.write(settings.out / "accuracy.png", figures.png(accuracy))
    runs.write(settings.out / "learning_curves.png", figures.png(learning))

    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(rows, title=f"{settings.dataset}, seeds: {settings.seeds}"))
    console.print(
        f"Test accuracy in percent after {settings.steps} steps, mean ± std over the seeds, and in "
        f"brackets after {early_step}.\nFigures, metrics and masks: {settings.out}"
    )
    return summary


def table(rows: list[runs.Record], *, title: str) -> rich.table.Table:
    """Lay out a line a level: each condition, and by how much the ticket beats fresh weights."""
    names = results.conditions(rows)
    headings = ["left [%]", *(names or ["dense"])]
    if "reinit" in names:
        headings.append("ticket - reinit\n(worst seed)")
    lines = rich.table.Table(*headings, title=title)
    lines.add_row("100.0", _accuracies(results.row_at(rows, 0, "dense")))
    for level in sorted({row["level"] for row in rows} - {0}):
        shown = [results.row_at(rows, level, name) for name in names]
        cells = [f"{100 * shown[0]['remaining']:.1f}", *map(_accuracies, shown)]
        if "reinit" in names:
            mean, worst = results.difference(rows, level, "reinit")
            cells.append(f"{100 * mean:+.2f} ({100 * worst:+.2f})")
        lines.add_row(*cells)
    return lines


def _accuracies(row: runs.Record) -> str:
    end, early = row["accuracy"], row["accuracy_early"]
    return f"{100 * end['mean']:.2f}±{100 * end['std']:.2f} ({100 * early['mean']:.2f})"


if __name__ == "__main__":
    programs.keep()
    main(tyro.cli(Config))
