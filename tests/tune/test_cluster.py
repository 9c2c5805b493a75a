"""Tasks spread over workers: shares are fair, every trial is in the one log, and a lost worker loses its flight only."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
from fakes import FakeBuilder, FakeRunner, two_tasks
from harness import conv, floats, module_of, target_of
from servers import ALONE, Server

from tvmq.errors import DeviceError, TuningError
from tvmq.kernels.lower import lower
from tvmq.target import load_target
from tvmq.tune import cluster, equipment, part
from tvmq.tune.budget import Budget
from tvmq.tune.cluster import gather, joined_curve, split
from tvmq.tune.database import DEFAULT, FINAL, Writer, read
from tvmq.tune.equipment import Request
from tvmq.tune.part import Part, job_of
from tvmq.tune.run import tune
from tvmq.tune.tasks import TuneTask, default_of, tasks_of

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'tvmq[cluster]'")


@pytest.fixture
def target():
    return target_of("avx512-vnni")


@pytest.fixture
def request_of(target, monkeypatch):
    """A request whose workers have a device of known times, which fails where it is "gone"."""
    builder = FakeBuilder()
    builder.close = lambda: None

    def runner_of(request):
        if request.device == "gone":
            raise DeviceError("device gone", expected="an answer", seen="none")
        return FakeRunner(builder)

    monkeypatch.setattr(part, "runner_of", runner_of)
    monkeypatch.setattr(equipment, "Builders", lambda *_: builder)
    return lambda budget, device="host": Request(target, budget, device, fresh=True)


class Inline:
    """A worker that does all of its work when it is first asked, and is then lost where it is `fragile`."""

    def __init__(self, name: str, job: str, fragile: bool = False) -> None:
        self.name, self.part, self.fragile, self.asked = name, Part(job), fragile, 0

    def take(self):
        self.asked += 1
        if self.asked == 1:
            self.part.run()
            said = self.part.take()
            return said[:-1] if self.fragile else said
        raise TuningError(f"worker {self.name}", expected="an answer", seen="a dead actor")

    def stop(self):
        self.part.stop()


def tasks(target, sizes):
    cases = [
        conv(f"c{i}", floats((1, size, size, 16), i), floats((16, 3, 3, 16), i), padding=(1, 1, 1, 1))
        for i, size in enumerate(sizes)
    ]
    return tasks_of(lower(module_of(cases), target).choices)


def side(tuned):
    return tuned.task.tensors[0].shape[1]


def test_shares_are_of_equal_number_and_like_work(target):
    shares = split(tasks(target, [4, 5, 6, 7, 8, 9]), 3, Budget(trials=8, seconds=60))
    assert [[side(t) for t in share] for share, _ in shares] == [[9, 4], [8, 5], [7, 6]]
    assert [(budget.trials, budget.seconds) for _, budget in shares] == [(3, 60), (3, 60), (2, 60)]


def test_there_are_no_more_shares_than_tasks_or_trials(target):
    some = tasks(target, [4, 5, 6])
    assert [len(share) for share, _ in split(some, 9, Budget())] == [1, 1, 1]
    assert [(len(share), budget.trials) for share, budget in split(some, 9, Budget(trials=2))] == [(1, 1), (2, 1)]


def test_curves_are_summed_from_when_all_have_begun():
    assert joined_curve([[(1.0, 5.0), (4.0, 3.0)], [(2.0, 7.0), (3.0, 6.0)]]) == [(2.0, 12.0), (3.0, 11.0), (4.0, 9.0)]


def test_every_trial_of_every_worker_is_in_one_log(tmp_path, target, request_of):
    some, whole, events = two_tasks(target), request_of(Budget(trials=40)), []
    with Writer(tmp_path, target) as writer:
        jobs = [job_of(share, request_of(budget), ()) for share, budget in split(some, 2, whole.budget)]
        workers = [Inline(f"w{i}", job) for i, job in enumerate(jobs)]
        summary = gather(workers, some, whole, writer, events.append, lambda: False)
    log = read(tmp_path, target)
    assert {trial.task for trial in log.trials} == {tuned.task for tuned in some}
    assert all(trials[0].role == DEFAULT for trials in log.by_task().values())
    assert summary.trials == sum(event["event"] == "trial" for event in events) == 40
    assert {event["worker"] for event in events} == {"w0", "w1"}
    assert [row["operators"] for row in summary.tasks] == [list(tuned.names) for tuned in some]
    assert summary.tuned_ms < summary.default_ms
    assert summary.curve[-1][1] == pytest.approx(summary.tuned_ms)
    assert not log.damage


def test_what_is_known_is_not_measured_again(tmp_path, target, request_of):
    (first, _) = two_tasks(target)
    budget = Budget(trials=12)
    with Writer(tmp_path, target) as writer:
        for _ in range(2):
            worker = Inline("w", job_of([first], request_of(budget), writer.log.trials))
            gather([worker], [first], request_of(budget), writer, lambda _event: None, lambda: False)
    roles = [trial.role for trial in read(tmp_path, target).trials]
    # The default, first of all and beside the first candidates.
    assert roles.count(DEFAULT) == 2
    decisions = [t.decision for t in read(tmp_path, target).trials if t.role == "searched"]
    assert len(decisions) == len(set(decisions)) == 22


def test_a_lost_worker_s_trials_are_kept_and_named(tmp_path, target, request_of):
    some, whole, events = two_tasks(target), request_of(Budget(trials=20)), []
    with Writer(tmp_path, target) as writer:
        jobs = [job_of(share, request_of(budget), ()) for share, budget in split(some, 2, whole.budget)]
        workers = [Inline("kept", jobs[0]), Inline("fragile", jobs[1], fragile=True)]
        summary = gather(workers, some, whole, writer, events.append, lambda: False)
    assert len([t for t in read(tmp_path, target).trials if t.role != "final"]) == 20
    assert "worker fragile is lost: worker fragile: expected an answer, saw a dead actor" in summary.ended
    assert all(row["default_ms"] for row in summary.tasks)
    assert [event["worker"] for event in events if event["event"] == "lost"] == ["fragile"]


def test_without_a_worker_that_tunes(tmp_path, target, request_of):
    some, whole = two_tasks(target), request_of(Budget(), "gone")
    with Writer(tmp_path, target) as writer:
        worker = Inline("a", job_of(some, whole, ()))
        with pytest.raises(TuningError, match="expected a worker that tunes, saw worker a is lost: device gone: exp"):
            gather([worker], some, whole, writer, lambda _event: None, lambda: False)


def test_a_stop_reaches_the_workers(tmp_path, target, request_of):
    some, whole = two_tasks(target), request_of(Budget())
    with Writer(tmp_path, target) as writer:
        worker = Inline("a", job_of(some, whole, ()))
        summary = gather([worker], some, whole, writer, lambda _event: None, lambda: True)
    assert (summary.ended, summary.interrupted) == ("interrupted", True)


def test_another_version_is_refused(target, request_of):
    job = json.loads(job_of(two_tasks(target), request_of(Budget()), ()))
    worker = Part(json.dumps({**job, "version": "0.0.1"}))
    worker.run()
    (message,) = worker.take()
    assert "tvmq on a worker: expected version 0.0.1, saw" in message["error"]


def test_templates_that_were_ruled_out_stay_so(target):
    (tuned,) = tasks(target, [32])
    narrow = TuneTask(tuned.task, tuned.spaces[-1:], default_of(tuned.spaces[-1:]), tuned.names)
    assert len(tuned.spaces) > 1
    (raw,) = json.loads(job_of([narrow], Request(target, Budget()), ()))["tasks"]
    found = part._task(raw, Request(target, Budget()))
    assert [space.template for space in found.spaces] == [narrow.spaces[0].template]
    assert (found.default, found.names) == (narrow.default, narrow.names)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"devices": ["rpc://h:1"]}, "devices: expected a cluster whose workers measure on them, saw none"),
        ({"cluster": "auto", "device": "rpc://h:1"}, "device rpc://h:1: expected the devices of a cluster's workers"),
    ],
)
def test_devices_that_do_not_go_together(options, said):
    with pytest.raises(TuningError, match=said):
        tune("m.tvmq", **options)


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(TuningError, match=r"--cluster: saw no module ray; pip install 'tvmq\[cluster\]'"):
        cluster.spread([], Request(load_target("host"), Budget()), "auto", (), None, print, lambda: False)


@pytest.mark.parametrize(
    ("address", "seen"),
    [("127.0.0.1:9", "Connection refused"), ("nonsense", "Invalid address")],
)
@needs_ray
def test_no_cluster_at_the_address(address, seen):
    with pytest.raises(
        TuningError, match=f"cluster '{address}': expected a Ray cluster: auto, local or HOST:PORT, .*{seen}"
    ):
        cluster.spread([], Request(load_target("host"), Budget()), address, (), None, print, lambda: False)


@pytest.mark.slow
@needs_ray
def test_two_workers_of_a_ray_with_a_board_each(tmp_path, imported):
    boards = [Server(ALONE) for _ in range(2)]
    events = []
    try:
        devices = [f"rpc://127.0.0.1:{board.port}?secret=none" for board in boards]
        options = {"cluster": "local", "devices": devices, "logs": tmp_path, "stop_at": 0.0, "fresh": True}
        summary = tune(imported("residual"), trials=8, event=events.append, **options)
    finally:
        for board in boards:
            board.kill()
    log = read(tmp_path, load_target("host"))
    assert summary.trials == sum(event["event"] == "trial" for event in events) == 8
    assert len([trial for trial in log.trials if trial.role != FINAL]) == 8
    assert all(trial.seconds for trial in log.trials), summary.failures
    assert {event["worker"] for event in events} == set(devices)
    assert {event["place"] for event in events if event["event"] == "trial"} == {d.split("?")[0] for d in devices}
    assert not [event for event in events if event["event"] == "lost"]
    assert all(row["default_ms"] for row in summary.tasks)
