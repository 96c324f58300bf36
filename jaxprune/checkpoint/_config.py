"""What a run depends on: in JSON types, and the same whenever it goes on."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

Json: TypeAlias = str | int | float | bool | list["Json"] | dict[str, "Json"] | None
Config = Mapping[str, object]


def as_json(config: Config | None, user: str) -> dict[str, Json] | None:
    """Give a config the form in which it comes back from JSON."""
    bad = []
    for name, value in dict(config or {}).items():
        try:
            json.dumps({name: value}, allow_nan=False)
        except (TypeError, ValueError):
            bad.append(f"{name!r} is {value!r:.80}")
    if bad:
        raise TypeError(
            f"`{user}(config=...)` got what JSON does not know: {', '.join(bad)}. Use strings, "
            "finite numbers, bools, None, lists and dicts."
        )
    return None if config is None else json.loads(json.dumps(dict(config)))


def refuse_another(there: Json, here: Json, folder: Path, user: str) -> None:
    """Refuse a config other than the one in a folder, naming the fields; None is an empty one."""
    lines = list(_changes(there or {}, here or {}))
    if lines:
        raise ValueError(
            f"`{user}` got {str(folder)!r}, which holds a run of another config: "
            f"{', '.join(lines)}. Go on with the same config, or choose another folder."
        )


def _changes(there: Json, here: Json, name: str = "") -> Iterator[str]:
    """The fields in which two configs differ."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        if there != here:
            yield f"{name} ({there!r} there, {here!r} here)"
        return
    for key in {**there, **here}:
        yield from _changes(there.get(key), here.get(key), f"{name}.{key}" if name else key)
