"""Smaller networks: channels and layers cut out of a CNN and a transformer."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import numpy as np
import rich.markdown
import rich.table
from tqdm import tqdm

import jaxprune as jp
from experiments import structured_figures as tradeoff
from experiments.common import data, files, runner, show, small_networks, timing, train
from experiments.common.models import ResidualNet, Transformer
from experiments.common.runner import Record

ModelName = Literal["cnn", "transformer"]
Method = Literal["one_shot", "iterative"]
CONTEXT = 32  # characters that the transformer sees
MODELS = {
    "digits": ResidualNet((16, 32, 64), classes=10),
    "mnist": ResidualNet((32, 64, 128), classes=10, stride=2),
    "text": Transformer(data.SYMBOLS, CONTEXT, width=64, layers=4, heads=4),
}
TRAININGS = {
    "digits": {"steps": 300, "fine_tune_steps": 300, "batch_size": 64, "learning_rate": 3e-3},
    "mnist": {"steps": 1500, "fine_tune_steps": 1000, "batch_size": 64, "learning_rate": 3e-3},
    "text": {"steps": 500, "fine_tune_steps": 250, "batch_size": 32, "learning_rate": 6e-3},
}
CRITERIA = {
    "taylor": jp.criteria.taylor,
    "magnitude": jp.criteria.magnitude,
    "random": jp.criteria.random,
}
SCORED_BATCHES = 8  # that the gradient of the criterion is averaged over
LATENCY_BATCH = 64
LATENCY_TURNS = 25


@dataclasses.dataclass(frozen=True)
class Config:
    """Cut channels or layers out of trained networks, and see what is lost and what is gained.

    A CNN with residual blocks and batch normalisation classifies images, a transformer predicts
    the next character of a text. Each is trained, then pruned and fine-tuned: one_shot removes
    everything before the first step of the fine-tuning, iterative a share of what is left in each
    of some rounds over its first quarter. All end after the same number of steps on the same
    batches, the dense network too. What is removed is cut out, so that most of the fine-tuning
    trains a small network, and a small network is measured. A run that was stopped goes on with
    the same command.

    Attributes:
      models: which networks.
      dataset: of the CNN: digits (from scikit-learn) or mnist. The text comes with Python.
      data_path: MNIST as one .npz in the layout of keras; downloaded once if left out.
      methods: what to compare; the dense networks are trained too.
      channels: fractions of the channels to remove. In a transformer that is the width between the
        layers, that inside the feed-forward branches, and the heads of attention.
      layers: fractions of the residual branches to remove, of those that go around an identity.
      rounds: of iterative.
      criterion: what channels and layers are ranked by.
      scope: whether all groups of channels lose the same share, or their channels compete.
      seeds: how many seeds, counted from 0.
      steps: training steps of a dense network (digits 300, mnist 1500, text 500).
      fine_tune_steps: steps after that, whether pruned or not (digits 300, mnist 1000, text 250).
      batch_size: examples of a training step (images 64, text 32).
      out: run folder (results/structured_DATASET).

    References:
      Li et al., `Pruning Filters for Efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, 2017.
      Molchanov et al., `Importance Estimation for Neural Network Pruning
      <https://arxiv.org/abs/1906.10771>`_, 2019.
    """

    models: tuple[ModelName, ...] = get_args(ModelName)
    dataset: Literal["digits", "mnist"] = "digits"
    data_path: Path | None = None
    methods: tuple[Method, ...] = get_args(Method)
    channels: tuple[float, ...] = (0.25, 0.5, 0.75)
    layers: tuple[float, ...] = (0.25, 0.5)
    rounds: int = 3
    criterion: Literal["taylor", "magnitude", "random"] = "taylor"
    scope: Literal["per-leaf", "across"] = "per-leaf"
    seeds: int = 3
    steps: int | None = None
    fine_tune_steps: int | None = None
    batch_size: int | None = None
    out: Path | None = None


class Run(NamedTuple):
    """A training run, and the fractions of channels or layers that it removes."""

    model: str
    method: str
    channels_removed: float
    layers_removed: float
    seed: int


class Task(NamedTuple):
    """A network, what it is trained and tested on, and for how long.

    Attributes:
      model: linen module that gives logits.
      take: gives the training examples of some indices.
      examples: how many there are.
      test: what is reported.
      steps: of the training.
      fine_tune_steps: after that.
      batch_size: examples of a step.
      learning_rate: of Adam at its highest, in both.
    """

    model: nn.Module
    take: Callable[[np.ndarray], data.Examples]
    examples: int
    test: data.Examples
    steps: int
    fine_tune_steps: int
    batch_size: int
    learning_rate: float

    def learn(self, variables: Any, inputs: Any) -> tuple[jax.Array, Any]:
        """Give logits as in training, and the running statistics that move."""
        return self.model.apply(variables, inputs, train=True, mutable=["batch_stats"])

    def infer(self, variables: Any, inputs: Any) -> jax.Array:
        """Give logits."""
        return self.model.apply(variables, inputs)


class Outcome(NamedTuple):
    """What a training run leaves behind.

    Attributes:
      infer: the network, in its size.
      variables: what it has learnt.
      cut: what is left of the dense variables; empty if that is all.
      left: how many units of every group are left, by its name.
    """

    infer: train.Infer
    variables: Any
    cut: small_networks.Cut
    left: dict[str, int]


def main(config: Config) -> Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    settings = resolve(config)
    planned = plan(settings)
    with runner.open_run(settings.out, recorded(settings), Run._fields) as run:
        records = run.fill(
            planned,
            functools.partial(run_all, settings),
            is_saved=lambda key: checkpoint(settings, Run(*key)).exists(),
        )
        return report(settings, records, latencies(settings, planned))


def resolve(config: Config) -> Config:
    """Fill in what the dataset decides, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    names = get_args(Config.__annotations__["dataset"])
    if config.dataset not in names:
        raise ValueError(
            f"`dataset={config.dataset!r}` is not known. Choose one of {', '.join(names)}."
        )
    out = config.out or Path("results") / f"structured_{config.dataset}"
    settings = dataclasses.replace(config, out=out)
    if problems := _problems(settings):
        raise ValueError(f"{'; '.join(problems)}. Change it, or leave it out for the default.")
    return settings


def _problems(settings: Config) -> list[str]:
    """Say which fields have a bad value, and what would be right."""
    s = settings
    checks = [
        *_names("models", s.models, get_args(ModelName)),
        *_names("methods", s.methods, get_args(Method)),
        *_fractions("channels", s.channels),
        *_fractions("layers", s.layers),
        ("channels", s.channels or s.layers, "leaves nothing to remove, as `layers` is empty too"),
        ("rounds", s.rounds > 1, "must be 2 or more, or iterative is one_shot"),
        ("criterion", s.criterion in CRITERIA, f"must be one of {', '.join(CRITERIA)}"),
        ("scope", s.scope in ("per-leaf", "across"), "must be per-leaf or across"),
        ("seeds", s.seeds > 0, "must be positive"),
        ("steps", s.steps is None or s.steps > 0, "must be positive"),
        (
            "fine_tune_steps",
            s.fine_tune_steps is None or s.fine_tune_steps >= 4 * s.rounds,
            f"must be {4 * s.rounds} or more, so that a quarter has one for each of the rounds",
        ),
        ("batch_size", s.batch_size is None or s.batch_size > 0, "must be positive"),
        (
            "data_path",
            s.data_path is None or s.dataset == "mnist",
            "goes with dataset='mnist'; the digits come with scikit-learn",
        ),
    ]
    return [f"`{name}={getattr(s, name)!r}` {wanted}" for name, good, wanted in checks if not good]


def _names(field: str, values: tuple[str, ...], known: tuple[str, ...]) -> list[Any]:
    unknown = [value for value in values if value not in known]
    return [
        (field, not unknown, f"may name {', '.join(known)}, but not {unknown}"),
        (field, len(set(values)) == len(values) > 0, "must name each once, and one at least"),
    ]


def _fractions(field: str, values: tuple[float, ...]) -> list[Any]:
    return [
        (field, all(0 < value < 1 for value in values), "must lie between 0 and 1"),
        (field, len(set(values)) == len(values), "must be distinct"),
    ]


def recorded(settings: Config) -> Record:
    """Settings that the results depend on, as JSON types; where the folder lies is not one."""
    fields = dataclasses.asdict(settings)
    for name in ("out", "steps", "fine_tune_steps", "batch_size"):
        del fields[name]
    trainings = {model: training_of(settings, model) for model in settings.models}
    return {
        **fields,
        "data_path": settings.data_path and str(settings.data_path),
        "trainings": trainings,
    }


def training_of(settings: Config, model: str) -> Record:
    """Say how a network is trained: what is given, and for the rest what its data decide."""
    defaults = TRAININGS[data_of(settings, model)]
    given = {name: getattr(settings, name, None) for name in defaults}
    return {**defaults, **{name: value for name, value in given.items() if value is not None}}


def data_of(settings: Config, model: str) -> str:
    """Name what a network is trained on."""
    return settings.dataset if model == "cnn" else "text"


def plan(settings: Config) -> list[Run]:
    """List all training runs, the dense one of a network and seed before those that prune it."""
    cuts = [*((c, 0.0) for c in settings.channels), *((0.0, n) for n in settings.layers)]
    trials = [("dense", 0.0, 0.0), *((m, *cut) for m in settings.methods for cut in cuts)]
    return [
        Run(model, *trial, seed)
        for model in settings.models
        for seed in range(settings.seeds)
        for trial in trials
    ]


def run_all(settings: Config, missing: list[Run]) -> Iterator[Record]:
    """Train what is ``missing``, and yield a record for each training run."""
    for model, of_model in itertools.groupby(missing, lambda run: run.model):
        task, compile_ = load(settings, model), train.compiler()
        for seed, of_seed in itertools.groupby(of_model, lambda run: run.seed):
            yield from run_seed(settings, task, list(of_seed), seed, compile_)


def load(settings: Config, model: str) -> Task:
    """Load what a network is trained and tested on."""
    name = data_of(settings, model)
    make = text_task if name == "text" else image_task
    return make(MODELS[name], name, settings.data_path, **training_of(settings, model))


def image_task(model: nn.Module, name: str, data_path: Path | None, **settings: Any) -> Task:
    """Tell digits apart."""
    images = data.load_mnist(data_path) if name == "mnist" else data.load_digits()

    def take(indices: np.ndarray) -> data.Examples:
        return data.Examples(images.train.inputs[indices], images.train.targets[indices])

    return Task(model, take, len(images.train.targets), data.Examples(*images.test), **settings)


def text_task(model: nn.Module, name: str, data_path: Path | None, **settings: Any) -> Task:
    """Predict the next character, whatever has been seen: at every position of a window."""
    del name, data_path
    text = data.load_text()

    def windows(codes: np.ndarray, starts: np.ndarray) -> data.Examples:
        cut = codes[starts[:, None] + np.arange(CONTEXT + 1)]
        return data.Examples(cut[:, :-1], cut[:, 1:])

    examples = len(text.train) - CONTEXT
    test = windows(text.test, np.arange(0, len(text.test) - CONTEXT, CONTEXT))
    return Task(model, functools.partial(windows, text.train), examples, test, **settings)


def run_seed(
    settings: Config, task: Task, missing: list[Run], seed: int, compile_: train.Compile
) -> Iterator[Record]:
    """Train a network or load it, then prune and fine-tune it in all ways that are ``missing``."""
    init_key, order_key, prune_key = jax.random.split(jax.random.key(seed), 3)
    order = train.batch_order(
        order_key,
        examples=task.examples,
        steps=task.steps + task.fine_tune_steps,
        batch_size=task.batch_size,
    )
    before, after = np.split(np.asarray(order), [task.steps])
    path = trained_path(settings, missing[0].model, seed)
    if not path.exists():
        start = jax.jit(task.model.init)(init_key, task.test.inputs[:1])
        state = train.clipped_adam(0.0).init(start["params"])
        rates = train.learning_rates(task.learning_rate, task.steps)
        steps = zip(map(task.take, before), rates, strict=True)
        recipe = functools.partial(recipe_of, task.learn)
        variables, _ = train.loop(recipe, start, state, steps, compile_)
        small_networks.save_network(path, variables, {})
    trained, _ = small_networks.load_network(path)

    for run in missing:
        outcome = fine_tune(
            settings, task, run, trained, order=after, key=prune_key, compile_=compile_
        )
        small_networks.save_network(checkpoint(settings, run), outcome.variables, outcome.cut)
        yield {**run._asdict(), **measure(task, outcome, compile_)}


def trained_path(settings: Config, model: str, seed: int) -> Path:
    """Say where the network lies that all runs of a seed prune."""
    return settings.out / model / f"seed_{seed}" / "trained.safetensors"


def checkpoint(settings: Config, run: Run) -> Path:
    """Say where the network of a training run lies."""
    name = (
        f"{run.method}_channels_{run.channels_removed:g}_layers_{run.layers_removed:g}.safetensors"
    )
    return settings.out / run.model / f"seed_{run.seed}" / name


def fine_tune(
    settings: Config,
    task: Task,
    run: Run,
    trained: Any,
    *,
    order: np.ndarray,
    key: jax.Array,
    compile_: train.Compile,
) -> Outcome:
    """Go on with the training, and prune on the way.

    Between its rounds iterative pruning holds masks on the whole network, whose program is there
    already. With the last round, after a quarter of the steps, what they remove is cut out of the
    network and of the optimizer's state, and the small network goes on.
    """
    rates = train.learning_rates(task.learning_rate, len(order))
    rounds = {"dense": 0, "one_shot": 1, "iterative": settings.rounds}[run.method]
    starts = np.linspace(0, len(order) // 4, rounds).astype(int)
    parts = np.split(np.arange(len(order)), starts[1:])

    def go_on(
        learn: train.Learn, part: np.ndarray, variables: Any, state: Any, **held: bool
    ) -> Any:
        steps = ((task.take(order[i]), rates[i]) for i in part)
        recipe = functools.partial(recipe_of, learn, **held)
        return train.loop(recipe, variables, state, steps, compile_)

    tx, held = train.clipped_adam(0.0), train.clipped_adam(0.0, held=True)
    variables, state = trained, held.init(trained["params"])
    if not rounds:
        variables, _ = go_on(task.learn, parts[0], variables, state.inner_state)
        return Outcome(task.infer, variables, {}, {})

    groups, masks = find_units(task, trained, run), None
    removed = run.channels_removed or run.layers_removed
    across = run.layers_removed or settings.scope == "across"
    for n, part in enumerate(parts, start=1):
        batches = (task.take(indices) for indices in order[part[:SCORED_BATCHES]])
        masks = jp.find_masks(
            variables["params"],
            1 - (1 - removed) ** (n / rounds),
            criterion=CRITERIA[settings.criterion],
            pattern=jp.patterns.Coupled(groups.at("params"), normalize=not run.layers_removed),
            scope=jp.scopes.across if across else jp.scopes.per_leaf,
            within=masks,
            grads=train.mean_gradient(task.learn, variables, batches, compile_),
            key=jax.random.fold_in(key, n),
        )
        variables = {**variables, "params": jp.apply_masks(variables["params"], masks)}
        state = jp.with_masks(state, masks)
        if n < rounds:
            variables, state = go_on(task.learn, part, variables, state, held=True)

    params, masks = variables["params"], groups.spread({"params": masks}, variables)
    state = jp.shrink_state(tx, state.inner_state, params, masks["params"])
    cut = jp.cut_list(variables, masks)
    learn, _ = jp.shrink(task.learn, variables, masks)
    infer, variables = jp.shrink(task.infer, variables, masks)
    variables, _ = go_on(learn, parts[-1], variables, state)
    left = {name: int(alive.sum()) for name, alive in groups.keep(masks).items()}
    return Outcome(infer, variables, cut, left)


def recipe_of(learn: train.Learn, rate: jax.Array, *, held: bool = False) -> train.Recipe:
    """Say how to take a step at a learning rate; if ``held``, under masks."""
    return train.Recipe(learn, train.clipped_adam(rate, held=held))


def find_units(task: Task, variables: Any, run: Run) -> jp.Groups:
    """Find what a run may remove: channels with all that is coupled to them, or layers.

    Of the channels of attention whole heads are removed, which leaves the others as they are.
    """
    inputs = task.test.inputs[:1]
    if run.layers_removed:
        return jp.find_blocks(task.infer, variables, inputs)
    groups = jp.find_groups(task.infer, variables, inputs)
    return jp.Groups([group for group in groups if not any(map(_inside_heads, group.members))])


def _inside_heads(member: jp.Member) -> bool:
    return re.fullmatch(r".*/(query|value)/bias", member.path) is not None and member.axis == 1


def measure(task: Task, outcome: Outcome, compile_: train.Compile) -> Record:
    """Put a training run in figures."""
    infer, variables = outcome.infer, outcome.variables
    sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
    return {
        **train.evaluate(infer, variables, task.test, compile_),
        "parameters": sum(sizes),
        "flops": jp.count_flops(infer, variables, task.test.inputs[:1]),
        "left": outcome.left,
    }


def latencies(settings: Config, planned: list[Run]) -> list[Record]:
    """Time the networks of the first seed, or read how long they took when they were timed."""
    path = settings.out / "latency.json"
    if path.exists():
        return json.loads(path.read_text())["networks"]
    timed = [run for run in planned if run.seed == 0 and run.method != "dense"]
    found = []
    with tqdm(total=len(timed), unit="network", desc="latency") as bar:
        for model, of_model in itertools.groupby(timed, lambda run: run.model):
            task = load(settings, model)
            trained, _ = small_networks.load_network(trained_path(settings, model, seed=0))
            inputs = task.test.inputs[:LATENCY_BATCH]
            dense = timing.call(task.infer, trained, inputs)
            for run in of_model:
                variables, cut = small_networks.load_network(checkpoint(settings, run))
                infer, _ = jp.shrink(task.infer, trained, cut=cut)
                small = timing.call(infer, variables, inputs)
                times = timing.compare(small, dense, turns=LATENCY_TURNS)
                found.append({**run._asdict(), **times})
                bar.update()
    told = {"batch": LATENCY_BATCH, "machine": timing.machine(), "networks": found}
    files.write(path, json.dumps(told, indent=2) + "\n")
    return found


def report(settings: Config, records: list[Record], times: list[Record]) -> Record:
    """Write the summary, the figure and the answer, print the table, return the summary."""
    rows = tradeoff.summarise(records, times)
    summary = {"dataset": settings.dataset, "rows": rows}
    answer = tradeoff.answer(rows, dataset=settings.dataset)
    files.write(settings.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    files.write(settings.out / "tradeoff.png", show.png(tradeoff.tradeoff_figure(rows)))
    files.write(settings.out / "answer.md", answer)

    show.printed(
        accuracy_table(rows, title=f"images: {settings.dataset}, seeds: {settings.seeds}"),
        cost_table(rows),
        rich.markdown.Markdown(answer),
        f"Figure, metrics, networks and answer: {settings.out}",
        width=125,
    )
    return summary


def accuracy_table(rows: list[Record], *, title: str) -> rich.table.Table:
    """Lay out what each network gets right, a network a line."""
    cells = lambda row: [tradeoff.percent(row), f"{row['loss']['mean']:.3f}"]  # noqa: E731
    lines = _table(rows, ("accuracy [%]", "loss"), cells, title=title)
    lines.caption = "Mean ± std."
    return lines


def cost_table(rows: list[Record]) -> rich.table.Table:
    """Lay out what is left of each network and how long it takes, a network a line."""
    lines = _table(rows, ("parameters", "MFLOPs", "(%)", "ms", "(%)", "over"), _costs, title=None)
    lines.caption = (
        f"Latency is that of a batch of {LATENCY_BATCH}; over: how many times what the FLOPs say, "
        "compared with dense."
    )
    return lines


def _table(
    rows: list[Record],
    columns: Iterable[str],
    cells: Callable[[Record], list[str]],
    *,
    title: str | None,
) -> rich.table.Table:
    """Lines of cells, a section for each model; no wider than 80 columns."""
    lines = rich.table.Table(title=title)
    for name in ("network", "method", "removed"):
        lines.add_column(name, no_wrap=True)
    for name in columns:
        lines.add_column(name, justify="right", no_wrap=True)
    for model in tradeoff.models(rows):
        for row in (row for row in rows if row["model"] == model):
            lines.add_row(model, row["method"], tradeoff.share(row), *cells(row))
        lines.add_section()
    return lines


def _costs(row: Record) -> list[str]:
    return [
        f"{row['parameters']:,.0f}",
        f"{row['flops'] / 1e6:.2f}",
        f"{100 * row['flops_ratio']:.1f}",
        f"{row['latency_ms']:.2f}",
        f"{100 * row['latency_ratio']['median']:.1f}",
        f"{tradeoff.overhead(row):.2f}",
    ]


if __name__ == "__main__":
    runner.start(Config, main)
