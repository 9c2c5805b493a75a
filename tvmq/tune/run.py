"""`tvmq.tune`: from a model, or a bundle, to records of the fastest kernels for a target."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tvm

from tvmq import pipeline
from tvmq.deploy import bundle as bundles
from tvmq.deploy.build import runs_here
from tvmq.deploy.bundle import Bundle
from tvmq.errors import TuningError
from tvmq.files import scratch_folder
from tvmq.kernels.lower import lower
from tvmq.kernels.task import Task, module_of
from tvmq.measure.verify import realized_module
from tvmq.model import Model
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.target import Target, load_target
from tvmq.tune import records
from tvmq.tune import whole as whole_model
from tvmq.tune.budget import Budget, Spending, seconds_of
from tvmq.tune.candidate import Timing
from tvmq.tune.database import DEFAULT, FINAL, Log, Writer
from tvmq.tune.fleet import Fleet, boards
from tvmq.tune.interrupt import asked_to_stop
from tvmq.tune.processes import Builders
from tvmq.tune.progress import Summary
from tvmq.tune.runners import LocalRunner, Runner
from tvmq.tune.search import Candidates
from tvmq.tune.tasks import TuneTask, tasks_of
from tvmq.tune.tuner import Event, Tuner


def tune(
    model: Model | str | Path | Bundle,
    target: str | Path | Target = "host",
    recipe: Recipe | None = None,
    calibration: Iterable[Any] | CalibrationTable | None = None,
    *,
    budget: str | float | None = "10m",
    trials: int | None = None,
    stop_at: float = 0.01,
    logs: str | Path | None = None,
    device: str = "host",
    threads: int = 0,
    flush: bool = False,
    seed: int = 0,
    fresh: bool = False,
    whole: bool = True,
    event: Event = lambda _event: None,
    progress: Callable[[str, int], None] | None = None,
) -> Summary:
    """Measure kernels of `model` (a Model, a bundle or its path) for `target` until the budget or the hope is spent.

    budget: seconds, or text as "10m"; None for no limit of time. trials: the most candidates to measure; None for no
    limit. stop_at: the share of the model's time at which what is left to gain is not worth more. logs: the folder of
    the records, which `compile` takes with `logs=`; None means the user's own, which it takes by itself. threads: 0
    means the target's cores. device: "host", "rpc://HOST:PORT", or "tracker://HOST:PORT/KEY" for all boards of a key at
    once. flush: time each candidate with its weights out of the caches. fresh: learn from no other log, and build every
    candidate anew. whole: at the end also time the whole model, untuned and tuned, where this machine is the device;
    where it is slower tuned, the defaults stay. event: called with plain data as things happen. Ctrl-C ends it after
    the trial in flight.
    Raises TargetError, TuningError, DeviceError, CalibrationError, OutputError.
    """
    seconds = seconds_of(budget) if isinstance(budget, str) else budget
    allowed = Budget(seconds, trials, stop_at)
    spec = _with_threads(load_target(target), threads)
    runner = _runner(spec, device, flush)
    recipe = recipe or Recipe()
    realized = realized_of(model, spec, recipe, calibration, progress)
    tasks = tasks_in(realized, spec, recipe)
    folder = Path(logs) if logs is not None else records.user_folder() / spec.name
    with asked_to_stop() as stopped, Writer(folder, spec) as writer, scratch_folder() as scratch:
        # The clock starts when there is something to measure: importing a model is not tuning.
        spending = Spending(allowed)
        builder = Builders(spec, os.cpu_count() or 1, scratch if fresh else None)
        try:
            known = records.LogRecords(spec, []) if fresh else records.load(spec)
            known = dataclasses.replace(known, logs=[writer.log, *known.logs])
            others = others_of([*known.logs, *known.likes], {tuned.task for tuned in tasks}, spec)
            tuner = Tuner(
                tasks,
                spec,
                writer,
                builder,
                runner,
                spending,
                others=others,
                records=known,
                seed=seed,
                event=event,
                stopped=stopped,
            )
            summary = tuner.run()
            if whole and device == "host" and tuner.changed and not summary.interrupted:
                return _compared(tuner, summary, realized, recipe)
            return summary
        finally:
            builder.close()
            runner.close()


def _compared(tuner: Tuner, summary: Summary, realized: tvm.IRModule, recipe: Recipe) -> Summary:
    """The summary with the whole model's latency; the defaults stay where it is slower tuned."""
    known = records.LogRecords(tuner.target, [tuner.writer.log])
    before, after = whole_model.latencies(realized, tuner.target, recipe, [None, known])
    if after > before:
        tuner.revert()
        after = before
        reverted = tuner.summary(f"{summary.ended}; the whole model is slower tuned: defaults stay")
        summary = dataclasses.replace(reverted, seconds=summary.seconds)
    return dataclasses.replace(summary, untuned_model_ms=before * 1e3, tuned_model_ms=after * 1e3)


def realized_of(
    model: Model | str | Path | Bundle,
    target: Target,
    recipe: Recipe,
    calibration: Iterable[Any] | CalibrationTable | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> tvm.IRModule:
    """Exactly the module that `compile` would lower."""
    if isinstance(model, Model):
        return pipeline.realized_module(model, target, recipe, calibration, progress).module
    return _of_bundle(model if isinstance(model, Bundle) else bundles.read(model), target)


def tasks_in(realized: tvm.IRModule, target: Target, recipe: Recipe) -> list[TuneTask]:
    """The tasks of a realized module. Raises TuningError where there are none."""
    tasks = tasks_of(lower(realized, target, winograd=recipe.winograd, sparse=recipe.sparse).choices)
    if not tasks:
        raise TuningError("tuning", expected="convolutions or products with weights", seen="none in this model")
    return tasks


def _of_bundle(bundle: Bundle, target: Target) -> tvm.IRModule:
    family = bundle.manifest["target"]["derived"]["isa"]["activation_dtype"]
    if family != target.isa.activation_dtype:
        raise TuningError(
            bundle.where, expected=f"activations of {target.isa.activation_dtype} for {target.name}", seen=family
        )
    return realized_module(bundle)


def _with_threads(target: Target, threads: int) -> Target:
    return dataclasses.replace(target, cores=threads) if threads else target


def _runner(target: Target, device: str, flush: bool) -> Runner:
    timing = Timing(target.cores, flush=flush)
    if device != "host":
        return Fleet(boards(device, timing), timing.timeout_s)
    if not runs_here(target):
        raise TuningError(
            f"target {target.name}", expected="a device that runs its code", seen="this machine", hint="name a --device"
        )
    return LocalRunner(timing)


def others_of(logs: Sequence[Log], tasks: set[Task], target: Target) -> list[Candidates]:
    """What was measured for tasks that are none of `tasks`, for the cost model."""
    return list(_measured(logs, tasks, target))


def _measured(logs: Sequence[Log], tasks: set[Task], target: Target) -> Iterator[Candidates]:
    seen = set(tasks)
    for log in logs:
        for task, trials in log.by_task(target.cores).items():
            default = next((trial.best for trial in trials if trial.role == DEFAULT and trial.seconds), None)
            if task in seen or default is None:
                continue
            seen.add(task)
            (tuned,) = tasks_of(lower(module_of(task), target).choices)
            candidates = Candidates(tuned)
            for trial in trials:
                if trial.role != FINAL:
                    candidates.measured(trial.decision, trial.best / default)
            yield candidates
