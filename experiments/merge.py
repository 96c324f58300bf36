"""Put together what several processes have made of one experiment, each with seeds of its own.

    python -m experiments.lottery_ticket --seeds 0:4 --out results/first
    python -m experiments.lottery_ticket --seeds 4:8 --out results/second
    python -m experiments.merge lottery_ticket results/whole results/first results/second

leaves in the first folder what one run with ``--seeds 8`` leaves, to the byte where seeds train one
after another or each on a device of its own. Side by side on one device they round as their number
has it.
"""

import dataclasses
import importlib
import itertools
import shutil
from pathlib import Path
from typing import Any

import tyro

from experiments.common import runner, settings
from experiments.common.runner import Record


def merge(experiment: str, out: Path, parts: tuple[Path, ...]) -> Any:
    """Merge run folders and report on all of their seeds.

    Args:
      experiment: name of its module.
      out: run folder to make; the parts stay as they are.
      parts: run folders of the same settings but for their seeds, which follow on one another.

    Raises:
      ValueError: the settings differ, or seeds are missing or there twice.
    """
    module = importlib.import_module(f"experiments.{experiment}")
    config = _joint_config(parts)
    with runner.open_run(out, config, module.FIELDS) as run:
        for part in parts:
            for folder in sorted(part.rglob("seed_*")):
                shutil.copytree(folder, out / folder.relative_to(part), dirs_exist_ok=True)
            for record in runner.read_records(part):
                if run.key_of(record) not in run.records:
                    run.add(record)
    return module.main(_read_as(module.Config, {**config, "out": out}))


def _joint_config(parts: tuple[Path, ...]) -> Record:
    """See that the parts have one config but for the seeds, and give it with all of them."""
    configs = [runner.read_config(part) for part in parts]
    names = {n for config in configs for n in config if config.get(n) != configs[0].get(n)}
    if names - {"seeds"}:
        told = "; ".join(f"{n}: {[c.get(n) for c in configs]}" for n in sorted(names - {"seeds"}))
        raise ValueError(f"The runs have other settings ({told}). Run them all with the same.")
    seeds = sorted((settings.seed_range(c["seeds"]) for c in configs), key=lambda r: r.start)
    if any(one.stop != other.start for one, other in itertools.pairwise(seeds)):
        raise ValueError(
            f"`seeds` of the runs are {', '.join(str(c['seeds']) for c in configs)}, and do not "
            f"follow on one another. Run what is missing, and name each seed once."
        )
    whole = f"{seeds[0].start}:{seeds[-1].stop}"
    return {**configs[0], "seeds": whole if seeds[0].start else seeds[-1].stop}


def _read_as(config: type, record: Record) -> Any:
    """Make a config of what is recorded of it: JSON has lists for tuples, and names for paths."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    if values.get("data_path"):
        values["data_path"] = Path(values["data_path"])
    return config(**{f.name: values[f.name] for f in dataclasses.fields(config)})


if __name__ == "__main__":
    tyro.cli(merge, config=(tyro.conf.PositionalRequiredArgs,))
