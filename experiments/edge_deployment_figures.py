"""Rows of stages on the way to a device, and what they say about what each costs and buys."""

from collections.abc import Callable

import numpy as np
import rich.table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.common.runner import Record
from experiments.common.show import gap, mean, percent, plain, spread

# Stages on the way to a device; files in int8 are squares of the colour of their float file.
STAGES = {
    "dense": ("0.35", "o"),
    "quantized": ("0.35", "s"),
    "pruned_one_shot": ("#56B4E9", "v"),
    "pruned_iterative": ("#56B4E9", "^"),
    "pruned": ("#0072B2", "o"),
    "pruned_distilled": ("#D55E00", "o"),
    "pruned_distilled_quantized": ("#D55E00", "s"),
    "thin_from_scratch": ("#000000", "x"),
    "distilled": ("#009E73", "D"),
    "searched": ("#CC79A7", "o"),
    "searched_quantized": ("#CC79A7", "s"),
}

COLUMNS = (
    "accuracy [%]",
    "points lost",
    "parameters",
    "MFLOPs",
    "kB",
    "gzipped",
    "ms, batch 1",
    "ms, batch 64",
)


def summarise(records: list[Record], latencies: list[Record], *, order: list[str]) -> list[Record]:
    """Gather the seeds of every stage that has files.

    Args:
      records: of the networks.
      latencies: of the files of the first seed.
      order: of the stages.

    Returns:
      A row for each. Accuracy is a mean, a standard deviation over the seeds (of the seeds
      themselves, divided by n) and the seeds; parameters, FLOPs and bytes are means; ``parity``
      (of float files, with the network in JAX) and ``agreement`` (of the classes, with JAX or with
      the float file) are those of the worst seed. A file in int8 has the parameters and FLOPs of
      that which was quantized.
    """
    timed = {record["stage"]: record for record in latencies}
    groups: dict[str, list[Record]] = {stage: [] for stage in order if stage in timed}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["stage"] in groups:
            groups[record["stage"]].append(record)
    return [
        {
            **{name: group[0][name] for name in ("stage", "method", "taught", "channels_removed")},
            "int8": group[0]["int8_of"] is not None,
            "accuracy": spread([record["accuracy"] for record in group]),
            **{name: mean(source, name) for name in ("parameters", "flops")},
            **{name: mean(group, name) for name in ("bytes", "gzip_bytes")},
            "parity": max((r["parity"] for r in group if "parity" in r), default=None),
            "agreement": min(record["agreement"] for record in group),
            **{name: _by_batch(timed[stage], key) for name, key in TIMES.items()},
        }
        for stage, group in groups.items()
        for source in [groups[group[0]["int8_of"] or stage]]
    ]


TIMES = {"latency_ms": "ms", "latency_ratio": "ratio"}


def _by_batch(timed: Record, key: str) -> Record:
    return {batch: times[key] for batch, times in timed.items() if batch != "stage"}


def trials(records: list[Record], *, sparsity: float, tolerance: float) -> Record:
    """Gather what the search has tried, and what it found.

    Returns:
      ``sparsity`` that was found, ``tolerance`` in points, and for each of the ``trials`` its
      sparsity and the accuracy on the validation set; dense is the one at 0.
    """
    found: dict[float, list[float]] = {}
    for record in sorted(records, key=lambda r: (r["channels_removed"], r["seed"])):
        if record["stage"] in ("dense", "search"):
            values = found.setdefault(record["channels_removed"], [])
            values.append(record["validation_accuracy"])
    tried = [{"sparsity": s, "accuracy": spread(values)} for s, values in found.items()]
    return {"sparsity": sparsity, "tolerance": tolerance, "trials": tried}


def row_of(rows: list[Record], stage: str) -> Record:
    """Find the row of a stage."""
    return next(row for row in rows if row["stage"] == stage)


def front(rows: list[Record], cost: Callable[[Record], float]) -> list[Record]:
    """Find the rows that nothing cheaper is as accurate as, the cheapest first."""
    best: list[Record] = []
    for row in sorted(rows, key=lambda row: (cost(row), -row["accuracy"]["mean"])):
        if not best or row["accuracy"]["mean"] > best[-1]["accuracy"]["mean"]:
            best.append(row)
    return best


def recovered(rows: list[Record]) -> tuple[float, list[float]]:
    """Say which share of what pruning loses distillation gives back.

    Returns:
      That of the means, and seed by seed; NaN where pruning loses nothing.
    """
    dense, pruned, taught = (
        np.array(row_of(rows, stage)["accuracy"]["seeds"])
        for stage in ("dense", "pruned", "pruned_distilled")
    )
    lost, back = dense - pruned, taught - pruned
    shares = [b / n if n > 0 else np.nan for b, n in zip(back, lost, strict=True)]
    return float(back.mean() / lost.mean()) if lost.mean() > 0 else np.nan, shares


def cells(row: Record, dense: Record) -> list[str]:
    """Write a row beside the dense one, under ``COLUMNS``."""
    return [
        percent(row),
        _points(dense, row),
        f"{row['parameters']:,.0f}",
        f"{row['flops'] / 1e6:.2f}",
        f"{row['bytes'] / 1e3:,.1f}",
        f"{row['gzip_bytes'] / 1e3:,.1f}",
        f"{row['latency_ms']['1']:.3f}",
        f"{row['latency_ms']['64']:.2f}",
    ]


def tables(rows: list[Record], *, title: str) -> list[rich.table.Table]:
    """Lay out a stage a line: what it gets right, then what it costs, in 80 columns each."""
    caption = "Accuracy is mean ± std over the seeds; all is that of the ONNX file."
    found = rich.table.Table(title=title), rich.table.Table(caption=caption)
    for lines, columns in zip(found, (slice(0, 3), slice(3, None)), strict=True):
        lines.add_column("stage", no_wrap=True)
        for name in COLUMNS[columns]:
            lines.add_column(name.replace(", ", ",\n"), justify="right", no_wrap=True)
        for row in rows:
            lines.add_row(row["stage"], *cells(row, rows[0])[columns])
    return list(found)


def answer(summary: Record) -> str:
    """Say in Markdown what each step costs and buys; every word of it is read off the rows."""
    rows = summary["rows"]
    dense = row_of(rows, "dense")
    lines = [
        "# From a trained network to a small device",
        "",
        f"{summary['dataset']}, seeds: {len(dense['accuracy']['seeds'])}. All figures are those of "
        "the ONNX files under onnxruntime on one thread: accuracy on the test set in percent, "
        "mean±std over the seeds, what is lost seed by seed; latency of the first seed. Every "
        "network but the searched one had the same number of training steps as the dense one.",
        "",
        f"| stage | {' | '.join(COLUMNS)} |",
        "|---" * (1 + len(COLUMNS)) + "|",
        *(f"| {row['stage']} | {' | '.join(cells(row, dense))} |" for row in rows),
        "",
        *_search(summary),
        *_buys(rows),
        *_distillation(rows),
        *_scratch(rows),
        *_rounds(rows),
        *_exact(rows),
    ]
    return "\n".join(lines) + "\n"


def _search(summary: Record) -> list[str]:
    """Whether a network is too heavy or too light for the tolerance."""
    rows, sparsity = summary["rows"], summary["search"]["sparsity"]
    points = f"{summary['search']['tolerance']:g} points"
    if not sparsity:
        return [
            "- The dense network is as light as it can be: no fraction of the channels that the "
            f"search tried can go within {points} of it on the validation set."
        ]
    removed = row_of(rows, "pruned")["channels_removed"]
    judged = "too heavy, too" if removed < sparsity else "too light"
    return [
        f"- The dense network is too heavy: within {points} of it, on the validation set, "
        f"{100 * sparsity:.3g} % of the channels can go. As a file in int8 that has "
        f"{_against(rows, 'searched_quantized')}. By the same measure, after as short a "
        f"fine-tuning, a network without {100 * removed:g} % of them is {judged}."
    ]


def _buys(rows: list[Record]) -> list[str]:
    stage = "pruned_distilled_quantized"
    return [f"- {stage} has {_against(rows, stage)}."]


def _against(rows: list[Record], stage: str) -> str:
    """Compare a stage with dense."""
    row, dense = row_of(rows, stage), row_of(rows, "dense")
    fast = {batch: 1 / ratio["median"] for batch, ratio in row["latency_ratio"].items()}
    return (
        f"1/{dense['bytes'] / row['bytes']:.1f} of the bytes and {fast['1']:.2f} times the speed "
        f"at batch 1 ({fast['64']:.2f} at batch 64), and loses {_points(dense, row)} points on the "
        "test set"
    )


def _distillation(rows: list[Record]) -> list[str]:
    dense, pruned = row_of(rows, "dense"), row_of(rows, "pruned")
    share, seeds = recovered(rows)
    if np.isnan(share):
        return ["- Pruning loses nothing in the mean, so there is nothing to give back."]
    each = ", ".join("-" if np.isnan(s) else f"{100 * s:.0f}" for s in seeds)
    return [
        f"- Of the {_points(dense, pruned)} points that pruning loses, distillation gives back "
        f"{100 * share:.0f} % (seed by seed: {each})."
    ]


def _scratch(rows: list[Record]) -> list[str]:
    pairs = (("pruned", "thin_from_scratch"), ("pruned_distilled", "distilled"))
    alone, taught = (_points(row_of(rows, one), row_of(rows, other)) for one, other in pairs)
    return [
        "- A trained network that was cut beats a thin one from fresh weights, in points, by "
        f"{alone} without and {taught} with the teacher."
    ]


def _rounds(rows: list[Record]) -> list[str]:
    plain = [
        row for row in rows if row["stage"] in ("pruned", "pruned_one_shot", "pruned_iterative")
    ]
    by_method = {row["method"]: row for row in plain}
    gaps = _points(by_method["iterative"], by_method["one_shot"])
    return [f"- iterative minus one_shot, in points: {gaps}."]


def _exact(rows: list[Record]) -> list[str]:
    parity = max(row["parity"] for row in rows if not row["int8"])
    float_, int8 = (min(r["agreement"] for r in rows if r["int8"] == kind) for kind in (0, 1))
    return [
        f"- On the whole test set logits of the float files differ from those of JAX by at most "
        f"{parity:.1e} of the largest, and their classes agree for {100 * float_:.2f} % or more; "
        f"classes of the int8 files agree with those of their float file for {100 * int8:.2f} % or "
        f"more."
    ]


def _points(row: Record, other: Record) -> str:
    mean, std = gap(row, other)
    return f"{100 * mean:.2f}±{100 * std:.2f}"


def pareto_figure(rows: list[Record], *, tolerance: float) -> Figure:
    """Draw test accuracy against latency at batch 1, and against the size of the file.

    Args:
      rows: of the stages.
      tolerance: points below the dense network at which a line is drawn.
    """
    figure = Figure(figsize=(10.5, 5.4), layout="constrained")
    time, size = figure.subplots(1, 2, sharey=True)
    draw_pareto(time, rows, lambda row: row["latency_ms"]["1"], tolerance=tolerance)
    draw_pareto(size, rows, lambda row: row["bytes"] / 1e3, tolerance=tolerance)
    time.set_ylabel("test accuracy [%]")
    time.set_xlabel("latency at batch 1 [ms], one thread")
    size.set_xlabel("file [kB]")
    handles, labels = size.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_pareto(
    axes: Axes, rows: list[Record], cost: Callable[[Record], float], *, tolerance: float
) -> None:
    """Draw accuracy with its spread against a cost, and a line through what nothing beats."""
    best = front(rows, cost)
    axes.step(
        [cost(row) for row in best],
        [100 * row["accuracy"]["mean"] for row in best],
        where="post",
        color="0.8",
        linewidth=3,
        zorder=1,
        label="nothing cheaper is as accurate",
    )
    limit = 100 * row_of(rows, "dense")["accuracy"]["mean"] - tolerance
    label = f"dense less {tolerance:g} points"
    axes.axhline(limit, color="0.35", linestyle=":", linewidth=1, zorder=1, label=label)
    for row in rows:
        colour, marker = STAGES[row["stage"]]
        axes.errorbar(
            cost(row),
            100 * row["accuracy"]["mean"],
            yerr=100 * row["accuracy"]["std"],
            fmt=marker,
            color=colour,
            markersize=7,
            elinewidth=1,
            capsize=2,
            label=row["stage"],
        )
    axes.set_xscale("log")
    costs = [cost(row) for row in rows]
    low, high = min(costs) / 1.3, max(costs) * 1.3
    ticks = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)
    plain(axes)
