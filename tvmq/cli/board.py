"""`tvmq board`: an emulated board on this machine, and what instructions a bundle takes there."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tvmq.cli import render
from tvmq.cli.command import Command
from tvmq.cli.output import Output
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.progress import progress
from tvmq.errors import nearest

if TYPE_CHECKING:
    from tvmq.measure.counts import Counts

ACTIONS = ("emulate",)
# Of 64-bit ARM processors as qemu calls them; `qemu-aarch64 -cpu help` lists all.
DEFAULT_CPU = "max"
NO_TIMES = "an emulated board: it proves results, its times mean nothing (instructions: tvmq board emulate --count)"


@dataclass(frozen=True, kw_only=True)
class Board(Command):
    """Start an emulated 64-bit ARM board that serves until Ctrl-C, or count the instructions of bundles on one."""

    name: ClassVar[str] = "board"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq board emulate --cpu cortex-a76 --port 9090",
        "tvmq board emulate --cpu cortex-a53 --count model.tvmq",
    )

    action: str
    cpu: str = DEFAULT_CPU
    port: int = 0
    count: tuple[str, ...] = ()

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument("action", metavar="emulate", help="a board under qemu-user; prepared once, 110 MB to load")
        parser.add_argument(
            "--cpu", default=DEFAULT_CPU, metavar="CPU", help="cortex-a53, a72, a76, neoverse-n1, max (default), ..."
        )
        parser.add_argument("--port", type=int, default=0, metavar="N", help="to listen on (default: any free one)")
        parser.add_argument(
            "--count", nargs="+", default=(), metavar="BUNDLE", help="count instructions on one thread, and end"
        )

    def run(self, out: Output) -> int:
        """Serve until interrupted, or count."""
        if self.action not in ACTIONS:
            hint = nearest(self.action, ACTIONS)
            raise UsageError(f"unknown action {self.action!r}", expected=f"one of {', '.join(ACTIONS)}", hint=hint)
        if not 0 <= self.port < 65536:
            raise UsageError("--port", expected="a port from 0 to 65535", seen=self.port)
        if self.count and self.port:
            raise UsageError("--port", expected="only without --count")
        if self.count:
            self._count(out)
        else:
            self._serve(out)
        return 0

    def _serve(self, out: Output) -> None:
        with progress(out.errors, "board") as report:
            report("preparing", 0)
            from tvmq.deploy.emulate import EmulatedBoard, prepare

            board = EmulatedBoard(prepare())
        # A service manager's way to stop it; Ctrl-C is Python's own.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with board.start(cpu=self.cpu, port=self.port):
            out.errors.print(f"{board.url} is {NO_TIMES}\nCtrl-C stops it")
            document = {"device": board.url, "cpu": self.cpu}
            try:
                board.wait()
            except KeyboardInterrupt:
                out.result(document, "stopped")

    def _count(self, out: Output) -> None:
        with progress(out.errors, "board") as report:
            report("loading TVM", 0)
            from tvmq.measure.counts import count

            found = [count(path, self.cpu, lambda text: report(text, 0)) for path in self.count]
        text = [part for counts in found for part in _text(counts)]
        out.result({"cpu": self.cpu, "bundles": [counts.to_dict() for counts in found]}, *text)


def _text(counts: Counts) -> tuple[Any, ...]:
    """A table of a bundle's operators, and the sum."""
    columns = ("operator", "kernel", "precision", "instructions")
    rows = ((op.name, op.kernel, op.precision, f"{op.instructions:,}") for op in counts.ops)
    total = f"{counts.bundle}: {counts.instructions:,} instructions an inference on one {counts.cpu}"
    return render.table(columns, rows, right=columns[3:]), total
