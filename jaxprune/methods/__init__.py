"""Methods: mask and new values of one matrix from the Gram matrix of its inputs."""

from jaxprune.methods._admm import admm as admm
from jaxprune.methods._refit import refit as refit  # public as `jp.refit`: it is given a mask
from jaxprune.methods._ria import ria as ria
from jaxprune.methods._sparsegpt import sparsegpt as sparsegpt
from jaxprune.methods._wanda import wanda as wanda

__all__ = ("admm", "ria", "sparsegpt", "wanda")
