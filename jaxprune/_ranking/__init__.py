"""The one top-k of the library: exact, by counting, over any number of leaves and devices."""

from jaxprune._ranking._keep import keep_largest as keep_largest
from jaxprune._ranking._lazy import Lazy as Lazy
from jaxprune._ranking._lazy import is_lazy as is_lazy
from jaxprune._ranking._lazy import read as read
from jaxprune._ranking._lazy import stored as stored
from jaxprune._ranking._order import order_key as order_key
from jaxprune._ranking._shards import AxisName as AxisName
from jaxprune._ranking._shards import shards as shards
from jaxprune._ranking._tally import count_true as count_true

__all__ = (
    "AxisName",
    "Lazy",
    "count_true",
    "is_lazy",
    "keep_largest",
    "order_key",
    "read",
    "shards",
    "stored",
)
