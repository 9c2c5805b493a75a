"""The bench suite: the zoo's models on tvmq and its peers, same threads, repeats interleaved, medians and ratios."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.deploy.executor import load
from tvmq.errors import InputError, nearest
from tvmq.importer.load import import_model
from tvmq.measure.peers import Peer, Run, Subject, peers, samples
from tvmq.pipeline import compile_model
from tvmq.recipe import Precision, Recipe
from tvmq.target import load_target
from tvmq.zoo import encoders, vision

Array = npt.NDArray[Any]
MODELS: dict[str, Callable[[], Any]] = {
    "resnet18": vision.resnet18,
    "resnet50": vision.resnet50,
    "mobilenetv2": vision.mobilenetv2,
    "minilm": encoders.minilm,
    "bert_base": encoders.bert_base,
}
# Random inputs that calibrate: the models have random weights, so that more would tell nothing.
_CALIBRATION = 8
# Seconds between two runtimes: worker threads of the one before spin until they sleep.
_PAUSE = 0.05


@dataclass(frozen=True)
class Row:
    """One runtime on one model: median, smallest and largest milliseconds over the rounds, or why there are none.

    ratio: the fastest peer's median of the same precision over tvmq's, on tvmq's rows, with the spread of that ratio
    over the rounds.
    """

    model: str
    runtime: str
    precision: str
    median_ms: float | None
    min_ms: float | None
    max_ms: float | None
    note: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None


@dataclass(frozen=True)
class Suite:
    """All rows of a run, and what it ran on."""

    target: str
    threads: int
    rounds: int
    cpu: str
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table a model."""
        lines = [f"tvmq for {self.target}, {self.threads} threads, {self.rounds} interleaved rounds, {self.cpu}", ""]
        lines += [
            "| model | runtime | precision | median ms | min | max | best peer / tvmq |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            times = [f"{v:.2f}" if v is not None else "" for v in (row.median_ms, row.min_ms, row.max_ms)]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_low:.2f} to {row.ratio_high:.2f})"
            lines.append(
                f"| {row.model} | {row.runtime} | {row.precision} | {' | '.join(times)} | {ratio or row.note} |"
            )
        return "\n".join(lines) + "\n"


def run(
    models: Sequence[str] = tuple(MODELS),
    precisions: Sequence[str] = ("fp32", "int8"),
    *,
    target: str = "host",
    threads: int = 0,
    rounds: int = 15,
    with_peers: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Suite:
    """Run the suite. `threads`: 0 means all real cores. Raises InputError for an unknown model, TargetError."""
    for name in models:
        if name not in MODELS:
            raise InputError(f"model {name!r}", expected=f"one of {', '.join(MODELS)}", hint=nearest(name, MODELS))
    report = progress or (lambda _text: None)
    spec = load_target(target)
    count = threads or len(os.sched_getaffinity(0))
    rows: list[Row] = []
    for name in models:
        rows += _model(name, precisions, target, count, rounds, with_peers, report)
    return Suite(spec.name, count, rounds, _cpu(), rows)


def _model(
    name: str,
    precisions: Sequence[str],
    target: str,
    threads: int,
    rounds: int,
    with_peers: bool,
    report: Callable[[str], None],
) -> list[Row]:
    module, example = MODELS[name]()
    subject = Subject(name, module, example, samples(example, _CALIBRATION), threads)
    contestants: dict[tuple[str, str], Run] = {}
    rows: dict[tuple[str, str], Row] = {}
    with tempfile.TemporaryDirectory(prefix="tvmq-suite-") as folder:
        for precision in precisions:
            report(f"{name}: tvmq {precision}")
            contestants["tvmq", precision] = _tvmq(subject, precision, target, Path(folder))
        for peer in peers() if with_peers else ():
            key = (peer.name, peer.precision)
            if peer.encoders_only and name not in ("minilm", "bert_base"):
                continue
            report(f"{name}: {peer.name} {peer.precision}")
            note = _prepare(peer, subject, contestants)
            if note:
                rows[key] = Row(name, peer.name, peer.precision, None, None, None, note)
        report(f"{name}: {rounds} rounds")
        times = _interleave(contestants, rounds)
    for key, values in times.items():
        rows[key] = Row(name, *key, float(np.median(values)), float(values.min()), float(values.max()))
    return [_with_ratio(row, times) for row in rows.values()]


def _prepare(peer: Peer, subject: Subject, contestants: dict[tuple[str, str], Run]) -> str:
    """Add the peer's runner; returns why there is none."""
    if missing := peer.missing():
        return f"not installed: {missing} (pip install 'tvmq[peers]')"
    contestants[peer.name, peer.precision] = peer.prepare(subject)
    return ""


def _tvmq(subject: Subject, precision: str, target: str, folder: Path) -> Run:
    model = import_model(subject.module, subject.example, check=False, name=subject.name)
    path = folder / f"{subject.name}-{precision}.tvmq"
    recipe = Recipe(precision=Precision(precision))
    data = subject.calibration if precision != "fp32" else None
    compile_model(model, target, recipe, data, path)
    executor = load(path, threads=subject.threads)
    executor(*subject.example)
    return executor.runner()


def _interleave(contestants: dict[tuple[str, str], Run], rounds: int) -> dict[tuple[str, str], Array]:
    """Milliseconds of each contestant, one figure a round: the mean over a burst of inferences after a warm-up."""
    bursts = {}
    for key, runner in contestants.items():
        for _ in range(3):
            runner()
        bursts[key] = max(2, round(0.05 / _seconds(runner, 3)))
    times: dict[tuple[str, str], list[float]] = {key: [] for key in contestants}
    for _ in range(rounds):
        for key, runner in contestants.items():
            time.sleep(_PAUSE)
            runner()
            times[key].append(_seconds(runner, bursts[key]) * 1e3)
    return {key: np.array(values) for key, values in times.items()}


def _seconds(runner: Run, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        runner()
    return (time.perf_counter() - start) / count


def _with_ratio(row: Row, times: dict[tuple[str, str], Array]) -> Row:
    """tvmq's rows get the ratio to the fastest peer of their precision."""
    rivals = {key: values for key, values in times.items() if key[0] != "tvmq" and key[1] == row.precision}
    if row.runtime != "tvmq" or not rivals:
        return row
    best = min(rivals.values(), key=lambda values: float(np.median(values)))
    ours = times["tvmq", row.precision]
    each = best / ours
    ratio = float(np.median(best) / np.median(ours))
    low, high = (float(q) for q in np.percentile(each, (10, 90)))
    return Row(**{**asdict(row), "ratio": ratio, "ratio_low": low, "ratio_high": high})


def _cpu() -> str:
    text = Path("/proc/cpuinfo")
    if not text.exists():
        return "unknown CPU"
    names = [line.split(":", 1)[1].strip() for line in text.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown CPU"
