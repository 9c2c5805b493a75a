"""A board's server in a process of its own, for tests: forked from one that has TVM loaded, which takes no time."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE_S = 60.0


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tvmq.cli", "tvmq.deploy.server", "tvmq.deploy.board_session"])
    return context


def _run(words: tuple[str, ...], log: str, environment: dict[str, str], limit: Callable[[], None] | None) -> None:
    # 1 is PR_SET_PDEATHSIG: the process that it is forked from ends with the tests, however these end.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    tempfile.tempdir = None
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    if limit is not None:
        limit()
    from tvmq.cli import main

    sys.exit(main(["board", "serve", *words]))


class Serving:
    """`tvmq board serve` and `words`, started; a context manager that ends it. url: its address.

    limit: called in its process first. environment: variables that it has.
    """

    def __init__(self, *words: str, limit: Callable[[], None] | None = None, **environment: str) -> None:
        handle, log = tempfile.mkstemp(prefix="serving-")
        os.close(handle)
        self.log = Path(log)
        self.process = _context().Process(target=_run, args=(words, log, environment, limit), daemon=True)
        self.process.start()
        self.port = int(self.wait_for(r"rpc://\S+:(\d+) serves")[1])
        self.url = f"rpc://127.0.0.1:{self.port}"

    def said(self) -> str:
        """What it has said until now."""
        return self.log.read_text()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line that matches; the test fails where none comes."""
        wait_until(lambda: re.search(pattern, self.said(), re.MULTILINE) or not self.process.is_alive())
        found = re.search(pattern, self.said(), re.MULTILINE)
        assert found, self.said()
        return found

    def sessions(self) -> list[int]:
        """The processes of sessions."""
        return [int(child) for child in children(self.process.pid).read_text().split()]

    def stop(self, number: int) -> int:
        """Send a signal; the exit code."""
        os.kill(self.process.pid, number)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join(PATIENCE_S)
        self.log.unlink()


def children(process: int | None) -> Path:
    """The file that names a process's children."""
    return Path(f"/proc/{process}/task/{process}/children")


def is_alive(process: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], object]) -> None:
    """Until it holds; the test fails where it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
