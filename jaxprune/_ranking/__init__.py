"""The one top-k of the library: exact, by counting, over any number of leaves and devices."""

from jaxprune._ranking._keep import keep_largest as keep_largest
from jaxprune._ranking._keep import shape_of_counts as shape_of_counts
from jaxprune._ranking._lazy import Lazy as Lazy
from jaxprune._ranking._lazy import is_lazy as is_lazy
from jaxprune._ranking._lazy import named_leaves as named_leaves
from jaxprune._ranking._lazy import read as read
from jaxprune._ranking._lazy import stored as stored
from jaxprune._ranking._order import order_key as order_key
from jaxprune._ranking._shards import AxisName as AxisName
from jaxprune._ranking._shards import Shard as Shard
from jaxprune._ranking._shards import shards as shards
from jaxprune._ranking._tally import count_none as count_none
from jaxprune._ranking._tally import count_true as count_true
from jaxprune._ranking._whole import Whole as Whole
from jaxprune._ranking._whole import floor as floor
from jaxprune._ranking._whole import in_words as in_words
from jaxprune._ranking._whole import least as least
from jaxprune._ranking._whole import where as where

__all__ = (
    "AxisName",
    "Lazy",
    "Shard",
    "Whole",
    "count_none",
    "count_true",
    "floor",
    "in_words",
    "is_lazy",
    "keep_largest",
    "least",
    "named_leaves",
    "order_key",
    "read",
    "shape_of_counts",
    "shards",
    "stored",
    "where",
)
