"""A tuning log: the trials of one target in a folder, in MetaSchedule's JSON format, whatever happens to the tuner.

    target.json                   which device it is of: records of another one are refused
    database_workload.json        a line a task
    database_tuning_record.json   a line a trial, appended whole and synced when it was measured
    lock                          held by the one process that writes

A process killed at any instant leaves at worst one torn line at the end of a file: it is dropped and reported when the
log is next opened for writing. Lines that cannot be read are skipped, counted and reported by their number. A line is
parsed when its task is asked for: see `lines`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tvm.s_tir import meta_schedule as ms

from tvmq.errors import OutputError, TuningError
from tvmq.files import atomic_write_text
from tvmq.kernels.decision import Decision, Space
from tvmq.kernels.task import Task
from tvmq.target import Target
from tvmq.tune.lines import RECORDS, WORKLOADS, Lines, Record, open_lines
from tvmq.tune.workload import decision_of_trace, line_of, record_of, workload_of

TARGET, LOCK = "target.json", "lock"
# What a trial was: the analytic default, one of the search, or the winner of the last comparison of a task.
DEFAULT, SEARCHED, FINAL = "default", "searched", "final"
# Seconds that MetaSchedule records for a trial that failed.
FAILED = 1e10
# A trial that no final comparison confirmed must beat the default by this much.
_UNCONFIRMED = 0.95


@dataclass(frozen=True)
class Trial:
    """One measured candidate: `seconds` of each repeat, empty where it failed, on `cores` threads."""

    task: Task
    decision: Decision
    role: str
    seconds: tuple[float, ...]
    cores: int

    @property
    def best(self) -> float:
        """The least time in seconds; infinity where it failed."""
        return min(self.seconds, default=float("inf"))


@dataclass
class Log:
    """The trials in `folder`: those in its files, and those that this process `added`.

    identity: of the target that they are of. dropped: what was cut off the files when they were opened for writing.
    """

    folder: Path
    identity: dict[str, Any]
    lines: Lines = field(default_factory=Lines)
    added: list[Trial] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    _parsed: dict[int, Trial | None] = field(default_factory=dict)

    @property
    def trials(self) -> list[Trial]:
        """All of them, in the order in which they were made."""
        return [*(trial for trial, _ in self.stored()), *self.added]

    @property
    def damage(self) -> list[str]:
        """What could not be read, of all lines."""
        self.stored()
        return [*self.dropped, *self.lines.damage]

    def tasks(self) -> list[Task]:
        """The tasks that have trials."""
        return list(dict.fromkeys([*self.lines.of_task, *(trial.task for trial in self.added)]))

    def of(self, task: Task) -> list[Trial]:
        """The trials of a task, in the order in which they were made."""
        stored = (self._trial(index) for index in self.lines.of_task.get(task, ()))
        found = [trial for trial in stored if trial is not None]
        return found + [trial for trial in self.added if trial.task == task]

    def by_task(self, cores: int | None = None) -> dict[Task, list[Trial]]:
        """The trials of each task, on `cores` threads where that is given."""
        found: dict[Task, list[Trial]] = {}
        for trial in self.trials:
            if cores in (None, trial.cores):
                found.setdefault(trial.task, []).append(trial)
        return found

    def stored(self) -> list[tuple[Trial, Record]]:
        """The trials in the files, and their lines."""
        self.lines.check_modules()
        records = enumerate(self.lines.records)
        return [(trial, record) for index, record in records if (trial := self._trial(index)) is not None]

    def _trial(self, index: int) -> Trial | None:
        if index not in self._parsed:
            record = self.lines.records[index]
            task = self.lines.tasks[record.workload]
            self._parsed[index] = self.lines.parsed(
                RECORDS, record.number, record.line, lambda line: _trial(self.identity, task, line)
            )
        return self._parsed[index]


def verdict(trials: Iterable[Trial]) -> Trial | None:
    """The trial that decides: the last final one, else the fastest if it beats the default clearly, else the default.

    None where the default was not measured: nothing says that another is better.
    """
    known = list(trials)
    finals = [trial for trial in known if trial.role == FINAL]
    if finals:
        return finals[-1]
    default = min((t for t in known if t.role == DEFAULT), key=lambda trial: trial.best, default=None)
    if default is None or not default.seconds:
        return None
    best = min(known, key=lambda trial: trial.best)
    return best if best.best < _UNCONFIRMED * default.best else default


def read(folder: Path, target: Target | None = None) -> Log:
    """The log in `folder`, empty where there is none. Raises TuningError where it is not of `target`."""
    found = read_identity(folder)
    if target is not None:
        _check_target(folder, found, target)
    return Log(folder, found or (identity(target) if target is not None else {}), open_lines(folder))


def _trial(owner: dict[str, Any], task: Task | None, line: bytes) -> Trial:
    """What a record in a log of `owner` says. Raises ValueError, TypeError, KeyError, IndexError or AttributeError."""
    if task is None:
        raise ValueError("its task is damaged")
    _, (trace, seconds, target, _) = json.loads(line)
    # What MetaSchedule writes of a target that says which one it is, but for the number of threads.
    for key, value in (("mtriple", owner["triple"]), ("mcpu", owner["cpu"])):
        if target.get(key) != value:
            raise ValueError(f"of another target: {key} is {target.get(key)!r}, not {value!r}")
    decision, role = decision_of_trace(trace)
    times = tuple(float(s) for s in seconds if s < FAILED)
    return Trial(task, decision, role, times, int(target["num-cores"]))


def identity(target: Target) -> dict[str, Any]:
    """What must be equal for records to be of one target; how many threads they ran on each says for itself."""
    return {"name": target.name, "triple": target.triple, "cpu": target.cpu, "features": list(target.features)}


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity of the target that a log is of; None where there is no log. Raises TuningError."""
    path = folder / TARGET
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TuningError(f"tuning log {folder}", expected=f"a readable {TARGET}", seen=str(error)) from error
    if not isinstance(raw, dict):
        raise TuningError(f"tuning log {folder}", expected=f"a table in {TARGET}", seen=type(raw).__name__)
    return raw


def _check_target(folder: Path, found: dict[str, Any] | None, target: Target) -> None:
    if found is None:
        if (folder / RECORDS).is_file():
            raise TuningError(
                f"tuning log {folder}", expected=f"a {TARGET} that says whose records they are", seen="none"
            )
        return
    wanted = identity(target)
    for key in wanted:
        if key != "name" and found.get(key) != wanted[key]:
            raise TuningError(
                f"tuning log {folder} is of another target",
                expected=f"{key} {wanted[key]!r} of {target.name}",
                seen=repr(found.get(key)),
                hint="give another folder with -o",
            )


class Writer:
    """The one process that adds to a log. A context manager. Raises TuningError where another one has it."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder, self.target = folder, target
        self._lock = _lock(folder)
        try:
            dropped = [note for name in (WORKLOADS, RECORDS) if (note := _drop_torn(folder / name))]
            self.log = dataclasses.replace(read(folder, target), dropped=dropped)
        except BaseException:
            self._lock.close()
            raise
        if not (folder / TARGET).exists():
            atomic_write_text(folder / TARGET, json.dumps(identity(target), indent=1) + "\n")
        self._count = len(self.log.lines.tasks)
        self._known = {task: index for index, task in enumerate(self.log.lines.tasks) if task is not None}
        self._workloads: dict[Task, Any] = {}

    def add(self, trial: Trial, spaces: Sequence[Space]) -> None:
        """Append a trial: when this returns, no kill loses it. Raises OutputError."""
        if trial.task not in self._workloads:
            self._workloads[trial.task] = ms.database.Workload(workload_of(trial.task))
        workload = self._workloads[trial.task]
        if trial.task not in self._known:
            self._append(WORKLOADS, line_of(workload))
            self._known[trial.task] = self._count
            self._count += 1
        seconds = trial.seconds or (FAILED,)
        record = record_of(workload, spaces, trial.decision, trial.role, seconds, self.target)
        self._append(RECORDS, [self._known[trial.task], record.as_json()])
        self.log.added.append(trial)

    def _append(self, name: str, value: Any) -> None:
        line = (json.dumps(value) + "\n").encode()
        try:
            handle = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                while line:
                    line = line[os.write(handle, line) :]
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / name}", seen=error.strerror or str(error)) from error

    def close(self) -> None:
        """Let others write."""
        self._lock.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else writes to the log meanwhile. Raises TuningError, OutputError."""
    file = _lock(folder)
    try:
        yield
    finally:
        file.close()


def _lock(folder: Path) -> Any:
    """The lock file, held. The system lets go of it when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {folder}", seen=error.strerror or str(error)) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "unknown"
        file.close()
        hint = "wait for it, or give another folder with -o"
        raise TuningError(f"tuning log {folder}", seen=f"process {owner} writing to it", hint=hint) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _drop_torn(path: Path) -> str | None:
    """Cut off what follows the last whole line; a note where there was something."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole == len(data):
        return None
    with path.open("r+b") as file:
        file.truncate(whole)
        os.fsync(file.fileno())
    return f"{path} line {data.count(bytes([10])) + 1}: torn by a kill, dropped"
