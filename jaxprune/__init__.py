"""Pruning for JAX: functional masks around any optax optimizer."""

import importlib
from typing import Any

__version__ = "0.2.0"

__all__ = (
    "Check",
    "CompactPlan",
    "Cut",
    "Group",
    "Groups",
    "Keep",
    "Layout",
    "Level",
    "Member",
    "Overlap",
    "Packed",
    "PruneState",
    "PruneWarning",
    "StraightThroughState",
    "Summary",
    "Use",
    "apply_masks",
    "by_path",
    "by_use",
    "check",
    "checkpoint",
    "combine_masks",
    "compact",
    "compact_plan",
    "compact_state",
    "count_flops",
    "criteria",
    "cut_list",
    "dense_masks",
    "distillation_loss",
    "dynamic",
    "elementwise",
    "exclude",
    "expand",
    "export",
    "feature_loss",
    "find_blocks",
    "find_groups",
    "find_layout",
    "find_masks",
    "find_sparsity",
    "forward_params",
    "get_masks",
    "graph",
    "hold",
    "imp",
    "input_stats",
    "is_matrix",
    "layouts",
    "make_masks",
    "masks_from_zeros",
    "masks_within_budget",
    "methods",
    "next_level",
    "overlap",
    "pack",
    "patterns",
    "prunable",
    "prune",
    "prune_trained",
    "refit",
    "schedules",
    "scopes",
    "shrink",
    "shrink_state",
    "size_of",
    "sparsity",
    "straight_through",
    "summary",
    "typing",
    "unpack",
    "verify_compact",
    "verify_shrink",
    "with_masks",
)

# Where names are defined that are no modules of their own. Each is imported when it is asked for,
# so that `import jaxprune` costs no more than what it builds on. Type checkers read `__init__.pyi`.
_NAMES_OF = {
    "_advice": "PruneWarning",
    "_budget": "masks_within_budget",
    "_check": "Check check",
    "_compact": "compact compact_state expand verify_compact",
    "_compact_plan": "CompactPlan compact_plan",
    "_cut": "Cut",
    "_distill": "distillation_loss feature_loss",
    "_find": "find_masks",
    "_find_sparsity": "find_sparsity",
    "_group": "Group Member",
    "_groups": "Groups",
    "_imp": "imp",
    "_input_stats": "input_stats",
    "_keep": "Keep",
    "_layout": "Layout",
    "_level": "Level next_level",
    "_make": "make_masks",
    "_masks": "Packed apply_masks combine_masks dense_masks masks_from_zeros pack sparsity unpack",
    "_prune": "hold prune",
    "_prune_trained": "prune_trained",
    "_report": "Overlap Summary overlap summary",
    "_shrink": "cut_list shrink shrink_state size_of",
    "_state": "PruneState",
    "_states": "get_masks with_masks",
    "_straight_through": "StraightThroughState forward_params straight_through",
    "_tree": "prunable",
    "_use": "Use",
    "_verify": "verify_shrink",
    "_where": "by_path by_use exclude is_matrix",
    "graph": "count_flops find_blocks find_groups find_layout",
    "methods": "refit",
    "typing": "elementwise",
}
_HOME = {name: home for home, names in _NAMES_OF.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in __all__:
        raise AttributeError(f"module 'jaxprune' has no attribute {name!r}")
    module = importlib.import_module(f"jaxprune.{_HOME.get(name, name)}")
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
