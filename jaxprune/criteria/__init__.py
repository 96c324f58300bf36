"""Criteria: functions that score weights."""

from jaxprune.criteria._fisher import fisher as fisher
from jaxprune.criteria._fisher import fisher_ema as fisher_ema
from jaxprune.criteria._grasp import grasp as grasp
from jaxprune.criteria._lamp import lamp as lamp
from jaxprune.criteria._magnitude import magnitude as magnitude
from jaxprune.criteria._magnitude_increase import magnitude_increase as magnitude_increase
from jaxprune.criteria._movement import movement as movement
from jaxprune.criteria._random import random as random
from jaxprune.criteria._snip import snip as snip
from jaxprune.criteria._synflow import synflow as synflow
from jaxprune.criteria._taylor import taylor as taylor
from jaxprune.criteria._wanda import wanda as wanda

__all__ = (
    "fisher",
    "fisher_ema",
    "grasp",
    "lamp",
    "magnitude",
    "magnitude_increase",
    "movement",
    "random",
    "snip",
    "synflow",
    "taylor",
    "wanda",
)
