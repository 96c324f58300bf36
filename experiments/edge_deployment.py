"""From a trained network to a small device: pruned, distilled, in int8, and measured as a file."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import numpy as np
import rich.markdown

import jaxprune as jp
from experiments import edge_deployment_figures as figures
from experiments import edge_deployment_files as exported
from experiments import edge_deployment_training as training
from experiments import need
from experiments.common import data, runner, settings, show, small_networks, train
from experiments.common.models import ResidualNet
from experiments.common.runner import Record
from experiments.common.small_networks import Network
from experiments.edge_deployment_training import Bench, Lesson

Method = Literal["one_shot", "iterative"]
DEFAULTS = {
    "digits": {"widths": (16, 32, 64), "steps": 300, "fine_tune_steps": 300, "search_steps": 150},
    "mnist": {"widths": (32, 64, 128), "steps": 400, "fine_tune_steps": 600, "search_steps": 200},
}
CALIBRATED_BATCHES = 8  # that the ranges of int8 are found on
SEARCHED = (0.0, 0.95)  # between which fractions of the channels the search looks


@dataclasses.dataclass(frozen=True)
class Config:
    """Bring a CNN to a small device, and see what every step costs and buys.

    Every network is exported to ONNX, and what is reported is what that file does under
    onnxruntime on one thread. The stages of the table:

    - dense: the network as it is; the teacher of the others.
    - pruned: channels and then residual branches cut out, and fine-tuned on the labels.
    - distilled: distillation alone. A network of the size of the pruned one, from fresh weights,
      with the teacher.
    - quantized: quantization alone. The dense file in int8.
    - pruned_distilled: cut as pruned is, fine-tuned with the teacher.
    - pruned_distilled_quantized: that in int8.
    - thin_from_scratch: what distilled is, without the teacher.
    - searched, searched_quantized: the largest fraction of the channels that a bisection could
      remove within the tolerance, after a short fine-tuning with the teacher.

    Beside pruned there is the other method: one_shot removes everything before the first step of
    the fine-tuning; iterative the channels in some rounds over its first quarter, and the branches
    at the end of it. All but the searched networks have had the same number of steps on the same
    batches with the same learning rates; of a pruned network the first part is that of the dense
    one. Nothing is chosen by the test set. A run that was stopped goes on with the same command.

    Attributes:
      dataset: digits (from scikit-learn) or mnist.
      data_path: MNIST as one .npz in the layout of keras; downloaded once if left out.
      widths: channels of each stage of the dense network (digits 16 32 64, mnist 32 64 128).
      channels: fraction of the channels to remove, the same of every group.
      blocks: fraction of the residual branches to remove, of those that go around an identity.
      method: of the stages; the other one is shown beside pruned.
      rounds: of iterative.
      temperature: of the distillation.
      alpha: weight of the teacher; in the paper little was left for the labels.
      tolerance: points of accuracy, on the validation set and in the mean over the seeds, that the
        searched network may lose.
      resolution: of the search, as a fraction of the channels.
      seeds: how many seeds, counted from 0.
      steps: training steps before anything is removed (digits 300, mnist 400).
      fine_tune_steps: steps after that, whether pruned or not (digits 300, mnist 600).
      search_steps: of those, how many a network of the search has (digits 150, mnist 200).
      batch_size: examples of a training step (64).
      out: run folder (results/edge_deployment_DATASET).

    References:
      Li et al., `Pruning Filters for Efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, 2017.
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015.
      Liu et al., `Rethinking the Value of Network Pruning <https://arxiv.org/abs/1810.05270>`_,
      2019, on networks as small that are trained from scratch.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    data_path: Path | None = None
    widths: tuple[int, ...] | None = None
    channels: float = 0.75
    blocks: float = 0.25
    method: Method = "iterative"
    rounds: int = 3
    temperature: float = 4.0
    alpha: float = 0.9
    tolerance: float = 0.5
    resolution: float = 0.05
    seeds: int = 3
    steps: int | None = None
    fine_tune_steps: int | None = None
    search_steps: int | None = None
    batch_size: int | None = None
    out: Path | None = None


class Recipe(NamedTuple):
    """How the networks of a stage come about.

    Attributes:
      method: none, one_shot or iterative pruning of the dense one, or from scratch at that size.
      taught: whether the dense network is the teacher.
      int8_of: the stage whose file is quantized, if that is all.
    """

    method: str
    taught: bool = False
    int8_of: str | None = None


class Run(NamedTuple):
    """A network that leaves a record: its stage, or the search, the seed and what is removed."""

    stage: str
    seed: int
    channels_removed: float


Ensure = Callable[[list[Run]], list[Record]]  # gives records of networks; makes what is missing


def main(config: Config) -> Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    config = resolve(config)
    bench = functools.cache(lambda: load(config))  # a finished run does without
    if not (config.out / "config.json").exists():
        bench()  # what cannot be run leaves no folder
    with runner.open_run(config.out, settings.recorded(config), Run._fields) as run:
        ensure = functools.partial(
            run.fill,
            make=lambda missing: make_all(config, bench(), missing),
            is_saved=lambda key: is_saved(config, Run(*key)),
        )
        ensure(plan(config))
        sparsity = search(config, ensure)
        ensure(plan_searched(config, sparsity))
        stages = [stage for stage in recipes(config) if stage != "search"]
        times = exported.latencies(
            config.out / "latency.json",
            {stage: file_of(config, stage, seed=0) for stage in stages},
            lambda: bench().data.test.inputs,
        )
        return report(config, list(run.records.values()), sparsity, times)


def resolve(config: Config) -> Config:
    """Fill in what the dataset decides, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    name = settings.known(config, "dataset", DEFAULTS)
    out = Path("results") / f"edge_deployment_{name}"
    c = settings.filled_in(config, **DEFAULTS[name], batch_size=64, out=out)
    least, methods = 4 * (c.rounds + 1), get_args(Method)
    room = "so that a quarter has one for each of the rounds and one for the branches"
    widths = "must name a positive number for each stage"
    alpha = "must be above 0, or nothing is distilled, and at most 1"
    tolerance = "must be 0 or more and below 100 points; below 0 even the dense network misses it"
    search_steps = "must be positive and no more than `fine_tune_steps`"
    settings.refuse(
        c,
        [
            ("widths", c.widths and min(c.widths) > 0, widths),
            ("channels", 0 < c.channels < 1, "must lie between 0 and 1"),
            ("blocks", 0 <= c.blocks < 1, "must be 0 or more and below 1"),
            ("method", c.method in methods, f"must be {' or '.join(methods)}"),
            ("rounds", c.rounds > 1, "must be 2 or more, or iterative is one_shot"),
            ("temperature", 0 < c.temperature < math.inf, "must be positive and finite"),
            ("alpha", 0 < c.alpha <= 1, alpha),
            ("tolerance", 0 <= c.tolerance < 100, tolerance),
            ("resolution", 0 < c.resolution < 1, "must lie between 0 and 1"),
            *settings.positive(c, "seeds", "steps"),
            ("fine_tune_steps", c.fine_tune_steps >= least, f"must be {least} or more, {room}"),
            ("search_steps", 0 < c.search_steps <= c.fine_tune_steps, search_steps),
            *settings.positive(c, "batch_size"),
            *settings.data_path(c),
        ],
    )
    return c


def recipes(config: Config) -> dict[str, Recipe]:
    """Say how the networks of all stages come about, in the order of the table."""
    one = config.method
    other = next(method for method in get_args(Method) if method != one)
    return {
        "dense": Recipe("none"),
        "quantized": Recipe("none", int8_of="dense"),
        f"pruned_{other}": Recipe(other),
        "pruned": Recipe(one),
        "pruned_distilled": Recipe(one, taught=True),
        "pruned_distilled_quantized": Recipe(one, taught=True, int8_of="pruned_distilled"),
        "thin_from_scratch": Recipe("scratch"),
        "distilled": Recipe("scratch", taught=True),
        **dict.fromkeys(("search", "searched"), Recipe("one_shot", taught=True)),
        "searched_quantized": Recipe("one_shot", taught=True, int8_of="searched"),
    }


def plan(config: Config) -> list[Run]:
    """List the networks of all stages but the searched ones, each after what it is made from."""
    return [
        Run(stage, seed, 0.0 if recipe.method == "none" else config.channels)
        for seed in range(config.seeds)
        for stage, recipe in recipes(config).items()
        if not stage.startswith("search")
    ]


def search(config: Config, ensure: Ensure) -> float:
    """Find the largest fraction of the channels that can go within the tolerance.

    What it is measured by is the mean accuracy of all seeds on the validation set.
    """

    def evaluate(sparsity: float) -> float:
        stage = "search" if sparsity else "dense"
        trials = [Run(stage, seed, sparsity) for seed in range(config.seeds)]
        return float(np.mean([record["validation_accuracy"] for record in ensure(trials)]))

    low, high = SEARCHED
    return jp.find_sparsity(
        evaluate,
        low=low,
        high=high,
        tolerance=config.tolerance / 100,
        baseline=evaluate(0.0),
        resolution=config.resolution,
    )


def plan_searched(config: Config, sparsity: float) -> list[Run]:
    """List the networks that the search has found, as files."""
    stages = ("searched", "searched_quantized")
    return [Run(stage, seed, sparsity) for seed in range(config.seeds) for stage in stages]


def network_of(config: Config, run: Run) -> Path:
    """Say where a trained network lies; a searched one is that of a trial, or the dense one."""
    name = run.stage
    if name.startswith("search"):
        name = f"search_{run.channels_removed:g}" if run.channels_removed else "dense"
    return config.out / f"seed_{run.seed}" / f"{name}.safetensors"


def file_of(config: Config, stage: str, seed: int) -> Path:
    """Say where the file lies that a device would run."""
    return config.out / f"seed_{seed}" / f"{stage}.onnx"


def is_saved(config: Config, run: Run) -> bool:
    """Tell whether all files of a network are there."""
    found = [file_of(config, run.stage, run.seed)] if run.stage != "search" else []
    if recipes(config)[run.stage].int8_of is None:
        found.append(network_of(config, run))
    return all(path.exists() for path in found)


def load(config: Config) -> Bench:
    """Load what the networks are trained and tested on, and find what can be removed.

    Raises:
      ValueError: a fraction is so small that nothing would be removed.
      ModuleNotFoundError: what the files are written and run with is missing.
    """
    need("export", "jax2onnx", "onnxruntime")
    examples = data.load(config.dataset, config.data_path)
    model, inputs = model_of(config), examples.test.inputs[:1]
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    dense = small_networks.whole(model, shapes)
    channels = jp.find_groups(dense.infer, shapes, inputs)
    branches = jp.find_blocks(dense.infer, shapes, inputs)
    fewest, count = min(group.size for group in channels), len(branches)
    some = round(config.channels * fewest), not config.blocks or round(config.blocks * count)
    settings.refuse(
        config,
        [
            ("channels", some[0], f"removes none of the {fewest} channels of a group"),
            ("blocks", some[1], f"removes none of {count} branches, as `blocks=0` would"),
        ],
    )
    return Bench(model, dense, examples, channels, branches, train.compiler())


def model_of(config: Config) -> nn.Module:
    """Give the dense network; that for the larger images halves them before anything else."""
    return ResidualNet(config.widths, classes=10, stride=2 if config.dataset == "mnist" else 1)


class Course(NamedTuple):
    """What the trainings of a seed have in common.

    Attributes:
      seed: which.
      before: examples of the batches before anything is removed, `[steps, batch size]`.
      after: those of the others.
      trained: the dense network between the two.
      key: of the weights of networks that are small from the start.
    """

    seed: int
    before: np.ndarray
    after: np.ndarray
    trained: Network
    key: jax.Array


def make_all(config: Config, bench: Bench, missing: list[Run]) -> Iterator[Record]:
    """Make networks, and yield a record for each."""
    for seed, of_seed in itertools.groupby(missing, lambda run: run.seed):
        course = begin(config, bench, seed)
        for run in of_seed:
            recipe = recipes(config)[run.stage]
            yield {**run._asdict(), **recipe._asdict(), **make(config, bench, course, run)}


def begin(config: Config, bench: Bench, seed: int) -> Course:
    """Train the dense network of a seed for the first part of its steps, or load it."""
    init_key, order_key, thin_key = jax.random.split(jax.random.key(seed), 3)
    order = train.batch_order(
        order_key,
        examples=len(bench.data.train.targets),
        steps=config.steps + config.fine_tune_steps,
        batch_size=config.batch_size,
    )
    before, after = np.split(np.asarray(order), [config.steps])
    path = network_of(config, Run("trained", seed, 0.0))
    if not path.exists():
        start, lesson = bench.draw(init_key), training.by_labels(bench)
        small_networks.save(path, training.fit(bench, lesson, start, before))
    return Course(seed, before, after, small_networks.load(path, bench.dense), thin_key)


def make(config: Config, bench: Bench, course: Course, run: Run) -> Record:
    """Make a network and its file, or the int8 file of a stage, and put it in figures."""
    recipe, test = recipes(config)[run.stage], bench.data.test
    path, file = network_of(config, run), file_of(config, run.stage, run.seed)
    if recipe.int8_of:
        source = file_of(config, recipe.int8_of, run.seed)
        batches = [bench.take(order).inputs for order in course.after[:CALIBRATED_BATCHES]]
        return exported.quantize(file, source, batches, test)
    if run.stage == "searched":
        network = small_networks.load(path, bench.dense)
    else:
        network = train_network(config, bench, course, run)
        small_networks.save(path, network)
    images, labels = bench.data.validation
    logits = train.predict(network.infer, network.variables, images, bench.compile_)
    record = {"validation_accuracy": exported.hits(logits, labels)}
    if run.stage == "search":
        return record
    return {**record, **exported.export(file, network, test, bench.compile_)}


def train_network(config: Config, bench: Bench, course: Course, run: Run) -> Network:
    """Train the network of a run."""
    method, taught, _ = recipes(config)[run.stage]
    lesson = by_teacher(config, bench, course) if taught else training.by_labels(bench)
    if method == "none":
        return training.fit(bench, lesson, course.trained, course.after)
    if method == "scratch":
        return train_thin(config, bench, course, lesson)
    order, blocks = course.after, config.blocks
    if run.stage == "search":
        order, blocks = order[: config.search_steps], 0.0
    removals = training.removals_of(method, run.channels_removed, blocks, config.rounds, len(order))
    return training.prune(bench, lesson, course.trained, order, removals)


def by_teacher(config: Config, bench: Bench, course: Course) -> Lesson:
    """Learn from the labels and from the dense network, which is asked about each example once."""
    dense, path = (network_of(config, Run(name, course.seed, 0.0)) for name in ("dense", "teacher"))
    if not path.exists():
        network, images = small_networks.load(dense, bench.dense), bench.data.train.inputs
        logits = train.predict(network.infer, network.variables, images, bench.compile_)
        runner.save(path, {"logits": logits})
    logits = np.asarray(runner.load(path)[0]["logits"])

    def take(indices: np.ndarray) -> data.Examples:
        images, labels = bench.take(indices)
        return data.Examples(images, (labels, logits[indices]))

    def loss(student: jax.Array, targets: tuple[jax.Array, jax.Array]) -> jax.Array:
        labels, teacher = targets
        return jp.distillation_loss(
            student, teacher, labels, temperature=config.temperature, alpha=config.alpha
        )

    return Lesson(take, loss)


def train_thin(config: Config, bench: Bench, course: Course, lesson: Lesson) -> Network:
    """Train a network of the size of the pruned one, as long as the dense one was."""
    pruned = network_of(config, Run("pruned", course.seed, 0.0))
    start = bench.draw(course.key)
    network = small_networks.cut_down(start, small_networks.load(pruned, bench.dense).cut)
    network = network._replace(variables=training.rescale(network.variables, start.variables))
    for order in (course.before, course.after):
        network = training.fit(bench, lesson, network, order)
    return network


def report(config: Config, records: list[Record], sparsity: float, times: list[Record]) -> Record:
    """Write the summary, the figure and the answer, print the tables, return the summary."""
    rows = figures.summarise(records, times, order=list(recipes(config)))
    trials = figures.trials(records, sparsity=sparsity, tolerance=config.tolerance)
    summary = {"dataset": config.dataset, "rows": rows, "search": trials}
    answer = figures.answer(summary)
    figure = figures.pareto_figure(rows, tolerance=config.tolerance)
    show.write(config.out, summary, answer=answer, pareto=figure)
    show.printed(
        *figures.tables(rows, title=f"{config.dataset}, seeds: {config.seeds}"),
        rich.markdown.Markdown(answer),
        f"Figure, metrics, networks, files and answer: {config.out}",
        width=140,
    )
    return summary


if __name__ == "__main__":
    runner.start(Config, main)
