"""Criteria: functions that score weights."""

from jaxprune.criteria._magnitude import magnitude as magnitude
from jaxprune.criteria._random import random as random
from jaxprune.criteria._taylor import taylor as taylor

__all__ = ("magnitude", "random", "taylor")
