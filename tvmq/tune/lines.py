"""The lines of a log's two files: sorted by task when a log is opened, parsed when their task is asked for.

    database_workload.json          [hash, module]         the module, in base64, holds its task as a string
    database_tuning_record.json     [workload, record]

Opening finds the string without reading the whole module, and the number of a record's workload without reading
the record: compiling asks for a few tasks of logs of hundreds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tvmq.kernels.task import Task, task_of_json
from tvmq.tune.workload import module_text, task_text

WORKLOADS, RECORDS = "database_workload.json", "database_tuning_record.json"
# What comes before the module in a line of the one file, and before the record in one of the other.
_MODULE_OF = re.compile(rb'\[\s*"\d+"\s*,\s*"')
_WORKLOAD_OF = re.compile(rb"\[\s*(\d+)\s*,")

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Record:
    """A line of the file of records: its number, from 1, and which workload it is of."""

    number: int
    line: bytes
    workload: int

    @property
    def text(self) -> str:
        """The record without its workload, as JSON."""
        return self.line[self.line.index(b",") + 1 : self.line.rindex(b"]")].decode().strip()


@dataclass
class Lines:
    """The lines of the log in `folder`.

    workloads: those of the file of tasks. tasks: the task of each, None where it is damaged. records: those of a known
    task, in the order in which they were made; of_task: which of them each task has.
    """

    folder: Path = field(default_factory=Path)
    workloads: list[bytes] = field(default_factory=list)
    tasks: list[Task | None] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    of_task: dict[Task, list[int]] = field(default_factory=dict)
    _checked: bool = False
    _damage: dict[tuple[str, int], str] = field(default_factory=dict)

    @property
    def damage(self) -> list[str]:
        """Why lines that were parsed so far are skipped, in their order."""
        return [self._damage[key] for key in sorted(self._damage, key=lambda key: (key[0] == RECORDS, key[1]))]

    def parsed(self, name: str, number: int, line: bytes, parse: Callable[[bytes], Parsed]) -> Parsed | None:
        """What `parse` makes of line `number` of the file `name`; None where it is damaged, which is noted."""
        try:
            if not line.endswith(b"\n"):
                raise ValueError("torn: its end is missing")
            return parse(line)
        # RuntimeError: brackets deeper than Python nests.
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            seen = str(error).strip().splitlines()
            what = seen[-1] if seen else type(error).__name__
            self._damage[name, number] = f"{self.folder / name} line {number}: skipped, {what}"
            return None

    def check_modules(self) -> None:
        """Read the modules whole: opening did not look at what surrounds their tasks."""
        if self._checked:
            return
        self._checked = True
        for index, line in enumerate(self.workloads):
            if self.tasks[index] is not None and self.parsed(WORKLOADS, index + 1, line, _module) is None:
                self.tasks[index] = None


def open_lines(folder: Path) -> Lines:
    """The lines of the log in `folder`, none where there is none."""
    lines = Lines(folder)
    for number, line in _numbered(folder / WORKLOADS):
        lines.workloads.append(line)
        lines.tasks.append(lines.parsed(WORKLOADS, number, line, _task))
    for number, line in _numbered(folder / RECORDS):
        found = lines.parsed(RECORDS, number, line, lambda text: _workload(lines.tasks, text))
        if found is not None:
            workload, task = found
            lines.of_task.setdefault(task, []).append(len(lines.records))
            lines.records.append(Record(number, line, workload))
    return lines


def _numbered(path: Path) -> Iterator[tuple[int, bytes]]:
    if path.is_file():
        yield from enumerate(path.read_bytes().splitlines(keepends=True), 1)


def _task(line: bytes) -> Task:
    found = _MODULE_OF.match(line)
    if found is None:
        raise ValueError("no workload")
    return task_of_json(task_text(line[found.end() : line.rindex(b'"')]))


def _module(line: bytes) -> Any:
    _, encoded = json.loads(line)
    return json.loads(module_text(encoded))


def _workload(tasks: list[Task | None], line: bytes) -> tuple[int, Task]:
    found = _WORKLOAD_OF.match(line)
    if found is None:
        raise ValueError("no record")
    index = int(found[1])
    task = tasks[index] if index < len(tasks) else None
    if task is None:
        raise ValueError(f"no task {index}")
    return index, task
