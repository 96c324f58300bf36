"""Layouts by convention: how libraries lay out what has a name and a number of axes."""

from jaxprune.layouts._flax import flax as flax
from jaxprune.layouts._torch import torch as torch

__all__ = ("flax", "torch")
