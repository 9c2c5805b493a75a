"""What a search needs on the machine where it runs: a runner, builders, and what is known already."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tvmq.deploy.build import runs_here
from tvmq.errors import TuningError
from tvmq.files import scratch_folder
from tvmq.kernels.lower import lower
from tvmq.kernels.task import Task, module_of
from tvmq.target import Target
from tvmq.tune import records
from tvmq.tune.budget import Budget, Spending
from tvmq.tune.candidate import Timing
from tvmq.tune.database import DEFAULT, FINAL, Log
from tvmq.tune.fleet import Fleet, boards
from tvmq.tune.processes import Builders
from tvmq.tune.runners import LocalRunner, Runner
from tvmq.tune.search import Candidates
from tvmq.tune.tasks import TuneTask, tasks_of
from tvmq.tune.tuner import Event, TrialWriter, Tuner


@dataclass(frozen=True)
class Request:
    """How a search is to be done; the fields are those of `run.tune`. target: its cores are the threads.

    model_bytes: of the model's weights.
    """

    target: Target
    budget: Budget
    device: str = "host"
    flush: bool = False
    seed: int = 0
    fresh: bool = False
    model_bytes: int = 0


def runner_of(request: Request) -> Runner:
    """What times candidates on the device. Raises TuningError, DeviceError."""
    target, timing = request.target, timing_of(request)
    if request.device != "host":
        return Fleet(boards(request.device, timing), timing.timeout_s)
    if not runs_here(target):
        raise TuningError(
            f"target {target.name}", expected="a device that runs its code", seen="this machine", hint="name a --device"
        )
    return LocalRunner(timing)


def timing_of(request: Request) -> Timing:
    """How its candidates are timed. On a board, weights that its caches cannot hold are thrown out of them."""
    target = request.target
    caches = 1024 * (target.l3_kib or target.l2_kib * target.cores)
    flush = request.flush or (request.device != "host" and request.model_bytes > caches)
    return Timing(target.cores, flush=flush, model_bytes=request.model_bytes)


@contextlib.contextmanager
def searching(
    tasks: Sequence[TuneTask],
    request: Request,
    writer: TrialWriter,
    runner: Runner,
    event: Event = lambda _event: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Tuner]:
    """Yield the search, which knows what `writer`'s log and this machine's know; ends its processes and `runner`."""
    target = request.target
    runner.timing = timing_of(request)
    with scratch_folder() as scratch:
        # The clock starts when there is something to measure: importing a model is not tuning.
        spending = Spending(request.budget)
        builder = Builders(target, os.cpu_count() or 1, scratch if request.fresh else None)
        try:
            known = records.LogRecords(target, []) if request.fresh else records.load(target)
            known = dataclasses.replace(known, logs=[writer.log, *known.logs])
            yield Tuner(
                tasks,
                target,
                writer,
                builder,
                runner,
                spending,
                others=others_of([*known.logs, *known.likes], {tuned.task for tuned in tasks}, target),
                records=known,
                seed=request.seed,
                event=event,
                stopped=stopped,
            )
        finally:
            builder.close()
            runner.close()


def others_of(logs: Sequence[Log], tasks: set[Task], target: Target) -> list[Candidates]:
    """What was measured for tasks that are none of `tasks`, for the cost model."""
    return list(_measured(logs, tasks, target))


def _measured(logs: Sequence[Log], tasks: set[Task], target: Target) -> Iterator[Candidates]:
    seen = set(tasks)
    for log in logs:
        for task, trials in log.by_task(target.cores).items():
            default = min((trial.best for trial in trials if trial.role == DEFAULT and trial.seconds), default=None)
            if task in seen or default is None:
                continue
            seen.add(task)
            (tuned,) = tasks_of(lower(module_of(task), target).choices)
            candidates = Candidates(tuned)
            for trial in trials:
                if trial.role != FINAL:
                    candidates.measured(trial.decision, trial.best / default)
            yield candidates
