"""Tuning on a farm: the tasks of a model are spread over workers, whose trials go into one log as they are made.

A worker measures on its own machine, or on a device or a tracker's key of its own. Tasks are shared out, not trials: a
candidate is compared only with others of its task, so that all figures of a task are of one worker. The log is written
by the one process that spreads the tasks, so a kill of it, of a worker or of a machine loses the trials in flight at
most. Ray starts the workers and carries the messages (`part`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from tvmq.errors import TuningError, TvmqError
from tvmq.tune.budget import Budget, Spending
from tvmq.tune.database import Writer
from tvmq.tune.equipment import Request
from tvmq.tune.part import Part, job_of, trial_of
from tvmq.tune.progress import Progress, Summary, best_seconds, default_seconds
from tvmq.tune.search import Candidates
from tvmq.tune.tasks import TuneTask
from tvmq.tune.tuner import Event

# Seconds between looks at what workers say.
_LOOK = 0.2
# Seconds to wait for a cluster to answer.
_CONNECT_S = 10.0


class Worker(Protocol):
    """A `Part` at work somewhere."""

    @property
    def name(self) -> str:
        """Where: what it is called in errors and events."""

    def take(self) -> list[dict[str, Any]]:
        """What it said since the last call; never waits. Raises TvmqError where the worker is lost."""

    def stop(self) -> None:
        """Ask for an end after the trial in flight."""


@dataclass(frozen=True)
class Place:
    """Where a worker runs: `options` of its Ray actor. device: on which it measures."""

    name: str
    device: str
    options: dict[str, Any]


def spread(
    tasks: Sequence[TuneTask],
    request: Request,
    address: str,
    devices: Sequence[str],
    writer: Writer,
    event: Event,
    stopped: Callable[[], bool],
) -> Summary:
    """Tune `tasks` on the Ray cluster at `address`: "auto", "local" or HOST:PORT.

    devices: a worker for each, anywhere in the cluster; none means one on each machine, measuring itself.
    Raises TuningError where there is no Ray, no such cluster, or no worker that could tune.
    """
    with _cluster(address) as ray:
        places = _places(ray, devices)
        parts = split(tasks, len(places), request.budget)
        workers = []
        for place, (share, budget) in zip(places, parts, strict=False):
            mine = {tuned.task for tuned in share}
            there = dataclasses.replace(request, budget=budget, device=place.device)
            # Trials of other tasks teach the cost model, and their verdicts are tried at other sizes.
            known = sorted(writer.log.trials, key=lambda trial: trial.task in mine)
            workers.append(_RayWorker(ray, place, job_of(share, there, known)))
        return gather(workers, tasks, request, writer, event, stopped)


def split(tasks: Sequence[TuneTask], count: int, budget: Budget) -> list[tuple[list[TuneTask], Budget]]:
    """At most `count` shares, of as many tasks and as much work as can be, and the budget of each.

    Seconds are those of every share, as they run at once; trials are shared out. Equal arguments have equal shares, so
    that a run that is taken up again measures each task where it was measured before.
    """
    count = min(count, len(tasks), budget.trials or len(tasks))
    shares: list[list[TuneTask]] = [[] for _ in range(count)]
    for index, tuned in enumerate(sorted(tasks, key=_work, reverse=True)):
        # Forth and back: 0 1 2 2 1 0 0 1 2 ...
        turn, seat = divmod(index, count)
        shares[seat if turn % 2 == 0 else count - 1 - seat].append(tuned)
    return [(share, _share(budget, index, count)) for index, share in enumerate(shares)]


def _share(budget: Budget, index: int, count: int) -> Budget:
    if budget.trials is None:
        return budget
    return dataclasses.replace(budget, trials=budget.trials // count + (index < budget.trials % count))


def _work(tuned: TuneTask) -> int:
    """Multiply-adds of an inference: each output takes as many as its weights have elements an output channel.

    Attention takes each key twice.
    """
    out, second = tuned.task.attributes["out_shape"], tuned.task.tensors[1]
    each = math.prod(second.shape) // out[-1] if second.constant else 2 * second.shape[1]
    return int(tuned.count * math.prod(out) * each)


@dataclass
class _Gathered:
    """What workers said. lost: why, of each that said nothing at its end."""

    summaries: list[Summary] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def gather(
    workers: Sequence[Worker],
    tasks: Sequence[TuneTask],
    request: Request,
    writer: Writer,
    event: Event,
    stopped: Callable[[], bool],
) -> Summary:
    """Write what workers measure until all have ended. Raises TuningError where all of them were lost."""
    spending = Spending(request.budget)
    found, waiting, told = _Gathered(), list(workers), False
    spaces = {tuned.task: tuned.spaces for tuned in tasks}
    while waiting:
        if stopped() and not told:
            told = True
            for worker in waiting:
                worker.stop()
        waiting = [worker for worker in waiting if not _hear(worker, spaces, writer, event, found)]
        if waiting:
            time.sleep(_LOOK)
    if not found.summaries:
        raise TuningError("cluster", expected="a worker that tunes", seen="; ".join(found.lost))
    return _joined(tasks, request, writer, found, spending.elapsed)


def _hear(worker: Worker, spaces: dict[Any, Any], writer: Writer, event: Event, found: _Gathered) -> bool:
    """Take what a worker said; whether it has ended."""
    try:
        messages = worker.take()
    except TvmqError as error:
        messages = [{"error": str(error)}]
    for message in messages:
        match message:
            case {"trial": raw}:
                trial = trial_of(raw)
                writer.add(trial, spaces[trial.task])
            case {"event": raw}:
                event({**raw, "worker": worker.name})
            case {"done": raw}:
                found.summaries.append(Summary(**raw))
                return True
            case {"error": why}:
                found.lost.append(f"worker {worker.name} is lost: {why}")
                event({"event": "lost", "worker": worker.name, "error": why})
                return True
    return False


def _joined(tasks: Sequence[TuneTask], request: Request, writer: Writer, found: _Gathered, elapsed: float) -> Summary:
    parts = found.summaries
    # The log knows all trials, also those of workers that were lost.
    rows = [Progress(tuned, Candidates(tuned)) for tuned in tasks]
    trials = writer.log.by_task(request.target.cores)
    for row in rows:
        for trial in trials.get(row.tuned.task, ()):
            row.take(trial)
    interrupted = any(part.interrupted for part in parts)
    failures: Counter[str] = Counter()
    for part in parts:
        failures.update(part.failures)
    return Summary(
        request.target.name,
        [row.to_dict() for row in rows],
        sum(part.trials for part in parts),
        default_seconds(rows) * 1e3,
        best_seconds(rows) * 1e3,
        max(part.noise for part in parts),
        elapsed,
        "; ".join([*dict.fromkeys(part.ended for part in parts), *found.lost]),
        interrupted,
        dict(failures),
        joined_curve([part.curve for part in parts]),
        list(writer.log.damage),
    )


def joined_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """(seconds, ms): the sum of curves from when each has begun, at each time at which one of them changes."""
    latest: dict[int, float] = {}
    found = []
    for seconds, ms, index in sorted((s, ms, i) for i, curve in enumerate(curves) for s, ms in curve):
        latest[index] = ms
        if len(latest) == len(curves):
            found.append((seconds, sum(latest.values())))
    return found


# --- Ray ---


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Yield the module `ray`, connected. Raises TuningError."""
    try:
        import ray
    except ImportError as error:
        raise TuningError("--cluster", seen="no module ray", hint="pip install 'tvmq[cluster]'") from error
    _check_answers(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise TuningError where nobody listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from error


def _no_cluster(address: str, seen: str) -> TuningError:
    expected = "a Ray cluster: auto, local or HOST:PORT"
    return TuningError(f"cluster {address!r}", expected=expected, seen=seen, hint="start one: ray start --head")


def _places(ray: Any, devices: Sequence[str]) -> list[Place]:
    if devices:
        return [Place(device, device, {"num_cpus": 1}) for device in devices]
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found = []
    for node in ray.nodes():
        cpus = node["Resources"].get("CPU", 0)
        if node["Alive"] and cpus:
            # All of a machine's CPUs: figures mean nothing where something else runs.
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            found.append(Place(node["NodeManagerHostname"], "host", {"num_cpus": cpus, "scheduling_strategy": here}))
    return found


class _RayWorker:
    """A `Part` that is a Ray actor: one thread of it tunes, the other answers."""

    def __init__(self, ray: Any, place: Place, job: str) -> None:
        self.name, self._ray = place.name, ray
        self._actor = ray.remote(Part).options(max_concurrency=2, **place.options).remote(job)
        self._run = self._actor.run.remote()
        self._asked = self._actor.take.remote()

    def take(self) -> list[dict[str, Any]]:
        """See `Worker`."""
        try:
            if not self._is_done(self._asked):
                return []
            said = self._ray.get(self._asked)
            self._asked = self._actor.take.remote()
            if not said and self._is_done(self._run):
                # Raises what it ended with, unless the last message is still to be taken.
                self._ray.get(self._run)
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines()
            raise TuningError(f"worker {self.name}", expected="an answer", seen=lines[-1]) from error
        return list(said)

    def stop(self) -> None:
        """See `Worker`."""
        self._actor.stop.remote()

    def _is_done(self, reference: Any) -> bool:
        return bool(self._ray.wait([reference], timeout=0)[0])
