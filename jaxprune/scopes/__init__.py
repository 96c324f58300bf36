"""Scopes: who competes with whom, and how much each leaf loses."""

from jaxprune.scopes._across import across as across
from jaxprune.scopes._allocation import custom as custom
from jaxprune.scopes._allocation import erk as erk
from jaxprune.scopes._allocation import uniform as uniform
from jaxprune.scopes._isomorphic import isomorphic as isomorphic
from jaxprune.scopes._leaf import per_leaf as per_leaf
from jaxprune.scopes._output import per_output as per_output
from jaxprune.scopes._owl import owl as owl
from jaxprune.scopes._windows import windows as windows

__all__ = (
    "across",
    "custom",
    "erk",
    "isomorphic",
    "owl",
    "per_leaf",
    "per_output",
    "uniform",
    "windows",
)
