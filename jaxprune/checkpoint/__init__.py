"""Checkpoints: pruned runs to go on with, and finished sparse models in one file."""

from jaxprune.checkpoint._model import load as load
from jaxprune.checkpoint._model import save as save
from jaxprune.checkpoint._run import latest_step as latest_step
from jaxprune.checkpoint._run import restore_run as restore_run
from jaxprune.checkpoint._run import save_run as save_run

__all__ = ("latest_step", "load", "restore_run", "save", "save_run")
