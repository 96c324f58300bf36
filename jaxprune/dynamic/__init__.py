"""Sparse training: from the first step to the last, the same number of weights moves around."""

from jaxprune.dynamic._rigl import rigl as rigl
from jaxprune.dynamic._set import set as set

__all__ = ("rigl", "set")
