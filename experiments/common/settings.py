"""Settings of an experiment: filled in, checked, and written down."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

Check = tuple[str, Any, str]  # a field, whether its value is good, and what would be right
SEEDS = "must be positive, or a range such as 3:6"


def filled_in(config: Any, **defaults: Any) -> Any:
    """Fill in what was left out."""
    missing = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return dataclasses.replace(config, **missing)


def known(config: Any, field: str, names: Iterable[str]) -> Any:
    """Read a field that decides what the others may be.

    Raises:
      ValueError: it is none of ``names``.
    """
    value = getattr(config, field)
    if value not in names:
        raise ValueError(f"`{field}={value!r}` is not known. Choose one of {', '.join(names)}.")
    return value


def refuse(settings: Any, checks: Iterable[Check]) -> None:
    """See whether settings make sense.

    Raises:
      ValueError: a field has a bad value; all of them are named.
    """
    bad = [
        f"`{name}={getattr(settings, name)!r}` {want}" for name, good, want in checks if not good
    ]
    if bad:
        raise ValueError(f"{'; '.join(bad)}. Change it, or leave it out for the default.")


def positive(settings: Any, *fields: str) -> list[Check]:
    """Check that fields are positive."""
    return [(field, getattr(settings, field) > 0, "must be positive") for field in fields]


def names(settings: Any, field: str, all_of_them: Sequence[str]) -> list[Check]:
    """Check that a field names some of what there is, each once, and one at least."""
    values = getattr(settings, field)
    unknown = [value for value in values if value not in all_of_them]
    return [
        (field, not unknown, f"may name {', '.join(all_of_them)}, but not {unknown}"),
        (field, len(set(values)) == len(values) > 0, "must name each once, and one at least"),
    ]


def data_path(settings: Any) -> list[Check]:
    """Check that a path to data goes with a data set that is read from one."""
    good = settings.data_path is None or settings.dataset == "mnist"
    return [("data_path", good, "goes with dataset='mnist'; the digits come with scikit-learn")]


def seed_range(seeds: int | str) -> range:
    """Read seeds: 8 stands for the first eight, 3:6 for 3, 4 and 5; for nothing if it is neither.

    >>> seed_range(2), seed_range("3:6"), seed_range("6:3")
    (range(0, 2), range(3, 6), range(0, 0))
    """
    first, _, end = str(seeds).rpartition(":")
    if (first or "0").isdecimal() and end.isdecimal() and int(first or 0) < int(end):
        return range(int(first or 0), int(end))
    return range(0)


def recorded(settings: Any, *, leave_out: Sequence[str] = ("out",)) -> dict[str, Any]:
    """Settings that the results depend on, as JSON types; where the folder lies is not one."""
    found = {k: v for k, v in dataclasses.asdict(settings).items() if k not in leave_out}
    if "seeds" in found:
        seeds = seed_range(found["seeds"])
        found["seeds"] = f"{seeds.start}:{seeds.stop}" if seeds.start else seeds.stop
    return json.loads(json.dumps(found, default=str))
