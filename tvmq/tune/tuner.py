"""The search over all tasks of a model: defaults, then batch after batch where most is to be gained, then verdicts.

A loop of our own around MetaSchedule's records: its task scheduler measures whole rounds without a look at the clock,
starts builder processes anew for each, and knows no end but a number of trials.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from tvmq.kernels.decision import Decision, Records, Space, decision_of, legal
from tvmq.kernels.task import Task
from tvmq.target import Target
from tvmq.tune.budget import Spending
from tvmq.tune.database import DEFAULT, FINAL, SEARCHED, Log, Trial
from tvmq.tune.processes import Built
from tvmq.tune.progress import Progress, Summary, best_seconds, default_seconds
from tvmq.tune.runners import Measured, Runner
from tvmq.tune.search import Candidates, CostModel, promise, propose
from tvmq.tune.tasks import TuneTask

Event = Callable[[dict[str, Any]], None]
# Candidates of a batch: as many as the model is asked for at once.
BATCH = 8
# Verdicts of other sizes that are tried first.
_SEEDS = 2
# Candidates that are compared with the default at the end, and how often in turns.
_FINALISTS, _ROUNDS = 3, 5
# How often one candidate is timed to see how far its figures scatter; and the least scatter that is believed.
_SAMPLES, _LEAST_NOISE = 6, 0.005
# Seconds that comparing the candidates of a task takes, and the most of a budget that is kept for it.
_COMPARING, _RESERVED = 1.0, 0.2


def scatter(figures: Sequence[float]) -> float:
    """How far the least of some figures is to be believed: the next one's distance from it, as a share of it.

    Least figures are compared, since what disturbs a machine only ever adds to them.
    """
    least, *others = sorted(figures)
    return max(_LEAST_NOISE, others[0] / least - 1 if others else 0.0)


class Builder(Protocol):
    """Builds candidates: see `processes.Builders`."""

    def build(self, task: Task, decisions: Sequence[Decision]) -> list[Built]:
        """Every candidate, in order."""


class TrialWriter(Protocol):
    """Keeps trials: see `database.Writer`."""

    @property
    def log(self) -> Log:
        """What is known, with every trial that was added."""

    def add(self, trial: Trial, spaces: Sequence[Space]) -> None:
        """Keep a trial."""


class Tuner:
    """One run. `stopped` is asked between trials; `event` is told what happens.

    From other logs: `others`, what the cost model learns from, and `records`, whose verdicts are tried first.
    """

    def __init__(
        self,
        tasks: Sequence[TuneTask],
        target: Target,
        writer: TrialWriter,
        builder: Builder,
        runner: Runner,
        spending: Spending,
        *,
        others: Sequence[Candidates] = (),
        records: Records | None = None,
        seed: int = 0,
        event: Event = lambda _event: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.target, self.writer, self.builder, self.runner = target, writer, builder, runner
        self.spending, self.event, self.stopped = spending, event, stopped
        self.records = records
        self.others, self.model, self.rng = list(others), CostModel(seed), np.random.default_rng(seed)
        self.tasks = [Progress(tuned, Candidates(tuned)) for tuned in tasks]
        self.noise = _LEAST_NOISE
        self.failures: Counter[str] = Counter()
        self.curve: list[tuple[float, float]] = []

    def run(self) -> Summary:
        """Tune until there is nothing to gain, the budget is spent, or the user stops."""
        self._recall(self.writer.log)
        ended = self._defaults() or self._search()
        self._verdicts()
        return self.summary(ended)

    # --- what is known already ---

    def _recall(self, log: Log) -> None:
        """Take up what earlier runs measured."""
        known = log.by_task(self.target.cores)
        for task in self.tasks:
            for trial in known.get(task.tuned.task, ()):
                task.take(trial)
            searched = list(task.candidates.ratios.values())
            best = 1.0
            for start in range(0, len(searched), BATCH):
                after = min(best, *searched[start : start + BATCH])
                task.outlook.batch(best, after, self.noise)
                best = after
        self._learn()

    # --- defaults and noise ---

    def _defaults(self) -> str:
        """Time every default that is not known yet, and how far the figures scatter; why to end, or ""."""
        waiting = [task for task in self.tasks if task.default is None]
        self.event({"event": "start", "tasks": len(self.tasks), "known": len(self.tasks) - len(waiting)})
        for task in waiting:
            if self.spending.spent or self.stopped():
                return self._why()
            self._measure_default(task)
        timed = [task for task in self.tasks if task.default is not None]
        if not timed:
            return "no default could be timed"
        self._estimate_noise(max(timed, key=lambda task: task.tuned.count * (task.default or 0.0)))
        comparing = _COMPARING * len(timed)
        if self.spending.budget.seconds is not None:
            self.spending.reserve = min(comparing, _RESERVED * self.spending.budget.seconds)
        return ""

    def _estimate_noise(self, task: Progress) -> None:
        built = self.builder.build(task.tuned.task, [task.tuned.default])[0]
        if built.folder is None:
            return
        results = [result for _, result in self.runner.time([built.folder] * _SAMPLES)]
        figures = [min(result.seconds) for result in results if result.seconds]
        if figures:
            self.noise = scatter(figures)
        self.event({"event": "noise", "noise": self.noise})

    # --- the search ---

    def _search(self) -> str:
        """Batch after batch; returns why it ended."""
        while not (self.spending.spent or self.stopped()):
            gain, task = self._next()
            if gain < self.spending.budget.stop_at or task is None:
                return f"{gain:.1%} expected left: stopping"
            before = task.candidates.best
            seeds = self._seeds(task)
            left = self.spending.left(BATCH)
            decisions = [*seeds, *propose(task.candidates, self.model, left, self.rng, seeds)]
            if not task.outlook.batches:
                self._measure_default(task)
                left = self.spending.left(left)
            self._measure(task, decisions[:left], SEARCHED)
            task.searched = True
            task.outlook.batch(before, task.candidates.best, self.noise)
            self._learn()
            self.event({"event": "batch", "elapsed": self.spending.elapsed, **task.to_dict()})
        return self._why()

    def _seeds(self, task: Progress) -> list[Decision]:
        """What was the fastest at other sizes, or elsewhere, for the first batch of a task."""
        if task.outlook.batches or self.records is None:
            return []
        found = []
        for decision, source in self.records.decisions(task.tuned.task):
            here = None if decision is None else legal(decision, source, task.tuned.spaces)
            known = here is not None and task.candidates.is_measured(decision_of(*here))
            if here is not None and not known and decision_of(*here) not in found:
                found.append(decision_of(*here))
        return found[:_SEEDS]

    def _next(self) -> tuple[float, Progress | None]:
        """What is expected of all tasks together, as a share of the model's time, and the task that promises most."""
        timed = [task for task in self.tasks if task.default is not None]
        total = sum(task.tuned.count * (task.best or 0.0) for task in timed)
        gains = []
        for task in timed:
            task.expected = task.outlook.expected(promise(task.candidates, self.model))
            if len(task.candidates.ratios) == len(task.candidates.places):
                task.expected = 0.0
            if task.expected >= self.spending.budget.stop_at:
                gains.append((task.tuned.count * (task.best or 0.0) / total * task.expected, task))
        if not gains:
            return 0.0, None
        return sum(gain for gain, _ in gains), max(gains, key=lambda item: item[0])[1]

    def _measure_default(self, task: Progress) -> None:
        """Time a task's default: first of all, and beside its first candidates, should that have been a bad moment."""
        self._measure(task, [task.tuned.default], DEFAULT)

    def _measure(self, task: Progress, decisions: Sequence[Decision], role: str) -> None:
        """Build and time candidates; each is in the log before the next is begun."""
        built = self.builder.build(task.tuned.task, decisions)
        ready = [(d, b.folder) for d, b in zip(decisions, built, strict=True) if b.folder is not None]
        for decision, failed in zip(decisions, built, strict=True):
            if failed.folder is None:
                self._note(task, decision, role, Measured((), failed.error))
        if self.stopped():
            return
        for index, result in self._timed([folder for _, folder in ready], lambda: self.spending.spent):
            self._note(task, ready[index][0], role, result)

    def _timed(self, folders: Sequence[Any], spent: Callable[[], bool]) -> Iterator[tuple[int, Measured]]:
        """The results, until the user stops or time is `spent`: the trial in flight is the last."""
        results = self.runner.time(folders)
        for item in results:
            yield item
            if self.stopped() or spent():
                results.close()  # type: ignore[attr-defined]
                return

    def _note(self, task: Progress, decision: Decision, role: str, result: Measured) -> None:
        trial = Trial(task.tuned.task, decision, role, result.seconds, self.target.cores)
        self.writer.add(trial, task.tuned.spaces)
        self.spending.trials += 1
        task.take(trial)
        if result.error:
            self.failures[result.error] += 1
        self._mark()
        self.event(
            {
                "event": "trial",
                "elapsed": self.spending.elapsed,
                "task": str(task.tuned.task),
                "decision": str(decision),
                "ms": trial.best * 1e3 if trial.seconds else None,
                "error": result.error,
                "place": result.place,
            }
        )

    def _mark(self) -> None:
        """Note how fast the model is by now, once every task was timed."""
        if all(task.best is not None for task in self.tasks):
            self.curve.append((self.spending.elapsed, best_seconds(self.tasks) * 1e3))

    def _learn(self) -> None:
        self.model.learn([*self.others, *(task.candidates for task in self.tasks)])

    # --- verdicts ---

    def _verdicts(self) -> None:
        """Compare the best candidates of each task with its default, in turns, which stays unless it is beaten clearly.

        Those that gained most come first: what the time does not allow is left to `database.verdict`.
        """
        for task in sorted(self.tasks, key=lambda task: task.saved, reverse=True):
            if task.searched and not self.stopped() and not self.spending.over:
                self._compare(task)
                self.event({"event": "verdict", "elapsed": self.spending.elapsed, **task.to_dict()})
        self._mark()

    def _compare(self, task: Progress) -> None:
        default = task.tuned.default
        order = sorted(task.seconds, key=lambda decision: task.seconds[decision])
        finalists = [default, *[decision for decision in order if decision != default][:_FINALISTS]]
        folders = [built.folder for built in self.builder.build(task.tuned.task, finalists)]
        ready = [(d, folder) for d, folder in zip(finalists, folders, strict=True) if folder is not None]
        times: dict[Decision, list[float]] = {decision: [] for decision, _ in ready}
        for _ in range(_ROUNDS):
            for index, result in self._timed([folder for _, folder in ready], lambda: False):
                times[ready[index][0]] += [min(result.seconds)] if result.seconds else []
        if self.stopped() or not times.get(default):
            return
        winner = min((d for d in times if times[d]), key=lambda d: min(times[d]))
        if min(times[winner]) >= min(times[default]) * (1 - max(scatter(times[default]), scatter(times[winner]))):
            winner = default
        task.default = min(times[default])
        task.verdict = Trial(task.tuned.task, winner, FINAL, tuple(times[winner]), self.target.cores)
        self.writer.add(task.verdict, task.tuned.spaces)

    @property
    def changed(self) -> list[Progress]:
        """The tasks that are to have another kernel than the default."""
        return [task for task in self.tasks if task.verdict and task.verdict.decision != task.tuned.default]

    def revert(self) -> None:
        """Let the defaults stay: the model as a whole was no faster."""
        for task in self.changed:
            seconds = (task.default or 0.0,)
            task.verdict = Trial(task.tuned.task, task.tuned.default, FINAL, seconds, self.target.cores)
            self.writer.add(task.verdict, task.tuned.spaces)

    # --- results ---

    def _why(self) -> str:
        return "interrupted" if self.stopped() else "the budget is spent"

    def summary(self, ended: str) -> Summary:
        """What it came to."""
        interrupted = self.stopped()
        return Summary(
            self.target.name,
            [task.to_dict() for task in self.tasks],
            self.spending.trials,
            default_seconds(self.tasks) * 1e3,
            best_seconds(self.tasks) * 1e3,
            self.noise,
            self.spending.elapsed,
            "interrupted" if interrupted else ended,
            interrupted,
            dict(self.failures),
            self.curve,
            list(self.writer.log.damage),
        )
