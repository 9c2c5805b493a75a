"""A share of a model's tasks, tuned on another machine of a cluster: what goes there, and what comes back.

It takes a job as JSON and says messages, plain data, one by one as things happen:

    {"trial": {...}}     a trial, for the one log, which the machine that spreads the tasks writes
    {"event": {...}}     an event of `Tuner`
    {"done": {...}}      the summary: the last message
    {"error": "..."}     why there is none, as a sentence: the last message
"""

from __future__ import annotations

import dataclasses
import json
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tvmq._version import __version__
from tvmq.errors import TuningError, TvmqError
from tvmq.kernels.decision import Space
from tvmq.kernels.lower import lower
from tvmq.kernels.task import module_of, task_of_json
from tvmq.tune.budget import Budget
from tvmq.tune.database import Log, Trial, identity
from tvmq.tune.equipment import Request, runner_of, searching
from tvmq.tune.tasks import TuneTask, default_of, tasks_of
from tvmq.tune.worker import decision_of, target_of


def job_of(tasks: Sequence[TuneTask], request: Request, trials: Iterable[Trial]) -> str:
    """The job of tuning `tasks`, of which `trials` are known. Spaces go as the names of their templates."""
    return json.dumps(
        {
            "version": __version__,
            "request": dataclasses.asdict(request),
            "tasks": [
                {"task": t.task.to_json(), "names": t.names, "templates": [space.template for space in t.spaces]}
                for t in tasks
            ],
            "trials": [plain(trial) for trial in trials],
        }
    )


def plain(trial: Trial) -> dict[str, Any]:
    """A trial as plain data."""
    decision = [trial.decision.template, trial.decision.knobs]
    rest = {"role": trial.role, "seconds": trial.seconds, "cores": trial.cores}
    return {"task": trial.task.to_json(), "decision": decision, **rest}


def trial_of(raw: dict[str, Any]) -> Trial:
    """The inverse of `plain`."""
    task, decision = task_of_json(raw["task"]), decision_of(raw["decision"])
    return Trial(task, decision, str(raw["role"]), tuple(raw["seconds"]), int(raw["cores"]))


class Part:
    """One job. `run` in one thread; `take` and `stop` meanwhile in another."""

    def __init__(self, job: str) -> None:
        self._job = json.loads(job)
        self._said: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()

    def run(self) -> None:
        """Tune until the budget, the hope, or the patience of who asked for it is spent."""
        try:
            last: dict[str, Any] = {"done": self._tune()}
        except TvmqError as error:
            last = {"error": str(error)}
        self._said.put(last)

    def take(self) -> list[dict[str, Any]]:
        """What was said since the last call."""
        return [self._said.get() for _ in range(self._said.qsize())]

    def stop(self) -> None:
        """End after the trial in flight."""
        self._stop.set()

    def _tune(self) -> dict[str, Any]:
        # Before anything else is read: another version's job may have other fields.
        if self._job["version"] != __version__:
            raise TuningError("tvmq on a worker", expected=f"version {self._job['version']}", seen=__version__)
        request = _request(self._job["request"])
        tasks = [_task(raw, request) for raw in self._job["tasks"]]
        log = Log(Path(), identity(request.target), added=[trial_of(raw) for raw in self._job["trials"]])
        relay = _Relay(log, self._said.put)
        runner = runner_of(request)
        with searching(tasks, request, relay, runner, self._tell, self._stop.is_set) as tuner:
            return dataclasses.asdict(tuner.run())

    def _tell(self, event: dict[str, Any]) -> None:
        self._said.put({"event": event})


@dataclasses.dataclass
class _Relay:
    """A `TrialWriter` that says trials instead of writing them."""

    log: Log
    say: Callable[[dict[str, Any]], None]

    def add(self, trial: Trial, spaces: Sequence[Space]) -> None:
        """See `TrialWriter`."""
        del spaces
        self.log.added.append(trial)
        self.say({"trial": plain(trial)})


def _request(raw: dict[str, Any]) -> Request:
    return Request(**{**raw, "target": target_of(raw["target"]), "budget": Budget(**raw["budget"])})


def _task(raw: dict[str, Any], request: Request) -> TuneTask:
    task = task_of_json(raw["task"])
    (found,) = tasks_of(lower(module_of(task), request.target).choices)
    # The task of a module of ones has all templates; weights, or the recipe, may have ruled one out.
    spaces = tuple(space for space in found.spaces if space.template in raw["templates"])
    return TuneTask(task, spaces, default_of(spaces), tuple(raw["names"]))
