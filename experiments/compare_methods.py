"""Which approach when: the families of pruning methods on equal budgets and equal batches."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.markdown
from flax.traverse_util import flatten_dict

import jaxprune as jp
from experiments import compare_methods_figures as figures
from experiments.common import data, runner, settings, show, train
from experiments.common.models import MLP, LeNet5
from experiments.common.runner import Record

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
FIELDS = ("method", "sparsity", "seed")  # that tell training runs apart


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
      seeds: how many seeds, counted from 0, or a range of them such as 3:6, for a part of a run
        that `python -m experiments.merge` puts together.
      steps: training steps of every run (digits 1000, mnist 2000).
      batch_size: examples of a training step.
      learning_rate: of Adam, at the first step.
      parallel_seeds: whether the seeds of a method train side by side in one program; auto does
        where that was measured to be faster. Results are the same but for float rounding.
      out: run folder (results/compare_methods_DATASET).

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
    seeds: int | str = 5
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float = 5e-3
    parallel_seeds: Literal["auto", "on", "off"] = "auto"
    out: Path | None = None


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
    examples: data.Examples

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
    "static": lambda tx, t: jp.hold(
        tx, masks=lambda p: jp.find_masks(p, t.layers, criterion=jp.criteria.random, key=t.key)
    ),
    # Prune at initialisation.
    "random_init": lambda tx, t: jp.hold(tx, masks=across(t, jp.criteria.random, key=t.key)),
    "magnitude_init": lambda tx, t: jp.hold(tx, masks=across(t, jp.criteria.magnitude)),
    "snip": lambda tx, t: jp.hold(
        tx, across(t, jp.criteria.snip, loss_fn=t.loss, batch=t.examples)
    ),
    "grasp": lambda tx, t: jp.hold(
        tx,
        masks=across(
            t,
            jp.criteria.grasp,
            loss_fn=functools.partial(t.loss, temperature=200.0),
            batch=t.examples,
        ),
    ),
    "synflow": lambda tx, t: jp.hold(
        tx,
        masks=across(
            t, jp.criteria.synflow, rounds=100, apply_fn=t.apply, batch=t.examples.inputs[:1]
        ),
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


def train_method(
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
    learn = train.learner(model)

    def apply(params: Any, images: jax.Array) -> jax.Array:
        return learn({"params": params}, images)[0]

    def loss(params: Any, batch: data.Examples, temperature: float = 1.0) -> jax.Array:
        return train.cross_entropy(apply(params, batch.inputs) / temperature, batch.targets)

    def count(state: Any) -> jax.Array:
        return jnp.stack([mask.sum() for mask in jax.tree.leaves(jp.get_masks(state))])

    steps = len(seed.order)
    scored = seed.order.reshape(-1)[:SCORED_EXAMPLES]
    trial = Trial(
        sparsity=target.sparsity,
        layers=target.layers,
        steps=steps,
        key=seed.key,
        loss=loss,
        apply=apply,
        examples=jax.tree.map(lambda array: array[scored], dataset.train),
    )
    tx = METHODS[method](optax.adam(optax.cosine_decay_schedule(learning_rate, steps)), trial)
    # Straight-through keeps dense weights and shows sparse ones; all others are what they show.
    keeps_dense = method == "straight_through"
    shown = jp.forward_params if keeps_dense else lambda params, state: params

    state = tx.init(seed.start)
    start = seed.start if keeps_dense else jp.apply_masks(seed.start, jp.get_masks(state))
    recipe = train.Recipe(learn, tx, shown=shown)
    variables, state, kept = train.scan(
        recipe, {"params": start}, state, dataset.train, seed.order, look=count
    )
    params = shown(variables["params"], state)
    right = jax.lax.map(  # in parts, since the patches of all images at once are large
        lambda example: apply(params, example.inputs[None])[0].argmax() == example.targets,
        dataset.test,
        batch_size=500,
    )
    return Outcome(params=params, masks=jp.get_masks(state), kept=kept, hits=right.sum())


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
    name = settings.known(config, "dataset", MODELS)
    out = Path("results") / f"compare_methods_{name}"
    c = settings.filled_in(config, steps=DEFAULT_STEPS[name], out=out)
    distinct = len(set(c.sparsities)) == len(c.sparsities) > 0
    settings.refuse(
        c,
        [
            *settings.names(c, "methods", get_args(Name)),
            ("sparsities", all(0 < x < 1 for x in c.sparsities), "must lie between 0 and 1"),
            ("sparsities", distinct, "must be distinct, and one at least"),
            ("seeds", settings.seed_range(c.seeds), settings.SEEDS),
            ("steps", c.steps >= 16, "must be 16 or more, or the phases of a method have no room"),
            *settings.positive(c, "batch_size"),
            ("learning_rate", 0 < c.learning_rate < math.inf, "must be positive and finite"),
            (
                "parallel_seeds",
                c.parallel_seeds in ("auto", "on", "off"),
                "must be auto, on or off",
            ),
            *settings.data_path(c),
        ],
    )
    return c


def plan(config: Config) -> list[tuple[str, float, int]]:
    """List all training runs as (method, sparsity, seed)."""
    trials = [("dense", 0.0), *((m, s) for m in config.methods for s in config.sparsities)]
    seeds = settings.seed_range(config.seeds)
    return [(method, sparsity, seed) for method, sparsity in trials for seed in seeds]


def together(config: Config) -> bool:
    """Decide whether the seeds of a method train side by side.

    What `auto` goes by is `python -m benchmarks.parallel_seeds`, on two busy CPU cores: a step of
    gradual pruning takes a seed of five 0.81 of the time that one alone takes (95 % interval 0.78
    to 0.92) with the network of the digits, one of eight 1.30 times as long (0.95 to 1.88) with
    LeNet-5. Together, seeds share what a step costs whatever its size, which is a good part of it
    for a small network on a CPU, and should be most of it for either on an accelerator, where it
    has not been measured.
    """
    if config.parallel_seeds != "auto":
        return config.parallel_seeds == "on"
    return config.dataset == "digits" or jax.default_backend() != "cpu"


def train_all(config: Config, missing: list[tuple[str, float, int]]) -> Iterator[Record]:
    """Train what is ``missing``, and yield a record for each training run.

    Seeds that train side by side do so all of them, even if only one is ``missing``: so a run
    that goes on has the same numbers.
    """
    model, numbers = MODELS[config.dataset], list(settings.seed_range(config.seeds))
    dataset = data.load(config.dataset, config.data_path)
    dataset = train.placed(dataset, len(numbers), together=together(config))
    seeds = {number: make_seed(config, model, dataset, number) for number in numbers}
    start = seeds[numbers[0]].start
    measure = measurement(config, model, start, dataset)
    for method, sparsity in dict.fromkeys((m, s) for m, s, _ in missing):
        wanted = numbers
        if not together(config):
            wanted = [number for number in numbers if (method, sparsity, number) in missing]
        outcomes = train.each_seed(
            train_method,
            [seeds[number] for number in wanted],
            share_out(start, sparsity),
            dataset,
            together=together(config),
            method=method,
            model=model,
            learning_rate=config.learning_rate,
        )
        for number, outcome in zip(wanted, outcomes, strict=True):
            here = {"method": method, "sparsity": sparsity, "seed": number}
            yield {**here, **measure(outcome, method)}


def make_seed(config: Config, model: nn.Module, dataset: data.Dataset, seed: int) -> Seed:
    """Draw what all runs of a seed share."""
    init_key, order_key, method_key = jax.random.split(jax.random.key(seed), 3)
    order = train.batch_order(
        order_key,
        examples=len(dataset.train.targets),
        steps=config.steps,
        batch_size=config.batch_size,
    )
    start = draw(init_key, dataset.train.inputs[:1], model=model)
    return Seed(start=start, order=order, key=method_key)


@functools.partial(jax.jit, static_argnames="model")
def draw(key: jax.Array, images: jax.Array, *, model: nn.Module) -> Any:
    """Draw the weights that training starts from."""
    return model.init(key, images)["params"]


def share_out(params: Any, sparsity: float) -> Target:
    """Turn a sparsity into counts that are exact: of the network, and of each layer by ERK."""
    total = sum(leaf.size for leaf in jax.tree.leaves(jp.prunable(params)))
    return Target(sparsity=round(sparsity * total) / total, layers=jp.scopes.erk(params, sparsity))


def measurement(
    config: Config, model: nn.Module, params: Any, dataset: data.Dataset
) -> Callable[[Outcome, str], Record]:
    """Prepare what puts a training run in figures."""
    everywhere = output_positions(model, params, dataset.train.inputs)

    def measure(outcome: Outcome, method: str) -> Record:
        summary = jp.summary(outcome.params, outcome.masks)
        left, sizes = (np.array([getattr(r, n) for r in summary.rows]) for n in ("kept", "total"))
        positions = np.array([everywhere[row.path] for row in summary.rows])
        densities = (left / sizes).round(6).tolist()
        return {
            "accuracy": int(outcome.hits) / len(dataset.test.targets),
            "kept": summary.total.kept,
            "densities": {r.path: share for r, share in zip(summary.rows, densities, strict=True)},
            "flops": training_flops(
                outcome.kept,
                sizes=sizes,
                positions=positions,
                dense_gradients=dense_gradients(method, config.steps),
                batch_size=config.batch_size,
            ),
            "inference_flops": inference_flops(left, positions=positions),
            "bytes": model_bytes(summary),
        }

    return measure


def model_bytes(summary: jp.Summary) -> int:
    """Count the bytes of a stored float32 model.

    It stores the values that it keeps, one bit for each prunable weight that says where they are,
    and everything that is not prunable as it is. A dense model needs no bits.
    """
    total = summary.total
    size = total.packed_bytes if total.kept < total.total else total.dense_bytes
    return size + 4 * summary.others


def dense_gradients(method: str, steps: int) -> np.ndarray:
    """Say at which steps a method needs the gradient of removed weights too, bool `[steps]`."""
    if method == "rigl":
        return np.asarray(jp.schedules.linear(1.0, **beat(steps)).due(np.arange(steps)))
    return np.full(steps, method == "straight_through")


def training_flops(
    kept: np.ndarray,
    *,
    sizes: np.ndarray,
    positions: np.ndarray,
    dense_gradients: np.ndarray,
    batch_size: int,
) -> int:
    """Count what a training run would cost on a device that skips every zero.

    A weight that is kept costs 2 FLOPs at each position of its layer's output, for each example:
    forward, backward for the gradient of the layer's input, and again for that of its weights.
    This last part is dense where a method needs the gradient of removed weights too. Biases,
    activations, the optimizer, the search for masks and scores at initialisation are left out.

    Args:
      kept: weights that each layer keeps at each step, read off its masks, `[steps, layers]`.
      sizes: weights of each layer, `[layers]`.
      positions: positions at which each layer applies its weights, `[layers]`.
      dense_gradients: whether a step needs the gradient of all weights, bool `[steps]`.
      batch_size: examples of a step.
    """
    kept = np.asarray(kept, np.int64)
    gradients = np.where(dense_gradients[:, None], sizes, kept)
    return int(2 * batch_size * ((2 * kept + gradients) * positions).sum())


def inference_flops(kept: np.ndarray, *, positions: np.ndarray) -> int:
    """Count a forward pass of one example over ``kept`` weights a layer, `[layers]`."""
    return int(2 * (np.asarray(kept, np.int64) * positions).sum())


def output_positions(model: nn.Module, params: Any, images: jax.Array) -> dict[str, int]:
    """Count the positions at which each layer applies its kernel, by the kernel's path."""
    _, seen = jax.eval_shape(
        lambda params: model.apply({"params": params}, images[:1], capture_intermediates=True),
        params,
    )
    outputs = flatten_dict(seen["intermediates"], sep="/")
    return {
        path: math.prod(outputs[path.removesuffix("kernel") + "__call__"][0].shape[1:-1])
        for path in flatten_dict(params, sep="/")
        if path.endswith("/kernel")
    }


def report(config: Config, records: list[Record]) -> Record:
    """Write the summary, the figure and the answer, print the table, return the summary."""
    rows = figures.summarise(records)
    summary = {"dataset": config.dataset, "steps": config.steps, "rows": rows}
    answer = figures.answer(rows, dataset=config.dataset, steps=config.steps)
    show.write(config.out, summary, answer=answer, accuracy=figures.comparison_figure(rows))
    where = f"{config.dataset}, seeds: {config.seeds}"
    show.printed(
        figures.accuracy_table(rows, title=f"Test accuracy [%], mean ± std; {where}"),
        figures.cost_table(rows, title=f"Training FLOPs [% of dense]; {where}"),
        rich.markdown.Markdown(answer),
        f"Figure, metrics and answer: {config.out}",
    )
    return summary


if __name__ == "__main__":
    runner.start(Config, main)
