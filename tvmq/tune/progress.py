"""What is known of each task while a model is tuned, and what the run came to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tvmq.kernels.decision import Decision
from tvmq.tune.budget import Outlook
from tvmq.tune.database import DEFAULT, FINAL, Trial
from tvmq.tune.search import Candidates
from tvmq.tune.tasks import TuneTask


@dataclass
class Progress:
    """One task on its way. default, best: seconds; trials: of this run and of earlier ones. expected: see `Outlook`."""

    tuned: TuneTask
    candidates: Candidates
    outlook: Outlook = field(default_factory=Outlook)
    seconds: dict[Decision, float] = field(default_factory=dict)
    default: float | None = None
    trials: int = 0
    verdict: Trial | None = None
    searched: bool = False  # in this run
    expected: float = 0.0

    @property
    def best(self) -> float | None:
        """The verdict's seconds, or the least so far; None before the default was timed."""
        if self.verdict is not None:
            return self.verdict.best
        return min(self.seconds.values(), default=self.default)

    @property
    def saved(self) -> float:
        """Seconds of an inference that the best so far saves."""
        return self.tuned.count * ((self.default or 0.0) - (self.best or 0.0))

    def take(self, trial: Trial) -> None:
        """Note a trial of this task."""
        if trial.role == FINAL:
            self.verdict = trial
            return
        self.trials += 1
        if trial.role == DEFAULT and trial.seconds:
            self.default = min(trial.best, self.default or trial.best)
        if trial.seconds:
            self.seconds[trial.decision] = min(trial.best, self.seconds.get(trial.decision, trial.best))
        if self.default is not None:
            self.candidates.measured(trial.decision, trial.best / self.default)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "task": str(self.tuned.task),
            "operators": list(self.tuned.names),
            "default_ms": None if self.default is None else self.default * 1e3,
            "best_ms": None if self.best is None else self.best * 1e3,
            "trials": self.trials,
            "expected_gain": self.expected,
            "decision": str(self.verdict.decision if self.verdict else self.tuned.default),
        }


def default_seconds(tasks: Iterable[Progress]) -> float:
    """Seconds of all tasks of an inference, untuned."""
    return sum(task.tuned.count * (task.default or 0.0) for task in tasks)


def best_seconds(tasks: Iterable[Progress]) -> float:
    """Seconds of all tasks of an inference, with the best so far."""
    return sum(task.tuned.count * (task.best or 0.0) for task in tasks)


@dataclass
class Summary:
    """What a run came to. default_ms, tuned_ms: of all tuned kernels of one inference.

    curve: (seconds, ms of an inference with the best so far) after each trial, once all defaults are known.
    failures: reason -> how many trials. ended: why the run ended. interrupted: by the user. untuned_model_ms,
    tuned_model_ms: the whole model, timed in turns; None where it was not, as where no kernel is another.
    """

    target: str
    tasks: list[dict[str, Any]]
    trials: int
    default_ms: float
    tuned_ms: float
    noise: float
    seconds: float
    ended: str
    interrupted: bool
    failures: dict[str, int]
    curve: list[tuple[float, float]]
    damage: list[str]
    untuned_model_ms: float | None = None
    tuned_model_ms: float | None = None
