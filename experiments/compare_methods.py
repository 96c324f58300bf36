"""Which approach when: the families of pruning methods on equal budgets and equal batches."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.markdown
import rich.table
import tyro
from flax.traverse_util import flatten_dict
from tqdm import tqdm

import jaxprune as jp
from experiments.common import (
    comparison,
    costs,
    data,
    figures,
    parallel,
    processes,
    programs,
    runs,
    training,
)
from experiments.common.models import MLP, LeNet5

Name = Literal[
    "one_shot",
    "iterative",
    "iterative_one_shot",
    "gradual",
    "ac_dc",
    "straight_through",
    "rigl",
    "set",
    "static",
    "random_init",
    "magnitude_init",
    "snip",
    "grasp",
    "synflow",
]
MODELS = {"digits": MLP((100, 50), 10), "mnist": LeNet5(10)}
DEFAULT_STEPS = {"digits": 1000, "mnist": 2000}
SCORED_EXAMPLES = 256  # what SNIP and GraSP look at
STATIC = ("method", "model", "learning_rate")


@dataclasses.dataclass(frozen=True)
class Config:
    """Train with every pruning method at every sparsity, and say which approach to take when.

    All runs of a seed start from the same weights, see the same batches and train for the same
    number of steps with Adam, whose learning rate falls to 0 as a cosine. A run that was stopped
    goes on with the same command.

    Methods that prune or regrow weights share the sparsity out among the layers by ERK. The scores
    at initialisation (magnitude_init, snip, grasp, synflow) rank all layers together, as in their
    papers; random_init does so too, which gives all layers about the same density. static draws
    its mask at random as well, but by ERK.

    Attributes:
      dataset: digits (from scikit-learn, network 64-100-50-10) or mnist (LeNet-5).
      data_path: MNIST as one .npz in the layout of keras; downloaded once if left out.
      methods: what to compare; the dense network is trained too.
      sparsities: fractions of the weights to remove.
      seeds: how many seeds, counted from 0.
      steps: training steps of every run (digits 1000, mnist 2000).
      batch_size: examples of a training step.
      learning_rate: of Adam, at the first step.
      parallel_seeds: whether the seeds of a method train side by side in one program; auto does
        where that was measured to be faster. Results are the same but for float rounding.
      out: run folder (results/compare_methods_DATASET).
      peers: other processes that share the run.

    References:
      Gale et al., `The State of Sparsity in Deep Neural Networks
      <https://arxiv.org/abs/1902.09574>`_, 2019.
      Frankle et al., `Pruning Neural Networks at Initialization: Why Are We Missing the Mark?
      <https://arxiv.org/abs/2009.08576>`_, 2021.
    """

    dataset: Literal["digits", "mnist"] = "digits"
    data_path: Path | None = None
    methods: tuple[Name, ...] = get_args(Name)
    sparsities: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
    seeds: int = 5
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 5e-3
    parallel_seeds: Literal["auto", "on", "off"] = "auto"
    out: Path | None = None
    peers: Annotated[processes.Peers, tyro.conf.arg(name="")] = processes.ALONE


def beat(steps: int) -> dict[str, int]:
    """Fifty events, the last of them after three quarters of the training."""
    every = max(1, 3 * steps // 200)
    return {"begin": every, "end": 3 * steps // 4, "every": every}


class Trial(NamedTuple):
    """What a method has to work with.

    Attributes:
      sparsity: fraction to remove of all prunable weights; traced.
      layers: the same total shared out by ERK, a number for each prunable leaf; traced.
      steps: training steps.
      key: for what the method draws.
      loss: from params, examples and a temperature of the logits to the mean loss.
      apply: from params and images to logits.
      examples: the first of the training, for scores at initialisation.
    """

    sparsity: jax.Array
    layers: Any
    steps: int
    key: jax.Array
    loss: Callable[..., jax.Array]
    apply: Callable[[Any, jax.Array], jax.Array]
    examples: data.Split

    def at(self, share: float) -> int:
        """Step at which a share of the training is done."""
        return int(share * self.steps)

    def rounds(self, count: int) -> dict[str, int]:
        """Events an eighth of the training apart, so that the fifth leaves three eighths of it."""
        every = self.at(1 / 8)
        return {"begin": every, "end": count * every, "every": every}

    def rate(self, count: int) -> Any:
        """Fraction of a layer's remaining weights that each of ``count`` equal rounds removes."""
        return jax.tree.map(lambda s: 1 - (1 - s) ** (1 / count), self.layers)

    def halfway_then_all(self, step: jax.Array) -> Any:
        """Sparsity of four rounds that keep the square root of the density, and of a last one."""
        halfway = jp.schedules.geometric(self.rate(8), **self.rounds(4))(step)
        last = step >= self.rounds(5)["end"]
        return jax.tree.map(lambda h, s: jnp.where(last, s, h), halfway, self.layers)


def fixed(
    inner: optax.GradientTransformation, find: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """Hold the masks that ``find`` gives for the weights that training starts from."""
    tx = jp.hold(inner)
    return optax.GradientTransformationExtraArgs(
        lambda params: jp.with_masks(tx.init(params), find(params)), tx.update
    )


def across(trial: Trial, criterion: Callable[..., Any], **evidence: Any) -> Callable[[Any], Any]:
    """Find masks at initialisation by one ranking of all layers."""
    return lambda params: jp.find_masks(
        params, trial.sparsity, criterion=criterion, scope=jp.scopes.across, **evidence
    )


# Every method, as a wrapper of the optimizer `tx` for the trial `t`.
METHODS: dict[str, Callable[[Any, Trial], Any]] = {
    "dense": lambda tx, t: jp.hold(tx),
    # Train densely, prune on the way.
    "one_shot": lambda tx, t: jp.prune(
        tx, schedule=jp.schedules.one_shot(t.layers, at=t.at(1 / 2))
    ),
    "iterative": lambda tx, t: jp.prune(
        tx, schedule=jp.schedules.geometric(t.rate(5), **t.rounds(5))
    ),
    "iterative_one_shot": lambda tx, t: jp.prune(
        tx, schedule=jp.schedules.custom(t.halfway_then_all, **t.rounds(5))
    ),
    "gradual": lambda tx, t: jp.prune(tx, schedule=jp.schedules.cubic(t.layers, **beat(t.steps))),
    "ac_dc": lambda tx, t: jp.prune(
        tx,
        schedule=jp.schedules.cyclic(
            t.layers, dense=t.at(1 / 8), sparse=t.at(1 / 8), begin=t.at(1 / 8), end=t.at(5 / 8)
        ),
    ),
    "straight_through": lambda tx, t: jp.straight_through(
        tx, schedule=jp.schedules.custom(lambda _: t.layers, **beat(t.steps) | {"begin": 0})
    ),
    # Train sparsely all along.
    "rigl": lambda tx, t: jp.dynamic.rigl(tx, sparsity=t.layers, key=t.key, **beat(t.steps)),
    "set": lambda tx, t: jp.dynamic.set(tx, sparsity=t.layers, key=t.key, **beat(t.steps)),
    "static": lambda tx, t: fixed(
        tx, lambda p: jp.find_masks(p, t.layers, criterion=jp.criteria.random, key=t.key)
    ),
    # Prune at initialisation.
    "random_init": lambda tx, t: fixed(tx, across(t, jp.criteria.random, key=t.key)),
    "magnitude_init": lambda tx, t: fixed(tx, across(t, jp.criteria.magnitude)),
    "snip": lambda tx, t: fixed(tx, across(t, jp.criteria.snip, loss_fn=t.loss, batch=t.examples)),
    "grasp": lambda tx, t: fixed(
        tx,
        across(
            t,
            jp.criteria.grasp,
            loss_fn=functools.partial(t.loss, temperature=200.0),
            batch=t.examples,
        ),
    ),
    "synflow": lambda tx, t: fixed(
        tx,
        across(t, jp.criteria.synflow, rounds=100, apply_fn=t.apply, batch=t.examples.images[:1]),
    ),
}


class Seed(NamedTuple):
    """What all runs of a seed share: starting weights, order of the examples, and a key."""

    start: Any
    order: jax.Array
    key: jax.Array


class Target(NamedTuple):
    """A sparsity, of the whole network and of each layer by ERK."""

    sparsity: Any
    layers: Any


class Outcome(NamedTuple):
    """What a training run leaves behind.

    Attributes:
      params: the trained network with its zeros.
      masks: the masks in the end.
      kept: weights that each layer keeps at each step, `[steps, layers]`.
      hits: test examples that the network gets right.
    """

    params: Any
    masks: Any
    kept: jax.Array
    hits: jax.Array


def train(
    seed: Seed,
    target: Target,
    dataset: data.Dataset,
    *,
    method: str,
    model: nn.Module,
    learning_rate: float,
) -> Outcome:
    """Train and prune: the whole run is one scan, whatever the method.

    Sparsities are arguments, so each method is compiled once for all of them.
    """

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return model.apply({"params": params}, images)

    def loss(params: Any, batch: data.Split, temperature: float = 1.0) -> jax.Array:
        logits = apply(params, batch.images) / temperature
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    def take(indices: jax.Array) -> data.Split:
        return jax.tree.map(lambda array: array[indices], dataset.train)

    steps = len(seed.order)
    trial = Trial(
        sparsity=target.sparsity,
        layers=target.layers,
        steps=steps,
        key=seed.key,
        loss=loss,
        apply=apply,
        examples=take(seed.order.reshape(-1)[:SCORED_EXAMPLES]),
    )
    tx = METHODS[method](optax.adam(optax.cosine_decay_schedule(learning_rate, steps)), trial)
    # Straight-through keeps dense weights and shows sparse ones; all others are what they show.
    keeps_dense = method == "straight_through"
    shown = jp.forward_params if keeps_dense else lambda params, state: params

    def step(carry: tuple[Any, Any], batch: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
        params, state = carry
        kept = jnp.stack([mask.sum() for mask in jax.tree.leaves(jp.get_masks(state))])
        grads = jax.grad(loss)(shown(params, state), take(batch))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), kept

    state = tx.init(seed.start)
    start = seed.start if keeps_dense else jp.apply_masks(seed.start, jp.get_masks(state))
    (params, state), kept = jax.lax.scan(step, (start, state), seed.order)
    params = shown(params, state)
    right = jax.lax.map(  # in parts, since the patches of all images at once are large
        lambda example: apply(params, example.images[None])[0].argmax() == example.labels,
        dataset.test,
        batch_size=500,
    )
    return Outcome(params=params, masks=jp.get_masks(state), kept=kept, hits=right.sum())


@functools.partial(jax.jit, static_argnames=STATIC)
def train_alone(seed: Seed, target: Target, dataset: data.Dataset, **settings: Any) -> Outcome:
    """Train one seed."""
    return train(seed, target, dataset, **settings)


@functools.partial(jax.jit, static_argnames=STATIC)
def train_together(
    stacked: Seed, target: Target, dataset: data.Dataset, **settings: Any
) -> Outcome:
    """Train seeds side by side; they and the outcome have a leading axis."""
    run = functools.partial(train, **settings)
    return parallel.side_by_side(run, stacked, target, dataset)


def main(config: Config) -> runs.Record | None:
    """Run the experiment, or what is left of it, and print, draw and return its summary.

    Of several processes the first does so, when all have done their share.
    """
    settings = resolve(config)
    planned = plan(settings)
    with processes.running(settings.peers, settings.out, recorded(settings)) as (share, records):
        finished = {run_of(record) for record in records}
        mine = [run for run in planned if share.has(run[2])]

        with tqdm(total=len(mine), initial=len(finished & set(mine)), unit="run") as bar:
            if set(mine) - finished:
                for record in run_all(settings, mine, finished):
                    runs.append_record(settings.out, record, share.part)
                    bar.set_postfix_str("{method} at {sparsity}".format(**record), refresh=False)
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
    if name not in MODELS:
        raise ValueError(f"`dataset={name!r}` is not known. Choose one of {', '.join(MODELS)}.")
    defaults = {"steps": DEFAULT_STEPS[name], "out": Path("results") / f"compare_methods_{name}"}
    missing = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    settings = dataclasses.replace(config, **missing)
    if problems := _problems(settings):
        raise ValueError(f"{'; '.join(problems)}. Change it, or leave it out for the default.")
    return settings


def _problems(settings: Config) -> list[str]:
    """Say which fields have a bad value, and what would be right."""
    s = settings
    unknown = [name for name in s.methods if name not in get_args(Name)]
    checks = [
        ("methods", not unknown, f"may name {', '.join(get_args(Name))}, but not {unknown}"),
        ("methods", len(set(s.methods)) == len(s.methods) > 0, "must name each method once"),
        ("sparsities", all(0 < x < 1 for x in s.sparsities), "must lie between 0 and 1"),
        (
            "sparsities",
            len(set(s.sparsities)) == len(s.sparsities) > 0,
            "must be distinct, and one at least",
        ),
        ("seeds", s.seeds > 0, "must be positive"),
        ("steps", s.steps >= 16, "must be 16 or more, or the phases of a method have no room"),
        ("batch_size", s.batch_size > 0, "must be positive"),
        ("learning_rate", 0 < s.learning_rate < math.inf, "must be positive and finite"),
        ("parallel_seeds", s.parallel_seeds in ("auto", "on", "off"), "must be auto, on or off"),
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


def plan(settings: Config) -> list[tuple[str, float, int]]:
    """List all training runs as (method, sparsity, seed)."""
    trials = [("dense", 0.0), *((m, s) for m in settings.methods for s in settings.sparsities)]
    return [
        (method, sparsity, seed) for method, sparsity in trials for seed in range(settings.seeds)
    ]


def run_of(record: runs.Record) -> tuple[str, float, int]:
    """Name the training run that a record tells of."""
    return record["method"], record["sparsity"], record["seed"]


def run_all(
    settings: Config,
    planned: list[tuple[str, float, int]],
    finished: set[tuple[str, float, int]],
) -> Iterator[runs.Record]:
    """Train what is not ``finished``, and yield a record for each training run."""
    model = MODELS[settings.dataset]
    numbers = sorted({seed for *_, seed in planned})
    dataset = load(settings, len(numbers))
    seeds = {number: make_seed(settings, model, dataset, number) for number in numbers}
    start = seeds[numbers[0]].start
    measure = measurement(settings, model, start, dataset)
    for method, sparsity in dict.fromkeys(run[:2] for run in planned):
        missing = [number for number in numbers if (method, sparsity, number) not in finished]
        fit = functools.partial(
            fit_seeds,
            target=share_out(start, sparsity),
            dataset=dataset,
            together=together(settings),
            method=method,
            model=model,
            learning_rate=settings.learning_rate,
        )
        for number, outcome in fit(seeds, missing):
            here = {"method": method, "sparsity": sparsity, "seed": number}
            yield {**here, **measure(outcome, method)}


def load(settings: Config, side_by_side: int) -> data.Dataset:
    """Load the dataset onto the device, or onto those that share the seeds."""
    mnist = settings.dataset == "mnist"
    dataset = data.load_mnist(settings.data_path) if mnist else data.load_digits()
    if together(settings):
        return parallel.everywhere(dataset, side_by_side)
    return jax.device_put(dataset)


def make_seed(settings: Config, model: nn.Module, dataset: data.Dataset, seed: int) -> Seed:
    """Draw what all runs of a seed share."""
    init_key, order_key, method_key = jax.random.split(jax.random.key(seed), 3)
    order = training.batch_order(
        order_key,
        examples=len(dataset.train.labels),
        steps=settings.steps,
        batch_size=settings.batch_size,
    )
    start = draw(init_key, dataset.train.images[:1], model=model)
    return Seed(start=start, order=order, key=method_key)


@functools.partial(jax.jit, static_argnames="model")
def draw(key: jax.Array, images: jax.Array, *, model: nn.Module) -> Any:
    """Draw the weights that training starts from."""
    return model.init(key, images)["params"]


def share_out(params: Any, sparsity: float) -> Target:
    """Turn a sparsity into counts that are exact: of the network, and of each layer by ERK."""
    total = sum(leaf.size for leaf in jax.tree.leaves(jp.prunable(params)))
    return Target(sparsity=round(sparsity * total) / total, layers=jp.scopes.erk(params, sparsity))


def together(settings: Config) -> bool:
    """Decide whether the seeds of a method train side by side.

    What `auto` goes by is `python -m benchmarks.parallel_seeds`, on two busy CPU cores: a step of
    gradual pruning takes a seed of five 0.81 of the time that one alone takes (95 % interval 0.78
    to 0.92) with the network of the digits, one of eight 1.30 times as long (0.95 to 1.88) with
    LeNet-5. Together, seeds share what a step costs whatever its size, which is a good part of it
    for a small network on a CPU, and should be most of it for either on an accelerator, where it
    has not been measured.
    """
    if settings.parallel_seeds != "auto":
        return settings.parallel_seeds == "on"
    return settings.dataset == "digits" or jax.default_backend() != "cpu"


def fit_seeds(
    seeds: dict[int, Seed], missing: list[int], *, together: bool, **settings: Any
) -> Iterator[tuple[int, Outcome]]:
    """Train the ``missing`` seeds, one after another or in one program.

    That program is always the one of all seeds, so that a run which goes on has the same numbers.
    """
    if together and missing:
        stacked = parallel.stack(list(seeds.values()))
        outcomes = parallel.unstack(train_together(stacked, **settings))
        for number, outcome in zip(seeds, outcomes, strict=True):
            if number in missing:
                yield number, outcome
    if not together:
        for number in missing:
            yield number, jax.device_get(train_alone(seeds[number], **settings))


def measurement(
    settings: Config, model: nn.Module, params: Any, dataset: data.Dataset
) -> Callable[[Outcome, str], runs.Record]:
    """Prepare what puts a training run in figures."""
    weights = flatten_dict(jp.prunable(params), sep="/")
    weights = {path: leaf.size for path, leaf in weights.items() if leaf is not None}
    sizes = np.array(list(weights.values()))
    everywhere = costs.output_positions(model, params, dataset.train.images)
    positions = np.array([everywhere[path] for path in weights])
    others = sum(leaf.size for leaf in jax.tree.leaves(params)) - int(sizes.sum())

    def measure(outcome: Outcome, method: str) -> runs.Record:
        left = np.array([mask.sum() for mask in jax.tree.leaves(outcome.masks)])
        return {
            "accuracy": int(outcome.hits) / len(dataset.test.labels),
            "kept": int(left.sum()),
            "densities": dict(zip(weights, (left / sizes).round(6).tolist(), strict=True)),
            "flops": costs.training_flops(
                outcome.kept,
                sizes=sizes,
                positions=positions,
                dense_gradients=dense_gradients(method, settings.steps),
                batch_size=settings.batch_size,
            ),
            "inference_flops": costs.inference_flops(left, positions=positions),
            "bytes": costs.model_bytes(left, sizes=sizes, others=others),
        }

    return measure


def dense_gradients(method: str, steps: int) -> np.ndarray:
    """Say at which steps a method needs the gradient of removed weights too, bool `[steps]`."""
    if method == "rigl":
        return np.asarray(jp.schedules.linear(1.0, **beat(steps)).due(np.arange(steps)))
    return np.full(steps, method == "straight_through")


def report(settings: Config, records: list[runs.Record]) -> runs.Record:
    """Write the summary, the figure and the answer, print the table, return the summary."""
    rows = comparison.summarise(records)
    summary = {"dataset": settings.dataset, "steps": settings.steps, "rows": rows}
    answer = comparison.answer(rows, dataset=settings.dataset, steps=settings.steps)
    runs.write(settings.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    runs.write(settings.out / "accuracy.png", figures.png(figures.comparison_figure(rows)))
    runs.write(settings.out / "answer.md", answer)

    console = rich.console.Console(width=None if sys.stdout.isatty() else 120)
    where = f"{settings.dataset}, seeds: {settings.seeds}"
    console.print(accuracy_table(rows, title=f"Test accuracy [%], mean ± std; {where}"))
    console.print(cost_table(rows, title=f"Training FLOPs [% of dense]; {where}"))
    console.print(rich.markdown.Markdown(answer))
    console.print(f"Figure, metrics and answer: {settings.out}")
    return summary


def accuracy_table(rows: list[runs.Record], *, title: str) -> rich.table.Table:
    """Lay out the accuracy of a method a line, sparsities across."""
    lines = _lines(rows, comparison.percent, title)
    lines.caption = f"dense: {comparison.percent(rows[0])}"
    return lines


def cost_table(rows: list[runs.Record], *, title: str) -> rich.table.Table:
    """Lay out the training FLOPs of a method a line, and the bytes, which are the same for all."""
    lines = _lines(rows, lambda row: f"{100 * row['flops_share']:.1f}", title)
    sizes = [comparison.at_sparsity(rows, s)[0]["bytes"] for s in comparison.sparsities(rows)]
    lines.add_section()
    lines.add_row("model bytes", *(f"{size:,}" for size in sizes))
    lines.caption = f"dense: {rows[0]['flops']:.4g} FLOPs, {rows[0]['bytes']:,} bytes"
    return lines


def _lines(
    rows: list[runs.Record], cell: Callable[[runs.Record], str], title: str
) -> rich.table.Table:
    sparsities = comparison.sparsities(rows)
    lines = rich.table.Table("method", *(f"{100 * s:g} %" for s in sparsities), title=title)
    for method in comparison.methods(rows):
        lines.add_row(method, *(cell(comparison.row_at(rows, method, s)) for s in sparsities))
    return lines


if __name__ == "__main__":
    programs.keep()
    main(tyro.cli(Config))
