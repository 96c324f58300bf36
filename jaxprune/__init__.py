"""Pruning for JAX: functional masks around any optax optimizer."""

from jaxprune import checkpoint as checkpoint
from jaxprune import criteria as criteria
from jaxprune import dynamic as dynamic
from jaxprune import export as export
from jaxprune import graph as graph
from jaxprune import layouts as layouts
from jaxprune import methods as methods
from jaxprune import patterns as patterns
from jaxprune import schedules as schedules
from jaxprune import scopes as scopes
from jaxprune import typing as typing
from jaxprune._advice import PruneWarning as PruneWarning
from jaxprune._budget import masks_within_budget as masks_within_budget
from jaxprune._check import Check as Check
from jaxprune._check import check as check
from jaxprune._compact import compact as compact
from jaxprune._compact import compact_state as compact_state
from jaxprune._compact import expand as expand
from jaxprune._compact import verify_compact as verify_compact
from jaxprune._compact_plan import CompactPlan as CompactPlan
from jaxprune._compact_plan import compact_plan as compact_plan
from jaxprune._cut import Cut as Cut
from jaxprune._distill import distillation_loss as distillation_loss
from jaxprune._distill import feature_loss as feature_loss
from jaxprune._find import find_masks as find_masks
from jaxprune._find_sparsity import find_sparsity as find_sparsity
from jaxprune._group import Group as Group
from jaxprune._group import Member as Member
from jaxprune._groups import Groups as Groups
from jaxprune._imp import imp as imp
from jaxprune._input_stats import input_stats as input_stats
from jaxprune._keep import Keep as Keep
from jaxprune._layout import Layout as Layout
from jaxprune._level import Level as Level
from jaxprune._level import next_level as next_level
from jaxprune._make import make_masks as make_masks
from jaxprune._masks import Packed as Packed
from jaxprune._masks import apply_masks as apply_masks
from jaxprune._masks import combine_masks as combine_masks
from jaxprune._masks import dense_masks as dense_masks
from jaxprune._masks import masks_from_zeros as masks_from_zeros
from jaxprune._masks import pack as pack
from jaxprune._masks import sparsity as sparsity
from jaxprune._masks import unpack as unpack
from jaxprune._prune import hold as hold
from jaxprune._prune import prune as prune
from jaxprune._prune_trained import prune_trained as prune_trained
from jaxprune._report import Overlap as Overlap
from jaxprune._report import Summary as Summary
from jaxprune._report import overlap as overlap
from jaxprune._report import summary as summary
from jaxprune._shrink import cut_list as cut_list
from jaxprune._shrink import shrink as shrink
from jaxprune._shrink import shrink_state as shrink_state
from jaxprune._shrink import size_of as size_of
from jaxprune._state import PruneState as PruneState
from jaxprune._states import get_masks as get_masks
from jaxprune._states import with_masks as with_masks
from jaxprune._straight_through import StraightThroughState as StraightThroughState
from jaxprune._straight_through import forward_params as forward_params
from jaxprune._straight_through import straight_through as straight_through
from jaxprune._tree import prunable as prunable
from jaxprune._use import Use as Use
from jaxprune._verify import verify_shrink as verify_shrink
from jaxprune._where import by_path as by_path
from jaxprune._where import by_use as by_use
from jaxprune._where import exclude as exclude
from jaxprune._where import is_matrix as is_matrix
from jaxprune.graph import count_flops as count_flops
from jaxprune.graph import find_blocks as find_blocks
from jaxprune.graph import find_groups as find_groups
from jaxprune.graph import find_layout as find_layout
from jaxprune.methods import refit as refit
from jaxprune.typing import elementwise as elementwise

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
