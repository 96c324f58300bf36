"""A pruned run on disk: steps that survive a kill, to go on with as if nothing had happened."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxprune
from jaxprune._atomic import told
from jaxprune._errors import whole
from jaxprune.checkpoint._config import Config, Json, as_json, refuse_another
from jaxprune.checkpoint._frame import Manifest
from jaxprune.checkpoint._leaves import Leaf, differences, fill_in, kind_of, list_lines, named
from jaxprune.checkpoint._step import (
    Folder,
    encode,
    kinds_of,
    opened,
    orbax,
    read_leaves,
    read_manifest,
    write,
)

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager


def save_run(
    folder: Folder,
    step: int,
    state: Any,
    *,
    config: Config | None = None,
    keep: int = 3,
) -> None:
    """Save a step of a run, to go on from there with ``restore_run``.

    The state is any tree: params, optimizer state with its masks, keys, a ``TrainState``, an nnx
    state, numbers. Bool arrays, which masks are, take one bit an element. Orbax writes the arrays,
    sharded ones from the devices that hold them, and a step appears in the folder once it is
    complete: whoever is killed on the way leaves the steps before it.

    Args:
      folder: folder of the run; made if need be. One process writes to it at a time.
      step: number of the step, above those that are there.
      state: arrays, typed random keys and numbers in any tree.
      config: what the run depends on, in JSON types; restoring with another one is refused.
      keep: how many of the latest steps stay.

    Raises:
      ValueError: the folder holds this step or a later one, or steps of another config; ``step`` or
        ``keep`` is out of range; two leaves have one path.
      TypeError: a leaf is no array or number, or ``config`` does not consist of JSON types.
      OSError: the folder cannot be written.
      ImportError: orbax-checkpoint is not installed.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp, optax
      >>> import jaxprune as jp
      >>> tx = jp.prune(optax.adam(0.1), schedule=jp.schedules.constant(0.5))
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state = {"params": params, "opt_state": tx.init(params)}
      >>> folder = tempfile.mkdtemp()
      >>> jp.checkpoint.save_run(folder, 100, state, config={"learning_rate": 0.1})
      >>> jp.checkpoint.latest_step(folder)
      100
    """
    number = whole(step)
    if number is None or number < 0 or type(keep) is not int or keep < 1:
        raise ValueError(
            f"`save_run` got step={step!r} and keep={keep!r}. Steps are integers from 0 on, and at "
            "least one is kept."
        )
    arrays, records = encode(named(state, "save_run(state)"))
    if not arrays:
        raise ValueError("`save_run` got a state without arrays. Pass what the run goes on from.")
    settings = as_json(config, "save_run")
    manifest = {"jaxprune": jaxprune.__version__, "config": settings, "leaves": records}
    orbax("save_run")
    cannot = f"`save_run` cannot write step {number} to {str(folder)!r}"
    advice = "The steps that were there are as they were; choose a folder that can be written"
    with told(cannot, advice):
        Path(folder).mkdir(parents=True, exist_ok=True)
        options = {"max_to_keep": keep, "cleanup_tmp_directories": True}
        with opened(folder, "save_run", **options) as manager:
            _refuse_another_run(manager, number, settings)
            write(manager, number, arrays, manifest)


def restore_run(
    folder: Folder,
    like: Any,
    *,
    config: Config | None = None,
    step: int | None = None,
) -> Any:
    """Give back the state of a run as ``save_run`` got it.

    It has the structure of ``like``, on the devices and shardings of ``like``, masks as bits or as
    bools as they are there, numbers as numbers: a step that was jitted for ``like`` goes on without
    a retrace. How many devices the run had when it was saved does not matter.

    Args:
      folder: folder of the run.
      like: a state of the same run, such as the one that it starts from, or its shapes. Its values
        do not matter.
      config: refuse a run of another config, naming the fields; None takes any.
      step: which step; the latest complete one by default.

    Returns:
      The state.

    Raises:
      ValueError: the step is not there, is damaged or of a newer format, its config is another one,
        or its leaves are not those of ``like``: then all differences, path by path.
      FileNotFoundError: the folder holds no complete step.
      TypeError: a leaf of ``like`` is no array or number.
      ImportError: orbax-checkpoint is not installed.

    Example:
      >>> import tempfile
      >>> import jax
      >>> import jaxprune as jp
      >>> folder, state = tempfile.mkdtemp(), {"level": 0, "key": jax.random.key(0)}
      >>> if jp.checkpoint.latest_step(folder) is not None:  # the head of a script that goes on
      ...     state = jp.checkpoint.restore_run(folder, state)
      >>> jp.checkpoint.save_run(folder, 1, state | {"level": 1})
      >>> jp.checkpoint.restore_run(folder, state)["level"]
      1
    """
    leaves = named(like, "restore_run(like)")
    settings = as_json(config, "restore_run")
    orbax("restore_run")
    if latest_step(folder) is None:
        raise FileNotFoundError(
            f"`restore_run` got {str(folder)!r}, which holds no complete step of a run. Save one "
            "with `jp.checkpoint.save_run`, or start anew."
        )
    with opened(folder, "restore_run") as manager:
        found = _existing(manager, step)
        manifest = read_manifest(manager, found)
        if config is not None:
            refuse_another(manifest["config"], settings, manager.directory, "restore_run")
        _refuse_other_leaves(manager, found, manifest, leaves)
        return fill_in(like, read_leaves(manager, found, manifest, leaves))


def latest_step(folder: Folder) -> int | None:
    """Say which complete step of a run is the latest.

    Args:
      folder: folder of the run.

    Returns:
      The number of the step, or None if there is none, or no folder.

    Raises:
      ImportError: orbax-checkpoint is not installed.

    Example:
      >>> import jaxprune as jp
      >>> jp.checkpoint.latest_step("a_run_that_nobody_started") is None
      True
    """
    orbax("latest_step")
    if not Path(folder).is_dir():
        return None
    with opened(folder, "latest_step") as manager:
        return manager.latest_step()


def _existing(manager: "CheckpointManager", step: int | None) -> int:
    """The step that was asked for, or the latest."""
    steps = sorted(manager.all_steps())
    number = steps[-1] if step is None else whole(step)
    if number is None or number not in steps:
        raise ValueError(
            f"`restore_run` got step={step!r}, but {str(manager.directory)!r} holds {steps}. "
            "Choose one of them, or none for the latest."
        )
    return number


def _refuse_another_run(
    manager: "CheckpointManager", step: int, config: dict[str, Json] | None
) -> None:
    """Refuse to mix runs in a folder, or to put a step before later ones, which orbax does."""
    latest = manager.latest_step()
    if latest is None:
        return
    if step <= latest:
        raise ValueError(
            f"`save_run` got step={step}, but {str(manager.directory)!r} holds step {latest} "
            "already. Go on from there with `restore_run`, or choose another folder."
        )
    there = read_manifest(manager, latest)["config"]
    refuse_another(there, config, manager.directory, "save_run")


def _refuse_other_leaves(
    manager: "CheckpointManager", step: int, manifest: Manifest, like: dict[str, Leaf]
) -> None:
    there, here = kinds_of(manifest), {path: kind_of(leaf) for path, leaf in like.items()}
    lines = differences(there, here)
    if lines:
        raise ValueError(
            f"`restore_run` got a state unlike that of step {step} in "
            f"{str(manager.directory)!r}: {list_lines(lines)}\nBuild `like` as the run that was "
            "saved did."
        )
