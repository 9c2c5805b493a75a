"""The bench suite: the zoo's models on tvmq and its peers, same threads, repeats interleaved, medians and ratios."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import zoo
from tvmq.cpuinfo import host_features
from tvmq.deploy.build import runs_here
from tvmq.deploy.executor import Executor, load
from tvmq.detect import detect_host
from tvmq.errors import InputError, TargetError, nearest
from tvmq.files import scratch_folder
from tvmq.importer.load import import_model
from tvmq.isa import Bf16
from tvmq.measure.peers import Run, Subject, peers, samples
from tvmq.measure.per_op import measure_limits, profile
from tvmq.measure.suite_report import OURS, Row, Suite, compare
from tvmq.pipeline import compile_model
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision
from tvmq.target import Target, load_target

Array = npt.NDArray[Any]
Progress = Callable[[str], None]
MODELS = ("resnet18", "resnet50", "mobilenetv2", "minilm", "bert_base")
PRECISIONS = ("fp32", "bf16", "int8")
# Random inputs that calibrate: the models have random weights, so that more would tell nothing.
_CALIBRATION = 8
# Seconds between two runtimes: worker threads of the one before spin until they sleep.
_PAUSE = 0.05
# Not a setting of tvmq: what oneDNN reads, and so OpenVINO and PyTorch, which makes their figures others.
_ONEDNN_ISA = "ONEDNN_MAX_CPU_ISA"


def run(
    models: Sequence[str] = MODELS,
    precisions: Sequence[str] = PRECISIONS,
    *,
    target: str | Path | Target = "host",
    threads: int = 0,
    rounds: int = 15,
    with_peers: bool = True,
    per_op: bool = False,
    progress: Progress | None = None,
) -> Suite:
    """Run the suite. `threads`: 0 means all real cores. `target`: one whose code this machine can run.

    `per_op`: also time tvmq's kernels one by one, and measure what the machine can do.
    Raises InputError for an unknown model or precision, TargetError.
    """
    check_names(models, precisions)
    machine = detect_host()
    count = threads or machine.cores
    spec = runnable(target, count)
    report = progress or (lambda _text: None)
    if per_op:
        report("the machine's limits")
    limits = measure_limits(spec, count) if per_op else None
    suite = Suite(
        spec.name, count, rounds, machine.description, limits=limits, onednn_isa=os.environ.get(_ONEDNN_ISA, "")
    )
    for name in models:
        _Contest(name, precisions, spec, count, report, suite).run(rounds, with_peers)
    return suite


def runnable(target: str | Path | Target, threads: int) -> Target:
    """The target, with work divided among `threads`. Raises TargetError where this machine cannot run its code."""
    spec = load_target(target)
    if not runs_here(spec):
        lacks = ", ".join(spec.missing_features(host_features())) or f"code for {spec.triple}"
        hint = "-t host is what this machine has"
        raise TargetError(f"target {spec.name}", expected="one that this machine can run", seen=lacks, hint=hint)
    return replace(spec, cores=threads)


def check_names(models: Sequence[str], precisions: Sequence[str]) -> None:
    """Raise InputError for a model or a precision that there is not."""
    for name in models:
        zoo.builder(name)
    known = [precision.value for precision in Precision]
    for precision in precisions:
        if precision not in known:
            expected, hint = f"one of {', '.join(known)}", nearest(precision, known)
            raise InputError(f"precision {precision!r}", expected=expected, hint=hint)


@dataclass
class _Contest:
    """One model on everything that can run it."""

    name: str
    precisions: Sequence[str]
    target: Target
    threads: int
    report: Progress
    suite: Suite
    runners: dict[tuple[str, str], Run] = field(default_factory=dict)
    executors: dict[str, Executor] = field(default_factory=dict)  # of tvmq, by precision
    absent: list[Row] = field(default_factory=list)  # who cannot take part, and why

    def run(self, rounds: int, with_peers: bool) -> None:
        """Add all rows to the suite, tvmq's first, and the comparisons."""
        module, example = zoo.builder(self.name)()
        with scratch_folder() as folder:
            subject = Subject(self.name, module, example, samples(example, _CALIBRATION), self.threads, folder)
            for precision in self.precisions:
                self._ours(subject, precision)
            if with_peers:
                self._peers(subject)
            self.report(f"{self.name}: {rounds} rounds")
            times = interleave(self.runners, rounds)
        self.suite.rows.extend(
            Row(self.name, *key, float(np.median(values)), float(values.min()), float(values.max()))
            for key, values in times.items()
        )
        self.suite.rows.extend(self.absent)
        self.suite.comparisons.extend(compare(self.name, times, self.absent, self.precisions))
        if self.suite.limits is not None:
            for precision, executor in self.executors.items():
                self.report(f"{self.name}: kernels of {OURS} {precision}")
                self.suite.per_op.append(profile(self.name, precision, executor, self.suite.limits))

    def _ours(self, subject: Subject, precision: str) -> None:
        self.report(f"{self.name}: {OURS} {precision}")
        if precision == Precision.BF16.value and self.target.isa.bf16 is Bf16.NONE:
            note = f"{self.target.name} has no bfloat16 instructions"
            self.absent.append(Row(self.name, OURS, precision, note=note))
            return
        self.executors[precision] = compiled(subject, precision, self.target)
        self.runners[OURS, precision] = self.executors[precision].runner()

    def _peers(self, subject: Subject) -> None:
        for peer in peers():
            if peer.precision not in self.precisions or not peer.suits(subject):
                continue
            self.report(f"{self.name}: {peer.name} {peer.precision}")
            if why := peer.missing():
                self.absent.append(Row(self.name, peer.name, peer.precision, note=why))
            else:
                self.runners[peer.name, peer.precision] = peer.prepare(subject)


def compiled(subject: Subject, precision: str, target: Target) -> Executor:
    """The subject compiled by tvmq, loaded, with its example as inputs."""
    return load(bundle_of(subject, precision, target), threads=subject.threads)


def bundle_of(subject: Subject, precision: str, target: Target, *, untuned: bool = False) -> Path:
    """The subject compiled by tvmq, in its folder."""
    model = import_model(subject.module, subject.example, check=False, name=subject.name)
    path = subject.folder / f"{subject.name}-{precision}.tvmq"
    recipe = Recipe(precision=Precision(precision))
    data = subject.calibration if recipe.precision in (Precision.INT8, Precision.AUTO) else None
    compile_model(model, target, recipe, data, path, untuned=untuned)
    return path


def interleave(runners: dict[tuple[str, str], Run], rounds: int) -> dict[tuple[str, str], Array]:
    """Milliseconds of each runner, one figure a round: the mean over a burst of inferences after a warm-up."""
    bursts = {}
    for key, runner in runners.items():
        for _ in range(3):
            runner()
        bursts[key] = max(2, round(0.05 / _seconds(runner, 3)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runners}
    for _ in range(rounds):
        for key, runner in runners.items():
            time.sleep(_PAUSE)
            runner()
            times[key].append(_seconds(runner, bursts[key]) * 1e3)
    return {key: np.array(values) for key, values in times.items()}


def _seconds(runner: Run, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        runner()
    return (time.perf_counter() - start) / count
