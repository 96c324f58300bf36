"""What a jaxpr says about the axes of its parameters."""

from jaxprune.graph._axes import Axis as Axis
from jaxprune.graph._blocks import find_blocks as find_blocks
from jaxprune.graph._flops import count_flops as count_flops
from jaxprune.graph._groups import find_groups as find_groups
from jaxprune.graph._layout import find_layout as find_layout
from jaxprune.graph._site import Rule as Rule
from jaxprune.graph._site import Site as Site

__all__ = ("Axis", "Rule", "Site", "count_flops", "find_blocks", "find_groups", "find_layout")
