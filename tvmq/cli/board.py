"""`tvmq board`: the server of a board, an emulated board, and what instructions a bundle takes there."""

from __future__ import annotations

import ipaddress
import signal
import sys
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
    from tvmq.measure.counts import Counts

# Each action, and the options that it takes.
ACTIONS = {
    "serve": ("host", "port", "secret", "tracker", "key"),
    "emulate": ("cpu", "port", "count"),
    "pack": ("target", "out"),
}
# Of 64-bit ARM processors as qemu calls them; `qemu-aarch64 -cpu help` lists all.
DEFAULT_CPU = "max"
LOOPBACK = "127.0.0.1"
NO_TIMES = "an emulated board: it proves results, its times mean nothing (instructions: tvmq board emulate --count)"


@dataclass(frozen=True, kw_only=True)
class Board(Command):
    """Serve this machine as a board, or an emulated 64-bit ARM one; count instructions there; pack a native runner."""

    name: ClassVar[str] = "board"
    examples: ClassVar[tuple[str, ...]] = (
        "tvmq board serve --host 0.0.0.0 --port 9090 --secret ~/.config/tvmq/secret",
        "tvmq board serve --tracker 192.168.1.2:9190 --key pi4",
        "tvmq board pack --target raspberry-pi-4b -o board.tar.gz",
        "tvmq board emulate --cpu cortex-a76 --port 9090",
        "tvmq board emulate --cpu cortex-a53 --count model.tvmq",
    )

    action: str
    host: str | None = None
    port: int | None = None
    secret: str | None = None
    tracker: str | None = None
    key: str | None = None
    cpu: str | None = None
    count: tuple[str, ...] | None = None
    target: str | None = None
    out: str | None = None

    @classmethod
    def add_arguments(cls, parser: Parser) -> None:
        """Declare the options."""
        parser.add_argument(
            "action",
            metavar="ACTION",
            help="serve: this machine; emulate: under qemu-user, 110 MB to load once; pack: for a board without Python",
        )
        parser.add_argument("--port", type=int, metavar="N", help="to listen on (default: any free one)")
        parser.add_argument("--host", metavar="H", help=f"serve: the address to listen on (default: {LOOPBACK})")
        parser.add_argument(
            "--secret", metavar="FILE", help="serve: clients must know what is in it, mode 0600; none: let everybody in"
        )
        parser.add_argument(
            "--tracker", metavar="HOST:PORT", help="serve: offer the board at TVM's tracker; needs --key"
        )
        parser.add_argument("--key", metavar="KEY", help="serve: what the tracker calls boards like this one")
        parser.add_argument(
            "--cpu", metavar="CPU", help="emulate: cortex-a53, a72, a76, neoverse-n1, max (default), ..."
        )
        parser.add_argument(
            "--count", nargs="+", metavar="BUNDLE", help="emulate: count instructions on one thread, and end"
        )

        parser.add_argument("-t", "--target", metavar="TARGET", help="pack: a 64-bit ARM board, as of tvmq compile")
        parser.add_argument("-o", "--out", metavar="FILE", help="pack: the .tar.gz to write")

    def run(self, out: Output) -> int:
        """Serve until interrupted, count, or pack."""
        self._check()
        if self.count:
            self._count(out)
        elif self.action == "pack":
            self._pack(out)
        elif self.action == "serve":
            self._serve(out)
        else:
            self._emulate(out)
        return 0

    def _check(self) -> None:
        if self.action not in ACTIONS:
            hint = nearest(self.action, tuple(ACTIONS))
            raise UsageError(f"unknown action {self.action!r}", expected=f"one of {', '.join(ACTIONS)}", hint=hint)
        for option in sorted({name for names in ACTIONS.values() for name in names} - set(ACTIONS[self.action])):
            if getattr(self, option) is not None:
                raise UsageError(f"--{option}", expected=f"another action than {self.action}")
        if not 0 <= (self.port or 0) < 65536:
            raise UsageError("--port", expected="a port from 0 to 65535", seen=self.port)
        if self.count and self.port:
            raise UsageError("--port", expected="only without --count")
        if (self.tracker is None) != (self.key is None):
            raise UsageError("--tracker HOST:PORT and --key KEY", expected="both or none")
        if self.action == "pack" and (self.target is None or self.out is None):
            raise UsageError("board pack", expected="--target TARGET and -o FILE")
        if self.secret is None and not _is_loopback(self.host or LOOPBACK):
            hint = "who reaches this board may run any code on it; --secret none lets everybody"
            raise UsageError(f"--host {self.host}", expected="--secret FILE with it", hint=hint)

    def _serve(self, out: Output) -> None:
        from tvmq.deploy.address import host_and_port
        from tvmq.deploy.secret import NONE, read_secret
        from tvmq.deploy.server import Server

        _stop_on_sigterm()
        with_secret = self.secret not in (None, NONE)
        secret = read_secret(Path(str(self.secret)).expanduser()) if with_secret else None
        with Server(self.host or LOOPBACK, self.port or 0, secret, _say) as server:
            if self.tracker is not None:
                server.register(*host_and_port(self.tracker, "--tracker"), str(self.key))
            url = f"rpc://{server.host}:{server.port}"
            try:
                server.prepare()
                asks = "asks for the secret" if with_secret else "lets everybody in who reaches it"
                _say(f"{url} serves and {asks}; Ctrl-C stops it")
                server.serve()
            except KeyboardInterrupt:
                out.result({"device": url}, "stopped")

    def _emulate(self, out: Output) -> None:
        with progress(out.errors, "board") as report:
            report("preparing", 0)
            from tvmq.deploy.emulate import EmulatedBoard, prepare

            board = EmulatedBoard(prepare())
        _stop_on_sigterm()
        cpu = self.cpu or DEFAULT_CPU
        with board.start(cpu=cpu, port=self.port or 0):
            _say(f"{board.url} is {NO_TIMES}\nCtrl-C stops it")
            document = {"device": board.url, "cpu": cpu}
            try:
                board.wait()
            except KeyboardInterrupt:
                out.result(document, "stopped")

    def _pack(self, out: Output) -> None:
        from tvmq.target import load_target

        target, path = load_target(str(self.target)), str(self.out)
        with progress(out.errors, "board") as report:
            report("packing", 0)
            from tvmq.deploy.board_root import RUNNER
            from tvmq.deploy.pack import FOLDER, pack

            size = pack(target, path)
        text = f"{path}: {size:,} bytes\non the board: tar xf FILE && {FOLDER}/{RUNNER} run model.tvmq"
        out.result({"pack": path, "bytes": size, "target": target.name}, text)

    def _count(self, out: Output) -> None:
        cpu = self.cpu or DEFAULT_CPU
        with progress(out.errors, "board") as report:
            report("loading TVM", 0)
            from tvmq.measure.counts import count

            found = [count(path, cpu, lambda text: report(text, 0)) for path in self.count or ()]
        text = [part for counts in found for part in _text(counts)]
        out.result({"cpu": cpu, "bundles": [counts.to_dict() for counts in found]}, *text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop_on_sigterm() -> None:
    # A service manager's way to stop it; Ctrl-C is Python's own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text(counts: Counts) -> tuple[Any, ...]:
    """A table of a bundle's operators, and the sum."""
    columns = ("operator", "kernel", "precision", "instructions")
    rows = ((op.name, op.kernel, op.precision, f"{op.instructions:,}") for op in counts.ops)
    total = f"{counts.bundle}: {counts.instructions:,} instructions an inference on one {counts.cpu}"
    return render.table(columns, rows, right=columns[3:]), total
