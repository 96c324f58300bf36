"""Records of a run, boiled down to what a table or a figure shows."""

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from experiments.common.runs import Record

METRICS = ("accuracy", "accuracy_early", "accuracy_best", "early_stop_step")


def summarise(records: list[Record]) -> list[Record]:
    """Gather the seeds of every level and condition.

    Returns:
      A row for each level and condition, ordered by level. Each metric is a mean, a standard
      deviation over the seeds (of the seeds themselves, divided by n) and the seeds, in order.
    """
    groups: dict[tuple[int, str], list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["level"], record["seed"])):
        groups.setdefault((record["level"], record["condition"]), []).append(record)
    return [
        {
            "level": level,
            "remaining": group[0]["remaining"],
            "condition": condition,
            **{metric: spread([record[metric] for record in group]) for metric in METRICS},
        }
        for (level, condition), group in groups.items()
    ]


def conditions(rows: list[Record]) -> list[str]:
    """Conditions of the pruned levels, in the order of the rows: the ticket, then its controls."""
    return list(dict.fromkeys(row["condition"] for row in rows if row["level"]))


def row_at(rows: list[Record], level: int, condition: str) -> Record:
    """Find the row of a level and condition; at level 0 every condition is the dense network."""
    condition = condition if level else "dense"
    return next(r for r in rows if (r["level"], r["condition"]) == (level, condition))


def difference(
    rows: list[Record], level: int, other: str, metric: str = "accuracy"
) -> tuple[float, float]:
    """Compare the ticket with a control of the same seed.

    Returns:
      The mean of ticket minus control over the seeds, and the worst seed.
    """
    ticket, control = (row_at(rows, level, c)[metric]["seeds"] for c in ("ticket", other))
    gaps = np.subtract(ticket, control)
    return float(gaps.mean()), float(gaps.min())


def curves(records: list[Record], level: int, condition: str) -> tuple[np.ndarray, np.ndarray]:
    """Collect validation accuracy over training.

    Returns:
      Steps `[evaluations]` and accuracies `[seeds, evaluations]`.
    """
    wanted = (level, condition if level else "dense")
    found = [r for r in records if (r["level"], r["condition"]) == wanted]
    return np.array(found[0]["steps"]), np.array([r["validation_accuracy"] for r in found])


def remaining(masks: Any) -> float:
    """Fraction of the prunable weights that unstructured masks keep, from exact counts."""
    leaves = jax.tree.leaves(masks)
    return sum(int(leaf.sum()) for leaf in leaves) / sum(leaf.size for leaf in leaves)


def layer_sparsity(masks: Any) -> dict[str, float]:
    """Fraction of weights removed from each layer, by its path."""
    return {
        path: 1 - int(mask.sum()) / mask.size
        for path, mask in flatten_dict(masks, sep="/").items()
        if mask is not None
    }


def chance_overlap(masks_a: Any, masks_b: Any) -> float:
    """Jaccard index to expect if the masks kept as many weights of each layer, but at random.

    Masks that keep fractions `p` and `q` of a layer share `p q` of it by chance.
    """
    leaves = list(zip(jax.tree.leaves(masks_a), jax.tree.leaves(masks_b), strict=True))
    both = sum(int(a.sum()) * int(b.sum()) / a.size for a, b in leaves)
    kept = sum(int(a.sum()) + int(b.sum()) for a, b in leaves)
    return both / (kept - both) if kept else 0.0


def split_weights(weights: Any, masks: Any) -> tuple[np.ndarray, np.ndarray]:
    """Line up the weights that the masks keep, and those that they remove."""
    weights, masks = flatten_dict(weights), flatten_dict(masks)
    pairs = [(weights[path], mask) for path, mask in masks.items() if mask is not None]
    kept = np.concatenate([weight[mask] for weight, mask in pairs])
    removed = np.concatenate([weight[~mask] for weight, mask in pairs])
    return kept, removed


def spread(values: list[float]) -> Record:
    """Put a mean and a standard deviation (divided by n) beside the values of the seeds."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "seeds": values}
