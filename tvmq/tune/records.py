"""What compiling takes from tuning logs: the verdict on each task, and on tasks that differ in size only.

Logs are asked in order: the user's, then the shipped one of the target, then those of a like CPU: one whose kernels are
the same, having the same vectors, registers, fused multiply-add and dot products of integers; caches and clocks may
differ. A verdict found on as many threads as the target has decides; others are near matches, as are those of tasks of
another size: their register tile is taken where it is legal, and the rest is decided analytically.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tvmq.errors import TuningError
from tvmq.files import data_folder
from tvmq.kernels.decision import LIKE, NEAR, TUNED, Decision
from tvmq.kernels.task import Task
from tvmq.target import Target, load_target, target_names
from tvmq.tune import database
from tvmq.tune.database import DEFAULT, Log, Trial, verdict
from tvmq.tune.lines import RECORDS

SHIPPED = "tuning_logs"


def user_folder() -> Path:
    """Where a user's own logs are: a folder a target below it."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "tvmq" / "tuning_logs"


@dataclass
class LogRecords:
    """The verdicts of some logs, as they are when they are asked for; `decision.Records` for lowering.

    likes: the logs of like CPUs. notes: logs that could not be used, and why.
    """

    target: Target
    logs: Sequence[Log]
    notes: list[str] = field(default_factory=list)
    likes: Sequence[Log] = ()

    def decisions(self, task: Task) -> Iterator[tuple[Decision, str]]:
        """See `decision.Records`."""
        yield from self._exact(task)
        yield from ((decision, NEAR) for decision in self._near(task))

    def unused(self) -> list[str]:
        """What could not be used, and why: whole logs, and damaged lines of the tasks that were asked for."""
        return [*self.notes, *(note for log in (*self.logs, *self.likes) for note in log.lines.damage)]

    def _exact(self, task: Task) -> Iterator[tuple[Decision, str]]:
        """The verdict of the first log that has one on as many threads."""
        for logs, source in ((self.logs, TUNED), (self.likes, LIKE)):
            for log in logs:
                found = self._here(log.of(task))
                if found is not None:
                    yield found.decision, source
                    return

    def _near(self, task: Task) -> list[Decision]:
        """What was found for other sizes or numbers of threads, the nearest size first."""
        found = []
        for log, other in self._families.get(task.family(), ()):
            trials = log.of(other)
            decided = self._here(trials) or verdict(trials)
            # That nothing beat the default there says nothing of another size, where the default is another.
            if decided is not None and decided.role != DEFAULT:
                found.append((_distance(other, task), decided.decision))
        return [decision for _, decision in sorted(found, key=lambda item: item[0])]

    def _here(self, trials: Iterable[Trial]) -> Trial | None:
        """The verdict of those on as many threads as the target has."""
        return verdict(trial for trial in trials if trial.cores == self.target.cores)

    @cached_property
    def _families(self) -> dict[str, list[tuple[Log, Task]]]:
        found: dict[str, list[tuple[Log, Task]]] = {}
        for log in (*self.logs, *self.likes):
            for task in log.tasks():
                found.setdefault(task.family(), []).append((log, task))
        return found


def _distance(a: Task, b: Task) -> float:
    """How far apart the sizes of two tasks are."""
    sizes = [math.prod(task.attributes["out_shape"]) for task in (a, b)]
    return abs(math.log(sizes[0] / sizes[1]))


def load(target: Target, folder: str | Path | None = None) -> LogRecords:
    """The records for `target` in `folder`, or where there is none given: the user's and the shipped ones.

    Raises TuningError where `folder` holds none, or those of another target.
    """
    if folder is not None:
        path = Path(folder)
        if database.read_identity(path) is None:
            raise TuningError(f"tuning log {path}", expected="the files that tvmq tune writes", seen="none")
        return LogRecords(target, [database.read(path, target)])
    found = LogRecords(target, [])
    for path in (user_folder() / target.name, data_folder(SHIPPED) / target.name):
        try:
            found.logs = [*found.logs, database.read(path, target)]
        except TuningError as error:
            found.notes.append(str(error))
    likes = [database.read(data_folder(SHIPPED) / like.name, like) for like in _like(target)]
    return LogRecords(target, found.logs, found.notes, likes)


def _like(target: Target) -> list[Target]:
    """Other shipped targets with logs whose kernels are the same: vectors, registers and dot products are equal."""
    names = [n for n in target_names() if n != target.name and (data_folder(SHIPPED) / n / RECORDS).is_file()]
    return [like for like in map(load_target, names) if _kernels(like) == _kernels(target)]


def _kernels(target: Target) -> tuple[object, ...]:
    isa = target.isa
    return isa.family, isa.vector_bits, isa.vector_registers, isa.fma, isa.int8_dot
