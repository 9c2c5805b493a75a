"""tvmq's tuner beside stock MetaSchedule: the same models, seconds and threads, both from no records.

Both tune the graph that tvmq lowers: channels-last, batch norms folded. For int8 that is the graph with its quantize
and dequantize operators, which stock computes in float32: it has no integer convolutions for them. Each clock starts
when a search does. At the end the whole models take turns: untuned, tuned by tvmq, tuned by stock.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmq import pipeline, zoo
from tvmq.deploy.address import reason
from tvmq.deploy.executor import load
from tvmq.detect import detect_host
from tvmq.errors import CheckFailed
from tvmq.files import scratch_folder
from tvmq.importer.load import import_model
from tvmq.measure import stock
from tvmq.measure.peers import Run, samples
from tvmq.measure.report import figure, table
from tvmq.measure.suite import check_names, interleave, runnable
from tvmq.model import Model
from tvmq.pipeline import compile_model
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision
from tvmq.target import Target
from tvmq.tune import database
from tvmq.tune.logs import merge
from tvmq.tune.run import tune

MODELS, PRECISIONS = ("resnet18",), ("fp32", "int8")
Curve = list[tuple[float, float]]
# Random inputs that calibrate: the models have random weights, so that more would tell nothing.
_CALIBRATION = 8
# The share of a result whose time is told.
_MOST = 0.95


@dataclass(frozen=True)
class Side:
    """One tuner. untuned_ms and ms: median latency of the whole model. curve: (seconds, ms of an inference) so far.

    to_most_s: seconds until it was at 95 % of the speed that it ended with; to_gain_s: until it had 95 % of what it
    gained over the first figure of its curve. seconds: spent on searching. None, and a note, where it did not get so
    far.
    """

    untuned_ms: float | None = None
    ms: float | None = None
    trials: int = 0
    seconds: float = 0.0
    curve: Curve = field(default_factory=list)
    to_most_s: float | None = None
    to_gain_s: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Contest:
    """One model in one precision, tuned by both. logs: the folder of tvmq's records."""

    model: str
    precision: str
    tvmq: Side
    stock: Side
    logs: str = ""


@dataclass(frozen=True)
class TuningBench:
    """All contests, and what they ran on."""

    processor: str
    target: str
    threads: int
    budget_s: float
    rounds: int
    rows: list[Contest] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """One row a model and precision."""
        head = (
            f"{self.budget_s:g} s for each tuner, from no records, on {self.threads} threads; tvmq for {self.target}; "
            f"latency of whole models in ms, medians of {self.rounds} interleaved rounds; {self.processor}\n"
        )
        columns = (
            "model",
            "precision",
            "tvmq untuned",
            "tuned",
            "trials",
            "s to 95 % of its speed, of its gain",
            "stock tuned",
            "trials",
            "s to 95 % of its speed, of its gain",
            "stock / tvmq",
            "note",
        )
        return f"{head}\n{table(columns, map(_cells, self.rows))}"


def _cells(row: Contest) -> tuple[object, ...]:
    ratio = row.stock.ms / row.tvmq.ms if row.stock.ms and row.tvmq.ms else None
    sides = []
    for side in (row.tvmq, row.stock):
        times = ", ".join(figure(value, 0) for value in (side.to_most_s, side.to_gain_s) if value is not None)
        sides.append((figure(side.ms), side.trials, times))
    notes = "; ".join(filter(None, (row.tvmq.note, row.stock.note)))
    return (row.model, row.precision, figure(row.tvmq.untuned_ms), *sides[0], *sides[1], figure(ratio, 1), notes)


def run(
    models: Sequence[str] = MODELS,
    precisions: Sequence[str] = PRECISIONS,
    *,
    target: str | Path | Target = "host",
    threads: int = 0,
    seconds: float = 600.0,
    rounds: int = 10,
    logs: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> TuningBench:
    """Tune each model in each precision with both tuners, `seconds` each.

    logs: where tvmq's records are kept, in a folder a model and precision, "TARGET-MODEL-PRECISION", beside those that
    it holds already; None means nowhere. Where stock cannot tune, its side says why. Raises InputError for an unknown
    model or precision, TargetError, TuningError where such a folder is of another target.
    """
    check_names(models, precisions)
    host = detect_host()
    spec = runnable(target, threads or host.cores)
    found = TuningBench(host.description, spec.name, spec.cores, seconds, rounds)
    folders = {pair: logs and logs / "-".join((spec.name, *pair)) for pair in itertools.product(models, precisions)}
    for there in filter(None, folders.values()):
        # A folder of another machine is refused before the work.
        database.read(there, spec)
    for (name, precision), kept in folders.items():
        with scratch_folder() as folder:
            match = _Match(name, Precision(precision), spec, seconds, folder, kept, progress or (lambda _text: None))
            found.rows.append(match.run(rounds))
    return found


class _Match:
    """One model in one precision."""

    def __init__(
        self,
        name: str,
        precision: Precision,
        target: Target,
        seconds: float,
        folder: Path,
        kept: Path | None,
        progress: Callable[[str], None],
    ) -> None:
        module, example = zoo.builder(name)()
        self.name, self.precision, self.target, self.seconds = name, precision, target, seconds
        self.folder, self.kept = folder, kept
        self.model: Model = import_model(module, example, check=False, name=name)
        self.recipe = Recipe(precision=precision)
        self.data = samples(example, _CALIBRATION) if precision in (Precision.INT8, Precision.AUTO) else None
        self._progress = progress

    def run(self, rounds: int) -> Contest:
        """Tune with both, then time everything in turns."""
        runners: dict[tuple[str, str], Run] = {}
        ours = self._tvmq(runners)
        theirs = self._stock(runners)
        self._show(f"{rounds} rounds")
        times = {who: float(np.median(values)) for (who, _), values in interleave(runners, rounds).items()}
        ours = _anchored(ours, times["untuned"], times["tvmq"])
        theirs = _with_latency(theirs, None, times.get("stock"))
        return Contest(self.name, self.precision.value, ours, theirs, str(self.kept or ""))

    def _tvmq(self, runners: dict[tuple[str, str], Run]) -> Side:
        runners["untuned", ""] = self._compiled(None)
        self._show("tvmq tunes")
        logs = self.folder / "logs"
        summary = tune(
            self.model,
            self.target,
            self.recipe,
            self.data,
            budget=self.seconds,
            logs=logs,
            fresh=True,
        )
        if self.kept is not None:
            merge([database.read(logs)], self.kept)
        runners["tvmq", ""] = self._compiled(logs)
        return Side(trials=summary.trials, seconds=summary.seconds, curve=summary.curve)

    def _compiled(self, logs: Path | None) -> Run:
        path = self.folder / f"{'untuned' if logs is None else 'tuned'}.tvmq"
        compile_model(self.model, self.target, self.recipe, self.data, path, logs=logs, untuned=logs is None)
        return load(path, threads=self.target.cores).runner()

    def _stock(self, runners: dict[tuple[str, str], Run]) -> Side:
        if why := stock.missing():
            return Side(note=f"stock: {why}")
        self._show("stock tunes")
        module = pipeline.quantize(self.model, self.recipe, self.data).qdq
        folder = self.folder / "stock"
        folder.mkdir()
        try:
            found = stock.tune(stock.prepared(module, self.target), self.target, self.seconds, folder)
        except CheckFailed as error:
            # What tvmq came to in its time is told all the same.
            return Side(note=str(error))
        side = Side(trials=found.trials, seconds=self.seconds, curve=found.curve)
        try:
            runners["stock", ""] = self._built(found.module)
        # LLVM, a pass, a schedule that it cannot apply: each of TVM's parts has its own.
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            return replace(side, note=f"stock: what it found cannot be built: {reason(error)}")
        note = f"stock: {found.untouched} of {found.tasks} tasks without a trial" if found.untouched else ""
        return replace(side, note=note)

    def _built(self, module: tvm.IRModule) -> Run:
        with self.target.tvm_target():
            library = tvm.compile(module, target=self.target.tvm_target())
        machine = relax.VirtualMachine(library, tvm.cpu())
        inputs = [tvm.runtime.tensor(np.ascontiguousarray(x)) for x in self.model.example]
        return lambda: machine["main"](*inputs)

    def _show(self, what: str) -> None:
        self._progress(f"{self.name} {self.precision.value}: {what}")


def _anchored(side: Side, untuned_ms: float, ms: float) -> Side:
    """tvmq's side; its curve, of the kernels that it tunes, is made one of the whole model by what those leave out."""
    rest = untuned_ms - side.curve[0][1] if side.curve else 0.0
    curve = [(0.0, untuned_ms), *((elapsed, value + rest) for elapsed, value in side.curve)]
    return _with_latency(Side(trials=side.trials, seconds=side.seconds, curve=curve, note=side.note), untuned_ms, ms)


def _with_latency(side: Side, untuned_ms: float | None, ms: float | None) -> Side:
    most, gain = times_of(side.curve)
    return Side(untuned_ms, ms, side.trials, side.seconds, side.curve, most, gain, side.note)


def times_of(curve: Curve) -> tuple[float | None, float | None]:
    """Seconds until a curve is at 95 % of the speed that it ends with, and until it has 95 % of what it gains."""
    if not curve:
        return None, None
    first, last = curve[0][1], curve[-1][1]

    def until(limit: float) -> float:
        return next(elapsed for elapsed, ms in curve if ms <= limit)

    return until(last / _MOST), until(max(last, first - _MOST * (first - last)))
