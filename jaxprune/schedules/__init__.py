"""Schedules: how much is removed, and when."""

from jaxprune.schedules._constant import constant as constant
from jaxprune.schedules._cosine import cosine as cosine
from jaxprune.schedules._cubic import cubic as cubic
from jaxprune.schedules._custom import custom as custom
from jaxprune.schedules._cyclic import cyclic as cyclic
from jaxprune.schedules._geometric import geometric as geometric
from jaxprune.schedules._linear import linear as linear
from jaxprune.schedules._one_shot import one_shot as one_shot

__all__ = ("constant", "cosine", "cubic", "custom", "cyclic", "geometric", "linear", "one_shot")
