"""From a trained network to a small device: pruned, distilled, in int8, and measured as a file."""

import dataclasses
import functools
import gzip
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import numpy as np
import rich.markdown
import rich.table

import jaxprune as jp
from experiments import edge_deployment_figures as deployment
from experiments.common import data, device, files, runner, show, small_networks, timing, train
from experiments.common.models import ResidualNet
from experiments.common.runner import Record

Method = Literal["one_shot", "iterative"]
DEFAULTS = {
    "digits": {
        "widths": (16, 32, 64),
        "steps": 300,
        "fine_tune_steps": 300,
        "search_steps": 150,
        "batch_size": 64,
    },
    "mnist": {
        "widths": (32, 64, 128),
        "steps": 400,
        "fine_tune_steps": 600,
        "search_steps": 200,
        "batch_size": 64,
    },
}
LEARNING_RATE = 3e-3  # of Adam at its highest, in both parts of a training
SCORED_BATCHES = 8  # that the gradient of the criterion is averaged over
CALIBRATED_BATCHES = 8  # that the ranges of int8 are found on
SEARCHED = (0.0, 0.95)  # between which fractions of the channels the search looks
LATENCY_BATCHES = (1, 64)
LATENCY_TURNS = 25


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


class Bench(NamedTuple):
    """What all trainings have in common.

    Attributes:
      settings: of the experiment.
      model: linen module that gives logits.
      data: what to fit, what to choose by, and what to report.
      channels: groups of coupled channels of the model.
      branches: its residual branches, of those around an identity.
      compile_: what ``train.compiler`` made.
    """

    settings: Config
    model: nn.Module
    data: data.Dataset
    channels: jp.Groups
    branches: jp.Groups
    compile_: train.Compile

    def learn(self, variables: Any, inputs: Any) -> tuple[jax.Array, Any]:
        """Give logits as in training, and the running statistics that move."""
        return self.model.apply(variables, inputs, train=True, mutable=["batch_stats"])

    def infer(self, variables: Any, inputs: Any) -> jax.Array:
        """Give logits."""
        return self.model.apply(variables, inputs)

    def take(self, indices: np.ndarray) -> data.Examples:
        """Give the training examples of some indices."""
        return data.Examples(self.data.train.inputs[indices], self.data.train.targets[indices])


class Course(NamedTuple):
    """What the trainings of a seed have in common.

    Attributes:
      seed: which.
      before: examples of the batches before anything is removed, `[steps, batch size]`.
      after: those of the others.
      trained: variables of the dense network between the two.
      key: of the weights of networks that are small from the start.
    """

    seed: int
    before: np.ndarray
    after: np.ndarray
    trained: Any
    key: jax.Array


class Lesson(NamedTuple):
    """What a network learns from: batches of given examples, and the loss of its logits on them."""

    take: Callable[[np.ndarray], data.Examples]
    loss: train.Loss


class Removal(NamedTuple):
    """From which step on which fraction of the ``channels`` or ``branches`` is gone."""

    step: int
    kind: str
    sparsity: float


class Outcome(NamedTuple):
    """What a training leaves behind.

    Attributes:
      infer: the network, in its size.
      variables: what it has learnt.
      cut: what is left of the dense variables; empty if that is all.
    """

    infer: train.Infer
    variables: Any
    cut: small_networks.Cut


def main(config: Config) -> Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    settings = resolve(config)
    bench = functools.cache(lambda: load(settings))  # a finished run does without
    if not (settings.out / "config.json").exists():
        bench()  # what cannot be run leaves no folder
    with runner.open_run(settings.out, recorded(settings), Run._fields) as opened:

        def ensure(planned: list[Run]) -> list[Record]:
            """Give the records of networks, of which what is missing is made first."""
            return opened.fill(
                planned,
                lambda missing: make_all(bench(), missing),
                is_saved=lambda key: is_saved(settings, Run(*key)),
            )

        ensure(plan(settings))
        sparsity = search(settings, ensure)
        ensure(plan_searched(settings, sparsity))
        records = list(opened.records.values())
        return report(settings, records, sparsity, latencies(settings, bench))


def resolve(config: Config) -> Config:
    """Fill in what the dataset decides, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    if config.dataset not in DEFAULTS:
        raise ValueError(
            f"`dataset={config.dataset!r}` is not known. Choose one of {', '.join(DEFAULTS)}."
        )
    defaults = {"out": Path("results") / f"edge_deployment_{config.dataset}"}
    defaults |= DEFAULTS[config.dataset]
    left_out = {name: v for name, v in defaults.items() if getattr(config, name) is None}
    settings = dataclasses.replace(config, **left_out)
    if problems := _problems(settings):
        raise ValueError(f"{'; '.join(problems)}. Change it, or leave it out for the default.")
    return settings


def _problems(settings: Config) -> list[str]:
    """Say which fields have a bad value, and what would be right."""
    s = settings
    checks = [
        ("widths", s.widths and min(s.widths) > 0, "must name a positive number for each stage"),
        ("channels", 0 < s.channels < 1, "must lie between 0 and 1"),
        ("blocks", 0 <= s.blocks < 1, "must be 0 or more and below 1"),
        ("method", s.method in get_args(Method), f"must be {' or '.join(get_args(Method))}"),
        ("rounds", s.rounds > 1, "must be 2 or more, or iterative is one_shot"),
        ("temperature", 0 < s.temperature < np.inf, "must be positive and finite"),
        ("alpha", 0 < s.alpha <= 1, "must be above 0, or nothing is distilled, and at most 1"),
        (
            "tolerance",
            0 <= s.tolerance < 100,
            "must be 0 or more and below 100 points; below 0 even the dense network misses it",
        ),
        ("resolution", 0 < s.resolution < 1, "must lie between 0 and 1"),
        ("seeds", s.seeds > 0, "must be positive"),
        ("steps", s.steps > 0, "must be positive"),
        (
            "fine_tune_steps",
            s.fine_tune_steps >= 4 * (s.rounds + 1),
            f"must be {4 * (s.rounds + 1)} or more, so that a quarter has one for each of the "
            "rounds and one for the branches",
        ),
        (
            "search_steps",
            0 < s.search_steps <= s.fine_tune_steps,
            "must be positive and no more than `fine_tune_steps`",
        ),
        ("batch_size", s.batch_size > 0, "must be positive"),
        (
            "data_path",
            s.data_path is None or s.dataset == "mnist",
            "goes with dataset='mnist'; the digits come with scikit-learn",
        ),
    ]
    return [f"`{name}={getattr(s, name)!r}` {wanted}" for name, good, wanted in checks if not good]


def recorded(settings: Config) -> Record:
    """Settings that the results depend on, as JSON types; where the folder lies is not one."""
    fields = dataclasses.asdict(settings)
    del fields["out"]
    return {**fields, "data_path": settings.data_path and str(settings.data_path)}


def recipes(settings: Config) -> dict[str, Recipe]:
    """Say how the networks of all stages come about, in the order of the table."""
    one = settings.method
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


def plan(settings: Config) -> list[Run]:
    """List the networks of all stages but the searched ones, each after what it is made from."""
    return [
        Run(stage, seed, 0.0 if recipe.method == "none" else settings.channels)
        for seed in range(settings.seeds)
        for stage, recipe in recipes(settings).items()
        if not stage.startswith("search")
    ]


def plan_searched(settings: Config, sparsity: float) -> list[Run]:
    """List the networks that the search has found, as files."""
    return [
        Run(stage, seed, sparsity)
        for seed in range(settings.seeds)
        for stage in ("searched", "searched_quantized")
    ]


def load(settings: Config) -> Bench:
    """Load what the networks are trained and tested on, and find what can be removed.

    Raises:
      ValueError: a fraction is so small that nothing would be removed.
    """
    mnist = settings.dataset == "mnist"
    examples = data.load_mnist(settings.data_path) if mnist else data.load_digits()
    model, inputs = model_of(settings), examples.test.inputs[:1]
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)
    channels = jp.find_groups(model.apply, shapes, inputs)
    branches = jp.find_blocks(model.apply, shapes, inputs)
    _refuse_to_remove_nothing(settings, min(group.size for group in channels), len(branches))
    return Bench(settings, model, examples, channels, branches, train.compiler())


def model_of(settings: Config) -> nn.Module:
    """Give the dense network; that for the larger images halves them before anything else."""
    return ResidualNet(settings.widths, classes=10, stride=2 if settings.dataset == "mnist" else 1)


def _refuse_to_remove_nothing(settings: Config, channels: int, branches: int) -> None:
    units = {"channels": f"the {channels} channels of a group", "blocks": f"{branches} branches"}
    shares = {"channels": settings.channels * channels, "blocks": settings.blocks * branches}
    problems = [
        f"`{name}={getattr(settings, name)}` removes none of {units[name]}"
        for name, share in shares.items()
        if getattr(settings, name) and not round(share)
    ]
    if problems:
        raise ValueError(f"{'; '.join(problems)}. Remove more, or no branches with `blocks=0`.")


def make_all(bench: Bench, missing: list[Run]) -> Iterator[Record]:
    """Make networks, and yield a record for each."""
    for seed, of_seed in itertools.groupby(missing, lambda run: run.seed):
        course = begin(bench, seed)
        for run in of_seed:
            yield {**run._asdict(), **make(bench, course, run)}


def begin(bench: Bench, seed: int) -> Course:
    """Train the dense network of a seed for the first part of its steps, or load it."""
    settings = bench.settings
    init_key, order_key, thin_key = jax.random.split(jax.random.key(seed), 3)
    order = train.batch_order(
        order_key,
        examples=len(bench.data.train.targets),
        steps=settings.steps + settings.fine_tune_steps,
        batch_size=settings.batch_size,
    )
    before, after = np.split(np.asarray(order), [settings.steps])
    path = folder_of(settings, seed) / "trained.safetensors"
    if not path.exists():
        start = initial(bench, init_key)
        variables = fit(bench, bench.learn, start, by_labels(bench), before)
        small_networks.save_network(path, variables, {})
    return Course(seed, before, after, small_networks.load_network(path)[0], thin_key)


def initial(bench: Bench, key: jax.Array) -> Any:
    """Draw the variables of the dense network."""
    images = bench.data.test.inputs[:1]
    return bench.compile_(bench.model.init, key, images)(key, images)


def folder_of(settings: Config, seed: int) -> Path:
    """Say where the files of a seed lie."""
    return settings.out / f"seed_{seed}"


def network_of(settings: Config, run: Run) -> Path:
    """Say where a trained network lies; a searched one is that of a trial, or the dense one."""
    name = run.stage
    if name.startswith("search"):
        name = f"search_{run.channels_removed:g}" if run.channels_removed else "dense"
    return folder_of(settings, run.seed) / f"{name}.safetensors"


def file_of(settings: Config, stage: str, seed: int) -> Path:
    """Say where the file lies that a device would run."""
    return folder_of(settings, seed) / f"{stage}.onnx"


def is_saved(settings: Config, run: Run) -> bool:
    """Tell whether all files of a network are there."""
    found = [file_of(settings, run.stage, run.seed)] if run.stage != "search" else []
    if recipes(settings)[run.stage].int8_of is None:
        found.append(network_of(settings, run))
    return all(path.exists() for path in found)


def make(bench: Bench, course: Course, run: Run) -> Record:
    """Make a network, save it, and put it in figures."""
    recipe, path = recipes(bench.settings)[run.stage], network_of(bench.settings, run)
    if recipe.int8_of:
        return {**recipe._asdict(), **quantize(bench, course, run, recipe.int8_of)}
    if run.stage == "searched":
        variables, cut = small_networks.load_network(path)
        outcome = Outcome(cut_down(bench, course.trained, cut)[1], variables, cut)
    else:
        outcome = train_network(bench, course, run, recipe)
        small_networks.save_network(path, outcome.variables, outcome.cut)
    images, labels = bench.data.validation
    logits = train.predict(outcome.infer, outcome.variables, images, bench.compile_)
    record = {**recipe._asdict(), "validation_accuracy": hits(logits, labels)}
    return record if run.stage == "search" else {**record, **export(bench, run, outcome)}


def train_network(bench: Bench, course: Course, run: Run, recipe: Recipe) -> Outcome:
    """Train the network of a run."""
    lesson = by_teacher(bench, course) if recipe.taught else by_labels(bench)
    if recipe.method == "none":
        variables = fit(bench, bench.learn, course.trained, lesson, course.after)
        return Outcome(bench.infer, variables, {})
    if recipe.method == "scratch":
        return train_thin(bench, course, lesson)
    if run.stage == "search":
        order, blocks = course.after[: bench.settings.search_steps], 0.0
    else:
        order, blocks = course.after, bench.settings.blocks
    cuts = cuts_of(recipe.method, run.channels_removed, blocks, bench.settings.rounds, len(order))
    return prune(bench, course, lesson, order, cuts)


def by_labels(bench: Bench) -> Lesson:
    """Learn from the labels alone."""
    return Lesson(bench.take, train.cross_entropy)


def by_teacher(bench: Bench, course: Course) -> Lesson:
    """Learn from the labels and from the dense network, which is asked about each example once."""
    settings = bench.settings
    path = folder_of(settings, course.seed) / "teacher.safetensors"
    if not path.exists():
        dense, _ = small_networks.load_network(network_of(settings, Run("dense", course.seed, 0.0)))
        logits = train.predict(bench.infer, dense, bench.data.train.inputs, bench.compile_)
        small_networks.save_network(path, {"logits": logits}, {})
    logits = small_networks.load_network(path)[0]["logits"]

    def take(indices: np.ndarray) -> data.Examples:
        images, labels = bench.take(indices)
        return data.Examples(images, (labels, logits[indices]))

    def loss(student: jax.Array, targets: tuple[jax.Array, jax.Array]) -> jax.Array:
        labels, teacher = targets
        return jp.distillation_loss(
            student, teacher, labels, temperature=settings.temperature, alpha=settings.alpha
        )

    return Lesson(take, loss)


def fit(bench: Bench, learn: train.Learn, variables: Any, lesson: Lesson, order: np.ndarray) -> Any:
    """Train from a fresh state of the optimizer."""
    state = train.clipped_adam(0.0).init(variables["params"])
    rates = train.learning_rates(LEARNING_RATE, len(order))
    steps = zip(map(lesson.take, order), rates, strict=True)
    recipe = functools.partial(recipe_of, learn, lesson)
    return train.loop(recipe, variables, state, steps, bench.compile_)[0]


def recipe_of(
    learn: train.Learn, lesson: Lesson, rate: jax.Array, *, held: bool = False
) -> train.Recipe:
    """Say how to take a step at a learning rate; if ``held``, under masks."""
    return train.Recipe(learn, train.clipped_adam(rate, held=held), lesson.loss)


def train_thin(bench: Bench, course: Course, lesson: Lesson) -> Outcome:
    """Train a network of the size of the pruned one, as long as the dense one was."""
    _, cut = small_networks.load_network(
        network_of(bench.settings, Run("pruned", course.seed, 0.0))
    )
    start = initial(bench, course.key)
    learn, infer, small = cut_down(bench, start, cut)
    variables = rescale(small, start)
    for order in (course.before, course.after):
        variables = fit(bench, learn, variables, lesson, order)
    return Outcome(infer, variables, cut)


def rescale(small: Any, whole: Any) -> Any:
    """Make kernels that are part of fresh ones what flax would have drawn at their size.

    There the variance is 1 over the number of inputs (LeCun), and inputs are fewer now.
    """

    def scale(path: Any, part: jax.Array, kernel: jax.Array) -> jax.Array:
        if path[-1].key != "kernel" or not part.size:
            return part
        return part * math.sqrt(math.prod(kernel.shape[:-1]) / math.prod(part.shape[:-1]))

    return jax.tree.map_with_path(scale, small, whole)


def cut_down(
    bench: Bench, variables: Any, cut: small_networks.Cut
) -> tuple[train.Learn, train.Infer, Any]:
    """Give the network, as in training and as it is used, and its variables after a cut."""
    learn, _ = jp.shrink(bench.learn, variables, cut=cut)
    return learn, *jp.shrink(bench.infer, variables, cut=cut)


def cuts_of(method: str, channels: float, blocks: float, rounds: int, steps: int) -> list[Removal]:
    """List what is removed when: channels, then branches; all at once, or over a quarter."""
    rounds, last = (rounds, steps // 4) if method == "iterative" else (1, 0)
    removals = [("channels", 1 - (1 - channels) ** (n / rounds)) for n in range(1, rounds + 1)]
    removals += [("branches", blocks)] if blocks else []
    starts = np.linspace(0, last, len(removals)).astype(int).tolist()
    return [Removal(step, *removal) for step, removal in zip(starts, removals, strict=True)]


def prune(
    bench: Bench, course: Course, lesson: Lesson, order: np.ndarray, cuts: list[Removal]
) -> Outcome:
    """Go on with the training of the dense network, and remove parts of it on the way.

    Until the last removal masks are held on the whole network, whose program is there already.
    Then what they remove is cut out of the network and of the optimizer's state, and the small
    network goes on. What is removed is chosen by the loss on the labels, whoever teaches.
    """
    compile_, rates = bench.compile_, train.learning_rates(LEARNING_RATE, len(order))
    parts = np.split(np.arange(len(order)), [cut.step for cut in cuts[1:]])

    def go_on(
        learn: train.Learn, part: np.ndarray, variables: Any, state: Any, **held: bool
    ) -> Any:
        steps = ((lesson.take(order[i]), rates[i]) for i in part)
        recipe = functools.partial(recipe_of, learn, lesson, **held)
        return train.loop(recipe, variables, state, steps, compile_)

    tx, held = train.clipped_adam(0.0), train.clipped_adam(0.0, held=True)
    variables, state, masks = course.trained, held.init(course.trained["params"]), {}
    for cut, part in zip(cuts, parts, strict=True):
        batches = map(bench.take, order[cut.step : cut.step + SCORED_BATCHES])
        grads = train.mean_gradient(bench.learn, variables, batches, compile_)
        masks[cut.kind] = find(bench, cut, variables, grads, within=masks.get(cut.kind))
        together = jp.combine_masks(*masks.values())
        params = jp.apply_masks(variables["params"], together["params"])
        variables, state = {**variables, "params": params}, jp.with_masks(state, together["params"])
        if cut is not cuts[-1]:
            variables, state = go_on(bench.learn, part, variables, state, held=True)

    state = jp.shrink_state(tx, state.inner_state, params, together["params"])
    indices = jp.cut_list(variables, together)
    learn, infer, variables = cut_down(bench, variables, indices)
    variables, _ = go_on(learn, parts[-1], variables, state)
    return Outcome(infer, variables, indices)


def find(bench: Bench, cut: Removal, variables: Any, grads: Any, *, within: Any) -> Any:
    """Find masks of all variables that remove a fraction of the channels or of the branches.

    Every group loses the same share of its channels; branches compete with each other.
    """
    channels = cut.kind == "channels"
    groups = bench.channels if channels else bench.branches
    masks = jp.find_masks(
        variables["params"],
        cut.sparsity,
        criterion=jp.criteria.taylor,
        pattern=jp.patterns.Coupled(groups.at("params"), normalize=channels),
        scope=jp.scopes.per_leaf if channels else jp.scopes.across,
        within=within and within["params"],
        grads=grads,
    )
    return groups.spread({"params": masks}, variables)


def export(bench: Bench, run: Run, outcome: Outcome) -> Record:
    """Write the file of a network, and put in figures what it does with the whole test set."""
    infer, variables = outcome.infer, outcome.variables
    images, _ = bench.data.test
    ours = train.predict(infer, variables, images, bench.compile_)
    path = file_of(bench.settings, run.stage, run.seed)
    place(path, jp.export.onnx, infer, variables, images[:1])
    return {
        **measure(bench, path, ours),
        "parity": float(np.abs(device.predict(path, images) - ours).max() / np.abs(ours).max()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "flops": jp.count_flops(infer, variables, images[:1]),
    }


def quantize(bench: Bench, course: Course, run: Run, stage: str) -> Record:
    """Write the int8 file of a stage, calibrated on training examples."""
    batches = [bench.take(indices).inputs for indices in course.after[:CALIBRATED_BATCHES]]
    source = file_of(bench.settings, stage, run.seed)
    path = file_of(bench.settings, run.stage, run.seed)
    place(path, jp.export.quantize_onnx, source, batches)
    return measure(bench, path, device.predict(source, bench.data.test.inputs))


def place(path: Path, write: Callable[..., Any], *args: Any) -> None:
    """Export a file elsewhere, and put it in place like all others of a run."""
    with tempfile.TemporaryDirectory() as folder:
        report = write(Path(folder) / path.name, *args, latency=())
        files.write(path, report.path.read_bytes())


def measure(bench: Bench, path: Path, reference: np.ndarray) -> Record:
    """Put a file in figures: its size, and what it answers to the test set.

    Args:
      bench: with the test set.
      path: of the file.
      reference: logits `[n, classes]` that it should give.
    """
    images, labels = bench.data.test
    logits, content = device.predict(path, images), path.read_bytes()
    return {
        "accuracy": hits(logits, labels),
        "agreement": hits(logits, reference.argmax(-1)),
        "bytes": len(content),
        "gzip_bytes": len(gzip.compress(content, mtime=0)),
    }


def hits(logits: np.ndarray, labels: np.ndarray) -> float:
    """Give the share of labels that are the most likely class, from a count."""
    return int((logits.argmax(-1) == labels).sum()) / len(labels)


def search(settings: Config, ensure: Callable[[list[Run]], list[Record]]) -> float:
    """Find the largest fraction of the channels that can go within the tolerance.

    What it is measured by is the mean accuracy of all seeds on the validation set.
    """

    def evaluate(sparsity: float) -> float:
        stage = "search" if sparsity else "dense"
        trials = [Run(stage, seed, sparsity) for seed in range(settings.seeds)]
        return float(np.mean([record["validation_accuracy"] for record in ensure(trials)]))

    low, high = SEARCHED
    return jp.find_sparsity(
        evaluate,
        low=low,
        high=high,
        tolerance=settings.tolerance / 100,
        baseline=evaluate(0.0),
        resolution=settings.resolution,
    )


def latencies(settings: Config, bench: Callable[[], Bench]) -> list[Record]:
    """Time the files of the first seed, or read how long they took when they were timed."""
    path = settings.out / "latency.json"
    if path.exists():
        return json.loads(path.read_text())["stages"]
    names = [stage for stage in recipes(settings) if stage != "search"]
    images = bench().data.test.inputs
    found: dict[str, Record] = {name: {"stage": name} for name in names}
    for batch in LATENCY_BATCHES:
        calls = {n: device.call(file_of(settings, n, seed=0), images[:batch]) for n in names}
        seconds = timing.in_turns(calls, turns=LATENCY_TURNS)
        for name, taken in seconds.items():
            ratio = timing.paired_ratio(taken, seconds["dense"], seed=0)
            times = {"ms": 1e3 * float(np.median(taken)), "ratio": ratio}
            found[name][str(batch)] = times
    told = {"machine": timing.machine(), "stages": list(found.values())}
    files.write(path, json.dumps(told, indent=2) + "\n")
    return told["stages"]


def report(settings: Config, records: list[Record], sparsity: float, times: list[Record]) -> Record:
    """Write the summary, the figure and the answer, print the table, return the summary."""
    summary = {
        "dataset": settings.dataset,
        "rows": deployment.summarise(records, times, order=list(recipes(settings))),
        "search": deployment.trials(records, sparsity=sparsity, tolerance=settings.tolerance),
    }
    answer = deployment.answer(summary)
    figure = deployment.pareto_figure(summary["rows"], tolerance=settings.tolerance)
    files.write(settings.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    files.write(settings.out / "pareto.png", show.png(figure))
    files.write(settings.out / "answer.md", answer)

    show.printed(
        *tables(summary["rows"], title=f"{settings.dataset}, seeds: {settings.seeds}"),
        rich.markdown.Markdown(answer),
        f"Figure, metrics, networks, files and answer: {settings.out}",
        width=140,
    )
    return summary


def tables(rows: list[Record], *, title: str) -> list[rich.table.Table]:
    """Lay out a stage a line: what it gets right, then what it costs, in 80 columns each."""
    found = []
    for columns in (slice(0, 3), slice(3, None)):
        lines = rich.table.Table(title=title if not found else None)
        lines.add_column("stage", no_wrap=True)
        for name in deployment.COLUMNS[columns]:
            lines.add_column(name.replace(", ", ",\n"), justify="right", no_wrap=True)
        for row in rows:
            lines.add_row(row["stage"], *deployment.cells(row, rows[0])[columns])
        found.append(lines)
    found[-1].caption = "Accuracy is mean ± std over the seeds; all is that of the ONNX file."
    return found


if __name__ == "__main__":
    runner.start(Config, main)
