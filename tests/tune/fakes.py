"""A device with known times: candidates are not built, and each takes what a formula says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from harness import conv, floats, integers, module_of, weights

from tvmq.kernels.decision import Decision
from tvmq.kernels.lower import lower
from tvmq.kernels.task import Task
from tvmq.target import Target
from tvmq.tune.processes import Built
from tvmq.tune.runners import Measured
from tvmq.tune.tasks import TuneTask, tasks_of

Seconds = Callable[[Task, Decision], float]


def two_tasks(target: Target) -> list[TuneTask]:
    """A convolution that occurs twice, and a smaller one."""
    common, small = floats((1, 16, 16, 32)), integers((1, 6, 6, 16), "uint8")
    cases = [
        conv("a", common, floats((32, 3, 3, 32), 1), padding=(1, 1, 1, 1)),
        conv("b", common, floats((32, 3, 3, 32), 2), padding=(1, 1, 1, 1)),
        conv("c", small, weights((32, 1, 1, 16)), zero_point=3),
    ]
    return tasks_of(lower(module_of(cases), target).choices)


def bowl(task: Task, decision: Decision) -> float:
    """Milliseconds with one best point: tiles of 4 by 3 are the fastest, by far."""
    knobs = dict(decision.knobs)
    miss = abs(math.log2(knobs.get("columns", 9) / 4)) + abs(math.log2(knobs.get("vectors", 9) / 3))
    return (1 + miss) * math.prod(task.attributes["out_shape"]) * 1e-7


class FakeBuilder:
    """Names each candidate; decisions in `broken` cannot be built."""

    def __init__(self, broken: Callable[[Decision], bool] = lambda _decision: False) -> None:
        self.broken = broken
        self.known: dict[Path, tuple[Task, Decision]] = {}

    def build(self, task: Task, decisions: Sequence[Decision]) -> list[Built]:
        return [self._one(task, decision) for decision in decisions]

    def _one(self, task: Task, decision: Decision) -> Built:
        if self.broken(decision):
            return Built(None, "LLVM: no")
        folder = Path(f"{len(self.known)}")
        self.known[folder] = (task, decision)
        return Built(folder)


class FakeRunner:
    """Takes the times of a formula; `asked` counts them."""

    width, remote = 1, False

    def __init__(self, builder: FakeBuilder, seconds: Seconds = bowl) -> None:
        self.builder, self.seconds, self.asked = builder, seconds, 0

    def time(self, folders: Sequence[Path]) -> Iterator[tuple[int, Measured]]:
        for index, folder in enumerate(folders):
            self.asked += 1
            seconds = self.seconds(*self.builder.known[folder])
            yield index, Measured((seconds,), "", "fake") if math.isfinite(seconds) else Measured((), "crash", "fake")

    def close(self) -> None:
        pass
