"""`tvmq logs`: what tuning logs hold; joined, pruned, exported, compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import Command
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.progress import progress
from tvmq.errors import nearest

if TYPE_CHECKING:
    from tvmq.tune.database import Log

# What each action takes after it: how many logs or folders, at least and at most.
_TAKES: dict[str, tuple[str, int, int]] = {
    "list": ("no LOG, or those to list", 0, 99),
    "best": ("one LOG", 1, 1),
    "merge": ("the LOG to add to, and one or more to add", 2, 99),
    "prune": ("one LOG", 1, 1),
    "export": ("one LOG, and a new folder", 2, 2),
    "diff": ("two LOGs", 2, 2),
}


@dataclass(frozen=True, kw_only=True)
class Logs(Command):
    """Look at tuning logs and tidy them: list, best, merge, prune, export, diff."""

    name: ClassVar[str] = "logs"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq logs",
        "tvmq logs best host",
        "tvmq logs merge tuning_logs/host from-the-farm/host",
        "tvmq logs prune tuning_logs/host",
        "tvmq logs export host tuning_logs/my-board",
        "tvmq logs diff before after",
    )

    action: str = "list"
    logs: tuple[str, ...] = ()

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("action", nargs="?", default="list", metavar="|".join(_TAKES), help="default: list")
        parser.add_argument("logs", nargs="*", metavar="LOG", help="folders, or names of targets")

    def run(self, out: Output) -> int:
        """Do what was asked for."""
        if self.action not in _TAKES:
            hint = nearest(self.action, _TAKES)
            raise UsageError(f"unknown action {self.action!r}", expected=f"one of {', '.join(_TAKES)}", hint=hint)
        text, least, most = _TAKES[self.action]
        if not least <= len(self.logs) <= most:
            raise UsageError(f"tvmq logs {self.action}", expected=text, seen=f"{len(self.logs)} of them")
        with progress(out.errors, "logs") as report:
            report("loading TVM", 0)
            from tvmq.tune import logs

            actions: dict[str, Callable[[], tuple[dict[str, Any], list[Any]]]] = {
                "list": lambda: _list([logs.open_log(path) for path in self.logs or logs.known()]),
                "best": lambda: _rows("best", logs.best(logs.open_log(self.logs[0]))),
                "diff": lambda: _rows("diff", logs.diff(*map(logs.open_log, self.logs))),
                "merge": lambda: _list([logs.merge([logs.open_log(p) for p in self.logs[1:]], Path(self.logs[0]))]),
                "prune": lambda: _list([logs.prune(logs.open_log(self.logs[0]))]),
                "export": lambda: _list([logs.export(logs.open_log(self.logs[0]), Path(self.logs[1]))]),
            }
            document, shown = actions[self.action]()
        out.result(document, *shown)
        return 0


def _list(found: list[Log]) -> tuple[dict[str, Any], list[Any]]:
    from tvmq.tune.logs import describe

    rows = [describe(log) for log in found]
    damage = [note for log in found for note in log.damage]
    columns = ("folder", "target", "tasks", "tuned", "trials", "failed", "damaged")
    table = render.table(columns, ([row[c] for c in columns] for row in rows), right=columns[2:])
    return {"logs": rows, "damage": damage}, [table if rows else "no tuning logs yet: see tvmq tune --help", *damage]


def _rows(name: str, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    columns = tuple(rows[0]) if rows else ("task",)
    cells = ([_cell(row[column]) for column in columns] for row in rows)
    numbers = [column for column in columns if column.endswith("_ms") or column in ("threads", "trials")]
    return {name: rows}, [render.table(columns, cells, right=numbers)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else str(value)
