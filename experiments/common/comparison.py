"""Rows of methods and sparsities, and what they say about which approach to take when."""

import numpy as np

from experiments.common.results import spread
from experiments.common.runs import Record

FAMILIES = {
    "dense to sparse": (
        "one_shot",
        "iterative",
        "iterative_one_shot",
        "gradual",
        "ac_dc",
        "straight_through",
    ),
    "sparse all along": ("rigl", "set", "static"),
    "pruned at initialisation": ("random_init", "magnitude_init", "snip", "grasp", "synflow"),
}


def summarise(records: list[Record]) -> list[Record]:
    """Gather the seeds of every method and sparsity, the dense network first.

    Returns:
      A row for each. Accuracy is a mean, a standard deviation over the seeds (of the seeds
      themselves, divided by n) and the seeds, in order; FLOPs are means. ``flops_share`` and
      ``inference_share`` are relative to the dense network, and ``collapsed`` counts the seeds
      that lost a whole layer.
    """
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        groups.setdefault((record["method"], record["sparsity"]), []).append(record)
    dense = groups[("dense", 0.0)]
    order = list(dict.fromkeys((r["method"], r["sparsity"]) for r in records))
    return [
        {
            "method": method,
            "sparsity": sparsity,
            "accuracy": spread([record["accuracy"] for record in group]),
            "flops": _mean(group, "flops"),
            "flops_share": _mean(group, "flops") / _mean(dense, "flops"),
            "inference_share": _mean(group, "inference_flops") / _mean(dense, "inference_flops"),
            "bytes": group[0]["bytes"],
            "kept": group[0]["kept"],
            "collapsed": sum(0 in record["densities"].values() for record in group),
        }
        for (method, sparsity), group in ((key, groups[key]) for key in order)
    ]


def methods(rows: list[Record]) -> list[str]:
    """Methods other than dense, in the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"))


def sparsities(rows: list[Record]) -> list[float]:
    """Sparsities other than 0, rising."""
    return sorted({row["sparsity"] for row in rows} - {0.0})


def row_at(rows: list[Record], method: str, sparsity: float) -> Record:
    """Find the row of a method and sparsity."""
    return next(r for r in rows if (r["method"], r["sparsity"]) == (method, sparsity))


def at_sparsity(rows: list[Record], sparsity: float) -> list[Record]:
    """Rows of a sparsity, the most accurate first."""
    found = [row for row in rows if row["sparsity"] == sparsity]
    return sorted(found, key=lambda row: -row["accuracy"]["mean"])


def gap(row: Record, other: Record) -> tuple[float, float]:
    """Compare two rows seed by seed: mean and standard deviation of row minus other."""
    gaps = np.subtract(row["accuracy"]["seeds"], other["accuracy"]["seeds"])
    return float(gaps.mean()), float(gaps.std())


def as_good(rows: list[Record], sparsity: float) -> list[Record]:
    """Rows of a sparsity whose mean gap to the best is within one standard error of that mean.

    The best is one of them, and the first. A spread would not do: who fails on one seed in five has
    a large one, and is not as good.
    """
    best, *others = at_sparsity(rows, sparsity)
    free = max(len(best["accuracy"]["seeds"]) - 1, 1)
    gaps = [gap(best, other) for other in others]
    return [
        best,
        *(o for o, (mean, std) in zip(others, gaps, strict=True) if mean <= std / free**0.5),
    ]


def cheapest(rows: list[Record], sparsity: float, *, within: float = 0.01) -> Record:
    """Find the fewest training FLOPs among what is ``within`` so much accuracy of the best."""
    found = at_sparsity(rows, sparsity)
    limit = found[0]["accuracy"]["mean"] - within
    near = [row for row in found if row["accuracy"]["mean"] >= limit]
    return min(near, key=lambda row: row["flops"])


def collapses(rows: list[Record], sparsity: float) -> list[Record]:
    """Rows of a sparsity that lost a layer in some seed, or half of the dense accuracy."""
    half = row_at(rows, "dense", 0.0)["accuracy"]["mean"] / 2
    found = at_sparsity(rows, sparsity)
    return [row for row in found if row["collapsed"] or row["accuracy"]["mean"] < half]


def percent(row: Record) -> str:
    """Write an accuracy as mean±std in percent."""
    return f"{100 * row['accuracy']['mean']:.2f}±{100 * row['accuracy']['std']:.2f}"


def answer(rows: list[Record], *, dataset: str, steps: int) -> str:
    """Say in Markdown which approach to take when; every word of it is read off the rows."""
    dense = row_at(rows, "dense", 0.0)
    choices = _choices(rows)
    lines = [
        "# Which approach when",
        "",
        f"{dataset}, {steps} steps, seeds: {len(dense['accuracy']['seeds'])}. Test accuracy in "
        f"percent, mean±std over the seeds; dense: {percent(dense)}.",
        "",
        "The best, if",
        "",
        f"| sparsity | {' | '.join(choices)} |",
        "|---" * (1 + len(choices)) + "|",
        *(_choice_line(choices, sparsity) for sparsity in sparsities(rows)),
        "",
        *(line for name, found in choices.items() for line in _favourite(name, found)),
        *_free(rows),
        *_regrowing(rows),
        "",
        "As good as the best is what falls behind it by no more than one standard error, over "
        "the seeds, of the difference. Cheapest is what needs the fewest training FLOPs (in "
        "percent of dense) among all within one point of the best. Collapsed has lost a whole "
        "layer in some seed, or half of the dense accuracy.",
        "",
        "| sparsity | best | as good | cheapest | collapsed |",
        "|---|---|---|---|---|",
        *(_detail_line(rows, sparsity) for sparsity in sparsities(rows)),
    ]
    return "\n".join(lines) + "\n"


def _choices(rows: list[Record]) -> dict[str, list[Record]]:
    """Rows to choose from, under conditions that get harder."""
    fixed = ("static", *FAMILIES["pruned at initialisation"])
    sparse = (*FAMILIES["sparse all along"], *fixed)
    choices = {
        "training may be dense": rows[1:],
        "training is sparse all along": [row for row in rows if row["method"] in sparse],
        "the mask is fixed before training": [row for row in rows if row["method"] in fixed],
    }
    return {name: found for name, found in choices.items() if found}


def _choice_line(choices: dict[str, list[Record]], sparsity: float) -> str:
    best = [at_sparsity(found, sparsity)[0] for found in choices.values()]
    cells = [f"{100 * sparsity:g} %", *(f"{row['method']} {percent(row)}" for row in best)]
    return f"| {' | '.join(cells)} |"


def _detail_line(rows: list[Record], sparsity: float) -> str:
    best, *equals = as_good(rows, sparsity)
    cheap = cheapest(rows, sparsity)
    cells = [
        f"{100 * sparsity:g} %",
        best["method"],
        _names(equals),
        f"{cheap['method']} ({100 * cheap['flops_share']:.0f} %)",
        _names(collapses(rows, sparsity)),
    ]
    return f"| {' | '.join(cells)} |"


def _favourite(name: str, found: list[Record]) -> list[str]:
    """The method of a choice that is most often the best or as good."""
    levels = sparsities(found)
    winners = [row["method"] for sparsity in levels for row in as_good(found, sparsity)]
    often = {method: winners.count(method) for method in methods(found)}
    most = max(often.values())
    first = [method for method, times in often.items() if times == most]
    if len(often) == 1:
        return []
    return [
        f"- If {name}: {' or '.join(first)}, the best or as good at {most} of {len(levels)} "
        "sparsities."
    ]


def _free(rows: list[Record]) -> list[str]:
    """How far pruning costs next to nothing."""
    limit = row_at(rows, "dense", 0.0)["accuracy"]["mean"] - 0.01
    found = [row for row in rows[1:] if row["accuracy"]["mean"] >= limit]
    if not found:
        return ["- No method stays within one point of the dense network."]
    counts = [
        f"{sum(row['sparsity'] == sparsity for row in found)} at {100 * sparsity:g} %"
        for sparsity in sparsities(rows)
    ]
    last = sparsities(found)[-1]
    return [
        f"- Within one point of the dense network, of {len(methods(rows))} methods: "
        f"{', '.join(counts)}. The last are, at {100 * last:g} %, "
        f"{_names(at_sparsity(found, last))}."
    ]


def _regrowing(rows: list[Record]) -> list[str]:
    """Whether regrowing weights pays, and by gradient more than at random."""
    there, lines = methods(rows), []
    for one, other in (("rigl", "set"), ("set", "static")):
        if one in there and other in there:
            gaps = [gap(row_at(rows, one, s), row_at(rows, other, s)) for s in sparsities(rows)]
            cells = [
                f"{100 * mean:+.2f}±{100 * std:.2f} at {100 * sparsity:g} %"
                for (mean, std), sparsity in zip(gaps, sparsities(rows), strict=True)
            ]
            lines.append(f"- {one} minus {other}, in points seed by seed: {', '.join(cells)}.")
    return lines


def _names(rows: list[Record]) -> str:
    return ", ".join(row["method"] for row in rows) or "none"


def _mean(group: list[Record], field: str) -> float:
    return float(np.mean([record[field] for record in group]))
