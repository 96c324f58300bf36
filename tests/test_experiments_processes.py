"""Tests of experiments/common/processes.py: several processes, one run."""

import dataclasses
import itertools
import os
import signal
import socket
import threading

import jax
import pytest
import tyro

from experiments import compare_methods, lottery_ticket
from experiments.common import files, processes, runs
from experiments.common.processes import Peers, Share
from tests import crash

TOY = lottery_ticket.Config(levels=1, steps=10, seeds=3, eval_every=5, controls=("reinit",))
OPTIONS = ["--levels", "1", "--steps", "10", "--seeds", "3", "--eval-every", "5"]
OPTIONS += ["--controls", "reinit"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process leaves, whom nobody disturbs; to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    jax.config.update("jax_disable_most_optimizations", True)
    lottery_ticket.main(dataclasses.replace(TOY, out=folder))
    jax.config.update("jax_disable_most_optimizations", False)
    return crash.contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("victim, others, writes", [(0, 0, (6, 3)), (1, 1, (4, 3))])
def test_processes_go_on_when_one_of_them_was_killed(whole, tmp_path, victim, others, writes):
    kills = [{"write": n, "process": victim} for n in writes]
    lines = crash.command_lines(OPTIONS, tmp_path / "run", timeout=40)
    codes, told = crash.run_processes("lottery_ticket", lines, kills)
    assert [pair[victim] for pair in codes] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert [pair[1 - victim] for pair in codes] == [others, others, 0]
    if victim:
        assert told.count("No other process has written a record for 40 s") == 2
    assert crash.contents(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_run_of_two_processes_can_be_ended_by_one(whole, tmp_path):
    lines, kills = (
        crash.command_lines(OPTIONS, tmp_path / "run", timeout=20),
        [{"write": 6, "process": 1}],
    )
    codes, _ = crash.run_processes("lottery_ticket", lines, kills, starts=1)
    assert codes == [[1, -signal.SIGKILL]]
    assert (tmp_path / "run" / "metrics.p1of2.jsonl").exists()
    codes, _ = crash.run_processes("lottery_ticket", [[*OPTIONS, "--out", str(tmp_path / "run")]])
    assert codes == [[0]]
    assert crash.contents(tmp_path / "run") == whole


@pytest.mark.slow
def test_compare_methods_is_the_same_in_two_processes(tmp_path):
    options = ["--methods", "gradual", "--sparsities", "0.8", "--seeds", "2", "--steps", "20"]
    options += ["--parallel-seeds", "off"]
    codes, _ = crash.run_processes(
        "compare_methods", crash.command_lines(options, tmp_path / "two")
    )
    assert codes == [[0, 0]]
    codes, _ = crash.run_processes("compare_methods", [[*options, "--out", str(tmp_path / "one")]])
    assert codes == [[0]]
    assert crash.contents(tmp_path / "two") == crash.contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("here, missing", [(0, 1), (1, 0)])
def test_a_process_that_waits_in_vain_says_for_whom(tmp_path, here, missing):
    lines = crash.command_lines(OPTIONS, tmp_path / "run", timeout=3)
    codes, told = crash.run_processes("lottery_ticket", [lines[here]])
    assert codes == [[1]]
    assert "Waited 3 s for all 2 processes to meet at 127.0.0.1:" in told
    assert f"There: {here}. Missing: {missing}. Nothing was trained. Start every" in told
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_processes_that_disagree_all_refuse(tmp_path):
    lines = crash.command_lines(OPTIONS, tmp_path / "run")
    lines[1] += ["--batch-size", "30", "--rate", "0.2"]
    codes, told = crash.run_processes("lottery_ticket", lines)
    assert codes == [[1, 1]]
    fields = "rate (0.36 in process 0, 0.2 in process 1); batch_size (60 in process 0, 30 in"
    assert told.count(f"The processes disagree: {fields}") == 2
    assert crash.contents(tmp_path) == {}


class Store:
    """What jax's coordination service keeps, for processes that are threads of a test."""

    def __init__(self):
        self.values, self.news = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.news:
            self.values[key] = value
            self.news.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        with self.news:
            if not self.news.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]


@pytest.fixture
def meeting(monkeypatch):
    """Let processes meet without jax."""
    store = Store()
    monkeypatch.setattr(processes, "_meet", lambda peers, out: Share(peers.process_id, 2))
    monkeypatch.setattr(processes, "_client", lambda: store)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)


def run_in_threads(out, configs, peer_timeout=20):
    """Start a process of each config; give what each has opened, or its error."""
    found = {}

    def start(number, config):
        peers = Peers(True, "127.0.0.1:1", 2, number, peer_timeout)
        try:
            with processes.running(peers, out, config) as opened:
                found[number] = opened
        except (OSError, RuntimeError, ValueError) as error:
            found[number] = error

    threads = [threading.Thread(target=start, args=pair) for pair in configs.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_that_agree_open_one_run(tmp_path, meeting):
    runs.open_run(tmp_path, {"steps": 2})
    runs.append_record(tmp_path, {"seed": 0})
    runs.append_record(tmp_path, {"seed": 1}, ".p1of2")
    found = run_in_threads(tmp_path, {0: {"steps": 2}, 1: {"steps": 2}})
    records = [{"seed": 0}, {"seed": 1}]
    assert found == {0: (Share(0, 2), records), 1: (Share(1, 2), records)}
    assert sorted(crash.contents(tmp_path)) == ["config.json", "metrics.jsonl"]


def test_processes_that_disagree_are_told_in_what(tmp_path, meeting):
    found = run_in_threads(tmp_path, {0: {"steps": 2, "rate": 1}, 1: {"steps": 3, "rate": 1}})
    for error in found.values():
        assert isinstance(error, ValueError)
        assert "disagree: steps (2 in process 0, 3 in process 1). Nothing was" in str(error)
    assert crash.contents(tmp_path) == {}


def test_all_refuse_a_folder_that_the_first_cannot_open(tmp_path, meeting):
    runs.open_run(tmp_path, {"steps": 2})
    before = crash.contents(tmp_path)
    found = run_in_threads(tmp_path, {0: {"steps": 3}, 1: {"steps": 3}})
    assert isinstance(found[0], ValueError) and isinstance(found[1], RuntimeError)
    assert "another config: steps (2 there, 3 now)" in str(found[0])
    assert str(found[1]) == f"Process 0 cannot open the run: {found[0]}"
    assert crash.contents(tmp_path) == before


def test_a_process_whose_peer_has_gone_says_so(tmp_path, meeting):
    found = run_in_threads(tmp_path, {0: {"steps": 3}}, peer_timeout=1)
    assert isinstance(found[0], TimeoutError)
    assert "A process has met the others and is gone: nothing was heard of config/1" in str(
        found[0]
    )


def test_a_process_without_a_cluster_is_told_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with (
        pytest.raises(ValueError, match=r"no cluster that jax knows \(coord.*Set `coordinator`"),
        processes.running(Peers(distributed=True), tmp_path, {}),
    ):
        pass
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers)  # nobody is going to end this process


def refuse(*_, **__):
    raise ValueError("coordinator_address should be defined.")


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        address = f"127.0.0.1:{there.getsockname()[1]}"
        message = f"cannot meet at `coordinator='{address}'`: .*in use.*a port that is free there"
        with (
            pytest.raises(RuntimeError, match=message),
            processes.running(Peers(True, address, 2, 0), tmp_path, {}),
        ):
            pass
    assert crash.contents(tmp_path) == {}


def test_a_process_of_an_earlier_larger_run_keeps_the_folder(tmp_path):
    with (
        files.locked(tmp_path, 2, 3),
        pytest.raises(RuntimeError, match=f"in use by process {os.getpid()}"),
    ):
        files.locked(tmp_path, 0, 2).__enter__()
    with files.locked(tmp_path, 1, 2), files.locked(tmp_path, 0, 2):
        assert files.held(tmp_path, 0) and files.held(tmp_path, 1) and not files.held(tmp_path, 2)
    (tmp_path / ".lock.1").write_text("of who was killed")
    with files.locked(tmp_path):
        pass
    assert crash.contents(tmp_path) == {}


PLANNED = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def run_of(record):
    return record["condition"], record["seed"]


def record_of(run):
    return {"condition": run[0], "seed": run[1]}


def test_records_of_all_processes_are_gathered_in_the_order_of_the_plan(tmp_path, monkeypatch):
    runs.open_run(tmp_path, {})
    for run in (PLANNED[2], PLANNED[0]):
        runs.append_record(tmp_path, record_of(run))
    runs.append_record(tmp_path, record_of(PLANNED[3]), ".p1of2")
    monkeypatch.setattr(
        processes.time,
        "sleep",
        lambda _: runs.append_record(tmp_path, record_of(PLANNED[1]), ".p1of2"),
    )
    records = processes.gather(tmp_path, PLANNED, run_of, Peers())
    assert records == [record_of(run) for run in PLANNED] == runs.read_records(tmp_path)
    assert sorted(crash.contents(tmp_path)) == ["config.json", "metrics.jsonl"]


def test_who_waits_for_records_in_vain_is_told_which(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PAUSE", 0.01)
    runs.open_run(tmp_path, {})
    runs.append_record(tmp_path, record_of(PLANNED[0]))
    message = r"record for 1 s, and 3 of 4 are missing; the first is that of \('a', 1\).*same `out`"
    with pytest.raises(TimeoutError, match=message):
        processes.gather(tmp_path, PLANNED, run_of, Peers(peer_timeout=1))
    assert runs.read_records(tmp_path) == [record_of(PLANNED[0])]


def test_a_run_killed_while_it_gathers_has_no_record_twice(tmp_path, monkeypatch):
    def gather():
        runs.open_run(tmp_path, {})
        for run in PLANNED[:2]:
            runs.append_record(tmp_path, record_of(run))
        for run in PLANNED[2:]:
            runs.append_record(tmp_path, record_of(run), ".p1of2")
        processes.gather(tmp_path, PLANNED, run_of, Peers())

    for state in crash.states(tmp_path, gather, monkeypatch):
        crash.restore(state, tmp_path)
        runs.open_run(tmp_path, {})
        records = runs.read_records(tmp_path)
        assert records == [record_of(run) for run in PLANNED[: len(records)]]
        assert not list(tmp_path.glob("metrics.p*"))


def test_shares_are_disjoint_and_all():
    for count in (1, 2, 5):
        shares = [[s for s in range(7) if Share(n, count).has(s)] for n in range(count)]
        assert sorted(itertools.chain(*shares)) == list(range(7))
    assert (Share().part, Share(0, 2).part, Share(1, 2).part) == ("", "", ".p1of2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coordinator": "here:1"}, "`coordinator='here:1'` goes with distributed=True"),
        ({"processes": 2}, "`processes=2` goes with distributed=True"),
        ({"distributed": True, "coordinator": "here"}, "'here'` must be an address and a port"),
        ({"distributed": True, "processes": 0}, "`processes=0` must be positive"),
        (
            {"distributed": True, "processes": 2, "process_id": 2},
            "`process_id=2` must lie in 0 to processes - 1, with processes=2",
        ),
        ({"peer_timeout": 0}, "`peer_timeout=0` must be positive"),
    ],
)
@pytest.mark.parametrize("experiment", [compare_methods, lottery_ticket])
def test_bad_settings_are_refused_by_name(experiment, changes, words):
    with pytest.raises(ValueError, match=words):
        experiment.resolve(experiment.Config(peers=Peers(**changes)))


def test_the_command_line_says_where_to_meet(tmp_path):
    config = tyro.cli(lottery_ticket.Config, args=crash.command_lines(OPTIONS, tmp_path)[1])
    assert config.peers == Peers(True, config.peers.coordinator, 2, 1, 300)
    assert (
        lottery_ticket.recorded(lottery_ticket.resolve(config))
        .keys()
        .isdisjoint({"peers", "out", "distributed"})
    )
