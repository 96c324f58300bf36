"""Packages that only some need."""

import importlib
from typing import Any


def need(module: str, user: str, extra: str = "export") -> Any:
    """Import a package of an extra, or say how to get it."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`jp.export.{user}` needs {package!r}, which cannot be imported "
            f"({error}). Install it with `pip install 'jaxprune[{extra}]'`."
        ) from error
