"""The command line, thin over the library: parse, one library call, print. Nothing heavy is imported to print help."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from tvmq._version import __version__
from tvmq.cli.bench import Bench
from tvmq.cli.board import Board
from tvmq.cli.build import Calibrate, Compile
from tvmq.cli.check import Explain, Verify
from tvmq.cli.command import Command
from tvmq.cli.demo import Demo
from tvmq.cli.execute import Run
from tvmq.cli.logs import Logs
from tvmq.cli.output import Output, stdout_to_stderr
from tvmq.cli.parser import Parser, UsageError
from tvmq.cli.sparse import Sparse
from tvmq.cli.targets import Targets
from tvmq.cli.tune import INTERRUPTED, Tune
from tvmq.errors import TvmqError, nearest

COMMANDS: dict[str, type[Command]] = {
    command.name: command
    for command in (Compile, Calibrate, Run, Tune, Logs, Bench, Verify, Explain, Sparse, Targets, Board, Demo)
}
# What a shell reports for a program that ended because nobody read its output (128 + SIGPIPE).
PIPE_CLOSED = 141

_EXAMPLES = """\
examples:
  tvmq targets                                             what can be compiled for
  tvmq compile model.pt2 -t raspberry-pi-4b -o model.tvmq  compile in float
  tvmq compile model.pt2 -t host --precision int8 --calibrate data.npz -o model.tvmq
  tvmq tune model.pt2 --budget 10m                         measure which kernels are fastest here
  tvmq bench model.tvmq                                    how fast it is
  tvmq verify model.tvmq                                   whether each operator computes what it should
  tvmq demo                                                all of it, on handwritten digits

exit codes: 0 done, 1 a check said no, 2 bad input, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    out = Output(words[0] if words else "", as_json="--json" in words)
    try:
        return _main(words, out)
    except TvmqError as error:
        return _fail(out, type(error).__name__, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(out, "Interrupted", "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Python flushes stdout once more when it ends: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED


def entry() -> NoReturn:
    """The console script: run sys.argv and end the process."""
    code = main()
    if code == INTERRUPTED:
        # Python would end itself by SIGINT where the interrupt passed through a C extension that runs Python code (as
        # TVM and PyTorch do while they load), and TVM's threads are not waited for.
        sys.stderr.flush()
        os._exit(code)
    # What was asked for is done and told: an interrupt from here on would only print a traceback of some library's end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _main(words: list[str], out: Output) -> int:
    command = parse(words)
    with stdout_to_stderr():
        code = command.run(out)
    out.flush()
    return code


def _fail(out: Output, kind: str, message: str, exit_code: int) -> int:
    out.error(kind, message, exit_code)
    out.flush()
    return exit_code


def parse(words: Sequence[str]) -> Command:
    """The command that `words` describe. Raises UsageError, and SystemExit(0) for --help and --version."""
    parser, parsers = _parsers()
    if words and words[0] in parsers:
        parsers[words[0]].check_options(words[1:])
    elif words and not words[0].startswith("-"):
        hint = nearest(words[0], parsers) or f"one of {', '.join(parsers)}"
        raise UsageError(f"unknown command {words[0]!r}", hint=hint)
    else:
        parser.check_options(words)
    values = parser.parse_args(words)
    return COMMANDS[values.command].from_namespace(values)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="tvmq",
        description="Quantize, cross-compile, run and measure PyTorch models for x86 and ARM CPUs.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"tvmq {__version__}")
    group = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    parsers = {}
    for name, command in COMMANDS.items():
        text = command.__doc__ or ""
        examples = "\n".join(["examples:", *(f"  {line}" for line in command.examples)])
        parsers[name] = group.add_parser(name, help=text.splitlines()[0], description=text, epilog=examples)
        command.add_arguments(parsers[name])
        parsers[name].add_argument("--json", action="store_true", help="one JSON document on stdout")
    return parser, parsers


__all__ = ["COMMANDS", "entry", "main", "parse"]
