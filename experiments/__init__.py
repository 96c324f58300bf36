"""Experiments: one script reproduces one figure or table."""

from importlib.util import find_spec


def need(extra: str, *modules: str) -> None:
    """Say at the door which packages of an extra are missing, and how to get them.

    Raises:
      ModuleNotFoundError: some are missing.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"Experiments and benchmarks need {', '.join(missing)}, not installed here. Install "
            f"the extra in the clone: `pip install -e '.[{extra}]'`; `make ticket` does it for you."
        )


need("experiments", "flax", "matplotlib", "pooch", "rich", "sklearn", "tqdm", "tyro")
