"""Where a command's words go: its result to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import IO, Any

from rich.console import Console, RenderableType

# Schema of every --json document; it grows by new keys, and changes where a key changes its meaning.
SCHEMA = 1
# Columns of a table that goes to a file or a pipe: enough that no word of a usual row is cut.
_FILE_WIDTH = 160


class Output:
    """The two streams of a command. Made before stdout is guarded, so that results still reach the real one."""

    def __init__(self, command: str, *, as_json: bool) -> None:
        self.command, self.as_json = command, as_json
        self._stdout: IO[str] = sys.stdout
        self.errors = Console(file=sys.stderr, highlight=False)
        self._text: list[RenderableType] = []
        self._document: dict[str, Any] | None = None

    def result(self, document: dict[str, Any], *text: RenderableType) -> None:
        """What the command found: as plain data for --json, and for people."""
        self._document, self._text = document, list(text)

    def error(self, kind: str, message: str, exit_code: int) -> None:
        """One line on stderr; with --json the same as a document, instead of a result."""
        print(f"tvmq: {message}", file=sys.stderr)
        self._document = {"error": {"kind": kind, "message": message, "exit_code": exit_code}}
        self._text = []

    def flush(self) -> None:
        """Print the result."""
        if self.as_json:
            document = {"schema": SCHEMA, "command": self.command, **(self._document or {})}
            print(json.dumps(document, indent=1, ensure_ascii=False), file=self._stdout)
        elif self._text:
            terminal = self._stdout.isatty()
            console = Console(file=self._stdout, width=None if terminal else _FILE_WIDTH, highlight=False)
            for part in self._text:
                # A plain sentence keeps its lines: rich would wrap them.
                print(part, file=self._stdout) if isinstance(part, str) else console.print(part)
        self._stdout.flush()


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what is printed meanwhile, by a user's model or by a library below Python, to stderr."""
    sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr):
        saved = os.dup(1)
        try:
            os.dup2(2, 1)
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)
