"""One experiment in several processes: how they meet, agree, and part; whose seeds are whose."""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.common import files, runs
from experiments.common.runs import Record

PAUSE = 0.2  # seconds between two looks at what the others have done


@dataclasses.dataclass(frozen=True)
class Peers:
    """Which processes work on a run, and how they find one another.

    Attributes:
      distributed: share the seeds out among processes, which all get the same command and a run
        folder that all of them reach. On a cluster that jax knows (Slurm, Open MPI, Kubernetes,
        TPU) the next three can be left out.
      coordinator: address and port of process 0, such as 10.0.0.1:1234.
      processes: how many there are.
      process_id: which of them this is, counted from 0.
      peer_timeout: seconds to wait for the others: at the start until all are there, in the end
        from one of their records to the next.
    """

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    peer_timeout: int = 300


ALONE = Peers()


class Share(NamedTuple):
    """The part of a process: the seeds that have remainder ``index`` when divided by ``count``."""

    index: int = 0
    count: int = 1

    def has(self, seed: int) -> bool:
        """Tell whether a seed is this process's."""
        return seed % self.count == self.index

    @property
    def part(self) -> str:
        """What the name of this process's metrics has in it; nothing for the first."""
        return f".p{self.index}of{self.count}" if self.index else ""


def problems(peers: Peers) -> list[str]:
    """Say which settings have a bad value, and what would be right."""
    p = peers
    port = (p.coordinator or ":1").rpartition(":")[2]
    given = [n for n in ("coordinator", "processes", "process_id") if getattr(p, n) is not None]
    checks = [
        (given[:1], p.distributed, "goes with distributed=True"),
        (["coordinator"], port.isdigit(), "must be an address and a port, such as 10.0.0.1:1234"),
        (["processes"], p.processes is None or p.processes > 0, "must be positive"),
        (
            ["process_id"],
            p.process_id is None or 0 <= p.process_id < (p.processes or sys.maxsize),
            f"must lie in 0 to processes - 1, with processes={p.processes}",
        ),
        (["peer_timeout"], p.peer_timeout > 0, "must be positive"),
    ]
    return [
        f"`{name}={getattr(p, name)!r}` {wanted}"
        for names, good, wanted in checks
        for name in names
        if not good
    ]


@contextlib.contextmanager
def running(peers: Peers, out: Path, config: Record) -> Iterator[tuple[Share, list[Record]]]:
    """Start a run or go on with it, and keep its folder until the block ends.

    Several processes meet by jax.distributed, compare their configs, and part again: training
    needs no word of the others, and so nobody dies because another does.

    Args:
      peers: the processes.
      out: run folder.
      config: settings that the results depend on.

    Yields:
      The share of this process, and all records that are finished already.

    Raises:
      RuntimeError: another run is at work in the folder, or process 0 could not open it.
      ValueError: the processes disagree on the config, or the folder holds one of another config.
      OSError: the folder cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        if not peers.distributed:
            stack.enter_context(files.locked(out))
            yield Share(), runs.open_run(out, config)
            return
        # With its lock a process also shows the others that it has come.
        known = None not in (peers.process_id, peers.processes)
        if known:
            stack.enter_context(files.locked(out, peers.process_id, peers.processes))
        share = _meet(peers, out)
        try:
            if not known:
                stack.enter_context(files.locked(out, *share))
            _agree(share, config, peers)
            records = _open(share, out, config, peers)
        finally:
            jax.distributed.shutdown()
        yield share, records


def gather(
    out: Path, planned: Sequence[Any], run_of: Callable[[Record], Any], peers: Peers
) -> list[Record]:
    """Wait until every planned run has a record, and write them down in the order of the plan.

    Raises:
      TimeoutError: there has been no new record for ``peer_timeout`` seconds.
    """
    known, news = -1, time.monotonic()
    while True:
        found = {run_of(record): record for record in runs.read_records(out)}
        if len(found) > known:
            known, news = len(found), time.monotonic()
        if not (missing := [run for run in planned if run not in found]):
            break
        if time.monotonic() - news > peers.peer_timeout:
            raise TimeoutError(_silence(missing, planned, peers))
        time.sleep(PAUSE)
    records = [found[run] for run in planned]
    runs.settle(out, records)
    return records


def _silence(missing: list[Any], planned: Sequence[Any], peers: Peers) -> str:
    return (
        f"No other process has written a record for {peers.peer_timeout} s, and "
        f"{len(missing)} of {len(planned)} are missing; the first is that of {missing[0]}. "
        f"What is there is kept: if a process has died, start all of them again with the same "
        f"commands, and they go on where they stopped. If they are only slow, raise "
        f"`peer_timeout`. All of them have to reach the same `out`."
    )


def _meet(peers: Peers, out: Path) -> Share:
    """Wait until all processes are there.

    If jax waited in vain it would abort the process with a stack trace, and could not say who is
    missing. So it is given more time than it gets.
    """
    late = threading.Timer(peers.peer_timeout, _give_up, (peers, out))
    late.daemon = True
    late.start()
    try:
        _check_port(peers)
        jax.distributed.initialize(
            peers.coordinator,
            peers.processes,
            peers.process_id,
            initialization_timeout=2 * peers.peer_timeout + 60,
            shutdown_timeout_seconds=peers.peer_timeout,
        )
    except ValueError as error:
        raise ValueError(
            f"`distributed=True` finds no cluster that jax knows ({error}). Set `coordinator`, "
            f"`processes` and `process_id`."
        ) from error
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"The processes cannot meet at `coordinator={peers.coordinator!r}`: {error}. It has to "
            f"be an address of process 0 with a port that is free there, the same for all."
        ) from error
    finally:
        late.cancel()
    from jax._src.distributed import global_state  # as in _client

    return Share(global_state.process_id, global_state.num_processes)


def _check_port(peers: Peers) -> None:
    """See whether process 0 can listen, since jaxlib may crash where it cannot."""
    if peers.coordinator and peers.process_id == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(peers.coordinator.rpartition(":")[2])))


def _give_up(peers: Peers, out: Path) -> None:
    ids = range(peers.processes or 0)
    there = [str(n) for n in ids if n == peers.process_id or files.held(out, n)]
    missing = [str(n) for n in ids if str(n) not in there]
    print(
        f"Waited {peers.peer_timeout} s for all {peers.processes or ''} processes to meet at "
        f"{peers.coordinator}. There: {', '.join(there) or 'unknown'}. Missing: "
        f"{', '.join(missing) or 'unknown'}. Nothing was trained. Start every process with the "
        f"same command but for its `process_id`, all with the same `out`, or raise `peer_timeout`.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # the main thread hangs in a call of jax


def _agree(share: Share, config: Record, peers: Peers) -> None:
    """Compare the configs of all processes."""
    _tell(f"config/{share.index}", json.dumps(config))
    first, *others = (json.loads(_ask(f"config/{n}", peers)) for n in range(share.count))
    configs = [first, *others]
    names = [name for name in first if any(first[name] != other.get(name) for other in others)]
    if names:
        told = "; ".join(f"{name} ({_values(name, configs)})" for name in names)
        raise ValueError(
            f"The processes disagree: {told}. Nothing was trained. Start all of them with the same "
            f"settings."
        )


def _values(name: str, configs: list[Record]) -> str:
    return ", ".join(f"{config.get(name)!r} in process {n}" for n, config in enumerate(configs))


def _open(share: Share, out: Path, config: Record, peers: Peers) -> list[Record]:
    """Let process 0 open the run, and the others see what came of it."""
    if share.index == 0:
        try:
            records = runs.open_run(out, config)
        except (OSError, ValueError) as error:
            _tell("opened", str(error))
            raise
        _tell("opened", "")
        return records
    if problem := _ask("opened", peers):
        raise RuntimeError(f"Process 0 cannot open the run: {problem}")
    return runs.read_records(out)


def _tell(key: str, value: str) -> None:
    _client().key_value_set(key, value)


def _ask(key: str, peers: Peers) -> str:
    try:
        return _client().blocking_key_value_get(key, 1000 * peers.peer_timeout)
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(
            f"A process has met the others and is gone: nothing was heard of {key} for "
            f"{peers.peer_timeout} s. Nothing was trained. Start all of them again."
        ) from error


def _client() -> Any:
    """What processes tell one another by; public functions of jax would start the devices."""
    from jax._src.distributed import global_state

    return global_state.client
