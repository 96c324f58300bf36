"""Lottery tickets: iterative magnitude pruning with rewinding, next to its controls."""

import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro
from tqdm import tqdm

import jaxprune as jp
from experiments.common import data, figures, parallel, processes, programs, results, runs, training
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
      parallel_seeds: whether the seeds of a level and condition train side by side in one program;
        auto does where that was measured to be faster. Results are the same but for float rounding.
      eval_every: steps from one look at the validation set to the next (digits 10, mnist 100, or
        what they have in common with steps and rewind_step).
      out: run folder (results/lottery_ticket_DATASET).
      peers: other processes that share the run.

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
    parallel_seeds: Literal["auto", "on", "off"] = "auto"
    eval_every: int | None = None
    out: Path | None = None
    peers: Annotated[processes.Peers, tyro.conf.arg(name="")] = processes.ALONE


def main(config: Config) -> runs.Record | None:
    """Run the experiment, or what is left of it, and print, draw and return its summary.

    Of several processes the first does so, when all have done their share.
    """
    settings = resolve(config)
    with processes.running(settings.peers, settings.out, recorded(settings)) as (share, records):
        planned = plan(settings)
        finished = {run_of(record) for record in records}
        mine = [run for run in planned if share.has(run[0])]

        with tqdm(total=len(mine), initial=len(finished & set(mine)), unit="run") as bar:
            for record in run_all(settings, mine, finished):
                runs.append_record(settings.out, record, share.part)
                bar.set_postfix_str(
                    "{condition} {level} of seed {seed}".format(**record), refresh=False
                )
                bar.update()

        if share.index:
            return None
        return report(settings, processes.gather(settings.out, planned, run_of, settings.peers))


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
        ("parallel_seeds", s.parallel_seeds in ("auto", "on", "off"), "must be auto, on or off"),
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
    bad = [f"`{name}={getattr(s, name)!r}` {wanted}" for name, good, wanted in checks if not good]
    return bad + processes.problems(s.peers)


def recorded(settings: Config) -> runs.Record:
    """Settings that the results depend on, as JSON types; neither where nor by whom is one."""
    fields = dataclasses.asdict(settings)
    del fields["out"], fields["peers"]
    return {**fields, "data_path": settings.data_path and str(settings.data_path)}


def plan(settings: Config) -> list[tuple[int, int, str]]:
    """List all training runs as (seed, level, condition), in the order in which they are made."""
    pruned = itertools.product(range(1, settings.levels + 1), ("ticket", *settings.controls))
    trials = [(0, "dense"), *pruned]
    seeds = range(settings.seeds)
    if together(settings):
        return [(seed, *trial) for trial in trials for seed in seeds]
    return [(seed, *trial) for seed in seeds for trial in trials]


def run_of(record: runs.Record) -> tuple[int, int, str]:
    """Name the training run that a record tells of."""
    return record["seed"], record["level"], record["condition"]


def together(settings: Config) -> bool:
    """Decide whether the seeds of a level and condition train side by side.

    What `auto` goes by is `python -m benchmarks.parallel_seeds`, on two busy CPU cores: a step
    takes a seed of eight 1.07 times as long as one alone (95 % interval 0.90 to 1.18) with the
    network of the digits, one of three 1.08 times (1.04 to 1.42) with LeNet-300-100. Together,
    seeds share what a step costs whatever its size. That is little here, and should be most of it
    on an accelerator, where it has not been measured.
    """
    if settings.parallel_seeds != "auto":
        return settings.parallel_seeds == "on"
    return jax.default_backend() != "cpu"


def run_all(
    settings: Config, planned: list[tuple[int, int, str]], finished: set[tuple[int, int, str]]
) -> Iterator[runs.Record]:
    """Train what is not ``finished``, all seeds side by side or one seed after another."""
    missing = [run for run in planned if run not in finished]
    numbers = sorted({seed for seed, *_ in planned})
    groups = [numbers] if together(settings) else [[number] for number in numbers]
    dataset = load(settings, len(numbers)) if missing else None
    for group in groups:
        if any(seed in group for seed, *_ in missing):
            yield from run_seeds(settings, dataset, group, finished)


def load(settings: Config, side_by_side: int) -> data.Dataset:
    """Load the dataset onto the device, or onto those that share the seeds."""
    mnist = settings.dataset == "mnist"
    dataset = data.load_mnist(settings.data_path) if mnist else data.load_digits()
    if together(settings):
        return parallel.everywhere(dataset, side_by_side)
    return jax.device_put(dataset)


class Seed(NamedTuple):
    """What belongs to a seed.

    Attributes:
      number: counted from 0.
      start: weights that its tickets are rewound to.
      before: examples of each batch up to the step that they are rewound to, `[evaluations, steps
        between them, batch size]`.
      after: those from there on.
      key: for what its controls draw.
    """

    number: int
    start: Any
    before: jax.Array
    after: jax.Array
    key: jax.Array

    def key_of(self, level: int, control: str) -> jax.Array:
        """Give the key of one of its controls."""
        return jax.random.fold_in(jax.random.fold_in(self.key, level), CONTROLS.index(control))


def run_seeds(
    settings: Config,
    dataset: data.Dataset,
    numbers: list[int],
    finished: set[tuple[int, int, str]],
) -> Iterator[runs.Record]:
    """Find the tickets of some seeds, level after level, and train the controls of each.

    A training run depends on its seed, level and condition, and on the tickets of the levels
    before. So a run that was killed goes on with the numbers that it would have had. Seeds that
    train side by side do so all of them, even if only one is not ``finished``.

    Yields:
      A record for each training run that is not ``finished``.
    """
    model = MLP(WIDTHS[settings.dataset], classes=10)
    train = functools.partial(
        training.train_seeds,
        together=together(settings),
        data=dataset.train,
        validation=dataset.validation,
        model=model,
        learning_rate=settings.learning_rate,
    )

    def draw(key: jax.Array) -> Any:
        return model.init(key, dataset.train.images[:1])["params"]

    group = start_seeds(settings, numbers, draw, train, examples=len(dataset.train.labels))
    for seed in group:
        runs.save_start(settings.out, seed.number, seed.start)

    def fit(starts: list[tuple[Any, Any]]) -> list[training.Outcome]:
        return train([(*start, seed.after) for start, seed in zip(starts, group, strict=True)])

    def tell(condition: str, levels: list[Any], outcomes: list[Any]) -> Iterator[runs.Record]:
        for seed, level, outcome in zip(group, levels, outcomes, strict=True):
            if (seed.number, level.index, condition) not in finished:
                yield {
                    "seed": seed.number,
                    "level": level.index,
                    "remaining": results.remaining(level.masks),
                    "condition": condition,
                    **measure(outcome, settings=settings, model=model, test=dataset.test),
                }

    for levels, outcomes in find_tickets(settings, group, fit, finished):
        index = levels[0].index
        yield from tell(_ticket(index), levels, outcomes)
        for condition in settings.controls if index else ():
            if any((number, index, condition) not in finished for number in numbers):
                starts = []
                for seed, level in zip(group, levels, strict=True):
                    key = seed.key_of(index, condition)
                    starts.append(control(condition, seed.start, level.masks, draw=draw, key=key))
                yield from tell(condition, levels, fit(starts))


def start_seeds(
    settings: Config,
    numbers: list[int],
    draw: Callable[[jax.Array], Any],
    train: Callable[[list[Any]], list[training.Outcome]],
    *,
    examples: int,
) -> list[Seed]:
    """Draw what belongs to each seed, and train up to the step that tickets are rewound to."""
    group = [make_seed(settings, number, draw, examples=examples) for number in numbers]
    if not settings.rewind_step:
        return group
    outcomes = train([(seed.start, jp.dense_masks(seed.start), seed.before) for seed in group])
    return [
        seed._replace(start=outcome.final) for seed, outcome in zip(group, outcomes, strict=True)
    ]


def make_seed(
    settings: Config, number: int, draw: Callable[[jax.Array], Any], *, examples: int
) -> Seed:
    """Draw initial weights, and the order of the examples."""
    init_key, order_key, control_key = jax.random.split(jax.random.key(number), 3)
    order = training.batch_order(
        order_key, examples=examples, steps=settings.steps, batch_size=settings.batch_size
    )
    order = order.reshape(-1, settings.eval_every, settings.batch_size)
    before, after = jnp.split(order, [settings.rewind_step // settings.eval_every])
    return Seed(number=number, start=draw(init_key), before=before, after=after, key=control_key)


def find_tickets(
    settings: Config,
    group: list[Seed],
    fit: Callable[[list[tuple[Any, Any]]], list[training.Outcome]],
    finished: set[tuple[int, int, str]],
) -> Iterator[tuple[list[Any], list[training.Outcome | None]]]:
    """Prune, rewind and train again; a level that is ``finished`` comes from the folder.

    Yields:
      A level of imp for each seed, and how its training went if it took place here.
    """
    levels: list[Any] = [None for _ in group]
    for index in range(settings.levels + 1):
        levels = [
            next_level(settings, seed.start, last) for seed, last in zip(group, levels, strict=True)
        ]
        outcomes: list[Any] = [None for _ in group]
        if all(_is_saved(settings, seed.number, index, finished) for seed in group):
            trained = [runs.load_level(settings.out, seed.number, index)[1] for seed in group]
        else:
            outcomes = fit([(level.ticket, level.masks) for level in levels])
            trained = [outcome.final for outcome in outcomes]
            for seed, level, final in zip(group, levels, trained, strict=True):
                runs.save_level(settings.out, seed.number, index, level.masks, final)
        levels = [
            level._replace(trained=final) for level, final in zip(levels, trained, strict=True)
        ]
        yield levels, outcomes


def next_level(settings: Config, start: Any, last: Any | None) -> Any:
    """Prune and rewind: the level of imp after ``last``, its ticket not trained yet."""
    across = settings.scope == "across"
    levels = jp.imp(
        start,
        lambda ticket, masks: ticket,
        rounds=settings.levels,
        rate=settings.rate,
        rates={} if across else {"out/kernel": settings.output_rate},
        scope=jp.scopes.across if across else jp.scopes.per_leaf,
        start=last and (last.index, last.masks, last.trained),
    )
    return next(levels)


def _is_saved(settings: Config, seed: int, level: int, finished: set[tuple[int, int, str]]) -> bool:
    done = (seed, level, _ticket(level)) in finished
    return done and runs.has_level(settings.out, seed, level)


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
