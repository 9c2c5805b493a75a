"""`tvmq targets`: which devices are known, what follows from one, and what this machine is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import Command
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.progress import progress
from tvmq.errors import nearest
from tvmq.target import HOST, describe, load_target, target_summaries

ACTIONS = ("list", "show", "detect")


@dataclass(frozen=True, kw_only=True)
class Targets(Command):
    """List the targets; show one, with what was derived; or print this machine as a target file."""

    name: ClassVar[str] = "targets"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq targets",
        "tvmq targets show raspberry-pi-4b",
        "tvmq targets detect > my-machine.toml",
    )

    action: str = "list"
    target: str | None = None

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("action", nargs="?", default="list", metavar="list|show|detect", help="default: list")
        parser.add_argument("target", nargs="?", metavar="NAME", help="for show: a name, a .toml file, or host")

    def run(self, out: Output) -> int:
        """Print what was asked for."""
        if self.action not in ACTIONS:
            hint = nearest(self.action, ACTIONS)
            raise UsageError(f"unknown action {self.action!r}", expected=f"one of {', '.join(ACTIONS)}", hint=hint)
        if (self.action == "show") != (self.target is not None):
            expected = "a NAME after show" if self.action == "show" else f"no NAME after {self.action}"
            raise UsageError("tvmq targets", expected=expected, seen=self.target)
        if self.action == "list":
            _list(out)
        else:
            _one(out, self.target or HOST, as_toml=self.action == "detect")
        return 0


def _list(out: Output) -> None:
    rows = target_summaries()
    columns = ("name", "triple", "cpu", "cores", "description")
    cells = ([row[column] for column in columns] for row in rows)
    out.result({"targets": rows}, render.table(columns, cells, right=("cores",)))


def _one(out: Output, name: str, *, as_toml: bool) -> None:
    with progress(out.errors, "targets") as report:
        report("asking LLVM", 0)
        target = load_target(name)
        described: dict[str, Any] = describe(target)
    text = target.to_toml().rstrip("\n") if as_toml else render.tree(described)
    out.result({"target": described}, text)
