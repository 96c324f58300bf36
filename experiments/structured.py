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
from tqdm import tqdm

import jaxprune as jp
from experiments import structured_figures as figures
from experiments.common import data, files, runner, settings, show, small_networks, timing, train
from experiments.common.models import ResidualNet, Transformer
from experiments.common.runner import Record
from experiments.common.small_networks import Network

ModelName = Literal["cnn", "transformer"]
Method = Literal["one_shot", "iterative"]
CONTEXT = 32  # characters that the transformer sees
MODELS = {
    "digits": ResidualNet((16, 32, 64), classes=10),
    "mnist": ResidualNet((32, 64, 128), classes=10, stride=2),
    "text": Transformer(data.SYMBOLS, CONTEXT, width=64, layers=4, heads=4),
}
CRITERIA = {
    "taylor": jp.criteria.taylor,
    "magnitude": jp.criteria.magnitude,
    "random": jp.criteria.random,
}
SCORED_BATCHES = 8  # that the gradient of the criterion is averaged over
LATENCY_BATCH = 64
LATENCY_TURNS = 25


class Training(NamedTuple):
    """Steps before and of the fine-tuning, examples of a step, and the highest rate of Adam."""

    steps: int
    fine_tune_steps: int
    batch_size: int
    learning_rate: float


TRAININGS = {
    "digits": Training(300, 300, 64, 3e-3),
    "mnist": Training(1500, 1000, 64, 3e-3),
    "text": Training(500, 250, 32, 6e-3),
}


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


def main(config: Config) -> Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    config = resolve(config)
    planned = plan(config)
    with runner.open_run(config.out, recorded(config), Run._fields) as run:
        records = run.fill(
            planned,
            functools.partial(train_all, config),
            is_saved=lambda key: file_of(config, Run(*key)).exists(),
        )
        return report(config, records, latencies(config, planned))


def resolve(config: Config) -> Config:
    """Fill in where the results go, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    name = settings.known(config, "dataset", get_args(Config.__annotations__["dataset"]))
    c = settings.filled_in(config, out=Path("results") / f"structured_{name}")
    nothing = "leaves nothing to remove, as `layers` is empty too"
    first, room = 4 * c.rounds, "so that a quarter has one for each of the rounds"
    given = [n for n in ("seeds", "steps", "batch_size") if getattr(c, n) is not None]
    settings.refuse(
        c,
        [
            *settings.names(c, "models", get_args(ModelName)),
            *settings.names(c, "methods", get_args(Method)),
            *fractions("channels", c.channels),
            *fractions("layers", c.layers),
            ("channels", c.channels or c.layers, nothing),
            ("rounds", c.rounds > 1, "must be 2 or more, or iterative is one_shot"),
            ("criterion", c.criterion in CRITERIA, f"must be one of {', '.join(CRITERIA)}"),
            ("scope", c.scope in ("per-leaf", "across"), "must be per-leaf or across"),
            *settings.positive(c, *given),
            (
                "fine_tune_steps",
                c.fine_tune_steps is None or c.fine_tune_steps >= first,
                f"must be {first} or more, {room}",
            ),
            *settings.data_path(c),
        ],
    )
    return c


def fractions(field: str, values: tuple[float, ...]) -> list[settings.Check]:
    """Check that what is to be removed lies between nothing and all."""
    return [
        (field, all(0 < value < 1 for value in values), "must lie between 0 and 1"),
        (field, len(set(values)) == len(values), "must be distinct"),
    ]


def recorded(config: Config) -> Record:
    """Settings that the results depend on: how a network is trained stands under its name."""
    fields = settings.recorded(config, leave_out=("out", "steps", "fine_tune_steps", "batch_size"))
    trainings = {model: training_of(config, model)._asdict() for model in config.models}
    return {**fields, "trainings": trainings}


def training_of(config: Config, model: str) -> Training:
    """Say how a network is trained: what is given, and for the rest what its data decide."""
    given = {name: getattr(config, name, None) for name in Training._fields}
    given = {name: value for name, value in given.items() if value is not None}
    return TRAININGS[data_of(config, model)]._replace(**given)


def data_of(config: Config, model: str) -> str:
    """Name what a network is trained on."""
    return config.dataset if model == "cnn" else "text"


def plan(config: Config) -> list[Run]:
    """List all training runs, the dense one of a network and seed before those that prune it."""
    cuts = [*((c, 0.0) for c in config.channels), *((0.0, n) for n in config.layers)]
    trials = [("dense", 0.0, 0.0), *((m, *cut) for m in config.methods for cut in cuts)]
    seeds = range(config.seeds)
    return [Run(m, *trial, seed) for m in config.models for seed in seeds for trial in trials]


def trained_of(config: Config, model: str, seed: int) -> Path:
    """Say where the network lies that all runs of a seed prune."""
    return config.out / model / f"seed_{seed}" / "trained.safetensors"


def file_of(config: Config, run: Run) -> Path:
    """Say where the network of a training run lies."""
    removed = f"channels_{run.channels_removed:g}_layers_{run.layers_removed:g}"
    return config.out / run.model / f"seed_{run.seed}" / f"{run.method}_{removed}.safetensors"


class Task(NamedTuple):
    """A network, what it is trained and tested on, and for how long.

    Attributes:
      model: linen module that gives logits.
      dense: the network, with shapes in place of variables.
      take: gives the training examples of some indices.
      examples: how many there are.
      test: what is reported.
      training: how it is trained.
      compile_: what ``train.compiler`` made.
    """

    model: nn.Module
    dense: Network
    take: Callable[[np.ndarray], data.Examples]
    examples: int
    test: data.Examples
    training: Training
    compile_: train.Compile


def load(config: Config, model: str) -> Task:
    """Load what a network is trained and tested on.

    Images are to be told apart. Of a text the next character is to be predicted, whatever has been
    seen: at every position of a window.
    """
    name = data_of(config, model)
    if name == "text":
        text = data.load_text()
        take, examples = functools.partial(windows, text.train), len(text.train) - CONTEXT
        test = windows(text.test, np.arange(0, len(text.test) - CONTEXT, CONTEXT))
    else:
        images = data.load(name, config.data_path)
        take, examples = functools.partial(pick, images.train), len(images.train.targets)
        test = images.test
    module, training = MODELS[name], training_of(config, model)
    shapes = jax.eval_shape(module.init, jax.random.key(0), test.inputs[:1])
    dense = small_networks.whole(module, shapes)
    return Task(module, dense, take, examples, test, training, train.compiler())


def pick(examples: data.Examples, indices: np.ndarray) -> data.Examples:
    """Give some of the examples."""
    return jax.tree.map(lambda array: array[indices], examples)


def windows(codes: np.ndarray, starts: np.ndarray) -> data.Examples:
    """Give windows of a text, and beside each character the one that comes after it."""
    cut = codes[starts[:, None] + np.arange(CONTEXT + 1)]
    return data.Examples(cut[:, :-1], cut[:, 1:])


def train_all(config: Config, missing: list[Run]) -> Iterator[Record]:
    """Train what is ``missing``, and yield a record for each training run."""
    for model, of_model in itertools.groupby(missing, lambda run: run.model):
        task = load(config, model)
        for seed, of_seed in itertools.groupby(of_model, lambda run: run.seed):
            yield from train_seed(config, task, seed, list(of_seed))


def train_seed(config: Config, task: Task, seed: int, missing: list[Run]) -> Iterator[Record]:
    """Train a network or load it, then prune and fine-tune it in all ways that are ``missing``."""
    init_key, order_key, prune_key = jax.random.split(jax.random.key(seed), 3)
    steps, more, batch_size, highest = task.training
    order = train.batch_order(
        order_key, examples=task.examples, steps=steps + more, batch_size=batch_size
    )
    before, after = np.split(np.asarray(order), [steps])
    path = trained_of(config, missing[0].model, seed)
    if not path.exists():
        start = jax.jit(task.model.init)(init_key, task.test.inputs[:1])
        state = train.clipped_adam(0.0).init(start["params"])
        pairs = zip(before, train.learning_rates(highest, steps), strict=True)
        network, _ = go_on(task, task.dense._replace(variables=start), state, pairs)
        small_networks.save(path, network)
    trained = small_networks.load(path, task.dense)
    pairs = list(zip(after, train.learning_rates(highest, more), strict=True))
    for run in missing:
        network, left = fine_tune(config, task, run, trained, pairs, key=prune_key)
        small_networks.save(file_of(config, run), network)
        yield {**run._asdict(), **measure(task, network), "left": left}


Pairs = Iterable[tuple[np.ndarray, np.ndarray]]  # which examples a batch has, a learning rate


def go_on(
    task: Task, network: Network, state: Any, pairs: Pairs, *, held: bool = False
) -> tuple[Network, Any]:
    """Go on with the training; if ``held``, under masks."""
    variables, state = train.loop(
        lambda rate: train.Recipe(network.learn, train.clipped_adam(rate, held=held)),
        network.variables,
        state,
        ((task.take(indices), rate) for indices, rate in pairs),
        task.compile_,
    )
    return network._replace(variables=variables), state


def fine_tune(
    config: Config, task: Task, run: Run, network: Network, pairs: list[Any], *, key: jax.Array
) -> tuple[Network, dict[str, int]]:
    """Go on with the training, and prune on the way.

    Between its rounds iterative pruning holds masks on the whole network, whose program is there
    already. With the last round, after a quarter of the steps, what they remove is cut out of the
    network and of the optimizer's state, and the small network goes on.

    Returns:
      The network, and how many units of every group are left, by its name.
    """
    state = train.clipped_adam(0.0, held=True).init(network.variables["params"])
    if run.method == "dense":
        return go_on(task, network, state.inner_state, pairs)[0], {}
    groups, masks = find_units(network, task.test.inputs[:1], layers=run.layers_removed > 0), None
    removed = run.channels_removed or run.layers_removed
    rounds = config.rounds if run.method == "iterative" else 1
    starts = np.linspace(0, len(pairs) // 4, rounds).astype(int)
    for n, (start, end) in enumerate(itertools.pairwise([*starts, len(pairs)]), start=1):
        part = pairs[start:end]
        batches = (task.take(indices) for indices, _ in part[:SCORED_BATCHES])
        masks = jp.find_masks(
            network.variables["params"],
            1 - (1 - removed) ** (n / rounds),
            criterion=CRITERIA[config.criterion],
            pattern=jp.patterns.Coupled(groups.at("params"), normalize=not run.layers_removed),
            scope=jp.scopes.across
            if run.layers_removed or config.scope == "across"
            else jp.scopes.per_leaf,
            within=masks,
            grads=train.mean_gradient(network.learn, network.variables, batches, task.compile_),
            key=jax.random.fold_in(key, n),
        )
        network, state = network.masked(masks), jp.with_masks(state, masks)
        if n < rounds:
            network, state = go_on(task, network, state, part, held=True)
    params, masks = (
        network.variables["params"],
        groups.complete({"params": masks}, network.variables),
    )
    tx = train.clipped_adam(0.0)
    state = jp.shrink_state(tx, state.inner_state, params, masks["params"])
    left = {name: int(alive.sum()) for name, alive in groups.keep(masks).items()}
    network = small_networks.cut_down(network, jp.cut_list(network.variables, masks))
    return go_on(task, network, state, part)[0], left


def find_units(network: Network, inputs: Any, *, layers: bool) -> jp.Groups:
    """Find what can be removed: layers, or channels with all that is coupled to them.

    Of the channels of attention whole heads are removed, which leaves the others as they are.
    """
    if layers:
        return jp.find_blocks(network.infer, network.variables, inputs)
    groups = jp.find_groups(network.infer, network.variables, inputs)
    return jp.Groups([group for group in groups if not any(map(inside_heads, group.members))])


def inside_heads(member: jp.Member) -> bool:
    """Tell whether a member has the channels of a head for units, and not the heads."""
    return re.fullmatch(r".*/(query|value)/bias", member.path) is not None and member.axis == 1


def measure(task: Task, network: Network) -> Record:
    """Put a network in figures."""
    _, infer, variables, _ = network
    return {
        **train.evaluate(infer, variables, task.test, task.compile_),
        "parameters": jp.size_of(variables["params"], {}),
        "flops": jp.count_flops(infer, variables, task.test.inputs[:1]),
    }


def latencies(config: Config, planned: list[Run]) -> list[Record]:
    """Time the networks of the first seed, or read how long they took when they were timed."""
    path = config.out / "latency.json"
    if path.exists():
        return json.loads(path.read_text())["networks"]

    @functools.cache
    def dense_of(model: str) -> tuple[Network, timing.Task, np.ndarray]:
        task = load(config, model)
        dense = small_networks.load(trained_of(config, model, seed=0), task.dense)
        inputs = task.test.inputs[:LATENCY_BATCH]
        return dense, timing.call(dense.infer, dense.variables, inputs), inputs

    timed, found = [run for run in planned if run.seed == 0 and run.method != "dense"], []
    for run in tqdm(timed, unit="network", desc="latency"):
        dense, call, inputs = dense_of(run.model)
        network = small_networks.load(file_of(config, run), dense)
        small = timing.call(network.infer, network.variables, inputs)
        found.append({**run._asdict(), **timing.compare(small, call, turns=LATENCY_TURNS)})
    told = {"batch": LATENCY_BATCH, "machine": timing.machine(), "networks": found}
    files.write(path, json.dumps(told, indent=2) + "\n")
    return found


def report(config: Config, records: list[Record], times: list[Record]) -> Record:
    """Write the summary, the figure and the answer, print the tables, return the summary."""
    rows = figures.summarise(records, times)
    summary = {"dataset": config.dataset, "rows": rows}
    answer = figures.answer(rows, dataset=config.dataset)
    figure = figures.tradeoff_figure(rows)
    show.write(config.out, summary, answer=answer, tradeoff=figure)
    show.printed(
        figures.accuracy_table(rows, title=f"images: {config.dataset}, seeds: {config.seeds}"),
        figures.cost_table(rows, batch=LATENCY_BATCH),
        rich.markdown.Markdown(answer),
        f"Figure, metrics, networks and answer: {config.out}",
        width=125,
    )
    return summary


if __name__ == "__main__":
    runner.start(Config, main)
