"""Lottery tickets: iterative magnitude pruning with rewinding, next to its controls."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments import lottery_ticket_figures as figures
from experiments.common import data, runner, settings, show, train
from experiments.common.models import MLP
from experiments.common.runner import Record

CONTROLS = ("reinit", "shuffle", "random")
FIELDS = ("seed", "level", "condition")  # that tell training runs apart
PIXELS = {"digits": 64, "mnist": 784}
MODELS = {"digits": MLP((100, 50), 10), "mnist": MLP((300, 100), 10)}
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
      seeds: how many seeds, counted from 0 (digits 8, mnist 3), or a range of them such as 3:6,
        for a part of a run that `python -m experiments.merge` puts together.
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

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis <https://arxiv.org/abs/1803.03635>`_, 2019.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    data_path: Path | None = None
    levels: int | None = None
    rate: float | None = None
    output_rate: float | None = None
    steps: int | None = None
    seeds: int | str | None = None
    batch_size: int = 60
    learning_rate: float = 1.2e-3
    controls: tuple[Literal["reinit", "shuffle", "random"], ...] = CONTROLS
    rewind_step: int = 0
    scope: Literal["per-leaf", "across"] = "per-leaf"
    parallel_seeds: Literal["auto", "on", "off"] = "auto"
    eval_every: int | None = None
    out: Path | None = None


def main(config: Config) -> Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    config = resolve(config)
    with runner.open_run(config.out, settings.recorded(config), FIELDS) as run:
        records = run.fill(plan(config), functools.partial(train_all, config))
        return report(config, records)


def resolve(config: Config) -> Config:
    """Fill in what the dataset decides, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    name = settings.known(config, "dataset", DEFAULTS)
    out = Path("results") / f"lottery_ticket_{name}"
    c = settings.filled_in(config, **DEFAULTS[name], out=out)
    c = settings.filled_in(c, eval_every=math.gcd(EVAL_EVERY[name], c.steps, c.rewind_step))
    divides = c.eval_every < 1 or c.steps % c.eval_every == c.rewind_step % c.eval_every == 0
    unknown = [name for name in c.controls if name not in CONTROLS]
    settings.refuse(
        c,
        [
            ("levels", c.levels >= 0, "must be 0 or more"),
            ("rate", 0 < c.rate < 1, "must lie between 0 and 1"),
            ("output_rate", 0 < c.output_rate < 1, "must lie between 0 and 1"),
            *settings.positive(c, "steps", "batch_size"),
            ("seeds", settings.seed_range(c.seeds), settings.SEEDS),
            ("learning_rate", 0 < c.learning_rate < math.inf, "must be positive and finite"),
            ("controls", not unknown, f"may name {', '.join(CONTROLS)}, but not {unknown}"),
            ("controls", len(set(c.controls)) == len(c.controls), "names a control twice"),
            ("scope", c.scope in ("per-leaf", "across"), "must be per-leaf or across"),
            (
                "parallel_seeds",
                c.parallel_seeds in ("auto", "on", "off"),
                "must be auto, on or off",
            ),
            (
                "rewind_step",
                0 <= c.rewind_step < max(1, c.steps),
                f"must lie in 0 to {c.steps - 1}",
            ),
            *settings.positive(c, "eval_every"),
            (
                "eval_every",
                divides,
                f"must divide both steps={c.steps} and rewind_step={c.rewind_step}",
            ),
            *settings.data_path(c),
        ],
    )
    return c


def plan(config: Config) -> list[tuple[int, int, str]]:
    """List all training runs as (seed, level, condition), in the order in which they are made."""
    pruned = itertools.product(range(1, config.levels + 1), ("ticket", *config.controls))
    trials = [(0, "dense"), *pruned]
    seeds = settings.seed_range(config.seeds)
    if together(config):
        return [(seed, *trial) for trial in trials for seed in seeds]
    return [(seed, *trial) for seed in seeds for trial in trials]


def together(config: Config) -> bool:
    """Decide whether the seeds of a level and condition train side by side.

    What `auto` goes by is `python -m benchmarks.parallel_seeds`, on two busy CPU cores: a step
    takes a seed of eight 1.07 times as long as one alone (95 % interval 0.90 to 1.18) with the
    network of the digits, one of three 1.08 times (1.04 to 1.42) with LeNet-300-100. Together,
    seeds share what a step costs whatever its size. That is little here, and should be most of it
    on an accelerator, where it has not been measured.
    """
    if config.parallel_seeds != "auto":
        return config.parallel_seeds == "on"
    return jax.default_backend() != "cpu"


def train_all(config: Config, missing: list[tuple[int, int, str]]) -> Iterator[Record]:
    """Train what is ``missing``, all seeds side by side or one seed after another."""
    seeds = list(settings.seed_range(config.seeds))
    groups = [seeds] if together(config) else [[seed] for seed in seeds]
    dataset = data.load(config.dataset, config.data_path)
    dataset = train.placed(dataset, len(seeds), together=together(config))
    for group in groups:
        if any(seed in group for seed, *_ in missing):
            yield from train_seeds(config, dataset, group, set(missing))


class Seed(NamedTuple):
    """What belongs to a seed.

    Attributes:
      number: counted from 0.
      start: weights that its tickets are rewound to.
      order: examples of each batch from there on, `[evaluations, steps between, batch size]`.
      key: for what its controls draw.
    """

    number: int
    start: Any
    order: jax.Array
    key: jax.Array


def train_seeds(
    config: Config, dataset: data.Dataset, numbers: list[int], missing: set[tuple[int, int, str]]
) -> Iterator[Record]:
    """Find the tickets of some seeds, level after level, and train the controls of each.

    A training run depends on its seed, level and condition, and on the tickets of the levels
    before. So a run that was killed goes on with the numbers that it would have had. Seeds that
    train side by side do so all of them, even if only one is ``missing``.

    Yields:
      A record for each training run that is ``missing``, and maybe for others.
    """

    def is_missing(level: int, condition: str) -> bool:
        return any((number, level, condition) in missing for number in numbers)

    seeds = start_seeds(config, dataset, numbers)
    levels: list[Any] = [None for _ in seeds]
    for index in range(config.levels + 1):
        levels = [
            next_level(config, seed.start, level) for seed, level in zip(seeds, levels, strict=True)
        ]
        paths = [level_of(config.out, number, index) for number in numbers]
        found = "ticket" if index else "dense"
        if is_missing(index, found) or not all(path.exists() for path in paths):
            starts = [(level.ticket, level.masks) for level in levels]
            outcomes = fit(config, dataset, starts, [seed.order for seed in seeds])
            for path, outcome, level in zip(paths, outcomes, levels, strict=True):
                runner.save(path, outcome.final, level.masks)
            yield from measure(config, dataset.test, seeds, levels, outcomes, condition=found)
        levels = [
            level._replace(trained=runner.load(path)[0])
            for path, level in zip(paths, levels, strict=True)
        ]
        for name in config.controls if index else ():
            if is_missing(index, name):
                starts = [
                    control(config, name, seed, level)
                    for seed, level in zip(seeds, levels, strict=True)
                ]
                outcomes = fit(config, dataset, starts, [seed.order for seed in seeds])
                yield from measure(config, dataset.test, seeds, levels, outcomes, condition=name)


def start_seeds(config: Config, dataset: data.Dataset, numbers: list[int]) -> list[Seed]:
    """Draw initial weights and the order of the examples, and train up to the rewinding step."""
    seeds, before = [], []
    for number in numbers:
        init_key, order_key, control_key = jax.random.split(jax.random.key(number), 3)
        order = train.batch_order(
            order_key,
            examples=len(dataset.train.targets),
            steps=config.steps,
            batch_size=config.batch_size,
        ).reshape(-1, config.eval_every, config.batch_size)
        first, rest = jnp.split(order, [config.rewind_step // config.eval_every])
        seeds.append(Seed(number, draw(config, init_key), rest, control_key))
        before.append(first)
    if config.rewind_step:
        starts = [(seed.start, jp.dense_masks(seed.start)) for seed in seeds]
        outcomes = fit(config, dataset, starts, before)
        seeds = [s._replace(start=o.final) for s, o in zip(seeds, outcomes, strict=True)]
    for seed in seeds:
        runner.save(start_of(config.out, seed.number), seed.start)
    return seeds


def draw(config: Config, key: jax.Array) -> Any:
    """Draw initial weights."""
    return MODELS[config.dataset].init(key, np.zeros((1, PIXELS[config.dataset])))["params"]


def start_of(folder: Path, seed: int) -> Path:
    """Say where the weights lie that every ticket of a seed is rewound to."""
    return folder / f"seed_{seed}" / "start.safetensors"


def level_of(folder: Path, seed: int, level: int) -> Path:
    """Say where the masks of a level lie, and the weights trained under them."""
    return folder / f"seed_{seed}" / f"level_{level:02d}.safetensors"


def next_level(config: Config, start: Any, last: jp.Level | None) -> jp.Level:
    """Prune what ``last`` has trained, and rewind; the first level is dense."""
    across = config.scope == "across"
    return jp.next_level(
        last,
        start,
        rate=config.rate,
        rates={} if across else {"out/kernel": config.output_rate},
        scope=jp.scopes.across if across else jp.scopes.per_leaf,
    )


def control(config: Config, condition: str, seed: Seed, level: jp.Level) -> tuple[Any, Any]:
    """Make what a ticket is compared with: masked weights to start from, and their masks."""
    key = jax.random.fold_in(jax.random.fold_in(seed.key, level.index), CONTROLS.index(condition))
    start, masks = seed.start, level.masks
    if condition == "reinit":
        start = draw(config, key)
    elif condition == "shuffle":
        masks = shuffle(masks, key)
    else:
        # Inside the layers a random mask would be a shuffled one; over all layers it also loses
        # how the ticket shares its weights out among them.
        gone, criterion = jp.sparsity(masks, start), jp.criteria.random
        masks = jp.find_masks(start, gone, criterion=criterion, scope=jp.scopes.across, key=key)
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


class Outcome(NamedTuple):
    """What a training run leaves behind.

    Attributes:
      final: parameters after the last step.
      best: parameters at the evaluation with the lowest validation loss.
      early: parameters at the evaluation nearest to one sixth of the run.
      losses: validation loss at each evaluation.
      accuracies: validation accuracy at each evaluation.
    """

    final: Any
    best: Any
    early: Any
    losses: jax.Array
    accuracies: jax.Array


def fit(
    config: Config, dataset: data.Dataset, starts: list[tuple[Any, Any]], orders: list[jax.Array]
) -> list[Outcome]:
    """Train seeds from params under masks, each on batches of its own."""
    outcomes = train.each_seed(
        train_ticket,
        [(*start, order) for start, order in zip(starts, orders, strict=True)],
        dataset.train,
        dataset.validation,
        together=together(config),
        model=MODELS[config.dataset],
        learning_rate=config.learning_rate,
    )
    return list(outcomes)


def early_evaluation(evaluations: int) -> int:
    """Index of the evaluation nearest to one sixth of a run."""
    return max(1, round(evaluations / 6)) - 1


def train_ticket(
    start: tuple[Any, Any, jax.Array],
    examples: data.Examples,
    validation: data.Examples,
    *,
    model: nn.Module,
    learning_rate: float,
) -> Outcome:
    """Train with Adam under fixed masks and look at the validation set now and then.

    Everything that differs between levels, seeds and conditions is an argument, so they all share
    one compiled program. Nothing is donated: the start may be the weights to rewind to.

    Args:
      start: params; masks, which keep the others zero from the first update on; and the examples
        of each batch, `[evaluations, steps between them, batch size]`.
      examples: what to fit.
      validation: what is looked at at each evaluation.
      model: linen module that gives logits.
      learning_rate: of Adam.
    """
    params, masks, order = start
    recipe = train.Recipe(train.learner(model), jp.hold(optax.adam(learning_rate)))
    early = early_evaluation(len(order))

    def stretch(carry: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        params, state, best, lowest, at_early = carry
        index, batches = inputs
        variables = {"params": params}
        variables, state, _ = train.scan(recipe, variables, state, examples, batches)
        params, logits = variables["params"], recipe.learn(variables, validation.inputs)[0]
        now = train.cross_entropy(logits, validation.targets)
        best = _choose(now < lowest, params, best)
        at_early = _choose(index == early, params, at_early)
        accuracy = (logits.argmax(-1) == validation.targets).mean()
        return (params, state, best, jnp.minimum(now, lowest), at_early), (now, accuracy)

    state = jp.with_masks(recipe.tx.init(params), masks)
    carry, (losses, accuracies) = jax.lax.scan(
        stretch,
        (params, state, params, jnp.array(jnp.inf), params),
        (jnp.arange(len(order)), order),
    )
    final, _, best, _, at_early = carry
    return Outcome(final=final, best=best, early=at_early, losses=losses, accuracies=accuracies)


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def measure(
    config: Config,
    test: data.Examples,
    seeds: list[Seed],
    levels: list[Any],
    outcomes: list[Outcome],
    *,
    condition: str,
) -> Iterator[Record]:
    """Put training runs in figures: the test set at three moments, and the learning curves."""
    steps = range(config.rewind_step + config.eval_every, config.steps + 1, config.eval_every)
    hit = functools.partial(train.accuracy, test=test, model=MODELS[config.dataset])
    for seed, level, outcome in zip(seeds, levels, outcomes, strict=True):
        yield {
            "seed": seed.number,
            "level": level.index,
            "condition": condition,
            "sparsity": jp.sparsity(level.masks, level.ticket),
            "accuracy": hit(outcome.final),
            "accuracy_early": hit(outcome.early),
            "accuracy_best": hit(outcome.best),
            "early_stop_step": steps[int(outcome.losses.argmin())],
            "steps": list(steps),
            "validation_loss": [round(loss, 6) for loss in outcome.losses.tolist()],
            "validation_accuracy": [round(share, 6) for share in outcome.accuracies.tolist()],
        }


def report(config: Config, records: list[Record]) -> Record:
    """Write the summary and the figures, print the table, return the summary."""
    rows = figures.summarise(records)
    steps = records[0]["steps"]
    early_step = steps[early_evaluation(len(steps))]
    summary = {"dataset": config.dataset, "early_step": early_step, "rows": rows}
    show.write(
        config.out,
        summary,
        accuracy=figures.accuracy_figure(rows, steps=config.steps, early_step=early_step),
        learning_curves=figures.learning_figure(records),
    )
    show.printed(
        figures.table(rows, title=f"{config.dataset}, seeds: {config.seeds}"),
        f"Test accuracy in percent after {config.steps} steps, mean ± std over the seeds, and in "
        f"brackets after {early_step}.\nFigures, metrics and masks: {config.out}",
    )
    return summary


if __name__ == "__main__":
    runner.start(Config, main)
