"""`tvmq.tune`: from a model, or a bundle, to records of the fastest kernels for a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm

from tvmq import pipeline
from tvmq.deploy import bundle as bundles
from tvmq.deploy.bundle import Bundle
from tvmq.dynamic import Dynamic
from tvmq.errors import TuningError
from tvmq.kernels.lower import lower
from tvmq.kernels.lowering import Lowered
from tvmq.measure.verify import realized_module
from tvmq.model import Model
from tvmq.quantize.calibration import for_all_sizes
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.target import Target, load_target
from tvmq.tune import records
from tvmq.tune import whole as whole_model
from tvmq.tune.budget import Budget, seconds_of
from tvmq.tune.cluster import spread
from tvmq.tune.database import Writer
from tvmq.tune.equipment import Request, runner_of, searching
from tvmq.tune.interrupt import asked_to_stop
from tvmq.tune.progress import Summary
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
    cluster: str | None = None,
    devices: Sequence[str] = (),
    threads: int = 0,
    flush: bool = False,
    seed: int = 0,
    fresh: bool = False,
    event: Event = lambda _event: None,
    progress: Callable[[str, int], None] | None = None,
) -> Summary:
    """Measure kernels of `model` (a Model, a bundle or its path) for `target` until the budget or the hope is spent.

    budget: seconds, or text as "10m"; None for no limit of time. trials: the most candidates to measure; None for no
    limit. stop_at: the share of the model's time at which what is left to gain is not worth more. logs: the folder of
    the records, which `compile` takes with `logs=`; None means the user's own, which it takes by itself. threads: 0
    means the target's cores. device: "host", one board's, or "tracker://HOST:PORT/KEY" for all boards of a key at
    once. cluster: "auto", "local" or HOST:PORT of a Ray cluster (extra `cluster`), over whose workers the tasks are
    spread: one on each machine, measuring itself, or one for each of `devices`. flush: time each candidate with its
    weights out of all caches, where they otherwise are as far as in the whole model. fresh: learn from no other log,
    and build every candidate anew. event: called with plain data as things happen. At the end the whole model is timed
    too, untuned and tuned, where this machine is the device; where it is slower tuned, the defaults stay. Ctrl-C ends
    it after the trial in flight, or without the whole model's time.
    The tasks of a model of several sizes are those of each, and its times sums over one inference of each size.
    Raises TargetError, TuningError, DeviceError, CalibrationError, RecipeError, OutputError.
    """
    seconds = seconds_of(budget) if isinstance(budget, str) else budget
    spec = _with_threads(load_target(target), threads)
    request = Request(spec, Budget(seconds, trials, stop_at), device, flush, seed, fresh)
    if cluster is None and devices:
        raise TuningError("devices", expected="a cluster whose workers measure on them", seen="none")
    if cluster is not None and device != "host":
        raise TuningError(f"device {device}", expected="the devices of a cluster's workers in `devices`")
    # Asked for first: a device that does not answer is known before the work of importing.
    runner = None if cluster is not None else runner_of(request)
    recipe = recipe or Recipe()
    realized = realized_of(model, spec, recipe, calibration, progress)
    programs = {
        size: lower(one, spec, winograd=recipe.winograd, sparse=recipe.sparse) for size, one in realized.items()
    }
    tasks = tasks_in(programs)
    # Sizes share their weights.
    weights = max(sum(value.nbytes for value in one.parameters.values()) for one in programs.values())
    request = dataclasses.replace(request, model_bytes=weights)
    folder = Path(logs) if logs is not None else records.user_folder() / spec.name
    with asked_to_stop() as stopped, Writer(folder, spec) as writer:
        if cluster is not None:
            return spread(tasks, request, cluster, devices, writer, event, stopped)
        assert runner is not None
        with searching(tasks, request, writer, runner, event, stopped) as tuner:
            summary = tuner.run()
            if device == "host" and tuner.changed and not summary.interrupted:
                return _compared(tuner, summary, list(realized.values()), recipe)
            return summary


def _compared(tuner: Tuner, summary: Summary, realized: Sequence[tvm.IRModule], recipe: Recipe) -> Summary:
    """The summary with the whole model's latency, of all sizes together; the defaults stay where it is slower tuned.

    Where the user stops it, kernels that won alone are taken, and the next run makes the comparison.
    """
    known = records.LogRecords(tuner.target, [tuner.writer.log])
    before = after = 0.0
    for one in realized:
        found = whole_model.latencies(one, tuner.target, recipe, [None, known], tuner.stopped)
        if found is None:
            ended = "interrupted before the whole model was timed"
            return dataclasses.replace(summary, ended=ended, interrupted=True)
        before, after = before + found[0], after + found[1]
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
) -> dict[int, tvm.IRModule]:
    """Size -> exactly the module that `compile` would lower; the size of a model without sizes is 0."""
    if isinstance(model, Model):
        report = progress or (lambda _stage, _n: None)
        calibration = for_all_sizes(model, recipe, calibration, report)
        made = (pipeline.realized_module(one, target, recipe, calibration, report) for one in (model, *model.larger))
        return dict(zip(_sizes(model.dynamic), (one.module for one in made), strict=True))
    bundle = model if isinstance(model, Bundle) else bundles.read(model)
    return dict(zip(_sizes(bundle.dynamic), (_of_bundle(one, target) for one in bundle.programs()), strict=True))


def _sizes(dynamic: Dynamic | None) -> tuple[int, ...]:
    return (0,) if dynamic is None else dynamic.sizes


def tasks_in(programs: Mapping[int, Lowered]) -> list[TuneTask]:
    """The tasks of a model, lowered at each of its sizes, whose operators are then named NAME at SIZE.

    Raises TuningError where there are none.
    """
    choices = {
        f"{name} at {size}" if size else name: choice
        for size, lowered in programs.items()
        for name, choice in lowered.choices.items()
    }
    tasks = tasks_of(choices)
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
