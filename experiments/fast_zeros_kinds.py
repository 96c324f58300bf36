"""Kinds of zeros: how each is found while a network trains, and what is made of it afterwards."""

import re
from typing import Any, Literal

import jaxprune as jp
from experiments.fast_zeros_networks import Task

Kind = Literal[
    "dense",
    "unstructured",
    "n:m",
    "blocks_16",
    "blocks_64",
    "blocks_128",
    "blocks_64_unbalanced",
    "channels",
]
TWO_OF_FOUR = 0.5  # the level of 2:4, which is there beside the others


def block_of(kind: str) -> int:
    """Give the side of a kind's blocks; 1 for single weights and channels."""
    found = re.match(r"blocks_(\d+)", kind)
    return int(found[1]) if found else 1


def is_balanced(kind: str) -> bool:
    """Tell blocks of which all columns keep as many."""
    return kind.startswith("blocks") and not kind.endswith("unbalanced")


def window_of(level: float) -> int:
    """Give the M of N:M: 1 of M stays, or 2 of 4.

    >>> window_of(0.5), window_of(0.75), window_of(0.9375)
    (4, 4, 16)
    """
    return 4 if level == TWO_OF_FOUR else round(1 / (1 - level))


def fits(task: Task, kind: str, level: float) -> bool:
    """Tell whether every column of blocks keeps one at least, and blocks divide all products.

    A column of a matrix of 512 inputs has 4 blocks of 128: of those 75 % may go, but no more.
    """
    side = window_of(level) if kind == "n:m" else block_of(kind)
    products = [leaf.shape[-2:] for leaf in task.pruned(task.shapes_of_params)]
    divides = all(n % side == m % block_of(kind) == 0 for n, m in products)
    kept = min(n / side * (1 - level) for n, _ in products)
    return divides and (kept >= 1 or not is_balanced(kind))


def parts(task: Task, kind: str, level: float, params: Any) -> tuple[float, dict[str, Any]]:
    """Give the sparsity to prune to, and the parts of ``jp.prune`` that find such zeros."""
    where = {"where": jp.by_path(task.prunable), "layout": task.layout}
    if kind == "channels":
        pattern = jp.patterns.Coupled(channels(task))
        return _channels_removed(task, level, pattern, params), {"pattern": pattern}
    if kind == "n:m":
        return level, {"scope": jp.scopes.windows(window_of(level), axis="in"), **where}
    if kind == "unstructured":
        return level, where
    side = block_of(kind)
    scope = jp.scopes.per_output if is_balanced(kind) else jp.scopes.per_leaf
    pattern = jp.patterns.Blocks((side, side), axes=("in", "out"))
    return level, {"pattern": pattern, "scope": scope, **where}


def channels(task: Task) -> jp.Groups:
    """Find what can be cut: units, the width between layers, neurons, and heads as a whole."""
    groups = jp.find_groups(task.fn, task.shapes_of_params, task.test.inputs[:1])
    return jp.Groups([group for group in groups if not _inside_heads(group)])


def _inside_heads(group: Any) -> bool:
    """Tell channels of heads, which only two of the four weights of attention share."""
    paths = {member.path for member in group.members}
    return len(paths) == 2 and all("attention" in path for path in paths)


def _channels_removed(task: Task, level: float, pattern: Any, params: Any) -> float:
    """Find the share of channels whose removal leaves as many weights as other kinds have left."""
    budget = jp.size_of(params, {}) - level * sum(leaf.size for leaf in task.pruned(params))
    low, high = 0.0, 1.0
    for _ in range(6):
        middle = (low + high) / 2
        masks = jp.find_masks(params, middle, pattern=pattern)
        low, high = (middle, high) if jp.size_of(params, masks) > budget else (low, middle)
    return high


def deployed(task: Task, kind: str, params: Any, masks: Any) -> tuple[Any, Any]:
    """Give what a user would deploy: a function, and its params.

    Balanced blocks run as kept blocks, even where ``jp.compact`` would rather not; channels are cut
    out; all other zeros are multiplied with.
    """
    if kind == "channels":
        return jp.shrink(task.fn, params, masks)
    if is_balanced(kind):
        return jp.compact(task.fn, params, masks, only=task.prunable)
    return task.fn, params
