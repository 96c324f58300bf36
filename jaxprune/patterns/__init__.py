"""Patterns: what is removed together."""

from jaxprune.patterns._blocks import Blocks as Blocks
from jaxprune.patterns._channels import Channels as Channels
from jaxprune.patterns._coupled import Coupled as Coupled
from jaxprune.patterns._weights import Weights as Weights

__all__ = ("Blocks", "Channels", "Coupled", "Weights")
