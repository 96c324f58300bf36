"""Networks that were cut, as files; only `structured` and `edge_deployment` have them."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common import runner

Cut = dict[str, dict[int, list[int]]]  # path: axis: indices that stay


def save_network(path: Path, variables: Any, cut: Cut) -> None:
    """Save a small network: its variables, and which indices of the dense ones they are."""
    kept = {
        f"{name}:{axis}": np.asarray(indices, np.int32)
        for name, axes in cut.items()
        for axis, indices in axes.items()
    }
    runner.save(path, {"variables": variables, "cut": kept})


def load_network(path: Path) -> tuple[Any, Cut]:
    """Load the variables and the cut that :func:`save_network` saved."""
    saved, _ = runner.load(path)
    cut: Cut = {}
    for place, indices in saved.get("cut", {}).items():
        name, _, axis = place.rpartition(":")
        cut.setdefault(name, {})[int(axis)] = indices.tolist()
    return saved["variables"], cut
