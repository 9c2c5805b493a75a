"""Waiting for what must come, however busy the machine is: tests wait for the very condition that they assert."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

# Until a test fails whose condition never holds: starting the first server takes 20 s on a busy machine.
PATIENCE_S = 240.0


def wait_until(condition: Callable[[], object]) -> None:
    """Until it holds; the test fails where it never does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_alive(process: int) -> bool:
    """Whether a process runs, and is no zombie that its parent has not collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
