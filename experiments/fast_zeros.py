"""Zeros that make it faster: which kind of zero is worth it, and when."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import rich.markdown

import jaxprune as jp
from experiments import fast_zeros_clocks as clocks
from experiments import fast_zeros_figures as figures
from experiments import fast_zeros_kinds as kinds
from experiments import fast_zeros_networks as networks
from experiments import need
from experiments.common import runner, settings, show, train
from experiments.common.runner import Record
from experiments.fast_zeros_kinds import Kind
from experiments.fast_zeros_networks import Task, Training

ModelName = Literal["mlp", "transformer"]
EVENTS = 20  # at which masks are found, over the first six tenths of the pruning


@dataclasses.dataclass(frozen=True)
class Config:
    """Train networks with zeros of every kind, and time what a user would deploy of each.

    An MLP classifies images, a transformer predicts the next character of a text; both are wide
    enough for blocks. Each is trained, and then goes on for some steps in which it is pruned ever
    more slowly, by magnitude; the dense network goes on for as many. Single weights, N of M and
    blocks that no scope balances are multiplied with like any others, balanced blocks run as
    `jp.compact` has them, channels are cut out by `jp.shrink`; all have as many weights left. What
    no column of blocks can keep is not run: of 4 blocks at most 75 % may go. A run that was stopped
    goes on with the same command.

    Attributes:
      models: which networks.
      dataset: of the MLP: digits (from scikit-learn) or mnist. The text comes with Python.
      data_path: MNIST as one .npz in the layout of keras; downloaded once if left out.
      kinds: of zeros; n:m is 2:4, and 1 of 4, 8 and 16 at the levels. Dense networks are run too.
      levels: fractions that are removed of the weights that may be pruned.
      seeds: how many, or a range such as 3:6; files and clocks are those of the first.
      width: units of a layer (mlp 1024, transformer 512).
      steps: training steps before any pruning (digits 100, mnist 800, text 200).
      prune_steps: steps after that (digits 100, mnist 800, text 60).
      batch_size: examples of a step (images 64, windows of the text 4).
      rows: sizes at which networks are timed: images, or characters in windows of at most 64.
      turns: of every network on the clock, of which the median is told.
      out: run folder (results/fast_zeros_DATASET).

    References:
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_, 2017.
      Gray et al., `GPU Kernels for Block-Sparse Weights
      <https://cdn.openai.com/blocksparse/blocksparsepaper.pdf>`_, 2017.
    """

    models: tuple[ModelName, ...] = get_args(ModelName)
    dataset: Literal["digits", "mnist"] = "digits"
    data_path: Path | None = None
    kinds: tuple[Kind, ...] = get_args(Kind)[1:]
    levels: tuple[float, ...] = (0.75, 0.875, 0.9375)
    seeds: int | str = 2
    width: int | None = None
    steps: int | None = None
    prune_steps: int | None = None
    batch_size: int | None = None
    rows: tuple[int, ...] = (1, 64, 512)
    turns: int = 9
    out: Path | None = None


class Run(NamedTuple):
    """A training run: which network, and what kind of zeros make up how much of it."""

    model: str
    kind: str
    level: float
    seed: int


Load = Callable[[str], Task]


def main(config: Config) -> Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    config = resolve(config)
    load = functools.cache(functools.partial(load_task, config))
    planned = plan(config, load)
    with runner.open_run(config.out, recorded(config), Run._fields) as run:
        records = run.fill(
            planned,
            functools.partial(train_all, config, load),
            is_saved=lambda key: is_saved(config, Run(*key)),
        )
        return report(config, records, clocks_of(config, load, planned))


def resolve(config: Config) -> Config:
    """Fill in where the results go, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    name = settings.known(config, "dataset", get_args(Config.__annotations__["dataset"]))
    c = settings.filled_in(config, out=Path("results") / f"fast_zeros_{name}")
    given = [
        f for f in ("width", "steps", "prune_steps", "batch_size") if getattr(c, f) is not None
    ]
    whole = all(n == 1 or n <= networks.CONTEXT or n % networks.CONTEXT == 0 for n in c.rows)
    settings.refuse(
        c,
        [
            *settings.names(c, "models", get_args(ModelName)),
            *settings.names(c, "kinds", get_args(Kind)[1:]),
            ("levels", all(0.5 < s < 1 for s in c.levels), "must lie between 0.5 and 1"),
            ("levels", len(set(c.levels)) == len(c.levels) > 0, "must be distinct, one at least"),
            ("seeds", settings.seed_range(c.seeds), settings.SEEDS),
            ("rows", c.rows and min(c.rows) > 0 and whole, "must be at most 64, or times 64"),
            *settings.positive(c, "turns", *given),
            *settings.data_path(c),
        ],
    )
    return c


def recorded(config: Config) -> Record:
    """Settings that the results depend on: how a network is trained stands under its name."""
    left_out = ("out", "rows", "turns", "width", *Training._fields)
    sizes = {m: [width_of(config, m), *training_of(config, m)] for m in config.models}
    return {**settings.recorded(config, leave_out=left_out), "sizes": sizes}


def training_of(config: Config, model: str) -> Training:
    """Say how a network is trained: what is given, and for the rest what its data decide."""
    given = {f: getattr(config, f) for f in ("steps", "prune_steps", "batch_size")}
    given = {name: value for name, value in given.items() if value is not None}
    name = config.dataset if model == "mlp" else "text"
    return networks.TRAININGS[name]._replace(**given)


def width_of(config: Config, model: str) -> int:
    """Say how wide a network is."""
    return config.width or networks.WIDTHS[model]


def load_task(config: Config, model: str) -> Task:
    """Load what a network is trained and tested on."""
    need("export", "jax2onnx", "onnxruntime")
    return networks.load(model, config.dataset, config.data_path, width_of(config, model))


def plan(config: Config, load: Load) -> list[Run]:
    """List all training runs whose zeros fit; the dense ones come first."""
    trials = [(kind, level) for kind in config.kinds for level in levels_of(config, kind)]
    return [
        Run(model, *trial, seed)
        for model in config.models
        for trial in [("dense", 0.0), *trials]
        if trial[0] == "dense" or kinds.fits(load(model), *trial)
        for seed in settings.seed_range(config.seeds)
    ]


def levels_of(config: Config, kind: str) -> list[float]:
    """List how much a kind of zeros removes: 2:4 stands beside the levels."""
    return [*([kinds.TWO_OF_FOUR] if kind == "n:m" else []), *config.levels]


def file_of(config: Config, run: Run) -> Path:
    """Say where a network lies, if it is one that is timed."""
    name = f"{run.kind.replace(':', '_of_')}_{run.level:g}.safetensors"
    return config.out / run.model / f"seed_{run.seed}" / name


def is_timed(config: Config, run: Run) -> bool:
    """Tell the networks of the first seed."""
    return run.seed == settings.seed_range(config.seeds)[0]


def is_saved(config: Config, run: Run) -> bool:
    """Tell whether nothing of a training run is missing."""
    return not is_timed(config, run) or file_of(config, run).exists()


def train_all(config: Config, load: Load, missing: list[Run]) -> Iterator[Record]:
    """Train what is missing; the seeds of a condition share its program."""
    evaluate = train.compiler()
    for (model, *_), runs in itertools.groupby(missing, lambda run: run[:3]):
        task, training, step = load(model), training_of(config, model), once()
        for run in runs:
            start = trained(config, task, run)
            params, masks = prune(task, training, run, start, step)
            if is_timed(config, run):
                runner.save(file_of(config, run), params, masks)
            yield {**run._asdict(), **measure(task, params, masks, evaluate)}


def once() -> train.Compile:
    """Make what compiles its first function and takes it for all others: they are the same."""
    programs: list[Any] = []

    def compile_(fn: Callable[..., Any], *args: Any) -> Any:
        if not programs:
            programs.append(jax.jit(fn).lower(*args).compile())
        return programs[0]

    return compile_


def trained(config: Config, task: Task, run: Run) -> Any:
    """Train the dense network that all runs of a seed prune, or load it."""
    path = config.out / run.model / f"seed_{run.seed}" / "trained.safetensors"
    if not path.exists():
        training, start = training_of(config, run.model), task.start(jax.random.key(run.seed))
        pairs = batches(task, training, run.seed)[: training.steps]
        params = go_on(task, train.clipped_adam, start, pairs, once())[0]
        runner.save(path, params)
    return runner.load(path)[0]


def batches(task: Task, training: Training, seed: int) -> list[tuple[Any, Any]]:
    """Choose the examples of all steps, and their learning rates: those of the pruning follow."""
    steps = training.steps + training.prune_steps
    order = train.batch_order(
        jax.random.fold_in(jax.random.key(seed), 1),
        examples=task.examples,
        steps=steps,
        batch_size=training.batch_size,
    )
    return list(zip(np.asarray(order), rates(training), strict=True))


def rates(training: Training) -> np.ndarray:
    """Rise and fall twice: what is pruned has to learn again."""
    lengths = training.steps, training.prune_steps
    return np.concatenate([train.learning_rates(training.learning_rate, n) for n in lengths])


def go_on(
    task: Task, tx_of: Callable[[Any], Any], params: Any, pairs: list[Any], compile_: train.Compile
) -> tuple[Any, Any]:
    """Train, and give params and the optimizer's state."""
    learn = lambda variables, inputs: (task.fn(variables["params"], inputs), {})  # noqa: E731
    variables, state = train.loop(
        lambda rate: train.Recipe(learn, tx_of(rate)),
        {"params": params},
        jax.jit(tx_of(0.0).init)(params),
        ((task.take(indices), rate) for indices, rate in pairs),
        compile_,
    )
    return variables["params"], state


def prune(
    task: Task, training: Training, run: Run, params: Any, compile_: train.Compile
) -> tuple[Any, Any]:
    """Go on with the training, and prune on the way; gives params and masks, None if dense."""
    pairs = batches(task, training, run.seed)[training.steps :]
    if run.kind == "dense":
        return go_on(task, train.clipped_adam, params, pairs, compile_)[0], None
    sparsity, parts = kinds.parts(task, run.kind, run.level, params)
    end = training.prune_steps * 6 // 10
    schedule = jp.schedules.cubic(sparsity, begin=0, end=end, every=max(1, end // EVENTS))
    tx_of = lambda rate: jp.prune(train.clipped_adam(rate), schedule=schedule, **parts)  # noqa: E731
    params, state = go_on(task, tx_of, params, pairs, compile_)
    return params, jp.get_masks(state)


def measure(task: Task, params: Any, masks: Any, compile_: train.Compile) -> Record:
    """Test a network, and count what is left of what may be pruned."""
    left = 1.0 if masks is None else 1 - jp.sparsity(masks, params)
    return {**train.evaluate(task.fn, params, task.test, compile_), "left": left}


def clocks_of(config: Config, load: Load, planned: list[Run]) -> dict[str, Record]:
    """Measure what is deployed of the networks of the first seed, or read what was measured."""

    def deployed(model: str) -> tuple[Task, clocks.Named]:
        task, found = load(model), {}
        for run in planned:
            if run.model == model and is_timed(config, run):
                params, masks = runner.load(file_of(config, run))
                found[figures.name_of(run.kind, run.level)] = kinds.deployed(
                    task, run.kind, params, masks
                )
        return task, found

    how = {"rows": config.rows, "turns": config.turns}
    return {
        model: clocks.measured(
            config.out / f"clocks_{model}.json", functools.partial(deployed, model), **how
        )
        for model in config.models
    }


def report(config: Config, records: list[Record], clocks: dict[str, Record]) -> Record:
    """Write the summary, the figure and the answer, print the tables, return the summary."""
    rows = figures.summarise(records, clocks)
    answer = figures.answer(rows, dataset=config.dataset)
    figure = figures.worth_figure(rows)
    show.write(config.out, {"dataset": config.dataset, "rows": rows}, answer=answer, worth=figure)
    show.printed(
        *(figures.table(rows, model) for model in config.models),
        rich.markdown.Markdown(answer),
        f"Figure, metrics, networks and answer: {config.out}",
        width=125,
    )
    return {"dataset": config.dataset, "rows": rows}


if __name__ == "__main__":
    runner.start(Config, main)
