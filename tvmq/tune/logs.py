"""Tuning logs as things of their own: what they hold, the best of each task, joined, pruned, exported, compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tvmq.errors import TuningError
from tvmq.files import atomic_write_text, data_folder
from tvmq.tune import database
from tvmq.tune.database import DEFAULT, FINAL, SEARCHED, TARGET, Log, Trial, verdict
from tvmq.tune.lines import RECORDS, WORKLOADS
from tvmq.tune.records import SHIPPED, user_folder

# Trials of a task that pruning keeps besides its defaults and verdicts, the fastest; and exporting, which a package
# carries: from these a cost model learns.
_KEPT, _EXPORTED = 8, 2


def known() -> list[Path]:
    """The folders of the user's own logs and of the shipped ones."""
    bases = (user_folder(), data_folder(SHIPPED))
    return [path.parent for base in bases if base.is_dir() for path in sorted(base.glob(f"*/{RECORDS}"))]


def open_log(folder: str | Path) -> Log:
    """The log in a folder, or of a target's name among the known ones. Raises TuningError where there is none."""
    named = [path for path in known() if path.name == str(folder)]
    path = Path(folder) if database.read_identity(Path(folder)) is not None or not named else named[0]
    if database.read_identity(path) is None:
        names = ", ".join(dict.fromkeys(found.name for found in known())) or "none"
        hint = f"tvmq tune makes one; those that are there: {names}"
        raise TuningError(f"tuning log {folder}", expected="the files that tvmq tune writes", seen="none", hint=hint)
    return database.read(path)


def describe(log: Log) -> dict[str, Any]:
    """How much a log holds."""
    tasks = log.by_task()
    return {
        "folder": str(log.folder),
        "target": log.identity["name"],
        "tasks": len(tasks),
        "tuned": sum(any(trial.role == FINAL for trial in trials) for trials in tasks.values()),
        "trials": len(log.trials),
        "failed": sum(not trial.seconds for trial in log.trials),
        "damaged": len(log.damage),
    }


def best(log: Log) -> list[dict[str, Any]]:
    """A row a task and number of threads: what its default takes, what the verdict is."""
    rows = []
    for (task, cores), trials in _groups(log.trials).items():
        found = verdict(trials)
        if found is None:
            continue
        default = min((t.best for t in trials if t.decision == _default(trials)), default=found.best)
        rows.append(
            {
                "task": str(task),
                "threads": cores,
                "default_ms": default * 1e3,
                "best_ms": found.best * 1e3,
                "trials": len(trials),
                "confirmed": found.role == FINAL,
                "decision": str(found.decision),
            }
        )
    return rows


def _default(trials: Iterable[Trial]) -> Any:
    return next((trial.decision for trial in trials if trial.role == DEFAULT), None)


def _groups(trials: Iterable[Trial]) -> dict[Any, list[Trial]]:
    found: dict[Any, list[Trial]] = {}
    for trial in trials:
        found.setdefault((trial.task, trial.cores), []).append(trial)
    return found


def diff(a: Log, b: Log) -> list[dict[str, Any]]:
    """The verdicts of two logs on the tasks that either holds."""
    sides = [{(row["task"], row["threads"]): row for row in best(log)} for log in (a, b)]
    rows = []
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        left, right = (side.get(key) for side in sides)
        rows.append(
            {
                "task": key[0],
                "threads": key[1],
                "a_ms": left and left["best_ms"],
                "b_ms": right and right["best_ms"],
                "a": left and left["decision"],
                "b": right and right["decision"],
            }
        )
    return rows


def merge(sources: Sequence[Log], into: Path) -> Log:
    """Add the records of `sources` to the log in `into`, each once. Raises TuningError where targets differ."""
    if not sources:
        raise TuningError("logs merge", expected="one log or more to add", seen="none")
    with database.locked(into):
        there = [database.read(into)] if database.read_identity(into) is not None else []
        logs = [*there, *sources]
        for log in logs[1:]:
            _require_same(logs[0], log)
        _write(into, logs, lambda _log, _trial: True)
    return database.read(into)


def prune(log: Log) -> Log:
    """Drop damaged lines, failures, and all but the fastest trials of each task. Defaults and verdicts stay."""
    kept = _worth(log, _KEPT)
    with database.locked(log.folder):
        _write(log.folder, [log], lambda _log, trial: id(trial) in kept)
    return database.read(log.folder)


def export(log: Log, into: Path) -> Log:
    """Write a new log of the verdict of each task, its default and its fastest trials: small enough to ship."""
    if database.read_identity(into) is not None:
        raise TuningError(f"tuning log {into}", expected="a folder without one", seen="records")
    kept = _worth(log, _EXPORTED)
    with database.locked(into):
        _write(into, [log], lambda _log, trial: id(trial) in kept)
    return database.read(into)


def _worth(log: Log, count: int) -> set[int]:
    """The trials to keep, by identity: what decides, and the `count` fastest besides, of each task."""
    return {
        id(trial)
        for trials in _groups(log.trials).values()
        for trial in [
            *(t for t in trials if t.role == DEFAULT and t.seconds),
            *[t for t in trials if t.role == FINAL][-1:],
            *sorted((t for t in trials if t.role == SEARCHED and t.seconds), key=lambda t: t.best)[:count],
        ]
    }


def _require_same(a: Log, b: Log) -> None:
    for key in a.identity:
        if key != "name" and a.identity[key] != b.identity.get(key):
            raise TuningError(
                f"tuning log {b.folder} is of another target than {a.folder}",
                expected=f"{key} {a.identity[key]!r}",
                seen=repr(b.identity.get(key)),
            )


def _write(folder: Path, logs: Sequence[Log], keep: Callable[[Log, Trial], bool]) -> None:
    """Both files whole, the tasks first: records that name a task they do not know are no records."""
    tasks: dict[Any, int] = {}
    workloads, records, seen = [], [], set()
    for log in logs:
        for trial, found in log.stored():
            if not keep(log, trial):
                continue
            if trial.task not in tasks:
                tasks[trial.task] = len(tasks)
                workloads.append(log.lines.workloads[found.workload].decode())
            record = f"[{tasks[trial.task]}, {found.text}]\n"
            if record not in seen:
                seen.add(record)
                records.append(record)
    atomic_write_text(folder / TARGET, json.dumps(logs[0].identity, indent=1) + "\n")
    # A kill in between leaves new tasks with old records, whose numbers would be others: so there are none meanwhile.
    (folder / RECORDS).unlink(missing_ok=True)
    atomic_write_text(folder / WORKLOADS, "".join(workloads))
    atomic_write_text(folder / RECORDS, "".join(records))
