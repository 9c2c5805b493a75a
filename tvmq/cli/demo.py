"""`tvmq demo`: train, quantize, compile and measure a small network, in one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tvmq.cli import render
from tvmq.cli.command import Command
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser
from tvmq.cli.progress import progress

if TYPE_CHECKING:
    from rich.table import Table

    from tvmq.demo.run import Row


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Train a network on handwritten digits, compile it in float and int8, and compare with PyTorch."""

    name: ClassVar[str] = "demo"
    examples: ClassVar[tuple[str, ...]] = ("tvmq demo", "tvmq demo -o results --json")

    out: str = "demo-out"

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument(
            "-o", "--out", default="demo-out", metavar="DIR", help="for bundles and report (default demo-out)"
        )

    def run(self, out: Output) -> int:
        """Run it; exit code 1 where a bundle differs from the oracle."""
        with progress(out.errors, "demo") as report:
            report("loading TVM and PyTorch", 0)
            from tvmq.demo.run import run_demo

            found = run_demo(Path(self.out), report=report)
        host, count = found.machine, found.settings.held_out
        out.result(
            found.to_dict(),
            f"{count} held-out digits; {host['processor']} ({host['cpu']}), {host['threads']} cores\n",
            demo_table(found.rows),
            f"\nIn {self.out}: report.json, the model, its calibration data, three bundles. Look at one:\n"
            f"  tvmq explain {self.out}/digits-int8-host.tvmq --profile",
        )
        return 0 if found.ok else 1


def demo_table(rows: tuple[Row, ...]) -> Table:
    """The rows as a table; agreement is with torch."""
    columns = ("", "target", "accuracy", "agrees with torch", "median ms", "threads", "bundle", "verify")
    cells = (
        (
            row.what,
            row.target,
            _percent(row.accuracy),
            _percent(row.agreement),
            "" if row.median_ms is None else f"{row.median_ms:.3f}",
            row.threads,
            "" if row.size is None else render.kilobytes(row.size),
            row.verified,
        )
        for row in rows
    )
    return render.table(columns, cells, right=("accuracy", "agrees with torch", "median ms", "threads", "bundle"))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
